"""policy_loss beside the public Flow-GRPO computation, on the same inputs."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

import star_kernels as sk

SHAPES = ((9, 16, 64, 64), (8, 16, 128, 128))  # 512 and 1024 px; float32. A row holds the worse of the two.
CLIP, ADV_CLIP = 1e-4, 5.0

Loss = Callable[[], tuple[torch.Tensor, torch.Tensor]]


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


def compared(shape, *, compiled=False, delta=False, weighted=True) -> tuple[Loss, Loss]:
    """(ours, Flow-GRPO's), each a function that returns loss and gradient; first shown to agree at weights of one.

    Ours takes what theirs takes, the old log-probabilities, or with `delta` the old mean, one tensor more to read.
    """
    inputs, schedule = loss_inputs(shape)
    velocity = inputs["velocity"]
    old_log_prob = sk.log_prob(inputs["prev_sample"], inputs["old_mean"], inputs["transition"])
    if not delta:
        inputs |= dict(old_mean=None, old_log_prob=old_log_prob)
    eager = (velocity, inputs["sample"], inputs["prev_sample"], *schedule, inputs["advantages"], old_log_prob)
    flow_grpo_loss = torch.compile(flow_grpo) if compiled else flow_grpo

    def ours(inputs=inputs):
        loss = sk.policy_loss(**inputs, clip_range=CLIP, impl="native").loss
        return loss, torch.autograd.grad(loss, velocity)[0]

    def theirs():
        loss = flow_grpo_loss(*eager)
        return loss, torch.autograd.grad(loss, velocity)[0]

    unweighted = {**inputs, "weights": None}
    (loss, gradient), (expected, expected_gradient) = ours(unweighted), theirs()
    # Their log-probabilities are of order one in float32, so their ratio is off by a few 1e-7.
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6 * expected_gradient.abs().max().item())
    return (ours if weighted else lambda: ours(unweighted)), theirs


def loss_peak(peak, shape) -> tuple[int]:
    """Peak memory of forward and backward beyond the gradient."""
    inputs, _ = loss_inputs(shape)

    def call():
        loss = sk.policy_loss(**inputs, clip_range=CLIP, impl="native").loss
        return torch.autograd.grad(loss, inputs["velocity"])[0]

    for _ in range(3):
        call()
    return (peak(call) - inputs["velocity"].nbytes,)
