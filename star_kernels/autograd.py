"""The one differentiable operator. Its gradient is made in the backward pass, on the CPU together with the loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from star_kernels.ops import POLICY_LOSS, POLICY_LOSS_GRADIENT, POLICY_LOSS_WITH_GRADIENT


class PolicyLoss(torch.autograd.Function):
    """(loss, statistics, log_ratio) by an implementation; of its arguments the velocity alone gets a gradient.

    rest: what follows the velocity in the operator's schema.
    """

    @staticmethod
    def forward(implementation: str, velocity: Tensor, rest: tuple) -> tuple[Tensor, ...]:
        return POLICY_LOSS.run(implementation)(velocity, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.implementation, velocity, rest = inputs
        (sample, prev_sample, a, b, s, precision, log_norm, kl_precision, advantages, weights, old_mean, _,
         reference_velocity, step_weights, *options, guard) = rest  # fmt: skip
        ctx.options = (*options, guard)
        _, statistics, log_ratio = output
        ctx.mark_non_differentiable(statistics, log_ratio)
        # The gradient reads neither the old log-probs nor, but for the guard, the old mean: they need not be kept.
        ctx.save_for_backward(
            log_ratio, velocity, sample, prev_sample, a, b, s, precision, log_norm, kl_precision, advantages, weights,
            old_mean if guard else None, None, reference_velocity, step_weights,
        )  # fmt: skip

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[None, Tensor | None, None]:
        log_ratio, velocity, *rest = ctx.saved_tensors
        # With grad mode on somebody may want a derivative of the gradient; else the operator alone takes less time.
        run = PolicyLossGradient.apply if torch.is_grad_enabled() else PolicyLossGradient.forward
        return None, run(ctx.implementation, grad_loss, log_ratio, velocity, (*rest, *ctx.options)), None


class PolicyLossWithGradient(PolicyLoss):
    """The same with the gradient made beside the loss, while the inputs are in the processor's cache.

    The first backward pass scales that gradient by the gradient of the loss and gives it away; a later one makes
    another.
    """

    @staticmethod
    def forward(implementation: str, velocity: Tensor, rest: tuple) -> tuple[Tensor, ...]:
        return POLICY_LOSS_WITH_GRADIENT.run(implementation)(velocity, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *same, ctx.gradient = output
        PolicyLoss.setup_context(ctx, inputs, tuple(same))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else every backward pass makes zeros as large as the gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[None, Tensor | None, None]:
        if grad_loss is None:
            return None, None, None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled():
            return PolicyLoss.backward(ctx, grad_loss)
        return None, gradient if grad_loss.item() == 1 else gradient.mul_(grad_loss), None


class PolicyLossGradient(torch.autograd.Function):
    """The gradient of the velocity, as a constant: whoever differentiates it is told so."""

    @staticmethod
    def forward(implementation: str, grad_loss: Tensor, log_ratio: Tensor, velocity: Tensor, rest: tuple) -> Tensor:
        return POLICY_LOSS_GRADIENT.run(implementation)(grad_loss, log_ratio, velocity, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError("policy_loss: no second derivative; its gradient is a constant")


def policy_loss(implementation: str, velocity: Tensor, rest: tuple) -> tuple[Tensor, ...]:
    """(loss, statistics, ...) by an implementation."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return PolicyLoss.apply(implementation, velocity, rest)
    early = (
        implementation == "native"
        and velocity.device.type in POLICY_LOSS_WITH_GRADIENT.native
        and velocity.dtype in (torch.float32, torch.float64)  # others are rounded once, after the gradient of the loss
        and velocity.requires_grad
        and torch.is_grad_enabled()
    )
    # Function.apply looks the signature of `forward` up in every call, for function transforms alone, which takes
    # longer than the rest of the call.
    return super(torch.autograd.Function, PolicyLossWithGradient if early else PolicyLoss).apply(
        implementation, velocity, rest
    )
