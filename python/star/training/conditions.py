"""What the model is conditioned on: text embeddings of the prompts, and the tokens of their concepts."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from star.concepts import ConceptTokens, Marks, concept_tokens
from star.training.families import family_of
from star.training.families.family import Family, Text
from star.training.pipeline import text_encoders


@dataclass(frozen=True)
class Conditions:
    """What the model is conditioned on: P distinct prompts.

    family: of the pipeline that encoded them, which knows how its transformer takes them. text: P rows. negative: one
    row, or None without classifier-free guidance. tokens: the concepts' text tokens, P rows.
    """

    family: Family
    prompts: tuple[str, ...]
    text: Text
    negative: Text | None
    tokens: ConceptTokens

    def rows(self, index: Tensor) -> Conditions:
        """The conditions of some samples; index: (B,) int64 into the prompts."""
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in index.tolist()),
            text=self.text.each(lambda x: x[index]),
            tokens=self.tokens.rows(index.to(self.tokens.index.device)),
        )


@torch.no_grad()
def encode(
    pipeline: Any,
    prompts: Sequence[str],
    max_sequence_length: int,
    guidance_scale: float,
    source: str = "rules",
    concepts: Sequence[Marks | None] | None = None,
) -> Conditions:
    """Encode distinct prompts once. max_sequence_length: of the T5 part, if there is one, or of the whole text. source:
    of the concepts, see star.concepts.parse. concepts: of each prompt, or None for one whose concepts are to be
    found."""
    family, negative = family_of(pipeline), None
    text = family.encode(pipeline, prompts, max_sequence_length)
    if family.is_guided(guidance_scale):
        # As many as prompts, as the pipeline encodes them: another batch could differ in the last bit.
        repeated = [str(family.negative_prompt)] * len(prompts)
        negative = family.encode(pipeline, repeated, max_sequence_length).each(lambda x: x[:1])
    tokens = read_tokens(pipeline, prompts, max_sequence_length, source, concepts)
    return Conditions(family, tuple(prompts), text, negative, tokens)


def read_tokens(
    pipeline: Any,
    prompts: Sequence[str],
    max_sequence_length: int,
    source: str,
    concepts: Sequence[Marks | None] | None,
) -> ConceptTokens:
    """The concepts' text tokens; arguments as for `encode`."""
    call = family_of(pipeline).settings(pipeline, 1.0, max_sequence_length, len(prompts))
    return concept_tokens(pipeline, prompts, concepts=concepts, source=source, call=call)


class PromptEncoder:
    """Text embeddings of prompts. They repeat from iteration to iteration: the last `cached` are kept on the CPU.

    With a cache every prompt is encoded alone, because its embeddings must not depend on what happened to be cached.
    offload: the text encoders are on the device only while they encode. source: of the concepts, see
    star.concepts.parse.
    """

    def __init__(
        self,
        pipeline: Any,
        max_sequence_length: int,
        cached: int,
        offload: bool,
        source: str = "rules",
    ):
        self.pipeline, self.length, self.cached, self.offload = pipeline, max_sequence_length, cached, offload
        self.source, self.family = source, family_of(pipeline)
        self.cache: OrderedDict[str, Text] = OrderedDict()
        self.encoders = text_encoders(pipeline)
        self.device = pipeline.transformer.device

    def __call__(
        self, prompts: Sequence[str], guidance_scale: float, concepts: Sequence[Marks | None] | None = None
    ) -> Conditions:
        if not self.cached:
            with self.on_device():
                return encode(self.pipeline, prompts, self.length, guidance_scale, self.source, concepts)
        unwanted = [str(self.family.negative_prompt)] if self.family.is_guided(guidance_scale) else []
        wanted = [*prompts, *unwanted]
        missing = [prompt for prompt in wanted if prompt not in self.cache]
        found = {prompt: self.cache[prompt] for prompt in wanted if prompt in self.cache}
        if missing:
            with self.on_device(), torch.no_grad():
                found |= {prompt: self.encode_one(prompt) for prompt in missing}
        self.cache |= found
        for prompt in wanted:
            self.cache.move_to_end(prompt)
        while len(self.cache) > self.cached:
            self.cache.popitem(last=False)
        text = Text.joined([found[prompt] for prompt in prompts]).each(lambda x: x.to(self.device))
        negative = found[unwanted[0]].each(lambda x: x.to(self.device)) if unwanted else None
        tokens = read_tokens(self.pipeline, prompts, self.length, self.source, concepts)
        return Conditions(self.family, tuple(prompts), text, negative, tokens)

    def encode_one(self, prompt: str) -> Text:
        return self.family.encode(self.pipeline, [prompt], self.length).each(lambda x: x.cpu())

    @contextmanager
    def on_device(self) -> Iterator[None]:
        if not self.offload:
            yield
            return
        for encoder in self.encoders:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder in self.encoders:
                encoder.to("cpu")
