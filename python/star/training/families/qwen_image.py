"""Qwen-Image: Qwen2.5-VL's tokens with a mask, classifier-free guidance that keeps the norm, packed latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from star.config import ConfigError
from star.training.families.family import Packed, Text, Velocity, config_of


class QwenImage(Packed):
    pipeline, transformer = "QwenImagePipeline", "QwenImageTransformer2DModel"
    text_lengths = range(1, 1025)
    negative_prompt = " "  # the model's card recommends a space: nothing at all has no token of its own

    def encode(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> Text:
        embeds, mask = pipeline.encode_prompt(
            list(prompts), device=pipeline.transformer.device, max_sequence_length=max_sequence_length
        )
        return Text(embeds, mask=None if mask is None else mask.bool())

    def velocity(
        self, transformer: torch.nn.Module, latents: Tensor, timesteps: Tensor, text: Text, guidance_scale: float
    ) -> Tensor:
        height, width = latents.shape[-2:]
        velocity = transformer(
            hidden_states=self.pack(latents),
            encoder_hidden_states=text.embeds,
            encoder_hidden_states_mask=text.mask,
            timestep=timesteps.to(latents.dtype) / 1000,  # rounded as the pipeline does
            img_shapes=[[(1, height // 2, width // 2)]] * len(latents),
            return_dict=False,
        )[0]
        return self.unpack(velocity, (height, width))

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Velocity:
        """Each image token has the norm of its conditional velocity."""
        guided = self.pack(Velocity(conditional, unconditional, guidance_scale).guided())
        norm = self.pack(conditional.float()).norm(dim=-1, keepdim=True)
        rescaled = guided * (norm / guided.norm(dim=-1, keepdim=True))
        height, width = conditional.shape[-2:]
        return Velocity(self.unpack(rescaled, (height, width)), None, guidance_scale)

    def settings(self, pipeline: Any, guidance_scale: float, max_sequence_length: int, count: int) -> dict[str, Any]:
        call: dict[str, Any] = {"true_cfg_scale": guidance_scale, "max_sequence_length": max_sequence_length}
        return call | ({"negative_prompt": [self.negative_prompt] * count} if self.is_guided(guidance_scale) else {})

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """The autoencoder is one of videos; an image is a frame."""
        latents = latents.to(vae.dtype)
        mean, std = (
            torch.tensor(x).to(latents).view(-1, 1, 1) for x in (vae.config.latents_mean, vae.config.latents_std)
        )
        return vae.decode((latents * std + mean)[:, :, None], return_dict=False)[0][:, :, 0]

    def scale_factor(self, vae: Any) -> int:
        return 2 ** len(vae.config.temperal_downsample)

    def check_guidance(self, transformer: torch.nn.Module, guidance_scale: float) -> None:
        if config_of(transformer).guidance_embeds:
            raise ConfigError(
                "model.path: a Qwen-Image that takes guidance as an input is not supported; use another one"
            )
