"""Noun chunks of spaCy, for those who ask for them. spaCy is imported when it is used."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from star.concepts import lexicon
from star.concepts.languages import MODELS
from star.concepts.reading import QUOTED
from star.concepts.rules import Phrase, is_size
from star.messages import one_line
from star_kernels.requirements import install_line

if TYPE_CHECKING:
    from spacy.language import Language
    from spacy.tokens import Doc, Token


def model_of(source: str) -> str | None:
    """The model that a source names; None where it names none. Raises ValueError for another source."""
    kind, _, model = source.partition(":") if isinstance(source, str) else (source, "", "")
    if source in ("rules", "spacy"):
        return None
    if kind != "spacy" or not model:
        raise ValueError(f"source: got {source!r}, expected 'rules', 'spacy' or 'spacy:MODEL'")
    return model


def model_for(language: str) -> str:
    """The small model of a language, as `languages.main_language` names it."""
    if language not in MODELS:
        raise ValueError(f"source: 'spacy' knows no model for {language}, expected one by name: 'spacy:MODEL'")
    return MODELS[language]


def check(source: str) -> None:
    """Raise what `star.concepts.parse` would raise for a source, before there are prompts."""
    model = model_of(source)
    if source == "rules":
        return
    if is_missing():
        raise ImportError(_missing())
    if model is not None:
        load(model)


def is_missing() -> bool:
    return importlib.util.find_spec("spacy") is None


def _missing() -> str:
    return f"source: 'spacy' needs spaCy; {install_line('spacy', 'spacy')}"


@lru_cache(maxsize=4)  # a model takes a second to load
def load(model: str) -> Language:
    """A model by its name or folder. Raises ImportError where spaCy or the model is missing."""
    try:
        import spacy
    except ModuleNotFoundError as error:
        raise ImportError(_missing()) from error
    if not spacy.util.is_package(model) and not Path(model).exists():
        raise ImportError(f"source: spaCy's model {model!r} is not installed; run python -m spacy download {model}")
    try:
        return spacy.load(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"source: spaCy cannot load {model!r} ({one_line(error)})") from error


def noun_spans(text: str, model: str) -> list[tuple[int, int]]:
    """Characters [start, end) of a reading's text that are noun chunks of a model and name a thing."""
    return chunks_of(load(model)(text), model)


def chunks_of(doc: Doc, model: str) -> list[tuple[int, int]]:
    """Of a text that a model has read. Determiners, numbers, pronouns and quoted texts are no part of a chunk."""
    spans = []
    for chunk in _chunks(doc, model):
        piece: list[Token] = []
        for token in [*chunk, None]:
            if token is not None and not token.is_punct and not token.is_space and QUOTED not in token.text:
                piece.append(token)
            elif piece:
                spans += _named(doc, piece)
                piece = []
    return sorted(spans)


def _chunks(doc: Doc, model: str) -> Iterator[Sequence[Token]]:
    """spaCy's noun chunks; where it has none for a language, adjectives and nouns in a row that end in a noun."""
    if doc.vocab.get_noun_chunks is not None and doc.has_annotation("DEP"):
        yield from doc.noun_chunks
    elif doc.has_annotation("POS"):
        row: list[Token] = []
        for token in [*doc, None]:
            if token is not None and token.pos_ in ("ADJ", "NOUN", "PROPN", "PART"):
                row.append(token)
                continue
            while row and row[-1].pos_ not in ("NOUN", "PROPN"):
                row.pop()
            if row:
                yield row
            row = []
    else:
        raise ValueError(f"source: spaCy's model {model!r} finds no nouns, expected one with a parser or a tagger")


def _named(doc: Doc, piece: list[Token]) -> list[tuple[int, int]]:
    """The span of a piece of a chunk, if it names a thing."""
    determiner = ""
    while piece and (piece[0].pos_ in ("DET", "NUM", "PRON") or piece[0].lower_ in lexicon.DETERMINERS):
        determiner, piece = piece[0].lower_, piece[1:]
    keys = tuple(token.lower_ for token in piece)
    if not piece or all(token.pos_ == "PRON" for token in piece) or all(is_size(key) for key in keys):
        return []
    first, last = piece[0].i, piece[-1].i
    begins = all(token.pos_ in ("DET", "NUM") for token in _clause_before(doc, first))
    phrase = Phrase(
        keys,
        determiner,
        doc[first - 1].lower_ if first else "",
        doc[last + 1].lower_ if last + 1 < len(doc) else "",
        begins,
    )
    return [(piece[0].idx, piece[-1].idx + len(piece[-1]))] if phrase.names_a_thing() else []


def _clause_before(doc: Doc, i: int) -> Iterator[Token]:
    """Tokens before token i back to the last mark of punctuation; no more than three, which are enough."""
    for k in range(i - 1, max(i - 4, -1), -1):
        if doc[k].is_punct:
            return
        yield doc[k]
