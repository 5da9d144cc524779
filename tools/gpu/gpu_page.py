"""The tables of docs/gpu.md and of the pages in docs/gpu; gpu_static.py puts them there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import cost_model as model
from star import document
from star_kernels.triton import attention_maps as kernels

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {
    "Triton kernels": DOCS / "gpu" / "triton.md",
    "CUDA kernels": DOCS / "gpu" / "cuda.md",
    "predictions": DOCS / "gpu" / "predictions.md",
    "assumptions": DOCS / "gpu.md",
    "goals": DOCS / "gpu.md",
    "devices": DOCS / "gpu.md",
}
"""The page of each text, by the name of its marks."""


def fill(texts: Mapping[str, str]) -> None:
    """Put each text on its page."""
    by_page: dict[Path, dict[str, str]] = defaultdict(dict)
    for name, text in texts.items():
        by_page[PAGES[name]][name] = text
    for page, parts in by_page.items():
        document.fill(page, parts)


def rows(titles: str, cells: list[tuple]) -> str:
    """Markdown."""
    lines = [f"| {titles} |", "|---" * len(cells[0]) + "|"]
    return "\n".join(lines + [f"| {' | '.join(map(str, one))} |" for one in cells])


def triton_table(builds: list[dict], version: str) -> str:
    """Markdown: one row for each build of triton_offline.builds() by Triton `version`."""
    numbers = ("registers", "stack", "local", "shared", "matrix", "vectors")
    cells = [
        (f"`{b['kernel']}`", b["about"], b["target"], b["warps"], *(b[n] for n in numbers), f"{b['occupancy']:.0%}")
        for b in builds
    ]
    titles = "kernel | case | target | warps | registers | stack | spills | shared | matrix | vectors | occupancy"
    launched = f"Triton {version}; `attention_maps` with {kernels.blocks_of('', 2).queries} queries a program."
    return f"{launched}\n\n{rows(titles, cells)}"


def cuda_table(compiled: list[dict], is_wide: Callable[[dict], bool]) -> str:
    """Markdown: of cuda_offline.kernels() those with 16-byte accesses, and allocate."""
    numbers = ("registers", "stack", "spills", "shared", "vector_loads", "vector_stores")
    chosen = [k for k in compiled if is_wide(k) or "allocate" in k["kernel"]]
    chosen.sort(key=lambda k: (k["kernel"], int(k["architecture"][3:])))
    cells = [(f"`{k['kernel']}`", k["architecture"], *(k[n] for n in numbers), f"{k['occupancy']:.0%}") for k in chosen]
    titles = "kernel | target | registers | stack | spills | shared | vector loads | vector stores | occupancy"
    threads = {
        "the losses": model.constant("latents.cuh", "LOSS_THREADS"),
        "gaussian_step": model.constant("gaussian_step.cuh", "THREADS"),
        "allocate": model.constant("allocate.cuh", "ALLOCATE_THREADS"),
    }
    told = ", ".join(f"{count} for {name}" for name, count in threads.items())
    return f"Threads of a block: {told}.\n\n{rows(titles, cells)}"


def assumptions() -> str:
    """What the cost model takes for granted."""
    cells = [
        ("start of a kernel", f"{1e6 * model.LAUNCH:.1f} us"),
        ("a dependent access to memory", f"{1e6 * model.TRIP:.1f} us"),
        ("share of the datasheet's bandwidth", f"{model.EFFICIENCY:.0%}"),
        ("share of the datasheet's matrix rate, in large products", f"{model.MATRIX_EFFICIENCY:.0%}"),
        ("second-level cache against memory", f"{model.L2_RATE:g} times the bandwidth"),
        ("programs that a processor runs at once", model.RESIDENT),
        ("concepts, and text tokens of each", f"{model.CONCEPTS}, {model.SLOTS}"),
        ("steps of an iteration, and how many are captured and trained", f"{model.STEPS}, {model.TRAINED}"),
    ]
    return rows("assumption | value", cells)


def goals() -> str:
    """How many of the predicted cases meet the goals."""
    cases = [(m, d, p) for m in model.MODELS for p in model.BATCHES for d in model.DEVICES]
    layers = [model.predict_layer(*case) for case in cases]
    iterations = [model.predict_iteration(*case) for case in cases]
    cells = [
        (
            f"STAR adds at most {goal:.1%} of {what}",
            f"{sum(one.of_eager <= goal for one in predicted)} of {len(cases)}",
            f"{sum(one.of_best <= goal for one in predicted)} of {len(cases)}",
        )
        for what, goal, predicted in (
            ("a layer", model.LAYER_GOAL, layers),
            ("an iteration", model.ITERATION_GOAL, iterations),
        )
    ]
    floors = sum(model.floor(*case) > model.LAYER_GOAL * one.best for case, one in zip(cases, layers, strict=True))
    table = rows("goal | met against diffusers' time | met against the best time", cells)
    return f"{table}\n\nThe floor alone is above the goal of a layer in {floors} of {len(cases)} cases."


def predictions() -> dict[str, str]:
    """The texts that need no compiler, by the name of their marks."""
    return {
        "assumptions": assumptions(),
        "goals": goals(),
        "predictions": model.table(),
        "devices": model.device_table(),
    }
