"""What the loop must know of a kind of pipeline, in one object of a few methods.

Latents are (B, C, H, W) wherever a family takes or gives them, also of models that pack them into tokens: maps,
weights, masks and images have rows and columns, noise is drawn before it is packed, and packing only moves numbers,
which no step of the sampler and no mean over locations can tell. So a family packs around its transformer alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from star.capture.blocks import unwrapped
from star.config import ConfigError
from star_kernels import Transition, gaussian_step


class ModelShape(NamedTuple):
    """Of the latents outside of the transformer: their channels, and the locations of an image token on a side."""

    in_channels: int
    patch_size: int


class Text(NamedTuple):
    """Embeddings of P prompts as a transformer takes them.

    embeds: (P, T, D). pooled: (P, D'), or None for a transformer that takes none. mask: (P, T) bool, False for padding
    that nothing may attend to; None: there is none.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None

    def each(self, change: Callable[[Tensor], Tensor]) -> Text:
        """The same text with every tensor changed."""
        pooled, mask = (None if x is None else change(x) for x in (self.pooled, self.mask))
        return Text(change(self.embeds), pooled, mask)

    def whole_mask(self) -> Tensor:
        """The mask, True everywhere if there is none."""
        return torch.ones_like(self.embeds[..., 0], dtype=torch.bool) if self.mask is None else self.mask

    def padded(self, length: int) -> Text:
        """The same text with `length` tokens; those beyond its own are masked."""
        more = length - self.embeds.shape[1]
        if not more:
            return self
        return self._replace(embeds=F.pad(self.embeds, (0, 0, 0, more)), mask=F.pad(self.whole_mask(), (0, more)))

    @classmethod
    def joined(cls, texts: Sequence[Text]) -> Text:
        """The prompts of several texts, with as many tokens as the longest one has."""
        length = max(text.embeds.shape[1] for text in texts)
        padded = [text.padded(length) for text in texts]
        pooled = [text.pooled for text in padded if text.pooled is not None]
        masked = any(text.mask is not None for text in padded)
        return cls(
            torch.cat([text.embeds for text in padded]),
            torch.cat(pooled) if pooled else None,
            torch.cat([text.whole_mask() for text in padded]) if masked else None,
        )


class Velocity(NamedTuple):
    """What a pass gives for B samples, (B, C, H, W) in the model's type. unconditional: of the negative prompt, or None
    where there is no more guidance to do."""

    conditional: Tensor
    unconditional: Tensor | None
    guidance_scale: float

    def guided(self) -> Tensor:
        """(B, C, H, W) float32."""
        velocity = self.conditional.float()
        if self.unconditional is None:
            return velocity
        unconditional = self.unconditional.float()
        return unconditional + self.guidance_scale * (velocity - unconditional)

    def step(
        self, latents: Tensor, noise: Tensor | None, transition: Transition, seeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`gaussian_step` by the guided velocity, with its bits."""
        return gaussian_step(
            latents,
            self.conditional,
            noise,
            transition,
            unconditional_velocity=self.unconditional,
            guidance_scale=1.0 if self.unconditional is None else self.guidance_scale,
            seeds=seeds,
        )


class Family(ABC):
    """A kind of pipeline, without any state of its own."""

    pipeline: ClassVar[str]
    """diffusers' class of the pipeline."""
    transformer: ClassVar[str]
    """diffusers' class of its transformer."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Parts that a pipeline's folder may lack."""
    text_lengths: ClassVar[range]
    """What model.max_sequence_length may be."""
    begins_with_clip: ClassVar[bool] = False
    """Whether CLIP's tokens stand before those that max_sequence_length counts."""
    negative_prompt: ClassVar[str | None] = None
    """Of classifier-free guidance. None: guidance is an input of the transformer, which needs no second half."""

    @abstractmethod
    def shape(self, transformer: torch.nn.Module) -> ModelShape:
        """transformer: bare or wrapped."""

    @abstractmethod
    def encode(self, pipeline: Any, prompts: Sequence[str], max_sequence_length: int) -> Text:
        """Embeddings of P prompts, on the transformer's device."""

    @abstractmethod
    def velocity(
        self, transformer: torch.nn.Module, latents: Tensor, timesteps: Tensor, text: Text, guidance_scale: float
    ) -> Tensor:
        """(B, C, H, W) of one pass. timesteps: (B,) of the scheduler, in 0..1000. text: B rows."""

    @abstractmethod
    def settings(self, pipeline: Any, guidance_scale: float, max_sequence_length: int, count: int) -> dict[str, Any]:
        """Guidance and text length of `count` images as arguments of the pipeline's call."""

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether a pass has a half of the negative prompt."""
        return self.negative_prompt is not None and guidance_scale > 1

    def guide(self, conditional: Tensor, unconditional: Tensor, guidance_scale: float) -> Velocity:
        """The halves (B, C, H, W) of a pass."""
        return Velocity(conditional, unconditional, guidance_scale)

    def set_timesteps(self, scheduler: Any, count: int, tokens: int) -> None:
        """Set a scheduler's timesteps as the pipeline's call does for images of so many image tokens."""
        scheduler.set_timesteps(count, **({"mu": shift(scheduler, tokens)} if is_dynamic(scheduler) else {}))

    def pack(self, latents: Tensor) -> Tensor:
        """(B, C, H, W) latents as the pipeline's call takes them."""
        return latents

    def unpack(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        """The inverse. size: (H, W)."""
        return latents

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) to images (B, 3, H', W') in about -1..1."""
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        return vae.decode(scaled.to(vae.dtype), return_dict=False)[0]

    def scale_factor(self, vae: Any) -> int:
        """Pixels of a latent location on a side."""
        return 2 ** (len(vae.config.block_out_channels) - 1)

    def largest(self, transformer: torch.nn.Module) -> int | None:
        """Image tokens on a side of the largest image, or None: there is no such limit."""
        return None

    def check_guidance(self, transformer: torch.nn.Module, guidance_scale: float) -> None:  # noqa: B027  # most have it
        """Raise ConfigError for guidance that the model does not have."""


class Packed(Family):
    """Transformers that take 2 x 2 latents as one token, (B, N, 4 C), and timesteps in 0..1."""

    text_lengths = range(1, 513)

    def shape(self, transformer: torch.nn.Module) -> ModelShape:
        return ModelShape(config_of(transformer).in_channels // 4, 2)

    def pack(self, latents: Tensor) -> Tensor:
        return F.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)

    def unpack(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        return F.pixel_shuffle(latents.transpose(1, 2).unflatten(2, (size[0] // 2, size[1] // 2)), 2)

    def set_timesteps(self, scheduler: Any, count: int, tokens: int) -> None:
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / count, count), mu=shift(scheduler, tokens))


def config_of(transformer: torch.nn.Module) -> Any:
    return unwrapped(transformer).config


def is_dynamic(scheduler: Any) -> bool:
    """Whether a scheduler shifts its sigmas by the number of image tokens."""
    return bool(scheduler.config.get("use_dynamic_shifting", False))


def shift(scheduler: Any, tokens: int) -> float:
    """The exponent of that shift."""
    defaults = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    return calculate_shift(tokens, *(scheduler.config.get(name, value) for name, value in defaults.items()))


def check_size(family: Family, transformer: torch.nn.Module, factor: int, size: tuple[int, int], section: str) -> None:
    """Raise ConfigError for images that a model cannot draw. factor: pixels of a latent. size: (height, width) in
    pixels. section: of the two settings."""
    unit = factor * family.shape(transformer).patch_size
    largest = family.largest(transformer)
    for name, value in zip(("height", "width"), size, strict=True):
        if value % unit or (largest is not None and value > unit * largest):
            limit = "" if largest is None else f", at most {unit * largest}"
            raise ConfigError(f"{section}{name}: got {value}, expected a multiple of {unit}{limit}")
