"""`star report`: one self-contained HTML page of one or several runs, with curves, images and what differs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
from matplotlib.colors import to_hex

from star import config as configuration
from star import files
from star.config import flatten
from star.reports import tracking
from star.reports.evaluations import Evaluation, compare, format_error, read_evaluations
from star.reports.figures import make_grid, moving_average
from star.reports.metrics import MEANING, meaning, patterns

FIGURES = {
    "reward_curve.png": "reward of the training prompts",
    "before_after.png": "the same prompts and noise before and after",
    "allocation.png": "weights that attention allocates, step by step",
}


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. config: flat, by dotted name. summary: empty while the run is going."""

    name: str
    color: str
    config: dict[str, object]
    metrics: list[dict[str, float]]
    evaluations: list[Evaluation]
    summary: dict[str, object]
    images: list[tuple[str, str]]  # caption, data URL
    grids: list[tuple[str, str]]

    @property
    def facts(self) -> dict[str, str]:
        """The rows of the table that compares runs."""
        rows = {"iterations": f"{len(self.metrics)} of {self.config.get('optimization.iterations', '?')}"}
        tail = [line["reward"] for line in self.metrics[-max(1, len(self.metrics) // 10) :] if "reward" in line]
        if tail:
            rows["reward, last tenth"] = f"{np.nanmean(tail):.4f}"
        seconds = [sum(v for k, v in line.items() if k.startswith("seconds/")) for line in self.metrics]
        if seconds:
            rows["seconds per iteration, median"] = f"{np.median(seconds):.2f}"
        if "seconds" in self.summary:
            rows["seconds in all"] = f"{self.summary['seconds']:.0f}"
        memory = [line["memory_gib"] for line in self.metrics if "memory_gib" in line]
        if memory:
            rows["peak memory, GiB"] = f"{max(memory):.2f}"
        return rows

    @property
    def held_out(self) -> dict[tuple[str, str], str]:
        """By (column, category) the scores before and after, or those so far."""
        if not self.evaluations:
            return {}
        first, last = self.evaluations[0], self.evaluations[-1]
        rows = {}
        for column in first.values:
            for category in (None, *first.category_names()):
                found = compare(first, last, category).get(column)
                before = first.mean(column, category)
                label = (column, category or "all prompts")
                if len(self.evaluations) == 1 or found is None:
                    rows[label] = f"{before.mean:.4f}{format_error(before.standard_error)}"
                else:
                    change = f"{found['difference']:+.4f}{format_error(found['standard_error'])}"
                    rows[label] = f"{found['before']:.4f} → {found['after']:.4f} ({change})"
        return rows


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read_figure(file: Path) -> bytes | None:
    """The PNG that a run drew; None where there is none. Whoever sends a run's folder must not choose what of the
    reader's files is in the page: links are left out, and so is what is no PNG."""
    if file.is_symlink() or not file.is_file():
        return None
    data = file.read_bytes()
    return data if data.startswith(b"\x89PNG\r\n\x1a\n") else None


def read(path: Path, name: str, color: str) -> Run:
    """Read a run's folder. Raises ValueError if it is none, or holds what no run writes."""
    if not (path / "config.yaml").is_file():
        raise ValueError(f"runs: {path} is no run (it has no config.yaml)")

    def images(found: Sequence[tuple[Path, str]]) -> list[tuple[str, str]]:
        return [(caption, data_url(data, "png")) for file, caption in found if (data := read_figure(file))]

    grids = sorted((path / "grids").glob("*.png"))
    return Run(
        name=name,
        color=color,
        config=flatten(configuration.read(path / "config.yaml")),
        metrics=tracking.read(path),
        evaluations=read_evaluations(path),
        summary=tracking.read_summary(path),
        images=images([(path / file, caption) for file, caption in FIGURES.items()]),
        grids=images([(file, f"after {int(file.stem)} iterations") for file in grids if file.stem.isdecimal()]),
    )


def names(paths: Sequence[Path]) -> list[str]:
    """Folder names, or, where two are the same, paths."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """The settings that are not the same in all runs, but for where they are."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    rows = {key: [str(run.config.get(key, "—")) for run in runs] for key in keys}
    ignored = ("run.out", "run.resume", "run.overwrite")
    return {key: row for key, row in rows.items() if len(set(row)) > 1 and key not in ignored}


def order(name: str) -> tuple[int, str]:
    """A metric's rank: that of its documentation."""
    ranks = list(MEANING)
    pattern = name if name in MEANING else next(patterns(name), None)
    return (len(ranks) if pattern is None else ranks.index(pattern)), name


@dataclass(frozen=True)
class Curve:
    """The points of one run. errors: half the width of a band around them, or None."""

    color: str
    x: np.ndarray
    y: np.ndarray
    errors: np.ndarray | None = None


def draw_curves(curves: Sequence[Curve]) -> str | None:
    """A line for each run, as a data URL; None if there is nothing to see. Without errors a moving average is drawn
    over the points."""
    curves = [curve for curve in curves if len(curve.x)]
    if not curves:
        return None
    figure, ((axes,),) = make_grid(1, 1, (4.2, 2.3))
    for curve in curves:
        width = max(1, len(curve.y) // 15) if curve.errors is None else 1
        axes.plot(curve.x, curve.y, color=curve.color, linewidth=0.8, alpha=0.3 if width > 1 else 1.0)
        if width > 1:
            smooth = moving_average(curve.y, width)
            axes.plot(curve.x[width // 2 : width // 2 + len(smooth)], smooth, color=curve.color, linewidth=1.8)
        if curve.errors is not None:
            axes.plot(curve.x, curve.y, "o", color=curve.color, markersize=3)
            low, high = curve.y - curve.errors, curve.y + curve.errors
            axes.fill_between(curve.x, low, high, color=curve.color, alpha=0.15, linewidth=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("iteration", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    return data_url(buffer.getvalue(), "svg+xml")


def metric_curve(name: str, run: Run) -> Curve:
    """A metric over the iterations."""
    points = [(line["iteration"] + 1, line[name]) for line in run.metrics if name in line]
    points = [(x, y) for x, y in points if np.isfinite(y)]
    x, y = np.array(points).reshape(-1, 2).T
    return Curve(run.color, x, y)


def held_out_curve(column: str, run: Run) -> Curve:
    """A held-out score over the scorings, with its standard error."""
    means = [(e.iteration, e.mean(column)) for e in run.evaluations if column in e.values]
    points = [(i, m.mean, np.nan_to_num(m.standard_error)) for i, m in means if m.prompts]
    x, y, errors = np.array(points).reshape(-1, 3).T
    return Curve(run.color, x, y, errors)


def write(paths: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in `paths`. Raises ValueError for a folder that is no run."""
    colors = [to_hex(color) for color in matplotlib.color_sequences["tab10"]]
    runs = [
        read(path, name, colors[i % len(colors)])
        for i, (path, name) in enumerate(zip(paths, names(paths), strict=True))
    ]
    columns = list(dict.fromkeys(column for run in runs for e in run.evaluations for column in e.values))
    meanings = {f"held-out {c}": "mean over the held-out prompts; band: one standard error" for c in columns}
    drawn = {f"held-out {c}": draw_curves([held_out_curve(c, run) for run in runs]) for c in columns}
    for name in sorted({key for run in runs for line in run.metrics for key in line} - {"iteration"}, key=order):
        meanings[name], drawn[name] = meaning(name), draw_curves([metric_curve(name, run) for run in runs])
    curves = [(name, meanings[name], image) for name, image in drawn.items() if image is not None]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = template.get_template("page.html").render(
        runs=runs,
        facts=list(dict.fromkeys(key for run in runs for key in run.facts)),
        held_out=list(dict.fromkeys(key for run in runs for key in run.held_out)),
        differences=differences(runs) if len(runs) > 1 else {},
        curves=curves,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(out, text)
