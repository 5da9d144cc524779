"""The figures and the table of docs/evidence.md, from the tables of the studies' own pages: `python tools/evidence.py`.

`star compare --document docs/evidence/NAME.md` writes those pages; run this afterwards. README's docs/face.png has
the same differences beside weights over images of the embedded model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from star import document, presets
from star.reports import figures
from star.shapes.task import load_pipeline
from star.training import preview

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT, MARKS = ROOT / "docs" / "evidence.md", "differences to uniform"
PAGES = ROOT / "docs" / "evidence"
STUDIES = {"shapes": "small batches", "large_batch": "large batches", "credit": "DiffusionNFT"}
"""Studies whose arms are shown, and what each is called in a label."""
LEAST_SEEDS = 3  # of an arm that is shown
COLOR, GRAY = "tab:blue", "0.6"
WIDTH = 6.4  # inches
FACE = ROOT / "docs" / "face.png"
PROMPTS = ("a green triangle and a red ring",)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Difference:
    """Of an arm to `uniform` in the reward at the end. seeds: of both arms. shown: interval and t-test agree."""

    study: str
    arm: str
    mean: float
    low: float
    high: float
    ahead: int
    seeds: int
    shown: bool

    @property
    def label(self) -> str:
        return f"{self.arm}, {STUDIES[self.study]} (n={self.seeds})"


def table(page: Path, title: str) -> dict[str, list[str]]:
    """The rows of a page's first table whose bold title begins so: the other cells by the first one."""
    _, found, rest = page.read_text().partition(f"**{title}")
    lines = rest.split("\n\n")[1].splitlines() if found else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: others for first, *others in cells}


def numbers(cell: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(cell)]


def differences(study: str, least_seeds: int = LEAST_SEEDS) -> list[Difference]:
    """Of a study's arms with at least so many seeds, the best first."""
    found = []
    for arm, (reward, _, seeds_ahead, *_) in table(PAGES / f"{study}.md", "difference to uniform").items():
        if "/" in seeds_ahead:  # neither the titles nor uniform itself
            mean, low, high = numbers(reward)
            ahead, seeds = map(int, seeds_ahead.split("/"))
            found.append(Difference(study, arm, mean, low, high, ahead, seeds, reward.endswith("*")))
    found = [one for one in found if one.seeds >= least_seeds]
    return sorted(found, key=lambda one: -one.mean)


def all_differences() -> list[Difference]:
    return [one for study in STUDIES for one in differences(study)]


def main_table() -> str:
    """Markdown."""
    lines = ["| arm | difference to `uniform` | 95 % interval | seeds ahead |", "|---|---:|---:|---:|"]
    for one in all_differences():
        name, mark = f"[{one.label}](evidence/{one.study}.md)", " \\*" if one.shown else ""
        interval = f"{one.low:+.3f} to {one.high:+.3f}"
        lines.append(f"| {name} | {one.mean:+.3f}{mark} | {interval} | {one.ahead}/{one.seeds} |")
    return "\n".join(lines)


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_forest(axes: Axes, rows: list[Difference], labels: list[str]) -> None:
    """Differences with their intervals, the first on top."""
    for y, one in enumerate(rows):
        axes.plot([one.low, one.high], [y, y], color=COLOR, linewidth=2.5)
        axes.plot(one.mean, y, "o", color=COLOR, markerfacecolor=COLOR if one.shown else "white", markersize=7)
    axes.axvline(0, color=GRAY, linewidth=1)
    axes.set_yticks(range(len(rows)), labels)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("held-out reward, difference to uniform")


def forest() -> Figure:
    rows = all_differences()
    figure, axes = new_figure(0.34 * len(rows) + 0.9)
    draw_forest(axes, rows, [one.label for one in rows])
    return figure


def bars(axes: Axes, labels: Sequence[str], heights: Sequence[float], errors: Sequence[float] | None = None) -> None:
    axes.bar(range(len(labels)), heights, yerr=errors, color=COLOR, width=0.6, capsize=4)
    axes.set_xticks(range(len(labels)), labels)
    axes.axhline(0, color=GRAY, linewidth=1)


def optimizer() -> Figure:
    """What attention's weights gain in the gradient, and what AdamW leaves of it."""
    _, _, gradient, _, step, *_ = table(PAGES / "shapes.md", "signal to noise")["attention"]
    (gain, error), (left, left_error) = numbers(gradient), numbers(step)
    figure, axes = new_figure(2.2, 4.2)
    bars(axes, ["gradient", "AdamW's step"], [gain, left], [error, left_error])
    axes.set_ylabel("gain in cosine")
    return figure


def extra_objects() -> Figure:
    """The share of images with more objects than requested."""
    rows = table(PAGES / "shapes.md", "what the held-out scores are made of")
    arms = ["uniform", "attention", "oracle", "oracle_every_object"]
    figure, axes = new_figure(2.2, 4.2)
    bars(axes, [arm.replace("_", "\n", 1) for arm in arms], [float(rows[arm][-2]) for arm in arms])
    axes.set_ylabel("images with an\nobject too many")
    return figure


def noise() -> Figure:
    """What training on rewards that are noise costs."""
    rows = differences("noise", 1)
    concentration = table(PAGES / "noise.md", "means over the iterations")
    shown = [f"{one.arm} (n={one.seeds})\n{concentration[one.arm][0]}" for one in rows]
    figure, axes = new_figure(0.5 * len(rows) + 0.9)
    draw_forest(axes, rows, shown)
    return figure


def face(shown: figures.Shown) -> Figure:
    """Images with the weights of their steps, and below them the differences."""
    assert shown.weights is not None
    steps, rows = len(shown.weights), all_differences()
    heights = (1.85 * len(shown.images), 0.26 * len(rows) + 0.7)
    figure = Figure(figsize=(7, sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    images = above.subplots(len(shown.images), steps + 1, squeeze=False)
    for row, image in enumerate(shown.images):
        figures.show_image(images[row, 0], image)
        figures.set_text(images[row, 0], title=shown.prompts[row])
        for step in range(steps):
            figures.overlay(images[row, step + 1], image, shown.weights[step, row], float(shown.weights.max()))
            if row == 0:
                figures.set_text(images[row, step + 1], title=shown.labels[step])
    axes = below.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    draw_forest(axes, rows, [one.label for one in rows])
    return figure


def traced() -> preview.Preview:
    """Images of the embedded model with the weights of every step."""
    return preview.of_prompts(load_pipeline(), presets.preset("shapes"), PROMPTS)


FIGURES = {"forest": forest, "why_optimizer": optimizer, "why_extra_objects": extra_objects, "why_noise": noise}


def main() -> None:
    document.fill(DOCUMENT, {MARKS: main_table()})
    for name, draw in FIGURES.items():
        figures.save(draw(), PAGES / f"{name}.png")
    figures.save(face(traced()), FACE)


if __name__ == "__main__":
    main()
