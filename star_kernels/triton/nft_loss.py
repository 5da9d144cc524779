"""nft_loss in Triton: two launches for the loss, one for its gradient.

A program of sums_kernel owns a tile of one sample's locations with all their channels and writes its sums in float64;
statistics_kernel, a single program, adds them in the order of the tiles. gradient_kernel reads the errors' sizes, which
need the whole sample, and makes the errors again.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.triton.policy_loss import cut, dense, is_finite

WARPS = 8  # of each kernel: half as many would take more than 128 registers for the sums
BLOCK_B, BLOCK_T = 16, 64  # samples and tiles that are added up at once
STATISTICS = 8  # in the order of api.NFTStatistics
SUMS = 8  # of a tile
POSITIVE, NEGATIVE, POSITIVE_ERROR, NEGATIVE_ERROR, DEVIATION, LARGEST, KL, NONFINITE = (
    tl.constexpr(i) for i in range(8)
)


@triton.jit
def location_tile(weights, reward_prob, row, at, here, kind: tl.constexpr, EACH: tl.constexpr):
    """(weight, probability) of each location of a tile."""
    if weights is None:
        weight = tl.full(here.shape, 1.0, kind)
    else:
        weight = tl.load(weights + at, mask=here, other=0.0).to(kind)
    if EACH:
        probability = tl.load(reward_prob + at, mask=here, other=0.0).to(kind)
    else:
        probability = tl.load(reward_prob + row).to(kind) + tl.zeros(here.shape, kind)
    return weight, probability


@triton.jit
def error_tile(velocity, old_velocity, sample, clean, offset, inside, sigma, sigma_beta):
    """(velocity, its deviation from the old one, error of the positive branch, of the negative one)."""
    kind: tl.constexpr = sigma.dtype
    v = tl.load(velocity + offset, mask=inside, other=0.0).to(kind)
    old = tl.load(old_velocity + offset, mask=inside, other=0.0).to(kind)
    x = tl.load(sample + offset, mask=inside, other=0.0).to(kind)
    x0 = tl.load(clean + offset, mask=inside, other=0.0).to(kind)
    deviation = v - old
    error, moved = x - sigma * old - x0, sigma_beta * deviation
    return v, deviation, error - moved, error + moved


@triton.jit
def branch_size(error, adaptive_min, ADAPTIVE: tl.constexpr):
    """What a branch's squared error is divided by."""
    if ADAPTIVE:
        return tl.where(error < adaptive_min, adaptive_min, error)  # a NaN stays
    else:  # a branch that is compiled away has no other place
        return tl.full(error.shape, 1.0, error.dtype)


@triton.jit
def sums_kernel(
    velocity,  # (B, C, P) or packed (B, P, C), contiguous, and what follows
    old_velocity,
    sample,
    clean,
    reference_velocity,  # or None
    sigma,  # (B,)
    reward_prob,  # (B,) or with EACH_REWARD (B, P)
    weights,  # (B, P) or None
    errors,  # (B, 2), for its type, which is that of the arithmetic
    sums,  # (B, SUMS, tiles) float64
    channels,
    locations,
    stride_b,
    stride_c,
    stride_p,
    beta: tl.float64,
    EACH_REWARD: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    kind: tl.constexpr = errors.dtype.element_ty
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    p = tile * BLOCK_P + tl.arange(0, BLOCK_P)
    here = p < locations
    at = row * locations + p
    level = tl.load(sigma + row).to(kind)
    level_beta = level * tl.full((), beta, kind)
    weight, probability = location_tile(weights, reward_prob, row, at, here, kind, EACH_REWARD)

    zero = tl.zeros((BLOCK_P,), kind)
    up, down, up_error, down_error, square, largest, gap = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < channels)[:, None] & here[None, :]
        offset = row * stride_b + c[:, None] * stride_c + p[None, :] * stride_p
        v, deviation, positive, negative = error_tile(
            velocity, old_velocity, sample, clean, offset, inside, level, level_beta
        )
        up += tl.sum(positive * positive, 0)
        down += tl.sum(negative * negative, 0)
        up_error += tl.sum(tl.abs(positive), 0)
        down_error += tl.sum(tl.abs(negative), 0)
        square += tl.sum(deviation * deviation, 0)
        largest = tl.maximum(largest, tl.max(deviation * deviation, 0))
        if reference_velocity is not None:
            difference = v - tl.load(reference_velocity + offset, mask=inside, other=0.0).to(kind)
            gap += tl.sum(difference * difference, 0)

    tiles = tl.num_programs(0)
    out = sums + row * SUMS * tiles + tile
    total = tl.sum(square.to(tl.float64))
    nonfinite = is_finite(up_error + down_error) == 0
    tl.store(out + POSITIVE * tiles, tl.sum(tl.where(here, weight * probability * up, 0.0).to(tl.float64)))
    tl.store(out + NEGATIVE * tiles, tl.sum(tl.where(here, weight * (1.0 - probability) * down, 0.0).to(tl.float64)))
    tl.store(out + POSITIVE_ERROR * tiles, tl.sum(up_error.to(tl.float64)))
    tl.store(out + NEGATIVE_ERROR * tiles, tl.sum(down_error.to(tl.float64)))
    tl.store(out + DEVIATION * tiles, total)
    # The largest hides a NaN, the sum does not; nor may it make one of an infinity.
    tl.store(out + LARGEST * tiles, tl.where(total == total, tl.max(largest).to(tl.float64), total))
    if reference_velocity is not None:
        tl.store(out + KL * tiles, tl.sum(gap.to(tl.float64)))
    tl.store(out + NONFINITE * tiles, tl.sum(tl.where(here & nonfinite, 1.0, 0.0).to(tl.float64)))


@triton.jit
def sum_of_tiles(sums, row, here, tiles, WHICH: tl.constexpr, SUMS: tl.constexpr, BLOCK_T: tl.constexpr):
    """(BLOCK_B,) sums over a sample's tiles."""
    total = tl.zeros(row.shape, tl.float64)
    for start in range(0, tiles, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        one = sums + (row[:, None] * SUMS + WHICH) * tiles + t[None, :]
        total += tl.sum(tl.load(one, mask=here[:, None] & (t < tiles)[None, :], other=0.0), 1)
    return total


@triton.jit(do_not_specialize=["batch", "tiles", "channels", "locations"])
def statistics_kernel(
    sums,  # (B, SUMS, tiles) float64
    errors,  # (B, 2) in the type of the arithmetic
    loss,  # () in the type of the arithmetic
    statistics,  # (8,) float32
    batch,
    tiles,
    channels,
    locations,
    adaptive_min: tl.float64,
    loss_scale: tl.float64,
    kl_coef: tl.float64,
    ADAPTIVE: tl.constexpr,
    KL_TERM: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    kind: tl.constexpr = errors.dtype.element_ty
    adaptive_min = tl.full((), adaptive_min, kind)
    elements = channels.to(tl.float64) * locations
    zero = tl.zeros((), tl.float64)
    positive, negative, up_error, down_error, square, largest, kl, nonfinite = (
        zero, zero, zero, zero, zero, zero, zero, zero
    )  # fmt: skip
    for start in range(0, batch, BLOCK_B):
        row = (start + tl.arange(0, BLOCK_B)).to(tl.int64)
        here = row < batch
        up = (sum_of_tiles(sums, row, here, tiles, POSITIVE_ERROR, SUMS, BLOCK_T) / elements).to(kind)
        down = (sum_of_tiles(sums, row, here, tiles, NEGATIVE_ERROR, SUMS, BLOCK_T) / elements).to(kind)
        tl.store(errors + 2 * row, up, mask=here)
        tl.store(errors + 2 * row + 1, down, mask=here)
        up_error += tl.sum(up.to(tl.float64))
        down_error += tl.sum(down.to(tl.float64))
        up_size = branch_size(up, adaptive_min, ADAPTIVE).to(tl.float64)
        down_size = branch_size(down, adaptive_min, ADAPTIVE).to(tl.float64)
        positive += tl.sum(sum_of_tiles(sums, row, here, tiles, POSITIVE, SUMS, BLOCK_T) / up_size)
        negative += tl.sum(sum_of_tiles(sums, row, here, tiles, NEGATIVE, SUMS, BLOCK_T) / down_size)
        square += tl.sum(sum_of_tiles(sums, row, here, tiles, DEVIATION, SUMS, BLOCK_T))
        nonfinite += tl.sum(sum_of_tiles(sums, row, here, tiles, NONFINITE, SUMS, BLOCK_T))
        if KL_TERM:
            kl += tl.sum(sum_of_tiles(sums, row, here, tiles, KL, SUMS, BLOCK_T))
        for begin in range(0, tiles, BLOCK_T):
            t = begin + tl.arange(0, BLOCK_T)
            inside = here[:, None] & (t < tiles)[None, :]
            one = sums + (row[:, None] * SUMS + LARGEST) * tiles + t[None, :]
            largest = tl.maximum(largest, tl.max(tl.load(one, mask=inside, other=0.0)))
    count = batch.to(tl.float64)
    positive, negative = positive / (count * elements), negative / (count * elements)
    kl /= count * elements
    total = loss_scale * (positive + negative)
    if KL_TERM:
        total += kl_coef * kl
    tl.store(loss, total.to(kind))
    tl.store(statistics + 0, positive.to(tl.float32))
    tl.store(statistics + 1, negative.to(tl.float32))
    tl.store(statistics + 2, (up_error / count).to(tl.float32))
    tl.store(statistics + 3, (down_error / count).to(tl.float32))
    tl.store(statistics + 4, (square / (count * elements)).to(tl.float32))
    tl.store(statistics + 5, tl.where(square == square, largest, square).to(tl.float32))
    tl.store(statistics + 6, kl.to(tl.float32))
    tl.store(statistics + 7, nonfinite.to(tl.float32))


@triton.jit
def gradient_kernel(
    gradient,  # (B, C, P) or packed (B, P, C), contiguous, and what follows
    velocity,
    old_velocity,
    sample,
    clean,
    reference_velocity,  # or None
    sigma,  # (B,)
    reward_prob,  # (B,) or with EACH_REWARD (B, P)
    weights,  # (B, P) or None
    errors,  # (B, 2) in the type of the arithmetic
    grad_loss,  # ()
    channels,
    locations,
    stride_b,
    stride_c,
    stride_p,
    beta: tl.float64,
    adaptive_min: tl.float64,
    share: tl.float64,  # 2 adv_clip / elements of the batch
    pull: tl.float64,  # 2 kl_coef / elements of the batch
    ADAPTIVE: tl.constexpr,
    EACH_REWARD: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    kind: tl.constexpr = errors.dtype.element_ty
    row = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)
    here = p < locations
    at = row * locations + p
    level, outer = tl.load(sigma + row).to(kind), tl.load(grad_loss).to(kind)
    level_beta = level * tl.full((), beta, kind)
    share, pull = tl.full((), share, kind) * level * outer, tl.full((), pull, kind) * outer
    least = tl.full((), adaptive_min, kind)
    weight, probability = location_tile(weights, reward_prob, row, at, here, kind, EACH_REWARD)
    up = weight * probability / branch_size(tl.load(errors + 2 * row), least, ADAPTIVE)
    down = weight * (1.0 - probability) / branch_size(tl.load(errors + 2 * row + 1), least, ADAPTIVE)

    for start in range(0, channels, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        inside = (c < channels)[:, None] & here[None, :]
        offset = row * stride_b + c[:, None] * stride_c + p[None, :] * stride_p
        v, _, positive, negative = error_tile(velocity, old_velocity, sample, clean, offset, inside, level, level_beta)
        result = share * (down[None, :] * negative - up[None, :] * positive)
        if reference_velocity is not None:
            result += pull * (v - tl.load(reference_velocity + offset, mask=inside, other=0.0).to(kind))
        tl.store(gradient + offset, result.to(gradient.dtype.element_ty), mask=inside)


def launch(
    velocity: Tensor,
    old_velocity: Tensor,
    sample: Tensor,
    clean: Tensor,
    sigma: Tensor,
    reward_prob: Tensor,
    weights: Tensor | None,
    reference_velocity: Tensor | None,
    beta: float,
    adaptive: bool,
    adaptive_min: float,
    adv_clip: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator star::nft_loss_triton; see reference.nft_loss."""
    kind = torch.float64 if torch.float64 in (velocity.dtype, sample.dtype, clean.dtype) else torch.float32
    one = cut(tuple(velocity.shape))
    tiles, batch = one.grid
    loss = velocity.new_empty((), dtype=kind)
    statistics = velocity.new_empty((STATISTICS,), dtype=torch.float32)
    errors = velocity.new_empty((batch, 2), dtype=kind)
    sums = velocity.new_empty((batch, SUMS, tiles), dtype=torch.float64)
    with torch.cuda.device_of(velocity):
        sums_kernel[one.grid](
            *dense(velocity, old_velocity, sample, clean, reference_velocity, sigma, reward_prob, weights),
            errors,
            sums,
            one.channels,
            one.locations,
            *one.strides,
            beta,
            EACH_REWARD=reward_prob.ndim > 1,
            SUMS=SUMS,
            BLOCK_C=one.block_c,
            BLOCK_P=one.block_p,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
        statistics_kernel[(1,)](
            sums,
            errors,
            loss,
            statistics,
            batch,
            tiles,
            one.channels,
            one.locations,
            adaptive_min,
            adv_clip / beta,
            kl_coef,
            ADAPTIVE=adaptive,
            KL_TERM=reference_velocity is not None,
            SUMS=SUMS,
            BLOCK_B=BLOCK_B,
            BLOCK_T=BLOCK_T,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return loss, statistics, errors


def launch_gradient(
    grad_loss: Tensor,
    errors: Tensor,
    velocity: Tensor,
    old_velocity: Tensor,
    sample: Tensor,
    clean: Tensor,
    sigma: Tensor,
    reward_prob: Tensor,
    weights: Tensor | None,
    reference_velocity: Tensor | None,
    beta: float,
    adaptive: bool,
    adaptive_min: float,
    adv_clip: float,
    kl_coef: float,
) -> Tensor:
    """The operator star::nft_loss_gradient_triton; see reference.nft_loss_gradient."""
    one = cut(tuple(velocity.shape))
    gradient = velocity.new_empty(velocity.shape)
    elements = velocity.numel()
    with torch.cuda.device_of(velocity):
        gradient_kernel[one.grid](
            gradient,
            *dense(velocity, old_velocity, sample, clean, reference_velocity, sigma, reward_prob, weights, errors),
            grad_loss,
            one.channels,
            one.locations,
            *one.strides,
            beta,
            adaptive_min,
            2 * adv_clip / elements,
            2 * kl_coef / elements,
            ADAPTIVE=adaptive,
            EACH_REWARD=reward_prob.ndim > 1,
            BLOCK_C=one.block_c,
            BLOCK_P=one.block_p,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return gradient
