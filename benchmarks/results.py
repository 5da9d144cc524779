"""Past results: results.jsonl has a line for each run that was recorded, of any machine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

RESULTS = Path(__file__).with_name("results.jsonl")


def read_runs(path: Path = RESULTS) -> list[dict]:
    """The runs that were recorded, oldest first."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def last_results(runs: Sequence[dict], name: str) -> dict[str, dict]:
    """The newest result of each row on a machine, with nothing of older ones; of a row that was counted later, with the
    later counts."""
    found: dict[str, dict] = {}
    for run in runs:
        if run["machine"] == name:
            for row in run["rows"]:
                if "value" in row:
                    found[row["name"]] = row | {key: run[key] for key in ("date", "commit")}
                else:
                    found[row["name"]] = found.get(row["name"], {}) | row
    return found


def last_value(result: dict) -> float | None:
    """Of a result by pairs on buffers that go round. Older ones, medians on the same buffers, are no measure for it."""
    return result.get("value") if result.get("low") is not None else None


def record(run: dict, path: Path = RESULTS) -> None:
    """Adds a run: machine, date, commit, torch, kind, rows."""
    with path.open("a") as file:
        file.write(json.dumps(run) + "\n")
