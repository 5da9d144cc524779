"""What a resumed run may change: it takes what it can take, names it, and refuses the rest."""

from __future__ import annotations

import logging

from star import config as configuration
from star.config import Config, ConfigError

log = logging.getLogger("star")

# The checkpoint's tensors are of these, or scores of the run would no longer compare.
FIXED = (
    *("task", "model.path", "model.lora_rank", "model.lora_alpha", "model.lora_targets", "model.adapter"),
    *("scoring.count", "scoring.prompts", "scoring.reward", "scoring.images_per_prompt", "scoring.steps"),
    *("scoring.guidance_scale", "scoring.seed"),
)
# They say where and how a run goes on, not what it trains.
UNNAMED = (
    *("run.out", "run.resume", "run.overwrite", "run.save_every", "run.keep_checkpoints", "run.figures"),
    *("run.grid_every", "run.trackers", "run.timeout_minutes", "run.reward_timeout", "run.reward_strict"),
    *("run.reward_models", "optimization.iterations"),
)


def compare_with_saved(config: Config) -> None:
    """Compare a resumed run's configuration with the one in its folder. One line names what changes from here on.

    Raises:
        ConfigError: a setting that the run cannot take any more, or fewer iterations than it has had.
    """
    path = config.run.out / "config.yaml"
    saved = configuration.flatten(configuration.update(Config(), configuration.read(path)))
    now = configuration.flatten(config)
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
