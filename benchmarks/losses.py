"""policy_loss, forward and backward to the velocity, beside the public Flow-GRPO computation and beside a copy."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import star_kernels as sk
from memory import in_a_process
from runner import Counted, Sides

SHAPES = {512: (9, 16, 64, 64), 1024: (8, 16, 128, 128)}  # pixels: latents, float32
CLIP, ADV_CLIP = 1e-4, 5.0


def loss_inputs(shape) -> tuple[dict, tuple[torch.Tensor, ...]]:
    """(arguments of policy_loss, (sigma, dt, std) each (B,)), float32: one of ten steps, at sigma 0.7, noise level 0.7.

    The policy has drifted a little since the rollout.
    """
    torch.manual_seed(0)
    batch, _, rows, columns = shape
    sigma, dt, noise_level = torch.full((batch,), 0.7), torch.full((batch,), -0.08), 0.7
    std = noise_level * (sigma / (1 - sigma)).sqrt()
    transition = sk.Transition.gaussian(
        1 + std**2 / (2 * sigma) * dt, (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt, std * (-dt).sqrt(), std
    )
    sample, velocity = torch.randn(shape), torch.randn(shape)
    prev_sample, old_mean = sk.gaussian_step(sample, velocity, torch.randn(shape), transition)
    weights = sk.allocate(torch.rand(batch, 2, rows * columns // 4), (rows // 2, columns // 2))
    velocity = (velocity + 1e-4 * torch.randn(shape)).requires_grad_()
    return dict(velocity=velocity, sample=sample, prev_sample=prev_sample, old_mean=old_mean, transition=transition,
                advantages=torch.randn(batch), weights=weights), (sigma, dt, std)  # fmt: skip


def flow_grpo(velocity, sample, prev_sample, sigma, dt, std, advantages, old_log_prob):
    """The scalar loss from Flow-GRPO's formulas: sd3_sde_with_logprob.py and the "grpo logic" of train_sd3.py."""
    sigma, dt, std = (t.view(-1, 1, 1, 1) for t in (sigma, dt, std))
    drift = (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    mean = sample * (1 + std**2 / (2 * sigma) * dt) + velocity * drift
    s = std * torch.sqrt(-dt)
    log_prob = -((prev_sample - mean) ** 2) / (2 * s**2) - torch.log(s) - math.log(math.sqrt(2 * math.pi))
    ratio = torch.exp(log_prob.mean(dim=(1, 2, 3)) - old_log_prob)
    advantages = torch.clamp(advantages, -ADV_CLIP, ADV_CLIP)
    return torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)).mean()


def loss_and_gradient(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    loss = sk.policy_loss(**inputs, clip_range=CLIP, impl="native").loss
    return loss, torch.autograd.grad(loss, inputs["velocity"])[0]


def agree(ours, theirs) -> None:
    """Their log-probabilities are of order one in float32, so their ratio is off by a few 1e-7."""
    (loss, gradient), (expected, expected_gradient) = ours, theirs
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6 * expected_gradient.abs().max().item())


def against_flow_grpo(pixels: int, compiled: bool = False, delta: bool = False) -> Sides:
    """Forward and backward to the velocity against Flow-GRPO's formulas, at weights of one, where both are the same.

    Ours takes what theirs takes, the old log-probabilities, or with `delta` the old mean, one tensor more to read; and
    weights all of one, which it multiplies as it does others."""
    inputs, schedule = loss_inputs(SHAPES[pixels])
    velocity = inputs["velocity"]
    old_log_prob = sk.log_prob(inputs["prev_sample"], inputs["old_mean"], inputs["transition"])
    inputs["weights"] = torch.ones_like(inputs["weights"])
    if not delta:
        inputs |= dict(old_mean=None, old_log_prob=old_log_prob)
    eager = (velocity, inputs["sample"], inputs["prev_sample"], *schedule, inputs["advantages"], old_log_prob)
    published = torch.compile(flow_grpo) if compiled else flow_grpo

    def theirs():
        loss = published(*eager)
        return loss, torch.autograd.grad(loss, velocity)[0]

    return Sides(lambda: loss_and_gradient(inputs), theirs, agree, f"latents {SHAPES[pixels]}", compiled=compiled)


def spatial(pixels: int) -> Sides:
    """A weight for each location against none."""
    inputs, _ = loss_inputs(SHAPES[pixels])
    inputs["weights"] = torch.ones_like(inputs["weights"])
    scalar = {**inputs, "weights": None}
    return Sides(
        lambda: loss_and_gradient(inputs), lambda: loss_and_gradient(scalar), agree, note=f"latents {SHAPES[pixels]}"
    )


def operator(inputs: dict) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The operator alone, loss and gradient: what the call from Python adds to it is left out."""
    flat = (inputs["velocity"].detach(), inputs["sample"], inputs["prev_sample"], *inputs["transition"],
            inputs["advantages"], inputs["weights"], inputs["old_mean"], None, None, None,
            "token", CLIP, CLIP, ADV_CLIP, 0.0, False)  # fmt: skip
    return lambda: torch.ops.star.policy_loss_with_gradient_native(*flat)


def beside_a_copy(call: Callable[[], object], moved: int, shape) -> Sides:
    """Against copy_ that moves as many bytes: reads half and writes half."""
    source = torch.randn(moved // 8)
    target = torch.empty_like(source)
    # A copy computes nothing; that the call is right is the other rows' to say.
    return Sides(call, lambda: target.copy_(source), lambda *_: None, moved=moved, note=f"latents {shape}")


def bandwidth(pixels: int, alone: bool = False) -> Sides:
    """Each input and output counted once: four of the latents' size, the gradient, and the weights."""
    inputs, _ = loss_inputs(SHAPES[pixels])
    moved = 5 * inputs["sample"].nbytes + inputs["weights"].nbytes
    return beside_a_copy(operator(inputs) if alone else lambda: loss_and_gradient(inputs), moved, SHAPES[pixels])


def host() -> Sides:
    """What a call from Python adds to the operator, forward and backward: tensors so small that the rest is nothing."""
    inputs, _ = loss_inputs((1, 4, 4, 4))

    def equal(ours, alone):
        torch.testing.assert_close(ours[1], alone[-1], rtol=0, atol=0)

    return Sides(lambda: loss_and_gradient(inputs), operator(inputs), equal, threads=1, note="one thread")


def memory(pixels: int) -> Counted:
    (extra,) = in_a_process("losses", "loss_peak", SHAPES[pixels])
    inputs = 4 * math.prod(SHAPES[pixels]) * 4
    return Counted(extra, 0, f"beyond the gradient; {inputs >> 20} MiB of inputs")


def loss_peak(peak, shape) -> tuple[int]:
    """Peak memory of forward and backward beyond the gradient."""
    inputs, _ = loss_inputs(shape)
    for _ in range(3):
        loss_and_gradient(inputs)
    return (peak(lambda: loss_and_gradient(inputs)[1]) - inputs["velocity"].nbytes,)
