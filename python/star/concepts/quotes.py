"""Texts in quotation marks, in one pass. Inches, feet, decades and apostrophes are no quotation marks."""

from __future__ import annotations

import re

CLOSERS = {
    '"': '"',
    "＂": "＂",
    "“": "”“",
    "„": "“”",
    "”": "”",
    "«": "»",
    "»": "«",
    "「": "」",
    "『": "』",
    "'": "'",
    "‘": "’",
    "‚": "‘’",
    "‹": "›",
}
_MARKS = re.compile("[" + "".join(sorted(set("".join(CLOSERS) + "".join(CLOSERS.values())))) + "]")
_ELISIONS = re.compile(r"(?:\d0s|n|til|tis|twas|em|cause|round)\b", re.IGNORECASE)  # '80s, rock 'n' roll
_SINGLE = "'‘’‚"


def quoted_spans(prompt: str) -> list[tuple[int, int]]:
    """(start, end) of each quoted text, without its marks, in order. None is empty and none overlaps another."""
    places = [match.start() for match in _MARKS.finditer(prompt)]
    spans: list[tuple[int, int]] = []
    unclosed: set[str] = set()  # a mark that nothing closes is not searched for again
    i = 0
    while i < len(places):
        mark = prompt[places[i]]
        if mark in unclosed or not _opens(prompt, places[i]):
            i += 1
            continue
        closing = next((j for j in range(i + 1, len(places)) if _closes(prompt, places, j, mark)), None)
        if closing is None:
            unclosed.add(mark)
            i += 1
            continue
        start, end = places[i] + 1, places[closing]
        if prompt[start:end].strip():
            spans.append((start, end))
        i = closing + 1
    return spans


def _opens(prompt: str, at: int) -> bool:
    mark, before, after = prompt[at], prompt[at - 1 : at], prompt[at + 1 : at + 2]
    if mark not in CLOSERS or not after:
        return False
    if mark == '"':
        return not before.isdigit()  # a digit before it: inches
    if mark == "'":
        elided = _ELISIONS.match(prompt, at + 1)
        return not before.isalnum() and not after.isspace() and not elided
    if mark in "‘”»":  # these also close
        return not before.isalnum() and not after.isspace()
    return True


def _closes(prompt: str, places: list[int], j: int, opened: str) -> bool:
    at = places[j]
    mark, before, after = prompt[at], prompt[at - 1 : at], prompt[at + 1 : at + 2]
    if mark not in CLOSERS[opened]:
        return False
    if mark in _SINGLE:
        return not after.isalnum()  # an apostrophe within a word
    if mark == '"' and before.isdigit():
        # Inches within a text: '"5'6" tall"'. Then the next mark closes too, and is not itself behind a digit.
        following = next((k for k in places[j + 1 : j + 2] if prompt[k] == '"'), None)
        if following is not None:
            behind, ahead = prompt[following - 1], prompt[following + 1 : following + 2]
            return behind.isspace() or behind.isdigit() or ahead.isalnum()
    return True
