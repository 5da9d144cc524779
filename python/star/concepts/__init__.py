"""From a prompt to its concepts, and to their text tokens.

Concepts are quoted texts and noun spans with their attributes, found by rules, which need no model and no download, or
on request by spaCy.
"""

from star.concepts.brackets import unbracket
from star.concepts.chunks import check as check_source
from star.concepts.parsing import parse, parse_all, unknown_languages
from star.concepts.spans import Concept, mark
from star.concepts.tokens import ConceptTokens, Marks, Said, concept_tokens, locate, said

__all__ = [
    "Concept",
    "ConceptTokens",
    "Marks",
    "Said",
    "check_source",
    "concept_tokens",
    "locate",
    "mark",
    "parse",
    "parse_all",
    "said",
    "unbracket",
    "unknown_languages",
]
