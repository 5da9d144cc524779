"""The parts of a Markdown document, between marks, that the tool fills."""

from __future__ import annotations

from pathlib import Path

from star import files
from star.config import ConfigError


def split_at_marks(document: Path, name: str) -> tuple[str, str]:
    """The text up to the mark `<!-- NAME -->` and from the mark `<!-- end of NAME -->` of a document on.

    Raises ConfigError if it lacks one of them.
    """
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    before, opened, rest = document.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not opened or not closed:
        raise ConfigError(f"document: {document} has no marks {begin!r} and {end!r}")
    return before + begin, end + after


def insert(document: Path, name: str, text: str) -> None:
    """Put a text between a document's marks; see `split_at_marks`."""
    before, after = split_at_marks(document, name)
    files.replace_text(document, f"{before}\n\n{text.strip()}\n\n{after}")


def fold_tables(text: str) -> str:
    """A report's Markdown with all tables but the first, which is the answer, in a <details> element."""
    heading = "\n\n**"
    parts = text.strip().split(heading, 2)
    if len(parts) < 3:
        return text
    before, first, others = parts
    return f"{before}{heading}{first}\n\n<details>\n<summary>All other tables</summary>{heading}{others}\n\n</details>"
