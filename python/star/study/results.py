"""What the finished runs of a study scored, prompt by prompt."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from star import files
from star.config import Config, ConfigError
from star.reports import tracking
from star.reports.evaluations import Evaluation, read_evaluations
from star.study import runs
from star.study.spec import Study
from star.training.scoring import HeldOut
from star.training.task import configured_task

log = logging.getLogger("star")
METRIC = "reward"  # of the curves; the tables have all scores

# The metrics of metrics.jsonl that may differ between arms.
LOGGED = ("reward", "grad_norm", "update_norm", "weights_concentration", "clip_fraction", "approx_kl")


@dataclass(frozen=True)
class Results:
    """Scores at E iterations on P prompts, the same prompts in the same order for every run.

    iterations: (E,). categories, prompts: (P,) of names and of texts, which may repeat. scores: by metric, arm and seed
    (E, P). logged: by arm and name the mean over all iterations and seeds. images: by arm those sampled in an
    iteration. missing: runs of the study that are not finished. left_out: number of prompts that are left out, because
    their reward failed in a scoring of some run.
    """

    iterations: np.ndarray
    categories: np.ndarray
    prompts: np.ndarray
    scores: dict[str, dict[str, dict[int, np.ndarray]]]
    logged: dict[str, dict[str, float]]
    images: dict[str, int]
    missing: tuple[str, ...] = ()
    left_out: int = 0

    @property
    def metrics(self) -> list[str]:
        """The reward and the further scores that all runs have."""
        return list(self.scores)

    @property
    def arms(self) -> list[str]:
        return list(self.scores["reward"])

    def seed_count(self, arm: str) -> int:
        return len(self.scores["reward"][arm])

    def replicated(self) -> list[str]:
        """The arms with more than one seed."""
        return [arm for arm in self.arms if self.seed_count(arm) > 1]

    def category_names(self) -> list[str | None]:
        """The categories that occur, in order, and None for all prompts."""
        names = list(dict.fromkeys(self.categories.tolist()))
        return [*names, None] if len(names) > 1 else [None]

    def category_mask(self, category: str | None) -> np.ndarray:
        """(P,) whether a prompt is of a category; None for all prompts."""
        return np.array([category in (None, name) for name in self.categories])

    def curves(self, metric: str, arm: str, category: str | None = None, seeds: list[int] | None = None) -> np.ndarray:
        """(S, E, P') scores of an arm's seeds on the prompts of a category."""
        by_seed = self.scores[metric][arm]
        return np.stack([by_seed[seed] for seed in (seeds or sorted(by_seed))])[:, :, self.category_mask(category)]

    def common_seeds(self, arm: str, other: str) -> list[int]:
        by_arm = self.scores["reward"]
        return sorted(by_arm[arm].keys() & by_arm[other].keys())


def load(study: Study, out: Path) -> Results:
    """Read the finished runs of the study in `out`. Raises ConfigError if there is none, or if they do not compare."""
    evaluations: dict[tuple[str, int], dict[int, Evaluation]] = {}
    logged: dict[str, list[list[dict[str, float]]]] = {}
    images: dict[str, int] = {}
    missing = []
    for arm in study.arms:
        for seed in study.seeds:
            config = study.config(arm, seed, out)
            if runs.is_finished(config):
                evaluations[arm, seed] = _scorings(config.run.out)
                images[arm] = images_per_iteration(config)
                logged.setdefault(arm, []).append(tracking.read(config.run.out))
            else:
                missing.append(config.run.out.name)
    if not evaluations:
        raise ConfigError(f"out: {out} has no finished run")
    iterations = sorted(set.intersection(*(set(run) for run in evaluations.values())))
    if len(iterations) < 2:
        raise ConfigError(f"out: the runs of {out} were scored at different iterations")
    categories = [run[i].categories for run in evaluations.values() for i in iterations]
    if any(names != categories[0] for names in categories):
        raise ConfigError(f"out: the runs of {out} were scored on different prompts")
    rewards = np.stack([run[i].values[METRIC] for run in evaluations.values() for i in iterations])
    kept = np.isfinite(rewards).all(0)
    if not kept.any():
        raise ConfigError(f"out: no held-out prompt of {out} has a reward in every scoring of every run")
    shared = set.intersection(*(set(run[i].values) for run in evaluations.values() for i in iterations))
    metrics = [name for name in next(iter(evaluations.values()))[iterations[0]].values if name in shared]
    scores: dict[str, dict[str, dict[int, np.ndarray]]] = {metric: {} for metric in metrics}
    for metric in metrics:
        for (arm, seed), run in evaluations.items():
            scores[metric].setdefault(arm, {})[seed] = np.stack([run[i].values[metric][kept] for i in iterations])
    means = {arm: _means([line for lines in by_seed for line in lines]) for arm, by_seed in logged.items()}
    texts = [prompt.text for prompt in HeldOut.of_run(configured_task(config), config).prompts]
    if len(texts) != len(kept):
        raise ConfigError(f"out: the runs of {out} were scored on {len(kept)} prompts, the study has {len(texts)}")
    return Results(
        np.array(iterations),
        np.array(categories[0])[kept],
        np.array(texts)[kept],
        scores,
        means,
        images,
        tuple(missing),
        int((~kept).sum()),
    )


def _scorings(run: Path) -> dict[int, Evaluation]:
    """A run's scorings by iteration, without those in which every reward failed: they would leave no prompt."""
    found = {}
    for one in read_evaluations(run):
        if one.iteration is not None and one.mean(METRIC).prompts:
            found[one.iteration] = one
        elif one.iteration is not None:
            log.warning("results: every reward of %s failed after %s iterations; left out", run, one.iteration)
    return found


def images_per_iteration(config: Config) -> int:
    """How many images a run samples in an iteration, with those that are sampled first for sampling.explore masks."""
    sampling = config.sampling
    found = sampling.explore == "masks"
    first = (1 if sampling.shared_noise else sampling.images_per_prompt) if found else 0
    return sampling.prompts_per_iteration * (sampling.images_per_prompt + first)


def _means(lines: list[dict[str, float]]) -> dict[str, float]:
    """Means over the iterations in which a metric is there, and the seconds of an iteration."""
    columns = {name: [line[name] for line in lines if name in line] for name in LOGGED}
    columns["seconds"] = [sum(value for name, value in line.items() if name.startswith("seconds/")) for line in lines]
    finite = {name: [value for value in values if math.isfinite(value)] for name, values in columns.items()}
    return {name: float(np.mean(values)) for name, values in finite.items() if values}


def write(results: Results, path: Path) -> None:
    """One JSON line for each arm, seed and scored iteration, with the scores by category."""
    lines = []
    for arm in results.arms:
        for seed in sorted(results.scores["reward"][arm]):
            for e, iteration in enumerate(results.iterations.tolist()):
                scores = {
                    category or "all": {
                        m: round(float(results.curves(m, arm, category, [seed])[0, e].mean()), 5)
                        for m in results.metrics
                    }
                    for category in results.category_names()
                }
                lines.append(files.json_line({"arm": arm, "seed": seed, "iteration": iteration, "scores": scores}))
    files.replace_text(path, "".join(lines))
