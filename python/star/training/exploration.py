"""Noise where it matters: which image tokens a stochastic step noises, and the loss of these alone.

Everywhere else the step is the deterministic one, which has no density. The images of a group then differ in what their
prompt names.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from star.config import Loss
from star.objective import Allocation, top_locations
from star.objective.allocation import repeat_tokens
from star.training.rollout import Explore
from star_kernels import PolicyLoss, Statistics, Transition, policy_loss


def everywhere_if_nowhere(chosen: Tensor) -> Tensor:
    """(B, rows, columns) bool; a sample without any token gets all of them: its images would not differ."""
    return chosen | ~chosen.flatten(1).any(1).view(-1, 1, 1)


def explore_maps(allocation: Allocation, share: float, sigmas: Tensor, grid: tuple[int, int]) -> Explore:
    """The tokens with the largest map, read in the very pass before the noise. sigmas: (T+1,) of the schedule; outside
    the allocation's noise window all tokens are noised."""
    low, high = allocation.noise_window

    def explore(step: int, rows: Tensor, maps: Tensor | None) -> Tensor | None:
        if not low <= float(sigmas[step]) <= high:
            return None
        if maps is None:
            raise ValueError(f"captured: the maps of step {step} were not read, but they say where its noise goes")
        return everywhere_if_nowhere(top_locations(allocation, maps, grid, share))

    return explore


def explore_masks(masks: Tensor, grid: tuple[int, int]) -> Explore:
    """The tokens that a mask touches. masks: (B, height, width) in 0..1, one for each sample of the rollout."""
    chosen = everywhere_if_nowhere(F.adaptive_avg_pool2d(masks[:, None], grid)[:, 0] > 0)
    return lambda step, rows, maps: chosen[rows]


class StepTensors(NamedTuple):
    """What `star_kernels.policy_loss` takes of b samples at one step, in its shapes."""

    velocity: Tensor
    sample: Tensor
    prev_sample: Tensor
    transition: Transition
    advantages: Tensor
    weights: Tensor | None
    old_mean: Tensor
    reference_velocity: Tensor | None
    step_weights: Tensor | None


def step_loss(config: Loss, step: StepTensors) -> PolicyLoss:
    """The loss of a step whose noise was everywhere."""
    return policy_loss(
        step.velocity,
        step.sample,
        step.prev_sample,
        step.transition,
        step.advantages,
        step.weights,
        old_mean=step.old_mean,
        reference_velocity=step.reference_velocity,
        step_weights=step.step_weights,
        ratio=config.ratio,
        clip_range=config.clip_range,
        adv_clip=config.adv_clip,
        kl_coef=config.kl_coef,
        guard=config.guard,
    )


def explored_loss(config: Loss, step: StepTensors, explored: Tensor | None) -> PolicyLoss:
    """The loss of a step whose noise reached some of the image tokens only.

    Each sample's density is that of its noised locations, and so is its loss. Its weights are scaled to mean 1 over
    them.

    Args:
        config: options of `star_kernels.policy_loss`.
        step: of b samples with latents (b, C, H, W).
        explored: (b, rows, columns) bool with at least one token of each sample; None or all: `step_loss`.

    Returns:
        PolicyLoss; its statistics are means over the samples, of their own noised locations.
    """
    if explored is None or bool(explored.all()):
        return step_loss(config, step)
    noised = repeat_tokens(explored, step.velocity.shape[-1] // explored.shape[-1]).flatten(1)  # (b, P)
    counts, batch = noised.sum(1), len(noised)
    parts, shares = [], []
    for count in counts.unique().tolist():  # samples with equally many locations make one packed batch
        rows = (counts == count).nonzero().flatten()
        index = noised[rows].nonzero()[:, 1].view(len(rows), count)
        parts.append(step_loss(config, _packed(step, rows, index)))
        shares.append(len(rows) / batch)
    total = sum((share * part.loss for share, part in zip(shares, parts, strict=True)), torch.zeros_like(parts[0].loss))
    seen = torch.stack([part.statistics.values for part in parts])  # (parts, 9)
    mean = (seen * seen.new_tensor(shares)[:, None]).sum(0)
    names = Statistics._fields
    for name, reduced in (("ratio_min", seen.amin(0)), ("ratio_max", seen.amax(0)), ("nonfinite", seen.sum(0))):
        mean[names.index(name)] = reduced[names.index(name)]
    return PolicyLoss(total, Statistics(mean))


def _packed(step: StepTensors, rows: Tensor, index: Tensor) -> StepTensors:
    """Some samples at some locations each, packed. index: (b', L) int64 of the H*W locations."""

    def latents(x: Tensor) -> Tensor:  # (b, C, H, W) -> (b', L, C)
        return x[rows].flatten(2).transpose(1, 2).gather(1, index[..., None].expand(-1, -1, x.shape[1]))

    def locations(x: Tensor) -> Tensor:  # (b, H, W) -> (b', L); one for each sample stays so
        return x[rows].flatten(1).gather(1, index) if x.ndim == 3 else x[rows]

    weights = None if step.weights is None else locations(step.weights)
    if weights is not None:
        mean = weights.mean(1, keepdim=True)
        weights = torch.where(mean > 0, weights / mean, 1.0)
    return StepTensors(
        latents(step.velocity),
        latents(step.sample),
        latents(step.prev_sample),
        step.transition.rows(rows),
        locations(step.advantages),
        weights,
        latents(step.old_mean),
        None if step.reference_velocity is None else latents(step.reference_velocity),
        None if step.step_weights is None else step.step_weights[rows],
    )
