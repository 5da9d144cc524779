"""Group-relative advantages: how much better than its siblings, pictures of the same prompt, a picture is."""

from __future__ import annotations

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, groups: Tensor, *, global_std: bool = False, eps: float = 1e-4) -> Tensor:
    """(reward - mean of its group) / (standard deviation + eps), as in GRPO (Shao et al. 2024).

    Args:
        rewards: (B,) floating; with several processes, gathered over all of them before the call.
        groups: (B,) int64, equal for pictures of one prompt. Ids, not hashes: they must mean the same on every rank.
        global_std: divide by the standard deviation of all rewards, as Flow-GRPO does by default, not of the group.
        eps: added to the standard deviation.

    Returns:
        (B,) in the type of rewards; exactly 0 in a group whose rewards are all equal.

    Raises:
        ValueError: shapes that differ. TypeError: groups that are not int64.
    """
    if rewards.ndim != 1 or groups.shape != rewards.shape:
        raise ValueError(
            f"groups: got shape {tuple(groups.shape)} for rewards {tuple(rewards.shape)}, expected (B,) both"
        )
    if groups.dtype != torch.int64:
        raise TypeError(f"groups: got {groups.dtype}, expected int64")
    _, member, count = groups.unique(return_inverse=True, return_counts=True)
    values = rewards.double()

    def group_mean(x: Tensor) -> Tensor:  # (B,), each entry its group's mean
        return (torch.zeros(len(count), dtype=x.dtype, device=x.device).index_add_(0, member, x) / count)[member]

    centred = values - group_mean(values)
    equal = group_mean(values.abs()) * 1e-12 >= group_mean(centred.abs())
    std = values.std(correction=0) if global_std else group_mean(centred**2).sqrt()
    return torch.where(equal, 0.0, centred / (std + eps)).to(rewards.dtype)
