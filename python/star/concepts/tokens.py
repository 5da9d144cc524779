"""The text tokens of a concept in a pipeline's embeddings."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from star.concepts.brackets import unbracket
from star.concepts.encoding import Part, Span, read_prompts
from star.concepts.parsing import parse_all
from star.concepts.spans import Concept, mark

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Marks = Sequence[Concept | str | tuple[int, int]]
"""A prompt's concepts as the user marks them: texts that the prompt has, or characters [start, end) of it."""
Call = Mapping[str, Any] | Sequence[Mapping[str, Any]]


class ConceptTokens(NamedTuple):
    """The text tokens of each concept.

    Attributes:
        index: (B, G, K) int64 rows of the text embeddings that the transformer gets, -1 for none.
        weight: (B, G, K) float32, each concept's weights sum to 1 (0 for a concept without a token).
    """

    index: Tensor  # type: ignore[assignment]  # hides the method of tuples
    weight: Tensor

    def rows(self, index: Tensor | slice | Sequence[int]) -> ConceptTokens:
        """The concepts of some rows, for instance repeated for each sample of a group."""
        return ConceptTokens(self.index[index], self.weight[index])


@dataclass(frozen=True)
class Said:
    """A concept of a prompt and its tokens.

    Attributes:
        concept: which.
        tokens: (row of the text embeddings, characters of the token), for each encoder that has tokens of it.
        cut: whether an encoder left out the end of the prompt, so that the concept may be beyond it.
    """

    concept: Concept
    tokens: tuple[tuple[tuple[int, str], ...], ...]
    cut: bool


def said(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    concepts: Sequence[Marks | None] | None = None,
    source: str = "rules",
    brackets: bool = False,
    max_sequence_length: int | None = None,
    call: Call | None = None,
) -> list[list[Said]]:
    """For each prompt its concepts and their tokens, from which `concept_tokens` makes its tensors.

    Arguments and errors are those of `concept_tokens`; there are no warnings."""
    return _said_and_cut(pipeline, prompts, concepts, source, brackets, max_sequence_length, call)[0]


def _said_and_cut(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    concepts: Sequence[Marks | None] | None,
    source: str,
    brackets: bool,
    max_sequence_length: int | None,
    call: Call | None,
) -> tuple[list[list[Said]], bool]:
    """`said`, and whether some prompt has an end that no encoder reads."""
    if isinstance(prompts, str):
        raise TypeError("prompts: got a str, expected a list of them")
    texts, spans = _concepts(prompts, concepts, source, brackets)
    length = {} if max_sequence_length is None else {"max_sequence_length": max_sequence_length}
    options = (
        {**(call or {}), **length} if call is None or isinstance(call, Mapping) else [{**one, **length} for one in call]
    )
    read = read_prompts(pipeline, texts, options)
    found = [
        [_said(text, parts, concept) for concept in row] for text, parts, row in zip(texts, read, spans, strict=True)
    ]
    return found, any(parts and all(part.cut for part in parts) for parts in read)


def concept_tokens(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    *,
    concepts: Sequence[Marks | None] | None = None,
    source: str = "rules",
    brackets: bool = False,
    max_sequence_length: int | None = None,
    call: Call | None = None,
) -> ConceptTokens:
    """The text tokens of each prompt's concepts, as rows of a pipeline's text embeddings.

    The pipeline's own call shows what its encoders read and where their tokens go, so templates, dropped tokens,
    padding and masks need no table. Encoders do not run, and may be offloaded or None; one that is None counts as
    present if its tokenizer is.

    Args:
        pipeline: one of diffusers' with `encode_prompt` and fast tokenizers.
        prompts: B prompts, one for each image of a batch, as they are encoded together: padding may depend on the
            others.
        concepts: for each prompt a list of its concepts, each a text in it, characters (start, end), or a Concept; or
            None for those that `star.concepts.parse` finds, noun spans and quoted texts.
        source: of `star.concepts.parse`, "rules", "spacy" or "spacy:MODEL"; not used if all concepts are given.
        brackets: the prompts mark their concepts with `[...]`. The model must have read them without; see `unbracket`.
        max_sequence_length: as it was given to the pipeline. None: the pipeline's own default.
        call: the other arguments of the pipeline's call by name, such as the image of an edit. Or a sequence of these,
            one for each prompt, which was then encoded alone.

    Returns:
        ConceptTokens with B rows and G the largest number of concepts (at least 1). A concept with tokens of several
        encoders gives each encoder an equal part of its weight.

    Warns:
        UserWarning: a concept has no token and so no map, mostly because its prompt is longer than the pipeline reads.
            `star.concepts.said` and `star check` show which. Or a prompt is cut behind its concepts, in every encoder.
            And what `parse` warns of.

    Raises:
        TypeError: another pipeline, a slow tokenizer, prompts that are one str.
        ValueError: concepts that the prompts do not have, concepts together with a source or brackets, brackets that do
            not pair, embeddings of other texts than the prompts, or an error of the pipeline's call.
    """
    found, cut = _said_and_cut(pipeline, prompts, concepts, source, brackets, max_sequence_length, call)
    rows = [[[[i for i, _ in part] for part in one.tokens] for one in row] for row in found]
    name = type(pipeline).__name__
    _warn(
        rows,
        cut,
        f"concepts: some have no text token of {name} and so no map, as in a prompt that is cut. `star check` and "
        "star.concepts.said show which",
        f"prompts: some are longer than {name} reads, and their ends are cut; shorten them, or raise "
        "max_sequence_length if its call takes it",
    )
    return _tensors(rows)


def _warn(rows: Sequence[Sequence[Sequence]], cut: bool, without_token: str, of_cut: str) -> None:
    """Tell the caller's caller of concepts without a token, or else of prompts that are cut.

    Each in the same words every time: Python then says them once."""
    if any(not parts for row in rows for parts in row):
        warnings.warn(without_token, stacklevel=3)
    elif cut:
        warnings.warn(of_cut, stacklevel=3)


def _concepts(
    prompts: Sequence[str], concepts: Sequence[Marks | None] | None, source: str, brackets: bool
) -> tuple[list[str], list[list[Concept]]]:
    """The prompts without brackets, and the concepts of each."""
    texts = list(prompts)
    given: Sequence[Marks | None] = [None] * len(texts)
    if concepts is not None:
        if source != "rules" and None not in concepts:
            raise ValueError(f"source: got {source!r} together with concepts; leave one of them out")
        if brackets:
            raise ValueError("brackets: got True together with concepts; leave one of them out")
        if len(concepts) != len(texts):
            raise ValueError(f"concepts: got {len(concepts)} lists, expected one for each of {len(texts)} prompts")
        for row in concepts:
            if isinstance(row, str):
                raise TypeError(f"concepts: got {row!r} for a prompt, expected a list of texts, as [{row!r}]")
        given = concepts
    elif brackets:
        texts, given = unbracket(texts)
    parsed = iter(parse_all([text for text, row in zip(texts, given, strict=True) if row is None], source))
    return texts, [
        next(parsed) if row is None else [mark(text, one) for one in row]
        for text, row in zip(texts, given, strict=True)
    ]


def _said(prompt: str, parts: Sequence[Part], concept: Concept) -> Said:
    """The tokens of a concept in each part that has some."""
    tokens = []
    for part in parts:
        found = _where(prompt, part.text[part.prompt.start : part.prompt.end], concept)
        if found is not None:
            start, end = (part.prompt.start + at for at in found)
            of_part = tuple(
                (row, part.text[first:last])
                for row, (first, last) in zip(part.rows, part.offsets, strict=True)
                if row >= 0 and first < min(end, last) and last > start
            )
            tokens += [of_part] if of_part else []
    return Said(concept, tuple(tokens), any(part.cut for part in parts))


def _where(prompt: str, read: str, concept: Concept) -> Span | None:
    """The concept's characters in a prompt as it is read: pipelines strip prompts, put spaces together, lower them, or
    clean them in other ways. None where the concept cannot be told for certain."""
    if read == prompt:
        return Span(concept.start, concept.end)
    ours, theirs = _letters(prompt), _letters(read)
    said = [i for i, (_, at) in enumerate(ours) if concept.start <= at < concept.end]
    if not said:
        return None
    our_text, their_text = ("".join(letter for letter, _ in text) for text in (ours, theirs))
    first, length = said[0], len(said)
    if our_text != their_text:  # the same one of as many
        word = our_text[first : first + length]
        before, after = _all(word, our_text), _all(word, their_text)
        if len(before) != len(after):
            return None
        first = after[before.index(first)]
    return Span(theirs[first][1], theirs[first + length - 1][1] + 1)


def _letters(text: str) -> list[tuple[str, int]]:
    """Its characters in lower case without spaces, and where they are."""
    return [(lower, i) for i, character in enumerate(text) for lower in character.lower() if not lower.isspace()]


def _all(word: str, text: str) -> list[int]:
    """Where a text has a word."""
    return [i for i in range(len(text)) if text.startswith(word, i)]


def _tensors(rows: Sequence[Sequence[Sequence[Sequence[int]]]]) -> ConceptTokens:
    """Of B prompts, their concepts, the parts that say each, the tokens of a part."""
    groups = max((len(row) for row in rows), default=0) or 1
    slots = max((sum(map(len, parts)) for row in rows for parts in row), default=0) or 1
    index = torch.full((len(rows), groups, slots), -1, dtype=torch.int64)
    weight = torch.zeros(len(rows), groups, slots, dtype=torch.float32)
    for b, row in enumerate(rows):
        for g, parts in enumerate(row):
            shares = [(token, 1 / (len(parts) * len(tokens))) for tokens in parts for token in tokens]
            for k, (token, share) in enumerate(shares):
                index[b, g, k], weight[b, g, k] = token, share
    return ConceptTokens(index, weight)


def _overlapping_tokens(
    prompts: Sequence[str],
    concepts: Sequence[Sequence[Concept]],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str,
) -> tuple[list[list[list[int]]], list[bool]]:
    """For each prompt and concept the indices of the tokens that overlap it, and whether the prompt is cut."""
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
    return overlapping, [bool(one.overflowing) for one in encoded.encodings]


def locate(
    prompts: Sequence[str],
    clip_tokenizer: PreTrainedTokenizerBase | None,
    t5_tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    concepts: Sequence[Marks | None] | None = None,
    source: str = "rules",
    brackets: bool = False,
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
        concepts, source, brackets: as for `concept_tokens`.
        max_sequence_length: of the T5 part, as given to the pipeline.
        tokens: which parts to use. A concept with tokens in both gives each part half of its weight.

    Returns:
        ConceptTokens with G the largest number of concepts (at least 1). It has no begin, end and padding tokens,
        and none that the tokenizers cut off.

    Warns:
        UserWarning: as `concept_tokens`.

    Raises:
        TypeError, ValueError, ImportError: as `parse`.
        TypeError: a slow tokenizer, or prompts that are one str.
        ValueError: concepts that the prompts do not have, concepts together with a source, or parts without their
            tokenizer.
    """
    if isinstance(prompts, str):
        raise TypeError("prompts: got a str, expected a list of them")
    if tokens not in ("both", "clip", "t5"):
        raise ValueError(f"tokens: got {tokens!r}, expected 'both', 'clip' or 't5'")
    if tokens == "t5" and t5_tokenizer is None:
        raise ValueError("tokens: 't5' needs t5_tokenizer")
    if clip_tokenizer is None and t5_tokenizer is None:
        raise ValueError("clip_tokenizer, t5_tokenizer: got None for both, expected at least one")
    if tokens == "clip" and clip_tokenizer is None:
        raise ValueError("tokens: 'clip' needs clip_tokenizer")
    texts, spans = _concepts(prompts, concepts, source, brackets)
    readers: list[tuple[int, PreTrainedTokenizerBase, int, str]] = []  # first row, tokenizer, most tokens, argument
    clip_length = 0 if clip_tokenizer is None else clip_tokenizer.model_max_length
    if tokens != "t5" and clip_tokenizer is not None:
        readers.append((0, clip_tokenizer, clip_length, "clip_tokenizer"))
    if tokens != "clip" and t5_tokenizer is not None and max_sequence_length > 0:
        readers.append((clip_length, t5_tokenizer, max_sequence_length, "t5_tokenizer"))
    parts = [(first, *_overlapping_tokens(texts, spans, *reader)) for first, *reader in readers]
    rows = [
        [[[first + i for i in found[b][g]] for first, found, _ in parts if found[b][g]] for g in range(len(row))]
        for b, row in enumerate(spans)
    ]
    _warn(
        rows,
        any(map(all, zip(*(cut for _, _, cut in parts), strict=True))),
        "concepts: some have no text token of the tokenizers and so no map, as in a prompt that is cut",
        "prompts: some are longer than the tokenizers read, and their ends are cut",
    )
    return _tensors(rows)
