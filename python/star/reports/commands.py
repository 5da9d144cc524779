"""commands.jsonl: what was typed to begin a run, and to continue it.

    {"command": "star train --preset shapes --out runs/shapes", "iteration": 0, "processes": 1, "version": "0.2.0"}

iteration: how many the run had had. processes: how many trained. version: of star-kernels, null if it is not installed.
A run that was begun from Python has no such file.
"""

from __future__ import annotations

import importlib.metadata
import json
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
    files.replace_text(run / FILE, "".join(json.dumps(line) + "\n" for line in [*earlier, asdict(command)]))


def read(run: Path) -> list[Command]:
    """The commands of a run, in order. Raises files.Unreadable for a file that holds anything else."""
    path = run / FILE
    found = []
    for number, line in enumerate(files.read_json_lines(path), 1):
        kinds = {"command": str, "iteration": int, "processes": int, "version": str | None}
        if not all(name in line and isinstance(line[name], kind) for name, kind in kinds.items()):
            raise files.Unreadable(f"{path}: its entry {number} is no command; delete that line")
        found.append(Command(*(line[name] for name in kinds)))
    return found


def installed_version() -> str | None:
    """Of star-kernels; None for a checkout on the path that is not installed."""
    try:
        return importlib.metadata.version("star-kernels")
    except importlib.metadata.PackageNotFoundError:
        return None
