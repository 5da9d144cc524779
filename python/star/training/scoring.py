"""Scores of a checkpoint on a prompt file in one of the public formats, picture by picture and by category."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from rich.table import Table
from torch import Tensor
from tqdm import tqdm

from star.rewards import Scores, pixels
from star.rewards.worker import RewardWorker
from star.training.prompts import Prompt


@dataclass
class Sampling:
    """How pictures are made for scoring: without noise in the steps."""

    steps: int = 40
    guidance_scale: float = 4.5
    height: int = 512
    width: int = 512
    max_sequence_length: int = 128
    images_per_prompt: int = 4
    batch: int = 8
    seed: int = 2026


@dataclass
class Results:
    """One row per picture. rows: what results.jsonl holds. failed: pictures without a reward."""

    rows: list[dict] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return sum(row["reward"] is None for row in self.rows)

    def categories(self) -> list[str]:
        """In the order of the prompt file."""
        return list(dict.fromkeys(row["tag"] for row in self.rows))

    def columns(self) -> list[str]:
        """The reward and its details that hold for all categories."""
        names = dict.fromkeys(name for row in self.rows for name in row["scores"])
        by_category = tuple(f"correct_{tag}" for tag in self.categories())
        return [name for name in names if not name.endswith((*by_category, "retries"))]

    def mean(self, column: str, category: str | None = None) -> tuple[float, float, int]:
        """Mean, its standard error and the number of prompts. Pictures of a prompt are no independent draws: the mean
        is over the prompts' means, and so is the error."""
        values: dict[int, list[float]] = {}
        for row in self.rows:
            value = row["scores"].get(column)
            if category in (None, row["tag"]) and value is not None:
                values.setdefault(row["index"], []).append(value)
        means = np.array([np.mean(v) for v in values.values()])
        if not len(means):
            return math.nan, math.nan, 0
        error = means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else math.nan
        return float(means.mean()), float(error), len(means)

    def table(self, title: str) -> Table:
        """By category; the last row is the mean over the categories, as GenEval reports it."""
        columns, categories = self.columns(), self.categories()
        table = Table("category", "prompts", *columns, title=title)
        for category in categories:
            cells = [self.mean(column, category) for column in columns]
            table.add_row(category or "all", str(cells[0][2]), *(_cell(*cell[:2]) for cell in cells))
        if len(categories) > 1:
            table.add_section()
            total = [self.mean(column) for column in columns]
            table.add_row("all prompts", str(total[0][2]), *(_cell(*cell[:2]) for cell in total))
            over = [np.mean([self.mean(column, c)[0] for c in categories]) for column in columns]
            table.add_row("mean of categories", "", *(f"{value:.4f}" for value in over))
        table.caption = "± one standard error over prompts"
        if self.failed:
            table.caption += f"; {self.failed} of {len(self.rows)} pictures have no reward"
        return table

    def summary(self) -> dict:
        """The table as numbers."""
        groups = {category or "all": category for category in self.categories()} | {"all": None}
        return {
            "pictures": len(self.rows),
            "failed": self.failed,
            "categories": {
                label: {column: _finite(self.mean(column, category)[0]) for column in self.columns()}
                for label, category in groups.items()
            },
        }


def _cell(mean: float, error: float) -> str:
    return f"{mean:.4f}" if math.isnan(error) else f"{mean:.4f} ± {error:.4f}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


@torch.no_grad()
def pictures(pipeline: StableDiffusion3Pipeline, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[tuple]:
    """(indices of the prompts, numbers of the pictures, images (B, 3, H, W) in 0..1), batch by batch.

    A picture's noise follows from seed, prompt index and number alone: no other batch size changes it.
    """
    jobs = [(i, k) for i in range(len(prompts)) for k in range(sampling.images_per_prompt)]
    for start in range(0, len(jobs), sampling.batch):
        chosen = jobs[start : start + sampling.batch]
        generators = [
            torch.Generator().manual_seed(int(np.random.SeedSequence([sampling.seed, *job]).generate_state(1)[0]))
            for job in chosen
        ]
        images = pipeline(
            [prompts[index].text for index, _ in chosen],
            height=sampling.height,
            width=sampling.width,
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            max_sequence_length=sampling.max_sequence_length if pipeline.text_encoder_3 is not None else 0,
            generator=generators,
            output_type="pt",
        ).images
        yield [index for index, _ in chosen], [number for _, number in chosen], images.float().clamp(0, 1)


def evaluate(
    pipeline: StableDiffusion3Pipeline,
    prompts: Sequence[Prompt],
    worker: RewardWorker,
    sampling: Sampling,
    out: Path | None = None,
    save_images: bool = False,
) -> Results:
    """Sample and score; the pictures of one batch are scored while the next ones are made.

    out: a folder for results.jsonl (a line a picture, also readable by GenEval's summary_scores.py) and summary.json;
    save_images: also images/00000/samples/00000.png with metadata.jsonl beside them, the layout that GenEval's
    evaluate_images.py reads. Raises RewardError if the reward fails for every picture.
    """
    results, waiting = Results(), []
    total = len(prompts) * sampling.images_per_prompt

    def collect(indices: list[int], numbers: list[int], ticket) -> None:
        rows = list(_rows(prompts, indices, numbers, ticket.result()))
        results.rows += rows
        if out is not None:
            with (out / "results.jsonl").open("a") as file:
                file.writelines(json.dumps(_line(row)) + "\n" for row in rows)
        bar.update(len(rows))

    with tqdm(total=total, desc="scoring", dynamic_ncols=True) as bar:
        for indices, numbers, images in pictures(pipeline, prompts, sampling):
            if out is not None and save_images:
                _save(out / "images", prompts, indices, numbers, images)
            chosen = [prompts[index] for index in indices]
            ticket = worker.submit(images, [p.text for p in chosen], [p.metadata for p in chosen])
            waiting.append((indices, numbers, ticket))
            if len(waiting) > 1:
                collect(*waiting.pop(0))
        for job in waiting:
            collect(*job)
    worker.count_failures()
    if out is not None:
        (out / "summary.json").write_text(json.dumps(results.summary(), indent=2) + "\n")
    return results


def _rows(prompts: Sequence[Prompt], indices: list[int], numbers: list[int], scores: Scores) -> Iterator[dict]:
    values = {"reward": scores.reward}
    if len(scores.terms) > 1:
        values |= scores.terms
    values |= scores.details
    for row, (index, number) in enumerate(zip(indices, numbers, strict=True)):
        found = {name: _finite(column[row].item()) for name, column in values.items()}
        prompt = prompts[index]
        yield {
            "index": index,
            "number": number,
            "prompt": prompt.text,
            "tag": str(prompt.metadata.get("tag", "")),
            "reward": found["reward"],
            "scores": {name: value for name, value in found.items() if value is not None},
            "metadata": dict(prompt.metadata),
        }


def _line(row: dict) -> dict:
    """A row as GenEval's results.jsonl has it, and more."""
    line = {"filename": f"images/{_place(row['index'], row['number'])}", **row}
    if "correct" in row["scores"]:
        line["correct"] = row["scores"]["correct"] == 1
    return line | {"metadata": json.dumps(row["metadata"])}


def _place(index: int, number: int) -> str:
    return f"{index:05d}/samples/{number:05d}.png"


def _save(folder: Path, prompts: Sequence[Prompt], indices: list[int], numbers: list[int], images: Tensor) -> None:
    for index, number, picture in zip(indices, numbers, pixels(images), strict=True):
        place = folder / _place(index, number)
        place.parent.mkdir(parents=True, exist_ok=True)
        metadata = {**prompts[index].metadata, "prompt": prompts[index].text}
        (place.parent.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        Image.fromarray(picture).save(place)
