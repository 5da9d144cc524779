"""Intervals and differences: bootstrap over seeds and prompts at once, differences paired by both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from star.study.bootstrap import CONFIDENCE, Estimate, percentiles
from star.study.results import Results

SUMMARIES = ("final", "area")
LAST = 3  # scorings: from one to the next a policy wobbles by as much as arms differ


@dataclass(frozen=True)
class Difference:
    """The score of an arm minus that of another arm, paired by seed and prompt.

    estimate: with the interval over seeds and prompts. p: of a t-test over the seeds' means, which is wary of few seeds
    where the bootstrap is not. better, seeds: in how many of how many seeds the arm is ahead.
    """

    estimate: Estimate
    p: float
    better: int
    seeds: int

    @property
    def significant(self) -> bool:
        """Whether both the interval and the t-test say that there is a difference."""
        return self.estimate.excludes_zero and self.p < 1 - CONFIDENCE


def summarize(scores: np.ndarray, iterations: np.ndarray, summary: str) -> np.ndarray:
    """(S, E, P) curves -> (S, P). final: mean of the last scorings. area: under the curve, over its length: a score."""
    if summary == "final":
        return scores[:, -LAST:].mean(1)
    return np.trapezoid(scores, iterations, axis=1) / (iterations[-1] - iterations[0])


def interval(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """The percentile interval of the mean of (S, P) values. prompts: (P,), the prompt of each column.

    Seeds and prompts are drawn again independently of each other: both are samples, and all prompts share a seed (the
    pigeonhole bootstrap; Owen, Ann. Appl. Stat. 1, 386, 2007). A prompt comes or stays away with all its columns.
    """
    names, which = np.unique(prompts, return_inverse=True)
    counts = np.bincount(which)
    totals = np.stack([np.bincount(which, row, len(names)) for row in values])  # (S, prompts)

    def statistic(*index: np.ndarray, axis: int) -> np.ndarray:  # each (R, S) or (R, prompts)
        indices, once = list(index), np.zeros(1, np.int64)  # one seed, or one prompt, cannot be drawn again
        seeds = indices.pop(0) if len(totals) > 1 else once
        chosen = indices.pop(0) if len(names) > 1 else once
        sums = totals[seeds[..., :, None], chosen[..., None, :]].mean(-2).sum(-1)
        return sums / counts[chosen].sum(-1)

    mean, drawn = float(values.mean()), [np.arange(count) for count in totals.shape if count > 1]
    if not drawn:
        return Estimate(mean, np.nan, np.nan)
    return Estimate(mean, *percentiles(drawn, statistic))


def difference(
    results: Results, arm: str, other: str, metric: str = "reward", summary: str = "final", category: str | None = None
) -> Difference | None:
    """Over the seeds that both arms have; None if there is none."""
    seeds = results.common_seeds(arm, other)
    if not seeds:
        return None
    ours, theirs = (
        summarize(results.curves(metric, name, category, seeds), results.iterations, summary) for name in (arm, other)
    )
    values = ours - theirs
    by_seed = values.mean(1)
    if len(seeds) == 1:
        p = np.nan
    elif np.ptp(by_seed) == 0:  # nothing to test: always the same
        p = float(by_seed[0] == 0)
    else:
        p = float(stats.ttest_1samp(by_seed, 0).pvalue)
    return Difference(
        interval(values, results.prompts[results.category_mask(category)]), p, int((by_seed > 0).sum()), len(seeds)
    )


def first_crossing(curve: np.ndarray, iterations: np.ndarray, level: float) -> float | None:
    """Iteration at which a (E,) curve first reaches a level, interpolated linearly. None: it never does."""
    above = np.flatnonzero(curve >= level)
    if not len(above):
        return None
    e = int(above[0])
    if e == 0:
        return float(iterations[0])
    part = (level - curve[e - 1]) / (curve[e] - curve[e - 1])
    return float(iterations[e - 1] + part * (iterations[e] - iterations[e - 1]))


def iterations_to_reach(results: Results, arm: str, baseline: str, metric: str = "reward") -> float | None:
    """Iterations until an arm's mean curve first reaches the baseline's final score, over the seeds that both have. The
    baseline itself may reach it before its end. None: the arm never does, or they share no seed."""
    seeds = results.common_seeds(arm, baseline)
    if not seeds:
        return None
    ours, theirs = (results.curves(metric, name, None, seeds) for name in (arm, baseline))
    level = summarize(theirs, results.iterations, "final").mean()
    return first_crossing(ours.mean((0, 2)), results.iterations, level)
