"""The embedded world as a task: `--task shapes`."""

from __future__ import annotations

import torch
from diffusers import StableDiffusion3Pipeline

from star.shapes import model, scenes
from star.shapes.drift import unasked_changes
from star.shapes.measure import STEPS
from star.shapes.reward import shapes_reward
from star.training.prompts import Prompt
from star.training.task import ImageOptions, Split, Task


def load_pipeline(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The embedded model; its autoencoder stays in float32."""
    pipeline = model.load_pipeline()
    model.cast((pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer), dtype)
    return pipeline.to(device)


def draw_prompts(split: Split, count: int, seed: str) -> list[Prompt]:
    """Prompts with the category of their scene as "tag"; those for training are distinct."""
    if split == "train":
        texts = list(dict.fromkeys(scenes.prompts(8 * count, seed, "train")))[:count]
    else:
        texts = scenes.prompts(count, seed, "heldout", distinct=True)
    return [Prompt(text, {"tag": scenes.parse_scene(text).category}) for text in texts]


TASK = Task(
    pipeline=load_pipeline,
    prompts=draw_prompts,
    reward=shapes_reward,
    images=ImageOptions(
        steps=STEPS,
        guidance_scale=1.0,
        height=scenes.SIZE,
        width=scenes.SIZE,
        max_sequence_length=0,
        batch=64,
        noise_in_order=True,
    ),
    unasked_changes=unasked_changes,
)
