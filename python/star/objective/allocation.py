"""Allocation strategies: which latent locations, at which steps, receive the update. Needs torch and star_kernels only.

Every strategy has the same signature, so that a run can be repeated with another one by a flag: attention (STAR), topk
(OmniNFT), uniform (scalar GRPO), shuffled, random, inverted, final_step (controls) and oracle (given masks).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from star_kernels import allocate

REARRANGED = ("shuffled", "random", "inverted")  # controls, made of the weights of the strategy "attention"
STRATEGIES = ("attention", "topk", "uniform", "shuffled", "random", "inverted", "final_step", "oracle")
"""What `Allocation.strategy` may be."""
TEMPORAL = ("none", "noise_level", "concentration")
"""What `temporal_weights` takes."""


@dataclass
class Allocation:
    """How maps become weights. STAR's abstract fixes only `attention`; the other defaults are ours."""

    strategy: Literal["attention", "topk", "uniform", "shuffled", "random", "inverted", "final_step", "oracle"] = (
        "attention"
    )
    """attention: the model's own maps. topk: `factor` on the `share` of tokens with the largest map, 1 elsewhere; mix,
    cap and sharpen do not act. uniform: weight 1 everywhere, scalar GRPO. shuffled: another sample's weights. random: a
    random field with the values and the smoothness of the sample's own weights. inverted: its weights in reverse order,
    low where attention is high. final_step: the maps of the last sampling step at every trained step. oracle: the
    reward's masks."""
    mix: float = 0.5
    """0: uniform. 1: the map alone."""
    cap: float = 4.0
    """Largest value of the relative map before mixing."""
    combine: Literal["mean", "max"] = "mean"
    """How the maps of a prompt's concepts become one."""
    smooth: float = 0.0
    """Standard deviation of the Gaussian that smooths a map, in image tokens; video frames are smoothed one by one."""
    sharpen: float = 1.0
    """Exponent of the relative map."""
    temporal: Literal["none", "noise_level", "concentration"] = "none"
    """Weight of each trained step, mean 1 over them. noise_level: proportional to the step's noise (TempFlow-GRPO).
    concentration: proportional to the mean square of the sample's weights."""
    share: float = 0.4
    """Share of the image tokens that strategy topk raises. Default: OmniNFT's."""
    factor: float = 1.5
    """Factor by which strategy topk raises them. Default: OmniNFT's."""
    noise_window: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest noise level (sigma: 1 is noise, 0 the image) at which maps are used, for weights and for the
    advantages of concepts. At other steps every location has weight 1."""
    warmup: int = 0
    """Number of iterations in which weights move linearly from 1 everywhere to the strategy's, and the advantages of
    concepts from 0."""

    def check(self) -> None:
        """Raise ValueError for a number out of its range; those of `star_kernels.allocate` are checked there."""
        if not 0 < self.share <= 1:
            raise ValueError(f"share: got {self.share}, expected a number above 0 and at most 1")
        if not 0 < self.factor < math.inf:
            raise ValueError(f"factor: got {self.factor}, expected a finite number above 0")
        if not isinstance(self.noise_window, tuple | list) or len(self.noise_window) != 2:
            raise TypeError(f"noise_window: got {self.noise_window!r}, expected two numbers (lowest, highest)")
        low, high = self.noise_window
        if not 0 <= low <= high <= 1:
            raise ValueError(f"noise_window: got {self.noise_window}, expected lowest <= highest, both in 0..1")
        if not isinstance(self.warmup, int | float) or not self.warmup >= 0:
            raise ValueError(f"warmup: got {self.warmup}, expected a number of iterations, at least 0")

    def is_limited(self) -> bool:
        """Whether there are noise levels or iterations at which maps do not count in full."""
        return self.warmup > 0 or tuple(self.noise_window) != (0.0, 1.0)

    def strength(self, sigma: Tensor, iteration: int) -> Tensor:
        """How much maps count, 0..1, like sigma: 0 outside the noise window, growing over the warm-up, 1 after it.

        Args:
            sigma: noise levels.
            iteration: how many there were before this one.
        """
        low, high = self.noise_window
        grown = min(iteration / self.warmup, 1.0) if self.warmup else 1.0
        return torch.where((sigma >= low) & (sigma <= high), sigma.new_full((), grown, dtype=torch.float32), 0.0)


def uniform_rows(weights: Tensor) -> int:
    """Number of samples (of dimension 0) whose weights are exactly 1 everywhere: they had no usable map."""
    return int((weights == 1).flatten(1).all(1).sum())


def captured_steps(strategy: str, trained: Sequence[int], steps: int) -> tuple[int, ...]:
    """The sampling steps, of `steps`, whose maps a strategy needs.

    The trained ones, the last one for all of them, or none."""
    if strategy in ("uniform", "oracle"):
        return ()
    return (steps - 1,) if strategy == "final_step" else tuple(trained)


def allocation_weights(
    allocation: Allocation,
    maps: Tensor | None,
    grid: tuple[int, ...],
    *,
    patch: int = 2,
    groups: Tensor | None = None,
    masks: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor | None:
    """Weights of samples, of one step or of several.

    Args:
        allocation: strategy and its options.
        maps: (B, G, N) concept maps of a step that `captured_steps` names, or (S, B, G, N) of several; may be None for
            "uniform" and "oracle". S and B may be 0, and so are those of the weights.
        grid: (rows, columns) of the image tokens, of a video (frames, rows, columns).
        patch: latent locations per token and side of a frame; 1 for packed latents.
        groups: (B,) int64 prompt of each sample; "shuffled" avoids the sample's own group where it can.
        masks: (B, N) for "oracle": share of each image token that is to be reinforced.
        generator: for "shuffled" and "random". Each of several steps uses a copy of it, so that a sample gets the
            same other sample's weights at every step. None: torch's own, which advances.

    Returns:
        (B, rows * patch, columns * patch) float32 of mean 1, of a video (B, frames, rows * patch, columns * patch) with
        mean 1 over the clip, of several steps with their axis in front; or None for "uniform": the loss then needs no
        weights.

    Raises:
        ValueError: an unknown strategy, or one without what it needs.
    """
    strategy = allocation.strategy
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy: got {strategy!r}, expected one of {list(STRATEGIES)}")
    allocation.check()
    if strategy == "uniform":
        return None
    if strategy == "oracle":
        if masks is None:
            raise ValueError("masks: got None, expected the reward's masks for strategy 'oracle'")
        maps = masks[:, None]
    if maps is None:
        raise ValueError(f"maps: got None, expected maps for strategy {strategy!r}")
    if strategy == "topk":
        top = top_locations(allocation, maps, grid)
        raised = torch.where(top, top.new_full((), allocation.factor, dtype=torch.float32), 1.0)
        return repeat_tokens(raised / raised.mean(tuple(range(-len(grid), 0)), keepdim=True), patch)
    weights = allocate(
        maps,
        grid,
        combine=allocation.combine,
        smooth=allocation.smooth,
        sharpen=allocation.sharpen,
        cap=allocation.cap,
        mix=allocation.mix,
        patch=1 if strategy in REARRANGED else patch,
    )
    if strategy not in REARRANGED:
        return weights
    if not weights.numel():  # nothing to rearrange, which not every Fourier transform takes
        return repeat_tokens(weights, patch)
    if maps.ndim == 3:
        return repeat_tokens(_rearranged(strategy, weights, groups, generator), patch)
    copy = lambda: None if generator is None else generator.clone_state()
    return repeat_tokens(torch.stack([_rearranged(strategy, own, groups, copy()) for own in weights]), patch)


def _rearranged(strategy: str, weights: Tensor, groups: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Weights (B, *grid) of a control that is made of those of the maps."""
    if strategy == "shuffled":
        return weights[permute_across_groups(groups, len(weights), generator)]
    return random_like(weights, generator) if strategy == "random" else invert_ranks(weights)


def repeat_tokens(x: Tensor, patch: int) -> Tensor:
    """(B, [frames,] rows, columns) of image tokens -> (B, [frames,] rows * patch, columns * patch) of their latent
    locations."""
    return x.repeat_interleave(patch, -2).repeat_interleave(patch, -1)


def top_locations(allocation: Allocation, maps: Tensor, grid: tuple[int, ...], share: float | None = None) -> Tensor:
    """The tokens with the largest map of a sample.

    Never more than the share: tokens that tie with the first one beyond it are left out, so that the order of the
    tokens does not decide. A map that is flat, empty or not finite has none.

    Args:
        allocation: how the concepts are combined and smoothed.
        maps: (B, G, N), or (S, B, G, N) of several steps.
        grid: (rows, columns) of the image tokens, of a video (frames, rows, columns).
        share: of the N tokens; None means the allocation's.

    Returns:
        (B, *grid) or (S, B, *grid) bool.
    """
    relative = allocate(
        maps, grid, combine=allocation.combine, smooth=allocation.smooth, cap=math.inf, mix=1.0, patch=1
    )
    values = relative.flatten(-len(grid))
    count = max(1, round((allocation.share if share is None else share) * values.shape[-1]))
    if count == values.shape[-1]:
        return torch.ones_like(relative, dtype=torch.bool)
    beyond = values.sort(-1, descending=True).values[..., count]
    return relative > beyond.view(*beyond.shape, *(1,) * len(grid))


def blend_weights(weights: Tensor, strength: Tensor) -> Tensor:
    """Blend weights w with 1: 1 + strength (w - 1).

    Args:
        weights: (B, [T,] H, W) of mean 1 over each sample, or (S, B, [T,] H, W) of several steps.
        strength: (B,) or (), 0..1, from `Allocation.strength`, of several steps (S,) or (). 0 gives exactly 1, 1 the
            very same weights.

    Returns:
        Like weights, of mean 1 over each sample.
    """
    strength = strength.to(weights).expand(len(weights)).view(-1, *(1,) * (weights.ndim - 1))
    return torch.where(strength == 1, weights, 1 + strength * (weights - 1))


def temporal_weights(temporal: str, noise: Tensor, weights: Tensor | None) -> Tensor | None:
    """Weights of each sample's trained steps.

    noise_level is Norm(sigma_t sqrt(dt)) of TempFlow-GRPO (arXiv 2508.04324, equation 8): without it the gradient of a
    step grows as its noise shrinks. concentration is ours: the mean square of the spatial weights, 1 if they are flat.

    Args:
        temporal: one of TEMPORAL.
        noise: (S, B) standard deviation of the noise of each trained step, `Transition.s`.
        weights: (S, B, H, W) or (S, B, T, H, W) of mean 1, from `allocation_weights`; needed by "concentration".

    Returns:
        (S, B) float32 of mean 1 over the steps, or None for "none": the loss then needs no step weights.

    Raises:
        ValueError: an unknown `temporal`, or "concentration" without weights.
    """
    if temporal not in TEMPORAL:
        raise ValueError(f"temporal: got {temporal!r}, expected one of {list(TEMPORAL)}")
    if temporal == "none":
        return None
    if temporal == "noise_level":
        share = noise.double()
    elif weights is None:
        raise ValueError(
            "weights: got None, expected weights for temporal 'concentration'; strategy 'uniform' has none"
        )
    else:
        share = weights.double().square().mean(tuple(range(2, weights.ndim)))
    return (share / share.mean(0)).float()


def permute_across_groups(groups: Tensor | None, batch: int, generator: torch.Generator | None) -> Tensor:
    """(batch,) int64, a random permutation that gives each sample one of another group, as far as there are enough."""
    order = torch.randperm(batch, generator=generator, device="cpu")
    groups = torch.zeros(batch, dtype=torch.int64, device="cpu") if groups is None else groups.cpu()
    by_group = order[groups[order].argsort(stable=True)]
    # Samples sorted by group and shifted by the largest group's size meet another group, unless that holds over half.
    shift = int(groups.unique(return_counts=True)[1].max()) if len(groups.unique()) > 1 else 1
    source = torch.empty(batch, dtype=torch.int64, device="cpu")
    source[by_group] = by_group.roll(-shift)
    return source


def neighbor_correlation(fields: Tensor) -> Tensor:
    """(B,) correlation of neighbors along the axes of each field (B, *grid): its smoothness. NaN for a constant one."""
    axes = tuple(range(1, fields.ndim))
    x = fields - fields.mean(axes, keepdim=True)
    pairs = [x.narrow(axis, 1, x.shape[axis] - 1) * x.narrow(axis, 0, x.shape[axis] - 1) for axis in axes]
    products = sum(pair.sum(axes) for pair in pairs)
    return products / sum(pair[0].numel() for pair in pairs) / x.square().mean(axes)


def random_like(weights: Tensor, generator: torch.Generator | None, draws: int = 4, halvings: int = 8) -> Tensor:
    """Random fields with exactly the values of `weights` (B, *grid), as smooth as they are, in other locations.

    Gaussian-filtered white noise gets the values by rank. Each field's filter is found by bisection, so that neighbors
    correlate as in its weights; the nearest filter that was tried is kept. Samples with equal weights, as in a group
    whose images differ only after the step, get the same field: otherwise the fields, unlike the weights, would average
    out over the group.
    """
    if weights.ndim == 4 and weights.shape[1] == 1:  # a frame alone is an image
        return random_like(weights[:, 0], generator, draws, halvings)[:, None]
    which = weights.flatten(1).unique(dim=0, return_inverse=True)[1]
    first = torch.full_like(which, len(which)).scatter_reduce(
        0, which, torch.arange(len(which), device=which.device), "amin"
    )
    alike = first[which].cpu()
    grid = weights.shape[1:]
    axes = tuple(range(1, weights.ndim))
    values, target = weights.flatten(1).sort(1).values, neighbor_correlation(weights)
    best, error = weights.clone(), torch.full_like(target, torch.inf)
    # Filtered on twice the size, then cut: noise that is periodic in its own frame would be less smooth across it.
    size = tuple(2 * length for length in grid)
    cpu, drawn_on = torch.device("cpu"), torch.device("cpu") if generator is None else generator.device
    frequency = torch.fft.rfftfreq(size[-1], dtype=torch.float32, device=cpu) ** 2  # whatever the defaults are
    for axis, length in enumerate(reversed(size[:-1]), start=1):
        frequency = torch.fft.fftfreq(length, dtype=torch.float32, device=cpu).view(-1, *(1,) * axis) ** 2 + frequency
    frequency = 2 * torch.pi**2 * frequency.to(weights.device)
    for _ in range(draws):
        noise = torch.randn(len(weights), *size, generator=generator, dtype=torch.float32, device=drawn_on)
        noise = noise[alike.to(drawn_on)].to(weights.device)
        noise = torch.fft.rfftn(noise, dim=axes)
        low, high = torch.zeros_like(target), torch.full_like(target, max(grid) / 2)
        for _ in range(halvings):
            width = (low + high) / 2
            width_squared = width.view(-1, *(1,) * len(grid)) ** 2
            smooth = torch.fft.irfftn(noise * torch.exp(-frequency * width_squared), s=size, dim=axes)
            smooth = smooth[(slice(None), *map(slice, grid))]
            rank = smooth.flatten(1).argsort(dim=1, stable=True).argsort(1)
            field = values.gather(1, rank).view_as(weights)
            found = neighbor_correlation(field)
            distance = (found - target).abs()
            closer = distance < error
            best = torch.where(closer.view(-1, *(1,) * len(grid)), field, best)
            error = torch.where(closer, distance, error)
            low, high = torch.where(found < target, width, low), torch.where(found < target, high, width)
    return best


def invert_ranks(weights: Tensor) -> Tensor:
    """The values of each field of `weights` (B, *grid) in reverse order: the largest where the smallest was."""
    values, order = weights.flatten(1).sort(dim=1, stable=True)
    return torch.empty_like(values).scatter_(1, order, values.flip(1)).view_as(weights)
