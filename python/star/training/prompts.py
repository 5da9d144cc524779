"""Where a run's prompts come from: the embedded world or a file in one of the public formats.

A text file has one prompt a line, as Flow-GRPO's dataset/ocr and dataset/pickscore. A .jsonl file has one JSON object a
line, whose "prompt" is the text and which goes to the reward whole, as GenEval's evaluation_metadata.jsonl and
Flow-GRPO's dataset/geneval/*_metadata.jsonl.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from star.config import Config, ConfigError
from star.shapes import scenes


@dataclass(frozen=True)
class Prompt:
    """A prompt and what its file says of it, for the reward."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def category(self) -> str | None:
        """What kind of prompt it is, if that is known: GenEval's "tag", the embedded world's category."""
        return self.metadata.get("tag")


def draw_prompts(config: Config, iteration: int) -> list[Prompt]:
    """Distinct prompts of an iteration; the same ones whenever the run is started or resumed."""
    count, seed = config.sampling.prompts_per_iteration, f"{config.run.seed}/{iteration}"
    if config.sampling.prompts == "shapes":
        texts = dict.fromkeys(scenes.prompts(8 * count, seed, "train"))
        drawn = [Prompt(text, {"tag": scenes.parse_scene(text).category}) for text in texts]
    else:
        drawn = list(_read_once(config.sampling.prompts))
        random.Random(seed).shuffle(drawn)
    if len(drawn) < count:
        raise ConfigError(
            f"sampling.prompts: {config.sampling.prompts} has {len(drawn)} distinct prompts, an iteration needs {count}"
        )
    return drawn[:count]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The distinct prompts of a file, in its order. Raises ConfigError, naming the line, for one that is no prompt."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"sampling.prompts: {path} cannot be read ({reason})") from error
    # Not splitlines(), which also breaks at characters that JSON allows within a string.
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    if Path(path).suffix == ".jsonl":
        prompts = [_parse(f"{path}:{number}", line) for number, line in lines if line]
    else:
        prompts = [Prompt(line) for _, line in lines if line]
    distinct: dict[str, Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(prompt.text, prompt)  # a group of an iteration is one prompt
    return list(distinct.values())


def _parse(place: str, line: str) -> Prompt:
    try:
        metadata = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"sampling.prompts: {place} is not JSON ({error})") from error
    text = metadata.get("prompt") if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"sampling.prompts: {place} has no text under 'prompt'")
    return Prompt(text.strip(), metadata)


@lru_cache(maxsize=1)
def _read_once(path: str) -> tuple[Prompt, ...]:
    """Tens of thousands of lines of JSON are not parsed again every iteration."""
    return tuple(read_prompts(path))
