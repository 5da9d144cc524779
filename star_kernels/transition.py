"""The Gaussian step that every supported sampler takes, and its density."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Transition(NamedTuple):
    """x' ~ N(a x + b v, s^2), x the sample and v the model's velocity. Every field is (B,), float32 or float64.

    Attributes:
        a: coefficient of the sample in the mean.
        b: coefficient of the velocity in the mean.
        s: standard deviation of the step; 0 for a deterministic one, which has no density.
        precision: factor of the squared error in the log-density, 1 / (2 s^2); 1 for `cps`, by its public convention.
        log_norm: log s + log sqrt(2 pi), subtracted in the log-density; 0 for `cps`.
        kl_precision: 1 / (2 std^2) with std = s / sqrt(-dt): Flow-GRPO divides its KL term by std^2, not by s^2.
    """

    a: Tensor
    b: Tensor
    s: Tensor
    precision: Tensor
    log_norm: Tensor
    kl_precision: Tensor

    @classmethod
    def gaussian(cls, a: Tensor, b: Tensor, s: Tensor, std: Tensor | None = None) -> Transition:
        """The ordinary Gaussian: precision and norm follow from s. std: (B,), default s."""
        std = s if std is None else std
        return cls(a, b, s, 0.5 / s**2, s.log() + 0.5 * math.log(2 * math.pi), 0.5 / std**2)

    def rows(self, index: Tensor | slice) -> Transition:
        """The transitions of some samples of the batch."""
        return Transition(*(field[index] for field in self))

    def to(self, device: torch.device | str) -> Transition:
        """The same on another device."""
        return Transition(*(field.to(device) for field in self))

    def expand(self, batch: int) -> Transition:
        """One row (1,) repeated for a batch, (batch,) without copies."""
        return Transition(*(field.expand(batch) for field in self))


def channel_dim(sample: Tensor) -> int:
    """Packed latents (B, L, C) hold their channels last; latents (B, C, H, W) and (B, C, T, H, W) second."""
    return 2 if sample.ndim == 3 else 1


def log_prob(prev_sample: Tensor, mean: Tensor, transition: Transition, per_location: bool = False) -> Tensor:
    """Log-density of a step in Flow-GRPO's convention: averaged over the channels, and over the locations too.

    Args:
        prev_sample: (B, C, H, W), (B, C, T, H, W) or packed (B, L, C). Computed in float32 or better.
        mean: of the step, same shape.
        transition: fields (B,).
        per_location: leave out the mean over the locations.

    Returns:
        (B,), or with per_location the shape of prev_sample without its channel axis.

    Source: Flow-GRPO, flow_grpo/diffusers_patch/sd3_sde_with_logprob.py.
    """
    dtype = torch.promote_types(torch.promote_types(prev_sample.dtype, mean.dtype), torch.float32)
    shape = (-1, *(1,) * (prev_sample.ndim - 2))
    precision, norm = transition.precision.to(dtype).view(shape), transition.log_norm.to(dtype).view(shape)
    error = (prev_sample.to(dtype) - mean.to(dtype)).square().mean(channel_dim(prev_sample))
    value = -error * precision - norm
    return value if per_location else value.flatten(1).mean(1)
