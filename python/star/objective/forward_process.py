"""Objectives of the forward process, which are sums over latent locations: a weight for each is all they need."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import star_kernels
from star.objective.weighting import WeightedGradient, with_channel_axis
from star_kernels import PolicyLoss, Transition
from star_kernels.api import Implementation
from star_kernels.checks import LEAST_POSITIVE, check_latents, check_tensor, checked_number

LEAST_ERROR = 1e-10  # added to a mean squared error before its power: AWM's number


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
    """`star_kernels.nft_loss` with the argument names of DiffusionNFT's script, without its KL term.

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


def awm_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    sigma: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    sigma_power: float = 1.0,
    error_power: float = 0.25,
    ratio: Literal["token", "location", "sample"] = "token",
    clip_range: float | tuple[float, float] = 1.0,
    adv_clip_max: float = 5.0,
    impl: Implementation = "auto",
) -> PolicyLoss:
    """Advantage Weighted Matching's clipped loss, without its KL terms: the matching loss makes the density.

    log p = -sigma^sigma_power m^error_power / error_power, m the mean of (velocity - target)^2 over the sample, to
    which powers other than 1 add 1e-10. With r = p / p_old, the loss is the mean of w max(-A r, -A clip(r)). Each
    location has the share in a sample's log-ratio that it has in m - m_old, so that weights, advantages of locations
    and the three ratios are those of `star_kernels.policy_loss`, which computes the loss. A power other than 1 has one
    slope for all of a sample. Log-ratios are made of the difference of the velocities, not of two errors.

    Published weightings by sigma_power and error_power: "ghuber" 1, 0.25; "t" 1, 1; "t**2" 2, 1; "Uniform" 0, 1.

    Args:
        velocity, old_velocity: at (x_t, sigma), of the policy and of the one that sampled, a constant; (B, C, H, W),
            (B, C, T, H, W) or packed (B, L, C). If the policy itself sampled, give velocity.detach(): r is 1.
        target: the velocity that flow matching learns, noise - x0; same shape.
        sigma: (B,) noise level in 0..1.
        advantages: (B,) or one per location, clamped to +-adv_clip_max and divided by it.
        weights: one per location, mean 1 over each sample. None: 1.
        sigma_power: at least 0.
        error_power: above 0; below 1, samples with a large error count less.
        ratio, clip_range, impl: of `star_kernels.policy_loss`.

    Returns:
        PolicyLoss(loss, statistics); the gradient goes to velocity alone.

    Raises:
        TypeError, ValueError: as `star_kernels.policy_loss`; a sigma outside of 0..1 is seen on the CPU alone.
        RuntimeError: `impl` cannot run here.

    Source: AWM (Xue et al. 2025, arXiv 2509.25050), scripts/train_sd3_awm.py.
    """
    _check_same_shape(velocity=velocity, old_velocity=old_velocity, target=target)
    check_tensor("sigma", sigma, (len(velocity),), velocity.device)
    if sigma.device.type == "cpu" and bool(((sigma < 0) | (sigma > 1)).any()):
        raise ValueError("sigma: has values outside [0, 1]; it is the noise level, not the timestep")
    check_tensor("advantages", advantages, None, velocity.device)
    sigma_power = checked_number("sigma_power", sigma_power, 0.0, expected="a number >= 0")
    error_power = checked_number("error_power", error_power, LEAST_POSITIVE, expected="a number > 0")
    # Advantages are divided by it: infinity would leave nothing of them.
    adv_clip_max = checked_number("adv_clip_max", adv_clip_max, LEAST_POSITIVE, expected="a finite number > 0")
    time_weight = sigma.double() ** sigma_power
    if error_power == 1:
        precision = time_weight
    else:
        secant, correction = _power_slopes(velocity, old_velocity, target, error_power)
        precision = time_weight * secant
        velocity = WeightedGradient.apply(velocity, correction.view(-1, *(1,) * (velocity.ndim - 1)))
    precision = precision.to(torch.promote_types(velocity.dtype, torch.float32))
    one, zero = torch.ones_like(precision), torch.zeros_like(precision)
    return star_kernels.policy_loss(
        velocity,
        target,
        target,
        Transition(zero, one, one, precision, zero, zero),  # a step to the target whose mean is the velocity
        advantages / adv_clip_max,
        weights,
        old_mean=old_velocity,
        ratio=ratio,
        clip_range=clip_range,
        adv_clip=1.0,
        impl=impl,
    )


@torch.no_grad()
def _power_slopes(velocity: Tensor, old_velocity: Tensor, target: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """(B,) float64 each, of the function m^power / power of the mean squared error m: its secant between the old
    policy's error and the policy's, and by what its slope at the latter exceeds that."""
    dtype = torch.promote_types(velocity.dtype, torch.float32)
    v, old, aim = (x.to(dtype) for x in (velocity, old_velocity, target))
    old_error = (old - aim).square().flatten(1).mean(1, dtype=torch.float64) + LEAST_ERROR
    change = ((v - old) * ((v - aim) + (old - aim))).flatten(1).mean(1, dtype=torch.float64) / old_error
    grown = torch.log1p(change)
    mean_slope = torch.where(change == 0, 1.0, torch.expm1(power * grown) / (power * change))
    return old_error ** (power - 1) * mean_slope, torch.exp((power - 1) * grown) / mean_slope


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
