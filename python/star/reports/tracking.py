"""Metrics as JSON lines, and in TensorBoard, wandb or trackio."""

from __future__ import annotations

import math
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.tracking import GeneralTracker, TensorBoardTracker, TrackioTracker, WandBTracker

from star import files
from star.config import Config, ConfigError, to_dict


@contextmanager
def timed(seconds: dict[str, float], phase: str) -> Iterator[None]:
    """Add the time of a `with` block to seconds["seconds/phase"]."""
    begin = time.perf_counter()
    yield
    seconds[f"seconds/{phase}"] += time.perf_counter() - begin


def run_id(run: Path) -> str:
    """A name that this run alone has, for services that many runs report to; it goes with the run's folder."""
    path = run / "run_id"
    if not path.exists():
        files.replace_text(path, uuid.uuid4().hex[:12])
    return files.read_text(path).strip()


def board(name: str, config: Config, start: int) -> GeneralTracker:
    """An experiment tracker that goes on at an iteration. Raises ConfigError if its package is missing."""
    run = config.run.out
    try:
        if name == "tensorboard":
            tracker = TensorBoardTracker("tensorboard", run, purge_step=start)
        elif name == "wandb":
            # The same id continues the same run; what a killed run left behind stays there.
            tracker = WandBTracker("star", name=run.name, id=run_id(run), resume="allow", dir=str(run))
        else:
            tracker = TrackioTracker("star", name=f"{run.name}-{run_id(run)}", resume="allow")
        tracker.start()
    except ImportError as error:
        raise ConfigError(f"run.trackers: {name!r} needs {error.name}; pip install {error.name}") from error
    if name != "tensorboard":
        tracker.store_init_configuration(to_dict(config))
    return tracker


class Tracker:
    """Writes one line of metrics per iteration to metrics.jsonl and to the trackers of the run's configuration.

    Continuing at an iteration drops the lines of later ones, which a killed run may have left.
    """

    def __init__(self, config: Config, start: int) -> None:
        run = config.run.out
        self.path = run / "metrics.jsonl"
        self.boards = [board(name, config, start) for name in config.run.trackers]
        kept = [line for line in read(run) if line["iteration"] < start]
        files.replace_text(self.path, "".join(map(files.json_line, kept)))

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(files.json_line({"iteration": iteration, **metrics}))
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not be ahead of them
        for tracker in self.boards:
            tracker.log(metrics, step=iteration)

    def close(self) -> None:
        for tracker in self.boards:
            tracker.finish()


def read(run: Path) -> list[dict[str, float]]:
    """The metrics of a run, one dict per iteration, NaN for null; a last line cut short by a crash is left out. Raises
    files.Unreadable for a file that holds anything else."""
    found: list[dict[str, float]] = []
    for place, line in files.numbered_json_lines(run / "metrics.jsonl"):
        numbers = {name: math.nan if value is None else value for name, value in line.items()}
        if not files.is_count(line.get("iteration")) or not all(map(files.is_number, numbers.values())):
            raise files.Unreadable(f"{place} has no metrics of an iteration; delete that line")
        found.append(numbers)
    return found


def read_summary(run: Path) -> dict[str, Any]:
    """What a finished run has reached; empty while it is going. Raises files.Unreadable for something else."""
    path = run / "summary.json"
    if not path.exists():
        return {}
    summary = files.parse_object(files.read_text(path), path)
    if not files.is_count(summary.get("iterations")) or not files.is_number(summary.get("seconds")):
        raise files.Unreadable(f"{path} has no numbers under 'iterations' and 'seconds'; --resume writes it again")
    return summary
