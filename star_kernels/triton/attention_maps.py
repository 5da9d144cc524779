"""attention_maps in Triton: the few key columns of the concepts against every image query, by the tensor cores.

One program owns a tile of queries of one batch row for a group of heads and a block of columns; it takes the heads in
order and writes its own partial maps. A second launch adds the partials in a fixed order: no atomics, the same bits in
every run. How a batch is cut into programs is `tiling`, a function of shapes and of the number of processors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
BLOCK_N = 64  # queries per program
BLOCK_S = 64  # keys per turn of the log-sum-exp
MOST_COLUMNS = 64  # per program: more make further programs, each reading the queries again
BLOCK_SUM = 256  # elements of the maps that one warp adds up: few, so that a single row's are many programs


@triton.jit
def scores_tile(q, k, here, there, stride_q, stride_k, D: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):
    """(BLOCK_N, columns) products of queries and keys at the addresses q and k of their first BLOCK_D channels."""
    d = tl.arange(0, BLOCK_D)
    scores = tl.zeros((q.shape[0], k.shape[1]), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = start + d < D
        queries_tile = tl.load(q + start * stride_q, mask=here[:, None] & inside[None, :], other=0.0)
        keys_tile = tl.load(k + start * stride_k, mask=there[None, :] & inside[:, None], other=0.0)
        scores = tl.dot(queries_tile, keys_tile, scores, input_precision=PRECISION)
    return scores


@triton.jit
def maps_kernel(
    query,  # (B, H, N, D)
    key,  # (B, H, S, D)
    index,  # (B, C) int64, columns of the key; -1 for an unused slot
    weight,  # (B, C) float32, or None for ones
    lse,  # (B, H, N), any strides
    head_weight,  # (H,) float32, or None for equal ones
    partial,  # (column blocks * head groups, B, G, N) float32
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_s,
    key_d,
    lse_b,
    lse_h,
    lse_n,
    queries,
    columns,
    groups,
    slots,
    scale_log2,
    LOG2: tl.constexpr,
    D: tl.constexpr,
    HEADS_PER_GROUP: tl.constexpr,
    HEAD_GROUPS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)  # offsets of a large batch do not fit 32 bits
    part = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = part // HEAD_GROUPS * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    here = n < queries
    column = tl.load(index + row * columns + c, mask=c < columns, other=-1)
    used = column >= 0
    first_head = part % HEAD_GROUPS * HEADS_PER_GROUP
    q = query + row * query_b + first_head * query_h + n[:, None] * query_n + d[None, :] * query_d
    k = key + row * key_b + first_head * key_h + tl.where(used, column, 0)[None, :] * key_s + d[:, None] * key_d
    norm = lse + row * lse_b + first_head * lse_h + n * lse_n

    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for head in range(HEADS_PER_GROUP):
        norm_tile = tl.load(norm, mask=here, other=0.0).to(tl.float32)
        scores = scores_tile(q, k, here, used, query_d, key_d, D, BLOCK_D, PRECISION)
        probability = tl.exp2(scores * scale_log2 - (norm_tile * LOG2)[:, None])
        probability = tl.where(
            (norm_tile > float("-inf"))[:, None] | (norm_tile != norm_tile)[:, None], probability, 0.0
        )
        if head_weight is None:
            total += probability * (1.0 / (HEADS_PER_GROUP * HEAD_GROUPS))
        else:
            total += probability * tl.load(head_weight + first_head + head)
        q += query_h
        k += key_h
        norm += lse_h

    if weight is None:
        weights = tl.where(used, 1.0, 0.0)
    else:
        weights = tl.load(weight + row * columns + c, mask=used, other=0.0)
    total = tl.where(used[None, :], total, 0.0)  # an unused slot must not bring 0 * inf
    out = partial + ((part * tl.num_programs(1) + row) * groups) * queries + n
    for group in range(groups):
        share = tl.where(c // slots == group, weights, 0.0)
        inside = tl.where((share != 0.0)[None, :], total * share[None, :], 0.0)
        tl.store(out + group * queries, tl.sum(inside, 1), mask=here)


@triton.jit
def sum_kernel(partial, maps, elements, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """maps (elements,) float32: the sum of partial (PARTS, elements) in the order of the parts."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.load(partial + at, mask=inside)
    for _ in tl.static_range(1, PARTS):
        partial += elements
        total += tl.load(partial + at, mask=inside)
    tl.store(maps + at, total, mask=inside)


@triton.jit
def lse_kernel(
    query,  # (B, H, N, D)
    key,  # (B, H, S, D)
    lse,  # (B, H, N) contiguous float32
    query_b,
    query_h,
    query_n,
    query_d,
    key_b,
    key_h,
    key_s,
    key_d,
    queries,
    keys,
    scale_log2,
    LN2: tl.constexpr,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    head = tl.program_id(2)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    s = tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    q = query + row * query_b + head * query_h + n[:, None] * query_n + d[None, :] * query_d
    k = key + row * key_b + head * key_h + s[None, :] * key_s + d[:, None] * key_d
    here = n < queries
    # Finite, so that a key masked by -inf adds 0 and a row of such keys sums to 0.
    largest = tl.full((BLOCK_N,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, keys, BLOCK_S):
        there = start + s < keys
        scores = scores_tile(q, k, here, there, query_d, key_d, D, BLOCK_D, PRECISION)
        scores = tl.where(there[None, :], scores * scale_log2, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        total = total * tl.exp2(largest - new) + tl.sum(tl.exp2(scores - new[:, None]), 1)
        largest = new
        k += BLOCK_S * key_s
    result = (largest + tl.log2(total)) * LN2
    tl.store(lse + (row * tl.num_programs(2) + head) * queries + n, result, mask=here)


def block_width(width: int, element_size: int, precision: str) -> int:
    """Channels per product: more would spill registers. float32 as three tf32 products holds its operands twice."""
    most = 16 if precision == "tf32x3" else 32 if element_size == 4 else 64
    return min(most, max(16, triton.next_power_of_2(width)))


def warps(element_size: int) -> int:
    """Warps per program, for the same reason."""
    return 8 if element_size == 4 else 4


def block_columns(columns: int) -> int:
    """Columns per program, a power of two of at least 16."""
    return min(MOST_COLUMNS, max(16, triton.next_power_of_2(columns)))


def dot_precision(element_size: int, hip: bool = torch.version.hip is not None) -> str:
    """How tl.dot treats float32: one rounding to tf32 would lose what the maps need."""
    return "tf32x3" if element_size == 4 and not hip else "ieee"


class Tiling(NamedTuple):
    """How maps_kernel cuts a batch into programs."""

    tiles: int  # of BLOCK_N queries
    batch: int
    column_blocks: int
    head_groups: int

    @property
    def parts(self) -> int:
        """Partial maps of every row, which sum_kernel adds up if there are several."""
        return self.column_blocks * self.head_groups

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.tiles, self.batch, self.parts


def tiling(batch: int, heads: int, queries: int, columns: int, processors: int) -> Tiling:
    """Fewest equal groups of heads with which the tiles of a single row fill the processors.

    The batch does not count, so a row's bits do not depend on the others.
    """
    tiles = triton.cdiv(queries, BLOCK_N)
    groups = next((g for g in range(1, heads) if heads % g == 0 and g * tiles >= processors), heads)
    return Tiling(tiles, batch, triton.cdiv(columns, block_columns(columns)), groups)


def processors(device: torch.device) -> int:
    """Of a GPU; the interpreter is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def launch(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None,
    lse: Tensor | None,
    scale: float,
    head_weight: Tensor | None,
    groups_of_heads: int | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """The operator star::attention_maps_triton; see api.attention_maps. groups_of_heads: default those of `tiling`."""
    dtype = torch.promote_types(query.dtype, key.dtype)
    query, key = query.to(dtype), key.to(dtype)
    batch, heads, queries, width = query.shape
    concepts, slots = concept_index.shape[1:]
    columns = concepts * slots
    maps = query.new_empty((batch, concepts, queries), dtype=torch.float32) if out is None else out
    if batch * concepts * queries * columns * heads == 0:
        return maps.zero_()
    index = concept_index.reshape(batch, columns).contiguous()
    if concept_weight is not None:
        concept_weight = concept_weight.to(torch.float32).reshape(batch, columns).contiguous()
    if head_weight is not None:
        head_weight = head_weight.to(torch.float32).contiguous()
    cut = tiling(batch, heads, queries, columns, processors(query.device))
    if groups_of_heads:
        cut = cut._replace(head_groups=groups_of_heads)
    size = query.element_size()
    precision = dot_precision(size)
    shared = {"D": width, "BLOCK_D": block_width(width, size, precision), "BLOCK_N": BLOCK_N}
    shared |= {"PRECISION": precision, "num_warps": warps(size)}

    with torch.cuda.device_of(query):
        if lse is None:
            lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
            lse_kernel[(cut.tiles, batch, heads)](
                *(query, key, lse, *query.stride(), *key.stride(), queries, key.shape[2], scale * LOG2_E),
                **shared,
                LN2=1 / LOG2_E,
                BLOCK_S=BLOCK_S,
            )
        partial = maps if cut.parts == 1 else maps.new_empty((cut.parts, *maps.shape))
        maps_kernel[cut.grid](
            *(query, key, index, concept_weight, lse, head_weight, partial),
            *(*query.stride(), *key.stride(), *lse.stride()),
            *(queries, columns, concepts, slots, scale * LOG2_E),
            **shared,
            LOG2=LOG2_E,
            HEADS_PER_GROUP=heads // cut.head_groups,
            HEAD_GROUPS=cut.head_groups,
            BLOCK_C=block_columns(columns),
        )
        if cut.parts > 1:
            sums = (triton.cdiv(maps.numel(), BLOCK_SUM),)
            sum_kernel[sums](partial, maps, maps.numel(), PARTS=cut.parts, BLOCK=BLOCK_SUM, num_warps=1)
    return maps
