"""Fused operators for spatiotemporal reward allocation. Needs torch only."""

from star_kernels.api import (
    PolicyLoss,
    Statistics,
    allocate,
    attention_maps,
    gaussian_step,
    implementations,
    policy_loss,
)
from star_kernels.transition import Transition, log_prob

__all__ = [
    "PolicyLoss",
    "Statistics",
    "Transition",
    "allocate",
    "attention_maps",
    "gaussian_step",
    "implementations",
    "log_prob",
    "policy_loss",
]
