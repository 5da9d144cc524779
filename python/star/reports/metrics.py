"""What a run logs each iteration: the meaning of every name, and the values that need more than a line."""

from __future__ import annotations

import math
import resource
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from star import rewards
from star.objective import uniform_rows
from star.rewards import Scores

# name, or name with a * for what the run decides: meaning. The order is that of the documentation and of the report.
MEANING = {
    "reward": "mean reward of the iteration's images, those with a failed reward left out",
    "reward_std": "standard deviation of these rewards",
    "reward/*": "mean reward of a category of prompts (the embedded world's; the tag in GenEval's files)",
    "reward_failed": "images whose reward raised, timed out or was not a number; they have no advantage",
    "reward_*": "mean of one term of a weighted reward, before its weight, or of a detail that the reward returns",
    "advantage_abs": "mean size of the advantages, before adv_clip",
    "advantage_zero": "share of images (or locations) with an advantage of 0, which have no gradient",
    "concepts_credited": "concepts with a credit, mean over images; a single one moves nothing",
    "concept_shift": "mean size of the concepts' part of a location's advantage, where loss.advantage is concept",
    "explored_share": "share of the image tokens that the trained steps noised, where sampling.explore is set",
    "loss": "the clipped policy loss, near 0 when each image's ratio is near 1; nft, awm: all terms of the loss",
    "ratio_first": "ratio of the first pass, before any update: exactly 1, or the images are of another policy",
    "ratio_mean": "mean ratio of new to old density, over samples (over locations with loss.ratio 'location')",
    "ratio_min": "smallest ratio",
    "ratio_max": "largest ratio",
    "approx_kl": "half the mean squared log-ratio: how far the policy moved within the iteration",
    "clip_fraction": "share of ratios outside the clip range",
    "clip_fraction_low": "share below it",
    "clip_fraction_high": "share above it",
    "kl": "KL term to the model before the run (nft, awm: squared difference), before loss.kl_coef; 0 without one",
    "positive_loss": "loss.objective nft: the term that draws the policy to its good images, before adv_clip / beta",
    "negative_loss": "the term that drives it from its bad ones; both contain the noise that no model can predict",
    "positive_error": "mean absolute error of the positive branch's prediction of the image, without weights",
    "negative_error": "the same of the negative branch",
    "old_deviation": "mean squared difference to the old policy's velocity: how far the policy is ahead of it",
    "old_deviation_max": "the largest one, mean over the passes",
    "matching_error": "loss.objective awm: mean squared error of the velocity; it holds the noise no model can predict",
    "grad_norm": "norm of the gradient before it is cut to optimization.max_grad_norm, mean over the updates",
    "update_norm": "norm of the step that an update took, before it is rescaled, where optimization.update_norm is set",
    "updates_skipped": "updates left out because their gradient was not finite",
    "nonfinite": "locations with a log-ratio (nft: an error) that is not finite, mean over the passes; should be 0",
    "gradient_share": "share of the weights' sum on the tenth of locations with the largest weights; 0.1: flat",
    "weights_max": "largest weight of an image, mean over images and trained steps",
    "weights_concentration": "mean square of an image's weights: 1 if they are flat, k if they are all on 1/k of it",
    "weights_on_object": "mean weight inside the objects that the reward found (masks): 1 if allocation ignores them",
    "weights_uniform": "images and steps whose weights are 1: no usable map, or excluded by noise_window or warmup",
    "memory_gib": "peak memory so far: of the GPU, or of the process where there is none",
    "seconds/rollout": "time to sample and decode the images",
    "seconds/reward": "time spent waiting for their scores, which are computed during the rollout",
    "seconds/update": "time of the passes with gradients and the optimizer",
}


def meaning(name: str) -> str:
    """The documentation of a metric's name; "" for a name that has none."""
    if name in MEANING:
        return MEANING[name]
    return MEANING.get(next(patterns(name), ""), "")


def patterns(name: str) -> Iterator[str]:
    """The names with a * that a metric's name fits, in the order of the documentation."""
    return (pattern for pattern in MEANING if pattern.endswith("*") and name.startswith(pattern[:-1]))


def iteration_metrics(scores: Scores, categories: Sequence[str | None], advantages: Tensor) -> dict[str, float]:
    """Of an iteration's rewards and advantages. categories: (B,) kinds of the images' prompts, None where unknown."""
    return {
        **rewards.means(scores),
        **category_means(scores.reward, categories),
        "advantage_abs": advantages.abs().mean().item(),
        "advantage_zero": (advantages == 0).float().mean().item(),
    }


class UpdateMetrics:
    """Collects what an iteration's passes and optimizer steps say."""

    def __init__(self) -> None:
        self.seen: dict[str, list[Tensor]] = defaultdict(list)
        self.fields: dict[int, list[Tensor]] = defaultdict(list)
        self.norms: list[float] = []
        self.skipped = 0
        self.moves: list[float] = []

    def add_pass(self, k: int, loss: Tensor, statistics: dict[str, Tensor], weights: Tensor | None) -> None:
        """k: which of its samples' passes it is. weights: (b, H, W) of the samples, or None."""
        self.seen["loss"].append(loss.detach())
        for name, value in statistics.items():
            self.seen[name].append(value)
        if weights is not None:
            self.fields[k].append(weights)

    def weights(self) -> Tensor | None:
        """(S, B, H, W) of S passes of every sample, or None."""
        return torch.stack([torch.cat(fields) for fields in self.fields.values()]) if self.fields else None

    def add_step(self, norm: float, skipped: bool, moved: float | None) -> None:
        """norm: of the gradient. moved: of the update, where it is measured."""
        self.norms.append(norm)
        self.skipped += skipped
        self.moves += [] if moved is None else [moved]

    def metrics(self) -> dict[str, float]:
        """Means, but for the smallest and the largest ratio and for the first one."""
        found = {name: torch.stack(values).float().mean().item() for name, values in self.seen.items()}
        if "ratio_mean" in self.seen:
            found["ratio_min"] = torch.stack(self.seen["ratio_min"]).min().item()
            found["ratio_max"] = torch.stack(self.seen["ratio_max"]).max().item()
            # What the rollout's own policy gives: exactly 1 before the first update.
            found["ratio_first"] = self.seen["ratio_mean"][0].item()
        if self.moves:
            found["update_norm"] = sum(self.moves) / len(self.moves)
        return found | {"grad_norm": sum(self.norms) / len(self.norms), "updates_skipped": float(self.skipped)}


def category_means(rewards: Tensor, categories: Sequence[str | None]) -> dict[str, float]:
    """Mean finite reward, (B,), of every category that is known."""
    found = {}
    for category in sorted({c for c in categories if c is not None}):
        own = rewards[torch.tensor([c == category for c in categories])]
        own = own[own.isfinite()]
        found[f"reward/{category}"] = float(own.mean()) if len(own) else math.nan
    return found


def weight_metrics(weights: Tensor, masks: Tensor | None) -> dict[str, float]:
    """Of (S, B, H, W) weights; masks: (B, H', W') in 0..1, of the objects in the images."""
    found = {
        "weights_max": weights.amax((2, 3)).mean().item(),
        "weights_concentration": weights.square().mean().item(),
        "weights_uniform": float(sum(uniform_rows(step) for step in weights)),
        "gradient_share": gradient_share(weights).mean().item(),
    }
    if masks is not None and masks.any():
        masks = F.adaptive_avg_pool2d(masks[:, None], (weights.shape[2], weights.shape[3]))[:, 0].to(
            weights.device
        )  # (B, H, W)
        found["weights_on_object"] = ((weights * masks).sum() / (len(weights) * masks.sum())).item()
    return found


def gradient_share(weights: Tensor) -> Tensor:
    """Share of each image's weights in the tenth of its locations with the highest ones: where the gradient goes.

    A location's part in the gradient is its weight times the size of its noise's error, which on average is the same
    everywhere: this is the share that the weights alone decide.

    weights: (..., H, W), not negative. Returns (...): 0.1 for equal weights, 1 if a tenth of the locations has all of
    them, NaN if they are all 0. Of the location on the edge of the tenth only the part inside counts.
    """
    ordered = weights.flatten(-2).sort(-1, descending=True).values
    size = 0.1 * ordered.shape[-1]
    inside = (size - torch.arange(ordered.shape[-1], device=weights.device)).clamp(0, 1)
    return (ordered * inside).sum(-1) / ordered.sum(-1)


def peak_memory(device: torch.device) -> float:
    """In GiB: of the GPU, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
