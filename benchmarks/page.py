"""Fills the tables of docs/benchmarks.md from results.jsonl: `python benchmarks/page.py`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from results import last_results, last_value, read_runs
from rows import ROWS
from star import document
from verdicts import UNITS, limit_of

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "benchmarks.md"
TIMES, COUNTS = "results of the benchmarks", "counts of the benchmarks"


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def duration(seconds: float) -> str:
    return f"{seconds:.4g} s" if seconds >= 1 else f"{1e3 * seconds:.4g} ms"


def interval(result: dict) -> str:
    """Of a result; where none was kept, what the number is."""
    if ends := result.get("quartiles"):
        return f"{number(ends[0])} to {number(ends[1])}: quartiles"
    if result.get("low") is None:
        known = {"median": "a median", "ratio of medians": "a ratio of medians", "counted": "counted"}
        return known.get(result.get("of", ""), "too few pairs")
    ends = result["low"], result["high"]
    return "counted" if ends[0] == ends[1] else f"{number(ends[0])} to {number(ends[1])}"


def limit(row, result: dict) -> str:
    """The limit that the row was judged by; where it was not judged, the one it has now."""
    known = result["limit"] if "limit" in result else limit_of(UNITS[row.unit], row.goal, last_value(result))
    return "" if known is None else f"{'>=' if UNITS[row.unit].more else '<='} {number(known)}"


def times(result: dict) -> str:
    if "ours" not in result:
        return ""
    return " / ".join(duration(result[side]) for side in ("ours", "other"))


def line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def value_table(known: dict[str, dict]) -> list[str]:
    titles = ("row", "value", "99 % interval", "limit", "verdict", "ours / other", "of the machine's limit", "date")
    lines = [line(titles), "|---|---:|---|---|---|---|---:|---|"]
    for row in ROWS:
        result = known.get(row.name)
        if result is None or "value" not in result:
            continue
        share = f"{result['fastest'] / result['ours']:.0%}" if result.get("fastest") else ""
        verdict = result.get("verdict", "not judged").replace("not met", "**not met**")
        value = f"{number(result['value'])} {row.unit}"
        cells = (value, interval(result), limit(row, result), verdict, times(result), share, result["date"])
        lines.append(line((f"`{row.name}`", *cells)))
    missing = len(ROWS) + 2 - len(lines)
    return [*lines, "", f"{missing} of {len(ROWS)} rows were not measured there yet."] if missing else lines


def count_table(known: dict[str, dict]) -> list[str]:
    names = ("operators", "bytes", "flops", "allocations", "allocated", "faults", "instructions")
    titles = ("operators", "MB of tensors", "GFLOP", "allocations", "MB allocated", "page faults", "instructions, M")
    scales = {"bytes": 1e6, "flops": 1e9, "allocated": 1e6, "instructions": 1e6}
    lines = [line(("row", *titles)), "|---|---:|---:|---:|---:|---:|---:|---:|"]
    for row in ROWS:
        if counted := known.get(row.name, {}).get("counts"):
            cells = []
            for name in names:
                sides = [counted[side].get(name) for side in ("ours", "other")]
                shown = [f"{one / scales.get(name, 1):.4g}" for one in sides if one is not None]
                cells.append(" / ".join(shown))
            lines.append(line((f"`{row.name}`", *cells)))
    return lines


def speeds(run: dict) -> str:
    return f" It copies {run['copy'] / 1e9:.1f} GB/s and multiplies {run['product'] / 1e9:.0f} GFLOP/s in float32."


def texts(runs: list[dict]) -> dict[str, str]:
    """For each mark of the document what belongs there: all machines, newest results."""
    found: dict[str, list[str]] = {TIMES: [], COUNTS: []}
    for name in dict.fromkeys(run["machine"] for run in runs):
        known = last_results(runs, name)
        rated = next((run for run in reversed(runs) if run["machine"] == name and "copy" in run), None)
        rates = "" if rated is None else speeds(rated)
        versions = ", ".join(dict.fromkeys(f"torch {run['torch']}" for run in runs if run["machine"] == name))
        found[TIMES] += [f"**{name}**, {versions}.{rates}", "", *value_table(known), ""]
        counts = count_table(known)
        if len(counts) > 2:
            found[COUNTS] += [f"**{name}**", "", *counts, ""]
    return {name: "\n".join(lines) or "Not counted yet." for name, lines in found.items()}


def main() -> None:
    document.fill(DOCUMENT, texts(read_runs()))


if __name__ == "__main__":
    main()
