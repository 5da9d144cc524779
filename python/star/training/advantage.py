"""Group-relative advantages: how much better than its siblings, images of the same prompt, an image is.

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
        groups: (B,) int64, equal for images of one prompt. Ids, not hashes: they must mean the same on every rank.
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
    """Group-relative advantages of locations instead of images, for a reward that says what each location earned.

    (reward of the location - mean of the group at this location) / (standard deviation over the group and its locations
    + eps). The baseline is the location's own, so that a location is compared with the same one of its siblings; the
    deviation is the image's, so that locations at which the group hardly differs are not blown up to the size of those
    where it does. Maps that are constant over each image give `group_advantages` everywhere.

    Args:
        reward_maps: (B, H, W) floating.
        groups, global_std, eps: as in `group_advantages`; global_std: over all images and their locations.

    Returns:
        (B, H, W) in the type of reward_maps; 0 over images whose map is not finite somewhere.

    Raises:
        ValueError: shapes that differ. TypeError: groups that are not int64.
    """
    if reward_maps.ndim != 3 or groups.shape != reward_maps.shape[:1]:
        raise ValueError(
            f"groups: got shape {tuple(groups.shape)} for reward_maps {tuple(reward_maps.shape)}, "
            "expected (B,) and (B, H, W)"
        )
    return _advantages(reward_maps.flatten(1), groups, global_std, eps).view_as(reward_maps)


def concept_advantages(credits: Tensor, groups: Tensor, *, global_std: bool = False, eps: float = 1e-4) -> Tensor:
    """Group-relative advantages of the concepts of a prompt, for a reward that says what each of them earned.

    (credit of the concept - mean of the group for this concept) / (standard deviation over the group and its concepts +
    eps): as in `location_advantages`, with concepts for locations. A credit of NaN is left out of both.

    Args:
        credits: (B, G) floating; a column is of one concept in a group.
        groups, global_std, eps: as in `group_advantages`; global_std: over all credits.

    Returns:
        (B, G) in the type of credits, NaN where the credit is; 0 in a group whose credits are all equal.

    Raises:
        ValueError: shapes that differ. TypeError: groups that are not int64.
    """
    if credits.ndim != 2 or groups.shape != credits.shape[:1]:
        raise ValueError(
            f"groups: got shape {tuple(groups.shape)} for credits {tuple(credits.shape)}, expected (B,) and (B, G)"
        )
    ids, member = _members(groups)
    valid = credits.isfinite()
    ones, values = valid.double(), torch.where(valid, credits.double(), 0.0)

    def group_sum(x: Tensor) -> Tensor:  # (B, P), each entry its group's sum
        return x.new_zeros(len(ids), x.shape[1]).index_add_(0, member, x)[member]

    centered = (values - group_sum(values) / group_sum(ones).clamp_min(1)) * ones
    equal = group_sum(values.abs()).sum(1) * 1e-12 >= group_sum(centered.abs()).sum(1)
    if global_std:
        spread = (values - values.sum() / ones.sum().clamp_min(1)) * ones
        std = (spread.square().sum() / ones.sum().clamp_min(1)).sqrt()
    else:
        number = group_sum(ones).sum(1, keepdim=True).clamp_min(1)
        std = (group_sum(centered.square()).sum(1, keepdim=True) / number).sqrt()
    advantages = torch.where(equal[:, None], 0.0, centered / (std + eps))
    return torch.where(valid, advantages, torch.nan).to(credits.dtype)


def weighted_advantages(
    rewards: Mapping[str, Tensor],
    weights: Mapping[str, float],
    groups: Tensor,
    *,
    global_std: bool = False,
    eps: float = 1e-4,
) -> Tensor:
    """Rewards that are normalized before they are weighed: sum of weight * group_advantages(reward) / sum of |weight|.

    In a weighted sum of raw rewards the one with the widest spread decides; here each counts by its weight,
    whatever its scale. rewards: (B,) by name. An image for which one reward failed is judged by the others.
    """
    parts = [
        weights[name] * group_advantages(value, groups, global_std=global_std, eps=eps)
        for name, value in rewards.items()
    ]
    return torch.stack(parts).sum(0) / sum(abs(weights[name]) for name in rewards)


def _advantages(rewards: Tensor, groups: Tensor, global_std: bool, eps: float) -> Tensor:
    """(B, P) rewards of P locations -> (B, P)."""
    ids, member = _members(groups)
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


def _members(groups: Tensor) -> tuple[Tensor, Tensor]:
    """The distinct groups, and the index of each sample's among them."""
    if groups.dtype != torch.int64:
        raise TypeError(f"groups: got {groups.dtype}, expected int64")
    return groups.unique(return_inverse=True)


def compute_advantages(
    scores: Scores, groups: Tensor, loss: Loss, weights: Mapping[str, float], size: tuple[int, int]
) -> Tensor:
    """Advantages for the loss: (B,), or (B, height, width) of the latents with loss.advantage "location". With
    "concept" they are those of the images; `compute_concept_advantages` has the concepts'.

    weights: of the rewards in `scores.terms`. size: latent (height, width). Raises ConfigError if there is no map.
    """
    std, eps = loss.global_std, loss.advantage_eps
    if scores.reward.isnan().all():  # every reward of this iteration failed: nothing is better than anything
        return group_advantages(scores.reward, groups)
    if loss.advantage == "location":
        if scores.reward_map is None:
            raise ConfigError(f"loss.advantage: 'location' needs a reward that localizes, not {', '.join(weights)}")
        maps = F.adaptive_avg_pool2d(scores.location_rewards()[:, None], size)[:, 0]
        local = location_advantages(maps, groups, global_std=std, eps=eps)
        if loss.location_share == 1:
            return local
        image = group_advantages(scores.reward, groups, global_std=std, eps=eps)
        return torch.lerp(image[:, None, None].to(local), local, loss.location_share)
    if loss.normalize_rewards:
        return weighted_advantages(scores.terms, weights, groups, global_std=std, eps=eps)
    return group_advantages(scores.reward, groups, global_std=std, eps=eps)


def compute_concept_advantages(
    scores: Scores, groups: Tensor, loss: Loss, weights: Mapping[str, float]
) -> Tensor | None:
    """(B, G) times loss.concept_strength with loss.advantage "concept", else None.

    scores: of all the iteration's images, their credits as `matched_credits` orders them. weights: of the rewards.
    Raises ConfigError if there are no credits.
    """
    if loss.advantage != "concept" or scores.reward.isnan().all():
        return None
    if scores.credits is None:
        raise ConfigError(
            f"loss.advantage: 'concept' needs a reward with credits of concepts, not {', '.join(weights)}"
        )
    advantages = concept_advantages(scores.credits, groups, global_std=loss.global_std, eps=loss.advantage_eps)
    return loss.concept_strength * advantages
