"""The figures and the table of docs/evidence.md, from the tables of the studies' own pages: `python tools/evidence.py`.

`star compare --document docs/evidence/NAME.md` writes those pages; run this afterwards. README's docs/face.png has
the same differences beside weights over images of the embedded model.
"""

from __future__ import annotations

import itertools
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
SCORES = {"reward, final": "held-out reward", "strict, final": "share of correct images"}
"""Columns of the studies' tables that are shown, and what a reader calls them."""
LEAST_SEEDS = 3  # of an arm that is shown
OTHER_OBJECTIVE = ("grpo", "grpo_explore")  # arms that say nothing of locations: they differ from uniform in more
COLOR, GRAY = "tab:blue", "0.6"
WIDTH = 6.4  # inches
FACE = ROOT / "docs" / "face.png"
PROMPTS = ("a green triangle and a red ring",)
NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


@dataclass(frozen=True)
class Difference:
    """Of an arm to `uniform` in a score at the end. shown: interval and t-test agree."""

    mean: float
    low: float
    high: float
    shown: bool

    def __str__(self) -> str:
        mark = " \\*" if self.shown else ""
        return f"{self.mean:+.3f}{mark} ({self.low:+.3f} to {self.high:+.3f})"


@dataclass(frozen=True)
class Row:
    """An arm's differences, one for each of SCORES. seeds: that it shares with `uniform`."""

    study: str
    arm: str
    seeds: int
    differences: tuple[Difference, ...]

    @property
    def label(self) -> str:
        return f"{self.arm} (n={self.seeds})"


def table(page: Path, title: str) -> dict[str, list[str]]:
    """The rows of a page's tables whose bold titles begin so: the other cells by the first one, of two rows of an arm
    those of the first row."""
    rows: dict[str, list[str]] = {}
    for rest in page.read_text().split(f"**{title}")[1:]:
        for line in rest.split("\n\n")[1].splitlines():
            first, *others = (cell.strip() for cell in line.strip("|").split("|"))
            rows.setdefault(first, others)
    return rows


def numbers(cell: str) -> list[float]:
    return [float(number) for number in NUMBER.findall(cell)]


def differences(study: str, least_seeds: int = LEAST_SEEDS) -> list[Row]:
    """Of a study's arms with at least so many seeds, the best first."""
    found = []
    lines = table(PAGES / f"{study}.md", "difference to uniform")
    for arm, cells in lines.items():
        of_arm = dict(zip(lines["arm"], cells, strict=True))
        _, is_arm, seeds = of_arm["seeds ahead"].partition("/")  # the titles and uniform itself have none
        if is_arm and int(seeds) >= least_seeds and arm not in OTHER_OBJECTIVE:
            found.append(Row(study, arm, int(seeds), tuple(difference(of_arm[score]) for score in SCORES)))
    return sorted(found, key=lambda row: -row.differences[0].mean)


def difference(cell: str) -> Difference:
    """Of a cell such as `+0.038 [+0.016, +0.060] *`."""
    mean, low, high = numbers(cell)
    return Difference(mean, low, high, cell.endswith("*"))


def all_differences() -> list[Row]:
    return [row for study in STUDIES for row in differences(study)]


def main_table() -> str:
    """Markdown."""
    lines = [f"| arm | {' | '.join(SCORES.values())} |", "|---|---:|---:|"]
    for row in all_differences():
        name = f"[{row.arm}, {STUDIES[row.study]} (n={row.seeds})](evidence/{row.study}.md)"
        lines.append(f"| {name} | {' | '.join(map(str, row.differences))} |")
    return "\n".join(lines)


def empty_figure(height: float, width: float = WIDTH) -> Figure:
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def new_figure(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = empty_figure(height, width)
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def draw_differences(axes: Axes, heights: Sequence[int], differences: Sequence[Difference]) -> None:
    """Each with its interval at its height; filled where a difference is shown."""
    for y, one in zip(heights, differences, strict=True):
        axes.plot([one.low, one.high], [y, y], color=COLOR, linewidth=2.5)
        axes.plot(one.mean, y, "o", color=COLOR, markerfacecolor=COLOR if one.shown else "white", markersize=7)
    axes.axvline(0, color=GRAY, linewidth=1)


def draw_forest(panels: Sequence[Axes], rows: Sequence[Row]) -> None:
    """A panel for each score; the arms of a study below its name, the first on top."""
    labels: list[str] = []
    names, heights = [], []
    for study, of_study in itertools.groupby(rows, key=lambda row: row.study):
        names.append(len(labels))
        labels.append(STUDIES[study])
        for row in of_study:
            heights.append(len(labels))
            labels.append(row.label)
    for which, (panel, score) in enumerate(zip(panels, SCORES.values(), strict=True)):
        draw_differences(panel, heights, [row.differences[which] for row in rows])
        panel.set_xlabel(f"{score},\ndifference to uniform")
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.tick_params(axis="y", length=0)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].set_ylim(len(labels) - 0.5, -0.5)
    for y in names:
        panels[0].get_yticklabels()[y].set_fontweight("bold")


def lines_of(rows: Sequence[Row]) -> int:
    """How many lines `draw_forest` has."""
    return len(rows) + len({row.study for row in rows})


def forest() -> Figure:
    rows = all_differences()
    figure = empty_figure(0.3 * lines_of(rows) + 0.9)
    draw_forest(figure.subplots(1, len(SCORES), sharey=True), rows)
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
    shown = [f"{row.label}\n{concentration[row.arm][0]}" for row in rows]
    figure, axes = new_figure(0.5 * len(rows) + 0.9)
    draw_differences(axes, range(len(rows)), [row.differences[0] for row in rows])
    axes.set_yticks(range(len(rows)), shown)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("held-out reward, difference to uniform")
    return figure


def face(shown: figures.Shown) -> Figure:
    """Images with the weights of their steps, and below them the differences."""
    assert shown.weights is not None
    steps, rows = len(shown.weights), all_differences()
    heights = (1.85 * len(shown.images), 0.26 * lines_of(rows) + 0.8)
    figure = empty_figure(sum(heights), 7)
    above, below = figure.subfigures(2, 1, height_ratios=heights)
    images = above.subplots(len(shown.images), steps + 1, squeeze=False)
    for row, image in enumerate(shown.images):
        figures.show_image(images[row, 0], image)
        figures.set_text(images[row, 0], title=shown.prompts[row])
        for step in range(steps):
            figures.overlay(images[row, step + 1], image, shown.weights[step, row], float(shown.weights.max()))
            if row == 0:
                figures.set_text(images[row, step + 1], title=shown.labels[step])
    draw_forest(below.subplots(1, len(SCORES), sharey=True), rows)
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
