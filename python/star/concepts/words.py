"""The words of a reading."""

from __future__ import annotations

from dataclasses import dataclass

from star.concepts.reading import is_letter


@dataclass(frozen=True)
class Word:
    """A word or a mark of punctuation: characters [start, end) of the reading.

    key: as in the lexicon. capital: the first letter alone is one.
    """

    key: str
    start: int
    end: int
    capital: bool = False

    @property
    def is_word(self) -> bool:
        return bool(self.key) and is_letter(self.key[0])


def split(text: str) -> list[Word]:
    """Words, with inner hyphens and apostrophes ("well-lit", "cat's", "cats' toys"), and single marks."""
    found = []
    start: int | None = None
    for i in range(len(text) + 1):
        character = text[i : i + 1]
        if character and is_letter(character):
            start = i if start is None else start
        elif start is None or not _goes_on(text, i):
            if start is not None:
                found.append(_word(text, start, i))
                start = None
            if character == "\n" or (character and not character.isspace()):
                found.append(Word(character, i, i + 1))
    return found


def _word(text: str, start: int, end: int) -> Word:
    said = text[start:end]
    return Word(said.lower().replace("’", "'"), start, end, capital=said[0].isupper() and not said.isupper())


def _goes_on(text: str, i: int) -> bool:
    """Whether a word goes on with a mark."""
    before, mark, after, behind = text[i - 1], text[i : i + 1], text[i + 1 : i + 2], text[i + 2 : i + 3]
    if mark == ".":
        return before.isdigit() and after.isdigit()
    if mark in ("'", "’") and before == "s" and after == " ":
        return bool(behind) and is_letter(behind)  # a plural that owns something
    return mark in ("'", "’", "-", "&") and bool(after) and is_letter(after)
