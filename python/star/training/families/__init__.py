"""The kinds of pipelines that can be trained: a row of a table for each.

A kind of your own is one more row: `star.training.families.FAMILIES["MyPipeline"] = MyFamily()`.
"""

from __future__ import annotations

from typing import Any

from star.config import ConfigError
from star.training.families.family import Family
from star.training.families.flux import Flux
from star.training.families.qwen_image import QwenImage
from star.training.families.sd3 import SD3

FAMILIES: dict[str, Family] = {family.pipeline: family for family in (SD3(), Flux(), QwenImage())}


def family_of(pipeline: Any) -> Family:
    """The family of a pipeline. Raises ConfigError for a kind that cannot be trained."""
    return named_family([kind.__name__ for kind in type(pipeline).__mro__], "pipeline")


def named_family(kinds: list[str], what: str) -> Family:
    """The family of the first of a pipeline's classes that has a row. what: the pipeline's source, for the error."""
    for kind in kinds:
        if kind in FAMILIES:
            return FAMILIES[kind]
    names = list(FAMILIES)
    raise ConfigError(
        f"{what} is a {kinds[0]}, which cannot be trained; expected a {', '.join(names[:-1])} or {names[-1]}"
    )
