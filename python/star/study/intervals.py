"""Intervals and differences: bootstrap over seeds and prompts at once, differences paired by both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats

from star.study.results import Results

RESAMPLES = 2000
CONFIDENCE = 0.95
SUMMARIES = ("final", "area")
LAST = 3  # scorings: from one to the next a policy wobbles by as much as arms differ


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval, NaN where there is nothing to resample."""

    mean: float
    low: float
    high: float

    @property
    def decided(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Difference:
    """An arm less another, paired by seed and prompt.

    estimate: with the interval over seeds and prompts. p: of a t-test over the seeds' means, which is wary of few seeds
    where the bootstrap is not. better, seeds: in how many of how many seeds the arm is ahead.
    """

    estimate: Estimate
    p: float
    better: int
    seeds: int

    @property
    def shown(self) -> bool:
        """Whether both the interval and the t-test say that there is a difference."""
        return self.estimate.decided and self.p < 1 - CONFIDENCE


def summarize(scores: np.ndarray, iterations: np.ndarray, summary: str) -> np.ndarray:
    """(S, E, P) curves -> (S, P). final: mean of the last scorings. area: under the curve, over its length: a score."""
    if summary == "final":
        return scores[:, -LAST:].mean(1)
    return np.trapezoid(scores, iterations, axis=1) / (iterations[-1] - iterations[0])


def interval(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """Of the mean of (S, P) values, in percentiles; prompts: (P,), which one each column is of.

    Seeds and prompts are drawn again independently of each other: both are samples, and all prompts share a seed (the
    pigeonhole bootstrap; Owen, Ann. Appl. Stat. 1, 386, 2007). A prompt comes or stays away with all its columns.
    """
    names, which = np.unique(prompts, return_inverse=True)
    counts = np.bincount(which)
    totals = np.stack([np.bincount(which, row, len(names)) for row in values])  # (S, prompts)

    def statistic(*index: np.ndarray, axis: int) -> np.ndarray:  # each (R, S) or (R, prompts)
        found, once = list(index), np.zeros(1, np.int64)  # one seed, or one prompt, cannot be drawn again
        seeds = found.pop(0) if len(totals) > 1 else once
        chosen = found.pop(0) if len(names) > 1 else once
        sums = totals[seeds[..., :, None], chosen[..., None, :]].mean(-2).sum(-1)
        return sums / counts[chosen].sum(-1)

    mean, drawn = float(values.mean()), [np.arange(count) for count in totals.shape if count > 1]
    if not drawn:
        return Estimate(mean, np.nan, np.nan)
    found = stats.bootstrap(
        drawn,
        statistic,
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Estimate(mean, float(found.low), float(found.high))


def difference(
    results: Results, arm: str, other: str, metric: str = "reward", summary: str = "final", category: str | None = None
) -> Difference | None:
    """Over the seeds that both arms have; None if there is none."""
    seeds = results.common_seeds(arm, other)
    if not seeds:
        return None
    ours, theirs = (
        summarize(results.of(metric, name, category, seeds), results.iterations, summary) for name in (arm, other)
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
        interval(values, results.prompts[results.chosen(category)]), p, int((by_seed > 0).sum()), len(seeds)
    )


def reached(curve: np.ndarray, iterations: np.ndarray, level: float) -> float | None:
    """Iteration at which a (E,) curve first comes to a level, between its points on straight lines; None: never."""
    above = np.flatnonzero(curve >= level)
    if not len(above):
        return None
    e = int(above[0])
    if e == 0:
        return float(iterations[0])
    part = (level - curve[e - 1]) / (curve[e] - curve[e - 1])
    return float(iterations[e - 1] + part * (iterations[e] - iterations[e - 1]))


def iterations_to_reach(results: Results, arm: str, baseline: str, metric: str = "reward") -> float | None:
    """Until the arm's mean curve first comes to the baseline's final score, over the seeds that both have. The baseline
    itself may come there before its end."""
    seeds = results.common_seeds(arm, baseline)
    if not seeds:
        return None
    ours, theirs = (results.of(metric, name, None, seeds) for name in (arm, baseline))
    level = summarize(theirs, results.iterations, "final").mean()
    return reached(ours.mean((0, 2)), results.iterations, level)
