"""A tensor with its own values and a gradient that is weighted by location: all that a trainer needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.checks import check_latents, check_tensor
from star_kernels.transition import channel_dim


def location_shape(x: Tensor) -> tuple[int, ...]:
    """Shape of a tensor that has one number for each location of x: x's shape without its channel axis."""
    channel = channel_dim(x)
    return tuple(x.shape[:channel] + x.shape[channel + 1 :])


def with_channel_axis(weights: Tensor, x: Tensor) -> Tensor:
    """Weights of x's locations with an axis for the channels, so that they multiply x."""
    check_latents("x", x)
    check_tensor("weights", weights, location_shape(x))  # a shape that broadcasts is a mistake here
    return weights.detach().to(x.device).unsqueeze(channel_dim(x))


class WeightedGradient(torch.autograd.Function):
    """x, and on the way back the gradient times weights, which multiply x by broadcasting."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weights: Tensor) -> Tensor:
        return x.clone()  # a view of a custom function's could not be changed in place

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weights,) = ctx.saved_tensors
        return (gradient * weights).to(gradient.dtype), None


def weighted_gradient(x: Tensor, weights: Tensor | None) -> Tensor:
    """A copy of x, bit for bit; its gradient is multiplied by a weight for each latent location.

    Put around the model's velocity, or around a log-density before it is averaged, this allocates the update of any
    trainer and does not change its loss, ratio, clipping and metrics. For a clipped policy loss of one ratio per
    sample it is exactly ratio "token" of `star_kernels.policy_loss`: there the gradient of the velocity is the scalar
    loss's times w, and the value is the scalar loss's, because the weights of a sample have mean 1.

    Everything that x was computed from gets the weighted gradient. A KL term that shall not be weighted must read x
    before this function.

    Args:
        x: (B, C, H, W), (B, C, T, H, W) or packed (B, L, C): velocity, mean or elementwise log-density.
        weights: (B, H, W), (B, T, H, W) or (B, L), mean 1 over each sample, a constant. None returns x.

    Raises:
        TypeError, ValueError: weights that are not floating-point or not one per location.
    """
    return x if weights is None else WeightedGradient.apply(x, with_channel_axis(weights, x))
