"""Metrics as JSON lines and in TensorBoard."""

from __future__ import annotations

import json
import os
import time
from contextlib import contextmanager
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from star import files


@contextmanager
def timed(seconds: dict[str, float], phase: str):
    """Add the time of a `with` block to seconds["seconds/phase"]."""
    begin = time.perf_counter()
    yield
    seconds[f"seconds/{phase}"] += time.perf_counter() - begin


class Tracker:
    """Writes one line of metrics per iteration to metrics.jsonl and to TensorBoard.

    Continuing at an iteration drops the lines of later ones, which a killed run may have left.
    """

    def __init__(self, run: Path, start: int) -> None:
        self.path = run / "metrics.jsonl"
        kept = [line for line in read(run) if line["iteration"] < start]
        files.replace_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.board = SummaryWriter(run / "tensorboard", purge_step=start)

    def log(self, iteration: int, metrics: dict[str, float]) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps({"iteration": iteration, **metrics}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # a checkpoint must not be ahead of them
        for name, value in metrics.items():
            self.board.add_scalar(name, value, iteration)

    def close(self) -> None:
        self.board.close()


def read(run: Path) -> list[dict[str, float]]:
    """The metrics of a run, one dict per iteration; a line cut short by a crash is left out."""
    path, lines = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines
