"""attention_maps in Triton: the few key columns of the concepts against every image query, by the tensor cores.

One program owns a tile of queries of one batch row for a group of heads and a block of columns; it takes the heads in
order and writes its own partial maps. Partials are added in a fixed order: no atomics, the same bits in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
BLOCK_N = 64  # queries per program
BLOCK_S = 64  # keys per turn of the log-sum-exp
MOST_COLUMNS = 64  # per program: more make further programs, each reading the queries again


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
    weight,  # (B, C) float32
    lse,  # (B, H, N), any strides
    head_weight,  # (H,) float32
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
        total += probability * tl.load(head_weight + first_head + head)
        q += query_h
        k += key_h
        norm += lse_h

    weights = tl.load(weight + row * columns + c, mask=used, other=0.0)
    total = tl.where(used[None, :], total, 0.0)  # an unused slot must not bring 0 * inf
    out = partial + ((part * tl.num_programs(1) + row) * groups) * queries + n
    for group in range(groups):
        share = tl.where(c // slots == group, weights, 0.0)
        inside = tl.where((share != 0.0)[None, :], total * share[None, :], 0.0)
        tl.store(out + group * queries, tl.sum(inside, 1), mask=here)


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


def block_width(width: int, element_size: int) -> int:
    """Channels per product. float32 as three tf32 products holds its operands twice: more would spill registers."""
    return min(32 if element_size == 4 else 128, max(16, triton.next_power_of_2(width)))


def warps(element_size: int) -> int:
    """Warps per program, for the same reason."""
    return 8 if element_size == 4 else 4


def block_columns(columns: int) -> int:
    """Columns per program, a power of two of at least 16."""
    return min(MOST_COLUMNS, max(16, triton.next_power_of_2(columns)))


def dot_precision(query: Tensor) -> str:
    """How tl.dot treats float32: one rounding to tf32 would lose what the maps need."""
    return "ieee" if torch.version.hip or query.dtype != torch.float32 else "tf32x3"


def head_groups(query: Tensor) -> int:
    """Fewest equal groups of heads with which the tiles of a single row fill the device.

    The batch does not count, so a row's bits do not depend on the others.
    """
    heads = query.shape[1]
    if query.device.type != "cuda":
        return 1
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    tiles = triton.cdiv(query.shape[2], BLOCK_N)
    return next((g for g in range(1, heads) if heads % g == 0 and g * tiles >= processors), heads)


def launch(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None,
    lse: Tensor | None,
    scale: float,
    head_weight: Tensor | None,
    groups_of_heads: int | None = None,
) -> Tensor:
    """The operator star::attention_maps_triton; see api.attention_maps. groups_of_heads: default `head_groups`."""
    dtype = torch.promote_types(query.dtype, key.dtype)
    query, key = query.to(dtype), key.to(dtype)
    batch, heads, queries, width = query.shape
    concepts, slots = concept_index.shape[1:]
    columns = concepts * slots
    if batch * concepts * queries * columns * heads == 0:
        return query.new_zeros((batch, concepts, queries), dtype=torch.float32)
    index = concept_index.reshape(batch, columns).contiguous()
    if concept_weight is None:
        weight = torch.ones_like(index, dtype=torch.float32)
    else:
        weight = concept_weight.to(torch.float32).reshape(batch, columns).contiguous()
    if head_weight is None:
        head_weight = query.new_full((heads,), 1 / heads, dtype=torch.float32)
    head_weight = head_weight.to(torch.float32).contiguous()
    tiles = triton.cdiv(queries, BLOCK_N)
    block_d = block_width(width, query.element_size())
    shared = {"D": width, "BLOCK_D": block_d, "BLOCK_N": BLOCK_N, "PRECISION": dot_precision(query)}
    shared["num_warps"] = warps(query.element_size())

    with torch.cuda.device_of(query):
        if lse is None:
            lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
            lse_kernel[(tiles, batch, heads)](
                *(query, key, lse, *query.stride(), *key.stride(), queries, key.shape[2], scale * LOG2_E),
                **shared,
                LN2=1 / LOG2_E,
                BLOCK_S=BLOCK_S,
            )
        groups = groups_of_heads or head_groups(query)
        block = block_columns(columns)
        parts = triton.cdiv(columns, block) * groups
        partial = query.new_empty((parts, batch, concepts, queries), dtype=torch.float32)
        maps_kernel[(tiles, batch, parts)](
            *(query, key, index, weight, lse, head_weight, partial),
            *(*query.stride(), *key.stride(), *lse.stride()),
            *(queries, columns, concepts, slots, scale * LOG2_E),
            **shared,
            LOG2=LOG2_E,
            HEADS_PER_GROUP=heads // groups,
            HEAD_GROUPS=groups,
            BLOCK_C=block,
        )
    maps = partial[0]
    for further in partial[1:]:
        maps = maps + further
    return maps
