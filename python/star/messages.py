"""Texts of others on one line: errors of libraries, words of rewards and servers."""

from __future__ import annotations

BRIEF = 300  # characters, within a line of ours
WHOLE = 4000  # of a message that is all a user gets to read


def one_line(text: object, limit: int = BRIEF) -> str:
    """A text or an error's message on one line, cut at `limit` characters, without control characters; of an error
    without a message, its kind."""
    line = "".join(c if c.isprintable() else " " for c in str(text)[: 4 * limit])
    line = " ".join(line.split()) or (type(text).__name__ if isinstance(text, BaseException) else "")
    return line if len(line) <= limit else f"{line[: limit - 3]}..."
