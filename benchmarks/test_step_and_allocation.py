"""gaussian_step and allocate, compiled against plain PyTorch, at the shapes of a rollout and of its update."""

import functools

import pytest
import torch

import star_kernels as sk
from pairs import alternate

SHAPES = ((9, 16, 64, 64), (8, 16, 128, 128))  # 512 and 1024 px. A row holds the worse of the two.


def compare(row, name, calls, note):
    """calls: for each shape a function of the implementation."""
    ratios, notes = [], []
    for call, shape in zip(calls, SHAPES, strict=True):
        pair = alternate(functools.partial(call, "native"), functools.partial(call, "reference"))
        ratios.append(pair.ratio)
        notes.append(f"{shape}: {pair.first * 1e3:.3f} ms against {pair.second * 1e3:.3f} ms")
    row(name, min(ratios), at_least=1.0, note=f"{note}; " + "; ".join(notes))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gaussian_step(dtype, benchmark, row):
    calls = []
    for shape in SHAPES:
        sample, noise = torch.randn(2, *shape).unbind(0)
        velocity = torch.randn(shape).to(dtype)
        transition = sk.Transition.gaussian(*(torch.rand(3, shape[0]) + 0.5).unbind(0))
        calls.append(functools.partial(sk.gaussian_step, sample, velocity, noise, transition))
        native, reference = (calls[-1](impl=impl) for impl in ("native", "reference"))
        assert torch.equal(native[0], reference[0]) and torch.equal(native[1], reference[1])
    benchmark.pedantic(functools.partial(calls[0], impl="native"), rounds=5, warmup_rounds=1)
    name = "step_vs_reference" + ("_bfloat16" if dtype == torch.bfloat16 else "")
    compare(row, name, [lambda impl, call=call: call(impl=impl) for call in calls], f"velocity in {dtype}")


def test_allocate(benchmark, row):
    calls = []
    for batch, _, height, width in SHAPES:
        grid = (height // 2, width // 2)
        maps = torch.rand(batch, 3, grid[0] * grid[1])
        calls.append(functools.partial(sk.allocate, maps, grid, smooth=1.0))
        torch.testing.assert_close(calls[-1](impl="native"), calls[-1](impl="reference"), rtol=1e-5, atol=0)
    benchmark.pedantic(functools.partial(calls[0], impl="native"), rounds=5, warmup_rounds=1)
    compare(
        row,
        "allocate_vs_reference",
        [lambda impl, call=call: call(impl=impl) for call in calls],
        "3 concepts, smoothed",
    )
