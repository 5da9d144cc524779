"""Objectives of the forward process, which are sums over latent locations: a weight for each is all they need."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import star_kernels
from star.objective.weighting import with_channel_axis
from star_kernels.checks import LEAST_POSITIVE, check_latents, check_tensor, checked_number


def _check_same_shape(**tensors: Tensor) -> None:
    (first, like), *others = tensors.items()
    check_latents(first, like)
    for name, tensor in others:
        check_tensor(name, tensor, tuple(like.shape), like.device)


def _weighted_error(error: Tensor, weights: Tensor | None) -> Tensor:
    """(B,) mean of an elementwise error, weighted by location."""
    return (error if weights is None else error * with_channel_axis(weights, error)).flatten(1).mean(1)


def nft_loss(
    forward_prediction: Tensor,
    old_prediction: Tensor,
    x0: Tensor,
    xt: Tensor,
    t: Tensor,
    reward_prob: Tensor,
    weights: Tensor | None = None,
    *,
    beta: float,
    adv_clip_max: float = 5.0,
    adaptive_weight_min: float | None = 1e-5,
) -> Tensor:
    """`star_kernels.nft_loss` in the words of DiffusionNFT's script, without its KL term.

    Args:
        forward_prediction, old_prediction: velocities of the policy and of the old one (a constant).
        x0, xt: the clean latents and the noised ones; same shape, (B, C, H, W), (B, C, T, H, W) or (B, L, C).
        t: (B,) noise level in 0..1.
        reward_prob: (B,) or one per location, in 0..1: DiffusionNFT's r.
        weights: one per location, mean 1 over each sample. Take them from the old policy's pass at (xt, t).
        beta: strength of the guidance.
        adv_clip_max: the factor that DiffusionNFT multiplies by.
        adaptive_weight_min: smallest normalizer; None leaves the normalizer out.

    Returns:
        (), with a gradient for forward_prediction alone.

    Raises:
        TypeError, ValueError: shapes that do not fit.

    Source: DiffusionNFT (Zheng et al. 2025), scripts/train_nft_sd3.py.
    """
    _check_same_shape(forward_prediction=forward_prediction, old_prediction=old_prediction, x0=x0, xt=xt)
    check_tensor("t", t, (len(x0),), x0.device)
    adaptive = adaptive_weight_min is not None
    least = adaptive_weight_min if adaptive else 1e-5
    adv_clip, adaptive_min = (
        checked_number(name, value, LEAST_POSITIVE, expected="a finite number > 0")
        for name, value in (("adv_clip_max", adv_clip_max), ("adaptive_weight_min", least))
    )
    return star_kernels.nft_loss(
        forward_prediction,
        old_prediction,
        xt,
        x0,
        t,
        reward_prob,
        weights,
        beta=beta,
        adaptive=adaptive,
        adaptive_min=adaptive_min,
        adv_clip=adv_clip,
    ).loss


class DPOLoss(NamedTuple):
    """What `diffusion_dpo_loss` returns.

    Attributes:
        loss: (), with a gradient for model_pred.
        implicit_acc: () share of pairs that the policy already orders right.
    """

    loss: Tensor
    implicit_acc: Tensor


def diffusion_dpo_loss(
    model_pred: Tensor, model_pred_ref: Tensor, target: Tensor, weights: Tensor | None = None, *, beta: float
) -> DPOLoss:
    """Diffusion-DPO's loss, whose error differences are weighted by location.

    -log sigmoid(-beta / 2 ((E_w - E_w_ref) - (E_l - E_l_ref))), E the mean of w (prediction - target)^2, the same
    weights for the policy and the reference.

    Args:
        model_pred, model_pred_ref, target: (2 B, C, H, W), (2 B, C, T, H, W) or (2 B, L, C): the B chosen images first,
            then the B rejected ones.
        target: noise - x0 for flow matching.
        weights: one per location of all 2 B images, mean 1 over each.
        beta: strength.

    Raises TypeError, ValueError: shapes that do not fit.
    Source: Diffusion-DPO (Wallace et al. 2023), as in Flow-GRPO's scripts/train_sd3_dpo.py.
    """
    _check_same_shape(target=target, model_pred=model_pred, model_pred_ref=model_pred_ref)
    if len(target) % 2:
        raise ValueError(f"target: got {len(target)} rows, expected the chosen images and as many rejected ones")
    dtype = torch.promote_types(model_pred.dtype, torch.float32)
    target = target.to(dtype)
    policy = _weighted_error((model_pred.to(dtype) - target) ** 2, weights)
    reference = _weighted_error((model_pred_ref.detach().to(dtype) - target) ** 2, weights)
    chosen, rejected = (policy - reference).chunk(2)
    inside = -0.5 * beta * (chosen - rejected)
    return DPOLoss(-F.logsigmoid(inside).mean(), (inside.detach() > 0).to(dtype).mean())
