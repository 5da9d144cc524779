"""commands.jsonl: what was typed to begin a run, and to continue it.

    {"command": "star train --preset shapes --out runs/shapes", "iteration": 0, "processes": 1, "version": "0.2.0"}

iteration: how many the run had had. processes: how many trained. version: of star-kernels, null if it is not installed.
A run that was begun from Python has no such file.
"""

from __future__ import annotations

import importlib.metadata
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from star import files

FILE = "commands.jsonl"


@dataclass(frozen=True)
class Command:
    """A line of the file; command: as a shell takes it."""

    command: str
    iteration: int
    processes: int
    version: str | None


def note(run: Path, arguments: Sequence[str], iteration: int, processes: int) -> None:
    """Add a command to a run's folder."""
    command = Command(shlex.join(arguments), iteration, processes, installed_version())
    earlier = files.read_json_lines(run / FILE)
    files.replace_text(run / FILE, "".join(map(files.json_line, [*earlier, asdict(command)])))


def read(run: Path) -> list[Command]:
    """The commands of a run, in order. Raises files.Unreadable for a file that holds anything else."""
    found = []
    for place, line in files.numbered_json_lines(run / FILE):
        texts = isinstance(line.get("command"), str) and isinstance(line.get("version", 0), str | None)
        if not texts or not files.is_count(line.get("iteration")) or not files.is_count(line.get("processes")):
            raise files.Unreadable(f"{place} has no command of a run; delete that line")
        found.append(Command(line["command"], line["iteration"], line["processes"], line["version"]))
    return found


def installed_version() -> str | None:
    """Of star-kernels; None for a checkout on the path that is not installed."""
    try:
        return importlib.metadata.version("star-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None
