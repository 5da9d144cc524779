"""What Flow-GRPO and its relatives hold (log_prob, stored log_probs, advantages, velocities), with weights.

Three ways in, from the least change to the fastest: `sde_step_with_logprob` in the place of Flow-GRPO's function and
nothing else; `grpo_loss` from log-probs; `fused_grpo_loss` from the velocity, one kernel forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from star.objective.weighting import weighted_gradient
from star.transition import cps, flow_sde
from star_kernels import PolicyLoss, Transition, policy_loss
from star_kernels.api import Implementation
from star_kernels.checks import (
    check_choice,
    check_latents,
    check_tensor,
    checked_adv_clip,
    checked_clip_range,
    checked_number,
)
from star_kernels.reference import LOG_RATIO_LIMIT
from star_kernels.transition import channel_dim

SDE_TYPES = ("sde", "cps")


class Scheduler(Protocol):
    """What is used of a diffusers FlowMatchEulerDiscreteScheduler after `set_timesteps`."""

    sigmas: Tensor

    def index_for_timestep(self, timestep: Tensor) -> int: ...


def _sigmas(scheduler: Scheduler, timestep: float | Tensor) -> tuple[Tensor, Tensor]:
    """(B,) sigma of each timestep and of the one after it."""
    given = timestep if isinstance(timestep, Tensor) else torch.as_tensor(timestep, dtype=torch.float32)
    timesteps = given.reshape(-1)
    try:
        index = [scheduler.index_for_timestep(t) for t in timesteps]
    except IndexError:
        raise ValueError(
            f"timestep: got {timesteps.tolist()}, expected values of scheduler.timesteps (cast to another type?)"
        ) from None
    return scheduler.sigmas[index], scheduler.sigmas[[i + 1 for i in index]]


def _noise_level(value: float) -> float:
    return checked_number("noise_level", value, 0.0, expected="a number >= 0")


def _draw_noise(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """The numbers of diffusers' randn_tensor: drawn where the generator lives, by one for each sample if many."""
    if isinstance(generator, Sequence) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, Sequence):
        if len(generator) != len(like):
            raise ValueError(f"generator: got {len(generator)}, expected one for each of {len(like)} samples")
        return torch.cat([_draw_noise(row[None], g) for row, g in zip(like, generator, strict=True)])
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=like.dtype).to(like.device)


def sde_step_with_logprob(
    scheduler: Scheduler,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    sde_type: Literal["sde", "cps"] = "sde",
    return_sqrt_dt: bool = False,
    *,
    weights: Tensor | None = None,
    per_location: bool = False,
) -> tuple[Tensor, ...]:
    """Flow-GRPO's function of this name: same arguments, same returns, same bits, and weights.

    With weights, log_prob keeps its bits and its gradient is weighted: everything that the trainer computes from it
    (ratio, clipping, statistics) stays as it is, and so do the stored log_probs. prev_sample_mean is never weighted,
    and neither is a KL term computed from it.

    Args:
        scheduler: a flow-matching scheduler after `set_timesteps`.
        model_output, sample, prev_sample: (B, C, H, W), (B, C, T, H, W) or packed (B, L, C). Computed in float32, or in
            float64 if the model output is. Without prev_sample one is drawn.
        timestep: (B,) or (1,) or a number, out of scheduler.timesteps.
        noise_level: of the sampler. 0 makes a deterministic step, whose log_prob is meaningless.
        generator: one, or one for each sample.
        sde_type: "sde" (Flow-GRPO) or "cps" (Flow-CPS, whose log_prob is -(x' - mu)^2).
        return_sqrt_dt: return sqrt(-dt) too, for GRPO-Guard.
        weights: (B, H, W), (B, T, H, W) or (B, L): mean 1 over each sample.
        per_location: log_prob of each location, averaged over the channels only; for `grpo_loss`.

    Returns:
        prev_sample, log_prob (B,) or like weights, prev_sample_mean, std_dev_t (B, 1, ...) and, with return_sqrt_dt,
        sqrt_dt (B, 1, ...). std_dev_t is the standard deviation per sqrt of time ("cps": of the step).

    Raises:
        TypeError, ValueError: a wrong shape or option, or a timestep that the scheduler does not have.

    Source: Flow-GRPO (Liu et al. 2025), flow_grpo/diffusers_patch/sd3_sde_with_logprob.py. The same coefficients in
    float64 are in `star.transition`; here they are float32 in that file's order of operations.
    """
    check_choice("sde_type", sde_type, SDE_TYPES)
    check_latents("model_output", model_output)
    check_tensor("sample", sample, tuple(model_output.shape), model_output.device)
    if prev_sample is not None:
        check_tensor("prev_sample", prev_sample, tuple(model_output.shape), model_output.device)
    noise_level = _noise_level(noise_level)
    if weights is not None and per_location:
        raise ValueError("weights: got them with per_location=True; give them to `grpo_loss` instead")
    dtype = torch.promote_types(model_output.dtype, torch.float32)
    model_output, sample = model_output.to(dtype), sample.to(dtype)
    prev_sample = None if prev_sample is None else prev_sample.to(dtype)
    shape = (-1, *(1,) * (sample.ndim - 1))
    sigma, sigma_next = (s.to(sample.device, dtype).view(shape) for s in _sigmas(scheduler, timestep))
    if len(sigma) not in (1, len(sample)):
        raise ValueError(f"timestep: got {len(sigma)} values, expected 1 or {len(sample)}")
    dt = sigma_next - sigma

    if sde_type == "sde":
        below_one = torch.where(sigma == 1, scheduler.sigmas[1].item(), sigma)
        std_dev_t = torch.sqrt(sigma / (1 - below_one)) * noise_level
        variance = std_dev_t**2
        drift = model_output * (1 + variance * (1 - sigma) / (2 * sigma)) * dt
        prev_sample_mean = sample * (1 + variance / (2 * sigma) * dt) + drift
        step_std = std_dev_t * torch.sqrt(-1 * dt)
    else:
        std_dev_t = sigma_next * math.sin(noise_level * math.pi / 2)
        image, noise = sample - sigma * model_output, sample + model_output * (1 - sigma)
        prev_sample_mean = image * (1 - sigma_next) + noise * torch.sqrt(sigma_next**2 - std_dev_t**2)
        step_std = std_dev_t
    if prev_sample is None:
        prev_sample = prev_sample_mean + step_std * _draw_noise(model_output, generator)

    log_prob = -((prev_sample.detach() - prev_sample_mean) ** 2)  # (B, C, H, W)
    if sde_type == "sde":
        log_prob = (
            log_prob / (2 * step_std**2) - torch.log(step_std) - torch.tensor(2 * math.pi, dtype=dtype).sqrt().log()
        )
    if per_location:
        log_prob = log_prob.mean(channel_dim(log_prob))
    else:
        log_prob = weighted_gradient(log_prob, weights).mean(dim=tuple(range(1, log_prob.ndim)))
    result = (prev_sample, log_prob, prev_sample_mean, std_dev_t)
    return (*result, torch.sqrt(-1 * dt)) if return_sqrt_dt else result


class GRPOLoss(NamedTuple):
    """What `grpo_loss` returns: () tensors. All but the loss are over samples, or over locations for "location".

    Attributes:
        loss: with a gradient for log_prob; the others have none.
        approx_kl: half the mean squared log-ratio.
        clip_fraction: share with a ratio outside the clip range.
        clip_fraction_low: share below it.
        clip_fraction_high: share above it.
    """

    loss: Tensor
    approx_kl: Tensor
    clip_fraction: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor


def _check(log_prob: Tensor, advantages: Tensor, weights: Tensor | None, adv_clip_max: float) -> None:
    """Check log_prob, (B,) or one per location, and that advantages and weights fit it."""
    check_tensor("log_prob", log_prob)
    if log_prob.ndim == 0 or log_prob.numel() == 0:
        raise ValueError(f"log_prob: got shape {tuple(log_prob.shape)}, expected (B,), or one per location")
    check_tensor("advantages", advantages, None, log_prob.device)
    checked_adv_clip("adv_clip_max", adv_clip_max)
    if tuple(advantages.shape) not in ((len(log_prob),), tuple(log_prob.shape)):
        expected = f"({len(log_prob)},) or {tuple(log_prob.shape)}"
        raise ValueError(f"advantages: got shape {tuple(advantages.shape)}, expected {expected}")
    if weights is not None:
        if log_prob.ndim == 1:
            raise ValueError(
                "weights: log_prob has one number per sample, nothing is left to weight; give log_prob per location, "
                "or the weights to sde_step_with_logprob"
            )
        check_tensor("weights", weights, tuple(log_prob.shape), log_prob.device)


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    ratio: Literal["token", "location", "sample"] = "token",
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip_max: float = 5.0,
) -> GRPOLoss:
    """The clipped loss of Flow-GRPO, DanceGRPO, MixGRPO and DDPO from log-probs, with weights.

    From one log_prob per sample it is their loss. From one per location it is `star_kernels.policy_loss` in plain
    PyTorch, see there for the three ratios; its delta form is more exact, this one has what such trainers store. A
    log-ratio is limited to +-30 as it is there, and one that is not finite makes the loss and its gradient NaN.

    Args:
        log_prob: (B,), or one per location: (B, H, W), (B, T, H, W), (B, L), from per_location=True.
        old_log_prob: the policy's that took the step, like log_prob, or (B,) for ratio "token".
        advantages: (B,), or one per location (not for ratio "sample").
        weights: like log_prob, mean 1 over each sample. None: 1.
        ratio: "token", "location" or "sample".
        clip_range: e for [1 - e, 1 + e], or (low, high) for [1 - low, 1 + high].
        adv_clip_max: advantages are clamped to +-adv_clip_max first.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, range or device.
    """
    check_choice("ratio", ratio, ("token", "location", "sample"))
    _check(log_prob, advantages, weights, adv_clip_max)
    if ratio == "sample" and advantages.ndim > 1:
        raise ValueError(f"advantages: ratio='sample' takes one per sample, got shape {tuple(advantages.shape)}")
    check_tensor("old_log_prob", old_log_prob, None, log_prob.device)
    per_sample = (len(log_prob),)
    if tuple(old_log_prob.shape) not in ((log_prob.shape, per_sample) if ratio == "token" else (log_prob.shape,)):
        raise ValueError(
            f"old_log_prob: got shape {tuple(old_log_prob.shape)}, expected {tuple(log_prob.shape)} for ratio={ratio!r}"
        )
    low, high = checked_clip_range(clip_range)

    rows, old = log_prob.reshape(len(log_prob), -1), old_log_prob.reshape(len(log_prob), -1)  # (B, P), or P = 1
    w: Tensor | float = 1.0 if weights is None else weights.detach().reshape(rows.shape)
    if ratio == "token":
        # The sample's ratio at every location, each with the gradient of its own log_prob.
        log_ratio = (rows.mean(1, keepdim=True) - old.mean(1, keepdim=True)).detach() + (rows - rows.detach())
    elif ratio == "sample":
        log_ratio, w = (w * (rows - old)).mean(1, keepdim=True), 1.0
    else:
        log_ratio = rows - old
    # The sum hands on the gradient, which is NaN where the ratio is.
    limited = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)
    log_ratio = torch.where(log_ratio.isfinite(), limited, log_ratio + torch.nan)
    r = torch.exp(log_ratio)
    adv = advantages.reshape(len(log_prob), -1).clamp(-adv_clip_max, adv_clip_max)
    loss = (w * torch.maximum(-adv * r, -adv * torch.clamp(r, 1 - low, 1 + high))).mean()
    with torch.no_grad():
        below, above = (r < 1 - low).to(r.dtype).mean(), (r > 1 + high).to(r.dtype).mean()
        approx_kl = 0.5 * log_ratio.square().mean()
    return GRPOLoss(loss, approx_kl, below + above, below, above)


def reinforce_loss(
    log_prob: Tensor, advantages: Tensor, weights: Tensor | None = None, *, adv_clip_max: float = 5.0
) -> Tensor:
    """The score-function loss of DDPO, mean of -A w log_prob: for one update on the rollout's own policy.

    Args:
        log_prob: (B,) or one per location.
        advantages: (B,) or one per location.
        weights: like a log_prob per location. None: 1.
        adv_clip_max: advantages are clamped to +-adv_clip_max first.

    Returns:
        (), with a gradient for log_prob.

    Raises:
        TypeError, ValueError: shapes that do not fit.

    Source: DDPO (Black et al. 2023), its estimator DDPO-SF.
    """
    _check(log_prob, advantages, weights, adv_clip_max)
    adv = advantages.reshape(len(log_prob), -1).clamp(-adv_clip_max, adv_clip_max)
    rows = log_prob.reshape(len(log_prob), -1)
    return -(adv * (rows if weights is None else rows * weights.detach().reshape(rows.shape))).mean()


def scheduler_transition(
    scheduler: Scheduler, timestep: float | Tensor, noise_level: float = 0.7, sde_type: Literal["sde", "cps"] = "sde"
) -> Transition:
    """The Gaussian step of `sde_step_with_logprob` for `star_kernels`: fields (B,) float32, one for each timestep.

    Raises ValueError for an unknown sde_type, a noise_level below 0 or a timestep that the scheduler does not have.
    """
    check_choice("sde_type", sde_type, SDE_TYPES)
    noise_level = _noise_level(noise_level)
    sigma, sigma_next = (s.double() for s in _sigmas(scheduler, timestep))
    if sde_type == "sde":
        step = flow_sde(sigma, sigma_next, noise_level, scheduler.sigmas[1].item())
    else:
        step = cps(sigma, sigma_next, noise_level)
    return Transition(*(field.float() for field in step))


def fused_grpo_loss(
    scheduler: Scheduler,
    model_output: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    prev_sample_mean: Tensor | None = None,
    log_probs: Tensor | None = None,
    model_output_ref: Tensor | None = None,
    noise_level: float = 0.7,
    sde_type: Literal["sde", "cps"] = "sde",
    ratio: Literal["token", "location", "sample"] = "token",
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip_max: float = 5.0,
    beta: float = 0.0,
    guard: bool = False,
    impl: Implementation = "auto",
) -> PolicyLoss:
    """`star_kernels.policy_loss` with the names of Flow-GRPO's loop: step, log_prob, ratio, clip, KL in one kernel.

    Args:
        scheduler, model_output, timestep, sample, prev_sample, noise_level, sde_type: as in `sde_step_with_logprob`.
        advantages: (B,), or one per location.
        weights: one per location, mean 1 over each sample.
        prev_sample_mean: the mean stored in the rollout: the exact form of the ratio.
        log_probs: instead of it the log_prob stored in the rollout, (B,) or one per location.
        model_output_ref: the reference's velocity, for beta.
        clip_range, adv_clip_max, beta: Flow-GRPO's.
        guard: GRPO-Guard, needs prev_sample_mean.
        ratio, impl: of `star_kernels.policy_loss`.

    Returns:
        PolicyLoss(loss, statistics); the gradient goes to model_output alone.

    Raises:
        TypeError, ValueError: as `star_kernels.policy_loss`.
        RuntimeError: `impl` cannot run here.
    """
    check_latents("model_output", model_output)
    transition = scheduler_transition(scheduler, timestep, noise_level, sde_type).to(model_output.device)
    if len(transition.a) == 1:
        transition = transition.expand(len(model_output))
    return policy_loss(
        model_output,
        sample,
        prev_sample,
        transition,
        advantages,
        weights,
        old_mean=prev_sample_mean,
        old_log_prob=log_probs,
        reference_velocity=model_output_ref,
        ratio=ratio,
        clip_range=clip_range,
        adv_clip=adv_clip_max,
        kl_coef=beta,
        guard=guard,
        impl=impl,
    )
