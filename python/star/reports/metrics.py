"""What a run logs each iteration: the meaning of every name, and the values that need more than a line."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

# name, or name with a * for what the run decides: meaning. The order is that of the documentation and of the report.
MEANING = {
    "reward": "mean reward of the iteration's pictures, those with a failed reward left out",
    "reward_std": "standard deviation of these rewards",
    "reward/*": "mean reward of a category of prompts (the embedded world's; the tag in GenEval's files)",
    "reward_failed": "pictures whose reward raised, timed out or was not a number; they have no advantage",
    "reward_*": "mean of one term of a weighted reward, before its weight, or of what else the reward told",
    "advantage_abs": "mean size of the advantages, before adv_clip",
    "advantage_zero": "share of pictures (or places) with an advantage of 0, which teach nothing",
    "loss": "the clipped policy loss; near 0 when each picture's ratio is near 1",
    "ratio_first": "ratio of the first pass, before any update: exactly 1, or the rollout is not what is trained on",
    "ratio_mean": "mean ratio of new to old density, over samples (over locations with loss.ratio 'location')",
    "ratio_min": "smallest ratio",
    "ratio_max": "largest ratio",
    "approx_kl": "half the mean squared log-ratio: how far the policy moved within the iteration",
    "clip_fraction": "share of ratios outside the clip range",
    "clip_fraction_low": "share below it",
    "clip_fraction_high": "share above it",
    "kl": "KL term to the model without its adapter, before loss.kl_coef; 0 without one",
    "grad_norm": "norm of the gradient before it is cut to optimization.max_grad_norm, mean over the updates",
    "update_norm": "norm of the step that an update took, before it is rescaled, where optimization.update_norm is set",
    "updates_skipped": "updates left out because their gradient was not finite",
    "nonfinite": "locations with a log-ratio that is not finite, mean over the passes; should be 0",
    "gradient_share": "share of the gradient's size in the tenth of the places with the highest weights; 0.1: uniform",
    "weights_max": "largest weight of a picture, mean over pictures and trained steps",
    "weights_concentration": "mean square of a picture's weights: 1 if they are flat, k if they are all on 1/k of it",
    "weights_on_object": "mean weight inside the objects that the reward found (masks): 1 if allocation ignores them",
    "weights_uniform": "pictures and steps without a usable map, whose weights are 1",
    "memory_gib": "peak memory so far: of the GPU, or of the process where there is none",
    "seconds/rollout": "time to sample and decode the pictures",
    "seconds/reward": "time to wait for their scores, which are made meanwhile",
    "seconds/update": "time of the passes with gradients and the optimizer",
}


def meaning(name: str) -> str:
    """The documentation of a metric's name; "" for a name that has none."""
    if name in MEANING:
        return MEANING[name]
    wild = (pattern for pattern in MEANING if pattern.endswith("*") and name.startswith(pattern[:-1]))
    return MEANING.get(next(wild, ""), "")


def by_category(rewards: Tensor, categories: Sequence[str | None]) -> dict[str, float]:
    """Mean finite reward, (B,), of every category that is known."""
    found = {}
    for category in sorted({c for c in categories if c is not None}):
        own = rewards[torch.tensor([c == category for c in categories])]
        own = own[own.isfinite()]
        found[f"reward/{category}"] = float(own.mean()) if len(own) else math.nan
    return found


def of_weights(weights: Tensor, masks: Tensor | None) -> dict[str, float]:
    """What (S, B, H, W) weights look like; masks: (B, H', W') in 0..1, of the objects in the pictures."""
    found = {
        "weights_max": weights.amax((2, 3)).mean().item(),
        "weights_concentration": weights.square().mean().item(),
    }
    if masks is not None and masks.any():
        masks = F.adaptive_avg_pool2d(masks[:, None], weights.shape[2:])[:, 0].to(weights.device)  # (B, H, W)
        found["weights_on_object"] = ((weights * masks).sum() / (len(weights) * masks.sum())).item()
    return found


def peak_memory(device: torch.device) -> float:
    """In GiB: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
