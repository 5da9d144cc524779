"""Advantage Weighted Matching's objective: the loss of pretraining on the policy's own images, weighed by their
advantages, as a policy gradient whose log-density is the negative matching loss."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from star.config import Loss
from star.objective import awm_loss
from star.training.forward_process import Compared, Method


def terms(config: Loss, at: Compared) -> tuple[Tensor, dict[str, Tensor]]:
    """Without off_policy the policy itself sampled, and was not updated since: its ratio is exactly 1."""
    target, sampled = at.noise - at.image, at.velocity.detach()
    if config.off_policy:
        assert at.old_velocity is not None  # such a run keeps an old policy
        sampled = at.old_velocity
    loss, statistics = awm_loss(
        at.velocity,
        sampled,
        target,
        at.sigma,
        at.advantages,
        at.weights,
        sigma_power=config.sigma_power,
        error_power=config.error_power,
        ratio=config.ratio,
        clip_range=config.clip_range,
        adv_clip_max=config.adv_clip,
    )
    found = statistics._asdict()
    found["matching_error"] = squared_difference(at.velocity.detach(), target)
    pulls = {"old_deviation": (at.old_velocity, config.old_kl_coef), "kl": (at.reference_velocity, config.kl_coef)}
    for name, (other, coefficient) in pulls.items():
        if other is not None:
            difference = squared_difference(at.velocity, other)
            loss, found[name] = loss + coefficient * difference, difference.detach()
    return loss, found


def squared_difference(x: Tensor, y: Tensor) -> Tensor:
    """() float32, the mean of (x - y)^2. Each sample is summed on its own: one sum over all would depend on threads."""
    return (x - y).square().flatten(1).mean(1, dtype=torch.float64).mean().float()


def levels(numbers: random.Random, trained: Sequence[int], count: int) -> list[int]:
    """One trained step from each of `count` parts of their range, as equal as they can be, in random order."""
    ordered, size = sorted(trained), len(trained)
    parts = [ordered[i * size // count : (i + 1) * size // count] for i in range(count)]
    return numbers.sample([numbers.choice(part) for part in parts], count)


AWM = Method(terms, levels)
