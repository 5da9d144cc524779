"""Prompts and the files they come from, in the public formats.

A text file has one prompt a line, as Flow-GRPO's dataset/ocr and dataset/pickscore. A .jsonl file has one JSON object a
line, whose "prompt" is the text and which goes to the reward whole, as GenEval's evaluation_metadata.jsonl and
Flow-GRPO's dataset/geneval/*_metadata.jsonl.
"""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from star import files
from star.concepts import Concept, parse_all, unbracket
from star.config import ConfigError
from star.rewards import without_nulls


@dataclass(frozen=True)
class Prompt:
    """A prompt and its metadata, which go to the reward. concepts: those that it marks; None: a run finds them."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    concepts: tuple[Concept, ...] | None = field(default=None, compare=False)

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
        raise ConfigError(f"prompts: {path} has no prompts, expected at least one")
    if count < len(prompts):
        chosen = sorted(random.Random(seed).sample(range(len(prompts)), count))
        return [prompts[i] for i in chosen]
    return [prompts[i % len(prompts)] for i in range(count)]


def without_brackets(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Prompts that mark their concepts with brackets, with these concepts and without the brackets.

    Raises ConfigError for brackets that do not pair."""
    try:
        texts, concepts = unbracket([prompt.text for prompt in prompts])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return [
        replace(prompt, text=text, concepts=None if marked is None else tuple(marked))
        for prompt, text, marked in zip(prompts, texts, concepts, strict=True)
    ]


def concepts_of(prompts: Sequence[Prompt], source: str) -> list[Sequence[Concept]]:
    """The concepts that each prompt marks, or that a source of `star.concepts.parse` finds in it."""
    found = iter(parse_all([prompt.text for prompt in prompts if prompt.concepts is None], source))
    return [next(found) if prompt.concepts is None else prompt.concepts for prompt in prompts]


def read_prompts(path: str | Path) -> list[Prompt]:
    """The distinct prompts of a file, in its order.

    Raises:
        ConfigError: a file that cannot be read, of another format, or with a line that is no prompt; it names the line.
    """
    path = Path(path).expanduser()
    try:
        text = files.read_text(path)
    except files.Unreadable as error:
        hint = ""
        if path.parts[:1] == ("dataset",) and not path.exists():
            hint = "; copy flow_grpo's folder dataset/ here, or set sampling.prompts and scoring.prompts"
        raise ConfigError(f"prompts: {error}{hint}") from error
    # Not splitlines(), which also breaks at characters that JSON allows within a string.
    lines = [(number, _stripped(line)) for number, line in enumerate(text.split("\n"), 1)]
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson") or (suffix == ".json" and not text.lstrip().startswith("[")):
        prompts = [_parse(f"{path}:{number}", line) for number, line in lines if line]
    elif suffix == ".json":
        prompts = [_prompt(f"{path}: entry {i}", entry) for i, entry in enumerate(_json(str(path), text), 1)]
    elif suffix in (".csv", ".tsv", ".parquet", ".arrow", ".yaml", ".yml"):
        raise ConfigError(f"prompts: {path} is a {suffix} file, expected .txt with a prompt a line, .jsonl or .json")
    else:
        prompts = [Prompt(line) for _, line in lines if line]
    distinct: dict[str, Prompt] = {}
    for prompt in prompts:
        distinct.setdefault(prompt.text, prompt)  # a group of an iteration is one prompt
    return list(distinct.values())


def _json(place: str, text: str) -> Any:
    try:
        return files.parse_json(text, place)
    except files.Unreadable as error:
        raise ConfigError(f"prompts: {error}") from error


def _parse(place: str, line: str) -> Prompt:
    return _prompt(place, _json(place, line))


def _prompt(place: str, entry: Any) -> Prompt:
    metadata = without_nulls(entry)
    if isinstance(metadata, str):
        metadata = {"prompt": metadata}
    text = metadata.get("prompt") if isinstance(metadata, dict) else None
    if not isinstance(text, str) or not _stripped(text):
        raise ConfigError(f"prompts: {place} has no text under 'prompt'")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"prompts: {place} has half a surrogate pair, which is no text") from error
    if not isinstance(metadata.get("tag", ""), str):
        raise ConfigError(f"prompts: {place} has the tag {metadata['tag']!r}, expected text")
    return Prompt(_stripped(text), metadata)


def _stripped(text: str) -> str:
    """A line without spaces and invisible characters at its ends: files that were joined have byte order marks inside,
    and copied text has zero-width spaces."""
    first = next((i for i, character in enumerate(text) if not _is_blank(character)), len(text))
    last = next((i for i in range(len(text), first, -1) if not _is_blank(text[i - 1])), first)
    return text[first:last]


def _is_blank(character: str) -> bool:
    return character.isspace() or unicodedata.category(character) == "Cf"


@lru_cache(maxsize=2)
def _read_once(path: str) -> tuple[Prompt, ...]:
    """Tens of thousands of lines of JSON are not parsed again every iteration."""
    return tuple(read_prompts(path))
