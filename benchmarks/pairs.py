"""Measures two functions alternately, so that a busy or slowing machine changes both and not their ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple


class Pair(NamedTuple):
    """Median seconds of one call of each, and over the rounds of second / first the median and the quartiles."""

    first: float
    second: float
    ratio: float
    quartiles: tuple[float, float]


def seconds(function: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def alternate(
    first: Callable[[], object], second: Callable[[], object], rounds: int = 31, round_seconds: float = 0.02
) -> Pair:
    """Runs both in turn, who goes first changing every round; a round repeats short calls for round_seconds."""
    calls = [max(1, round(round_seconds / min(seconds(f, 1) for _ in range(3)))) for f in (first, second)]
    times: tuple[list[float], list[float]] = ([], [])
    for number in range(rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            times[which].append(seconds((first, second)[which], calls[which]))
    ratios = [b / a for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return Pair(statistics.median(times[0]), statistics.median(times[1]), middle, (low, high))
