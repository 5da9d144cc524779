"""Rewards: pictures and their prompts in, scores out. One protocol; `load` finds a reward by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

NAMES = ("shapes",)


@dataclass(frozen=True)
class Scores:
    """What a reward says of B pictures.

    reward: (B,) float32. details: further (B,) values to be logged by name. masks: (B, H, W) in 0..1, in pixels, where
    the picture shows what was asked for, if the reward knows.
    """

    reward: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)
    masks: Tensor | None = None


Reward = Callable[[Tensor, Sequence[str]], Scores]
"""images (B, 3, H, W) float32 in 0..1 and B prompts -> Scores."""


def load(name: str) -> Reward:
    """A reward by name, or any callable as "module:function". Raises ValueError for an unknown one."""
    if name == "shapes":
        from star.rewards.shapes import shapes_reward

        return shapes_reward
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"reward: unknown {name!r}, expected one of {list(NAMES)} or 'module:function'")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: {name!r} could not be loaded ({error})") from error


def check(scores: Scores, prompts: Sequence[str]) -> Scores:
    """Raise ValueError, naming the prompt, if a reward is missing or not a finite number."""
    if scores.reward.shape != (len(prompts),):
        raise ValueError(f"reward: got shape {tuple(scores.reward.shape)}, expected ({len(prompts)},)")
    bad = (~torch.isfinite(scores.reward)).nonzero()
    if len(bad):
        raise ValueError(f"reward: got {scores.reward[bad[0, 0]].item()} for the prompt {prompts[bad[0, 0]]!r}")
    return scores
