"""Whether `star probe` predicts a study: its numbers before training against the gains that were then measured.

The probe's numbers stay in the study's probe.json and are not measured again while its arms are the same.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import stats

from star import config as configuration
from star import files
from star.config import Config
from star.messages import one_line
from star.options import Probe
from star.study import intervals, probe
from star.study.results import Results
from star.study.spec import Study

FILE = "probe.json"
GAIN = "adamw_agreement_gain"  # by which the probe recommends
FEWEST = 5  # arms that a rank correlation has an interval of


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho of n pairs with its 95 % interval; NaN where there are too few."""

    rho: float
    low: float
    high: float
    pairs: int


def rank_correlation(first: np.ndarray, second: np.ndarray) -> RankCorrelation:
    """Of two (n,) columns. The interval is Fisher's, with the variance of Bonett and Wright (Psychometrika 65, 23,
    2000); since a perfect order of few pairs may be luck, its center is then the next lower value that rho can have."""
    n = len(first)
    if n < FEWEST or not np.ptp(first) or not np.ptp(second):
        return RankCorrelation(math.nan, math.nan, math.nan, n)
    rho = float(stats.spearmanr(first, second).statistic)
    below_one = 1 - 12 / (n * (n * n - 1))  # two neighbors have changed places
    center = np.arctanh(np.clip(rho, -below_one, below_one))
    width = stats.norm.ppf((1 + intervals.CONFIDENCE) / 2) * math.sqrt((1 + rho * rho / 2) / (n - 3))
    return RankCorrelation(rho, float(np.tanh(center - width)), float(np.tanh(center + width)), n)


def comparable_arms(study: Study, out: Path) -> dict[str, Config]:
    """The baseline, then the arms that a probe can compare with it on the same images: those that differ in their
    allocation and their loss alone."""
    seed, baseline = study.seeds[0], study.baselines[0]
    own = study.config(baseline, seed, out)
    found = {baseline: own}
    for arm in study.arms:
        config = study.config(arm, seed, out)
        same = dataclasses.replace(config, allocation=own.allocation, loss=own.loss, run=own.run)
        if same == own and config.run.reward == own.run.reward and config.loss.objective == own.loss.objective:
            found[arm] = config
    return found


def measure(study: Study, out: Path, options: Probe | None = None) -> None:
    """Probe the arms of the study in `out`, unless that is done. options: None means the defaults."""
    options = options or Probe()
    arms, path = comparable_arms(study, out), out / FILE
    asked = [{arm: configuration.to_dict(config) for arm, config in arms.items()}, dataclasses.asdict(options)]
    checksum = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
    if path.exists() and files.parse_object(files.read_text(path), path).get("asked") == checksum:
        return
    found = {"asked": checksum, "arms": probe.compare_arms(arms, options)}
    files.replace_text(path, json.dumps(found, indent=2, allow_nan=False) + "\n")


def notes(study: Study, results: Results, out: Path) -> list[str]:
    """A sentence for the report; none if the study's arms were not probed."""
    path, baseline = out / FILE, study.baselines[0]
    if not path.exists():
        return []
    arms = files.parse_object(files.read_text(path), path).get("arms")
    if not isinstance(arms, dict) or not all(isinstance(numbers, dict) for numbers in arms.values()):
        raise files.Unreadable(f"{path} holds no arms; delete it")
    predicted = {arm: numbers.get(GAIN) for arm, numbers in arms.items()}
    for arm, gain in predicted.items():
        if gain is not None and not (files.is_number(gain) and math.isfinite(gain)):
            raise files.Unreadable(f"{path}: {GAIN} of {arm} is {one_line(gain)}, expected a number or null; delete it")
    return [describe(predicted, results, baseline)]


def describe(predicted: Mapping[str, float | None], results: Results, baseline: str) -> str:
    """How well predicted gains rank the measured ones, or that there are too few to say. predicted: by arm."""
    pairs = {}
    for arm, gain in predicted.items():
        if arm == baseline or gain is None or {arm, baseline} - set(results.arms):
            continue
        difference = intervals.difference(results, arm, baseline)
        if difference is not None:
            pairs[arm] = (gain, difference.estimate.mean)
    head = "What star probe says before training (gain in agreement of AdamW's steps)"
    found = rank_correlation(*np.array(list(pairs.values())).reshape(-1, 2).T)
    if math.isnan(found.rho):
        return f"{head} cannot be judged: it needs {FEWEST} arms that differ and were trained, and has {found.pairs}."
    return (
        f"{head} ranks the gains over {baseline} of {found.pairs} arms ({', '.join(pairs)}) with Spearman's rho "
        f"{found.rho:+.2f} [{found.low:+.2f}, {found.high:+.2f}]."
    )
