"""Rewards of the embedded world that are of use to a study alone; `run.reward: star.study.rewards:NAME`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from star.rewards import Metadata, Scores
from star.rewards.shapes import judged, scores_of, shapes_reward


def noise(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
    """As good as random in 0..1, but the same for the same picture; with the true masks and the true `strict`.

    It knows nothing of the picture: what training with it changes is the harm that a step's noise does.
    """
    digits = (images.double().flatten(1).mean(1) * 1e6).frac()
    return dataclasses.replace(shapes_reward(images, prompts, metadata), reward=digits.to(torch.float32).cpu())


def every_object(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
    """The world's reward, with masks of all objects that are there, those that nobody asked for among them."""
    verdicts, scenes = judged(images, prompts)
    masks = np.zeros((len(prompts), *images.shape[2:]), np.float32)
    for mask, verdict in zip(masks, verdicts, strict=True):
        for detection in verdict.detections:
            mask[detection.mask] = 1
    return dataclasses.replace(scores_of(verdicts, scenes, images.shape[2:]), masks=torch.from_numpy(masks))
