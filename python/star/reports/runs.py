"""What a report knows of a run: its folder, read once, what it comes to, and what it does not have."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from star import config as configuration
from star import files
from star.reports import commands, shown, tracking
from star.reports.chart import format_number
from star.reports.commands import Command
from star.reports.evaluations import Evaluation, compare, format_error, format_left_out, read_evaluations
from star.reports.shown import Maps, Stage

STAGES: tuple[Stage, ...] = ("before", "after")
BEFORE_AFTER = "the same prompts and noise before and after"
FIGURES = {"before_after.png": BEFORE_AFTER, "allocation.png": "weights that attention allocates, step by step"}
# What is read of a run beside its images.
TEXTS = (
    *("config.yaml", "summary.json", "metrics.jsonl", "evaluations.jsonl", "commands.jsonl"),
    *("held_out/prompts.jsonl", "held_out/maps_before.jsonl", "held_out/maps_after.jsonl"),
)
# Where a run is and how it goes on is no difference between runs.
PLACES = ("run.out", "run.resume", "run.overwrite")
# Scores compare prompt by prompt where these and the reward are the same.
SCORED = ("task", "scoring.count", "scoring.prompts", "scoring.seed", "scoring.images_per_prompt")


@dataclass(frozen=True)
class Shown:
    """What a run keeps of its first held-out prompts. prompts: empty if it keeps none. images: by stage and number, as
    PNG. maps: by stage those of these very images. refused: files that are links or no PNG."""

    prompts: list[str]
    images: dict[Stage, dict[int, bytes]]
    maps: dict[Stage, Maps]
    refused: list[str]


@dataclass(frozen=True)
class Run:
    """What a run's folder holds. number: among the runs of a report. config: flat, by dotted name. summary: empty while
    the run is going. figures, grids: caption and PNG."""

    path: Path
    name: str
    number: int
    config: dict[str, object]
    metrics: list[dict[str, float]]
    evaluations: list[Evaluation]
    summary: dict[str, object]
    commands: list[Command]
    shown: Shown
    figures: list[tuple[str, bytes]]
    grids: list[tuple[str, bytes]]

    @property
    def iterations(self) -> int:
        """How many it has had."""
        return max((int(line["iteration"]) + 1 for line in self.metrics), default=0)

    @property
    def is_finished(self) -> bool:
        wanted = self.config.get("optimization.iterations")
        return bool(self.summary) and (not isinstance(wanted, int) or self.iterations >= wanted)

    @property
    def judge(self) -> object:
        """The reward that scores held-out images; None: the task's."""
        scoring = self.config.get("scoring.reward")
        return self.config.get("run.reward") if scoring is None else scoring

    def evaluation(self, stage: Stage) -> Evaluation | None:
        """See `last_of`."""
        return last_of(self.evaluations, stage)


def last_of(evaluations: Sequence[Evaluation], stage: Stage) -> Evaluation | None:
    """The scoring before training, or the last one after an iteration."""
    scored = [one for one in evaluations if one.iteration is not None]
    found = [one for one in scored if (one.iteration == 0) == (stage == "before")]
    return found[-1] if found else None


def read(path: Path, name: str, number: int) -> Run:
    """Read a run's folder. Raises ValueError if it is none, or holds what no run writes."""
    if not path.is_dir():
        raise ValueError(f"runs: {path} is no run ({'a file' if path.exists() else 'there is no such folder'})")
    if not (path / "config.yaml").is_file():
        inner = sorted(found.parent for found in path.glob("*/config.yaml")) or sorted(
            found.parent for found in path.glob("runs/*/config.yaml")
        )
        hint = f"; did you mean {inner[0]}?" if inner else ""
        raise ValueError(f"runs: {path} is no run (it has no config.yaml){hint}")
    for file in (path / text for text in TEXTS):
        if is_link(path, file):
            raise ValueError(f"runs: {file} is a link, expected a file of the run's own; copy it to its place")
    evaluations = read_evaluations(path)
    grids = {int(file.stem): file for file in (path / "grids").glob("*.png") if file.stem.isdecimal()}
    return Run(
        path=path,
        name=name,
        number=number,
        config=configuration.read_flat(path / "config.yaml"),
        metrics=tracking.read(path),
        evaluations=evaluations,
        summary=tracking.read_summary(path),
        commands=commands.read(path),
        shown=read_shown(path, evaluations),
        figures=[
            (caption, data) for file, caption in FIGURES.items() if (data := read_image(path, path / file)) is not None
        ],
        grids=[
            (f"after {count} iterations", data)
            for count, file in sorted(grids.items())
            if (data := read_image(path, file)) is not None
        ],
    )


def is_link(run: Path, file: Path) -> bool:
    """Whether a run's file is a link, or in a folder that is one. Whoever sends a run's folder must not choose what of
    the reader's files is in the page."""
    return os.path.realpath(file) != os.path.join(os.path.realpath(run), file.relative_to(run))


def read_image(run: Path, file: Path) -> bytes | None:
    """The PNG that a run drew; None where there is none. Links are left out, and so is what is no PNG."""
    if not file.is_file() or is_link(run, file):
        return None
    data = file.read_bytes()
    return data if data.startswith(files.PNG) else None


def read_shown(run: Path, evaluations: Sequence[Evaluation]) -> Shown:
    images: dict[Stage, dict[int, bytes]] = {}
    maps: dict[Stage, Maps] = {}
    refused = []
    for stage in STAGES:
        images[stage] = {}
        for number, file in shown.image_paths(run, stage).items():
            data = read_image(run, file)
            if data is None:
                refused.append(f"{stage}/{file.name}")
            else:
                images[stage][number] = data
        found = shown.read_maps(run, stage)
        # A run that was continued has newer images; maps of older ones would look as if they were theirs.
        scored = last_of(evaluations, stage)
        if found is not None and scored is not None and scored.iteration == found.iteration:
            maps[stage] = found
    return Shown(shown.read_prompts(run), images, maps, refused)


def names(paths: Sequence[Path]) -> list[str]:
    """Folder names, or, where two are the same, paths."""
    short = [path.resolve().name for path in paths]
    return short if len(set(short)) == len(short) else [str(path) for path in paths]


# --- what it comes to -------------------------------------------------------------------------------------------------


def facts(run: Run) -> dict[str, str]:
    """The rows of the table that compares runs."""
    wanted = run.config.get("optimization.iterations", "?")
    rows = {"state": "finished" if run.is_finished else "not finished", "iterations": f"{run.iterations} of {wanted}"}
    first, last = run.evaluation("before"), run.evaluation("after")
    rows["held-out reward"] = "not scored" if first is None and last is None else held_out(first, last, "reward", None)
    recent = [line["reward"] for line in run.metrics[-max(1, len(run.metrics) // 10) :] if "reward" in line]
    recent = [value for value in recent if math.isfinite(value)]
    if run.metrics:
        rows["reward, last tenth"] = format_number(float(np.mean(recent))) if recent else "every reward failed"
    failed = [line["reward_failed"] for line in run.metrics if line.get("reward_failed", 0) > 0]
    if failed:
        rows["images without a reward"] = f"{sum(failed):g} in {len(failed)} iterations"
    seconds = [sum(v for k, v in line.items() if k.startswith("seconds/")) for line in run.metrics]
    if any(seconds):
        rows["seconds per iteration, median"] = f"{np.median(seconds):.2f}"
    if "seconds" in run.summary:
        rows["seconds in all"] = f"{run.summary['seconds']:.0f}"
    memory = [line["memory_gib"] for line in run.metrics if "memory_gib" in line]
    if memory:
        rows["peak memory, GiB"] = f"{max(memory):.2f}"
    return rows


def held_out(first: Evaluation | None, last: Evaluation | None, column: str, category: str | None) -> str:
    """Before and after with their paired difference, or what there is of it."""
    ends = [one for one in (first, last) if one is not None and column in one.values]
    means = [one.mean(column, category) for one in ends]
    if not any(mean.prompts for mean in means):
        return "every reward failed" if any(one.is_of(category).any() for one in ends) else "—"
    if len(ends) == 2 and ends[0].categories == ends[1].categories:
        found = compare(ends[0], ends[1], category).get(column)
        if found is not None:
            return f"{found['before']:.4f} → {found['after']:.4f} ({format_change(found)})"
    if len(ends) == 2:
        return " → ".join(format_number(mean.mean) if mean.prompts else "failed" for mean in means)
    when = "before" if ends[0] is first else "after"
    return f"{means[0].mean:.4f}{format_error(means[0].standard_error)}, {when} alone"


def format_change(found: Mapping[str, float | None]) -> str:
    """The difference that `compare` says of a column, its error, and how many prompts it is not over."""
    return f"{found['difference']:+.4f}{format_error(found['standard_error'])}{format_left_out(found)}"


def differences(runs: Sequence[Run]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """The settings that are not the same in all runs, by name: those that all of them have, and those that some lack,
    because they are of other versions."""
    keys = dict.fromkeys(key for run in runs for key in run.config if key not in PLACES)
    rows = {key: [str(run.config.get(key, "—")) for run in runs] for key in keys}
    rows = {key: row for key, row in rows.items() if len(set(row)) > 1}
    shared = {key for key in rows if all(key in run.config for run in runs)}
    return {k: row for k, row in rows.items() if k in shared}, {k: row for k, row in rows.items() if k not in shared}


def are_paired(one: Run, other: Run) -> bool:
    """Whether the scores of two runs are by the same reward, of the same prompts with the same noise, as far as their
    folders tell."""
    first, second = one.evaluation("after"), other.evaluation("after")
    if first is None or second is None or first.categories != second.categories:
        return False
    known = one.shown.prompts and other.shown.prompts
    if known and one.shown.prompts != other.shown.prompts:
        return False
    return one.judge == other.judge and all(one.config.get(key) == other.config.get(key) for key in SCORED)


def paired(runs: Sequence[Run]) -> list[Run]:
    """The runs whose scores compare with those of the first one."""
    return [run for run in runs[1:] if are_paired(runs[0], run)]


def to_first(runs: Sequence[Run], column: str, category: str | None) -> list[str]:
    """Of the `paired` runs the difference of the last scoring to the first run's."""
    reference, cells = runs[0].evaluation("after"), []
    for run in paired(runs):
        own, found = run.evaluation("after"), None
        if reference is not None and own is not None:
            found = compare(reference, own, category).get(column)
        cells.append(format_change(found) if found else "—")
    return cells


# --- what it does not have, and how it was made -----------------------------------------------------------------------


def gaps(run: Run) -> list[str]:
    """What a reader may look for and not find, each in a sentence."""
    found = []
    wanted = run.config.get("optimization.iterations", "?")
    if not run.metrics:
        found.append("No iteration has been finished yet.")
    elif not run.is_finished:
        found.append(f"It is going, or was stopped: {run.iterations} of {wanted} iterations are here.")
    found += scoring_gaps(run) if run.evaluations else [unscored(run)]
    if not any(run.shown.images.values()):
        found.append("It has no held-out images.")
    else:
        found += image_gaps(run.shown)
    return found


def unscored(run: Run) -> str:
    if run.config.get("scoring.count") == 0:
        return "It was not scored on held-out prompts: scoring.count is 0."
    return "It has no held-out scores."


def scoring_gaps(run: Run) -> list[str]:
    first, last = run.evaluation("before"), run.evaluation("after")
    found = []
    if first is None:
        found.append("It was not scored before training.")
    if last is None:
        found.append("It was not scored after an iteration yet, so that nothing can be said of a change.")
    if first is not None and last is not None and first.categories != last.categories:
        found.append("It was scored on other prompts before and after, so that differences are not paired.")
    for one in run.evaluations:
        if one.failed:
            when = "" if one.iteration is None else f" after {one.iteration} iterations"
            found.append(f"{one.failed} of {one.images} held-out images have no reward{when}.")
    if first is not None and not first.category_names():
        found.append("Its prompts have no categories.")
    return found


def image_gaps(kept: Shown) -> list[str]:
    found = [f"There are no held-out images {stage} training." for stage in STAGES if not kept.images[stage]]
    if not kept.prompts:
        found.append("The prompts of its images were not kept (an older version wrote it).")
    without = [stage for stage in STAGES if kept.images[stage] and stage not in kept.maps]
    if without:
        found.append(f"It has no maps of its images {' and '.join(without)} training (run.figures keeps them).")
    if kept.refused:
        found.append(f"Left out, because they are links or no PNG: {', '.join(kept.refused)}.")
    return found


def provenance(run: Run) -> list[str]:
    """The commands that made a run, or, where they were not kept, the one that trains it again."""
    lines = []
    for command in run.commands:
        what = f"# after {command.iteration} iterations" if command.iteration else "# from the beginning"
        processes = f", {command.processes} processes" if command.processes > 1 else ""
        version = f", star-kernels {command.version}" if command.version else ""
        lines += [f"{what}{processes}{version}", command.command]
    if not run.commands or run.commands[0].iteration:
        begun = "# its first command was not kept; this trains it again"
        off = [f"--run.no-{name}" for name in ("resume", "overwrite") if run.config.get(f"run.{name}") is True]
        again = ["star", "train", "--config", str(run.path / "config.yaml"), *off, "--out", "FOLDER"]
        lines = [begun, shlex.join(again), *lines]
    return lines
