"""Checks the links of Markdown pages: `python tools/check_links.py [PAGE...]`, without pages those of the repository.

A link into the repository must name a file that is there, and after a # a heading of that page. Links to other sites
are not followed. Prints one line for each broken link and ends with 1 if there is any.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[1]
FENCE = re.compile(r"^\s*(```+|~~~+)")
CODE = re.compile(r"(`+).+?\1")
INLINE = re.compile(r"\]\(\s*<?([^\s<>)]+)>?(?:\s+[\"'][^)]*)?\)")
DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]:\s*<?([^\s<>]+)")
ATTRIBUTE = re.compile(r"\b(?:href|src)=[\"']([^\"']+)[\"']")
HEADING = re.compile(r"^ {0,3}#{1,6}\s+(.*?)\s*#*\s*$")
ANCHOR = re.compile(r"\b(?:id|name)=[\"']([^\"']+)[\"']")
ELSEWHERE = re.compile(r"^(?:[a-z][a-z0-9+.-]*:|//)", re.IGNORECASE)


def lines_of_text(page: Path) -> Iterator[tuple[int, str]]:
    """(number, line) outside blocks of code and comments."""
    fence, comment = "", False
    for number, line in enumerate(page.read_text().splitlines(), 1):
        opened = FENCE.match(line)
        if fence:
            if opened and opened[1].startswith(fence):
                fence = ""
            continue
        if opened:
            fence = opened[1]
            continue
        if comment or line.lstrip().startswith("<!--"):
            comment = "-->" not in line
            continue
        yield number, line


def anchors(page: Path) -> set[str]:
    """What can follow a # in a link to the page: its headings as GitHub writes them, and named HTML elements."""
    names: set[str] = set()
    seen: Counter[str] = Counter()
    for _, line in lines_of_text(page):
        names |= set(ANCHOR.findall(line))
        if heading := HEADING.match(line):
            text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            names.add(f"{name}-{seen[name]}" if seen[name] else name)
            seen[name] += 1
    return names


def targets(page: Path) -> Iterator[tuple[int, str]]:
    """(line number, target) of every link and image."""
    for number, line in lines_of_text(page):
        text = CODE.sub("", line)
        for pattern in (INLINE, DEFINITION, ATTRIBUTE):
            for target in pattern.findall(text):
                yield number, target


def problem(page: Path, target: str) -> str | None:
    """What is wrong with a link, or None."""
    path, _, anchor = unquote(target).partition("#")
    linked = page if not path else ROOT / path.lstrip("/") if path.startswith("/") else page.parent / path
    if not linked.exists():
        return "no such file"
    if anchor and linked.suffix == ".md" and anchor not in anchors(linked):
        return "no such heading"
    return None


def broken_links(page: Path) -> list[str]:
    """One line for each."""
    return [
        f"{page}:{number}: {target}: {wrong}"
        for number, target in targets(page)
        if not ELSEWHERE.match(target) and (wrong := problem(page, target))
    ]


def pages() -> list[Path]:
    """The repository's Markdown pages, outside hidden folders and what is built."""
    skipped = {"build", "dist", "runs"}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*.md"))
    inner = (path for path in found if not any(part.startswith(".") or part in skipped for part in path.parts[:-1]))
    return sorted(ROOT / path for path in inner)


def main(names: list[str]) -> int:
    checked = [Path(name) for name in names] or pages()
    broken = [line for page in checked for line in broken_links(page)]
    print(*broken, f"{len(checked)} pages, {len(broken)} broken links", sep="\n")
    return bool(broken)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
