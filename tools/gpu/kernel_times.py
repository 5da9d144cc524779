"""The operators on this machine's GPU: right first, then how long the kernels and the calls from Python take.

    TORCH_CUDA_ARCH_LIST=9.0 STAR_CUDA=1 python setup.py build_ext --inplace
    PYTHONPATH=.:python:benchmarks python tools/gpu/kernel_times.py [FOLDER]    # default $OUT, else build/kernel_times

Writes kernel_times.json and kernel_times.md into the folder, anew after every row, and ends within four minutes. Needs
torch and Triton; the comparison with Flow-GRPO's loss needs benchmarks/, numpy and scipy. With --once it calls
the CUDA operators once, for compute-sanitizer.

A time is that of one call in a CUDA graph of calls on different tensors, together larger than the second-level cache:
what a kernel finds there is what the same call left. Quartiles are over the replays.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

import star_kernels as sk
from star_kernels import native
from star_kernels.ops import NFT_LOSS, OPERATORS, POLICY_LOSS

ROOT = Path(__file__).resolve().parents[2]
BEGIN, LIMIT = time.monotonic(), 230.0
REPLAYS = 31
CHANNELS = 16
CLIP = 1e-4
# name, heads, channels of a head, side of the grid of image tokens, text tokens
MODELS = (
    ("SD3.5-medium, 512 px", 24, 64, 32, 205),
    ("SD3.5-medium, 1024 px", 24, 64, 64, 205),
    ("SD3.5-large, 512 px", 38, 64, 32, 205),
    ("SD3.5-large, 1024 px", 38, 64, 64, 205),
    ("FLUX.1, 1024 px", 24, 128, 64, 512),
)
BATCHES = (1, 9)
CONCEPTS, SLOTS = 2, 8
STEPS = 9  # that a rollout trains on


@dataclass
class Row:
    """times: microseconds, the quartiles. bytes: that the call's tensors have, each counted as often as a kernel has to
    read or write it. share: of a copy's rate. ok: None where nothing is promised."""

    part: str
    name: str
    times: tuple[float, float, float] | None = None
    bytes: int = 0
    share: float | None = None
    note: str = ""
    ok: bool | None = None


def left() -> float:
    return LIMIT - (time.monotonic() - BEGIN)


# --- tensors ----------------------------------------------------------------------------------------------------------


def transition(batch: int) -> sk.Transition:
    """A step at sigma 0.7 of ten, noise 0.7."""
    sigma, dt = torch.full((batch,), 0.7), torch.full((batch,), -0.08)
    std = 0.7 * (sigma / (1 - sigma)).sqrt()
    a, b = 1 + std**2 / (2 * sigma) * dt, (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    return sk.Transition.gaussian(a, b, std * (-dt).sqrt(), std)


def loss_arguments(shape: tuple[int, ...], dtype: torch.dtype, ratio: str = "token") -> tuple:
    """Of the operator, for a policy that has drifted a little since the step; old means are float32 or better."""
    batch, _, rows, columns = shape
    step = transition(batch)
    sample, velocity, noise = (torch.randn(shape).to(dtype) for _ in range(3))
    prev_sample, old_mean = sk.gaussian_step(sample, velocity, noise, step)
    velocity = (velocity.double() + 0.1 * torch.randn(shape)).to(dtype)
    weights = sk.allocate(torch.rand(batch, CONCEPTS, rows * columns // 4), (rows // 2, columns // 2))
    return (velocity, sample, prev_sample, *step, torch.randn(batch), weights, old_mean, None, None, None,
            ratio, CLIP, CLIP, 5.0, 0.0, False)  # fmt: skip


def nft_arguments(shape: tuple[int, ...], dtype: torch.dtype) -> tuple:
    """With weights and a reward for each sample, without a reference velocity."""
    velocity, old_velocity, sample, clean = torch.randn(4, *shape).to(dtype).unbind(0)
    sigma, reward_prob, weights = torch.rand(shape[0]), torch.rand(shape[0]), torch.rand(shape[0], *shape[2:]) + 0.5
    return velocity, old_velocity, sample, clean, sigma, reward_prob, weights, None, 1.0, True, 1e-5, 5.0, 0.0


def maps_arguments(batch: int, heads: int, width: int, side: int, text: int) -> tuple:
    """Of the operator, as capture calls it; bfloat16."""
    tokens = side * side
    query = torch.randn(batch, heads, tokens, width, dtype=torch.bfloat16)
    key = torch.randn(batch, heads, tokens + text, width, dtype=torch.bfloat16)
    index = torch.randint(tokens, tokens + text, (batch, CONCEPTS, SLOTS))
    lse = torch.full((batch, heads, tokens), 10.0)
    return query, key, index, torch.ones(index.shape), lse, width**-0.5, None, None


def size_of(*arguments: object) -> int:
    return sum(a.nbytes for a in arguments if isinstance(a, Tensor))


def to_double(arguments: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments)


# --- right ------------------------------------------------------------------------------------------------------------


def close(name: str, got: Tensor, expected: Tensor, tolerance: float) -> Row:
    """The largest error in units of the largest expected value."""
    error = ((got.double() - expected).abs().max() / expected.abs().max().clamp_min(1e-300)).item()
    return Row("right", name, note=f"error {error:.1e}, at most {tolerance:.1e}", ok=error <= tolerance)


def nft_correctness(impl: str, dtype: torch.dtype) -> Iterator[Row]:
    name, small = f"nft_loss, {impl}, {str(dtype)[6:]}", 1e-11 if dtype == torch.float64 else 2e-5
    arguments = nft_arguments((3, CHANNELS, 40, 40), dtype)
    exact = to_double(arguments)
    got, expected = NFT_LOSS.run(impl)(*arguments), NFT_LOSS.run("reference")(*exact)
    grad_loss = torch.tensor(2.0**10, dtype=got[0].dtype)
    gradient = NFT_LOSS.gradient.run(impl)(grad_loss, got[2], *arguments)
    reference = NFT_LOSS.gradient.run("reference")(grad_loss.double(), expected[2], *exact)
    yield close(f"{name}: loss", got[0], expected[0], small)
    yield close(f"{name}: statistics", got[1], expected[1], 1e-6 + small)
    yield close(f"{name}: gradient", gradient, reference, small + torch.finfo(dtype).eps)


def step_arguments(shape: tuple[int, ...], dtype: torch.dtype, guided: bool, noised: bool) -> tuple:
    """Of the operator: latents in float32 or better, velocities in dtype, noise of the caller's or drawn."""
    latents = torch.promote_types(dtype, torch.float32)
    sample, noise = (torch.randn(shape, dtype=latents) if used else None for used in (True, noised))
    velocity, unconditional = (torch.randn(shape).to(dtype) if used else None for used in (True, guided))
    seeds = None if noised else torch.arange(shape[0]) * 7919 + 2**40
    return sample, velocity, noise, *transition(shape[0])[:3], unconditional, 4.5 if guided else 1.0, seeds


def step_correctness(dtype: torch.dtype) -> Iterator[Row]:
    """By the reference in float64, and CUDA, Triton and plain PyTorch by each other: the same bits."""
    for guided, noised, side in product((False, True), (False, True), (32, 31)):  # 31: not by vectors
        arguments = step_arguments((2, 5, side, side), dtype, guided, noised)
        run = OPERATORS["gaussian_step"].run
        got, exact = run("native")(*arguments), run("reference")(*to_double(arguments))
        name = f"gaussian_step {side}, {str(dtype)[6:]}{', guided' * guided}{', drawn' * (not noised)}"
        yield close(name, got[0], exact[0], 1e-6)
        others = [run(impl)(*arguments) for impl in ("triton", "reference")]
        same = all(torch.equal(x, y) for other in others for x, y in zip(other, got, strict=True))
        yield Row("right", f"{name}: the same bits in CUDA, Triton and PyTorch", ok=same)
    if not torch.cuda.is_available():
        return
    arguments = step_arguments((9, CHANNELS, 64, 64), dtype, True, False)
    there = OPERATORS["gaussian_step"].run("native")(*arguments)
    here = OPERATORS["gaussian_step"].run("reference")(*(a.cpu() if isinstance(a, Tensor) else a for a in arguments))
    same = all(torch.equal(x.cpu(), y) for x, y in zip(there, here, strict=True))
    yield Row("right", f"gaussian_step, {str(dtype)[6:]}: the same bits on the CPU, drawn noise too", ok=same)


def steps_correctness() -> Iterator[Row]:
    """allocate for all steps of a rollout at once: the bits of each step alone."""
    maps = torch.rand(STEPS, 3, CONCEPTS, 32 * 32)
    maps[1, 0] = 0
    for impl in ("native", "triton"):
        together = sk.allocate(maps, (32, 32), smooth=1.0, impl=impl)
        alone = torch.stack([sk.allocate(step, (32, 32), smooth=1.0, impl=impl) for step in maps])
        yield Row(
            "right", f"allocate of {STEPS} steps, {impl}: the bits of each alone", ok=torch.equal(together, alone)
        )


def correctness() -> Iterator[Row]:
    """Every operator against the reference in float64."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        eps, kind = torch.finfo(dtype).eps, str(dtype)[6:]
        for ratio in ("token", "location", "sample"):
            side = 128 if ratio == "token" else 64  # the sizes of tile that the launcher chooses
            arguments = loss_arguments((9, CHANNELS, side, side), dtype, ratio)
            exact = to_double(arguments)
            (loss, seen, log_ratio), (expected, wanted, exact_ratio) = (
                POLICY_LOSS.run(impl)(*some) for impl, some in (("native", arguments), ("reference", exact))
            )
            grad_loss = torch.tensor(2.0**10, dtype=loss.dtype)
            gradient = POLICY_LOSS.gradient.run("native")(grad_loss, log_ratio, *arguments)
            # From the same log-ratios, so that no gate falls to the other side.
            reference = POLICY_LOSS.gradient.run("reference")(grad_loss.double(), log_ratio.double(), *exact)
            name = f"policy_loss, {ratio}, {kind}"
            small = 1e-11 if dtype == torch.float64 else 2e-5
            yield close(f"{name}: log-ratio", log_ratio, exact_ratio, small)
            yield close(f"{name}: loss", loss, expected, small)
            yield close(f"{name}: statistics", seen[4:7], wanted[4:7].double(), 1e-6)
            yield close(f"{name}: gradient", gradient, reference, small + eps)
        for impl in ("native", "triton"):
            yield from nft_correctness(impl, dtype)
        yield from step_correctness(dtype)
        maps = torch.rand(9, CONCEPTS, 64 * 64).to(dtype)
        for smooth in (0.0, 1.0):
            options = (64, 64, "mean", smooth, 1.0, 4.0, 0.5, 2)
            got, expected = OPERATORS["allocate"].run("native")(maps, *options), OPERATORS["allocate"].run("reference")
            yield close(f"allocate, smooth {smooth:g}, {kind}", got, expected(maps.double(), *options), 1e-5)
    yield from steps_correctness()
    for name, heads, width, side, text in MODELS[::2]:
        arguments = maps_arguments(2, heads, width, side, text)
        got, expected = (OPERATORS["attention_maps"].run(impl)(*some) for impl, some in
                         (("triton", arguments), ("reference", to_double(arguments))))  # fmt: skip
        yield close(f"attention_maps, {name}", got, expected, 1e-4)
    arguments = loss_arguments((9, CHANNELS, 64, 64), torch.float32)
    runs = [POLICY_LOSS.run("native")(*arguments) for _ in range(20)]
    same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
    yield Row("right", "policy_loss: the same bits in 20 runs", ok=same)


# --- how long ---------------------------------------------------------------------------------------------------------


def in_a_graph(make: Callable[[], tuple], call: Callable[..., object], bytes_of_a_call: int) -> tuple[float, ...]:
    """Quartiles of the seconds of call(*make()), with new tensors for each call until they exceed the cache twice."""
    cache = torch.cuda.get_device_properties().L2_cache_size
    copies = min(192, max(4, math.ceil(2 * cache / max(bytes_of_a_call, 1))))
    sets = [make() for _ in range(copies)]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for arguments in sets[:2]:
            call(*arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    kept = []  # or a result would take the memory, and the cache, of the one before
    with torch.cuda.graph(graph):
        for arguments in sets:
            kept.append(call(*arguments))
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e-3 / copies)
    return tuple(statistics.quantiles(times, n=4))


def timed(name: str, make: Callable[[], tuple], call: Callable[..., object], size: int, rate: float) -> Row:
    """rate: bytes/s of a copy."""
    if left() < 20:
        return Row("kernels", name, note="no time left", ok=False)
    low, middle, high = in_a_graph(make, call, size)
    return Row("kernels", name, (1e6 * low, 1e6 * middle, 1e6 * high), size, size / middle / rate)


def copy_rate() -> float:
    """Bytes read and written per second by a copy of 1 GiB."""
    source = torch.empty(1 << 28)
    target = torch.empty_like(source)
    return 2 * source.nbytes / in_a_graph(lambda: (target, source), Tensor.copy_, source.nbytes)[1]


def loss_rows(rate: float, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[Row]:
    """The loss, its gradient, and the two one after the other."""
    loss, gradient, one = POLICY_LOSS.run("native"), POLICY_LOSS.gradient.run("native"), torch.ones(())
    arguments = loss_arguments(shape, dtype)
    log_ratio, old_mean = loss(*arguments)[2], arguments[11]
    read = size_of(*arguments)
    again = read - old_mean.nbytes + arguments[0].nbytes  # without the old mean, with the gradient
    make, name = partial(loss_arguments, shape, dtype), f"policy_loss {shape}, {str(dtype)[6:]}"
    yield timed(f"{name}: loss", make, loss, read, rate)
    yield timed(f"{name}: gradient", make, partial(gradient, one, log_ratio), again, rate)
    yield timed(f"{name}: loss and gradient", make, lambda *a: gradient(one, loss(*a)[2], *a), read + again, rate)


def nft_row(rate: float, shape: tuple[int, ...], dtype: torch.dtype, impl: str) -> Row:
    """The loss and its gradient one after the other."""
    loss, gradient, one = NFT_LOSS.run(impl), NFT_LOSS.gradient.run(impl), torch.ones(())
    arguments = nft_arguments(shape, dtype)
    size = 2 * size_of(*arguments) + arguments[0].nbytes  # the inputs twice, the gradient
    name = f"nft_loss {shape}, {str(dtype)[6:]}, {impl}: loss and gradient"
    return timed(name, partial(nft_arguments, shape, dtype), lambda *a: gradient(one, loss(*a)[2], *a), size, rate)


def step_rows(rate: float, shape: tuple[int, ...]) -> Iterator[Row]:
    """The plain step, the same with guidance and with noise drawn in it, and what PyTorch's own operations take."""
    elements = math.prod(shape)

    def eager(sample: Tensor, velocity: Tensor, noise: None, a: Tensor, b: Tensor, s: Tensor, unconditional: Tensor,
              scale: float, seeds: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        c, u = velocity.float(), unconditional.float()
        a, b, s = (field.view(-1, 1, 1, 1) for field in (a, b, s))
        mean = a * sample + b * (u + scale * (c - u))
        return mean + s * torch.randn_like(sample), mean

    for dtype, guided, noised in (
        (torch.float32, False, True),
        (torch.bfloat16, False, True),
        (torch.bfloat16, True, True),
        (torch.bfloat16, True, False),
    ):
        make = partial(step_arguments, shape, dtype, guided, noised)
        size = elements * (3 * 4 + dtype.itemsize * (1 + guided) + 4 * noised)
        name = f"gaussian_step {shape}, {str(dtype)[6:]}{', guided' * guided}{', noise drawn' * (not noised)}"
        for impl in ("native", "triton"):
            yield timed(f"{name}, {impl}", make, OPERATORS["gaussian_step"].run(impl), size, rate)
    yield timed(f"{name}, PyTorch's own operations", make, eager, size, rate)


def allocate_row(rate: float, batch: int, side: int, smooth: float, steps: int = 1) -> Row:
    allocate, tokens, samples = OPERATORS["allocate"].run("native"), side * side, steps * batch
    call = lambda maps: allocate(maps, side, side, "mean", smooth, 1.0, 4.0, 0.5, 2)
    note = "the default" if smooth == 0 else f"smooth {smooth:g}"
    make, size = (lambda: (torch.rand(samples, CONCEPTS, tokens),)), 4 * samples * tokens * (CONCEPTS + 4)
    name = f"allocate {f'{steps} steps x ' if steps > 1 else ''}{batch} x {side} x {side} tokens, patch 2, {note}"
    return timed(name, make, call, size, rate)


def maps_row(rate: float, name: str, batch: int, *model: int) -> Row:
    query, key, index, _, lse, *_ = maps_arguments(batch, *model)
    columns = batch * query.shape[1] * CONCEPTS * SLOTS * query.shape[3] * key.element_size()
    size = size_of(query, index, lse) + columns + 4 * batch * CONCEPTS * query.shape[2]
    make, run = partial(maps_arguments, batch, *model), OPERATORS["attention_maps"].run("triton")
    return timed(f"attention_maps, {name}, {batch}", make, run, size, rate)


def kernels() -> Iterator[Row]:
    rate = copy_rate()
    yield Row("kernels", "copy of 1 GiB", note=f"{rate / 1e12:.2f} TB/s, reading and writing")
    empty = torch.zeros(32)
    yield timed("an empty launch: 128 bytes set to 0", lambda: (empty,), Tensor.zero_, 128, rate)
    for side, batch in product((64, 128), BATCHES):
        shape = (batch, CHANNELS, side, side)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            yield from loss_rows(rate, shape, dtype)
        for impl in ("native", "triton"):
            yield nft_row(rate, shape, torch.bfloat16, impl)
        yield from step_rows(rate, shape)
        for smooth in (0.0, 1.0):
            yield allocate_row(rate, batch, side // 2, smooth)
        yield allocate_row(rate, batch, side // 2, 0.0, STEPS)
    for (name, *model), batch in product(MODELS, BATCHES):
        yield maps_row(rate, name, batch, *model)
        torch.cuda.empty_cache()


def calls() -> Iterator[Row]:
    """policy_loss from Python, and Flow-GRPO's formulas beside it. Not under torch.device("cuda"), which puts a Python
    function before every call and every attribute of a tensor."""
    from gpu_check import synchronized, told_of
    from losses import SHAPES, against_flow_grpo
    from runner import measure
    from verdicts import UNITS

    with torch.device("cuda"):
        arguments = loss_arguments((9, CHANNELS, 64, 64), torch.float32)
    velocity, sample, prev_sample = arguments[:3]
    velocity = velocity.clone().requires_grad_()
    step, advantages, weights, old_mean = sk.Transition(*arguments[3:9]), *arguments[9:12]

    def forward() -> Tensor:
        return sk.policy_loss(velocity, sample, prev_sample, step, advantages, weights, old_mean=old_mean).loss

    for name, function in (
        ("forward", forward),
        ("forward and backward", lambda: torch.autograd.grad(forward(), velocity)),
    ):
        times = []
        for _ in range(REPLAYS):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                function()
            times.append((time.perf_counter() - start) / 50)
        low, middle, high = (1e6 * t for t in statistics.quantiles(times, n=4))
        yield Row("calls", f"host time of policy_loss, {name}", (low, middle, high), note="without waiting for the GPU")
    for compiled, goal in ((False, 8.0), (True, 3.0)):
        for pixels, shape in SHAPES.items():
            name = f"policy_loss {shape} against {'compiled' if compiled else 'eager'} Flow-GRPO"
            if left() < 30:
                yield Row("calls", name, note="no time left", ok=False)
                continue
            with torch.device("cuda"):
                sides = [synchronized(against_flow_grpo(pixels, compiled)) for _ in range(4)]
            measured = measure(sides, UNITS["x"], goal, seconds=10)
            ours, theirs = (1e6 * statistics.median(side.seconds) for side in (measured.ours, measured.other))
            note = f"{told_of(measured, 'x')} (goal {goal:g} x): {ours:.0f} against {theirs:.0f} us"
            yield Row("calls", name, note=note, ok=measured.verdict == "met")


def sanitized() -> Iterator[Row]:
    """Every operator once under compute-sanitizer's checks."""
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("racecheck", "memcheck", "initcheck"):
        if sanitizer is None or left() < 15:
            yield Row("sanitizer", tool, note="not run: " + ("no time left" if sanitizer else "no compute-sanitizer"))
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, __file__, "--once"]
        try:
            result = subprocess.run(command, capture_output=True, text=True, timeout=max(5.0, left() - 5))
        except subprocess.TimeoutExpired:
            yield Row("sanitizer", tool, note="not done in time")
            continue
        lines = [line for line in result.stdout.splitlines() if "ERROR SUMMARY" in line or "RACECHECK SUMMARY" in line]
        yield Row("sanitizer", tool, note="; ".join(lines)[:200], ok=result.returncode == 0)


def once() -> None:
    """A call of each operator, with samples of several tiles and a last one that is cut."""
    for dtype, ratio in ((torch.float32, "token"), (torch.bfloat16, "location"), (torch.float16, "sample")):
        arguments = loss_arguments((3, CHANNELS, 24, 24), dtype, ratio)
        loss, _, log_ratio = POLICY_LOSS.run("native")(*arguments)
        POLICY_LOSS.gradient.run("native")(loss, log_ratio, *arguments)
    OPERATORS["allocate"].run("native")(torch.rand(3, 2, 144), 12, 12, "max", 1.0, 2.0, 4.0, 0.5, 2)
    for guided, side in ((True, 24), (False, 23)):
        OPERATORS["gaussian_step"].run("native")(*step_arguments((3, 15, side, side), torch.bfloat16, guided, False))
    nft = nft_arguments((3, CHANNELS, 24, 24), torch.bfloat16)
    for impl in ("native", "triton"):
        NFT_LOSS.gradient.run(impl)(torch.ones(()), NFT_LOSS.run(impl)(*nft)[2], *nft)
    torch.cuda.synchronize()


# --- what it says -----------------------------------------------------------------------------------------------------


def about() -> dict[str, str]:
    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    import triton

    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": subprocess.run(driver, capture_output=True, text=True).stdout.strip().splitlines()[0],
        "torch": torch.__version__,
        "triton": triton.__version__,
        **native.build_info(),
    }


def markdown(machine: dict[str, str], rows: list[Row]) -> str:
    lines = [f"{machine['gpu']}, driver {machine['driver']}, torch {machine['torch']}, Triton {machine['triton']}.", ""]
    lines += ["| | lower quartile | median | upper quartile | of a copy's rate | |", "|---|---|---|---|---|---|"]
    for row in rows:
        times = ["", "", ""] if row.times is None else [f"{t:.1f} us" for t in row.times]
        share = "" if row.share is None else f"{row.share:.0%}"
        verdict = "" if row.ok is None else "yes" if row.ok else "**no**"
        lines.append(f"| {row.name} | {' | '.join(times)} | {share} | {' '.join(filter(None, (row.note, verdict)))} |")
    return "\n".join(lines) + "\n"


class Report:
    """Prints every row and writes all of them anew."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.machine, self.rows = folder, about(), []
        print(json.dumps(self.machine), flush=True)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        times = "" if row.times is None else " / ".join(f"{t:.1f}" for t in row.times) + " us"
        share = "" if row.share is None else f"{row.share:.0%}"
        verdict = {None: "", True: "ok", False: "NO"}[row.ok]
        print(f"{row.part:9} {row.name}:", *filter(None, (times, share, row.note, verdict)), flush=True)
        (self.folder / "kernel_times.md").write_text(markdown(self.machine, self.rows))
        everything = {**self.machine, "rows": [asdict(row) for row in self.rows]}
        (self.folder / "kernel_times.json").write_text(json.dumps(everything, indent=1))

    def take(self, part: Callable[[], Iterator[Row]]) -> None:
        """All rows of a part; an error is its last one, so that the next part is measured all the same."""
        try:
            for row in part():
                self.add(row)
        except Exception as error:
            what = (str(error) or "-").splitlines()[0]
            self.add(Row(part.__name__, "stopped", note=f"{type(error).__name__}: {what}", ok=False))


def main() -> int:
    report = Report(Path((sys.argv[1:] or [os.environ.get("OUT", ROOT / "build" / "kernel_times")])[0]))
    with torch.device("cuda"):
        report.take(correctness)
        report.take(kernels)
    report.take(calls)
    report.take(sanitized)
    print(f"{time.monotonic() - BEGIN:.0f} s; {report.folder / 'kernel_times.md'}")
    return 0 if all(row.ok is not False for row in report.rows) else 1


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    if "--once" in sys.argv:
        with torch.device("cuda"), torch.no_grad():
            once()
    else:
        sys.exit(main())
