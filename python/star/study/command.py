"""`star compare`: a study from its specification to its report, in one command that can be stopped at any moment."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from star import config as configuration
from star.config import EMBEDDED, ConfigError
from star.study import document, runs
from star.study import spec as specification
from star.study.spec import Study


@dataclass
class Compare:
    """Train every arm with every seed, then compare them. The same command goes on where it was stopped."""

    preset: str = EMBEDDED
    """A study: "shapes", "large_batch", "plain" gradients without AdamW, "global" with prompts of one global attribute,
    or "noise" with rewards that are noise."""
    spec: Path | None = None
    """A YAML file over the preset; `arms` or `changes` in it replace the preset's."""
    out: Path = Path("runs/study")
    arms: tuple[str, ...] | None = None
    """Of the study's arms, those to train now; all. The report has every run that is finished."""
    seeds: tuple[int, ...] | None = None
    """Instead of the study's."""
    iterations: int | None = None
    """Instead of the preset's; may grow from call to call."""
    update_norm: float | None = None
    """Rescale every update of every run to this norm: the equal-norm control. Needs a folder of its own."""
    jobs: int | None = None
    """Runs at a time, each on one thread; None: as many as there are cores."""
    train: bool = True
    """--no-train: report what is there, and train nothing."""
    diagnose: bool = False
    """Also measure where the gradient's signal is; see docs/evidence.md."""
    document: Path | None = None
    """A Markdown file whose place `<!-- results of NAME -->` takes the tables; NAME is the last part of `out`."""


def study_of(options: Compare) -> Study:
    """The study that the options ask for, checked."""
    if options.train:
        study = specification.preset(options.preset)
    else:
        study = configuration.load(options.out / "study.yaml", Study())
    if options.spec is not None:
        study = configuration.load(options.spec, study)
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
    """Make the study's folder; never touch what is in one that is none."""
    path = out / "study.yaml"
    if path.is_file():
        # Seeds of an earlier call stay in the report.
        study.seeds = tuple(dict.fromkeys([*configuration.load(path, Study()).seeds, *study.seeds]))
    elif out.exists() and any(out.iterdir()):
        raise ConfigError(f"out: {out} is not empty and no study (it has no study.yaml)")
    for arm in study.arms:
        for seed in study.seeds:
            runs.check_unchanged(study.config(arm, seed, out))
    out.mkdir(parents=True, exist_ok=True)
    if study.prompts:
        (out / "prompts.txt").write_text("".join(f"{prompt}\n" for prompt in study.prompts))
    configuration.save(study, path)


def compare(options: Compare) -> str | None:
    """Run a study and write its report. Returns the report's Markdown, or None after a SIGTERM."""
    study, out = study_of(options), options.out
    if options.document is not None:
        for kind in ("results", "diagnosis")[: 1 + options.diagnose]:  # hours before they are needed
            document.surroundings(options.document, f"{kind} of {out.name}")
    if options.train:
        seeds = study.seeds
        prepare(study, out)
        # Seed by seed, so that a study that is stopped can already be compared.
        wanted = [study.config(arm, seed, out) for seed in seeds for arm in options.arms or study.arms]
        if not runs.execute(wanted, options.jobs or len(os.sched_getaffinity(0))):
            return None
    from star.study import diagnose, page, results  # matplotlib, scipy and diffusers are slow to import

    found = results.load(study, out)
    results.write(found, out / "results.jsonl")
    text = page.write(study, found, out)
    if options.document is not None:
        document.insert(options.document, f"results of {out.name}", document.folded(text))
    if options.diagnose:
        measured = diagnose.diagnose(study, out)
        text += "\n" + measured
        if options.document is not None:
            document.insert(options.document, f"diagnosis of {out.name}", measured)
    return text
