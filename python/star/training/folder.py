"""A run's folder: one process at a time, nothing overwritten by accident, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from star import config as configuration
from star import files
from star.config import Config, ConfigError
from star.messages import one_line

log = logging.getLogger("star")

# The checkpoint's tensors depend on these, or scores of the run would no longer compare.
FIXED = (
    "task",
    "model.path",
    "model.lora_rank",
    "model.lora_alpha",
    "model.lora_targets",
    "model.adapter",
    "scoring.count",
    "scoring.prompts",
    "scoring.reward",
    "scoring.images_per_prompt",
    "scoring.steps",
    "scoring.guidance_scale",
    "scoring.seed",
)
# They say where and how a run goes on, not what it trains.
UNNAMED = (
    "run.out",
    "run.resume",
    "run.overwrite",
    "run.save_every",
    "run.keep_checkpoints",
    "run.figures",
    "run.grid_every",
    "run.trackers",
    "run.timeout_minutes",
    "run.reward_timeout",
    "run.reward_strict",
    "run.reward_models",
    "optimization.iterations",
)


# Everything that a run writes into its folder, in this version and earlier ones, and what reports of it add.
WRITTEN = (
    *("config.yaml", "metrics.jsonl", "evaluations.jsonl", "commands.jsonl", "drift.jsonl", "summary.json", "run_id"),
    *("checkpoints", "held_out", "grids", "lora", "model", "tensorboard", "wandb", "report.html", files.LOCK),
    *("reward_curve.png", "before_after.png", "allocation.png", "held_out_before.npz", "held_out_after.npz"),
)


def compare_with_saved(config: Config) -> None:
    """Compare a resumed run's configuration with the one in its folder. One line names what changes from here on.

    Raises ConfigError for a setting that the run cannot take any more.
    """
    path = config.run.out / "config.yaml"
    earlier = configuration.update_from(Config(), configuration.read(path), path)
    saved = configuration.flatten(configuration.to_dict(earlier))
    now = configuration.flatten(configuration.to_dict(config))
    changes = {name: (saved[name], now[name]) for name in now if saved[name] != now[name]}
    unscored = config.scoring.count == 0
    for name in FIXED:
        if name in changes and not (unscored and name.startswith("scoring.")):
            before, after = changes[name]
            raise ConfigError(
                f"{name}: got {after!r}, the run was started with {before!r}, which it cannot change; use another --out"
            )
    named = [f"{name} {after!r} (was {before!r})" for name, (before, after) in changes.items() if name not in UNNAMED]
    if named:
        log.warning("run.resume: from here on %s", ", ".join(named))


@contextmanager
def held_folder(config: Config) -> Iterator[None]:
    """Within it no other process trains into the run's folder. Raises ConfigError if one does already."""
    if int(os.environ.get("RANK", 0)):
        yield  # the first process holds it for all
        return
    made = not config.run.out.exists()
    config.run.out.mkdir(parents=True, exist_ok=True)
    try:
        lock = files.FolderLock(config.run.out)
    except BlockingIOError:
        raise ConfigError(f"run.out: another process trains into {config.run.out}; wait for it, or stop it") from None
    try:
        yield
    finally:
        if made and files.is_empty(config.run.out):  # nothing was begun
            shutil.rmtree(config.run.out, ignore_errors=True)
        lock.release()


def prepare_folder(config: Config) -> None:
    """Make the run's folder, with its configuration; never touch what is in it unless told to."""
    out = config.run.out
    if config.run.overwrite and not files.is_empty(out):
        check_deletable(out)
        check_own_input(config)
        for path in out.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != files.LOCK:
                path.unlink()
    if not config.run.resume and not files.is_empty(out):
        raise ConfigError(f"run.out: {out} is not empty; --run.resume continues it, --run.overwrite deletes it")
    # A job that was killed while it wrote its first file left only the beginning of that.
    begun = (out / "config.yaml").is_file() or (files.is_empty(out) and (out / ".config.yaml.writing").is_file())
    if config.run.resume and not begun:
        raise ConfigError(
            f"run.resume: {out} is no run of star (it has no config.yaml); name the run's folder with --out"
        )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "config.yaml").is_file():
        save_config(config)


def save_config(config: Config) -> None:
    """Write what the run is made of. How a command came to its folder is no part of that: another run with this file
    must not delete it."""
    run = dataclasses.replace(config.run, resume=False, overwrite=False)
    configuration.save(dataclasses.replace(config, run=run), config.run.out / "config.yaml")


def check_own_input(config: Config) -> None:
    """Raise ConfigError if the folder to delete holds what the run needs."""
    needed: dict[str, str | Path | None] = {
        "model.path": config.model.path,
        "model.adapter": config.model.adapter,
        "sampling.prompts": config.sampling.prompts,
        "scoring.prompts": config.scoring.prompts,
        **{f"run.reward_models {name}": path for name, path in config.run.reward_models.items()},
    }
    for name, path in needed.items():
        if path is not None and Path(path).resolve().is_relative_to(config.run.out.resolve()):
            raise ConfigError(
                f"run.overwrite: {config.run.out} holds {name} {path}; move it away, or choose another --out"
            )


def check_deletable(out: Path) -> None:
    """Raise ConfigError for a folder that is no run, or holds what no run writes: a slip in --out must not cost anyone
    a file."""
    path = out / "config.yaml"
    if not path.is_file():
        raise ConfigError(f"run.overwrite: {out} is no run of star (it has no config.yaml); delete it yourself")
    try:
        configuration.update(Config(), configuration.read(path))
    except ConfigError as error:
        raise ConfigError(
            f"run.overwrite: {path} is of no run of star ({one_line(error)}); delete {out} yourself"
        ) from error
    for path in sorted(out.iterdir()):
        if path.name not in WRITTEN and not files.is_unfinished(path.name):
            raise ConfigError(f"run.overwrite: {path} was written by no run; move it away, or delete {out} yourself")
