"""A reward's credits of phrases in the columns of the prompts' concepts, whose maps say where they belong."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import torch

from star.concepts import Concept
from star.config import ConfigError
from star.rewards import Scores


def matched_credits(
    scores: Scores, prompts: Sequence[str], concepts: Sequence[Sequence[Concept]], columns: int
) -> Scores:
    """The same scores with credits in the order of the concepts that a run finds in its prompts.

    A phrase belongs to the concept that it overlaps where it stands in the prompt as whole words, in any case. Longer
    phrases choose first, and a concept has one phrase at most. Credits that are NaN are left out. Credits without
    phrases are in the order of the concepts already.

    Args:
        scores: of B images, with credits.
        prompts: the B prompts. concepts: those of each, by `star.concepts.parse`.
        columns: G of the maps, at least the largest number of concepts.

    Returns:
        Scores with credits (B, columns), NaN for a concept without one, and no phrases.

    Raises:
        ConfigError: a phrase without a concept of its own, or more credits than the prompt has concepts.
    """
    assert scores.credits is not None
    credits = torch.full((len(prompts), columns), torch.nan)
    for i, (prompt, found) in enumerate(zip(prompts, concepts, strict=True)):
        row = scores.credits[i]
        if scores.concepts:
            said = {number: phrase for number, phrase in enumerate(scores.concepts[i]) if row[number].isfinite()}
            for number, column in match_phrases(prompt, said, found).items():
                credits[i, column] = row[number]
        elif row[len(found) :].isfinite().any():
            raise ConfigError(
                f"loss.advantage: got the credits {row.tolist()} for the prompt {prompt!r}, expected no more than the "
                f"concepts that sampling.concepts finds: {[concept.text for concept in found]}"
            )
        else:
            width = min(len(found), len(row))
            credits[i, :width] = row[:width]
    return replace(scores, credits=credits, concepts=())


def match_phrases(prompt: str, phrases: dict[int, str], concepts: Sequence[Concept]) -> dict[int, int]:
    """The index of its concept for each phrase, by the phrase's key. Raises ConfigError as `matched_credits` says."""
    taken: dict[int, int] = {}
    for key in sorted(phrases, key=lambda key: -len(phrases[key])):
        pattern = rf"(?<!\w){re.escape(phrases[key].strip())}(?!\w)"
        for occurrence in re.finditer(pattern, prompt, re.IGNORECASE):
            met = [g for g, c in enumerate(concepts) if c.start < occurrence.end() and occurrence.start() < c.end]
            if len(met) == 1 and met[0] not in taken.values():
                taken[key] = met[0]
                break
        else:
            raise ConfigError(
                f"loss.advantage: the reward's phrase {phrases[key]!r} has no concept of its own in the prompt "
                f"{prompt!r}, in which sampling.concepts finds {[concept.text for concept in concepts]}"
            )
    return taken
