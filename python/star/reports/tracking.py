"""Metrics as JSON lines, and in TensorBoard, wandb or trackio."""

from __future__ import annotations

import json
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
    return path.read_text().strip()


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
        files.replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **metrics}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not be ahead of them
        for tracker in self.boards:
            tracker.log(metrics, step=iteration)

    def close(self) -> None:
        for tracker in self.boards:
            tracker.finish()


def read(run: Path) -> list[dict[str, float]]:
    """The metrics of a run, one dict per iteration; a last line cut short by a crash is left out. Raises
    files.Unreadable for a file that holds anything else."""
    path = run / "metrics.jsonl"
    lines = files.read_json_lines(path)
    for number, line in enumerate(lines, 1):
        numbers = all(isinstance(value, int | float) for value in line.values())
        if not numbers or not isinstance(line.get("iteration"), int):
            raise files.Unreadable(f"{path}: its entry {number} has no metrics of an iteration; delete that line")
    return lines


def read_summary(run: Path) -> dict[str, Any]:
    """What a finished run has reached; empty while it is going. Raises files.Unreadable for something else."""
    path = run / "summary.json"
    if not path.exists():
        return {}
    summary = files.parse_object(files.read_text(path), path)
    if not all(isinstance(summary.get(name), int | float) for name in ("iterations", "seconds")):
        raise files.Unreadable(f"{path} has no numbers under 'iterations' and 'seconds'; --resume writes it again")
    return summary
