"""A prompt as a reader sees it: without what is invisible, without weights and other marks for programs.

Every character of the reading knows the characters of the prompt that it comes from.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field

from star.concepts.lexicon import DETERMINERS
from star.concepts.quotes import quoted_spans

QUOTED = "\ufffc"  # stands for a quoted text
_SPACES = "\u200b\ufeff"  # a zero-width space and a byte order mark part words; other invisible characters do not
_PAIRS = {")": "(", "]": "[", "}": "{"}
# What programs that make images read as instructions. The weights are those of AUTOMATIC1111, Compel and Midjourney.
_NETWORK = re.compile(r"<\w++:[^<>]*+>?+")  # <lora:name:0.8>
_OPTION = re.compile(r"(?<!\S)--[a-z]++(?:[ =][\d.:]++)?+")  # --ar 16:9
_KEYWORD = re.compile(r"\bBREAK\b")
_WEIGHT = re.compile(r"(?<![\d\s]):{1,2}+ ?+[-+]?+[\d.]++")  # :1.2 or ::2
_FACTOR = re.compile(r"(?<=[)\]}])[\d.]++|(?<=[)\]}\w])(?:\+++|-{1,4}+)(?![\w+-])")  # )1.2 or ++


@dataclass
class Reading:
    """text: what is read. starts, ends: for each of its characters, characters [start, end) of the prompt.

    quoted: the quoted texts of the prompt, each one QUOTED in the text.
    """

    text: str = ""
    starts: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    quoted: list[tuple[int, int]] = field(default_factory=list)

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Characters of the prompt that are [start, end) of the text."""
        return self.starts[start], self.ends[end - 1]


def read(prompt: str) -> Reading:
    """The prompt as it is read."""
    reading = Reading(quoted=quoted_spans(prompt))
    characters: list[str] = []
    at = 0
    for start, end in [*reading.quoted, (len(prompt), len(prompt))]:
        for i in range(at, start):
            seen = _seen(prompt[i])
            composed = unicodedata.normalize("NFC", "".join(characters[-1:]) + seen)
            if characters and seen and len(composed) == 1:  # an accent, or a part of a Korean syllable, on its own
                characters[-1], reading.ends[-1] = composed, i + 1
                continue
            characters += seen
            reading.starts += [i] * len(seen)
            reading.ends += [i + 1] * len(seen)
        if start < end:
            characters.append(QUOTED)
            reading.starts.append(start)
            reading.ends.append(end)
        at = end
    reading.text = _without_instructions("".join(characters))
    return reading


def is_letter(character: str) -> bool:
    """Of a word: also the vowel signs of scripts that write them as marks."""
    return character.isalnum() or character == "_" or _is_mark(character)


def _is_mark(character: str) -> bool:
    return len(character) == 1 and unicodedata.category(character)[0] == "M"


def _seen(character: str) -> str:
    """What is seen of a character: nothing, a space, or its plain form."""
    category = unicodedata.category(character)
    if character in _SPACES or category == "Cc":
        return " "
    return "" if category == "Cf" else unicodedata.normalize("NFKC", character)


def _without_instructions(text: str) -> str:
    """The same length: spaces for marks that change nothing, commas for those that part what is read."""
    characters = list(text)

    def blank(start: int, end: int, first: str) -> None:
        characters[start:end] = first + " " * (end - start - 1)

    for pattern in (_NETWORK, _OPTION, _KEYWORD):
        for match in pattern.finditer(text):
            blank(*match.span(), ",")
    weighted = set()  # closing brackets that a weight belongs to
    for match in _WEIGHT.finditer(text):
        inside = text[match.end() : match.end() + 1] in _PAIRS
        if inside:
            weighted.add(match.end())
        blank(*match.span(), " " if inside else ",")
    for match in _FACTOR.finditer(text):
        weighted.add(match.start() - 1)
        blank(*match.span(), " ")
    for i, replacement in _brackets("".join(characters), weighted):
        characters[i] = replacement
    return "".join(characters)


def _brackets(text: str, weighted: set[int]) -> list[tuple[int, str]]:
    """What stands for each pair of brackets: a space where it marks emphasis, a comma where it parts.

    Two brackets, square or curly ones, and those with a weight are emphasis; "(red) car" is, "a dog (a puppy)" is not.
    """
    replacements = []
    opened: list[tuple[int, str]] = []
    word, last = "", ""  # before the bracket
    for i, character in enumerate(text):
        if character in _PAIRS.values():
            opened.append((i, word if last.isalnum() else last))
        elif character in _PAIRS and opened and text[opened[-1][0]] == _PAIRS[character]:
            start, before = opened.pop()
            twice = text[start + 1] == text[start] or (start > 0 and text[start - 1] == text[start])
            emphasis = character != ")" or i in weighted or twice
            aside = not emphasis and before[-1:].isalnum() and before.lower() not in DETERMINERS
            parts = before in _PAIRS or not emphasis
            replacements += [(start, "," if parts else " "), (i, "," if aside else " ")]
        if not character.isspace():
            # Words are told apart, so that long ones cost no more than short ones.
            word = (word + character)[:20] if character.isalnum() and text[i - 1 : i].isalnum() else character
            last = character
    return replacements
