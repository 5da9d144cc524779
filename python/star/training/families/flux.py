"""FLUX.1: T5's tokens and CLIP's pooled embedding, guidance as an input of the transformer, packed latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from star.config import ConfigError
from star.training.families.family import Packed, Text, config_of


class Flux(Packed):
    pipeline, transformer = "FluxPipeline", "FluxTransformer2DModel"

    def encode(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> Text:
        embeds, pooled, _ = pipeline.encode_prompt(
            list(prompts),
            prompt_2=None,
            device=pipeline.transformer.device,
            max_sequence_length=max_sequence_length,
        )
        return Text(embeds, pooled)

    def velocity(
        self, transformer: torch.nn.Module, latents: Tensor, timesteps: Tensor, text: Text, guidance_scale: float
    ) -> Tensor:
        height, width = latents.shape[-2:]
        locations = torch.cartesian_prod(torch.arange(height // 2), torch.arange(width // 2))
        guidance = None
        if config_of(transformer).guidance_embeds:
            guidance = torch.full((len(latents),), guidance_scale, device=latents.device)
        velocity = transformer(
            hidden_states=self.pack(latents),
            encoder_hidden_states=text.embeds,
            pooled_projections=text.pooled,
            timestep=timesteps.to(latents.dtype) / 1000,  # rounded as the pipeline does
            img_ids=F.pad(locations, (1, 0)).to(text.embeds),
            txt_ids=text.embeds.new_zeros(text.embeds.shape[1], 3),
            guidance=guidance,
            return_dict=False,
        )[0]
        return self.unpack(velocity, (height, width))

    def settings(self, pipeline: Any, guidance_scale: float, max_sequence_length: int, count: int) -> dict[str, Any]:
        return {"guidance_scale": guidance_scale, "max_sequence_length": max_sequence_length}

    def check_guidance(self, transformer: torch.nn.Module, guidance_scale: float) -> None:
        if guidance_scale > 1 and not config_of(transformer).guidance_embeds:
            raise ConfigError(
                f"sampling.guidance_scale: got {guidance_scale:g}, expected 1: this model takes no guidance"
            )
