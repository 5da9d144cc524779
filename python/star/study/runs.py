"""The runs of a study as processes of their own, as many at a time as there are cores; what is finished is kept."""

from __future__ import annotations

import dataclasses
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from star import config as configuration
from star.config import Config, ConfigError
from star.reports import tracking
from star.training.distributed import Termination

POLL = 0.1  # seconds


def is_finished(config: Config) -> bool:
    """Whether a run has reached its end."""
    return tracking.read_summary(config.run.out).get("iterations", 0) >= config.optimization.iterations


def check_unchanged(config: Config) -> None:
    """Raise ConfigError if the run's folder has another configuration: its results would be taken for this one's."""
    path = config.run.out / "config.yaml"
    if not path.exists():
        return
    earlier = configuration.update_from(Config(), configuration.read(path), path)
    if earlier.optimization.iterations > config.optimization.iterations:
        raise ConfigError(
            f"iterations: got {config.optimization.iterations}, {config.run.out} was started with "
            f"{earlier.optimization.iterations}; they can only grow"
        )
    optimization = dataclasses.replace(earlier.optimization, iterations=config.optimization.iterations)
    run = dataclasses.replace(earlier.run, out=config.run.out, resume=config.run.resume)
    earlier = dataclasses.replace(earlier, optimization=optimization, run=run)
    if earlier != config:
        before, now = (configuration.flatten(configuration.to_dict(c)) for c in (earlier, config))
        name = next(name for name in now if now[name] != before[name])
        raise ConfigError(
            f"{name}: got {now[name]!r}, {config.run.out} was started with {before[name]!r}; choose another --out"
        )


def start(config: Config) -> subprocess.Popen | None:
    """Start or continue a run. Returns None if a process of an earlier call still runs it.

    Its log is also its lock: the process holds it as its output, even if the one that started it is gone.
    """
    out = config.run.out
    out.parent.mkdir(parents=True, exist_ok=True)
    with Path(f"{out}.log").open("ab") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return None
        begun = (out / "config.yaml").is_file()
        configuration.save(config, Path(f"{out}.yaml"))
        command = [sys.executable, "-m", "star.cli", "train", "--config", f"{out}.yaml"]
        return subprocess.Popen(
            command + ["--resume"] * begun,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            # Spinning threads would slow the other runs; and so every run has the same bits wherever it is run.
            env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"},
            # An interrupt at the terminal is not for the runs: they are asked to stop, and save.
            start_new_session=True,
        )


def last_line(config: Config) -> str:
    lines = Path(f"{config.run.out}.log").read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no output"


def execute(configs: Sequence[Config], parallel: int) -> str | None:
    """Bring runs to their end, in their order. Returns None, or the name of the signal that stopped it.

    Raises RuntimeError, after all others have ended, if a run failed.
    """
    waiting, failures = list(configs), []
    running: dict[subprocess.Popen, Config] = {}
    with Termination() as termination, tqdm(total=len(waiting), desc="runs", dynamic_ncols=True) as bar:
        try:
            while (waiting or running) and not termination.received:
                for config in list(waiting):
                    if is_finished(config):
                        bar.update()
                    elif len(running) == parallel or (process := start(config)) is None:
                        continue
                    else:
                        running[process] = config
                    waiting.remove(config)
                time.sleep(POLL)
                for process in [process for process in running if process.poll() is not None]:
                    config = running.pop(process)
                    bar.update()
                    if process.returncode or not is_finished(config):
                        failures.append(f"{config.run.out.name} ({last_line(config)})")
        finally:
            for process in running:
                process.terminate()
            for process in running:
                process.wait()
    if failures:
        raise RuntimeError(f"runs: {len(failures)} of {len(configs)} failed: {', '.join(failures)}")
    return termination.received
