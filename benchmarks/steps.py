"""gaussian_step and allocate, compiled against plain PyTorch, at the shapes of a rollout and of its update."""

from __future__ import annotations

import functools

import torch

import star_kernels as sk
from losses import SHAPES
from runner import Sides


def step(pixels: int, dtype: torch.dtype = torch.float32) -> Sides:
    shape = SHAPES[pixels]
    sample, noise = torch.randn(2, *shape).unbind(0)
    velocity = torch.randn(shape).to(dtype)
    transition = sk.Transition.gaussian(*(torch.rand(3, shape[0]) + 0.5).unbind(0))
    call = functools.partial(sk.gaussian_step, sample, velocity, noise, transition)

    def equal(native, reference):
        torch.testing.assert_close(list(native), list(reference), rtol=0, atol=0)

    return Sides(lambda: call(impl="native"), lambda: call(impl="reference"), equal, f"latents {shape}, {dtype}")


def allocation(pixels: int, smooth: float) -> Sides:
    batch, _, height, width = SHAPES[pixels]
    grid = (height // 2, width // 2)
    call = functools.partial(sk.allocate, torch.rand(batch, 3, grid[0] * grid[1]), grid, smooth=smooth)
    equal = functools.partial(torch.testing.assert_close, rtol=1e-5, atol=0)
    note = f"{batch} samples, 3 concepts, grid {grid}, smooth {smooth:g}"
    return Sides(lambda: call(impl="native"), lambda: call(impl="reference"), equal, note)
