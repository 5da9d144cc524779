"""The one differentiable operator. Its gradient is made in the forward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class PolicyLoss(torch.autograd.Function):
    """(loss, statistics) of an implementation `run`, whose first argument, the velocity, gets the gradient."""

    @staticmethod
    def forward(ctx: Any, run: Callable, velocity: Tensor, rest: tuple) -> tuple[Tensor, Tensor]:
        loss, statistics, gradient = run(velocity, *rest)
        ctx.mark_non_differentiable(statistics)
        ctx.save_for_backward(gradient)
        return loss, statistics

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "policy_loss: no second derivative; its gradient is a constant (create_graph must be False)"
            )
        (gradient,) = ctx.saved_tensors
        # Reading the value would wait for a GPU, and a traced tensor has none.
        readable = grad_loss.device.type == "cpu" and not torch.compiler.is_compiling()
        is_one = readable and type(grad_loss) is Tensor and grad_loss.item() == 1
        scaled = gradient if is_one else gradient * grad_loss.to(gradient.dtype)
        return None, scaled, None
