"""`star compare`: a study from its specification to its report, in one command that can be stopped at any moment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from star import document, files
from star.config import EMBEDDED, ConfigError, Count, NotNegative, Positive
from star.study import runs
from star.study import spec as specification
from star.study.spec import Study


@dataclass
class Compare:
    """Train every arm with every seed, then compare them. The same command goes on where it was stopped."""

    preset: str = EMBEDDED
    """The study: `shapes`, `credit` (DiffusionNFT with credit per location or concept), `large_batch`, `plain`
    (gradients without AdamW), `global` (prompts of one global attribute) or `noise` (rewards that are noise)."""
    spec: Path | None = None
    """A YAML file whose values replace the preset's; `arms` and `changes` are replaced as a whole."""
    out: Path = Path("runs/study")
    """The study's folder."""
    arms: tuple[str, ...] | None = None
    """The arms to train now. None: all. The report has every finished run."""
    seeds: tuple[Count, ...] | None = None
    """The seeds to train now. None: the study's."""
    iterations: Positive | None = None
    """The length of every run; it may grow from call to call. None: the study's."""
    update_norm: NotNegative | None = None
    """The norm to which every update of every run is rescaled: the equal-norm control. It needs its own `out`."""
    jobs: Positive | None = None
    """The number of runs at a time, each on one thread. None: the number of cores."""
    train: bool = True
    """Train the runs. --no-train: only write the report of the finished runs."""
    diagnose: bool = False
    """Also measure where the gradient's signal is; see docs/evidence/method.md."""
    drift: bool = False
    """Also measure, at every kept checkpoint, how much a run changed what its prompts leave open. Each takes about as
    long as a scoring; results are kept."""
    probe: bool = False
    """Also run `star probe` for each arm, and report the rank correlation of its prediction with the measured gain.
    Takes a few hundred images and their gradients for each arm, once."""
    document: Path | None = None
    """A Markdown file that takes the tables at its mark `<!-- results of NAME -->`; NAME is the last part of `out`."""


class Stopped(Exception):
    """A signal ended a study before its runs; the message is the signal's name."""


def requested_study(options: Compare) -> Study:
    """The study that the options name, checked."""
    if options.train:
        study = specification.preset(options.preset)
    else:
        study = specification.load_study(options.out / "study.yaml")
    if options.spec is not None:
        study = specification.load_study(options.spec, study)
    if options.seeds is not None:
        study.seeds = options.seeds
    optimization = {
        name: value
        for name, value in (("iterations", options.iterations), ("update_norm", options.update_norm))
        if value is not None
    }
    study.changes["optimization"] = study.changes.get("optimization", {}) | optimization
    study.check()
    for arm in options.arms or ():
        if arm not in study.arms:
            raise ConfigError(f"arms: unknown {arm!r}, expected some of {list(study.arms)}")
    return study


def prepare(study: Study, out: Path) -> None:
    """Make the study's folder. Raises ConfigError for a folder that holds something else."""
    path = out / "study.yaml"
    if path.is_file():
        earlier = specification.load_study(path)
        if earlier.prompts != study.prompts:  # a run's configuration names this file, not its prompts
            raise ConfigError(f"prompts: {out} was started with others; choose another --out")
        # Seeds of an earlier call stay in the report.
        study.seeds = tuple(dict.fromkeys([*earlier.seeds, *study.seeds]))
    elif not files.is_empty(out):
        raise ConfigError(f"out: {out} is not empty and no study (it has no study.yaml)")
    for arm in study.arms:
        for seed in study.seeds:
            runs.check_unchanged(study.config(arm, seed, out))
    out.mkdir(parents=True, exist_ok=True)
    if study.prompts:
        files.replace_text(out / "prompts.txt", "".join(f"{prompt}\n" for prompt in study.prompts))
    specification.save_study(study, path)


def check_diagnosis(study: Study, out: Path) -> None:
    """Raise ConfigError for a study whose gradients a diagnosis cannot measure."""
    config = study.config(study.baselines[0], study.seeds[0], out)
    needed = {
        "loss.objective": (config.loss.objective, "grpo"),
        "sampling.explore": (config.sampling.explore, "everywhere"),
    }
    for setting, (value, expected) in needed.items():
        if value != expected:
            raise ConfigError(
                f"diagnose: {setting} is {value!r}, expected {expected!r}; --probe measures the arms of any study"
            )


def compare(options: Compare) -> str:
    """Run a study and write its report. Returns the report's Markdown. Raises Stopped after a signal."""
    study, out = requested_study(options), options.out
    if options.diagnose:
        check_diagnosis(study, out)
    if options.document is not None:
        for kind in ("results", "diagnosis")[: 1 + options.diagnose]:  # before the hours of training
            document.surroundings(options.document, f"{kind} of {out.name}")
        if not os.access(options.document.parent, os.W_OK):
            raise ConfigError(f"document: {options.document.parent} takes no file (no permission)")
    if options.train:
        seeds = study.seeds
        prepare(study, out)
        # Seed by seed, so that a study that is stopped can already be compared.
        wanted = [study.config(arm, seed, out) for seed in seeds for arm in options.arms or study.arms]
        jobs = len(os.sched_getaffinity(0)) if options.jobs is None else options.jobs
        if stopped := runs.execute(wanted, jobs):
            raise Stopped(stopped)
    from star.study import (
        diagnose,
        drift,
        page,
        prediction,
        results,
    )  # matplotlib, scipy and diffusers are slow to import

    scores = results.load(study, out)
    if options.drift:
        drift.measure(study, out)
    if options.probe:
        prediction.measure(study, out)
    results.write(scores, out / "results.jsonl")
    text = page.write(study, scores, out)
    if options.document is not None:
        document.insert(options.document, f"results of {out.name}", document.folded(text))
    if options.diagnose:
        diagnosis = diagnose.diagnose(study, out)
        text += "\n" + diagnosis
        if options.document is not None:
            document.insert(options.document, f"diagnosis of {out.name}", diagnosis)
    return text
