"""The objective that a configuration names."""

from __future__ import annotations

from torch import Tensor

from star.config import Config
from star.training.awm import AWM
from star.training.distributed import Share
from star.training.forward_process import ForwardProcess
from star.training.grpo import GRPO
from star.training.nft import NFT
from star.training.policy import Policy

METHODS = {"nft": NFT, "awm": AWM}


def make_objective(config: Config, policy: Policy, share: Share, groups: Tensor, patch: int) -> GRPO | ForwardProcess:
    """groups: (B,) int64 of all the iteration's images. patch: latent locations per image token and side."""
    if config.loss.is_forward_process:
        return ForwardProcess(config, policy, share, patch, METHODS[config.loss.objective])
    return GRPO(config, policy, share, groups, patch)
