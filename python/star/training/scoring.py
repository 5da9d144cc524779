"""Scores of a policy on held-out prompts: one way during training and by `star eval`, for every task."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from star.config import Config, ConfigError
from star.reports import shown
from star.reports.evaluations import Evaluation, read_evaluations, write_evaluation
from star.rewards import Scores, pixels
from star.rewards.worker import RewardWorker, Ticket
from star.training.families import family_of
from star.training.pipeline import latent_size, model_shape
from star.training.prompts import Prompt
from star.training.rollout import decode
from star.training.task import ImageOptions, Task

SHOWN = 8  # images of a scoring that are kept

# --- sampling and scoring ---------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """The scores of one image: of the prompt at index `prompt`, its image `number`; NaN for what the reward could not
    say."""

    prompt: int
    number: int
    scores: dict[str, float]


Observer = Callable[[list[Row], Tensor], None]
"""Is called with each batch of this process: its rows, and its images (B, 3, H, W) in 0..1."""


@torch.no_grad()
def sample_images(
    pipeline: Any,
    prompts: Sequence[Prompt],
    options: ImageOptions,
    process: int = 0,
    processes: int = 1,
) -> Iterator[tuple[list[tuple[int, int]], Tensor]]:
    """([(prompt, image)], images (B, 3, H, W) float32 in 0..1) of this process, batch by batch.

    Batches go round the processes. All of them make the same number of passes, because weights may be sharded: the
    images of a pass too many are dropped. Another number of processes changes no image.
    """
    batches = _batches(len(prompts), options)
    family, size = family_of(pipeline), latent_size(pipeline, options.height, options.width)
    shape = (model_shape(pipeline).in_channels, *size)
    generator = torch.Generator().manual_seed(options.seed)
    for start in range(0, len(batches), processes):
        drawn = [_noise(batch, shape, options, generator) for batch in batches[start : start + processes]]
        own = min(process, len(drawn) - 1)
        texts = [prompts[index].text for index, _ in batches[start + own]]
        latents = pipeline(
            texts,
            height=options.height,
            width=options.width,
            num_inference_steps=options.steps,
            latents=family.pack(drawn[own].to(pipeline.transformer.dtype)),
            output_type="latent",
            **family.settings(pipeline, options.guidance_scale, options.max_sequence_length, len(texts)),
        ).images
        images = decode(pipeline, family.unpack(latents, size))
        if own == process:
            yield batches[start + own], images


def _batches(prompts: int, options: ImageOptions) -> list[list[tuple[int, int]]]:
    """(prompt, image) of every image, batch by batch."""
    jobs = [(i, k) for i in range(prompts) for k in range(options.images_per_prompt)]
    return [jobs[start : start + options.batch] for start in range(0, len(jobs), options.batch)]


def _noise(
    batch: list[tuple[int, int]], shape: tuple[int, int, int], options: ImageOptions, generator: torch.Generator
) -> Tensor:
    if options.noise_in_order:
        return torch.randn(len(batch), *shape, generator=generator)
    seeds = (np.random.SeedSequence([options.seed, *job]).generate_state(1)[0] for job in batch)
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds])


def first_noise(prompts: int, shape: tuple[int, int, int], options: ImageOptions) -> Tensor:
    """(n, C, H, W): the noise that `sample_images` starts the first image of each of the first prompts from. prompts:
    of the whole scoring. n: those whose images are kept."""
    generator, found = torch.Generator().manual_seed(options.seed), []
    for batch in _batches(prompts, options):
        noise = _noise(batch, shape, options, generator)
        found += [row for row, (index, number) in zip(noise, batch, strict=True) if index < SHOWN and number == 0]
        if len(found) == min(SHOWN, prompts):
            break
    return torch.stack(found)


def evaluate(
    pipeline: Any,
    prompts: Sequence[Prompt],
    worker: RewardWorker,
    options: ImageOptions,
    *,
    iteration: int | None = None,
    process: int = 0,
    processes: int = 1,
    observe: Observer | None = None,
) -> Evaluation:
    """Sample and score; the images of one batch are scored while the next ones are sampled.

    With several processes each scores its share, and every one of them returns the whole.

    Raises:
        RewardError: the reward failed for every image.
    """
    rows: list[Row] = []
    waiting: list[tuple[list[tuple[int, int]], Tensor, Ticket]] = []

    def collect() -> None:
        jobs, images, ticket = waiting.pop(0)
        found = _rows(jobs, ticket.result())
        rows.extend(found)
        if observe is not None:
            observe(found, images)
        bar.update(len(found))

    total = len(prompts) * options.images_per_prompt
    with tqdm(total=total, desc="scoring", dynamic_ncols=True, leave=False, disable=process > 0) as bar:
        for jobs, images in sample_images(pipeline, prompts, options, process, processes):
            chosen = [prompts[index] for index, _ in jobs]
            ticket = worker.submit(images, [p.text for p in chosen], [p.metadata for p in chosen])
            waiting.append((jobs, images, ticket))
            if len(waiting) > 1:
                collect()
        while waiting:
            collect()
    if processes > 1:
        rows = gather_object(rows)
    worker.count_failures(any(math.isfinite(row.scores["reward"]) for row in rows))
    return summarize(prompts, rows, iteration)


def _rows(jobs: Sequence[tuple[int, int]], scores: Scores) -> list[Row]:
    columns = {"reward": scores.reward}
    if len(scores.terms) > 1:
        columns |= scores.terms
    columns |= scores.details
    return [
        Row(index, number, {name: column[i].item() for name, column in columns.items()})
        for i, (index, number) in enumerate(jobs)
    ]


def summarize(prompts: Sequence[Prompt], rows: Sequence[Row], iteration: int | None = None) -> Evaluation:
    """The means over each prompt's images. Columns of one category alone and counts of retries stand in results.jsonl
    only."""
    categories = _categories(prompts)
    special = (*(f"correct_{name}" for name in dict.fromkeys(categories) if name), "retries")
    names = [name for name in dict.fromkeys(n for row in rows for n in row.scores) if not name.endswith(special)]
    values = {name: np.full(len(prompts), math.nan) for name in names}
    for name in names:
        found: dict[int, list[float]] = {}
        for row in rows:
            value = row.scores.get(name, math.nan)
            if math.isfinite(value):
                found.setdefault(row.prompt, []).append(value)
        for index, numbers in found.items():
            values[name][index] = np.mean(numbers)
    failed = sum(not math.isfinite(row.scores["reward"]) for row in rows)
    return Evaluation(iteration, categories, values, len(rows), failed)


def _categories(prompts: Sequence[Prompt]) -> tuple[str | None, ...]:
    return tuple(None if p.category is None else str(p.category) for p in prompts)


class FirstImages:
    """Keeps the first image of each of the first prompts."""

    def __init__(self) -> None:
        self.images: dict[int, Tensor] = {}

    def __call__(self, rows: list[Row], images: Tensor) -> None:
        for row, image in zip(rows, images, strict=True):
            if row.prompt < SHOWN and row.number == 0:
                self.images[row.prompt] = image.cpu()

    def save(self, folder: Path) -> None:
        """Write them as 00000.png and so on."""
        folder.mkdir(parents=True, exist_ok=True)
        for index, image in self.images.items():
            Image.fromarray(pixels(image[None])[0]).save(folder / f"{index:05d}.png")


# --- a run's own held-out prompts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class HeldOut:
    """The held-out prompts of a run and how they are scored: always the same prompts with the same noise."""

    run: Path
    prompts: list[Prompt]
    options: ImageOptions
    every: int

    @classmethod
    def of_run(cls, task: Task, config: Config) -> HeldOut:
        """What a run's configuration sets; no prompts if `scoring.count` is 0."""
        scoring, sampling, model = config.scoring, config.sampling, config.model
        prompts = task.prompts("held_out", scoring.count, str(scoring.seed)) if scoring.count else []
        options = ImageOptions(
            steps=scoring.steps or sampling.steps,
            guidance_scale=sampling.guidance_scale if scoring.guidance_scale is None else scoring.guidance_scale,
            height=model.height,
            width=model.width,
            max_sequence_length=model.max_sequence_length,
            images_per_prompt=scoring.images_per_prompt,
            batch=scoring.batch or task.images.batch,
            seed=scoring.seed,
            noise_in_order=task.images.noise_in_order,
        )
        return cls(config.run.out, prompts, options, scoring.every)

    def score(self, pipeline: Any, worker: RewardWorker, iteration: int, accelerator: Accelerator) -> float:
        """Score the policy as it is; the run's evaluations.jsonl gets a line, and held_out/ its first images. Returns
        the mean reward."""
        first = FirstImages()
        evaluation = evaluate(
            pipeline,
            self.prompts,
            worker,
            self.options,
            iteration=iteration,
            process=accelerator.process_index,
            processes=accelerator.num_processes,
            observe=first,
        )
        if accelerator.is_main_process:
            write_evaluation(self.run, evaluation)
            stage: shown.Stage = "before" if iteration == 0 else "after"
            if iteration == 0:
                shown.write_prompts(self.run, [prompt.text for prompt in self.prompts[:SHOWN]])
            shown.maps_path(self.run, stage).unlink(missing_ok=True)  # they are of images that are replaced
            first.save(self.run / shown.FOLDER / stage)
        return evaluation.mean("reward").mean

    def is_due(self, iteration: int, last: int) -> bool:
        """Whether the policy is scored after an iteration: before the first, after the last and on the schedule."""
        scheduled = bool(self.every) and iteration % self.every == 0
        return bool(self.prompts) and (iteration in (0, last) or scheduled)

    def check_resumed(self) -> None:
        """Raise ConfigError unless a run that goes on was scored on these prompts before its first iteration: the
        policy has moved since, and scores of now would be called those of the untrained one."""
        if not self.prompts:
            return
        found = read_evaluations(self.run)
        if not found or found[0].iteration != 0:
            raise ConfigError(
                "scoring.count: the run was started without scoring, so its scores before training are unknown; use 0"
            )
        if len(found[0].categories) != len(self.prompts):
            raise ConfigError(
                f"scoring.count: got {len(self.prompts)}, the run was started with {len(found[0].categories)}"
            )
        kept = shown.read_prompts(self.run)  # none in a run of version 0.1
        same = not kept or kept == [prompt.text for prompt in self.prompts[:SHOWN]]
        if not same or found[0].categories != _categories(self.prompts):
            raise ConfigError(
                "scoring.prompts: they are other prompts than the run was scored on before training, so its scores "
                "would not compare; give it the same file, or use another --out"
            )


# --- the files of `star eval` -----------------------------------------------------------------------------------------


class ResultsWriter:
    """Writes what is scored, image by image, into a folder: results.jsonl, which GenEval's summary_scores.py reads too,
    and with save_images images/00000/samples/00000.png with metadata.jsonl beside them, the layout that GenEval's
    evaluate_images.py reads."""

    def __init__(self, folder: Path, prompts: Sequence[Prompt], save_images: bool) -> None:
        self.folder, self.prompts, self.save_images = folder, prompts, save_images
        folder.mkdir(parents=True, exist_ok=True)

    def __call__(self, rows: list[Row], images: Tensor) -> None:
        with (self.folder / "results.jsonl").open("a") as file:
            file.writelines(json.dumps(self.line(row)) + "\n" for row in rows)
        if self.save_images:
            for row, image in zip(rows, pixels(images), strict=True):
                self.save(row, image)

    def line(self, row: Row) -> dict:
        prompt = self.prompts[row.prompt]
        scores = {name: value for name, value in row.scores.items() if math.isfinite(value)}
        line = {
            "filename": f"images/{self.path(row)}",
            "index": row.prompt,
            "number": row.number,
            "prompt": prompt.text,
            "tag": prompt.category or "",
            "reward": scores.get("reward"),
            "scores": scores,
            "metadata": json.dumps(dict(prompt.metadata)),
        }
        return line | ({"correct": scores["correct"] == 1} if "correct" in scores else {})

    def path(self, row: Row) -> str:
        return f"{row.prompt:05d}/samples/{row.number:05d}.png"

    def save(self, row: Row, image: np.ndarray) -> None:
        path = self.folder / "images" / self.path(row)
        path.parent.mkdir(parents=True, exist_ok=True)
        metadata = {**self.prompts[row.prompt].metadata, "prompt": self.prompts[row.prompt].text}
        (path.parent.parent / "metadata.jsonl").write_text(json.dumps(metadata))
        Image.fromarray(image).save(path)
