"""Sweeps the block sizes of attention_maps in Triton over the models' shapes on this machine's GPU, within two minutes.

PYTHONPATH=benchmarks python tools/gpu/tune_triton.py results.json

The values of every candidate are checked before it is timed. Prints the best of each shape beside what a launch takes
by itself, then the block sizes that are best over all shapes, which star_kernels.triton.attention_maps.TUNED_BLOCKS is
meant for; then the other operators in CUDA, where it is built, and in Triton. Writes all times as JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from math import ceil
from pathlib import Path
from statistics import geometric_mean, median
from typing import NamedTuple

import torch
import triton
from torch import Tensor

import cost_model as model
import star_kernels as sk
from gpu_check import in_a_graph
from star_kernels import reference
from star_kernels.ops import POLICY_LOSS
from star_kernels.triton import attention_maps as kernels
from star_kernels.triton.attention_maps import Blocks

LIMIT = 80.0  # seconds of sweeping
CALLS, ROUNDS = 20, 5
QUERIES, WARPS, STAGES, GROUPS = (64, 128), (4, 8), (3, 2, 4), (1, 2, 4, 8)


class Shape(NamedTuple):
    """Arguments of attention_maps in bfloat16."""

    name: str
    batch: int
    heads: int
    queries: int
    keys: int
    width: int
    concepts: int = model.CONCEPTS
    slots: int = model.SLOTS


class Candidate(NamedTuple):
    blocks: Blocks
    groups: int

    def __str__(self) -> str:
        queries, warps, stages = self.blocks
        return f"{queries} queries, {warps} warps, {stages} stages, {self.groups} groups of heads"


Times = dict[Candidate, float]  # seconds

SHAPES = [
    Shape(f"{one.name}, {batch}", batch, one.heads, one.image, one.image + one.text, one.width)
    for one, batch in product(model.MODELS, model.BATCHES)
]


def candidates(stages: int) -> list[Candidate]:
    return [Candidate(Blocks(queries, warps, stages), g) for g, warps, queries in product(GROUPS, WARPS, QUERIES)]


def usual(shape: Shape, device: torch.device) -> Candidate:
    """What a launch takes by itself."""
    blocks, count = kernels.blocks_of(kernels.architecture(device), 2), kernels.processors(device)
    cut = kernels.tiling(shape.batch, shape.heads, shape.queries, shape.concepts, shape.slots, count, blocks.queries)
    return Candidate(blocks, cut.groups)


def inputs(shape: Shape, device: torch.device) -> tuple:
    """Arguments of `launch`."""
    size = (shape.batch, shape.heads)
    query = torch.randn(*size, shape.queries, shape.width, dtype=torch.bfloat16, device=device)
    key = torch.randn(*size, shape.keys, shape.width, dtype=torch.bfloat16, device=device)
    index = torch.randint(shape.keys, (shape.batch, shape.concepts, shape.slots), device=device)
    lse = torch.full(query.shape[:3], 6.0, device=device)
    return query, key, index, torch.rand(index.shape, device=device), lse, shape.width**-0.5, None


def truth(arguments: tuple) -> Tensor:
    """The first and the last row's maps in float64."""
    *tensors, scale, _ = arguments
    rows = [0, len(tensors[0]) - 1]
    query, key, index, weight, lse = (t[rows] if t.dtype == torch.int64 else t[rows].double() for t in tensors)
    return reference.attention_maps(query, key, index, weight, lse, scale, None, None)


def error(maps: Tensor, expected: Tensor) -> float:
    """Largest relative one of the first and the last row."""
    return ((maps[[0, len(maps) - 1]].double() - expected).abs() / expected).max().item()


def seconds(sets: list[tuple], candidate: Candidate) -> float:
    """Of a launch. With several sets of arguments none of them is in the cache when its turn comes."""
    turn = iter(range(1 << 30))

    def call() -> Tensor:
        return kernels.launch(*sets[next(turn) % len(sets)], blocks=candidate.blocks, groups=candidate.groups)

    return seconds_of(call)


def seconds_of(call: Callable[[], object]) -> float:
    measure = in_a_graph(call, CALLS)
    return median(measure() for _ in range(ROUNDS))


def sweep(shape: Shape, tried: list[Candidate], device: torch.device, measure=seconds) -> Iterator[tuple]:
    """(candidate, seconds) of those that fit the device, in order."""
    first = inputs(shape, device)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
    sets = [first, *(inputs(shape, device) for _ in range(min(CALLS, ceil(2 * cache / first[0].nbytes)) - 1))]
    expected = truth(first)
    # Products of bfloat16 are exact in float32; their sums over channels, columns and heads are not.
    limit = 4 * (shape.width + shape.slots + shape.heads) * torch.finfo(torch.float32).eps
    for candidate in tried:
        try:
            maps = kernels.launch(*first, blocks=candidate.blocks, groups=candidate.groups)
        except triton.runtime.errors.OutOfResources:
            continue
        off = error(maps, expected)
        if not off <= limit:
            raise RuntimeError(f"{shape.name}, {candidate}: values are off by {off:.1e}, expected at most {limit:.1e}")
        yield candidate, measure(sets, candidate)


def best_blocks(results: list[Times]) -> list[tuple[float, Blocks]]:
    """Block sizes by the time they take with their best groups, in units of a shape's best, as a mean over the shapes.
    Only those that every shape has been timed with."""
    ratios: dict[Blocks, list[float]] = {}
    for times in results:
        for blocks in {candidate.blocks for candidate in times}:
            own = min(time for candidate, time in times.items() if candidate.blocks == blocks)
            ratios.setdefault(blocks, []).append(own / min(times.values()))
    return sorted((geometric_mean(each), blocks) for blocks, each in ratios.items() if len(each) == len(results))


def others(one: model.Model, batch: int, device: torch.device) -> dict[str, Callable[[str], object]]:
    """Calls of the operators over the latents, by name; they take the implementation."""
    side = int(one.locations**0.5)
    size = (batch, one.channels, side, side) if one.patch > 1 else (batch, one.locations, one.channels)
    sample, velocity, noise, prev_sample = torch.randn(4, *size, device=device).unbind(0)
    step = sk.Transition.gaussian(*(torch.rand(3, batch, device=device) + 0.5).unbind(0))
    maps, grid = torch.rand(batch, model.CONCEPTS, one.image, device=device), (int(one.image**0.5),) * 2
    weights = torch.ones(batch, *(size[2:] if one.patch > 1 else size[1:2]), device=device)
    given = (velocity, sample, prev_sample, *step, torch.randn(batch, device=device), weights, noise, None, None, None,
             "token", 1e-4, 1e-4, 5.0, 0.0, False)  # fmt: skip
    outer = torch.ones((), device=device)

    def loss_and_gradient(impl: str) -> Tensor:
        return POLICY_LOSS.gradient.run(impl)(outer, POLICY_LOSS.run(impl)(*given)[2], *given)

    return {
        "allocate": lambda impl: sk.allocate(maps, grid, patch=one.patch, impl=impl),
        "gaussian_step": lambda impl: sk.gaussian_step(sample, velocity, noise, step, impl=impl)[0],
        "policy_loss and its gradient": loss_and_gradient,
    }


def compare(device: torch.device) -> list[dict]:
    """Their times in CUDA and in Triton, inputs in the cache, and how far apart their values are."""
    rows = []
    for one, batch in product(model.MODELS, model.BATCHES):
        for name, call in others(one, batch, device).items():
            impls = [i for i, reason in sk.implementations(name.split()[0], device).items() if reason is None]
            impls, expected = [i for i in impls if i != "reference"], call("reference")
            took = {i: 1e6 * seconds_of(partial(call, i)) for i in impls}
            apart = {i: ((call(i) - expected).abs().max() / expected.abs().max()).item() for i in impls}
            rows.append({"operator": name, "shape": f"{one.name}, {batch}", "us": took, "relative_error": apart})
            told = ", ".join(f"{i} {took[i]:.1f} us (off by {apart[i]:.0e})" for i in impls)
            print(f"{name}, {one.name}, {batch}: {told}", flush=True)
    return rows


def main() -> int:
    if not torch.cuda.is_available():
        print("There is no GPU here (torch.cuda.is_available() is False): nothing was timed.", file=sys.stderr)
        return 1
    begin, device = time.monotonic(), torch.device("cuda", torch.cuda.current_device())
    results: dict[Shape, Times] = {shape: {} for shape in SHAPES}
    left = lambda: LIMIT - (time.monotonic() - begin)
    for stages, shape in product(STAGES, SHAPES):  # every shape with the usual stages before any with others
        tried = [one for one in (usual(shape, device), *candidates(stages)) if one not in results[shape]]
        for candidate, took in sweep(shape, tried, device):
            results[shape][candidate] = took
            if left() < 0:
                break
        torch.cuda.empty_cache()
        if left() < 0 and all(results.values()):
            break
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
    print(*about.values(), f"{time.monotonic() - begin:.0f} s")
    rows = []
    for shape, times in results.items():
        best, today = min(times, key=times.get), usual(shape, device)
        print(f"{shape.name:26} {1e6 * times[best]:6.1f} us: {best}; by itself {1e6 * times[today]:.1f} us: {today}")
        rows += [
            {"shape": shape.name} | one.blocks._asdict() | {"groups": one.groups, "us": 1e6 * times[one]}
            for one in times
        ]
    for ratio, blocks in best_blocks(list(results.values()))[:4]:
        print(f"{ratio:.3f} x the best over all shapes: {blocks}")
    about["operators"] = compare(device)
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(json.dumps(about | {"rows": rows}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
