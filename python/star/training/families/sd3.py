"""Stable Diffusion 3 and 3.5: CLIP's and T5's tokens, classifier-free guidance, latents as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from star.training.families.family import Family, ModelShape, Text, config_of


class SD3(Family):
    pipeline, transformer = "StableDiffusion3Pipeline", "SD3Transformer2DModel"
    optional = ("text_encoder_3", "tokenizer_3")
    text_lengths = range(513)
    begins_with_clip = True
    negative_prompt = ""

    def shape(self, transformer: torch.nn.Module) -> ModelShape:
        config = config_of(transformer)
        return ModelShape(config.in_channels, config.patch_size)

    def largest(self, transformer: torch.nn.Module) -> int:
        return config_of(transformer).pos_embed_max_size

    def encode(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> Text:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            list(prompts),
            prompt_2=None,
            prompt_3=None,
            device=pipeline.transformer.device,
            do_classifier_free_guidance=False,
            max_sequence_length=_t5_tokens(pipeline, max_sequence_length),
        )
        return Text(embeds, pooled)

    def velocity(
        self, transformer: torch.nn.Module, latents: Tensor, timesteps: Tensor, text: Text, guidance_scale: float
    ) -> Tensor:
        return transformer(latents, text.embeds, text.pooled, timesteps, return_dict=False)[0]

    def settings(self, pipeline: Any, guidance_scale: float, max_sequence_length: int, count: int) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale, "max_sequence_length": _t5_tokens(pipeline, max_sequence_length)}


def _t5_tokens(pipeline: Any, max_sequence_length: int) -> int:
    """Without a T5 diffusers would append so many tokens of zeros."""
    return 0 if pipeline.text_encoder_3 is None else max_sequence_length
