"""What a run trains and is scored on, in one object: a pipeline, prompts by split, a reward, how images are sampled.

The embedded world is one (`star.shapes.task`); a pipeline's folder, prompt files and a reward's name make another. A
third needs no change here: `task: my_module:TASK` in a configuration, or `--task my_module:TASK`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from star.config import EMBEDDED, Config, ConfigError
from star.messages import one_line
from star.rewards import Reward, Weighted, models_for
from star.rewards import load as load_reward
from star.training.pipeline import load_pipeline
from star.training.prompts import Prompt, draw_from_file, pick_from_file, without_brackets

Split = Literal["train", "held_out"]
DrawPrompts = Callable[["Split", int, str], list[Prompt]]
TASKS = {EMBEDDED: "star.shapes.task:TASK"}


@dataclass(frozen=True)
class ImageOptions:
    """How images are sampled for scoring: by the plain sampler, without noise in its steps.

    height, width: pixels. guidance_scale: 1 or less means no guidance. max_sequence_length: tokens of the T5 part, if
    the pipeline has one. batch: images per forward pass. noise_in_order: the noise of all images comes from one
    generator, in order, so that an image's noise depends on its number; otherwise it follows from seed, prompt and
    image alone.
    """

    steps: int = 40
    guidance_scale: float = 4.5
    height: int = 512
    width: int = 512
    max_sequence_length: int = 128
    images_per_prompt: int = 1
    batch: int = 8
    seed: int = 2026
    noise_in_order: bool = False


@dataclass(frozen=True)
class Task:
    """What is trained.

    pipeline: (device, dtype) -> the pipeline in evaluation mode; its autoencoder stays in float32. prompts: (split,
    count, seed) -> up to `count` prompts; of "train" distinct ones, the same whenever the seed is the same; of
    "held_out" those that are never trained on. reward: a callable, or a specification for `star.rewards.load`. images:
    how its images are sampled for scoring. unasked_changes: (images before, images after, prompts) -> by name how far
    apart they are where the prompts leave it open, for `star compare --drift`; images are (B, 3, H, W) in 0..1.
    """

    pipeline: Callable[[torch.device | str, torch.dtype], Any]
    prompts: DrawPrompts
    reward: Reward | str | dict[str, float]
    images: ImageOptions = ImageOptions()
    unasked_changes: Callable[[Tensor, Tensor, Sequence[str]], dict[str, float]] | None = None


def _no_pipeline(device: torch.device | str, dtype: torch.dtype) -> Any:
    raise ConfigError("model.path: not set, and there is no task that has a pipeline")


def _no_prompts(split: Split, count: int, seed: str) -> list[Prompt]:
    name = {"train": "sampling.prompts", "held_out": "scoring.prompts"}[split]
    raise ConfigError(f"{name}: not set, and there is no task that has prompts")


# What a configuration without a task completes. GenEval takes four images of each prompt.
NO_TASK = Task(_no_pipeline, _no_prompts, "", ImageOptions(images_per_prompt=4))


def find_task(name: str) -> Task:
    """The task `shapes`, or the attribute that `module:attribute` names. Raises ConfigError if there is none."""
    module, _, attribute = TASKS.get(name, name).partition(":")
    if not attribute:
        raise ConfigError(f"task: unknown {name!r}, expected one of {list(TASKS)} or 'module:attribute'")
    try:
        task = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"task: {name!r} could not be loaded ({one_line(error)})") from error
    if not isinstance(task, Task):
        raise ConfigError(f"task: {name!r} is a {type(task).__name__}, expected a star.training.task.Task")
    return task


def configured_task(config: Config) -> Task:
    """The task of a run: that of `config.task`, with the parts that the configuration sets itself."""
    task = find_task(config.task) if config.task else NO_TASK
    if config.model.path:
        task = replace(task, pipeline=partial(load_pipeline, config.model.path))
    if config.run.reward:
        task = replace(task, reward=config.run.reward)
    files = {"train": config.sampling.prompts, "held_out": config.scoring.prompts}
    task = replace(task, prompts=partial(_prompts, files, task.prompts))
    return replace(task, prompts=partial(_unbracketed, task.prompts)) if config.sampling.brackets else task


def draw_prompts(task: Task, config: Config, iteration: int) -> list[Prompt]:
    """The distinct prompts of an iteration; the same ones whenever the run is started or resumed."""
    count = config.sampling.prompts_per_iteration
    prompts = task.prompts("train", count, f"{config.run.seed}/{iteration}")
    if len(prompts) < count:
        source = config.sampling.prompts or config.task
        raise ConfigError(f"sampling.prompts: {source} has {len(prompts)} distinct prompts, an iteration needs {count}")
    return prompts


def load_task_reward(task: Task, models: Mapping[str, str], device: torch.device | str) -> Weighted:
    """The task's reward with its weight, 1 if there is one reward. models: where rewards find their weights, by
    name."""
    if isinstance(task.reward, str | dict):
        return load_reward(task.reward, models_for(task.reward, models), device)
    name = getattr(task.reward, "__name__", "reward")
    return Weighted({name: task.reward}, {name: 1.0})


def _prompts(files: dict[str, str | None], default: DrawPrompts, split: Split, count: int, seed: str) -> list[Prompt]:
    path = files[split]
    if path is None:
        return default(split, count, seed)
    return draw_from_file(path, count, seed) if split == "train" else pick_from_file(path, count, seed)


def _unbracketed(draw: DrawPrompts, split: Split, count: int, seed: str) -> list[Prompt]:
    return without_brackets(draw(split, count, seed))
