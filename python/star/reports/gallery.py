"""Held-out images side by side, before training and after it, with the maps that lie over them."""

from __future__ import annotations

import base64
import io
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
from PIL import Image

from star.reports.runs import Run
from star.reports.shown import Field, Stage

LARGEST = 512  # pixels of an image's longer side; larger ones are in the page as JPEG of this size
PIXELATED = 128  # smaller images are enlarged pixel by pixel
Key = tuple[str, str, int]  # a field's kind and name, and how many of that name come before it


@dataclass(frozen=True)
class View:
    """An image as the page has it. url: its data, or None: it is missing. overlays: by the number of a choice."""

    caption: str
    run: int | None
    score: str
    url: str | None
    is_small: bool
    overlays: dict[int, str]


@dataclass(frozen=True)
class Choice:
    """A map that can be laid over the images of an example. largest: what its brightest color stands for."""

    kind: str
    name: str
    largest: str


@dataclass(frozen=True)
class Example:
    """A prompt's images. prompt: None if it was not kept."""

    number: int
    prompt: str | None
    choices: list[Choice]
    views: list[View]


@dataclass(frozen=True)
class Gallery:
    """The examples of runs that begin with the same images."""

    runs: list[Run]
    examples: list[Example]


def galleries(runs: Sequence[Run]) -> list[Gallery]:
    """Runs whose prompts and images before training are the same are shown side by side."""
    alike: dict[object, list[Run]] = {}
    for run in runs:
        before = run.shown.images["before"]
        if before or run.shown.images["after"]:
            key = (tuple(run.shown.prompts), tuple(sorted(before.items()))) if before else run.number
            alike.setdefault(key, []).append(run)
    return [Gallery(group, [example(group, number) for number in numbers(group)]) for group in alike.values()]


def numbers(runs: Iterable[Run]) -> list[int]:
    return sorted({number for run in runs for images in run.shown.images.values() for number in images})


def example(runs: Sequence[Run], number: int) -> Example:
    shown: list[tuple[Run, Stage]] = [(runs[0], "before"), *((run, "after") for run in runs)]
    fields = [named(fields_of(run, stage, number)) for run, stage in shown]
    keys = list(dict.fromkeys(key for own in fields for key in own))
    largest = {key: max(float(own[key].max()) for own in fields if key in own) for key in keys}
    views = []
    for (run, stage), own in zip(shown, fields, strict=True):
        overlays = {keys.index(key): overlay(values, largest[key]) for key, values in own.items()}
        views.append(view(run, stage, number, len(runs) > 1, overlays))
    prompts = runs[0].shown.prompts
    return Example(
        number,
        prompts[number] if number < len(prompts) else None,
        [Choice(kind, name, f"{largest[kind, name, nth]:.1f}") for kind, name, nth in keys],
        views,
    )


def fields_of(run: Run, stage: Stage, number: int) -> list[Field]:
    """Of an image that is there."""
    maps = run.shown.maps.get(stage)
    return maps.fields.get(number, []) if maps is not None and number in run.shown.images[stage] else []


def named(fields: Sequence[Field]) -> dict[Key, np.ndarray]:
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for field in fields:
        found[field.kind, field.name, seen[field.kind, field.name]] = field.values
        seen[field.kind, field.name] += 1
    return found


def view(run: Run, stage: Stage, number: int, is_named: bool, overlays: dict[int, str]) -> View:
    evaluation = run.evaluation(stage)
    if stage == "before":
        caption = "before"
    elif evaluation is None:
        caption = "after"
    else:
        caption = f"after {evaluation.iteration} iterations"
    data = run.shown.images[stage].get(number)
    url, is_small = (None, False) if data is None else as_url(data)
    number_of_run = run.number if is_named and stage == "after" else None
    return View(caption, number_of_run, score(run, stage, number), url, is_small, overlays if url else {})


def score(run: Run, stage: Stage, number: int) -> str:
    """The reward of an image, or of its prompt's images; "" where it is unknown."""
    evaluation = run.evaluation(stage)
    if evaluation is None or number >= len(evaluation.categories) or number not in run.shown.images[stage]:
        return ""
    value = float(evaluation.values["reward"][number])
    several = evaluation.images // max(1, len(evaluation.categories))
    words = "reward" if several <= 1 else f"mean reward of {several} images"
    return f"{words} {value:.2f}" if math.isfinite(value) else f"{words}: failed"


def as_url(data: bytes) -> tuple[str | None, bool]:
    """An image in a page, and whether it is small; None if it cannot be read."""
    try:
        image = Image.open(io.BytesIO(data))
        longer = max(image.size)
        if longer <= LARGEST:
            image.verify()
            return data_url(data, "png"), longer < PIXELATED
        smaller = image.convert("RGB")
        smaller.thumbnail((LARGEST, LARGEST))
        return data_url(encoded(smaller, "JPEG"), "jpeg"), False
    except Exception:  # of a damaged file Pillow raises many kinds
        return None, False


def overlay(values: np.ndarray, largest: float) -> str:
    """A field in colors, a pixel for each location."""
    colors = matplotlib.colormaps["inferno"](values / (largest or 1.0), bytes=True)[..., :3]
    return data_url(encoded(Image.fromarray(np.ascontiguousarray(colors)), "PNG"), "png")


def encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 90} if kind == "JPEG" else {"optimize": True}))
    return buffer.getvalue()


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
