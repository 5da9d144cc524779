"""The differentiable operators. Gradients are made in the backward pass, on the CPU together with the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from star_kernels.ops import (
    NFT_LOSS,
    NFT_LOSS_GRADIENT,
    NFT_LOSS_WITH_GRADIENT,
    POLICY_LOSS,
    POLICY_LOSS_GRADIENT,
    POLICY_LOSS_WITH_GRADIENT,
    Operator,
    has_values,
)


class Differentiable(NamedTuple):
    """A loss, its gradient, and both in one.

    saved: splits what follows the velocity in the schema into tensors and options, with None for the tensors that the
        gradient never reads.
    """

    loss: Operator
    gradient: Operator
    both: Operator
    saved: Callable[[tuple], tuple[tuple, tuple]]


def saved_of_policy_loss(rest: tuple) -> tuple[tuple, tuple]:
    # The gradient reads neither the old log-probs nor, but for the guard, the old mean: they need not be kept.
    old_mean, guard = rest[10], rest[-1]
    return (*rest[:10], old_mean if guard else None, None, *rest[12:14]), rest[14:]


def saved_of_nft_loss(rest: tuple) -> tuple[tuple, tuple]:
    return rest[:7], rest[7:]


LOSSES = {
    "policy_loss": Differentiable(POLICY_LOSS, POLICY_LOSS_GRADIENT, POLICY_LOSS_WITH_GRADIENT, saved_of_policy_loss),
    "nft_loss": Differentiable(NFT_LOSS, NFT_LOSS_GRADIENT, NFT_LOSS_WITH_GRADIENT, saved_of_nft_loss),
}


class Loss(torch.autograd.Function):
    """(loss, statistics, extra) of an operator by an implementation; the velocity alone gets a gradient.

    name: of the operator. rest: what follows the velocity in its schema. extra: what its gradient needs of this pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(name: str, implementation: str, velocity: Tensor, rest: tuple) -> tuple[Tensor, ...]:
        return LOSSES[name].loss.run(implementation)(velocity, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        ctx.name, ctx.implementation, velocity, rest = inputs
        _, statistics, extra = output
        ctx.mark_non_differentiable(statistics, extra)
        tensors, ctx.options = LOSSES[ctx.name].saved(rest)
        ctx.save_for_backward(extra, velocity, *tensors)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[None, None, Tensor | None, None]:
        extra, velocity, *rest = ctx.saved_tensors
        # With grad mode on somebody may want a derivative of the gradient; else the operator alone takes less time.
        run = Gradient.apply if torch.is_grad_enabled() else Gradient.forward
        return None, None, run(ctx.name, ctx.implementation, grad_loss, extra, velocity, (*rest, *ctx.options)), None


class LossWithGradient(Loss):
    """The same with the gradient made beside the loss, while the inputs are in the processor's cache.

    The first backward pass scales that gradient by the gradient of the loss and gives it away; a later one makes
    another.
    """

    @staticmethod
    def forward(name: str, implementation: str, velocity: Tensor, rest: tuple) -> tuple[Tensor, ...]:
        return LOSSES[name].both.run(implementation)(velocity, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        *same, ctx.gradient = output
        Loss.setup_context(ctx, inputs, tuple(same))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)  # else every backward pass makes zeros as large as the gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[None, None, Tensor | None, None]:
        if grad_loss is None:
            return None, None, None, None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None or torch.is_grad_enabled() or not has_values(grad_loss):
            return Loss.backward(ctx, grad_loss)
        return None, None, gradient if grad_loss.item() == 1 else gradient.mul_(grad_loss), None


class Gradient(torch.autograd.Function):
    """The gradient of the velocity, as a constant: whoever differentiates it is told so."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        name: str, implementation: str, grad_loss: Tensor, extra: Tensor, velocity: Tensor, rest: tuple
    ) -> Tensor:
        return LOSSES[name].gradient.run(implementation)(grad_loss, extra, velocity, *rest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        ctx.name = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Any) -> None:
        raise RuntimeError(f"{ctx.name}: no second derivative; its gradient is a constant")


def run_loss(name: str, implementation: str, velocity: Tensor, rest: tuple) -> tuple[Tensor, ...]:
    """(loss, statistics, ...) of an operator by an implementation."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return Loss.apply(name, implementation, velocity, rest)
    early = (
        implementation == "native"
        and velocity.device.type in LOSSES[name].both.native
        and velocity.dtype in (torch.float32, torch.float64)  # others are rounded once, after the gradient of the loss
        and velocity.requires_grad
        and torch.is_grad_enabled()
    )
    # Function.apply looks the signature of `forward` up in every call, for function transforms alone, which takes
    # longer than the rest of the call.
    function = LossWithGradient if early else Loss
    return super(torch.autograd.Function, function).apply(name, implementation, velocity, rest)
