"""`make gpu-check`: everything that can be shown on this machine's GPU, and one table of promises against measurements.

Needs no network and ends within ten minutes: a step that takes too long is stopped and counts as failed. Without a GPU
it checks the machine code instead (see gpu_static.py), and says that there is none. With the name of a file it also
writes the table there, as Markdown.
"""

from __future__ import annotations

import math
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch

from runner import Measured, Sides, measure
from verdicts import UNITS

ROOT = Path(__file__).resolve().parents[2]
BEGIN, LIMIT = time.monotonic(), 590.0
ALLOWED = 1.5  # times the cost model's time for a launch; it assumes, and this measures


class Row(NamedTuple):
    name: str
    promise: str
    measured: str
    passed: bool


def step(name: str, command: list, seconds: float, **variables: str) -> Row:
    """Runs a command within its own time and what is left of the whole. What it started ends with it."""
    print(f"\n--- {name}", flush=True)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))} | variables
    begin = time.monotonic()
    seconds = max(1.0, min(seconds, LIMIT - (begin - BEGIN)))
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, start_new_session=True)
    try:
        result = process.wait(seconds)
    except subprocess.TimeoutExpired:
        result = None
    finally:
        if process.poll() is None:  # too long, or this was interrupted
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    took = f"{time.monotonic() - begin:.0f} s"
    told = f"not done after {took}" if result is None else f"ended with {result} after {took}"
    return Row(name, "passes", "passed" if result == 0 else told, result == 0)


def pytest_of(*arguments) -> list:
    return [sys.executable, "-m", "pytest", "-m", "gpu", "-p", "no:cacheprovider", *arguments]


def sharded(folder: str) -> list:
    """The embedded world's first iterations on two GPUs, sharded."""
    options = ["--use_fsdp", "--fsdp_version", 2, "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]
    options += ["--fsdp_transformer_layer_cls_to_wrap", "JointTransformerBlock", "--fsdp_cpu_ram_efficient_loading"]
    options += ["false", "--num_processes", 2, "--num_machines", 1, "--mixed_precision", "no", "--dynamo_backend", "no"]
    train = ["train", "--preset", "shapes", "--out", folder, "--overwrite", "--optimization.iterations", 2]
    return [Path(sys.executable).with_name("accelerate"), "launch", *options, "-m", "star.cli", *train]


def in_a_graph(functions: Sequence[Callable[[], object]], calls: int = 20) -> Callable[[], float]:
    """Seconds of one call, without the time that the processor takes to start it: at least `calls` of them in a CUDA
    graph. functions: the same call on different tensors, which go round."""
    chosen = [functions[i % len(functions)] for i in range(max(calls, len(functions)))]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for function in chosen[:3]:
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for function in chosen:
            function()

    def measure() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(chosen)

    return measure


def median(measure: Callable[[], float], rounds: int = 21) -> float:
    return statistics.median(measure() for _ in range(rounds))


def operators(shape, images: int, device) -> list[tuple[str, Callable[[], object], list]]:
    """(name, call, launches that the cost model knows) at a model's shapes."""
    import cost_model as model
    import star_kernels as sk
    from star_kernels.ops import POLICY_LOSS

    side = int(shape.locations**0.5)
    size = (images, shape.channels, side, side) if shape.patch > 1 else (images, shape.locations, shape.channels)
    sample, velocity, noise, prev_sample = torch.randn(4, *size).unbind(0)
    transition = sk.Transition.gaussian(*(torch.rand(3, images) + 0.5).unbind(0))
    concepts = (images, model.CONCEPTS)
    maps, index = torch.rand(*concepts, shape.image), torch.randint(0, shape.text, (*concepts, model.SLOTS))
    query = torch.randn(images, shape.heads, shape.image, shape.width, dtype=torch.bfloat16)
    key = torch.randn(images, shape.heads, shape.image + shape.text, shape.width, dtype=torch.bfloat16)
    weight, lse = torch.rand(index.shape), torch.full(query.shape[:3], 10.0)
    grid, advantages = (int(shape.image**0.5),) * 2, torch.randn(images)
    spots = torch.ones(size[0], *(size[2:] if shape.patch > 1 else size[1:2]))
    arguments = (velocity, sample, prev_sample, *transition, advantages, spots, noise, None, None, None)
    arguments += ("token", 1e-4, 1e-4, 5.0, 0.0, False)
    impl = sk.api.resolve("policy_loss", "auto", velocity.device)  # Triton's where nothing was compiled
    loss, gradient, one = POLICY_LOSS.run(impl), POLICY_LOSS.gradient.run(impl), torch.ones(())
    attention = (images, shape.heads, shape.image, shape.width, *concepts[1:], model.SLOTS, device.processors)
    return [
        (
            "attention_maps",
            lambda: sk.attention_maps(query, key, index, weight, lse=lse),
            model.attention_maps(*attention),
        ),
        (
            "allocate",
            lambda: sk.allocate(maps, grid, smooth=1.0, patch=shape.patch),
            model.allocate(images, model.CONCEPTS, shape.image, shape.patch),
        ),
        (
            "gaussian_step",
            lambda: sk.gaussian_step(sample, velocity, noise, transition),
            model.gaussian_step(images, shape.channels * shape.locations),
        ),
        (
            "policy_loss",
            lambda: gradient(one, loss(*arguments)[2], *arguments),
            model.policy_loss(images, shape.channels, shape.locations, weighted=True, packed=shape.patch == 1),
        ),
    ]


def copies(shape, images: int) -> int:
    """Sets of tensors whose latents alone are twice what the second-level cache holds; else it would flatter."""
    latents = 4 * 4 * images * shape.channels * shape.locations  # four tensors, float32
    return min(96, max(4, math.ceil(2 * torch.cuda.get_device_properties().L2_cache_size / latents)))


def synchronized(sides: Sides) -> Sides:
    return replace(sides, **{name: partial(then_wait, getattr(sides, name)) for name in ("ours", "other")})


def then_wait(call: Callable[[], object]) -> object:
    result = call()
    torch.cuda.synchronize()
    return result


def layer_overhead(shape, images: int) -> float:
    """What capture adds to a layer of SD3.5, measured alternately."""
    from diffusers.models.attention import JointTransformerBlock
    from diffusers.models.attention_processor import JointAttnProcessor2_0

    import cost_model as model
    from star.capture import Maps
    from star.capture.blocks import Observer
    from star.concepts import ConceptTokens
    from star.layouts import Pass
    from star.tap import tapped

    width, rows = shape.heads * shape.width, shape.rows * images
    block = JointTransformerBlock(width, shape.heads, shape.width, qk_norm="rms_norm").bfloat16()
    inputs = [torch.randn(rows, *size, dtype=torch.bfloat16) for size in ((shape.image, width), (shape.text, width))]
    inputs.append(torch.randn(rows, width, dtype=torch.bfloat16))
    index = torch.randint(0, shape.text, (images, model.CONCEPTS, model.SLOTS))
    tokens, side = ConceptTokens(index, torch.ones(index.shape)), int(shape.image**0.5)
    maps = Maps(tokens=tokens, grid=(side, side), rows=slice(rows - images, rows))
    maps.begin(Pass(inputs[0][:images], inputs[1][:images], shape.image, (side, side), image=0, text=shape.image))
    observer = Observer(maps, 0)

    def run():
        maps.written[0] = False  # every call stands for a pass of its own
        return block(*inputs)

    measures = []
    for processor in (JointAttnProcessor2_0(), tapped(JointAttnProcessor2_0(), observer)):
        block.attn.processor = processor
        measures.append(in_a_graph([run], calls=4))
    pairs = [(measures[0](), measures[1]()) for _ in range(15)]
    return statistics.median(star / plain for plain, star in pairs) - 1


def check_time() -> None:
    """Before each measurement: what has been measured by then is shown all the same."""
    if LIMIT - (time.monotonic() - BEGIN) < 60:
        raise RuntimeError("no time left")


def told_of(measured: Measured, unit: str) -> str:
    estimate = measured.estimate
    return f"{estimate.mean:.2f} {unit} (99 %: {estimate.low:.2f} to {estimate.high:.2f}, {measured.verdict})"


def losses() -> Iterator[Row]:
    """policy_loss and its gradient against Flow-GRPO's formulas, as a trainer calls them: the processor's part too."""
    from losses import SHAPES, against_flow_grpo

    for compiled in (False, True):
        for pixels, shape in SHAPES.items():
            check_time()
            with torch.device("cuda"):
                sides = [synchronized(against_flow_grpo(pixels, compiled)) for _ in range(4)]
            sides[0].equal(sides[0].ours(), sides[0].other())
            measured = measure(sides, UNITS["x"], limit=1.0, seconds=10)
            ours, theirs = (1e6 * statistics.median(side.seconds) for side in (measured.ours, measured.other))
            name = f"policy_loss {shape} against {'compiled' if compiled else 'eager'} Flow-GRPO"
            told = f"{told_of(measured, 'x')} ({ours:.0f} against {theirs:.0f} us)"
            yield Row(name, "faster", told, measured.verdict == "met")


def iteration(folder: str) -> Iterator[Row]:
    """What allocation adds to an iteration of the whole of SD3.5-medium, with random weights."""
    from iterations import arms, medium_trainer, only_one_allocates

    check_time()
    trainer = medium_trainer(Path(folder), blocks=24, images=9, dtype="bfloat16")
    metrics, peaks = ([], []), []

    def arm(function, seen):
        seen.append(function())
        torch.cuda.synchronize()

    functions = [partial(arm, *one) for one in zip(arms(trainer), metrics, strict=True)]
    for function in functions:
        function()
        torch.cuda.reset_peak_memory_stats()
        function()
        peaks.append(torch.cuda.max_memory_allocated())
    scalar_arm, star_arm = functions
    only_one_allocates(metrics[1][0], metrics[0][0])
    measured = measure([Sides(star_arm, scalar_arm)], UNITS["%"], limit=1.0, seconds=60)
    parts = []
    for part in ("rollout", "update"):
        scalar, star = (statistics.median(one[f"seconds/{part}"] for one in seen) for seen in metrics)
        parts.append(f"{part} {1e3 * (star - scalar):+.1f} ms")
    whole = 1e3 * statistics.median(measured.other.seconds)
    told = f"{told_of(measured, '%')} of {whole:.0f} ms: {', '.join(parts)}"
    yield Row("allocation in an iteration, SD3.5-medium, 512 px, 9", "<= 1.00%", told, measured.verdict == "met")
    told = f"{peaks[1] / peaks[0] - 1:.2%} of {peaks[0] / 2**30:.1f} GiB"
    yield Row("its peak of memory", "<= 1.00%", told, peaks[1] <= 1.01 * peaks[0])


def launches() -> Iterator[Row]:
    """The operators and a captured layer at real shapes, against the cost model."""
    import cost_model as model

    name = torch.cuda.get_device_name()
    known = {"A100": 0, "H100": 1, "H200": 2, "B200": 3, "4090": 4, "MI300X": 5}
    device = next((model.DEVICES[i] for part, i in known.items() if part in name), None)
    one = device or model.DEVICES[0]
    with torch.device("cuda"), torch.no_grad():
        for shape, images in product(model.MODELS, model.BATCHES):
            check_time()
            sets = [operators(shape, images, one) for _ in range(copies(shape, images))]
            for same in zip(*sets, strict=True):
                operator, _, counted = same[0]
                seconds, promise = median(in_a_graph([call for _, call, _ in same])), model.total(counted, one)
                label = f"{operator}, {shape.name}, {images}"
                told = f"{1e6 * seconds:.1f} us"
                if device is None:  # no promise was made for it
                    yield Row(label, "-", told, True)
                else:
                    limit = f"<= {ALLOWED:g} x {1e6 * promise:.1f} us"
                    yield Row(label, limit, told, seconds <= ALLOWED * promise)
            if shape.last_without_text:
                added, promise = layer_overhead(shape, images), model.LAYER_GOAL
                if device is not None:
                    promise = max(promise, model.predict_layer(shape, device, images).of_eager)
                label = f"capture of a layer, {shape.name}, {images}"
                yield Row(label, f"<= {promise:.2%}", f"{added:.2%}", added <= promise)
            torch.cuda.empty_cache()


def measurements() -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        yield from launches()
        yield from losses()
        yield from iteration(folder)


def show(rows: list[Row]) -> None:
    titles = ("promise or step", "promised", "measured", "")
    cells = [titles, *((*row[:3], "pass" if row.passed else "FAIL") for row in rows)]
    widths = [max(len(one[i]) for one in cells) for i in range(4)]
    print()
    for one in cells:
        print("  ".join(text.ljust(width) for text, width in zip(one, widths, strict=True)).rstrip())


def markdown(rows: list[Row]) -> str:
    import triton

    driver = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    versions = subprocess.run(driver, capture_output=True, text=True).stdout.split()[:1]
    versions = ["driver", *versions, "torch", torch.__version__, "Triton", triton.__version__]
    lines = [f"{torch.cuda.get_device_name()}, {' '.join(versions)}.", ""]
    lines += ["| promise or step | promised | measured | |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row[:3])} | {'pass' if row.passed else '**FAIL**'} |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    if not torch.cuda.is_available():
        row = step("machine code", [sys.executable, "tools/gpu/gpu_static.py", "--check"], LIMIT)
        show([row])
        print("\nThere is no GPU here (torch.cuda.is_available() is False): nothing else was run.")
        return 0 if row.passed else 1
    from star_kernels import implementations
    from star_kernels.ops import OPERATORS

    print(torch.cuda.get_device_name(), f"torch {torch.__version__}, {torch.cuda.device_count()} GPU(s)")
    rows = []
    for name, operator in OPERATORS.items():
        wanted = "native" if "cuda" in operator.native else "triton"
        reason = implementations(name, "cuda")[wanted]
        rows.append(Row(f"{name} runs here", wanted, reason or wanted, reason is None))
    rows.append(step("tests", pytest_of("tests"), 240, TRITON_INTERPRET="0"))
    if torch.cuda.device_count() > 1:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(step("training, FSDP2", sharded(folder), 90))
    if sanitizer := shutil.which("compute-sanitizer"):
        checked = pytest_of("tests/kernels/test_gpu.py", "-k", "do_not_wait")
        command = [sanitizer, "--tool", "memcheck", "--error-exitcode", 9, *checked]
        rows.append(step("compute-sanitizer", command, 90, TRITON_INTERPRET="0"))
    try:
        for row in measurements():
            rows.append(row)
            print(f"{row.name}: {row.measured}", flush=True)
    except (RuntimeError, torch.OutOfMemoryError) as error:
        rows.append(Row("benchmarks", "run", str(error).splitlines()[0], False))
    show(rows)
    if sys.argv[1:]:
        Path(sys.argv[1]).write_text(markdown(rows))
    return 0 if all(row.passed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
