"""Where a run's prompts come from: the embedded world or a text file."""

from __future__ import annotations

import random
from pathlib import Path

from star.config import Config, ConfigError
from star.shapes import scenes


def draw_prompts(config: Config, iteration: int) -> list[str]:
    """Distinct prompts of an iteration; the same ones whenever the run is started or resumed."""
    count, seed = config.sampling.prompts_per_iteration, f"{config.run.seed}/{iteration}"
    if config.sampling.prompts == "shapes":
        drawn = list(dict.fromkeys(scenes.prompts(8 * count, seed, "train")))
    else:
        drawn = read_prompts(config.sampling.prompts)
        random.Random(seed).shuffle(drawn)
    if len(drawn) < count:
        raise ConfigError(
            f"sampling.prompts: {config.sampling.prompts} has {len(drawn)} distinct prompts, an iteration needs {count}"
        )
    return drawn[:count]


def read_prompts(path: str) -> list[str]:
    """The distinct lines of a prompt file that are not empty."""
    try:
        lines = [line.strip() for line in Path(path).read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"sampling.prompts: {path} cannot be read ({reason})") from error
    return list(dict.fromkeys(line for line in lines if line))
