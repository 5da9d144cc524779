"""From a prompt to what the user cares about, and to the text tokens that say it.

Concepts are quoted texts and noun spans with their attributes, found by rules; no model and no download.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

_QUOTES = re.compile(
    r'"([^"]+)"'
    r"|“([^”]+)”"
    r"|(?<!\w)'([^']+(?:\w'\w[^']*)*)'(?!\w)"  # an apostrophe between letters neither opens nor closes
    r"|‘([^’]+(?:\w’\w[^’]*)*)’(?!\w)"
)
_WORD = re.compile(r"\w+(?:['’\-]\w+)*(?:(?<=s)['’](?=\s+\w))?|[^\w\s]")  # with "cat's" and "cats' toys"
_DETERMINERS = frozenset(
    (
        "a an the this that these those some any each every both its his her their my your our no another several many "
        "few one two three four five six seven eight nine ten"
    ).split()
)
# Words that separate one thing from the next: prepositions, conjunctions, pronouns, auxiliary verbs.
_BREAKS = frozenset(
    (
        "of in on at to from by for with without and or but nor as than into onto over under above below beneath "
        "beside besides behind between among near next along across around through inside outside within upon off "
        "against about before after during while where when which who whom whose it he she they we you i them him "
        "me us there here is are was were be been being has have had do does did can could will would shall should "
        "may might must not very so such wears wear holds hold says say saying reads read sits sit stands stand "
        "looks look made like out written"
    ).split()
)
_SIDES = frozenset("left right top bottom front side middle center centre".split())
# What an image is, not what it shows; and praise that prompts add.
_MEDIA = frozenset(
    (
        "photo photograph picture image painting illustration drawing render rendering sketch shot close-up closeup "
        "view style art artwork artstation quality resolution detail details detailed masterpiece 4k 8k hd uhd "
        "cinematic photorealistic realistic hyperrealistic highly ultra best trending portrait oil digital watercolor "
        "watercolour studio lighting word words text letters"
    ).split()
)
_NOUNS_IN_ING = frozenset(
    (
        "building ring king wing string spring ceiling clothing thing morning evening painting sling lightning awning "
        "earring railing stocking swing viking wedding pudding duckling lighting"
    ).split()
)
# What a thing is for, when a noun follows.
_USES_IN_ING = frozenset(
    (
        "dining parking living baking frying cutting chopping rolling washing sewing knitting writing reading swimming "
        "fishing sailing rowing hiking running boxing bowling skating skiing camping shopping sleeping walking "
        "wrapping printing measuring vending flying sitting"
    ).split()
)


@dataclass(frozen=True)
class Concept:
    """Characters [start, end) of a prompt. kind: "object", or "text" that is to be written in the image."""

    text: str
    start: int
    end: int
    kind: Literal["object", "text"]


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


def _spans(prompt: str, offset: int) -> list[Concept]:
    """Noun spans of a stretch of prompt without quotes."""
    concepts: list[Concept] = []
    span: list[re.Match] = []

    def close() -> None:
        words = [match.group().lower() for match in span]
        if any(word not in _MEDIA and word not in _DETERMINERS for word in words):
            start, end = span[0].start(), span[-1].end()
            concepts.append(Concept(prompt[start:end], offset + start, offset + end, "object"))
        span.clear()

    words = list(_WORD.finditer(prompt))
    for i, match in enumerate(words):
        word = match.group().lower()
        following = words[i + 1].group().lower() if i + 1 < len(words) else ""
        side = word in _SIDES and (following in ("of", "side", "") or not following.isalnum())
        # "a dog chasing a ball" and "sitting on", but "a running dog" and "a white dining table".
        attribute = following[:1].isalnum() and following not in _BREAKS | _DETERMINERS
        attribute = attribute and (not span or word in _USES_IN_ING)
        verb = word.endswith("ing") and len(word) > 4 and word not in _NOUNS_IN_ING and not attribute
        if not word[0].isalnum() or word in _BREAKS or word in _DETERMINERS or side or verb:
            close()
        else:
            span.append(match)
    close()
    return concepts


def parse(prompt: str) -> list[Concept]:
    """The concepts of a prompt, in its order: quoted texts, and noun spans with their attributes.

    Articles and numbers are left out, and so are words for the medium ("a photo of") and praise ("highly detailed").
    """
    if not isinstance(prompt, str):
        raise TypeError(f"prompt: got {type(prompt).__name__}, expected a str")
    concepts, end = [], 0
    for quoted in _QUOTES.finditer(prompt):
        group = next(i for i in range(1, 5) if quoted.group(i) is not None)
        concepts += _spans(prompt[end : quoted.start()], end)
        concepts.append(Concept(quoted.group(group), quoted.start(group), quoted.end(group), "text"))
        end = quoted.end()
    return concepts + _spans(prompt[end:], end)


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
        (start, end), kind = concept, "object"
    if not 0 <= start < end <= len(prompt):
        raise ValueError(f"concepts: got {concept!r}, expected a part of the prompt {prompt!r}")
    return Concept(prompt[start:end], start, end, kind)


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
        max_sequence_length: of the T5 part, as given to the pipeline.
        tokens: which parts to use. A concept said in both gives each part half of its weight.

    Returns:
        ConceptTokens with G the largest number of concepts (at least 1). Begin, end and padding tokens are never in it,
        and neither is what the tokenizers cut off.

    Raises:
        TypeError: a slow tokenizer, or prompts that are one str. ValueError: concepts that the prompts do not have, or
        parts without their tokenizer.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got a str, expected a list of them")
    if concepts is None:
        concepts = [parse(prompt) for prompt in prompts]
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
    max_sequence_length: int | None = None,
) -> ConceptTokens:
    """Which text tokens of a pipeline's embeddings say what its prompts ask for.

    Args:
        pipeline: a StableDiffusion3Pipeline or one of its relatives, with T5 or without (tokenizer_3=None), or a
            FluxPipeline, whose joint sequence has T5's tokens alone.
        prompts: B prompts, one for each image of a batch.
        concepts: for each prompt a list of what it asks for: a text that it has, characters (start, end), or a Concept.
            None: what `star.concepts.parse` finds, noun spans and quoted texts.
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
    return locate(prompts, clip, t5, concepts=concepts, max_sequence_length=max_sequence_length)
