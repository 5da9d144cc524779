"""A concept: characters of a prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Concept:
    """A part of a prompt.

    Attributes:
        text: the part.
        start: its first character in the prompt.
        end: the character after its last one.
        kind: "object", or "text" that is to be written in the image.
    """

    text: str
    start: int
    end: int
    kind: Literal["object", "text"]


def mark(prompt: str, concept: Concept | str | tuple[int, int]) -> Concept:
    """A concept that the user marks: a text that the prompt has (where it has it first), or characters [start, end).

    Raises ValueError for a text or characters that the prompt does not have.
    """
    if isinstance(concept, Concept):
        start, end, kind = concept.start, concept.end, concept.kind
    elif isinstance(concept, str):
        start, kind = prompt.find(concept), "object"
        end = start + len(concept)
    else:
        numbers = concept if isinstance(concept, tuple | list) else ()
        if len(numbers) != 2 or not all(isinstance(number, int) for number in numbers):
            raise ValueError(f"concepts: got {concept!r}, expected a text of the prompt or its characters (start, end)")
        (start, end), kind = numbers, "object"
    if not 0 <= start < end <= len(prompt):
        raise ValueError(f"concepts: got {concept!r}, expected a part of the prompt {prompt!r}")
    return Concept(prompt[start:end], start, end, kind)
