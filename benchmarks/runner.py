"""Measures a row: both sides alternately, until the verdict is there or the time is up."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

import counts
import machine
from star.study.bootstrap import Estimate
from verdicts import FEWEST, LOOKS, UNITS, Unit, Verdict, interval, limit_of, verdict

ROUND = 0.02  # seconds: shorter calls are repeated for as long
MOST_SETS = 16


@dataclass(frozen=True)
class Sides:
    """What is compared, on one set of buffers, and how it is known that both compute the same.

    equal: of both results; raises AssertionError. scale: of what ours adds; a ratio has none. moved: bytes that a call
    of ours must move, where they are not all of its operators' tensors. threads: None for as many as there are.
    compiled: the other side is, with torch.compile."""

    ours: Callable[[], object]
    other: Callable[[], object]
    equal: Callable[[object, object], None] = torch.testing.assert_close
    note: str = ""
    scale: float = 1.0
    moved: int | None = None
    threads: int | None = None
    compiled: bool = False


@dataclass(frozen=True)
class Counted:
    """Two peaks of memory, in bytes: nothing that a clock's mood could change."""

    ours: int
    other: int
    note: str = ""


@dataclass(frozen=True)
class Row:
    """make: a set of buffers and both sides on it; called again for each set.

    goal: what is promised on every machine; the limit may be closer (`verdicts.limit_of`). seconds: after which it is
    undecided. quick: in `make bench-quick` too."""

    name: str
    unit: str
    make: Callable[[], Sides | Counted]
    goal: float | None = None
    quick: bool = False
    seconds: float = 60.0


@dataclass
class Side:
    """The time of one side in each pair, and what was counted meanwhile, of one call."""

    calls: int
    seconds: list[float] = field(default_factory=list)
    faults: list[float] = field(default_factory=list)
    instructions: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Measured:
    estimate: Estimate
    verdict: Verdict
    ours: Side
    other: Side


def measure(
    sets: Sequence[Sides],
    unit: Unit,
    limit: float | None,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
    instructions: Callable[[], int | None] = lambda: None,
) -> Measured:
    """Times both sides in pairs, the first of a pair changing and the buffers going round, until the interval of the
    value lies on one side of the limit or the time is up. Without a limit it takes a quarter of the time."""
    functions = [one.ours for one in sets], [one.other for one in sets]

    def timed(chosen: list[Callable[[], object]]) -> tuple[float, int, int | None]:
        faults, executed, start = counts.page_faults(), instructions(), clock()
        for function in chosen:
            function()
        took = clock() - start
        after = instructions()
        return took, counts.page_faults() - faults, None if executed is None or after is None else after - executed

    sides = []
    for side in functions:
        once = timed(side[:1])[0]
        if once < ROUND:  # the first call may load something
            once = min(timed(side[:1])[0] for _ in range(3))
        sides.append(Side(max(1, round(ROUND / once)) if once else 1))
    looks, values, begin = [share * seconds for share in LOOKS], [], clock()
    if limit is None:
        looks = looks[:3]
    for number in range(sys.maxsize):
        for which in (0, 1) if number % 2 else (1, 0):
            side, calls = functions[which], sides[which].calls
            chosen = [side[(number * calls + i) % len(side)] for i in range(calls)]
            took, faults, executed = timed(chosen)
            sides[which].seconds.append(took / calls)
            sides[which].faults.append(faults / calls)
            if executed is not None:
                sides[which].instructions.append(executed / calls)
        value = unit.value(*(side.seconds[-1] for side in sides))
        values.append(sets[0].scale * value if unit.overhead else value)
        passed = clock() - begin
        if passed >= looks[-1] or (passed >= looks[0] and len(values) >= FEWEST):
            estimate = interval(values)
            decided = verdict(unit, estimate, limit)
            if passed >= looks[-1] or decided in ("met", "not met"):
                return Measured(estimate, decided, *sides)
            looks = [look for look in looks if look > passed]
    raise AssertionError("unreachable")


def sets_of(row: Row, first: Sides, moved: int) -> list[Sides]:
    """As many sets of buffers as hold four times what the caches do, so that none finds its data there."""
    count = math.ceil(4 * machine.cache_bytes() / max(moved, 1))
    return [first, *(row.make() for _ in range(min(count, MOST_SETS) - 1))]


@dataclass(frozen=True)
class Machine:
    """copy: bytes a second. product: FLOPs a second."""

    copy: float
    product: float

    def fastest(self, counted: counts.Counts, moved: int | None) -> float:
        """Seconds below which no call can do what was counted."""
        return max((counted.bytes if moved is None else moved) / self.copy, counted.flops / self.product)


def run(row: Row, last: float | None, rates: Machine | None, seconds: float, instructions=lambda: None) -> dict:
    """A row's result, as results.jsonl keeps it. rates: None to count alone. Raises AssertionError, with the row's
    name, if both sides do not compute the same."""
    unit = UNITS[row.unit]
    limit = limit_of(unit, row.goal, last)
    result = dict(name=row.name, unit=row.unit)
    made = row.make()
    if isinstance(made, Counted):
        value = unit.value(made.ours, made.other)
        found = Estimate(value, value, value)
        known = dict(value=value, low=value, high=value, limit=limit, verdict=verdict(unit, found, limit))
        return result | known | dict(note=made.note)
    threads = torch.get_num_threads()
    torch.set_num_threads(made.threads or threads)
    try:
        try:
            made.equal(made.ours(), made.other())
        except AssertionError as error:
            raise AssertionError(f"{row.name}: both sides must compute the same: {error}") from error
        counted = {"ours": counts.counts(made.ours), "other": counts.counts(made.other, made.compiled)}
        result |= dict(note=made.note, counts={side: one._asdict() for side, one in counted.items()})
        if rates is None:
            return result
        moved = counted["ours"].bytes if made.moved is None else made.moved
        measured = measure(sets_of(row, made, moved), unit, limit, seconds, instructions=instructions)
    finally:
        torch.set_num_threads(threads)
    for name in ("ours", "other"):
        side = getattr(measured, name)
        result[name] = statistics.median(side.seconds)
        result["counts"][name]["faults"] = statistics.median(side.faults)
        if side.instructions:
            result["counts"][name]["instructions"] = statistics.median(side.instructions)
    estimate = measured.estimate
    ends = [None if math.isnan(end) else end for end in (estimate.low, estimate.high)]
    result |= dict(value=estimate.mean, low=ends[0], high=ends[1], limit=limit, verdict=measured.verdict)
    return result | dict(pairs=len(measured.ours.seconds), fastest=rates.fastest(counted["ours"], made.moved))
