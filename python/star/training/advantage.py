"""Group-relative advantages: how much better than its siblings, pictures of the same prompt, a picture is.

A reward of NaN is one that failed: it is left out of its group's mean and deviation, and its own advantage is 0.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from star.config import ConfigError, Loss
from star.rewards import Scores


def group_advantages(rewards: Tensor, groups: Tensor, *, global_std: bool = False, eps: float = 1e-4) -> Tensor:
    """(reward - mean of its group) / (standard deviation + eps), as in GRPO (Shao et al. 2024).

    Args:
        rewards: (B,) floating; with several processes, gathered over all of them before the call.
        groups: (B,) int64, equal for pictures of one prompt. Ids, not hashes: they must mean the same on every rank.
        global_std: divide by the standard deviation of all rewards, as Flow-GRPO does by default, not of the group.
        eps: added to the standard deviation.

    Returns:
        (B,) in the type of rewards; exactly 0 in a group whose rewards are all equal, and where rewards are NaN.

    Raises:
        ValueError: shapes that differ. TypeError: groups that are not int64.
    """
    if rewards.ndim != 1 or groups.shape != rewards.shape:
        raise ValueError(
            f"groups: got shape {tuple(groups.shape)} for rewards {tuple(rewards.shape)}, expected (B,) both"
        )
    return _advantages(rewards[:, None], groups, global_std, eps)[:, 0]


def location_advantages(reward_maps: Tensor, groups: Tensor, *, global_std: bool = False, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages of places instead of pictures, for a reward that says what each place earned.

    (reward of the place - mean of the group at this place) / (standard deviation over the group and its places + eps).
    The baseline is the place's own, so that a place is compared with the same place of its siblings; the deviation is
    the picture's, so that places at which the group hardly differs are not blown up to the size of those where it does.
    Maps that are constant over each picture give `group_advantages` everywhere.

    Args:
        reward_maps: (B, H, W) floating.
        groups, global_std, eps: as in `group_advantages`; global_std: over all pictures and their places.

    Returns:
        (B, H, W) in the type of reward_maps; 0 over pictures whose map is not finite somewhere.

    Raises:
        ValueError: shapes that differ. TypeError: groups that are not int64.
    """
    if reward_maps.ndim != 3 or groups.shape != reward_maps.shape[:1]:
        raise ValueError(
            f"groups: got shape {tuple(groups.shape)} for reward_maps {tuple(reward_maps.shape)}, "
            "expected (B,) and (B, H, W)"
        )
    return _advantages(reward_maps.flatten(1), groups, global_std, eps).view_as(reward_maps)


def weighted_advantages(
    rewards: Mapping[str, Tensor], weights: Mapping[str, float], groups: Tensor, *, global_std: bool = False,
    eps: float = 1e-4,
) -> Tensor:  # fmt: skip
    """Rewards that are normalized before they are weighed: sum of weight * group_advantages(reward) / sum of |weight|.

    In a weighted sum of raw rewards the one with the widest spread decides; here each has the say that its weight
    gives it, whatever its scale. rewards: (B,) by name. A picture for which one reward failed is judged by the others.
    """
    parts = [
        weights[name] * group_advantages(value, groups, global_std=global_std, eps=eps)
        for name, value in rewards.items()
    ]
    return sum(parts) / sum(abs(weights[name]) for name in rewards)


def _advantages(rewards: Tensor, groups: Tensor, global_std: bool, eps: float) -> Tensor:
    """(B, P) rewards of P places -> (B, P)."""
    if groups.dtype != torch.int64:
        raise TypeError(f"groups: got {groups.dtype}, expected int64")
    ids, member = groups.unique(return_inverse=True)
    valid = rewards.isfinite().all(1, keepdim=True)
    values = torch.where(valid, rewards.double(), 0.0)
    ones = valid.double()  # (B, 1)
    count = ones.new_zeros(len(ids), 1).index_add_(0, member, ones).clamp_min(1)

    def group_mean(x: Tensor) -> Tensor:  # (B, P), each entry its group's mean
        return (x.new_zeros(len(count), x.shape[1]).index_add_(0, member, x) / count)[member]

    centered = (values - group_mean(values)) * ones
    equal = group_mean(values.abs()).mean(1) * 1e-12 >= group_mean(centered.abs()).mean(1)
    if global_std:
        total = ones.sum().clamp_min(1)
        spread = (values - values.mean(1, keepdim=True).sum() / total) * ones
        std = ((spread**2).mean(1).sum() / total).sqrt()
    else:
        std = group_mean(centered**2).mean(1, keepdim=True).sqrt()
    return torch.where(equal[:, None], 0.0, centered / (std + eps)).to(rewards.dtype)


def compute_advantages(
    scores: Scores, groups: Tensor, loss: Loss, weights: Mapping[str, float], size: tuple[int, int]
) -> Tensor:
    """What the loss asks for: (B,), or (B, height, width) of the latents with loss.advantage "location".

    weights: of the rewards in `scores.terms`. size: latent (height, width). Raises ConfigError if there is no map.
    """
    options = {"global_std": loss.global_std, "eps": loss.advantage_eps}
    if scores.reward.isnan().all():  # every reward of this iteration failed: nothing is better than anything
        return group_advantages(scores.reward, groups)
    if loss.advantage == "location":
        if scores.reward_map is None:
            raise ConfigError(f"loss.advantage: 'location' needs a reward that localizes, not {', '.join(weights)}")
        maps = F.adaptive_avg_pool2d(scores.reward_map[:, None], size)[:, 0]
        return location_advantages(maps, groups, **options)
    if loss.normalize_rewards:
        return weighted_advantages(scores.terms, weights, groups, **options)
    return group_advantages(scores.reward, groups, **options)
