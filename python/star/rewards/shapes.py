"""The reward of the embedded world: its verifier's soft score, with the objects' masks."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from star.rewards import Scores
from star.shapes.scenes import parse_scene
from star.shapes.verifier import verify


def shapes_reward(images: Tensor, prompts: Sequence[str]) -> Scores:
    """Soft scores in 0..1, `strict` as a detail, and masks of what was found. images: (B, 3, S, S) in 0..1."""
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    verdicts = [verify(picture, parse_scene(prompt)) for picture, prompt in zip(pictures, prompts, strict=True)]
    masks = np.stack([v.masks.any(0) if len(v.masks) else np.zeros(pictures.shape[1:3], bool) for v in verdicts])
    return Scores(
        reward=torch.tensor([v.soft for v in verdicts], dtype=torch.float32),
        details={"strict": torch.tensor([float(v.strict) for v in verdicts])},
        masks=torch.from_numpy(masks).float(),
    )
