"""`star report`: one self-contained HTML page of one or several runs, with curves, pictures and what differs."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import jinja2
import matplotlib.pyplot as plt
import numpy as np
import yaml
from matplotlib.colors import to_hex

from star import files
from star.reports import tracking
from star.reports.metrics import MEANING, meaning

PICTURES = {
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
    summary: dict[str, object]
    pictures: list[tuple[str, str]]  # caption, data URL
    grids: list[tuple[str, str]]

    @property
    def facts(self) -> dict[str, str]:
        """The rows of the table that compares runs."""
        rows = {"iterations": f"{len(self.metrics)} of {self.config.get('optimization.iterations', '?')}"}
        tail = [line["reward"] for line in self.metrics[-max(1, len(self.metrics) // 10) :] if "reward" in line]
        if tail:
            rows["reward, last tenth"] = f"{np.nanmean(tail):.4f}"
        for kind in ("soft", "strict"):
            if f"{kind}_after" in self.summary:
                before, after = self.summary[f"{kind}_before"], self.summary[f"{kind}_after"]
                rows[f"held-out {kind}"] = f"{before:.4f} → {after:.4f} ({after - before:+.4f})"
        if "soft_standard_error" in self.summary:
            rows["standard error of the soft gain"] = f"{self.summary['soft_standard_error']:.4f}"
        seconds = [sum(v for k, v in line.items() if k.startswith("seconds/")) for line in self.metrics]
        if seconds:
            rows["seconds per iteration, median"] = f"{np.median(seconds):.2f}"
        if "seconds" in self.summary:
            rows["seconds in all"] = f"{self.summary['seconds']:.0f}"
        memory = [line["memory_gib"] for line in self.metrics if "memory_gib" in line]
        if memory:
            rows["peak memory, GiB"] = f"{max(memory):.2f}"
        return rows


def flat(values: dict, prefix: str = "") -> dict[str, object]:
    found = {}
    for key, value in values.items():
        # Mappings with names of the user's own stay whole.
        nested = isinstance(value, dict) and not prefix
        found |= flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def read(path: Path, name: str, color: str) -> Run:
    """Read a run's folder. Raises ValueError if it is none."""
    if not (path / "config.yaml").is_file():
        raise ValueError(f"runs: {path} is no run (it has no config.yaml)")
    summary = path / "summary.json"

    def pictures(found: Sequence[tuple[Path, str]]) -> list[tuple[str, str]]:
        return [(caption, data_url(file.read_bytes(), "png")) for file, caption in found if file.is_file()]

    grids = sorted((path / "grids").glob("*.png"))
    return Run(
        name=name,
        color=color,
        config=flat(yaml.safe_load((path / "config.yaml").read_text())),
        metrics=tracking.read(path),
        summary=json.loads(summary.read_text()) if summary.is_file() else {},
        pictures=pictures([(path / file, caption) for file, caption in PICTURES.items()]),
        grids=pictures([(file, f"after {int(file.stem)} iterations") for file in grids if file.stem.isdigit()]),
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
    """A metric's place: that of its documentation."""
    places = list(MEANING)
    exact = places.index(name) if name in places else None
    if exact is None:
        wild = [i for i, p in enumerate(places) if p.endswith("*") and name.startswith(p[:-1])]
        exact = wild[0] if wild else len(places)
    return exact, name


def curve(name: str, runs: Sequence[Run]) -> str | None:
    """One metric over the iterations, a line a run; None if there is nothing to see."""
    figure, axes = plt.subplots(figsize=(4.2, 2.3), layout="constrained")
    shown = False
    for run in runs:
        points = [(line["iteration"] + 1, line[name]) for line in run.metrics if name in line]
        points = [(x, y) for x, y in points if np.isfinite(y)]
        if not points:
            continue
        shown = True
        x, y = np.array(points).T
        width = max(1, len(y) // 15)
        axes.plot(x, y, color=run.color, linewidth=0.8, alpha=0.3 if width > 1 else 1.0)
        if width > 1:
            smooth = np.convolve(y, np.ones(width) / width, "valid")
            axes.plot(x[width // 2 : width // 2 + len(smooth)], smooth, color=run.color, linewidth=1.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("iteration", fontsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg")
    plt.close(figure)
    return data_url(buffer.getvalue(), "svg+xml") if shown else None


def write(paths: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in `paths`. Raises ValueError for a folder that is no run."""
    colors = [to_hex(color) for color in plt.get_cmap("tab10").colors]
    runs = [
        read(path, name, colors[i % len(colors)])
        for i, (path, name) in enumerate(zip(paths, names(paths), strict=True))
    ]
    known = sorted({key for run in runs for line in run.metrics for key in line} - {"iteration"}, key=order)
    curves = [(name, meaning(name), image) for name in known if (image := curve(name, runs)) is not None]
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    template = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    text = template.get_template("page.html").render(
        runs=runs,
        facts=list(dict.fromkeys(key for run in runs for key in run.facts)),
        differences=differences(runs) if len(runs) > 1 else {},
        curves=curves,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(out, text)
