"""Weights of the latent locations, and losses that take them, for star's loop and for other trainers.

Needs torch and star_kernels only. Reading order: allocation (maps to weights), weighting (weights to gradients),
routing (credit per concept), grpo (what Flow-GRPO and its relatives hold), forward_process (DiffusionNFT, AWM,
Diffusion-DPO).
"""

from star.objective.allocation import (
    STRATEGIES,
    TEMPORAL,
    Allocation,
    allocation_weights,
    blend_weights,
    captured_steps,
    invert_ranks,
    neighbor_correlation,
    permute_across_groups,
    random_like,
    temporal_weights,
    top_locations,
    uniform_rows,
)
from star.objective.forward_process import DPOLoss, awm_loss, diffusion_dpo_loss, nft_loss
from star.objective.grpo import (
    GRPOLoss,
    fused_grpo_loss,
    grpo_loss,
    reinforce_loss,
    scheduler_transition,
    sde_step_with_logprob,
)
from star.objective.routing import other_concepts, route_advantages
from star.objective.weighting import weighted_gradient

__all__ = [
    "STRATEGIES",
    "TEMPORAL",
    "Allocation",
    "DPOLoss",
    "GRPOLoss",
    "allocation_weights",
    "awm_loss",
    "blend_weights",
    "captured_steps",
    "diffusion_dpo_loss",
    "fused_grpo_loss",
    "grpo_loss",
    "invert_ranks",
    "neighbor_correlation",
    "nft_loss",
    "other_concepts",
    "permute_across_groups",
    "random_like",
    "reinforce_loss",
    "route_advantages",
    "scheduler_transition",
    "sde_step_with_logprob",
    "temporal_weights",
    "top_locations",
    "uniform_rows",
    "weighted_gradient",
]
