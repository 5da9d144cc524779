"""The bootstrap: a statistic's interval from samples that are drawn again. Studies and benchmarks use it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean and its confidence interval, NaN where there is nothing to resample."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval leaves out 0."""
        return self.low > 0 or self.high < 0


def percentiles(
    drawn: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """The percentile interval of a statistic. The bootstrap draws each of the samples again, independently.

    drawn: the samples, 1-D, each of at least two numbers. statistic: takes as many (R, N) arrays, and `axis`.
    """
    ends = stats.bootstrap(
        drawn,
        statistic,
        n_resamples=RESAMPLES,
        batch=100,
        vectorized=True,
        confidence_level=confidence,
        method="percentile",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return float(ends.low), float(ends.high)
