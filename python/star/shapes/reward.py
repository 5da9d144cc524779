"""The reward of the embedded world: its verifier's soft score, with masks and rewards of the objects."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from star.rewards import Metadata, Scores
from star.shapes.scenes import Scene, Things, parse_scene
from star.shapes.verifier import Verdict, verify


@dataclass(frozen=True)
class Verified:
    """B images that the verifier has judged.

    images: (B, 3, H, W) in 0..1. scenes, verdicts: one for each image, what its prompt names and what it shows.
    """

    images: Tensor
    scenes: list[Scene]
    verdicts: list[Verdict]


def verify_images(images: Tensor, prompts: Sequence[str]) -> Verified:
    """Judge images (B, 3, H, W) by their prompts. Raises ValueError for a prompt outside this world."""
    scenes = [parse_scene(prompt) for prompt in prompts]
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return Verified(images, scenes, [verify(image, scene) for image, scene in zip(arrays, scenes, strict=True)])


class VerifierReward:
    """A reward that is made of the verifier's verdicts. `score` takes images that are verified already, so that several
    rewards can share one verification."""

    def __init__(self, score: Callable[[Verified], Scores]) -> None:
        self.score = score
        functools.update_wrapper(self, score)

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        return self.score(verify_images(images, prompts))


@VerifierReward
def shapes_reward(verified: Verified) -> Scores:
    """Soft scores in 0..1, `strict` as a detail, masks of the requested objects, what each location earned, and the
    credit of each requested group of objects."""
    height, width = verified.images.shape[2:]
    size = (height, width)
    masks = np.stack([v.masks.any(0) if len(v.masks) else np.zeros(size, bool) for v in verified.verdicts])
    maps = [reward_map(v, scene, size) for v, scene in zip(verified.verdicts, verified.scenes, strict=True)]
    credits, concepts = group_credits(verified)
    return Scores(
        reward=torch.tensor([v.soft for v in verified.verdicts], dtype=torch.float32),
        details={"strict": torch.tensor([float(v.strict) for v in verified.verdicts])},
        masks=torch.from_numpy(masks).float(),
        reward_map=torch.from_numpy(np.stack(maps)),
        credits=credits,
        concepts=concepts,
    )


def group_credits(verified: Verified) -> tuple[Tensor, tuple[tuple[str, ...], ...]]:
    """`credits` and `concepts` of Scores: what each group of things earned, as the verifier has it."""
    phrases = [tuple(_phrase(things) for things in scene.things) for scene in verified.scenes]
    credits = torch.full((len(phrases), max((len(row) for row in phrases), default=0)), torch.nan)
    for i, verdict in enumerate(verified.verdicts):
        credits[i, : len(phrases[i])] = torch.tensor(verdict.parts[: len(phrases[i])])
    return credits, tuple(phrases)


def _phrase(things: Things) -> str:
    """The words of a group without its number: the concept that a prompt has for it."""
    return things.phrase.split(" ", 1)[1]


def reward_map(verdict: Verdict, scene: Scene, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: what the image would earn if all its objects were like the nearest one.

    An object that was not requested is worth 0. If there are fewer objects than requested, none of them is to blame for
    it: the locations between them then earn what the image earned.
    """
    things = len(scene.things)
    # If an object of a relation is missing, the one that is there is not charged for the relation.
    both = all(mask.any() for mask in verdict.masks)
    whole = [
        part for part, counts in zip(verdict.parts[things:], [both, True][not scene.relation :], strict=False) if counts
    ]

    def earned(credit: float) -> float:
        return (things * credit + sum(whole)) / (things + len(whole))

    field, occupied = np.full(size, verdict.soft, np.float32), np.zeros(size, bool)
    for detection, credit in zip(verdict.detections, verdict.credits, strict=True):
        field[detection.mask], occupied[detection.mask] = earned(credit), True
    if len(verdict.detections) >= sum(thing.count for thing in scene.things) > 0:
        rows, columns = ndimage.distance_transform_edt(~occupied, return_distances=False, return_indices=True)
        field = field[rows, columns]
    return field


# --- for studies alone: `run.reward: star.shapes.reward:NAME` ---------------------------------------------------------


@VerifierReward
def noise(verified: Verified) -> Scores:
    """A pseudo-random number in 0..1 that depends on the image's pixels alone, with the true masks and the true
    `strict`.

    The score says nothing about the image: training with it shows the harm that a step's noise does.
    """
    digits = (verified.images.double().flatten(1).mean(1) * 1e6).frac()
    return dataclasses.replace(shapes_reward.score(verified), reward=digits.to(torch.float32).cpu())


@VerifierReward
def every_object(verified: Verified) -> Scores:
    """The world's reward with masks of every object in the image, also of those that were not requested."""
    masks = np.zeros((len(verified.verdicts), *verified.images.shape[2:]), np.float32)
    for mask, verdict in zip(masks, verified.verdicts, strict=True):
        for detection in verdict.detections:
            mask[detection.mask] = 1
    return dataclasses.replace(shapes_reward.score(verified), masks=torch.from_numpy(masks))
