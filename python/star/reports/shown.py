"""What a run keeps of its first held-out prompts: their texts, their images, and maps over these. In its folder:

    held_out/prompts.jsonl       {"prompt": "a red circle left of a blue square"}, a line for each prompt
    held_out/before/00000.png    the prompt's first image, before training; after/ has those of the last scoring
    held_out/maps_before.jsonl   {"image": 0, "iteration": 0, "fields": [
                                 {"kind": "map", "name": "red circle", "grid": [9, 9], "largest": 4.1, "values": "..."},
                                 ...]}

A field is a mean over the steps that sampled the image, divided by its own mean over the locations. `values` are its
rows * columns bytes in base64, of which 255 stands for `largest`. The kind "map" is a concept's map, "weights" what the
strategy "attention" would make of all of them.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from star import files

FOLDER = "held_out"
KINDS = ("map", "weights")
Stage = Literal["before", "after"]


class Field(NamedTuple):
    """values: (rows, columns), not negative, with mean 1. kind: one of KINDS."""

    kind: str
    name: str
    values: np.ndarray


class Maps(NamedTuple):
    """Fields by the number of an image, of the policy after an iteration."""

    iteration: int
    fields: dict[int, list[Field]]


def write_prompts(run: Path, prompts: Sequence[str]) -> None:
    (run / FOLDER).mkdir(parents=True, exist_ok=True)
    files.replace_text(run / FOLDER / "prompts.jsonl", "".join(json.dumps({"prompt": p}) + "\n" for p in prompts))


def read_prompts(run: Path) -> list[str]:
    """None in a run of version 0.1. Raises files.Unreadable for a file that holds anything else."""
    found = []
    for place, line in files.numbered_json_lines(run / FOLDER / "prompts.jsonl"):
        if not isinstance(line.get("prompt"), str):
            raise files.Unreadable(f"{place} has no text under 'prompt'; delete the file")
        found.append(line["prompt"])
    return found


def image_paths(run: Path, stage: Stage) -> dict[int, Path]:
    """The images of a stage by their prompts' numbers."""
    found = sorted((run / FOLDER / stage).glob("*.png"))
    return {int(path.stem): path for path in found if path.stem.isdecimal() and path.stem.isascii()}


def maps_path(run: Path, stage: Stage) -> Path:
    return run / FOLDER / f"maps_{stage}.jsonl"


def write_maps(run: Path, stage: Stage, maps: Maps) -> None:
    """Keep the maps of images in the run's folder."""
    lines = []
    for image, fields in maps.fields.items():
        line = {"image": image, "iteration": maps.iteration, "fields": [_packed(field) for field in fields]}
        lines.append(json.dumps(line) + "\n")
    path = maps_path(run, stage)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.replace_text(path, "".join(lines))


def _packed(field: Field) -> dict[str, object]:
    largest = float(field.values.max())
    levels = (field.values / (largest or 1.0) * 255).round().astype(np.uint8)
    return {
        "kind": field.kind,
        "name": field.name,
        "grid": list(field.values.shape),
        "largest": round(largest, 4),
        "values": base64.b64encode(levels.tobytes()).decode(),
    }


def read_maps(run: Path, stage: Stage) -> Maps | None:
    """The maps of a stage; None if the run kept none. Raises files.Unreadable for a file that holds anything else."""
    path = maps_path(run, stage)
    fields: dict[int, list[Field]] = {}
    iterations = set()
    for place, line in files.numbered_json_lines(path):
        try:
            fields[_count(line["image"])] = [_unpacked(field) for field in line["fields"]]
            iterations.add(_count(line["iteration"]))
        except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
            raise files.Unreadable(f"{place} has no maps of an image; delete the file") from error
    if len(iterations) > 1:
        raise files.Unreadable(f"{path} has maps of several iterations; delete the file")
    return Maps(iterations.pop(), fields) if iterations else None


def _count(value: object) -> int:
    if not files.is_count(value):
        raise ValueError(f"got {value!r}, expected a count")
    assert isinstance(value, int)
    return value


def _unpacked(field: Mapping) -> Field:
    rows, columns = map(_count, field["grid"])
    largest = field["largest"]
    if field["kind"] not in KINDS or not isinstance(field["name"], str) or not files.is_number(largest):
        raise ValueError("no field")
    if not 0 <= largest < math.inf:
        raise ValueError(f"got {largest}, expected a finite number from 0 on")
    levels = np.frombuffer(base64.b64decode(field["values"], validate=True), np.uint8)
    if not len(levels):
        raise ValueError("no locations")
    return Field(field["kind"], field["name"], levels.reshape(rows, columns) / 255 * largest)
