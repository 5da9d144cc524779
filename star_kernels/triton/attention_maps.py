"""attention_maps in Triton: the few key columns of the concepts against every image query, by the tensor cores.

The heads form chunks, a function of their number alone. One program owns a tile of queries of one batch row for some
chunks and a block of columns; it takes the heads in order and makes a partial map of each chunk. The partial maps are
added in order, by the program itself if it owns all of them, else by a second launch. So the bits depend neither on
the batch nor on how `tiling` cuts it into programs, and there are no atomics.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.checks import check_reach
from star_kernels.triton.device import architecture, processors, starts_early

LOG2_E = 1.4426950408889634
CHUNKS = 8  # of heads, at most: what a row can be cut into
PROGRAMS = 4  # per processor: with fewer, memory waits for the next request (docs/gpu-measured.md)
BLOCK_S = 64  # keys per turn of the log-sum-exp
MOST_CONCEPTS = 8  # whose maps a program adds up in registers
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


@triton.jit(do_not_specialize=["queries", "keys", "columns", "concepts", "slots", "chunks"])
def maps_kernel(
    query,  # (B, H, N, D)
    key,  # (B, H, S, D)
    index,  # (B, C) int64, columns of the key; -1 for an unused slot
    weight,  # (B, C) float32, or None for ones
    lse,  # (B, H, N), any strides
    head_weight,  # (H,) float32, or None for equal ones
    bias,  # (B, S) contiguous float32, for scores to the base 2; or None
    maps,  # (B, G, N) float32; (column blocks, chunks of heads, B, G, N) without ALONE
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
    keys,
    columns,
    concepts,
    slots,
    chunks,  # that a program owns
    scale_log2,
    LOG2: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    SHARED: tl.constexpr,  # neighboring heads of a key head
    CHUNK: tl.constexpr,  # heads of one
    ALONE: tl.constexpr,  # a program owns all chunks and columns
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_G: tl.constexpr,  # the most concepts, with ALONE
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    EARLY: tl.constexpr,  # sum_kernel may start, and waits by itself
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    ALL_CHUNKS: tl.constexpr = (HEADS + CHUNK - 1) // CHUNK
    row = tl.program_id(1).to(tl.int64)  # offsets of a large batch do not fit 32 bits
    groups = tl.cdiv(ALL_CHUNKS, chunks)
    column_block = tl.program_id(2) // groups
    first_head = tl.program_id(2) % groups * chunks * CHUNK
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    c = column_block * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.arange(0, BLOCK_D)
    here = n < queries
    column = tl.load(index + row * columns + c, mask=c < columns, other=-1)
    used = (column >= 0) & (column < keys)
    q = query + row * query_b + first_head * query_h + n[:, None] * query_n + d[None, :] * query_d
    k = key + row * key_b + tl.where(used, column, 0)[None, :] * key_s + d[:, None] * key_d
    norm = lse + row * lse_b + first_head * lse_h + n * lse_n
    if weight is None:
        weights = tl.where(used, 1.0, 0.0)
    else:
        weights = tl.load(weight + row * columns + c, mask=used, other=0.0)
    weights = tl.where(used | (column == -1), weights, float("nan"))  # an index beyond the keys must show
    g = tl.arange(0, BLOCK_G)
    step = tl.num_programs(1).to(tl.int64) * concepts * queries  # from one partial map of the batch to the next
    out = maps + column_block * ALL_CHUNKS * step + row * concepts * queries + n

    whole = tl.zeros((BLOCK_N, BLOCK_G), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)
    for head in range(first_head, min(first_head + chunks * CHUNK, HEADS)):
        norm_tile = tl.load(norm, mask=here, other=0.0).to(tl.float32)
        shared = k + head // SHARED * key_h
        scores = scores_tile(q, shared, here, used, query_d, key_d, D, BLOCK_D, PRECISION) * scale_log2
        if bias is not None:
            scores += tl.load(bias + row * keys + tl.where(used, column, 0), mask=used, other=0.0)[None, :]
        probability = tl.exp2(scores - (norm_tile * LOG2)[:, None])
        probability = tl.where(
            (norm_tile > float("-inf"))[:, None] | (norm_tile != norm_tile)[:, None], probability, 0.0
        )
        if head_weight is None:
            total += probability * (1.0 / HEADS)
        else:
            total += probability * tl.load(head_weight + head)
        q += query_h
        norm += lse_h
        if (head % CHUNK == CHUNK - 1) | (head == HEADS - 1):
            total = tl.where(used[None, :], total * weights[None, :], weights[None, :])  # no 0 * inf of an unused slot
            for concept in range(concepts):
                first = concept * slots
                own = (c >= first) & (c < first + slots)
                part = tl.sum(tl.where(own[None, :], total, 0.0), 1)
                if ALONE:
                    whole += tl.where((g == concept)[None, :], part[:, None], 0.0)
                else:
                    tl.store(out + head // CHUNK * step + concept * queries, part, mask=here)
            total = tl.zeros((BLOCK_N, BLOCK_C), tl.float32)

    if ALONE:
        tl.store(out[:, None] + g[None, :] * queries, whole, mask=here[:, None] & (g < concepts)[None, :])


@triton.jit
def sum_kernel(partial, maps, elements, PARTS: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """maps (elements,) float32: the sum of partial (PARTS, elements) in the order of the parts.

    EARLY: maps_kernel may still run.
    """
    if EARLY:
        tl.extra.cuda.gdc_wait()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < elements
    total = tl.load(partial + at, mask=inside)
    for _ in tl.static_range(1, PARTS):
        partial += elements
        total += tl.load(partial + at, mask=inside)
    tl.store(maps + at, total, mask=inside)


@triton.jit(do_not_specialize=["queries", "keys"])
def lse_kernel(
    query,  # (B, H, N, D)
    key,  # (B, H, S, D)
    lse,  # (B, H, N) contiguous float32
    bias,  # as in maps_kernel
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
    SHARED: tl.constexpr,
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
    k = key + row * key_b + head // SHARED * key_h + s[None, :] * key_s + d[:, None] * key_d
    here = n < queries
    # Finite, so that a key masked by -inf adds 0 and a row of such keys sums to 0.
    largest = tl.full((BLOCK_N,), -3.0e38, tl.float32)
    total = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(0, keys, BLOCK_S):
        there = start + s < keys
        scores = scores_tile(q, k, here, there, query_d, key_d, D, BLOCK_D, PRECISION)
        scores = scores * scale_log2
        if bias is not None:
            scores += tl.load(bias + row * keys + start + s, mask=there, other=0.0)[None, :]
        scores = tl.where(there[None, :], scores, float("-inf"))
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


def block_columns(columns: int) -> int:
    """Columns per program, a power of two of at least 16."""
    return min(MOST_COLUMNS, max(16, triton.next_power_of_2(columns)))


def dot_precision(element_size: int, hip: bool = torch.version.hip is not None) -> str:
    """How tl.dot treats float32: one rounding to tf32 would lose what the maps need."""
    return "tf32x3" if element_size == 4 and not hip else "ieee"


class Blocks(NamedTuple):
    """What a program of maps_kernel is."""

    queries: int
    warps: int
    stages: int  # of the pipeline over the heads


# By bytes of an element: predicted from machine code. By architecture and bytes of an element: the best of those that
# were tried on such a GPU; see docs/gpu-measured.md.
DEFAULT_BLOCKS = {2: Blocks(64, 4, 3), 4: Blocks(64, 8, 3)}
TUNED_BLOCKS = {("sm_90", 2): Blocks(64, 4, 3)}


def blocks_of(architecture: str, element_size: int) -> Blocks:
    """Of an architecture as `architecture` names it."""
    return TUNED_BLOCKS.get((architecture, element_size), DEFAULT_BLOCKS[element_size])


class Tiling(NamedTuple):
    """How maps_kernel cuts a batch into programs."""

    tiles: int  # of queries
    batch: int
    column_blocks: int
    chunk: int  # heads of one
    chunks: int  # of all heads
    owned: int  # chunks that a program owns; the last group of a row may have fewer
    alone: bool  # every program owns all chunks and columns, and holds a tile of the maps

    @property
    def groups(self) -> int:
        """Of chunks: programs that share a row's heads."""
        return triton.cdiv(self.chunks, self.owned)

    @property
    def parts(self) -> int:
        """Partial maps of every row."""
        return self.column_blocks * self.chunks

    @property
    def grid(self) -> tuple[int, int, int]:
        return self.tiles, self.batch, self.column_blocks * self.groups


@cache
def tiling(
    batch: int, heads: int, queries: int, concepts: int, slots: int, processors: int, block: int, groups: int = 0
) -> Tiling:
    """Fewest groups of heads with which the batch fills the processors.

    block: queries of a program. groups: as many as these if it is not 0, at most one for each chunk.
    """
    chunk = triton.cdiv(heads, CHUNKS)
    chunks = triton.cdiv(heads, chunk)
    tiles, column_blocks = triton.cdiv(queries, block), triton.cdiv(concepts * slots, block_columns(concepts * slots))
    programs = tiles * batch * column_blocks
    groups = min(chunks, groups or max(1, triton.cdiv(PROGRAMS * processors, programs)))
    owned = triton.cdiv(chunks, groups)
    alone = column_blocks == 1 and owned == chunks and concepts <= MOST_CONCEPTS
    return Tiling(tiles, batch, column_blocks, chunk, chunks, owned, alone)


class Launches(NamedTuple):
    """Grids and constants of the launches, which calls with the same shapes share: to make them takes the host longer
    than a small call's kernels take."""

    cut: Tiling
    lse_grid: tuple[int, int, int]
    maps_grid: tuple[int, int, int]
    sum_grid: tuple[int]
    lse: dict[str, Any]
    maps: dict[str, Any]
    sum: dict[str, Any]


@cache
def launches(
    query: tuple[int, int, int, int],
    key_heads: int,
    concepts: int,
    slots: int,
    size: int,
    target: str,
    count: int,
    blocks: Blocks | None,
    groups: int,
) -> Launches:
    """query: its shape. size: bytes of an element. target, count: the GPU's architecture and number of processors.
    blocks, groups: as of `launch`."""
    batch, heads, queries, width = query
    blocks = blocks or blocks_of(target, size)
    cut = tiling(batch, heads, queries, concepts, slots, count, blocks.queries, groups)
    early, precision = not cut.alone and starts_early(target), dot_precision(size)
    shared: dict[str, Any] = {"D": width, "BLOCK_D": block_width(width, size, precision), "BLOCK_N": blocks.queries}
    shared |= {"SHARED": heads // key_heads, "PRECISION": precision}
    shared |= {"num_warps": blocks.warps, "num_stages": blocks.stages}
    maps = {"LOG2": LOG2_E, "HEADS": heads, "CHUNK": cut.chunk, "ALONE": cut.alone, "EARLY": early}
    maps |= {"BLOCK_C": block_columns(concepts * slots), "BLOCK_G": MOST_CONCEPTS}
    added = {"PARTS": cut.parts, "BLOCK": BLOCK_SUM, "EARLY": early, "num_warps": 1}
    return Launches(
        cut,
        (cut.tiles, batch, heads),
        cut.grid,
        (triton.cdiv(batch * concepts * queries, BLOCK_SUM),),
        shared | {"LN2": 1 / LOG2_E, "BLOCK_S": BLOCK_S},
        shared | maps,
        added | ({"launch_pdl": True} if early else {}),
    )


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous and of the type."""
    return tensor if tensor.dtype == dtype and tensor.is_contiguous() else tensor.to(dtype).contiguous()


def launch(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None,
    lse: Tensor | None,
    scale: float,
    head_weight: Tensor | None,
    key_bias: Tensor | None = None,
    out: Tensor | None = None,
    blocks: Blocks | None = None,
    groups: int = 0,
) -> Tensor:
    """The operator star::attention_maps_triton; see api.attention_maps. blocks, groups: default those of `blocks_of`
    and `tiling`."""
    if query.dtype != key.dtype:
        dtype = torch.promote_types(query.dtype, key.dtype)
        query, key = query.to(dtype), key.to(dtype)
    query_strides, key_strides = query.stride(), key.stride()
    check_reach("query", query.shape, query_strides)
    check_reach("key", key.shape, key_strides)
    batch, heads, queries, _ = query.shape
    _, key_heads, keys, _ = key.shape
    _, concepts, slots = concept_index.shape
    columns = concepts * slots
    maps = query.new_empty((batch, concepts, queries), dtype=torch.float32) if out is None else out
    if batch * concepts * queries * columns * heads == 0:
        return maps.zero_()
    index = concept_index.contiguous()
    weight = None if concept_weight is None else dense(concept_weight, torch.float32)
    head_weight = None if head_weight is None else dense(head_weight, torch.float32)
    bias = None if key_bias is None else (key_bias.to(torch.float32) * LOG2_E).contiguous()
    target, count = architecture(query.device), processors(query.device)
    shape, size = tuple(query.shape), query.element_size()
    fixed = launches(shape, key_heads, concepts, slots, size, target, count, blocks, groups)

    with torch.cuda.device_of(query):
        if lse is None:
            lse = query.new_empty((batch, heads, queries), dtype=torch.float32)
            lse_kernel[fixed.lse_grid](
                query, key, lse, bias, *query_strides, *key_strides, queries, keys, scale * LOG2_E, **fixed.lse
            )
        partial = maps if fixed.cut.alone else maps.new_empty((fixed.cut.parts, *maps.shape))
        maps_kernel[fixed.maps_grid](
            query,
            key,
            index,
            weight,
            lse,
            head_weight,
            bias,
            partial,
            *query_strides,
            *key_strides,
            *lse.stride(),
            queries,
            keys,
            columns,
            concepts,
            slots,
            fixed.cut.owned,
            scale * LOG2_E,
            **fixed.maps,
        )
        if not fixed.cut.alone:
            sum_kernel[fixed.sum_grid](partial, maps, batch * concepts * queries, **fixed.sum)
    return maps
