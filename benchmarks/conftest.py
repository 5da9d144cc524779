"""One table for all benchmarks: each test records rows; the session prints them and writes benchmarks/results.json."""

import json
import os
import platform
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: spinning threads disturb the other of a pair
# But for some 50 microseconds: to wake a thread takes as long, and it may wake on the core of the one that waits.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

RESULTS = Path(__file__).with_name("results.json")
ROWS = pytest.StashKey[list]()


def machine() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def pytest_configure(config):
    config.stash[ROWS] = []
    if threads := os.environ.get("STAR_BENCH_THREADS"):
        torch.set_num_threads(int(threads))


@pytest.fixture
def row(request, benchmark):
    """row(name, value, at_least=... or at_most=..., note="") adds a row to the table and to the extra_info."""

    def record(name: str, value: float, *, at_least: float | None = None, at_most: float | None = None, note: str = ""):
        met = value >= at_least if at_most is None else value <= at_most
        limit = f">= {at_least:g}" if at_most is None else f"<= {at_most:g}"
        benchmark.extra_info[name] = value
        request.config.stash[ROWS].append(dict(name=name, value=value, limit=limit, met=bool(met), note=note))

    return record


def pytest_terminal_summary(terminalreporter, config):
    rows = config.stash[ROWS]
    if not rows:
        return
    RESULTS.write_text(json.dumps([{**r, "machine": machine()} for r in rows], indent=2) + "\n")
    terminalreporter.section("benchmarks")
    terminalreporter.line(machine())
    width = max(len(r["name"]) for r in rows)
    for r in rows:
        met = "met" if r["met"] else "NOT MET"
        terminalreporter.line(f"{r['name']:<{width}}  {r['value']:>12.4g}  {r['limit']:>10}  {met:<7}  {r['note']}")
