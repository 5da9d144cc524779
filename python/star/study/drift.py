"""What a run changed that no prompt names: the images of its model against those of the untrained model, from the same
held-out prompts and noise, at every checkpoint that the run keeps; and how arms compare once they have the same score.

A run's drift.jsonl has a line for each measured checkpoint. A measurement that was stopped goes on after the last line,
and a measured checkpoint may be deleted.

    {"iteration": 24, "checkpoint": its checksum, "images": a checksum of the prompts and how they are sampled,
     "values": {"diversity": -0.02, "background": 0.031, ...}}
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from star import files
from star.config import Config
from star.study import intervals, runs
from star.study.intervals import Difference, Estimate
from star.study.results import METRIC, Results
from star.study.spec import Study
from star.training import checkpoint
from star.training.adapter import load_adapter
from star.training.policy import load_averaged
from star.training.scoring import HeldOut, sample_images
from star.training.task import configured_task

FILE = "drift.jsonl"
PROMPTS, IMAGES = 128, 4  # the first held-out prompts of a run, and images of each


# --- measuring --------------------------------------------------------------------------------------------------------


class Comparison:
    """The images of an untrained model, sampled once, and how far those of a run's model are from them."""

    def __init__(self, config: Config) -> None:
        self.config, self.task = config, configured_task(config)
        held_out = HeldOut.of_run(self.task, config)
        self.prompts = held_out.prompts[:PROMPTS]
        self.options = dataclasses.replace(held_out.options, images_per_prompt=IMAGES)
        model = [config.task, config.model.path, config.model.adapter, config.model.frozen_dtype]
        asked = [model, [prompt.text for prompt in self.prompts], dataclasses.asdict(self.options)]
        self.checksum = hashlib.sha256(json.dumps(asked).encode()).hexdigest()

    @cached_property
    def untrained(self) -> Tensor:
        pipeline = self._pipeline()
        if self.config.model.adapter:
            load_adapter(pipeline, self.config.model.adapter)
        return self._sample(pipeline)

    def measure(self, config: Config, path: Path) -> dict[str, float]:
        """Means over the images of a checkpoint whose run began with this model. diversity: the mean distance between
        a prompt's images divided by the untrained model's, minus 1; then the values of the task's `unasked_changes`, if
        it has that function."""
        pipeline = self._pipeline()
        load_averaged(pipeline, config, path)
        images = self._sample(pipeline)
        found = {"diversity": diversity(images, IMAGES) / diversity(self.untrained, IMAGES) - 1}
        if self.task.unasked_changes is not None:
            texts = [prompt.text for prompt in self.prompts for _ in range(IMAGES)]
            found |= self.task.unasked_changes(self.untrained, images, texts)
        return found

    def _pipeline(self) -> Any:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return self.task.pipeline(device, getattr(torch, self.config.model.frozen_dtype))

    def _sample(self, pipeline: Any) -> Tensor:
        return torch.cat([images.cpu() for _, images in sample_images(pipeline, self.prompts, self.options)])


def diversity(images: Tensor, count: int) -> float:
    """Mean over prompts, and over the pairs of a prompt's images, of the root mean square difference of their pixels.
    images: (P * count, 3, H, W), those of a prompt one after another."""
    groups = images.flatten(1).unflatten(0, (-1, count)).double()
    distances = [
        (groups[:, i] - groups[:, j]).square().mean(1).sqrt() for i in range(count) for j in range(i + 1, count)
    ]
    return float(torch.stack(distances).mean())


def measure(study: Study, out: Path) -> None:
    """Measure the checkpoints of all finished runs of the study in `out` that are not measured yet."""
    waiting = []
    for arm in study.arms:
        for seed in study.seeds:
            config = study.config(arm, seed, out)
            if runs.is_finished(config):
                waiting += [(config, path) for path in checkpoint.checkpoints(config.run.out)]
    known: dict[str, Comparison] = {}
    for config, path in tqdm(waiting, desc="drift", dynamic_ncols=True):
        comparison = Comparison(config)
        comparison = known.setdefault(comparison.checksum, comparison)
        lines, meta = _read(config.run.out), checkpoint.read_meta(path)
        key = {"checkpoint": meta["sha256"], "images": comparison.checksum}
        if lines.get(meta["iteration"], {}).items() >= key.items():
            continue
        values = comparison.measure(config, path)
        lines[meta["iteration"]] = {"iteration": meta["iteration"], **key, "values": values}
        text = "".join(files.json_line(lines[iteration]) for iteration in sorted(lines))
        files.replace_text(config.run.out / FILE, text)


def _read(run: Path) -> dict[int, dict]:
    """The lines of a run's file by iteration. Raises files.Unreadable for anything else."""
    found = {}
    for place, line in files.numbered_json_lines(run / FILE):
        values = line.get("values")
        numbers = isinstance(values, dict) and all(v is None or files.is_number(v) for v in values.values())
        if not files.is_count(line.get("iteration")) or not numbers:
            raise files.Unreadable(f"{place} has no drift of a checkpoint; delete that line")
        found[line["iteration"]] = line
    return found


# --- comparing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Drift:
    """What a study's runs changed, by arm and seed.

    iterations: by arm the C iterations that were measured with every seed; the first is 0, where nothing has changed.
    values: by measure, arm and seed (C,), NaN where it is unknown.
    """

    iterations: dict[str, np.ndarray]
    values: dict[str, dict[str, dict[int, np.ndarray]]]


def load(study: Study, results: Results, out: Path) -> Drift:
    """Read what was measured of the runs in `results`. An arm with a seed that was not measured is left out."""
    iterations: dict[str, np.ndarray] = {}
    found: dict[str, dict[int, list[dict[str, float | None]]]] = {}
    for arm, by_seed in results.scores[METRIC].items():
        lines = {seed: _read(study.config(arm, seed, out).run.out) for seed in by_seed}
        shared = sorted(set.intersection(*(set(of_seed) for of_seed in lines.values())) - {0})
        if shared:
            iterations[arm] = np.array([0, *shared])
            found[arm] = {seed: [of_seed[i]["values"] for i in shared] for seed, of_seed in lines.items()}
    names = dict.fromkeys(
        name for by_seed in found.values() for rows in by_seed.values() for row in rows for name in row
    )
    values = {
        name: {arm: {seed: _course(rows, name) for seed, rows in by_seed.items()} for arm, by_seed in found.items()}
        for name in names
    }
    return Drift(iterations, values)


def notes(drift: Drift) -> list[str]:
    """What a reader of a drift at equal score must know; nothing where every arm has several checkpoints."""
    scaled = [arm for arm, iterations in drift.iterations.items() if len(iterations) == 2]
    if not scaled:
        return []
    return [
        f"Drift at equal score says little of {', '.join(scaled)}: one checkpoint was measured, so that it is the "
        "drift there, scaled by how early the score was reached. Runs that keep more (run.keep_checkpoints, "
        "run.save_every) are measured at each."
    ]


def _course(rows: Sequence[dict[str, float | None]], name: str) -> np.ndarray:
    """(C,) a measure from the start on, NaN where it is unknown."""
    return np.array([0.0, *(math.nan if (value := row.get(name)) is None else value for row in rows)])


def at_equal_score(results: Results, drift: Drift, name: str, arm: str, baseline: str) -> Difference | None:
    """How much more an arm changed in a measure than the baseline did at the same score, with the interval over the
    seeds that both have. The score is the lower of their final scores, and each arm is read where its mean curve first
    reaches that score. None: the arms share no seed, or one of them was not measured that far."""
    both, by_arm = (arm, baseline), drift.values[name]
    seeds = results.common_seeds(arm, baseline)
    if not seeds or not set(both) <= set(by_arm):
        return None
    draws = intervals.draws(len(seeds), np.random.default_rng(0))
    scores = {one: results.curves(METRIC, one, None, seeds).mean(2) for one in both}  # (S, E)
    values = {one: np.stack([by_arm[one][seed] for seed in seeds]) for one in both}  # (S, C)
    found = []
    for draw in draws:
        curves = {one: draw @ scores[one] / draw.sum() for one in both}
        level = min(intervals.final(curve[None], results.iterations).item() for curve in curves.values())
        found.append([_at_score(curves[one], level, results, drift, one, values[one]) for one in both])
    by_seed = np.array([ours - theirs for ours, theirs in found])  # (1 + R, S)
    if not np.isfinite(by_seed).all():
        return None
    estimate = intervals.drawn_interval((by_seed * draws).sum(1) / draws.sum(1))
    if len(seeds) == 1:
        estimate = Estimate(estimate.mean, math.nan, math.nan)
    return intervals.paired_difference(by_seed[0], estimate)


def _at_score(
    curve: np.ndarray, level: float, results: Results, drift: Drift, arm: str, values: np.ndarray
) -> np.ndarray:
    """(S,) drift where a (E,) curve of scores first reaches a level; NaN where that is later than what was measured."""
    iteration, measured = intervals.first_crossing(curve, results.iterations, level), drift.iterations[arm]
    if iteration is None or iteration > measured[-1]:
        return np.full(len(values), math.nan)
    return np.array([np.interp(iteration, measured, row) for row in values])


def at_the_end(drift: Drift, name: str, arm: str) -> Estimate:
    """An arm's drift at its last checkpoint, with the interval over seeds."""
    last = np.array([values[-1] for values in drift.values[name][arm].values()])
    if len(last) == 1 or not np.isfinite(last).all():
        return Estimate(float(last.mean()), math.nan, math.nan)
    draws = intervals.draws(len(last), np.random.default_rng(0))
    return intervals.drawn_interval(draws @ last / draws.sum(1))
