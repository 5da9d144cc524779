"""What pairs of times say: an interval, a verdict on a limit, and what got slower since the last run of a machine.

The bootstrap is `star.study.bootstrap`'. Around it are the midmean, which a few disturbed pairs do not move and whose
resamples are not lumps as a median's are, and a confidence that allows for several looks at the same row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

from star.study.bootstrap import Estimate, percentiles

# A row is looked at when these shares of its time have passed, and ends when it is decided. Each look is wrong with a
# probability of 1 %, so all five of them together with at most 5 %.
LOOKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1)
CONFIDENCE = 0.99
FEWEST = 20  # pairs: below, the bootstrap's intervals are too narrow
TOLERANCE = 1.3  # times what was last measured on the same machine

Verdict = Literal["met", "not met", "undecided", "no limit"]


@dataclass(frozen=True)
class Unit:
    """value: of the seconds of ours and of the other side in a pair. more: whether more is better. overhead: a
    difference, which may be zero or negative; factors of it mean nothing."""

    value: Callable[[float, float], float]
    more: bool = False
    overhead: bool = False

    def better(self, value: float, other: float) -> bool:
        return value > other if self.more else value < other


UNITS = {
    "%": Unit(lambda ours, other: 100 * (ours / other - 1), overhead=True),
    "us": Unit(lambda ours, other: 1e6 * (ours - other), overhead=True),
    "x": Unit(lambda ours, other: other / ours, more=True),
    "KiB": Unit(lambda ours, other: (ours - other) / 2**10, overhead=True),
    "MiB": Unit(lambda ours, other: (ours - other) / 2**20, overhead=True),
}


def midmean(values: np.ndarray, axis: int = -1) -> np.ndarray:
    """The mean of the middle half."""
    return stats.trim_mean(values, 0.25, axis=axis)


def interval(values: Sequence[float]) -> Estimate:
    """The midmean of one value a pair, and its interval by bootstrap over the pairs; NaN ends below `FEWEST` pairs."""
    known = np.asarray(values, dtype=float)
    if len(known) < FEWEST:
        return Estimate(float(midmean(known)), np.nan, np.nan)
    return Estimate(float(midmean(known)), *percentiles([known], midmean, CONFIDENCE))


def limit_of(unit: Unit, goal: float | None, last: float | None) -> float | None:
    """The limit of a row on a machine: 1.3 times what was last measured there, or the goal if that asks for more.

    An overhead that has a goal keeps it: 1.3 times nothing is nothing. None: neither a goal nor a last value."""
    if last is None or (unit.overhead and (goal is not None or last <= 0)):
        return goal
    near = last / TOLERANCE if unit.more else last * TOLERANCE
    return near if goal is None or unit.better(near, goal) else goal


def verdict(unit: Unit, estimate: Estimate, limit: float | None) -> Verdict:
    """met or not met where the whole interval lies on one side of the limit."""
    if limit is None:
        return "no limit"
    ends = (estimate.low, estimate.high)
    if all(end == limit or unit.better(end, limit) for end in ends):
        return "met"
    return "not met" if all(unit.better(limit, end) for end in ends) else "undecided"


EXACT = ("operators", "allocations")  # counts that a quiet machine and a busy one have in common


def slower(rows: Iterable[Mapping], past: Mapping[str, Mapping]) -> list[str]:
    """What got slower: each row whose interval lies wholly on the worse side of its past one, or that counts more.

    rows: results as `runner` writes them. past: the last of each name on the same machine."""
    found = []
    for row in rows:
        name, before = row["name"], past.get(row["name"])
        if before is None:
            continue
        unit = UNITS[row["unit"]]
        ends = (row.get("low"), before.get("low"))
        if None not in ends and row["low"] != row["high"]:  # a peak of memory has no interval, and its limit alone
            now, then = (one["low" if unit.more else "high"] for one in (row, before))
            best, worst = (row["high"], before["low"]) if unit.more else (row["low"], before["high"])
            if unit.better(worst, best):
                found.append(f"{name} {then:.4g} -> {now:.4g} {row['unit']}")
        for count in EXACT:
            now, then = (one.get("counts", {}).get("ours", {}).get(count) for one in (row, before))
            if None not in (now, then) and now > then:
                found.append(f"{name} {then} -> {now} {count}")
    return found
