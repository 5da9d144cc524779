"""The benchmarks: runs the rows of the table, and says what got slower.

    python benchmarks/run.py [--quick | --count] [--record] [NAME ...]

--quick: the rows that are quick to set up, a few seconds each. --count: no times, for a busy machine. --record: adds
the run to results.jsonl and fills the tables of the documentation. NAME: parts of names; only these rows. Ends with 1
if something got slower than in the machine's past results.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads disturb the other of a pair
# But for some 50 microseconds: to wake a thread takes as long, and it may wake on the core of the one that waits.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
# Notices of libraries about themselves, which nobody who runs this can act on.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

import argparse
import datetime
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

import counts
import machine
import page
from page import duration
from results import last_results, last_value, read_runs, record
from rows import ROWS
from runner import Machine, Row, run
from verdicts import UNITS, slower

QUICK, QUICK_TOTAL = 4.0, 200.0  # seconds of a row, and of all


def shown(result: dict) -> str:
    """A line of a result for the terminal."""
    if "value" not in result:
        ours, other = (result["counts"][side] for side in ("ours", "other"))
        told = ", ".join(f"{ours[count]} ({other[count]}) {count}" for count in ours if other[count] is not None)
        return f"{result['name']:<34} {told}"
    ends = "" if result["low"] is None else f"({result['low']:.4g}, {result['high']:.4g})"
    limit = "" if result["limit"] is None else f"{'>=' if UNITS[result['unit']].more else '<='} {result['limit']:.3g}"
    reached = f", {result['fastest'] / result['ours']:.0%} of the machine's limit" if result.get("fastest") else ""
    times = f"{duration(result['ours'])} against {duration(result['other'])}{reached}" if "ours" in result else ""
    value = f"{result['value']:.4g} {result['unit']}"
    return f"{result['name']:<34} {value:>10} {ends:<20} {limit:<8} {result['verdict']:<10} {times}"


def commit() -> str:
    told = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    return told.stdout.strip() or "unknown"


def results(
    rows: Sequence[Row], past: dict[str, dict], rates: Machine | None, quick: bool, instructions: counts.PerfCounter
) -> Iterator[dict]:
    """Each is shown as soon as it is there."""
    end = time.monotonic() + QUICK_TOTAL
    for number, row in enumerate(rows):
        torch.manual_seed(0)
        seconds = min(QUICK, max(0.0, end - time.monotonic()) / (len(rows) - number)) if quick else row.seconds
        result = run(row, last_value(past.get(row.name, {})), rates, seconds, instructions.read)
        print(shown(result), flush=True)
        yield result


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--quick", action="store_true")
    kind.add_argument("--count", action="store_true")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("names", nargs="*")
    options = parser.parse_args(arguments)
    rows = [row for row in ROWS if row.quick or not options.quick]
    rows = [row for row in rows if not options.names or any(part in row.name for part in options.names)]
    if threads := os.environ.get("STAR_BENCH_THREADS"):
        torch.set_num_threads(int(threads))
    instructions = counts.PerfCounter(*counts.INSTRUCTIONS)  # before the threads that it shall count
    name, runs = machine.name(), read_runs()
    past = last_results(runs, name)
    rates = None if options.count else Machine(machine.copy_rate(), machine.product_rate())
    print(f"{name}, torch {torch.__version__}")
    if rates:
        print(f"copy {rates.copy / 1e9:.1f} GB/s, product {rates.product / 1e9:.0f} GFLOP/s")
    found: list[dict] = []
    try:
        for result in results(rows, past, rates, options.quick, instructions):
            found.append(result)
    finally:  # an hour's results are kept if a row fails
        if options.record and found:
            about = dict(machine=name, date=str(datetime.date.today()), commit=commit(), torch=torch.__version__)
            about |= dict(kind="count" if options.count else "quick" if options.quick else "full")
            about |= dict(copy=rates.copy, product=rates.product) if rates else {}
            record(about | dict(rows=found))
            page.main()
    tally = [sum(one.get("verdict") == kind for one in found) for kind in ("met", "not met", "undecided")]
    print("{} met, {} not met, {} undecided".format(*tally))
    worse = slower(found, past)
    print(f"slower than before on this machine: {'; '.join(worse) or 'nothing'}" if past else "no past results here")
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
