"""What the update of a rollout reinforces: advantages, and how much each location and each step counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from star.config import Config
from star.objective import (
    Allocation,
    allocation_weights,
    blend_weights,
    captured_steps,
    other_concepts,
    route_advantages,
)
from star.rewards import Scores
from star.training.distributed import Share
from star.training.rollout import Rollout


@dataclass(frozen=True)
class Credit:
    """What the S passes of an update reinforce in a rollout of B samples. advantages: (B,) or (B, H, W). weights:
    (S, B, H, W) of mean 1 over each sample, step_weights: (S, B) of mean 1 over the passes; None stands for 1
    everywhere. concepts: (B, G) advantages of the prompts' concepts, or None; `located` adds each one where its map
    looks. swapped: where another concept's map looks, a control."""

    advantages: Tensor
    weights: Tensor | None
    step_weights: Tensor | None
    concepts: Tensor | None = None
    swapped: bool = False

    def at(self, k: int, rows: Tensor) -> Credit:
        """The credit of some samples in the k-th pass, without the axis of the passes."""
        weights, step_weights = (None if x is None else x[k, rows] for x in (self.weights, self.step_weights))
        concepts = None if self.concepts is None else self.concepts[rows]
        return Credit(self.advantages[rows], weights, step_weights, concepts, self.swapped)

    def located(self, maps: Tensor | None, grid: tuple[int, int], patch: int, strength: Tensor) -> Tensor:
        """The advantages of a pass, (B,) or (B, H, W), with those of the concepts where its maps (B, G, N) look.
        strength: () or (B,), how much maps count in the pass."""
        if self.concepts is None:
            return self.advantages
        assert maps is not None  # a run with advantages of concepts reads the maps of every pass
        if self.swapped:
            maps = other_concepts(maps)
        return route_advantages(self.advantages, self.concepts, maps, grid, strength=strength, patch=patch)


def concept_metrics(credit: Credit, located: Tensor) -> dict[str, Tensor]:
    """Metrics of the concepts' advantages in a pass, {} where there are none. located: from `Credit.located`."""
    if credit.concepts is None:
        return {}
    return {"concept_shift": (located - credit.advantages.view(-1, 1, 1)).abs().mean()}


def steps_with_maps(config: Config, trained: Sequence[int]) -> tuple[int, ...]:
    """The sampling steps whose maps a run reads: those that its weights, its advantages or its noise follow."""
    steps = set(captured_steps(config.allocation.strategy, trained, config.sampling.steps))
    if config.loss.advantage == "concept" or config.sampling.explore == "maps":
        steps |= set(trained)
    return tuple(sorted(steps))


class Pass(NamedTuple):
    """What a pass of the update computes for b samples. loss: (), with a gradient. statistics: () each, by the name of
    their metric. weights: (b, H, W) of mean 1 over each sample, or None for 1 everywhere."""

    loss: Tensor
    statistics: dict[str, Tensor]
    weights: Tensor | None


def masks_or_nothing(scores: Scores, grid: tuple[int, int]) -> Tensor | None:
    """The reward's masks (B, height, width), or None if it has none. They are empty if it failed for every image."""
    if scores.masks is None and not scores.reward.isfinite().any():
        return torch.zeros(len(scores.reward), *grid)
    return scores.masks


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
    iteration: int,
) -> Tensor | None:
    """Allocate the update of a rollout.

    Args:
        masks: (b, height, width) in 0..1 of this process' images, for the strategy "oracle".
        share: this process' part of the iteration's images; the controls look beyond it.
        groups: (B,) int64 of all the iteration's images.
        patch: latent locations per image token and side.
        iteration: of the run, for the warm-up.

    Returns:
        (S, b, H, W) float32 of mean 1 over each sample, or None if the weights are uniform.
    """
    trained = rollout.steps.trained
    strength = allocation.strength(rollout.steps.sigmas[list(trained)], iteration)  # (S,)
    seed = int(torch.randint(2**62, (), generator=generator))
    if not strength.any():
        return None
    maps = rollout.maps_of(captured_steps(allocation.strategy, trained, len(rollout.steps.timesteps)))
    everyone = allocation.strategy in ("shuffled", "random")
    if everyone and maps is not None:
        maps = share.gather(maps.transpose(0, 1)).transpose(0, 1)
    weights = allocation_weights(
        allocation,
        maps,
        rollout.grid,
        patch=patch,
        groups=groups if everyone else rollout.groups,
        masks=token_masks(masks, rollout.grid, rollout.latents.device),
        generator=torch.Generator().manual_seed(seed),
    )
    if weights is None:
        return None
    if everyone:
        weights = weights[:, share.rows]
    # One for all of them: the last step's of the strategy "final_step", those of the masks.
    return blend_weights(weights.expand(len(trained), *weights.shape[-3:]), strength)
