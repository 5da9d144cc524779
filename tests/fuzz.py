"""Random calls of the operators: an implementation against the reference, values by float64, errors by errors.

    python tests/fuzz.py --cases 20000
    python tests/fuzz.py --impl triton --operator allocate --seed 41 --cases 1

Shapes, types, memory layouts, options, values that are not finite or near the limits, and wrong arguments. A case
follows from its operator, seed and implementation alone. Where both return, shapes, types and what is not finite agree,
and the values are as near to float64's as the reference's are; where one raises, both raise the same line; nobody
changes an input, dies or hangs. Exit code 1 if a case was a fault; its line says how to run it again.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import torch
from torch import Tensor

import cuda_on_host
import star_kernels as sk
from star_kernels import Transition, api

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGE = (1, 1, 2, 3, 4, 5, 7, 8, 11, 15, 16, 17, 31, 32, 33, 63, 64, 65, 97, 129)
SMALL = (1, 1, 2, 3, 4, 5, 7, 8, 16, 17)  # for implementations that run in an interpreter
ODD_VALUES = (math.nan, math.inf, -math.inf, 0.0, -0.0, -1.0, 1e-310, 1e-40, 65504.0)
HUGE = 1e30
SECONDS = 60  # after which a case counts as hanging
# The reference's own error, times this, is what an implementation may have; and roundings of the largest value.
TIMES, ROUNDINGS = 8, 64

# Of these one in float64 makes the arithmetic so.
IN_ARITHMETIC = ("query", "key", "maps", "velocity", "sample", "prev_sample", "clean")

Arguments = dict[str, Any]


class Draw(random.Random):
    """Random arguments. sizes: of an axis. floats: types of tensors."""

    def __init__(self, seed: str, impl: str) -> None:
        super().__init__(seed)
        self.generator = torch.Generator().manual_seed(self.getrandbits(62))
        self.sizes = LARGE if impl == "native" else SMALL
        self.impl = impl

    def chance(self, share: float) -> bool:
        return self.random() < share

    def size(self, most: int, least: int = 1) -> int:
        return 0 if least == 0 and self.chance(0.03) else min(self.choice(self.sizes), most)

    def type(self) -> torch.dtype:
        return self.choice(FLOATS)

    def normal(self, shape: tuple[int, ...], spread: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64) * spread

    def uniform(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low

    def tensor(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The values in a type and a memory layout."""
        x = values.to(dtype or self.type())
        kind = self.random()
        if x.ndim == 0 or kind < 0.5:
            return x
        if kind < 0.65 and x.ndim > 1:
            first, second = self.sample(range(x.ndim), 2)
            return x.transpose(first, second).contiguous().transpose(first, second)
        if kind < 0.8:  # a part of something larger
            step = self.choice((1, 2))
            larger = torch.full([step * size + 1 for size in x.shape], 7.0, dtype=x.dtype)
            part = larger[tuple(slice(1, 1 + step * size, step) for size in x.shape)]
            return part.copy_(x)
        if kind < 0.87 and x.numel():
            return x.narrow(self.randrange(x.ndim), 0, 1).expand(x.shape)
        if kind < 0.92 and x.ndim == 4:
            return x.contiguous(memory_format=torch.channels_last)
        return x.requires_grad_() if kind < 0.97 else x.neg()._neg_view()

    def with_odd_values(self, x: Tensor) -> Tensor:
        """Some values are not finite, or near the limits of a type."""
        x = x.detach().clone(memory_format=torch.contiguous_format)
        for _ in range(self.randint(1, 3)):
            x.view(-1)[self.randrange(x.numel())] = self.choice(ODD_VALUES)
        return x

    def wrong(self, value: Any) -> Any:
        """Something that is most likely no right argument."""
        options = [
            None,
            3,
            -1,
            10**19,
            10**400,
            2.5,
            math.nan,
            math.inf,
            True,
            "x",
            b"x",
            [1.0],
            (1, 2, 3),
            {},
            object(),
        ]
        options += [np.zeros(3), torch.ones(()), torch.ones(0), torch.ones(3)]
        if isinstance(value, Tensor):
            x = value.detach()
            like = lambda dtype: torch.ones(x.shape).to(dtype)
            options += [like(dtype) for dtype in (torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn)]
            options += [x[..., None], x.flatten(), x.to("meta"), like(torch.float32).to_sparse(), x.tolist()]
            options += [x[:0] if x.ndim else x, torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])]
            options += [torch.nn.Parameter(like(torch.float32)), like(torch.float32).numpy()]
        return self.choice(options)


def transition(draw: Draw, batch: int) -> Transition:
    field = lambda low, high: draw.uniform((batch,), low, high)
    step = Transition.gaussian(field(0.3, 1.2), field(-0.6, 0.2), field(0.05, 1.0), field(0.05, 1.0))
    kind = draw.choice((torch.float32, torch.float32, torch.float64))
    return Transition(*(draw.tensor(value, kind if draw.chance(0.9) else None) for value in step))


def draw_attention_maps(draw: Draw) -> Arguments:
    batch, heads, queries, width = draw.size(3, 0), draw.size(5, 0), draw.size(129, 0), draw.size(97)
    keys, groups, slots = draw.size(129, 0), draw.size(5, 0), draw.size(7, 0)
    kinds = FLOATS if draw.impl == "native" else FLOATS[:3]
    kind, spread = draw.choice(kinds), draw.choice((1, 1, 0.1, 4))
    index = torch.randint(-1, max(keys, 0), (batch, groups, slots), generator=draw.generator) if keys else None
    if index is None:
        index = torch.full((batch, groups, slots), -1)
    if draw.chance(0.05) and index.numel():
        index.view(-1)[draw.randrange(index.numel())] = draw.choice((keys, -2, 2**31, 2**62, -(2**63)))
    if draw.chance(0.2) and index.numel():
        index = index[:, :1, :1].expand(index.shape)
    # Now and then heads share key heads, or their numbers do not fit.
    key_heads = draw.choice([n for n in range(1, heads + 1) if heads % n == 0] or [0]) if draw.chance(0.3) else heads
    key_heads += draw.chance(0.03)
    arguments: Arguments = {
        "query": draw.tensor(draw.normal((batch, heads, queries, width), spread), kind),
        "key": draw.tensor(
            draw.normal((batch, key_heads, keys, width), spread), kind if draw.chance(0.8) else draw.choice(kinds)
        ),
        "concept_index": index,
    }
    if draw.chance(0.5):
        arguments["concept_weight"] = draw.tensor(draw.normal((batch, groups, slots)))
    if draw.chance(0.4):
        lse = draw.normal((batch, heads, queries + draw.choice((0, 0, 3))), 3) + 3
        lse = draw.tensor(lse, draw.choice((torch.float32, torch.float64)))
        arguments["lse"] = lse[..., None] if draw.chance(0.2) else lse
    if draw.chance(0.4):
        arguments["scale"] = draw.choice((0.1, 1, 0.0, -0.3, 1e-3, np.float32(0.5)))
    if draw.chance(0.4):
        arguments["head_weight"] = draw.tensor(draw.normal((heads,)))
    if draw.chance(0.3):
        bias = draw.normal((batch, keys), 3)
        arguments["key_bias"] = draw.tensor(bias.masked_fill(bias > 4, -torch.inf))
    if draw.chance(0.25):
        arguments["out"] = draw.tensor(torch.zeros(batch, groups, queries)).detach().clone()
    return arguments


def draw_allocate(draw: Draw) -> Arguments:
    rows, columns, batch, groups = draw.size(33), draw.size(33), draw.size(5, 0), draw.size(5, 0)
    grid = (draw.size(5), rows, columns) if draw.chance(0.3) else (rows, columns)
    steps = (draw.size(3, 0),) if draw.chance(0.3) else ()
    maps = draw.uniform((*steps, batch, groups, math.prod(grid)), 0, 1) ** draw.choice((1, 4))
    if draw.chance(0.2) and groups:
        maps[..., draw.randrange(groups), :] = 0
    maps = maps * draw.choice((1.0, 1.0, 1.0, 1e-3, 1e-30, 1e30))
    arguments: Arguments = {"maps": draw.tensor(maps), "grid": draw.choice((grid, list(grid)))}
    options = {
        "combine": ("mean", "max"),
        "smooth": (0, 0.5, 1.0, 2.7, 50.0, 1e-3, 1e-300, 1e10, 1e308, math.inf),
        "sharpen": (1, 0.5, 2.0, 3.7, 20.0, 1e-3, 1e-6),
        "cap": (4.0, 1, 0.3, 100, math.inf, 1e-3, 1e-6, 1e300),
        "mix": (0.5, 0, 1, 1.0, 0.999, 1e-300, np.float32(0.5)),
        "patch": (1, 2, 3, 7, np.int64(2)),
    }
    return arguments | {name: draw.choice(values) for name, values in options.items() if draw.chance(0.6)}


def draw_gaussian_step(draw: Draw) -> Arguments:
    shape = tuple(draw.size(17, 0) for _ in range(draw.randint(2, 5)))
    if draw.chance(0.2):
        shape = (draw.size(5), draw.choice((1023, 1024, 1025, 2500)))
    kind = draw.type()
    pick = lambda: draw.tensor(draw.normal(shape), kind if draw.chance(0.6) else None)
    arguments = {"sample": pick(), "velocity": pick(), "noise": pick(), "transition": transition(draw, shape[0])}
    if draw.chance(0.4):
        arguments |= {"unconditional_velocity": pick(), "guidance_scale": draw.choice((4.5, 1, 0.0, -2, 1e30, 7))}
    if draw.chance(0.4):
        seeds = torch.randint(-(2**62), 2**62, (shape[0],), generator=draw.generator)
        arguments |= {"noise": None} | ({"seeds": seeds} if draw.chance(0.7) else {})
    return arguments


def latents_shape(draw: Draw) -> tuple[int, ...]:
    batch, channels = draw.size(5), draw.size(17)
    kind = draw.random()
    if kind < 0.05:  # more locations than a task of a kernel takes at once
        return (batch, 2, 70, draw.choice((41, 64)))
    if kind < 0.3:
        return (batch, draw.size(129), channels)
    if kind < 0.4:
        return (batch, channels, 2, draw.size(9), draw.size(9))
    return (batch, channels, draw.size(33), draw.size(33))


def draw_policy_loss(draw: Draw) -> Arguments:
    shape = latents_shape(draw)
    batch, channel = shape[0], 2 if len(shape) == 3 else 1
    locations = shape[:channel] + shape[channel + 1 :]
    kind, ratio = draw.type(), draw.choice(("token", "location", "sample"))
    pick = lambda: kind if draw.chance(0.6) else draw.type()
    field = lambda values: values.detach().double().view(-1, *(1,) * (len(shape) - 1))
    step = transition(draw, batch)
    velocity = draw.tensor(draw.normal(shape), kind)
    sample = draw.tensor(draw.normal(shape), pick())
    drift = draw.choice((0.0, 1e-4, 1e-2, 0.1))
    old_velocity = velocity.detach().double() + draw.normal(shape, drift)
    old_mean = field(step.a) * sample.detach().double() + field(step.b) * old_velocity
    # A ratio of 1 but for roundings is on either side of a range without width.
    narrow = (0, [0.0, 0.5]) if drift >= 1e-2 else ()
    prev_sample = draw.tensor(old_mean + field(step.s) * draw.normal(shape), pick())
    arguments: Arguments = {
        "velocity": velocity,
        "sample": sample,
        "prev_sample": prev_sample,
        "transition": step,
        "advantages": draw.tensor(draw.normal((batch,) if ratio == "sample" or draw.chance(0.7) else locations)),
        "ratio": ratio,
        "clip_range": draw.choice((1e-4, 1e-2, 0.2, (0.1, 0.3), [0.01, 0.5], 5.0, math.inf, *narrow)),
    }
    if draw.chance(0.6):
        arguments["weights"] = draw.tensor(draw.choice((draw.uniform, draw.uniform, draw_mask))(locations, 0, 2))
    if draw.chance(0.7):
        arguments |= {"old_mean": draw.tensor(old_mean, pick()), "guard": draw.chance(0.3)}
    else:
        each = ratio == "location" or "weights" in arguments or draw.chance(0.3)
        plain = Transition(*(value.detach() for value in step))
        old = sk.log_prob(prev_sample.detach(), old_mean, plain, per_location=each)
        arguments["old_log_prob"] = draw.tensor(old, draw.choice((torch.float32, torch.float64)))
    if draw.chance(0.4):
        reference = velocity.detach().double() + draw.normal(shape, draw.choice((0.0, 1e-4, 1.0)))
        arguments |= {
            "reference_velocity": draw.tensor(reference, pick()),
            "kl_coef": draw.choice((0, 0.04, 1.0, -1.0)),
        }
    if draw.chance(0.3):
        arguments["step_weights"] = draw.tensor(draw.uniform((batch,), 0, 2))
    if draw.chance(0.3):
        arguments["adv_clip"] = draw.choice((0.5, 1e-3, 1e30, math.inf))
    return arguments


def draw_nft_loss(draw: Draw) -> Arguments:
    shape = latents_shape(draw)
    batch, channel = shape[0], 2 if len(shape) == 3 else 1
    locations = shape[:channel] + shape[channel + 1 :]
    kind = draw.type()
    pick = lambda: kind if draw.chance(0.6) else draw.type()
    sigma = draw.choice((draw.uniform, draw.uniform, draw_mask))((batch,), 0, 1)
    clean, noise = draw.normal(shape), draw.normal(shape)
    at = sigma.view(-1, *(1,) * (len(shape) - 1))
    old_velocity = noise - clean + draw.normal(shape, draw.choice((0.0, 0.1, 1.0)))
    places = (batch,) if draw.chance(0.6) else locations
    arguments: Arguments = {
        "velocity": draw.tensor(old_velocity + draw.normal(shape, draw.choice((0.0, 1e-4, 0.1, 1.0))), kind),
        "old_velocity": draw.tensor(old_velocity, pick()),
        "sample": draw.tensor((1 - at) * clean + at * noise, pick()),
        "clean": draw.tensor(clean, pick()),
        "sigma": draw.tensor(sigma),
        "reward_prob": draw.tensor(draw.choice((draw.uniform, draw.uniform, draw_mask))(places, 0, 1)),
    }
    if draw.chance(0.6):
        arguments["weights"] = draw.tensor(draw.choice((draw.uniform, draw.uniform, draw_mask))(locations, 0, 2))
    if draw.chance(0.4):
        reference = old_velocity + draw.normal(shape, draw.choice((0.0, 1e-4, 1.0)))
        arguments |= {
            "reference_velocity": draw.tensor(reference, pick()),
            "kl_coef": draw.choice((0, 1e-4, 1.0, -1.0)),
        }
    options = {
        "beta": (1.0, 0.1, 3, 1e-3, np.float32(0.5)),
        "adaptive": (True, False),
        "adaptive_min": (1e-5, 1e-30, 0.7, 10),
        "adv_clip": (5.0, 1, 1e-3, 1e30),
    }
    return arguments | {name: draw.choice(values) for name, values in options.items() if draw.chance(0.4)}


def draw_mask(shape: tuple[int, ...], low: float, high: float) -> Tensor:
    """Zeros and ones, or of another height, as a reward's mask makes of weights."""
    return (torch.arange(math.prod(shape)) % 2 * high).view(shape).double()


CASES: dict[str, Callable[[Draw], Arguments]] = {
    "attention_maps": draw_attention_maps,
    "allocate": draw_allocate,
    "gaussian_step": draw_gaussian_step,
    "policy_loss": draw_policy_loss,
    "nft_loss": draw_nft_loss,
}


def draw_case(operator: str, seed: int, impl: str) -> Arguments:
    draw = Draw(f"{operator} {seed}", impl)
    arguments = CASES[operator](draw)
    tensors = [name for name, value in arguments.items() if isinstance(value, Tensor) and value.numel()]
    floats = [name for name in tensors if arguments[name].is_floating_point() and name != "out"]
    kind = draw.random()
    if kind < 0.12 and floats:
        name = draw.choice(floats)
        arguments[name] = draw.with_odd_values(arguments[name])
    elif kind < 0.3:
        name = draw.choice([*arguments])
        if isinstance(arguments[name], Transition):
            field = draw.choice(Transition._fields)
            value = getattr(arguments[name], field)
            odd = value.numel() and draw.chance(0.5)
            changed = draw.with_odd_values(value) if odd else draw.wrong(value)
            arguments[name] = arguments[name]._replace(**{field: changed})
        else:
            arguments[name] = draw.wrong(arguments[name])
    return arguments


def converted(arguments: Arguments, convert: Callable[[Tensor], Tensor]) -> Arguments:
    """Every floating tensor as `convert` makes it."""

    def one(value: Any) -> Any:
        if isinstance(value, Transition):
            return Transition(*map(one, value))
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return convert(value) if is_float else value

    return {name: one(value) for name, value in arguments.items()}


def is_plain(value: Any) -> bool:
    """A tensor whose values can be compared."""
    return isinstance(value, Tensor) and value.device.type == "cpu" and api.is_dense(value) and value.itemsize > 1


def run(operator: str, arguments: Arguments, impl: str) -> list[Tensor] | Exception:
    """What a call returns, with the velocity's gradient, or what it raises."""
    arguments = dict(arguments)
    velocity = arguments.get("velocity")
    has_gradient = operator in ("policy_loss", "nft_loss") and is_plain(velocity) and velocity.is_floating_point()
    if has_gradient:
        arguments["velocity"] = velocity.detach().requires_grad_()
    if isinstance(arguments.get("out"), Tensor):
        arguments["out"] = arguments["out"].detach().clone()
    try:
        result = getattr(sk, operator)(**arguments, impl=impl)
        if isinstance(result, sk.PolicyLoss | sk.NFTLoss):
            gradient = torch.autograd.grad(result.loss, arguments["velocity"]) if has_gradient else ()
            return [result.loss.detach(), result.statistics.values, *gradient]
        return [result] if isinstance(result, Tensor) else list(result)
    except Exception as error:
        return error


def same(x: Tensor, y: Tensor) -> bool:
    """Equal, NaN to NaN."""
    return torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(0, 1, 2), y.nan_to_num(0, 1, 2))


def error_faults(got: list[Tensor] | Exception, expected: list[Tensor] | Exception) -> list[str]:
    """How two outcomes differ of which at least one is an error."""
    words = [f"{type(one).__name__}: {one}" if isinstance(one, Exception) else "returns" for one in (got, expected)]
    if words[0].startswith("RuntimeError: impl="):  # it cannot run on that device, and says so
        return []
    found = [f"not one line: {text!r}" for text in words if "\n" in text]
    if words[0] != words[1]:
        found.append(f"{words[0]!r}, the reference {words[1]!r}")
    if isinstance(got, Exception) and not isinstance(got, TypeError | ValueError):
        found.append(f"raises {words[0]!r}")
    return found


def has_steady_gates(arguments: Arguments, expected: Tensor, truth: Tensor) -> bool:
    """Whether no ratio is so near an edge of the clip range that a rounding decides on which side it is."""
    means, shares = slice(4, 7), slice(1, 4)
    error = TIMES * (expected[means] - truth[means]).abs().max().item()
    clip = arguments["clip_range"]
    low, high = clip if isinstance(clip, tuple | list) else (clip, clip)
    for sign in (-1, 1):
        nudged = tuple(max(0.0, edge + sign * (1e-3 * edge + error + 1e-6)) for edge in (low, high) if edge < math.inf)
        nudged = nudged if len(nudged) == 2 else (low, high)
        moved = run("policy_loss", converted(arguments, Tensor.double) | {"clip_range": nudged}, "reference")
        if isinstance(moved, Exception) or not torch.equal(moved[1][shares], truth[shares]):
            return False
    return True


def exponent_size(operator: str, arguments: Arguments) -> float:
    """The largest of what is subtracted below an exponential: roundings grow with it."""
    finite = lambda name: arguments[name].detach().double().nan_to_num(0, 0, 0).abs()
    sizes = [0.0]
    if operator == "attention_maps" and arguments["key"].numel() and arguments["query"].numel():
        scale = arguments.get("scale")
        scale = arguments["query"].shape[-1] ** -0.5 if scale is None else float(scale)
        shared = arguments["query"].shape[1] // arguments["key"].shape[1]
        keys = finite("key").repeat_interleave(shared, 1)
        sizes.append(abs(scale) * (finite("query") @ keys.transpose(-1, -2)).max().item())
    given = [name for name in ("lse", "key_bias", "old_log_prob") if isinstance(arguments.get(name), Tensor)]
    sizes += [finite(name).max().item() for name in given if arguments[name].numel()]
    return max(sizes)


def value_faults(operator: str, arguments: Arguments, got: list[Tensor], expected: list[Tensor]) -> list[str]:
    """How results differ, by the reference and by what it computes in float64."""
    for i, (x, y) in enumerate(zip(got, expected, strict=True)):
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            return [f"output {i}: {tuple(x.shape)} {x.dtype}, the reference {tuple(y.shape)} {y.dtype}"]
        if not is_plain(x) or not x.numel():
            return []
    if operator == "gaussian_step":
        return [f"output {i}: other bits" for i, (x, y) in enumerate(zip(got, expected, strict=True)) if not same(x, y)]
    exact = any(arguments[name].dtype == torch.float64 for name in IN_ARITHMETIC if name in arguments)
    size = exponent_size(operator, arguments)
    if size > (1e10 if exact else 1e4):  # the roundings of such an exponent are larger than what it says
        return []
    truth = run(operator, converted(arguments, Tensor.double), "reference")
    if isinstance(truth, Exception):
        return [f"the reference raises in float64: {truth}"]
    steady = operator != "policy_loss" or has_steady_gates(arguments, expected[1], truth[1])
    found = []
    for i, (x, y, z) in enumerate(zip(got, expected, truth, strict=True)):
        # Near the end of float32's range one order of a sum overflows and another does not.
        inside = ~(z.isfinite() & (z.abs() > HUGE))
        if (x.isfinite() != y.isfinite())[inside].any():
            counts = [int((one.isfinite() & inside).sum()) for one in (x, y)]
            found.append(f"output {i}: {counts[0]} values are finite, of the reference {counts[1]}")
        if i > 0 and not steady:
            continue
        finite = x.isfinite() & y.isfinite() & z.isfinite() & inside
        info = torch.finfo(x.dtype)
        x, y, z = (one.where(finite, 0).double() for one in (x, y, z))
        # In float64 the reference is the truth, and has errors of its own.
        largest = z.abs().max() + (1 if exact or size > 1 else 0)
        roundings = ROUNDINGS**3 if exact else ROUNDINGS * (1 + size)
        eps = info.eps if exact else max(info.eps, torch.finfo(torch.float32).eps)
        bound = TIMES * (y - z).abs().max() + eps * roundings * largest + info.tiny
        if (x - z).abs().max() > bound:
            found.append(f"output {i}: off by {(x - z).abs().max():.3g}, the reference by {(y - z).abs().max():.3g}")
    return found


class Outcome(NamedTuple):
    operator: str
    seed: int
    raised: bool
    faults: list[str]


def try_case(operator: str, seed: int, impl: str) -> Outcome:
    """A case by an implementation and by the reference."""
    arguments = draw_case(operator, seed, impl)
    inputs = [x for value in arguments.values() for x in (value if isinstance(value, Transition) else [value])]
    inputs = [(x, x.detach().clone()) for x in inputs if is_plain(x)]
    got, expected = run(operator, arguments, impl), run(operator, arguments, "reference")
    if isinstance(got, Exception) or isinstance(expected, Exception):
        faults = error_faults(got, expected)
    else:
        faults = value_faults(operator, arguments, got, expected)
    if not all(same(x.detach(), before) for x, before in inputs):
        faults.append("an input was changed")
    return Outcome(operator, seed, isinstance(got, Exception), faults)


@cache
def prepare(impl: str) -> None:
    """Load what an implementation needs beyond the package."""
    if impl.startswith("cuda_"):
        cuda_on_host.load(cuda_on_host.build(Path(__file__).parents[1] / "build" / "cuda_on_host"))
        resolve = api.resolve
        api.resolve = lambda operator, impl, *rest: impl if "cuda_" in impl else resolve(operator, impl, *rest)
    if impl == "triton":
        import triton_bfloat16  # noqa: F401


def work(results: Connection, impl: str, cases: list[tuple[str, int]]) -> None:
    torch.set_num_threads(1)
    np.seterr(all="ignore")
    prepare(impl)
    for case in cases:
        signal.alarm(SECONDS)
        results.send(try_case(*case, impl))


def outcomes(impl: str, cases: list[tuple[str, int]], workers: int) -> Iterator[Outcome]:
    """Of all cases, by processes of their own: one that dies costs its case alone."""
    context = multiprocessing.get_context("spawn")
    left: dict[Connection, tuple[Any, list[tuple[str, int]]]] = {}

    def start(cases: list[tuple[str, int]]) -> None:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(sender, impl, cases))
        process.start()
        sender.close()
        left[receiver] = (process, cases)

    for worker in range(workers):
        start(cases[worker::workers])
    while left:
        for receiver in wait(list(left)):
            process, todo = left[receiver]
            try:
                yield receiver.recv()
                todo.pop(0)
            except EOFError:
                del left[receiver]
                process.join()
                if todo:
                    why = "hangs" if process.exitcode == -signal.SIGALRM else f"dies, exit code {process.exitcode}"
                    yield Outcome(*todo[0], True, [f"the process {why}"])
                    start(todo[1:])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=20000)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--operator", choices=CASES, help="default: all of them by turns")
    parser.add_argument(
        "--impl", default="native", choices=["native", "triton", *map("cuda_{}".format, cuda_on_host.ORDERS)]
    )
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    operators = [options.operator] if options.operator else list(CASES)
    if options.impl.startswith("cuda_"):
        operators = [name for name in operators if name in cuda_on_host.LAUNCHERS]
    seeds = range(options.seed, options.seed + options.cases)
    cases = [(operators[seed % len(operators)], seed) for seed in seeds]
    begin, counts = time.monotonic(), Counter[str]()
    for one in outcomes(options.impl, cases, options.workers):
        counts[f"{one.operator} {'raised' if one.raised else 'returned'}"] += 1
        if one.faults:
            counts["faults"] += 1
            again = f"--impl {options.impl} --operator {one.operator} --seed {one.seed} --cases 1"
            print(f"python tests/fuzz.py {again}  # {'; '.join(one.faults)}", flush=True)
    faults = counts.pop("faults", 0)
    print(", ".join(f"{name} {count}" for name, count in sorted(counts.items())))
    print(f"{options.impl}: {sum(counts.values())} cases in {time.monotonic() - begin:.0f} s, {faults} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
