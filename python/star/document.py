"""Marked parts of a Markdown document: a tool writes them, and everything around them is written by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from star import files
from star.config import ConfigError


def surroundings(document: Path, name: str) -> tuple[str, str]:
    """A document up to its mark `<!-- NAME -->` and from its mark `<!-- end of NAME -->` on, both with the mark.

    Raises ConfigError if it has no such marks.
    """
    return _split(_read(document), document, name)


def _read(document: Path) -> str:
    try:
        return files.read_text(document)
    except files.Unreadable as error:
        raise ConfigError(f"document: {error}") from error


def _split(content: str, document: Path, name: str) -> tuple[str, str]:
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, found, rest = content.partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ConfigError(f"document: {document} has no marks {begin!r} and {end!r}")
    return before + begin, end + after


def insert(document: Path, name: str, text: str) -> None:
    """Put a text between a document's marks; see `surroundings`."""
    fill(document, {name: text})


def fill(document: Path, texts: Mapping[str, str]) -> None:
    """Put each text between the marks of its name; see `surroundings`. Nothing is written where a mark is missing."""
    content = _read(document)
    for name, text in texts.items():
        before, after = _split(content, document, name)
        content = f"{before}\n\n{text.strip()}\n\n{after}"
    files.replace_text(document, content)


def folded(text: str) -> str:
    """A report's Markdown in which all tables but the first, the answer, are folded away."""
    heading = "\n\n**"
    parts = text.strip().split(heading, 2)
    if len(parts) < 3:
        return text
    before, first, others = parts
    return f"{before}{heading}{first}\n\n<details>\n<summary>All other tables</summary>{heading}{others}\n\n</details>"
