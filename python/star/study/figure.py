"""The figure of a study: curves beside the baseline's, and the differences at the end."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

from star.reports import figures
from star.study import intervals
from star.study.results import METRIC, Results

BASELINE_COLOR, ARM_COLOR = "0.45", "tab:blue"
ROW, LINE = 2.4, 0.3  # inches, of a row of panels and of an arm's difference
WIDTH = 5.5  # inches, at least: the lines of text need them


def draw(results: Results, baseline: str, path: Path) -> None:
    """One panel for each arm with several seeds (or for each arm, if none has), and the paired differences below."""
    shown = results.replicated() or results.arms
    arms = [arm for arm in shown if arm != baseline] or shown
    columns = min(4, len(arms))
    rows = math.ceil(len(arms) / columns)
    heights = (ROW * rows, 3 * LINE + LINE * len(arms))
    figure = Figure(figsize=(max(3.1 * columns + 0.6, WIDTH), sum(heights)), layout="constrained")
    FigureCanvasAgg(figure)
    parts = figure.add_gridspec(2, 1, height_ratios=heights)
    draw_curves(figure.add_subfigure(parts[0]), results, arms, baseline, (rows, columns))
    draw_differences(figure.add_subfigure(parts[1]).subplots(), results, arms, baseline)
    figures.save(figure, path)


def label(results: Results, arm: str) -> str:
    """An arm's name with the number of its seeds."""
    return f"{arm} (n={results.seed_count(arm)})"


def curve_bands(results: Results, arm: str) -> np.ndarray:
    """(3, E): mean, lower and upper end at each iteration."""
    curves = results.curves(METRIC, arm)
    bands = [intervals.interval(curves[:, e], results.prompts) for e in range(len(results.iterations))]
    return np.array([(band.mean, band.low, band.high) for band in bands]).T


def draw_curves(figure: SubFigure, results: Results, arms: list[str], baseline: str, grid: tuple[int, int]) -> None:
    panels = figure.subplots(*grid, sharex=True, sharey=True, squeeze=False)
    names = dict.fromkeys([baseline, *arms])
    bands = {name: curve_bands(results, name) for name in names if name in results.arms}
    for arm, axes in zip(arms, panels.flat, strict=False):
        for name, color in {baseline: BASELINE_COLOR, arm: ARM_COLOR}.items():
            if name in bands:
                mean, low, high = bands[name]
                axes.plot(results.iterations, mean, color=color, linewidth=1.8)
                axes.fill_between(results.iterations, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_title(label(results, arm), fontsize=9, color=ARM_COLOR)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(arms) :]:
        axes.axis("off")
    gray = label(results, baseline) if baseline in results.arms else "none"
    figure.supylabel(f"held-out {METRIC}", fontsize=9)
    figure.suptitle(f"gray: {gray}; bands: {intervals.CONFIDENCE:.0%} over seeds and prompts", fontsize=9)


def draw_differences(axes: Axes, results: Results, arms: list[str], baseline: str) -> None:
    labels = []
    for y, arm in enumerate(arms):
        difference = intervals.difference(results, arm, baseline) if baseline in results.arms else None
        labels.append(f"{arm} (n={difference.seeds if difference else 0})")
        if difference is not None:
            ends = [difference.estimate.low, difference.estimate.high]
            axes.plot(ends, [y, y], color=ARM_COLOR, linewidth=2)
            face = ARM_COLOR if difference.significant else "white"
            axes.plot(difference.estimate.mean, y, "o", color=ARM_COLOR, markerfacecolor=face, markersize=5)
    axes.axvline(0, color=BASELINE_COLOR, linewidth=1)
    axes.set_yticks(range(len(arms)), labels, fontsize=8)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(
        f"{METRIC} at the end, difference to {baseline}\nfilled: shown by interval and t-test; n: seeds of both arms",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
