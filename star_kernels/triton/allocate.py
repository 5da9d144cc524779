"""allocate in Triton: one launch, one program per sample.

A sample's field is a few thousand tokens, which the program takes BLOCK at a time. Between its passes the field is in a
workspace that never leaves the cache, and a barrier makes it visible to every thread.
"""

from __future__ import annotations

import math
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.checks import check_reach

MOST_TOKENS = 4096  # in registers at once
SHIFT = tl.constexpr(2.0**64)  # keeps the inverse of a mean, near the limits of float32, from losing bits
TOKENS_OF_WARP = 256  # every thread has tokens of its own, 8 of them


@triton.jit
def smooth_axis(source, to, tokens, size, step, sigma, radius, BLOCK: tl.constexpr):
    """to = weighted mean of the neighbors of source (tokens,) along an axis of `size` tokens that lie `step` apart."""
    kind: tl.constexpr = source.dtype.element_ty
    radius = min(radius, size - 1)
    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        location = i // step % size
        total = tl.zeros((BLOCK,), kind)
        norm = tl.zeros((BLOCK,), kind)
        for neighbor in range(2 * radius + 1):
            distance = neighbor - radius
            inside = (i < tokens) & (location + distance >= 0) & (location + distance < size)
            scaled = distance.to(kind) / sigma
            tap = tl.exp(-0.5 * scaled * scaled)
            total += tap * tl.load(source + i + distance * step, mask=inside, other=0.0)
            norm += tl.where(inside, tap, 0.0)
        tl.store(to + i, total / tl.where(i < tokens, norm, 1.0), mask=i < tokens)
    tl.debug_barrier()


@triton.jit
def mixed(field, scale, cap, mix, rest):
    """Weights before they are brought to mean 1. scale: what brings the field to it. rest: 1 - mix."""
    return rest + mix * tl.minimum(field * scale, cap)


@triton.jit(do_not_specialize=["concepts", "tokens", "rows", "columns", "radius", "patch"])
def allocate_kernel(
    maps,  # (B, G, N), any strides
    workspace,  # (B, G + 2 N) in the type of the arithmetic, float32 or float64
    weights,  # (B, tokens // columns * patch, columns * patch) in the same type
    maps_b,
    maps_g,
    maps_n,
    concepts,
    tokens,  # of all frames
    rows,  # of a frame
    columns,
    patch,
    radius,  # of the smoothing
    sigma: tl.float64,
    sharpen: tl.float64,
    cap: tl.float64,
    mix: tl.float64,
    LARGEST: tl.constexpr,  # combine: the largest of the concepts instead of their mean
    SMOOTH: tl.constexpr,  # sigma > 0
    SHARPEN: tl.constexpr,  # sharpen != 1
    BLOCK: tl.constexpr,
):
    kind: tl.constexpr = weights.dtype.element_ty
    sigma, sharpen = tl.full((), sigma, kind), tl.full((), sharpen, kind)
    rest, mix, cap = tl.full((), 1.0 - mix, kind), tl.full((), mix, kind), tl.full((), cap, kind)
    row = tl.program_id(0).to(tl.int64)
    maps += row * maps_b
    means = workspace + row * (concepts + 2 * tokens)
    field = means + concepts
    other = field + tokens

    unusable = 0
    present = 0
    for concept in range(concepts):
        mass_sum = tl.zeros((), tl.float64)
        for start in range(0, tokens, BLOCK):
            i = start + tl.arange(0, BLOCK)
            mass = tl.load(maps + concept * maps_g + i * maps_n, mask=i < tokens, other=0.0).to(kind)
            usable = (mass >= 0) & (mass < float("inf"))
            unusable += tl.sum(tl.where(usable, 0, 1))
            mass_sum += tl.sum(tl.where(usable, mass, 0.0).to(tl.float64))
        mean = (mass_sum / tokens).to(kind)
        unusable += tl.where(mean < float("inf"), 0, 1)
        present += tl.where(mean > 0, 1, 0)
        tl.store(means + concept, mean)
    healthy = (unusable == 0) & (present > 0)
    tl.debug_barrier()

    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        combined = tl.zeros((BLOCK,), kind)
        for concept in range(concepts):
            mean = tl.load(means + concept)
            there = healthy & (mean > 0)  # a map without mass is a concept that is not there
            shift = tl.where(mean > 1, 1 / SHIFT, SHIFT).to(kind)
            scale = 1.0 / tl.where(there, mean * shift, 1.0)
            count = tl.where(there, tokens, 0)  # a mask of vectors alone: Triton 3.9 interprets no other
            mass = tl.load(maps + concept * maps_g + i * maps_n, mask=i < count, other=0.0).to(kind)
            relative = mass * shift * scale
            if LARGEST:
                combined = tl.maximum(combined, relative)
            else:
                combined += relative
        if not LARGEST:
            combined /= tl.maximum(present, 1).to(kind)
        tl.store(field + i, combined, mask=i < tokens)
    tl.debug_barrier()

    if SMOOTH:
        smooth_axis(field, other, tokens, rows, columns, sigma, radius, BLOCK)
        smooth_axis(other, field, tokens, columns, 1, sigma, radius, BLOCK)
    if SHARPEN:
        most = tl.zeros((), kind)
        for start in range(0, tokens, BLOCK):
            i = start + tl.arange(0, BLOCK)
            most = tl.maximum(most, tl.max(tl.load(field + i, mask=i < tokens, other=0.0)))
        scale = 1.0 / tl.where(most > 0, most, 1.0)
        for start in range(0, tokens, BLOCK):
            i = start + tl.arange(0, BLOCK)
            base = tl.minimum(tl.load(field + i, mask=i < tokens, other=0.0) * scale, 1.0)
            power = tl.exp2(sharpen * tl.log2(tl.where(base > 0, base, 1.0)))
            tl.store(field + i, tl.where(base > 0, power, 0.0), mask=i < tokens)
        tl.debug_barrier()

    field_sum = tl.zeros((), tl.float64)
    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        field_sum += tl.sum(tl.load(field + i, mask=i < tokens, other=0.0).to(tl.float64))
    scale = (tokens / tl.where(field_sum > 0, field_sum, 1.0)).to(kind)
    weight_sum = tl.zeros((), tl.float64)
    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        weight = mixed(tl.load(field + i, mask=i < tokens, other=0.0), scale, cap, mix, rest)
        weight_sum += tl.sum(tl.where(i < tokens, weight, 0.0).to(tl.float64))
    level = (tokens / tl.where(weight_sum > 0, weight_sum, 1.0)).to(kind)
    for start in range(0, tokens, BLOCK):
        i = start + tl.arange(0, BLOCK)
        weight = mixed(tl.load(field + i, mask=i < tokens, other=0.0), scale, cap, mix, rest) * level
        weight = tl.where(healthy, weight, 1.0)
        corner = (row * tokens + i // columns * columns) * patch * patch + i % columns * patch
        for a in range(patch):
            for b in range(patch):
                tl.store(weights + corner + a * columns * patch + b, weight, mask=i < tokens)


@cache
def block_of(tokens: int) -> int:
    """Tokens that a program has in registers at once."""
    return min(MOST_TOKENS, max(TOKENS_OF_WARP, triton.next_power_of_2(tokens)))


def launch(
    maps: Tensor,
    rows: int,
    columns: int,
    combine: str,
    smooth: float,
    sharpen: float,
    cap: float,
    mix: float,
    patch: int,
) -> Tensor:
    """The operator star::allocate_triton; see api.allocate."""
    batch, concepts, tokens = maps.shape
    check_reach("maps", (1, concepts, tokens), maps.stride())  # the samples are its grid's first axis
    kind = torch.float64 if maps.dtype == torch.float64 else torch.float32
    weights = maps.new_empty((batch, tokens // columns * patch, columns * patch), dtype=kind)
    if batch == 0:
        return weights
    workspace = maps.new_empty((batch, concepts + 2 * tokens), dtype=kind)
    block = block_of(tokens)
    with torch.cuda.device_of(maps):
        allocate_kernel[(batch,)](
            maps,
            workspace,
            weights,
            *maps.stride(),
            concepts,
            tokens,
            rows,
            columns,
            patch,
            math.ceil(min(3 * smooth, 2.0**30)),
            min(max(smooth, 2.0**-60), 2.0**60),  # float32 holds it, and no weight changes
            sharpen,
            cap,
            mix,
            LARGEST=combine == "max",
            SMOOTH=smooth > 0,
            SHARPEN=sharpen != 1,
            BLOCK=block,
            num_warps=block // TOKENS_OF_WARP,
        )
    return weights
