"""What the documentation's site has beside the pages of docs/: MkDocs calls this file (see mkdocs.yml).

README, CONTRIBUTING and CHANGELOG become pages, each public module gets a page of the API, and every other file of the
repository that a page links to gets a page that shows it. So a link between files works on the site as it does in the
repository.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import check_links

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = {"README.md": "readme.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the repository outside docs/, and what they are called on the site."""
MODULES = {
    "star": "python/star/__init__.py",
    "star.capture": "python/star/capture/__init__.py",
    "star.concepts": "python/star/concepts/__init__.py",
    "star.objective": "python/star/objective/__init__.py",
    "star.rewards": "python/star/rewards/__init__.py",
    "star_kernels": "star_kernels/__init__.py",
}
"""Modules with a page of the API, which shows the names of their `__all__`, and where they are."""
LANGUAGES = {".py": "python", ".md": "markdown", ".yml": "yaml", ".yaml": "yaml", ".diff": "diff", ".toml": "toml"}


def api_page(module: str) -> str:
    """Where the API of a module is on the site."""
    return f"api/{module}.md"


def location(file: Path) -> str:
    """Where a file of the repository is on the site, as a path below docs/."""
    if file.is_relative_to(DOCS):
        return file.relative_to(DOCS).as_posix()
    name = file.relative_to(ROOT).as_posix()
    return PAGES.get(name, f"repository/{name}.md")


def linked_file(page: Path, target: str) -> Path | None:
    """The file or folder of the repository that a link of a page names; None for another site or the page itself."""
    path = unquote(target).partition("#")[0]
    if not path or check_links.ELSEWHERE.match(target):
        return None
    return Path(os.path.normpath(page.parent / path))


def site_text(page: Path) -> str:
    """A page of the repository as the site has it: with links as they are there, and Markdown read inside of folds."""
    lines = page.read_text().splitlines(keepends=True)
    folder = Path(location(page)).parent
    for number, target in check_links.targets(page):
        file = linked_file(page, target)
        if file is not None:
            moved = os.path.relpath(location(file), folder) + target[len(target.partition("#")[0]) :]
            line = lines[number - 1]
            lines[number - 1] = re.sub(rf"(?<=[(<\"' ]){re.escape(target)}(?=[)>\"'\s])", moved, line)
    return re.sub(r"^<details>", '<details markdown="1">', "".join(lines), flags=re.M)


def sources() -> dict[str, Path]:
    """The Markdown pages of the repository that the site has, by their location on it."""
    return {location(page): page for page in [*sorted(DOCS.rglob("*.md")), *(ROOT / name for name in PAGES)]}


def shown_files() -> set[Path]:
    """Files outside docs/ that pages link to and that are no pages themselves."""
    pages = sources().values()
    linked = {file for page in pages for _, target in check_links.targets(page) if (file := linked_file(page, target))}
    return {file for file in linked if not file.is_relative_to(DOCS) and file not in pages}


def notebook_page(file: Path) -> str:
    """A page with the cells of a notebook."""

    def moved(link: re.Match[str]) -> str:
        found = linked_file(file, link[1])
        folder = Path(location(file)).parent
        return link[0] if found is None else link[0].replace(link[1], os.path.relpath(location(found), folder))

    parts = []
    for cell in json.loads(file.read_text())["cells"]:
        text = "".join(cell["source"])
        is_code = cell["cell_type"] == "code"
        parts.append(f"~~~~~~ python\n{text}\n~~~~~~\n" if is_code else f"{check_links.INLINE.sub(moved, text)}\n")
    return "\n".join(parts)


def file_page(file: Path) -> str:
    """A page that shows a file, or lists a folder."""
    if file.suffix == ".ipynb":
        return notebook_page(file)
    name = file.relative_to(ROOT).as_posix()
    if file.is_dir():
        return f"# {name}\n\n" + "".join(f"- `{entry.name}`\n" for entry in sorted(file.iterdir()))
    return f"# {name}\n\n~~~~~~ {LANGUAGES.get(file.suffix, 'text')}\n{file.read_text()}~~~~~~\n"


def generated() -> dict[str, str]:
    """Text of the pages that docs/ does not have, by their location."""
    pages = {location(ROOT / name): site_text(ROOT / name) for name in PAGES}
    pages |= {api_page(module): f"# {module}\n\n::: {module}\n" for module in MODULES}
    return pages | {location(file): file_page(file) for file in shown_files()}


def on_files(files: Any, config: Any) -> Any:
    """MkDocs has found the files of docs/."""
    from mkdocs.structure.files import File  # the rest of this file is read without MkDocs

    for name, text in generated().items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_read_source(page: Any, config: Any) -> str | None:
    """MkDocs reads a page; None: from its file, which here is a generated one."""
    source = sources().get(page.file.src_uri)
    return None if source is None else site_text(source)
