"""Intervals and differences: bootstrap over seeds and prompts at once, differences paired by both."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import stats
from scipy.interpolate import interp1d

from star.study.bootstrap import CONFIDENCE, RESAMPLES, Estimate, percentiles
from star.study.results import METRIC, Results

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


def summarize(scores: np.ndarray, steps: np.ndarray, summary: str) -> np.ndarray:
    """(S, E, P) curves at (E,) steps -> (S, P). final: mean of the last scorings. area: the area
    under the curve divided by its length, which is a score."""
    if summary == "final":
        return final(scores, steps)
    return np.trapezoid(scores, steps, axis=1) / (steps[-1] - steps[0])


def final(scores: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """(S, E, ...) at (E,) steps -> (S, ...): the mean of the last scorings, but never of one before training."""
    last = np.flatnonzero(steps > 0)[-LAST:]
    return scores[:, last].mean(1)


def interval(values: np.ndarray, prompts: np.ndarray) -> Estimate:
    """The percentile interval of the mean of (S, P) values. prompts: (P,), the prompt of each column.

    Seeds and prompts are drawn again independently of each other: both are samples, and all prompts share a seed (the
    pigeonhole bootstrap; Owen, Ann. Appl. Stat. 1, 386, 2007). A prompt is drawn with all its columns.
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
    """At equal numbers of images, over the seeds that both arms have; None if there is none."""
    seeds = results.common_seeds(arm, other)
    curves = [results.curves(metric, name, category, seeds) for name in (arm, other)] if seeds else []
    images, curves = at_equal_images(results, (arm, other), curves)
    if len(images) < 2 or not curves:
        return None
    ours, theirs = (summarize(curve, images, summary) for curve in curves)
    values = ours - theirs
    estimate = interval(values, results.prompts[results.category_mask(category)])
    return paired_difference(values.mean(1), estimate)


def at_equal_images(
    results: Results, arms: tuple[str, str], curves: list[np.ndarray]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """(S, E, P) curves of two arms at the numbers of images at which the second was scored, between the first and the
    last scoring of the other one."""
    first, second = (results.iterations * results.images[arm] for arm in arms)
    if not curves or np.array_equal(first, second):
        return second, curves
    inside = (first[0] <= second) & (second <= first[-1])
    return second[inside], [interp1d(first, curves[0], axis=1)(second[inside]), curves[1][:, inside]]


def paired_difference(by_seed: np.ndarray, estimate: Estimate) -> Difference:
    """The difference with its t-test, from its value for each seed, (S,)."""
    if len(by_seed) == 1:
        p = np.nan
    elif np.ptp(by_seed) == 0:  # nothing to test: always the same
        p = float(by_seed[0] == 0)
    else:
        p = float(stats.ttest_1samp(by_seed, 0).pvalue)
    return Difference(estimate, p, int((by_seed > 0).sum()), len(by_seed))


def draws(count: int, rng: np.random.Generator) -> np.ndarray:
    """(1 + RESAMPLES, count) how often each member counts: once in the sample itself, then as each resample has it."""
    return np.vstack([np.ones((1, count)), rng.multinomial(count, np.full(count, 1 / count), RESAMPLES)])


def drawn_interval(values: np.ndarray) -> Estimate:
    """From the values of a statistic in the sample itself and in RESAMPLES resamples. They may be infinite, not NaN."""
    ends = 100 * np.array([(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    low, high = np.percentile(values[1:], ends, method="closest_observation")
    return Estimate(float(values[0]), float(low), float(high))


def first_crossing(curve: np.ndarray, steps: np.ndarray, level: float) -> float | None:
    """Step at which a (E,) curve first reaches a level, interpolated linearly. None: it never does."""
    above = np.flatnonzero(curve >= level)
    if not len(above):
        return None
    e = int(above[0])
    if e == 0:
        return float(steps[0])
    part = (level - curve[e - 1]) / (curve[e] - curve[e - 1])
    return float(steps[e - 1] + part * (steps[e] - steps[e - 1]))


def images_to_reach(results: Results, arm: str, baseline: str) -> Estimate | None:
    """Images until an arm's mean curve first reaches the baseline's final score, over the seeds that both have, with
    the interval over seeds and prompts; infinite where it never does. The baseline itself may reach it before its end.
    None: they share no seed."""
    seeds = results.common_seeds(arm, baseline)
    if not seeds:
        return None
    names, which = np.unique(results.prompts, return_inverse=True)
    rng = np.random.default_rng(0)
    by_seed, by_prompt = draws(len(seeds), rng), draws(len(names), rng)[:, which]
    weights = (by_seed.sum(1) * by_prompt.sum(1))[:, None]
    ours, theirs = (
        np.einsum("rs,sep,rp->re", by_seed, results.curves(METRIC, name, None, seeds), by_prompt, optimize=True)
        / weights
        for name in (arm, baseline)
    )
    images = results.iterations * results.images[arm]
    levels = final(theirs, results.iterations)
    found = [first_crossing(curve, images, level) for curve, level in zip(ours, levels, strict=True)]
    estimate = drawn_interval(np.array([np.inf if count is None else count for count in found]))
    return estimate if len(seeds) * len(names) > 1 else Estimate(estimate.mean, np.nan, np.nan)
