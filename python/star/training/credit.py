"""What the update of a rollout reinforces: advantages, and how much each location and each step counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from star.objective import Allocation, allocation_weights
from star.training.distributed import Share
from star.training.rollout import Rollout


@dataclass(frozen=True)
class Credit:
    """Of a rollout of B samples and S passes of the update. advantages: (B,) or (B, H, W). weights: (S, B, H, W) of
    mean 1 over each sample. step_weights: (S, B) of mean 1 over the passes. None stands for 1 everywhere."""

    advantages: Tensor
    weights: Tensor | None
    step_weights: Tensor | None

    def at(self, k: int, rows: Tensor) -> Credit:
        """The same of some samples in the k-th pass: without the axis of the passes."""
        weights, step_weights = (None if x is None else x[k, rows] for x in (self.weights, self.step_weights))
        return Credit(self.advantages[rows], weights, step_weights)


class Pass(NamedTuple):
    """What a pass of the update computes for b samples. loss: (), with a gradient. statistics: () each, by the name of
    their metric. weights: (b, H, W) of mean 1 over each sample, or None for 1 everywhere."""

    loss: Tensor
    statistics: dict[str, Tensor]
    weights: Tensor | None


def token_masks(masks: Tensor | None, grid: tuple[int, int], device: torch.device) -> Tensor | None:
    """(B, height, width) masks in 0..1 -> (B, N) the share of each image token that they fill."""
    if masks is None:
        return None
    return F.adaptive_avg_pool2d(masks[:, None], grid).flatten(1).to(device)


def rollout_weights(
    allocation: Allocation,
    rollout: Rollout,
    masks: Tensor | None,
    generator: torch.Generator,
    *,
    share: Share,
    groups: Tensor,
    patch: int,
) -> Tensor | None:
    """Allocate the update of a rollout.

    Args:
        masks: (b, height, width) in 0..1 of this process' images, for the strategy "oracle".
        share: this process' part of the iteration's images; the controls look beyond it.
        groups: (B,) int64 of all the iteration's images.
        patch: latent locations per image token and side.

    Returns:
        (S, b, H, W) float32 of mean 1 over each sample, or None if the weights are uniform.
    """
    masks = token_masks(masks, rollout.grid, rollout.latents.device)
    # Every step starts from the same state: who gets whose weights does not change from step to step.
    seed = int(torch.randint(2**62, (), generator=generator))
    everyone = allocation.strategy in ("shuffled", "random")
    per_step: list[Tensor] = []
    for k in range(len(rollout.steps.trained)):
        maps = None if rollout.maps is None else rollout.maps[min(k, len(rollout.maps) - 1)]
        weights = allocation_weights(
            allocation,
            share.gather(maps) if everyone and maps is not None else maps,
            rollout.grid,
            patch=patch,
            groups=groups if everyone else rollout.groups,
            masks=masks,
            generator=torch.Generator().manual_seed(seed),
        )
        if weights is None:
            return None
        per_step.append(weights[share.rows] if everyone else weights)
    return torch.stack(per_step)
