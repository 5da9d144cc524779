"""Figures of a run. They take arrays and know no model; text is drawn as it stands, dollar signs included."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from star import files
from star.reports.chart import moving_average


class Shown(Protocol):
    """Images with weights over them; star.training.preview.Preview is one. images: (n, H, W, 3) in 0..1. rewards: (n,).
    weights: (S, n, h, w) of what `labels` name, or None."""

    @property
    def prompts(self) -> Sequence[str]: ...
    @property
    def images(self) -> np.ndarray: ...
    @property
    def rewards(self) -> np.ndarray: ...
    @property
    def weights(self) -> np.ndarray | None: ...
    @property
    def labels(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class BeforeAfter:
    """The same prompts and noise before and after. before, after: (n, H, W, 3) in 0..1 or uint8. rewards: (n,) or
    more."""

    prompts: Sequence[str]
    before: np.ndarray
    after: np.ndarray
    rewards_before: np.ndarray
    rewards_after: np.ndarray


def make_grid(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, np.ndarray]:
    """A figure and its (rows, columns) axes, without the global state of pyplot. size: inches."""
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


SOFTWARE = {"Software": "star-kernels"}


def save(figure: Figure, path: Path) -> None:
    files.replace(path, lambda file: figure.savefig(file, dpi=130, format="png", metadata=SOFTWARE))


def is_figure(beginning: bytes) -> bool:
    """Whether a file that begins with these bytes is a figure that `save` wrote."""
    return beginning.startswith(files.PNG) and b"tEXtSoftware\0star-kernels" in beginning


def set_text(axes: Axes, *, title: str | None = None, below: str | None = None, left: str | None = None) -> None:
    """Titles and labels as they stand: a dollar sign begins no formula."""
    if title is not None:
        axes.set_title(textwrap.fill(title, 22), fontsize=7, parse_math=False)
    if below is not None:
        axes.set_xlabel(below, fontsize=8, parse_math=False)
    if left is not None:
        axes.set_ylabel(left, fontsize=7, parse_math=False)


def show_image(axes: Axes, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def overlay(axes: Axes, image: np.ndarray, field: np.ndarray, largest: float) -> None:
    """A field over an image in gray; its locations are stretched to the image's size."""
    height, width = image.shape[:2]
    axes.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axes.imshow(field, cmap="inferno", vmin=0, vmax=largest, alpha=0.75, extent=extent, interpolation="nearest")
    axes.set(xticks=[], yticks=[])


def overlay_png(image: np.ndarray, field: np.ndarray, largest: float) -> bytes:
    """`overlay` without a frame, as a PNG of its own whose longer side has 240 pixels."""
    height, width = image.shape[:2]
    scale = 2.4 / max(height, width)  # inches of 100 pixels
    figure = Figure(figsize=(scale * width, scale * height))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    overlay(axes, image, field, largest)
    axes.set_axis_off()
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100, format="png")
    return buffer.getvalue()


def relative_map(field: np.ndarray) -> tuple[np.ndarray, float]:
    """A map over its mean, and the value at the end of its colors."""
    relative = field / max(float(field.mean()), 1e-30)
    return relative, max(4.0, float(relative.max()))


def reward_curve(iterations: Sequence[int], rewards: Sequence[float], path: Path) -> None:
    figure, ((axes,),) = make_grid(1, 1, (6, 3.2))
    values = np.array(rewards)
    axes.plot(iterations, values, color="0.75", linewidth=1, label="each iteration")
    width = max(1, len(values) // 10)
    if len(values) >= width:
        smooth = moving_average(values, width)
        axes.plot(iterations[width - 1 :], smooth, color="tab:blue", linewidth=2, label=f"mean of {width}")
    axes.set(xlabel="iteration", ylabel="reward")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def before_after(shown: BeforeAfter, path: Path) -> None:
    """Two rows of images with their rewards; a green frame: the reward rose, a red one: it fell."""
    count = len(shown.before)
    figure, axes = make_grid(2, count, (1.5 * count, 3.9))
    rows = (("before", shown.before, shown.rewards_before), ("after", shown.after, shown.rewards_after))
    for row, (label, images, rewards) in enumerate(rows):
        for column in range(count):
            show_image(axes[row, column], images[column])
            set_text(axes[row, column], below=f"{rewards[column]:.2f}")
            if row == 0:
                set_text(axes[row, column], title=shown.prompts[column])
            else:
                change = rewards[column] - shown.rewards_before[column]
                color = "tab:green" if change > 0 else "tab:red" if change < 0 else "0.6"
                for spine in axes[row, column].spines.values():
                    spine.set(color=color, linewidth=2)
        set_text(axes[row, 0], left=label)
    save(figure, path)


def rollout_grid(shown: Shown, path: Path) -> None:
    """The images with their rewards and, below, the weights of every trained step."""
    weights = shown.weights if shown.weights is not None else np.empty((0, len(shown.images), 0, 0))
    count = len(shown.images)
    figure, axes = make_grid(len(weights) + 1, count, (1.5 * count, 0.6 + 1.6 * (len(weights) + 1)))
    for column in range(count):
        show_image(axes[0, column], shown.images[column])
        set_text(axes[0, column], title=shown.prompts[column], below=f"{shown.rewards[column]:.2f}")
        for row, fields in enumerate(weights):
            overlay(axes[row + 1, column], shown.images[column], fields[column], float(weights.max()))
    set_text(axes[0, 0], left="reward")
    for row in range(len(weights)):
        set_text(axes[row + 1, 0], left=shown.labels[row])
    save(figure, path)


def allocation(shown: Shown, path: Path) -> None:
    """Each prompt's image and, step by step, the weights over it."""
    if shown.weights is None:
        raise ValueError("weights: got none, expected those of every step")
    count, steps = len(shown.images), len(shown.weights)
    figure, axes = make_grid(count, steps + 1, (1.25 * (steps + 1), 1.5 * count))
    largest = float(shown.weights.max())
    for row in range(count):
        show_image(axes[row, 0], shown.images[row])
        axes[row, 0].set_axis_off()
        set_text(axes[row, 0], title=shown.prompts[row])
        for column in range(steps):
            overlay(axes[row, column + 1], shown.images[row], shown.weights[column, row], largest)
            if row == 0:
                set_text(axes[row, column + 1], title=shown.labels[column])
    bar = figure.colorbar(axes[0, 1].images[-1], ax=axes[:, -1], fraction=0.08)
    bar.set_label("weight (mean 1)", fontsize=7)
    save(figure, path)


def concept_maps(
    prompt: str,
    image: np.ndarray,
    maps: dict[str, np.ndarray],
    weights: np.ndarray,
    sigmas: Sequence[float],
    path: Path,
) -> None:
    """One prompt: its image, each concept's maps (rows, by label) over the steps (columns), and the weights below.

    image: (H, W, 3) in 0..1. maps: (T, h, w) by label. weights: (T, h, w).
    """
    steps = len(weights)
    figure, axes = make_grid(len(maps) + 1, steps + 1, (1.2 * (steps + 1), 1.3 * (len(maps) + 1)))
    for first in axes[:, 0]:
        first.set_axis_off()
    show_image(axes[0, 0], image)
    set_text(axes[0, 0], title=prompt)
    for row, (label, fields) in enumerate(maps.items()):
        for column, field in enumerate(fields):
            overlay(axes[row, column + 1], image, *relative_map(field))
        set_text(axes[row, 1], left=label)
    for column, field in enumerate(weights):
        overlay(axes[-1, column + 1], image, field, float(weights.max()))
        set_text(axes[0, column + 1], title=f"sigma {sigmas[column]:.2f}")
    set_text(axes[-1, 1], left="weights")
    save(figure, path)
