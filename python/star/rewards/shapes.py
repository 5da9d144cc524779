"""The reward of the embedded world: its verifier's soft score, with masks and rewards of the objects."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from star.rewards import Metadata, Scores
from star.shapes.scenes import parse_scene
from star.shapes.verifier import Verdict, verify


def shapes_reward(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
    """Soft scores in 0..1, `strict` as a detail, masks of what was found, and what each object earned where it is."""
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    verdicts = [verify(picture, parse_scene(prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]
    masks = np.stack([v.masks.any(0) if len(v.masks) else np.zeros(pictures.shape[1:3], bool) for v in verdicts])
    return Scores(
        reward=torch.tensor([v.soft for v in verdicts], dtype=torch.float32),
        details={"strict": torch.tensor([float(v.strict) for v in verdicts])},
        masks=torch.from_numpy(masks).float(),
        reward_map=torch.from_numpy(np.stack([reward_map(v, pictures.shape[1:3]) for v in verdicts])),
    )


def reward_map(verdict: Verdict, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: an object that was asked for earns its own credit, one that was not earns 0, the rest of the
    picture what the picture earned."""
    field = np.full(size, verdict.soft, np.float32)
    for detection in verdict.detections:
        field[detection.mask] = 0.0
    for credit, mask in zip(verdict.parts, verdict.masks, strict=False):  # parts go on with relation and background
        field[mask] = credit
    return field
