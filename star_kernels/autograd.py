"""Backward formula of the one differentiable operator. Its gradient is made in the forward pass."""

from __future__ import annotations

import torch
from torch import Tensor

POLICY_LOSS_ARGUMENTS = 21


def policy_loss_setup(ctx, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    _, statistics, gradient = output
    ctx.mark_non_differentiable(statistics, gradient)
    ctx.save_for_backward(gradient)


def policy_loss_backward(ctx, grad_loss: Tensor, *_) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        raise RuntimeError("policy_loss: no second derivative; its gradient is a constant (create_graph must be False)")
    (gradient,) = ctx.saved_tensors
    # Reading the value would wait for a GPU, and a traced tensor (a subclass) has none.
    is_one = grad_loss.device.type == "cpu" and type(grad_loss) is Tensor and grad_loss.item() == 1
    scaled = gradient if is_one else gradient * grad_loss.to(gradient.dtype)
    return (scaled, *(None,) * (POLICY_LOSS_ARGUMENTS - 1))
