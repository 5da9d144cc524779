"""docs/gpu.md: what the GPU kernels need, from their machine code, and what the cost model predicts.

python tools/gpu/gpu_static.py            # writes docs/gpu.md; without nvcc it leaves the CUDA kernels out
python tools/gpu/gpu_static.py --check    # writes nothing and fails where a kernel breaks a rule
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import cost_model as model
import triton_offline  # before any other kernel: it fixes that Triton compiles
from star_kernels.triton import attention_maps as kernels

ROOT = Path(__file__).resolve().parents[2]

TEXT = """# On GPUs

Written by `python tools/gpu/gpu_static.py`. **Nothing on this page was measured on a GPU.** The first two tables are
read from machine code that was compiled for GPUs that were not there; the last one is predicted. On a machine with a
GPU `make gpu-check` runs every test and benchmark on it and prints the predictions beside what it measures; what it
measured on an H200 is in [docs/gpu-measured.md](gpu-measured.md).

## Triton kernels

As `attention_maps` launches them: {warps_half} warps for half precision, {warps_single} for float32, {block_n} queries
a program. Matrix: instructions of the matrix units in the code. Vectors: global accesses of 16 bytes. Occupancy: share
of a processor's warps that registers and shared memory leave room for. Triton {triton}.

{triton_table}

## CUDA kernels

Each in the form for tensors that can be read 16 bytes at a time. Other sizes and float64 have forms of their own,
checked for spills too.

{cuda_table}

## Predictions

`tools/gpu/cost_model.py` counts for each launch the traffic of every tensor, the operations on the matrix units,
programs and dependent accesses, from the block sizes and grids of the code that launches it; tests compare the counts
with those of Triton's interpreter, of tensors and of torch's operation counter.

Without STAR a layer and an iteration are taken twice. At best: the matrix units at their datasheet rate without a
pause or memory at its own, and no time between kernels. By diffusers: every kernel that its blocks start in eager
PyTorch, recorded from the blocks at their true size, with {launch:.1f} us for each start, {efficiency:.0%} of the
memory's bandwidth and {matrix_efficiency:.0%} of the matrix rate. Both are the attention blocks alone, bfloat16, with
frozen weights, no recomputation, no adapters, text encoders, decoding or rewards: real ones take longer. STAR's
launches are taken with the same start and bandwidth, {trip:.1f} us for each dependent access, slower where programs
are too few to fill the device, and every tensor read from memory even if the attention has just left it in the cache.
All of these are assumptions.

A layer is a captured one with two streams, {concepts} concepts of {slots} text tokens; what STAR adds is the maps and
the sum over the groups of heads. The log-sum-exp is the attention kernel's own; its write is counted. "Floor" is the
time to read the queries of the captured rows once, of the layer at best: whatever does not happen inside the
attention kernel adds at least that. An iteration is Flow-GRPO's: {steps} steps, {trained} of them captured in all
joint layers and trained, with guidance for SD3.5; STAR adds maps, allocation, the mean that a step stores, and what
the fused loss with weights takes beyond a scalar loss that touches every tensor once. "pictures" are those of one
pass: one, and Flow-GRPO's micro batch.

Goals: at most {layer_goal:.1%} of a layer, {iteration_goal:.1%} of an iteration; in bold what misses them. Of {cases}
cases {layers} meet the first and {iterations} the second against diffusers' layers, {best_layers} and
{best_iterations} against layers at best. In {floors} cases the floor alone is above the first goal.

{predictions}

{devices}
"""


def rows(titles: str, cells: list[tuple]) -> str:
    """Markdown."""
    lines = [f"| {titles} |", "|---" * len(cells[0]) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, one))} |" for one in cells])


def triton_table(builds: list[dict]) -> str:
    numbers = ("registers", "stack", "local", "shared", "matrix", "vectors")
    cells = [
        (f"`{b['kernel']}`", b["dtype"], b["width"] or "", b["columns"] or "", b["target"], *(b[n] for n in numbers),
         f"{b['occupancy']:.0%}")
        for b in builds
    ]  # fmt: skip
    titles = "kernel | type | width | columns | target | registers | stack | spills | shared | matrix | vectors"
    return rows(f"{titles} | occupancy", cells)


def cuda_table(found: list[dict], is_wide: Callable[[dict], bool]) -> str:
    numbers = ("registers", "stack", "spills", "shared", "loads_16", "stores_16")
    chosen = [k for k in found if is_wide(k) or "allocate" in k["kernel"]]
    chosen.sort(key=lambda k: (k["kernel"], int(k["architecture"][3:])))
    cells = [(f"`{k['kernel']}`", k["architecture"], *(k[n] for n in numbers), f"{k['occupancy']:.0%}") for k in chosen]
    titles = "kernel | target | registers | stack | spills | shared | vector loads | vector stores | occupancy"
    return rows(titles, cells)


def count(meets: Callable[[model.Model, model.Device, int], bool]) -> int:
    return sum(meets(m, d, p) for m in model.MODELS for p in model.BATCHES for d in model.DEVICES)


def main() -> int:
    builds = list(triton_offline.builds())
    wrong = [(build, what) for build in builds if (what := triton_offline.problems(build))]
    found, cuda = [], "Not built: there is no nvcc."
    if shutil.which("nvcc") is not None:
        import cuda_offline

        found = cuda_offline.kernels(cuda_offline.build(ROOT / "build" / "cuda_offline"))
        wrong += [(kernel, what) for kernel in found if (what := cuda_offline.problems(kernel))]
        cuda = cuda_table(found, cuda_offline.is_wide)
    for build, what in wrong:
        print(f"{build}: {'; '.join(what)}", file=sys.stderr)
    if "--check" in sys.argv:
        print(f"static: {len(builds)} Triton builds, {len(found)} CUDA kernels, {len(wrong)} with problems")
        return bool(wrong)
    layer_goal, iteration_goal = model.LAYER_GOAL, model.ITERATION_GOAL
    text = TEXT.format(
        warps_half=kernels.warps(2),
        warps_single=kernels.warps(4),
        block_n=kernels.BLOCK_N,
        triton=triton_offline.triton.__version__,
        triton_table=triton_table(builds),
        cuda_table=cuda,
        launch=1e6 * model.LAUNCH,
        trip=1e6 * model.TRIP,
        efficiency=model.EFFICIENCY,
        matrix_efficiency=model.MATRIX_EFFICIENCY,
        concepts=model.CONCEPTS,
        slots=model.SLOTS,
        steps=model.STEPS,
        trained=model.TRAINED,
        layer_goal=layer_goal,
        iteration_goal=iteration_goal,
        cases=count(lambda *case: True),
        layers=count(lambda *case: model.predict_layer(*case).of_eager <= layer_goal),
        iterations=count(lambda *case: model.predict_iteration(*case).of_eager <= iteration_goal),
        best_layers=count(lambda *case: model.predict_layer(*case).of_best <= layer_goal),
        best_iterations=count(lambda *case: model.predict_iteration(*case).of_best <= iteration_goal),
        floors=count(lambda *case: model.floor(*case) > layer_goal * model.predict_layer(*case).best),
        predictions=model.table(),
        devices=model.device_table(),
    )
    (ROOT / "docs" / "gpu.md").write_text(text)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
