"""The concepts of prompts, by rules or by spaCy."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from star.concepts import chunks, rules
from star.concepts.languages import foreign, main_language
from star.concepts.reading import Reading, read
from star.concepts.spans import Concept
from star.concepts.words import split
from star_kernels.requirements import install_line


def parse(prompt: str, source: str = "rules") -> list[Concept]:
    """The concepts of a prompt, in its order: quoted texts, and noun spans with their attributes.

    Articles and numbers are left out, and so are words for the medium ("a photo of"), praise ("highly detailed"), who
    made the image ("by Vermeer") and what is not there ("without a hat"). Weights and other marks for programs, as in
    "(red car:1.2)", "((cat))", "[dog]", "cat++" or "<lora:style:0.8>", are read as the plain words.

    Args:
        prompt: any text.
        source: "rules" for English, which need nothing; "spacy", noun chunks of the small model of the prompt's
            language; or "spacy:MODEL", those of a model by name or folder. The last two need spaCy, the extra `spacy`,
            and the model.

    Warns:
        UserWarning: the rules do not know the prompt's script or language; each of its phrases is then one concept.

    Raises:
        TypeError: a prompt that is no str.
        ValueError: another source, or a language without a model.
        ImportError: spaCy, or the model, is not installed. Nothing falls back to the rules.
    """
    return parse_all([prompt], source)[0]


def parse_all(prompts: Sequence[str], source: str = "rules") -> list[list[Concept]]:
    """`parse` of each prompt, with one warning for all of them."""
    model = chunks.model_of(source)
    concepts: list[list[Concept]] = []
    unknown: dict[str, None] = {}
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise TypeError(f"prompt: got {type(prompt).__name__}, expected a str")
        reading = read(prompt)
        words = split(reading.text)
        if source == "rules":
            unknown |= dict.fromkeys(foreign(words))
            spans = rules.noun_spans(words)
        else:
            spans = chunks.noun_spans(reading.text, model or chunks.model_for(main_language(words)))
        concepts.append(_concepts(prompt, reading, spans))
    if unknown:
        line = install_line("spacy", "spacy") if chunks.is_missing() else None
        # The same words each time: Python then says them once.
        warnings.warn(
            f"concepts: the rules know English, not {', '.join(sorted(unknown))}; each phrase of it is one concept. "
            f"Use source 'spacy'{f' ({line})' if line else ''}, or give concepts",
            stacklevel=1,
        )
    return concepts


def unknown_languages(prompt: str) -> tuple[str, ...]:
    """What the rules do not know of a prompt outside its quoted texts: scripts beside Latin, or a language, by name."""
    return foreign(split(read(prompt).text))


def _concepts(prompt: str, reading: Reading, spans: Sequence[tuple[int, int]]) -> list[Concept]:
    found = [Concept(prompt[start:end], start, end, "text") for start, end in reading.quoted]
    for start, end in (reading.span(*span) for span in spans):
        found.append(Concept(prompt[start:end], start, end, "object"))
    return sorted(found, key=lambda concept: concept.start)
