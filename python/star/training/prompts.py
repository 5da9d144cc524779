"""Prompts and the files they come from, in the public formats.

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

from star.config import ConfigError


@dataclass(frozen=True)
class Prompt:
    """A prompt and its metadata, which go to the reward."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def category(self) -> str | None:
        """The kind of prompt, if it is known: GenEval's "tag"."""
        return self.metadata.get("tag")


def draw_from_file(path: str, count: int, seed: str) -> list[Prompt]:
    """`count` distinct prompts of a file, the same ones whenever the seed is; all of them if it has fewer."""
    prompts = list(_read_once(path))
    random.Random(seed).shuffle(prompts)
    return prompts[:count]


def pick_from_file(path: str, count: int, seed: str) -> list[Prompt]:
    """`count` prompts of a file in its order: a sample of a longer file; a shorter one is repeated."""
    prompts = list(_read_once(path))
    if not prompts:
        raise ConfigError(f"prompts: {path} has none")
    if count < len(prompts):
        chosen = sorted(random.Random(seed).sample(range(len(prompts)), count))
        return [prompts[i] for i in chosen]
    return [prompts[i % len(prompts)] for i in range(count)]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The distinct prompts of a file, in its order. Raises ConfigError, naming the line, for one that is no prompt."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(f"prompts: {path} cannot be read ({reason})") from error
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
        raise ConfigError(f"prompts: {place} is not JSON ({error})") from error
    text = metadata.get("prompt") if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"prompts: {place} has no text under 'prompt'")
    return Prompt(text.strip(), metadata)


@lru_cache(maxsize=2)
def _read_once(path: str) -> tuple[Prompt, ...]:
    """Tens of thousands of lines of JSON are not parsed again every iteration."""
    return tuple(read_prompts(path))
