"""Fused operators for spatiotemporal reward allocation. Needs torch only."""

from star_kernels.api import (
    NFTLoss,
    NFTStatistics,
    PolicyLoss,
    Statistics,
    allocate,
    attention_maps,
    gaussian_step,
    implementations,
    nft_loss,
    policy_loss,
)
from star_kernels.transition import Transition, log_prob

__all__ = [
    "NFTLoss",
    "NFTStatistics",
    "PolicyLoss",
    "Statistics",
    "Transition",
    "allocate",
    "attention_maps",
    "gaussian_step",
    "implementations",
    "log_prob",
    "nft_loss",
    "policy_loss",
]
