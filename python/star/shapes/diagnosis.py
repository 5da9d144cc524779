"""What a study's diagnosis asks the embedded world: what scores are made of, and where attention should be."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from star.config import Config
from star.rewards import Scores, Weighted
from star.shapes import scenes
from star.shapes.measure import auc, object_tokens
from star.shapes.reward import Verified, VerifierReward, shapes_reward, verify_images
from star.shapes.scenes import Scene, parse_scene
from star.shapes.verifier import Verdict
from star.training.scoring import HeldOut, sample_images
from star.training.task import configured_task

COMPONENTS = ("object 1", "object 2", "relation", "background", "unasked objects")


# --- the images of training ------------------------------------------------------------------------------------------


class Diagnosis:
    """Collects what the images of a policy's rollouts say, batch by batch; every image is verified once."""

    def __init__(self) -> None:
        self.components: dict[str, list[dict[str, float]]] = defaultdict(list)  # by category
        self.groups: dict[str, list[int]] = defaultdict(list)
        self.localized: list[list[tuple[float, float]]] = []  # by step

    def add(
        self, images: Tensor, prompts: Sequence[str], groups: Sequence[int], maps: Tensor, grid: tuple[int, int]
    ) -> Verified:
        """Take in a batch. images: (B, 3, H, W) in 0..1. groups: one number for each image, of no other batch.
        maps: (T, B, G, N) of every step."""
        verified = verify_images(images, prompts)
        for verdict, scene, group in zip(verified.verdicts, verified.scenes, groups, strict=True):
            for category in (scene.category, "all"):
                self.components[category].append(score_components(verdict, scene))
                self.groups[category].append(group)
        self.localized = self.localized or [[] for _ in maps]
        for values, more in zip(self.localized, localization(maps, verified.verdicts, grid), strict=True):
            values += more
        return verified

    def result(self) -> dict:
        """images: how many. variance: by category, see `variance_shares`. localization: by step the means of
        `localization`, empty where no object was found."""
        names = ("auc", "mass_over_area")
        return {
            "images": len(self.components["all"]),
            "variance": {
                category: variance_shares(components, np.array(self.groups[category]))
                for category, components in self.components.items()
            },
            "localization": [
                dict(zip(names, np.mean(values, 0).tolist(), strict=True)) if values else {}
                for values in self.localized
            ],
        }


def world_rewards(verified: Verified) -> Tensor:
    """(B,) the world's own reward, whatever a study trains on."""
    return shapes_reward.score(verified).reward


def score_verified(reward: Weighted, verified: Verified) -> Scores:
    """The scores that a reward gives to images that are verified already."""
    known = {
        name: (lambda *_, score=one.score: score(verified)) if isinstance(one, VerifierReward) else one
        for name, one in reward.rewards.items()
    }
    return Weighted(known, reward.weights)(verified.images, [scene.prompt for scene in verified.scenes])


def score_components(verdict: Verdict, scene: Scene) -> dict[str, float]:
    """The parts that add up to a soft score, by names of COMPONENTS: the share of each requirement, and what objects
    that were not requested take off."""
    names = [f"object {i + 1}" for i in range(len(scene.things))]
    names += ["relation"] * bool(scene.relation) + ["background"] * bool(scene.background)
    parts = {name: part / len(names) for name, part in zip(names, verdict.parts, strict=True)}
    return parts | {"unasked objects": verdict.soft - sum(parts.values())}


def variance_shares(components: list[dict[str, float]], groups: np.ndarray) -> dict[str, float]:
    """The covariance of each component with the reward within the groups, over the reward's variance: they sum to 1.
    Empty if no rewards of a group differ.

    components: of each image, see `score_components`. groups: one for each image.
    """
    names = list(dict.fromkeys(name for parts in components for name in parts))
    table = np.array([[parts.get(name, 0.0) for name in names] for parts in components])
    for group in np.unique(groups):
        table[groups == group] -= table[groups == group].mean(0)
    reward = table.sum(1)
    total = (reward**2).sum()
    if not total:
        return {}
    return {name: float(table[:, names.index(name)] @ reward / total) for name in COMPONENTS if name in names}


def localization(maps: Tensor, verdicts: Sequence[Verdict], grid: tuple[int, int]) -> list[list[tuple[float, float]]]:
    """For each step the (AUC, mass over area) of every concept's map against its object in the finished image.

    maps: (T, B, G, N). An object that was not found, or that fills the image, is left out.
    """
    by_step: list[list[tuple[float, float]]] = [[] for _ in maps]
    relative = (maps / maps.mean(-1, keepdim=True).clamp_min(1e-30)).cpu().numpy()
    for b, verdict in enumerate(verdicts):
        inside = object_tokens(torch.from_numpy(verdict.masks).float()[None], grid)[0].flatten(1).numpy()
        for g, mask in enumerate(inside):
            if mask.any() and not mask.all():
                for step, values in enumerate(relative[:, b, g]):
                    by_step[step].append((auc(values, mask), float(values[mask].mean())))
    return by_step


# --- the held-out images and prompts ---------------------------------------------------------------------------------


def score_composition(pipeline: StableDiffusion3Pipeline, config: Config) -> dict[str, float]:
    """What a pipeline's held-out scores are made of: the requirements met, what unrequested objects take off, and the
    share of images with more and with fewer objects than requested."""
    held_out = HeldOut.of_run(configured_task(config), config)
    images = torch.cat([batch for _, batch in sample_images(pipeline, held_out.prompts, held_out.options)])
    verified = verify_images(images, [prompt.text for prompt in held_out.prompts])
    judged = list(zip(verified.verdicts, verified.scenes, strict=True))
    unasked = float(np.mean([score_components(verdict, scene)["unasked objects"] for verdict, scene in judged]))
    surplus = np.array([len(v.detections) - sum(things.count for things in scene.things) for v, scene in judged])
    return {
        "requirements": float(np.mean([verdict.soft for verdict in verified.verdicts])) - unasked,
        "unasked": unasked,
        "more": float(np.mean(surplus > 0)),
        "fewer": float(np.mean(surplus < 0)),
    }


def prompts_by_category(count: int) -> dict[str, list[str]]:
    """`count` held-out prompts of each category; those of a background alone are a category of their own."""
    texts = {category: scenes.prompts(count, 0, "heldout", (category,)) for category in scenes.CATEGORIES}
    texts["background"] = [text for text in texts["background"] if parse_scene(text).things]
    texts["background alone"] = [f"a {name} background" for name in scenes.BACKGROUNDS] * (count // 3)
    return texts
