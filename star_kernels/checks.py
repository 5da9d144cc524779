"""Checks of the operators' arguments: each in one place, each error one line, the same for every implementation."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MOST_ELEMENTS = 2**40  # of a tensor: 4 TiB of float32
MOST_LOCATIONS = 2**30  # of a sample: kernels count them in 32 bits
LEAST_POSITIVE = 1e-30  # of what must be > 0: float32 has room for its inverse too
LARGEST = torch.finfo(torch.float32).max  # what is beyond it is infinite in the kernels


def check_tensor(
    name: str, value: object, shape: tuple[int | str, ...] | None = None, device: torch.device | None = None
) -> None:
    """Check that value is a dense floating tensor of the shape (names stand for any size) on the device."""
    # What is right costs a few comparisons: these checks are a good part of the time of a small call.
    if (
        isinstance(value, Tensor)
        and value.dtype in FLOATS
        and is_dense(value)
        and shape in (None, value.shape)
        and device in (None, value.device)
    ):
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in FLOATS:
        raise TypeError(f"{name}: got {value.dtype}, expected a floating-point tensor")
    check_layout(name, value, shape, device)


def check_latents(name: str, value: Tensor) -> None:
    """Check that value is a dense floating tensor with the axes of latents."""
    check_tensor(name, value)
    if value.ndim not in (3, 4, 5):
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected (B, C, H, W), (B, C, T, H, W), (B, L, C)")


def check_index(name: str, value: object, shape: tuple[int | str, ...], device: torch.device) -> None:
    """Check that value is a dense int64 tensor of the shape on the device."""
    if not isinstance(value, Tensor) or value.dtype != torch.int64:
        kind = getattr(value, "dtype", type(value).__name__)
        raise TypeError(f"{name}: got {kind}, expected an int64 tensor")
    check_layout(name, value, shape, device)


def is_dense(value: Tensor) -> bool:
    return value.layout == torch.strided and not value.is_nested


def check_layout(name: str, value: Tensor, shape: tuple[int | str, ...] | None, device: torch.device | None) -> None:
    """Check a tensor of the right type: that it is dense, has the shape and is on the device."""
    if not is_dense(value):
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name}: got {kind}, expected a dense tensor")
    if shape is not None and (
        value.ndim != len(shape)
        or any(isinstance(want, int) and have != want for have, want in zip(value.shape, shape, strict=True))
    ):
        expected = ", ".join(str(size) for size in shape)
        raise ValueError(f"{name}: got shape {tuple(value.shape)}, expected ({expected})")
    if device is not None and value.device != device:
        raise ValueError(f"{name}: is on {value.device}, expected {device}")


def check_choice(name: str, value: object, options: tuple[str, ...]) -> None:
    if value not in options:
        raise ValueError(f"{name}: got {value!r}, expected one of {list(options)}")


def check_elements(name: str, sizes: Sequence[int]) -> None:
    """Check that a tensor of the sizes is one that memory can hold: beyond it their product overflows somewhere."""
    if not torch.compiler.is_compiling() and math.prod(sizes) > MOST_ELEMENTS:
        raise ValueError(f"{name}: sizes {tuple(sizes)} make more than 2**40 elements")


@cache
def check_reach(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    """Check that a Triton kernel can count the samples on an axis of its grid, and address one of them in 32 bits."""
    if shape[0] > 65535:
        raise ValueError(f"{name}: got a batch of {shape[0]}, expected at most 65535 for impl='triton'")
    if sum((size - 1) * stride for size, stride in zip(shape[1:], strides[1:], strict=True)) >= 2**31:
        raise ValueError(f"{name}: a sample of {shape[1:]} spans more than 2**31 elements, too many for impl='triton'")


def checked_number(
    name: str, value: Any, low: float = -LARGEST, high: float = LARGEST, expected: str = "a finite number"
) -> float:
    """value as a float in [low, high], infinite where float32 is. expected: words for what it should be."""
    # torch.compile makes a number that has changed an input of its graph, which it cannot ask for attributes. Before
    # torch 2.9 it cannot trace `int | float` either.
    if not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}")
    try:
        number = float(value)
    except OverflowError:  # an integer
        number = math.nan
    except (TypeError, ValueError, RuntimeError):  # an array or a tensor of several
        raise TypeError(f"{name}: got {type(value).__name__} of several numbers, expected {expected}") from None
    if not low <= number <= high:
        raise ValueError(f"{name}: got {shown(value)}, expected {expected}")
    return number if abs(number) <= LARGEST else math.copysign(math.inf, number)


def checked_integer(name: str, value: Any, expected: str) -> int:
    """value as an int. expected: words for what it should be."""
    if isinstance(value, torch.SymInt):  # which index() would make a constant
        return value  # type: ignore[return-value]
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name}: got {type(value).__name__}, expected {expected}") from None


def checked_integers(name: str, values: Any, expected: str) -> list[int]:
    """values, a sequence or a tensor of integers, as a list. expected: words for what it should be."""
    if isinstance(values, torch.Tensor) and values.dtype == torch.bool:
        raise TypeError(f"{name}: got a tensor of booleans, expected {expected}")
    try:
        found = values.tolist() if isinstance(values, torch.Tensor) else list(values)
    except TypeError:
        raise TypeError(f"{name}: got {shown(values)}, expected {expected}") from None
    if any(isinstance(value, bool) for value in found):
        raise TypeError(f"{name}: got {shown(values)}, expected {expected}")
    return [checked_integer(name, value, expected) for value in found]


def checked_clip_range(value: Any) -> tuple[float, float]:
    """(low, high), from e or (low, high)."""
    expected = "e >= 0 or (low, high), both >= 0"
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2:
        raise ValueError(f"clip_range: got {len(pair)} numbers, expected {expected}")
    low, high = (checked_number("clip_range", one, -math.inf, math.inf, expected) for one in pair)
    if low < 0 or high < 0:
        raise ValueError(f"clip_range: got {shown(value)}, expected {expected}")
    return low, high


def checked_adv_clip(name: str, value: Any) -> float:
    return checked_number(name, value, LEAST_POSITIVE, math.inf, "a number > 0")


def checked_grid(value: Any, tokens: int) -> tuple[int, ...]:
    """(rows, columns) of the tokens, or (frames, rows, columns)."""
    expected = f"(rows, columns) or (frames, rows, columns) of product {tokens}"
    sizes = tuple(checked_integers("grid", value, expected))
    if len(sizes) not in (2, 3) or min(sizes) < 1 or math.prod(sizes) != tokens:
        raise ValueError(f"grid: got {shown(sizes)}, expected {expected}")
    return sizes


def checked_patch(value: Any, grid: tuple[int, ...]) -> int:
    """Latent locations per token and side."""
    patch = checked_integer("patch", value, "a number >= 1")
    if patch < 1:
        raise ValueError(f"patch: got {shown(value)}, expected a number >= 1")
    if math.prod(grid) * patch * patch > MOST_LOCATIONS:
        sizes = " x ".join(map(str, grid))
        raise ValueError(f"patch: got {shown(value)}, expected at most 2**30 locations of a grid of {sizes}")
    return patch


def shown(value: object) -> str:
    """A value in a message: what is too long is cut, and all of it is one line."""
    try:
        text = " ".join(repr(value).split())
    except ValueError:  # Python refuses to print integers of more than 4300 digits
        return "a number beyond float's range"
    return text if len(text) <= 60 else f"{text[:57]}..."
