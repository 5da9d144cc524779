"""Concepts that a prompt marks itself: `a [red bench] left of [two cats]`."""

from __future__ import annotations

import re
from collections.abc import Sequence

from star.concepts.spans import Concept

_MARK = re.compile(r"\\([\[\]])|([\[\]])")  # \[ and \] are brackets of the text


def unbracket(prompts: Sequence[str]) -> tuple[list[str], list[list[Concept] | None]]:
    """Prompts without their brackets, which is what the model must read, and for each what stood in them.

    A prompt may have any number of `[...]`, none within another. `\\[` and `\\]` are brackets of the text. A prompt
    without any has None, so that its concepts are found as without this.

    Raises ValueError for a bracket without its other half, one within another, and one around nothing.
    """
    found = [_unbracketed(prompt) for prompt in prompts]
    return [text for text, _ in found], [concepts for _, concepts in found]


def _unbracketed(prompt: str) -> tuple[str, list[Concept] | None]:
    text, spans, at = "", [], 0
    start: int | None = None  # in the text, of an open bracket
    opened = 0  # where it is in the prompt
    for mark in _MARK.finditer(prompt):
        text += prompt[at : mark.start()]
        at = mark.end()
        if mark[1]:
            text += mark[1]
        elif mark[2] == "[":
            if start is not None:
                raise ValueError(_wrong(prompt, mark.start(), "a '[' within brackets"))
            start, opened = len(text), mark.start()
        elif start is None:
            raise ValueError(_wrong(prompt, mark.start(), "a ']' that closes nothing"))
        else:
            inner = text[start:]
            if not inner.strip():
                raise ValueError(_wrong(prompt, mark.start(), "brackets around nothing"))
            spans.append((start + len(inner) - len(inner.lstrip()), start + len(inner.rstrip())))
            start = None
    if start is not None:
        raise ValueError(_wrong(prompt, opened, "a '[' that nothing closes"))
    text += prompt[at:]
    return text, [Concept(text[first:end], first, end, "object") for first, end in spans] or None


def _wrong(prompt: str, at: int, what: str) -> str:
    return rf"prompts: {prompt!r} has {what} at character {at}; write \[ and \] for brackets of the text"
