"""policy_loss in Triton: two launches for the loss, one for its gradient.

A program of ratios_kernel owns a tile of one sample's locations with all their channels and writes its sums in float64;
statistics_kernel, a single program, adds them in the order of the tiles. gradient_kernel reads the log-ratios of the
first pass. Products are not contracted into fused multiply-adds, so that the mean has the bits of the one that
gaussian_step stored and the ratio of an unchanged policy is exactly 1.
"""

from __future__ import annotations

import math
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.checks import check_reach
from star_kernels.triton.device import architecture, starts_early
from star_kernels.triton.gaussian_step import transition_mean

LOG_RATIO_LIMIT = tl.constexpr(30.0)
TILE = 2048  # elements of a program
MOST_CHANNELS, MOST_LOCATIONS = 64, 512  # of a program at once
WARPS, GRADIENT_WARPS, STATISTICS_WARPS = 4, 8, 8  # without spills on the GPUs of tools/gpu/triton_offline.py
BLOCK_B, BLOCK_T = 16, 64  # samples and tiles that are added up at once
STATISTICS = 9  # in the order of api.Statistics
SUMS = 9  # of a tile; which ones depends on the ratio
# Ratio "location": over its units.
LOSS, SQUARE, LOW, HIGH, EXCESS, LEAST, MOST, NONFINITE, KL = (tl.constexpr(i) for i in range(9))
# The others: the log-ratio, and the weights times the size of the advantages, apart by their signs.
DELTA, UP, DOWN = LOSS, SQUARE, LOW


@triton.jit
def expm1(x):
    """exp(x) - 1 without cancellation near 0."""
    near = tl.where(tl.abs(x) <= 0.5, x, 0.0)
    terms: tl.constexpr = 17 if x.dtype == tl.float64 else 9
    series = near * 0.0 + 1.0
    for i in tl.static_range(terms):
        series = 1.0 + near * series * (1.0 / (terms + 1 - i))
    return tl.where(tl.abs(x) <= 0.5, near * series, tl.exp(x) - 1.0)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def limited_ratio(log_ratio):
    """(limited log-ratio, ratio - 1); NaN for a log-ratio that is not finite."""
    limited = tl.minimum(tl.maximum(log_ratio, -LOG_RATIO_LIMIT), LOG_RATIO_LIMIT)
    limited = tl.where(is_finite(log_ratio), limited, float("nan"))
    return limited, expm1(limited)


@triton.jit
def surrogate(log_ratio, excess, advantage, clip_low, clip_high):
    """(max(-A ratio, -A clip(ratio)), its derivative by the log-ratio)."""
    clipped = tl.minimum(tl.maximum(excess, -clip_low), clip_high)
    plain, bounded = -advantage * (1.0 + excess), -advantage * (1.0 + clipped)
    unknown = plain != plain  # must reach the loss, which a comparison would hide
    value = tl.where(unknown | (plain > bounded), plain, bounded)
    # Where the clipped branch is the larger one the ratio carries no gradient. The edges belong to the inside.
    gate = tl.where(advantage >= 0, excess <= clip_high, excess >= -clip_low) & (tl.abs(log_ratio) <= LOG_RATIO_LIMIT)
    return value, tl.where(gate | unknown, plain, 0.0)


@triton.jit
def advantage_tile(
    advantages, step_weights, precision, kl_precision, row, at, here, adv_clip, EACH: tl.constexpr, GUARD: tl.constexpr
):
    """Advantages as the surrogate takes them, of each location of a tile."""
    if EACH:
        advantage = tl.load(advantages + at, mask=here, other=0.0).to(precision.dtype)
    else:
        advantage = tl.load(advantages + row).to(precision.dtype) + tl.zeros(here.shape, precision.dtype)
    known = advantage == advantage
    advantage = tl.where(known, tl.minimum(tl.maximum(advantage, -adv_clip), adv_clip), advantage)
    if step_weights is not None:
        advantage *= tl.load(step_weights + row).to(precision.dtype)
    if GUARD:
        advantage *= precision / kl_precision
    return advantage


@triton.jit
def ratios_kernel(
    velocity,  # (B, C, P) or packed (B, P, C), contiguous, and what follows
    sample,
    prev_sample,
    old_mean,  # or None
    reference_velocity,  # or None
    a,  # (B,), and what follows
    b,
    s,
    precision,
    log_norm,
    kl_precision,
    fields,  # stride of the six
    advantages,  # (B,) or with EACH_ADVANTAGE (B, P)
    step_weights,  # (B,) or None
    weights,  # (B, P) or None
    old_log_prob,  # (B,), with EACH_OLD (B, P), or None
    log_ratios,  # (B, P) in the type of the arithmetic, for RATIO location
    sums,  # (B, SUMS, tiles) float64
    channels,
    locations,
    stride_b,
    stride_c,
    stride_p,
    clip_low: tl.float64,
    clip_high: tl.float64,
    adv_clip: tl.float64,
    per_channel: tl.float64,  # 1 / channels: a division contracts
    RATIO: tl.constexpr,
    GUARD: tl.constexpr,
    EACH_ADVANTAGE: tl.constexpr,
    EACH_OLD: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,  # statistics_kernel may start, and waits by itself
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    kind: tl.constexpr = log_ratios.dtype.element_ty
    clip_low, clip_high = tl.full((), clip_low, kind), tl.full((), clip_high, kind)
    adv_clip, per_channel = tl.full((), adv_clip, kind), tl.full((), per_channel, kind)
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    here = p < locations
    at = row * locations + p
    field = row * fields
    factor_a, factor_b = tl.load(a + field).to(kind), tl.load(b + field).to(kind)
    factor = tl.load(precision + field).to(kind)
    kl_factor = tl.load(kl_precision + field).to(kind)

    delta = tl.zeros((BLOCK_P,), kind)
    gap = tl.zeros((BLOCK_P,), kind)
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < channels)[:, None] & here[None, :]
        offset = row * stride_b + c[:, None] * stride_c + p[None, :] * stride_p
        v = tl.load(velocity + offset, mask=inside, other=0.0).to(kind)
        x = tl.load(sample + offset, mask=inside, other=0.0).to(kind)
        following = tl.load(prev_sample + offset, mask=inside, other=0.0).to(kind)
        mean = transition_mean(factor_a, x, factor_b, v)
        residual = following - mean
        if old_mean is None:
            term = -residual * residual
        else:
            old = tl.load(old_mean + offset, mask=inside, other=0.0).to(kind)
            if GUARD:
                term = (following - old) * (mean - old)
            else:
                # log p - log p_old without the cancellation of subtracting two squared errors.
                term = (mean - old) * (residual + (following - old))
        delta += tl.sum(term, 0)
        if reference_velocity is not None:
            other = tl.load(reference_velocity + offset, mask=inside, other=0.0).to(kind)
            difference = factor_b * (v - other)
            gap += tl.sum(difference * difference, 0)

    if GUARD:
        delta *= 2.0 * factor * tl.load(s + field).to(kind) * per_channel
    else:
        delta *= factor * per_channel
    if old_mean is None:
        delta -= tl.load(log_norm + field).to(kind)
        if EACH_OLD:
            delta -= tl.load(old_log_prob + at, mask=here, other=0.0).to(kind)
        else:
            delta -= tl.load(old_log_prob + row).to(kind)
    if weights is None:
        weight = tl.full((BLOCK_P,), 1.0, kind)
    else:
        weight = tl.load(weights + at, mask=here, other=0.0).to(kind)
    advantage = advantage_tile(
        advantages, step_weights, factor, kl_factor, row, at, here, adv_clip, EACH_ADVANTAGE, GUARD
    )

    tiles = tl.num_programs(0)
    out = sums + row * SUMS * tiles + tile
    tl.store(out + NONFINITE * tiles, tl.sum(tl.where(here & (is_finite(delta) == 0), 1.0, 0.0).to(tl.float64)))
    if reference_velocity is not None:
        tl.store(out + KL * tiles, tl.sum(gap.to(tl.float64)))
    if RATIO == "location":
        tl.store(log_ratios + at, delta, mask=here)
        limited, excess = limited_ratio(delta)
        value, _ = surrogate(delta, excess, advantage, clip_low, clip_high)
        low, high = excess < -clip_low, excess > clip_high
        tl.store(out + LOSS * tiles, tl.sum(tl.where(here, weight * value, 0.0).to(tl.float64)))
        tl.store(out + SQUARE * tiles, tl.sum(tl.where(here, limited * limited, 0.0).to(tl.float64)))
        tl.store(out + LOW * tiles, tl.sum(tl.where(here & low, 1.0, 0.0).to(tl.float64)))
        tl.store(out + HIGH * tiles, tl.sum(tl.where(here & high, 1.0, 0.0).to(tl.float64)))
        tl.store(out + EXCESS * tiles, tl.sum(tl.where(here, excess, 0.0).to(tl.float64)))
        least, most = tl.where(here, excess, float("inf")), tl.where(here, excess, float("-inf"))
        # The smallest and largest hide a NaN, the sum does not.
        unknown = tl.sum(tl.where(here, excess, 0.0)) * 0.0
        tl.store(out + LEAST * tiles, (tl.min(least) + unknown).to(tl.float64))
        tl.store(out + MOST * tiles, (tl.max(most) + unknown).to(tl.float64))
    else:
        # One ratio for all: the value and the force of an advantage are its size times those of its sign.
        if RATIO == "sample":
            tl.store(out + DELTA * tiles, tl.sum(tl.where(here, weight * delta, 0.0).to(tl.float64)))
            mass = tl.where(here, tl.abs(advantage), 0.0)
        else:
            tl.store(out + DELTA * tiles, tl.sum(tl.where(here, delta, 0.0).to(tl.float64)))
            mass = tl.where(here, weight * tl.abs(advantage), 0.0)
        up = here & (advantage >= 0)
        tl.store(out + UP * tiles, tl.sum(tl.where(up, mass, 0.0).to(tl.float64)))
        tl.store(out + DOWN * tiles, tl.sum(tl.where(up, 0.0, mass).to(tl.float64)))


@triton.jit(do_not_specialize=["batch", "tiles", "channels", "locations"])
def statistics_kernel(
    sums,  # (B, SUMS, tiles) float64
    kl_precision,  # (B,)
    fields,  # its stride
    log_ratios,  # (B,) in the type of the arithmetic, but for RATIO location
    loss,  # () in the type of the arithmetic
    statistics,  # (9,) float32
    batch,
    tiles,
    channels,
    locations,
    clip_low: tl.float64,
    clip_high: tl.float64,
    kl_coef: tl.float64,
    RATIO: tl.constexpr,
    KL_TERM: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
    EARLY: tl.constexpr,  # ratios_kernel may still run
):
    if EARLY:
        tl.extra.cuda.gdc_wait()
    kind: tl.constexpr = loss.dtype.element_ty
    clip_low, clip_high = tl.full((), clip_low, kind), tl.full((), clip_high, kind)
    zero = tl.zeros((), tl.float64)
    loss_sum, square, low, high, excess_sum, nonfinite, kl = zero, zero, zero, zero, zero, zero, zero
    least, most = zero + float("inf"), zero + float("-inf")
    for start in range(0, batch, BLOCK_B):
        row = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        here = row < batch
        # All of a turn's loads wait for memory together, and the sums over its tiles come at the end.
        none = tl.zeros((BLOCK_B, BLOCK_T), tl.float64)
        nonfinite_tiles, gap_tiles = none, none
        loss_tiles, square_tiles, low_tiles, high_tiles, excess_tiles = none, none, none, none, none
        for begin in range(0, tiles, BLOCK_T):
            t = begin + tl.arange(0, BLOCK_T)
            inside = here[:, None] & (t < tiles)[None, :]
            one = sums + row[:, None] * SUMS * tiles + t[None, :]
            nonfinite_tiles += tl.load(one + NONFINITE * tiles, mask=inside, other=0.0)
            if KL_TERM:
                gap_tiles += tl.load(one + KL * tiles, mask=inside, other=0.0)
            loss_tiles += tl.load(one + LOSS * tiles, mask=inside, other=0.0)
            square_tiles += tl.load(one + SQUARE * tiles, mask=inside, other=0.0)
            low_tiles += tl.load(one + LOW * tiles, mask=inside, other=0.0)
            if RATIO == "location":
                high_tiles += tl.load(one + HIGH * tiles, mask=inside, other=0.0)
                excess_tiles += tl.load(one + EXCESS * tiles, mask=inside, other=0.0)
                least = tl.minimum(least, tl.min(tl.load(one + LEAST * tiles, mask=inside, other=float("inf"))))
                most = tl.maximum(most, tl.max(tl.load(one + MOST * tiles, mask=inside, other=float("-inf"))))
        nonfinite += tl.sum(nonfinite_tiles)
        if KL_TERM:
            scale = tl.load(kl_precision + row * fields, mask=here, other=0.0).to(kind).to(tl.float64)
            kl += tl.sum(tl.sum(gap_tiles, 1) * scale)
        if RATIO == "location":
            loss_sum += tl.sum(loss_tiles)
            square += tl.sum(square_tiles)
            low += tl.sum(low_tiles)
            high += tl.sum(high_tiles)
            excess_sum += tl.sum(excess_tiles)
        else:  # these slots are DELTA, UP and DOWN
            log_ratio = (tl.sum(loss_tiles, 1) / locations).to(kind)
            tl.store(log_ratios + row, log_ratio, mask=here)
            limited, excess = limited_ratio(log_ratio)
            one = tl.full((BLOCK_B,), 1.0, kind)
            value_up, _ = surrogate(log_ratio, excess, one, clip_low, clip_high)
            value_down, _ = surrogate(log_ratio, excess, -one, clip_low, clip_high)
            up, down = tl.sum(square_tiles, 1), tl.sum(low_tiles, 1)
            value = up * value_up.to(tl.float64) + down * value_down.to(tl.float64)
            loss_sum += tl.sum(tl.where(here, value, 0.0))
            square += tl.sum(tl.where(here, limited * limited, 0.0).to(tl.float64))
            low += tl.sum(tl.where(here & (excess < -clip_low), 1.0, 0.0).to(tl.float64))
            high += tl.sum(tl.where(here & (excess > clip_high), 1.0, 0.0).to(tl.float64))
            excess_sum += tl.sum(tl.where(here, excess, 0.0).to(tl.float64))
            least = tl.minimum(least, tl.min(tl.where(here, excess, float("inf"))).to(tl.float64))
            most = tl.maximum(most, tl.max(tl.where(here, excess, float("-inf"))).to(tl.float64))
    count = batch.to(tl.float64) * locations
    units = count if RATIO == "location" else batch.to(tl.float64)
    unknown = excess_sum * 0.0  # the smallest and largest hide a NaN, the sum does not
    kl /= count * channels
    loss_sum /= count
    if KL_TERM:
        loss_sum += kl_coef * kl
    tl.store(loss, loss_sum.to(kind))
    tl.store(statistics + 0, (0.5 * square / units).to(tl.float32))
    tl.store(statistics + 1, ((low + high) / units).to(tl.float32))
    tl.store(statistics + 2, (low / units).to(tl.float32))
    tl.store(statistics + 3, (high / units).to(tl.float32))
    tl.store(statistics + 4, (1.0 + excess_sum / units).to(tl.float32))
    tl.store(statistics + 5, (1.0 + least + unknown).to(tl.float32))
    tl.store(statistics + 6, (1.0 + most + unknown).to(tl.float32))
    tl.store(statistics + 7, kl.to(tl.float32))
    tl.store(statistics + 8, nonfinite.to(tl.float32))


@triton.jit
def gradient_kernel(
    gradient,  # (B, C, P) or packed (B, P, C), contiguous, and what follows
    velocity,
    sample,
    prev_sample,
    old_mean,  # or None, with GUARD
    reference_velocity,  # or None
    a,  # (B,), and what follows
    b,
    s,
    precision,
    kl_precision,
    fields,  # stride of the five
    advantages,  # (B,) or with EACH_ADVANTAGE (B, P)
    step_weights,  # (B,) or None
    weights,  # (B, P) or None
    log_ratios,  # (B,), for RATIO location (B, P), in the type of the arithmetic
    grad_loss,  # ()
    channels,
    locations,
    stride_b,
    stride_c,
    stride_p,
    clip_low: tl.float64,
    clip_high: tl.float64,
    adv_clip: tl.float64,
    kl_coef: tl.float64,
    per_element: tl.float64,  # 1 / elements of the batch
    RATIO: tl.constexpr,
    GUARD: tl.constexpr,
    EACH_ADVANTAGE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    kind: tl.constexpr = log_ratios.dtype.element_ty
    clip_low, clip_high = tl.full((), clip_low, kind), tl.full((), clip_high, kind)
    adv_clip, kl_coef = tl.full((), adv_clip, kind), tl.full((), kl_coef, kind)
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    here = p < locations
    at = row * locations + p
    field = row * fields
    factor_a, factor_b = tl.load(a + field).to(kind), tl.load(b + field).to(kind)
    factor, kl_factor = tl.load(precision + field).to(kind), tl.load(kl_precision + field).to(kind)
    outer = tl.load(grad_loss).to(kind) * tl.full((), per_element, kind)
    slope = 2.0 * factor * factor_b * outer
    if GUARD:
        slope *= tl.load(s + field).to(kind)
    if RATIO == "location":
        log_ratio = tl.load(log_ratios + at, mask=here, other=0.0)
    else:
        log_ratio = tl.load(log_ratios + row) + tl.zeros((BLOCK_P,), kind)
    _, excess = limited_ratio(log_ratio)
    advantage = advantage_tile(
        advantages, step_weights, factor, kl_factor, row, at, here, adv_clip, EACH_ADVANTAGE, GUARD
    )
    _, force = surrogate(log_ratio, excess, advantage, clip_low, clip_high)
    if weights is not None:
        force *= tl.load(weights + at, mask=here, other=0.0).to(kind)
    slope = force * slope
    pull = 2.0 * kl_coef * kl_factor * factor_b * factor_b * outer

    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < channels)[:, None] & here[None, :]
        offset = row * stride_b + c[:, None] * stride_c + p[None, :] * stride_p
        following = tl.load(prev_sample + offset, mask=inside, other=0.0).to(kind)
        if GUARD:
            direction = following - tl.load(old_mean + offset, mask=inside, other=0.0).to(kind)
        else:
            v = tl.load(velocity + offset, mask=inside, other=0.0).to(kind)
            x = tl.load(sample + offset, mask=inside, other=0.0).to(kind)
            direction = following - transition_mean(factor_a, x, factor_b, v)
        result = slope[None, :] * direction
        if reference_velocity is not None:
            v = tl.load(velocity + offset, mask=inside, other=0.0).to(kind)
            result += pull * (v - tl.load(reference_velocity + offset, mask=inside, other=0.0).to(kind))
        tl.store(gradient + offset, result.to(gradient.dtype.element_ty), mask=inside)


class Cut(NamedTuple):
    """A batch of latents in memory, and how programs share it."""

    batch: int
    channels: int
    locations: int
    strides: tuple[int, int, int]  # of sample, channel and location
    block_c: int
    block_p: int

    @property
    def grid(self) -> tuple[int, int]:
        return -(-self.locations // self.block_p), self.batch  # triton.cdiv takes the host ten times as long


@cache
def cut(shape: tuple[int, ...]) -> Cut:
    """Of contiguous latents (B, C, H, W), (B, C, T, H, W) or packed (B, L, C)."""
    batch, size = shape[0], math.prod(shape[1:])
    check_reach("velocity", (batch, size), (size, 1))
    channels = shape[2] if len(shape) == 3 else shape[1]
    locations = size // channels
    strides = (size, 1, channels) if len(shape) == 3 else (size, locations, 1)
    block_c = min(MOST_CHANNELS, triton.next_power_of_2(channels))
    return Cut(batch, channels, locations, strides, block_c, min(TILE // block_c, MOST_LOCATIONS))


def alike(*fields: Tensor) -> tuple[list[Tensor], int]:
    """The fields of a transition with one stride for all of them, and this."""
    strides = {field.stride(0) for field in fields}
    return (list(fields), strides.pop()) if len(strides) == 1 else ([field.contiguous() for field in fields], 1)


def dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def launch(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    precision: Tensor,
    log_norm: Tensor,
    kl_precision: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    old_mean: Tensor | None,
    old_log_prob: Tensor | None,
    reference_velocity: Tensor | None,
    step_weights: Tensor | None,
    ratio: str,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    kl_coef: float,
    guard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator star::policy_loss_triton; see reference.policy_loss."""
    kind = torch.float64 if torch.float64 in (velocity.dtype, sample.dtype, prev_sample.dtype) else torch.float32
    one = cut(tuple(velocity.shape))
    tiles, batch = one.grid
    fields, stride = alike(a, b, s, precision, log_norm, kl_precision)
    loss = velocity.new_empty((), dtype=kind)
    statistics = velocity.new_empty((STATISTICS,), dtype=torch.float32)
    units = (batch, one.locations) if ratio == "location" else (batch,)
    log_ratios = velocity.new_empty(units, dtype=kind)
    sums = velocity.new_empty((batch, SUMS, tiles), dtype=torch.float64)
    early = starts_early(architecture(velocity.device))
    options = {"RATIO": ratio, "SUMS": SUMS, "EARLY": early, "enable_fp_fusion": False}
    with torch.cuda.device_of(velocity):
        ratios_kernel[one.grid](
            *dense(velocity, sample, prev_sample, old_mean, reference_velocity),
            *fields,
            stride,
            *dense(advantages, step_weights, weights, old_log_prob),
            log_ratios,
            sums,
            one.channels,
            one.locations,
            *one.strides,
            clip_low,
            clip_high,
            adv_clip,
            1 / one.channels,
            **options,
            num_warps=WARPS,
            GUARD=guard,
            EACH_ADVANTAGE=advantages.ndim > 1,
            EACH_OLD=old_log_prob is not None and old_log_prob.ndim > 1,
            BLOCK_C=one.block_c,
            BLOCK_P=one.block_p,
        )
        statistics_kernel[(1,)](
            sums,
            fields[-1],
            stride,
            log_ratios,
            loss,
            statistics,
            batch,
            tiles,
            one.channels,
            one.locations,
            clip_low,
            clip_high,
            kl_coef,
            **options,
            **({"launch_pdl": True} if early else {}),
            num_warps=STATISTICS_WARPS,
            KL_TERM=reference_velocity is not None,
            BLOCK_B=BLOCK_B,
            BLOCK_T=BLOCK_T,
        )
    return loss, statistics, log_ratios


def launch_gradient(
    grad_loss: Tensor,
    log_ratio: Tensor,
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    precision: Tensor,
    log_norm: Tensor,
    kl_precision: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    old_mean: Tensor | None,
    old_log_prob: Tensor | None,
    reference_velocity: Tensor | None,
    step_weights: Tensor | None,
    ratio: str,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    kl_coef: float,
    guard: bool,
) -> Tensor:
    """The operator star::policy_loss_gradient_triton; see reference.policy_loss_gradient."""
    one = cut(tuple(velocity.shape))
    fields, stride = alike(a, b, s, precision, kl_precision)
    gradient = velocity.new_empty(velocity.shape)
    pulled = reference_velocity if kl_coef != 0 else None
    with torch.cuda.device_of(velocity):
        gradient_kernel[one.grid](
            gradient,
            *dense(velocity, sample, prev_sample, old_mean if guard else None, pulled),
            *fields,
            stride,
            *dense(advantages, step_weights, weights, log_ratio),
            grad_loss,
            one.channels,
            one.locations,
            *one.strides,
            clip_low,
            clip_high,
            adv_clip,
            kl_coef,
            1 / velocity.numel(),
            RATIO=ratio,
            GUARD=guard,
            EACH_ADVANTAGE=advantages.ndim > 1,
            BLOCK_C=one.block_c,
            BLOCK_P=one.block_p,
            num_warps=GRADIENT_WARPS,
            enable_fp_fusion=False,
        )
    return gradient
