"""Which text tokens of a pipeline's embeddings say a concept."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from star.concepts.parsing import parse_all
from star.concepts.spans import Concept, mark

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class ConceptTokens(NamedTuple):
    """Which text tokens say which concept.

    index: (B, G, K) int64 columns of the joint text sequence (CLIP's tokens first, then T5's), -1 for none.
    weight: (B, G, K) float32, each concept's weights sum to 1 (0 for a concept that no token says).
    """

    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    weight: Tensor

    def rows(self, index: Tensor | slice | Sequence[int]) -> ConceptTokens:
        """The concepts of some rows, for instance repeated for each sample of a group."""
        return ConceptTokens(self.index[index], self.weight[index])


def _overlapping_tokens(
    prompts: Sequence[str],
    concepts: Sequence[Sequence[Concept]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str,
) -> list[list[list[int]]]:
    """For each prompt and concept the indices of the tokens that overlap it."""
    if not tokenizer.is_fast:
        raise TypeError(f"{name}: {type(tokenizer).__name__} gives no offsets, expected a fast tokenizer")
    # Prompts without special tokens' help: begin, end and padding have an empty offset or are marked as special.
    encoded = tokenizer(
        list(prompts),
        padding="max_length",
        max_length=max_length,
        truncation=True,
        return_offsets_mapping=True,
        return_special_tokens_mask=True,
    )
    overlapping = []
    for offsets, special, wanted in zip(
        encoded["offset_mapping"], encoded["special_tokens_mask"], concepts, strict=True
    ):
        spans = [(i, start, end) for i, (start, end) in enumerate(offsets) if not special[i] and end > start]
        overlapping.append([[i for i, start, end in spans if start < c.end and end > c.start] for c in wanted])
    return overlapping


def locate(
    prompts: Sequence[str],
    clip_tokenizer: PreTrainedTokenizerBase | None,
    t5_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    concepts: Sequence[Sequence[Concept | str | tuple[int, int]]] | None = None,
    source: str = "rules",
    max_sequence_length: int = 256,
    tokens: Literal["both", "clip", "t5"] = "both",
) -> ConceptTokens:
    """Find the concepts' tokens as StableDiffusion3Pipeline lays them out: CLIP's tokens, then T5's.

    `concept_tokens` does it with a pipeline's tokenizers; this is for trainers that hold tokenizers alone.

    Args:
        prompts: B prompts.
        clip_tokenizer: the pipeline's `tokenizer`; `tokenizer_2` splits the same way. None where the joint sequence has
            no CLIP part, as in FLUX: T5's tokens then begin at 0.
        t5_tokenizer: the pipeline's `tokenizer_3` (FLUX: `tokenizer_2`), or None.
        concepts: for each prompt the concepts that it asks for, as in `mark`. None: those of `parse`.
        source: of `parse`, "rules", "spacy" or "spacy:MODEL"; where concepts are given there is none.
        max_sequence_length: of the T5 part, as given to the pipeline.
        tokens: which parts to use. A concept said in both gives each part half of its weight.

    Returns:
        ConceptTokens with G the largest number of concepts (at least 1). Begin, end and padding tokens are never in it,
        and neither is what the tokenizers cut off.

    Raises:
        What `parse` raises. TypeError: a slow tokenizer, or prompts that are one str. ValueError: concepts that the
        prompts do not have, concepts beside a source, or parts without their tokenizer.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got a str, expected a list of them")
    if concepts is None:
        concepts = parse_all(prompts, source)
    elif source != "rules":
        raise ValueError(f"source: got {source!r} beside concepts; leave one of them out")
    elif len(prompts) != len(concepts):
        raise ValueError(f"concepts: got {len(concepts)} lists, expected one for each of {len(prompts)} prompts")
    if tokens not in ("both", "clip", "t5"):
        raise ValueError(f"tokens: got {tokens!r}, expected 'both', 'clip' or 't5'")
    if tokens == "t5" and t5_tokenizer is None:
        raise ValueError("tokens: 't5' needs t5_tokenizer")
    if clip_tokenizer is None and t5_tokenizer is None:
        raise ValueError("clip_tokenizer, t5_tokenizer: got None for both, expected at least one")
    if tokens == "clip" and clip_tokenizer is None:
        raise ValueError("tokens: 'clip' needs clip_tokenizer")
    spans = [[mark(prompt, concept) for concept in row] for prompt, row in zip(prompts, concepts, strict=True)]
    parts = []
    clip_length = 0 if clip_tokenizer is None else clip_tokenizer.model_max_length
    if tokens != "t5" and clip_tokenizer is not None:
        parts.append((0, _overlapping_tokens(prompts, spans, clip_tokenizer, clip_length, "clip_tokenizer")))
    if tokens != "clip" and t5_tokenizer is not None and max_sequence_length > 0:
        in_t5 = _overlapping_tokens(prompts, spans, t5_tokenizer, max_sequence_length, "t5_tokenizer")
        parts.append((clip_length, in_t5))
    rows: list[list[list[tuple[int, float]]]] = []
    for b, row in enumerate(spans):
        entries: list[list[tuple[int, float]]] = []
        for g in range(len(row)):
            said = [(offset, overlapping[b][g]) for offset, overlapping in parts if overlapping[b][g]]
            entries.append([(offset + i, 1 / (len(said) * len(indices))) for offset, indices in said for i in indices])
        rows.append(entries)
    groups = max((len(row) for row in rows), default=0) or 1
    slots = max((len(entries) for row in rows for entries in row), default=0) or 1
    index = torch.full((len(prompts), groups, slots), -1, dtype=torch.int64)
    weight = torch.zeros(len(prompts), groups, slots, dtype=torch.float32)
    for b, groups_of_row in enumerate(rows):
        for g, shares in enumerate(groups_of_row):
            for k, (token, share) in enumerate(shares):
                index[b, g, k] = token
                weight[b, g, k] = share
    return ConceptTokens(index, weight)


def concept_tokens(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    concepts: Sequence[Sequence[Concept | str | tuple[int, int]]] | None = None,
    source: str = "rules",
    max_sequence_length: int | None = None,
) -> ConceptTokens:
    """Which text tokens of a pipeline's embeddings say what its prompts ask for.

    Args:
        pipeline: a StableDiffusion3Pipeline or one of its relatives, with T5 or without (tokenizer_3=None), or a
            FluxPipeline, whose joint sequence has T5's tokens alone.
        prompts: B prompts, one for each image of a batch.
        concepts: for each prompt a list of what it asks for: a text that it has, characters (start, end), or a Concept.
            None: what `star.concepts.parse` finds, noun spans and quoted texts.
        source: of `star.concepts.parse`, "rules", "spacy" or "spacy:MODEL"; where concepts are given there is none.
        max_sequence_length: of T5's tokens, as it was given to the pipeline. None: the pipeline's own default.

    Returns:
        ConceptTokens with B rows.

    Raises:
        TypeError: another pipeline, or what `locate` raises. ValueError: what `locate` raises.
    """
    if max_sequence_length is None:
        parameter = inspect.signature(type(pipeline).__call__).parameters.get("max_sequence_length")
        max_sequence_length = 256 if parameter is None else parameter.default
    if hasattr(pipeline, "tokenizer_3"):
        clip, t5 = pipeline.tokenizer, pipeline.tokenizer_3
    elif hasattr(pipeline, "tokenizer_2") and hasattr(pipeline, "transformer"):
        clip, t5 = None, pipeline.tokenizer_2
    else:
        kind = type(pipeline).__name__
        raise TypeError(f"pipeline: got {kind}, expected a StableDiffusion3Pipeline or a FluxPipeline")
    return locate(prompts, clip, t5, concepts=concepts, source=source, max_sequence_length=max_sequence_length)
