"""The reward of the embedded world: its verifier's soft score, with masks and rewards of the objects."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from star.rewards import Metadata, Scores
from star.shapes.scenes import Scene, parse_scene
from star.shapes.verifier import Verdict, verify


def shapes_reward(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
    """Soft scores in 0..1, `strict` as a detail, masks of what was found, and what each place earned."""
    return scores_of(*judged(images, prompts), images.shape[2:])


def judged(images: Tensor, prompts: Sequence[str]) -> tuple[list[Verdict], list[Scene]]:
    """What the verifier says of pictures (B, 3, H, W), and the scenes that were asked for."""
    pictures = images.permute(0, 2, 3, 1).cpu().numpy()
    scenes = [parse_scene(prompt) for prompt in prompts]
    return [verify(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)], scenes


def scores_of(verdicts: list[Verdict], scenes: list[Scene], size: tuple[int, int]) -> Scores:
    """`shapes_reward` of pictures that have been verified. size: (H, W)."""
    masks = np.stack([v.masks.any(0) if len(v.masks) else np.zeros(size, bool) for v in verdicts])
    maps = [reward_map(v, scene, size) for v, scene in zip(verdicts, scenes, strict=True)]
    return Scores(
        reward=torch.tensor([v.soft for v in verdicts], dtype=torch.float32),
        details={"strict": torch.tensor([float(v.strict) for v in verdicts])},
        masks=torch.from_numpy(masks).float(),
        reward_map=torch.from_numpy(np.stack(maps)),
    )


def reward_map(verdict: Verdict, scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: what the picture would earn if all its objects were like the nearest one.

    An object that nobody asked for is worth 0. If there are fewer objects than asked for, none of them is to blame for
    it: the places between them then earn what the picture earned.
    """
    things = len(scene.things)
    # A relation whose objects are not both there is missed where they are missed.
    both = all(mask.any() for mask in verdict.masks)
    whole = [
        part for part, counts in zip(verdict.parts[things:], [both, True][not scene.relation :], strict=False) if counts
    ]

    def earned(credit: float) -> float:
        return (things * credit + sum(whole)) / (things + len(whole))

    field, occupied = np.full(size, verdict.soft, np.float32), np.zeros(size, bool)
    for detection in verdict.detections:
        field[detection.mask], occupied[detection.mask] = earned(0.0), True
    for credit, mask in zip(verdict.parts, verdict.masks, strict=False):
        field[mask] = earned(credit)
    if len(verdict.detections) >= sum(thing.count for thing in scene.things) > 0:
        rows, columns = ndimage.distance_transform_edt(~occupied, return_distances=False, return_indices=True)
        field = field[rows, columns]
    return field


# --- for studies alone: `run.reward: star.shapes.reward:NAME` ---------------------------------------------------------


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
