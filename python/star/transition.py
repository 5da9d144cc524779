"""The samplers, each as a Gaussian step that is linear in the model's velocity: x' = a x + b v + s eps.

sigma runs from 1 (noise) to 0 (image), dt = sigma_next - sigma < 0, x = (1 - sigma) image + sigma noise.
All of it is computed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from star_kernels import Transition

SAMPLERS = ("flow_sde", "dance_sde", "cps", "ode")


def _diffusion(sigma: Tensor, sigma_next: Tensor, std: Tensor) -> Transition:
    """The reverse SDE whose noise has standard deviation std per unit of sqrt(time)."""
    dt = sigma_next - sigma
    drift = std**2 / (2 * sigma)
    a = 1 + drift * dt
    b = (1 + drift * (1 - sigma)) * dt
    return Transition.gaussian(a, b, std * (-dt).sqrt(), std)


def flow_sde(sigma: Tensor, sigma_next: Tensor, noise_level: float, sigma_max: float) -> Transition:
    """Flow-GRPO: std = noise_level sqrt(sigma / (1 - sigma)); where sigma is 1, 1 - sigma_max takes its place.

    sigma, sigma_next: (B,) float64. sigma_max: the second sigma of the schedule.
    Source: Liu et al. 2025; flow_grpo/diffusers_patch/sd3_sde_with_logprob.py.
    """
    below_one = torch.where(sigma == 1, sigma_max, sigma)
    return _diffusion(sigma, sigma_next, noise_level * (sigma / (1 - below_one)).sqrt())


def dance_sde(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Transition:
    """DanceGRPO: std = noise_level at every step. Source: Xue et al. 2025; fastvideo/train_grpo_flux.py."""
    return _diffusion(sigma, sigma_next, torch.full_like(sigma, noise_level))


def cps(sigma: Tensor, sigma_next: Tensor, noise_level: float) -> Transition:
    """Coefficients-preserving sampling: noise is exchanged, not added, so x' has the noise level of sigma_next.

    Its public log-density leaves out 1 / (2 s^2) and the norm. Source: Flow-CPS (2025), Flow-GRPO's sde_type "cps".
    """
    s = sigma_next * math.sin(noise_level * math.pi / 2)
    kept = (sigma_next**2 - s**2).sqrt()
    a = 1 - sigma_next + kept
    b = kept * (1 - sigma) - sigma * (1 - sigma_next)
    return Transition(a, b, s, torch.ones_like(s), torch.zeros_like(s), 0.5 / s**2)


def ode(sigma: Tensor, sigma_next: Tensor) -> Transition:
    """The deterministic Euler step. It has no density: its precision is infinite."""
    zero = torch.zeros_like(sigma)
    return Transition.gaussian(torch.ones_like(sigma), sigma_next - sigma, zero)


def schedule(
    sigmas: Tensor,
    sampler: str = "flow_sde",
    noise_level: float = 0.7,
    stochastic: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Transition:
    """The transition of every step of a schedule.

    Args:
        sigmas: (T+1,) decreasing from at most 1 to 0.
        sampler: one of SAMPLERS.
        noise_level: of the sampler, > 0 (cps: in (0, 1); ode: not used).
        stochastic: steps that use the sampler; the others are ODE steps. None: all of them.
        dtype: of the result.

    Returns:
        Transition with fields (T,). Raises ValueError for an unknown sampler, a noise level or a step out of range, or
        sigmas that do not decrease.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler: got {sampler!r}, expected one of {list(SAMPLERS)}")
    if sigmas.ndim != 1 or len(sigmas) < 2 or not bool((sigmas.diff() < 0).all()) or sigmas[0] > 1 or sigmas[-1] < 0:
        raise ValueError(f"sigmas: got {sigmas.tolist()}, expected values decreasing from at most 1 to 0")
    if sampler != "ode" and not (0 < noise_level < (1 if sampler == "cps" else math.inf)):
        raise ValueError(f"noise_level: got {noise_level}, expected {'0 < level < 1' if sampler == 'cps' else '> 0'}")
    count = len(sigmas) - 1
    steps = range(count) if stochastic is None else stochastic
    if not all(0 <= step < count for step in steps):
        raise ValueError(f"stochastic: got {list(steps)}, expected steps in 0..{count - 1}")
    sigma, sigma_next = sigmas.double()[:-1], sigmas.double()[1:]
    deterministic = ode(sigma, sigma_next)
    if sampler == "flow_sde":
        noisy = flow_sde(sigma, sigma_next, noise_level, sigma_next[0].item())
    elif sampler == "dance_sde":
        noisy = dance_sde(sigma, sigma_next, noise_level)
    elif sampler == "cps":
        noisy = cps(sigma, sigma_next, noise_level)
    else:
        noisy = deterministic
    chosen = torch.zeros(count, dtype=torch.bool, device=sigmas.device)
    chosen[list(steps)] = True
    return Transition(*(torch.where(chosen, n, d).to(dtype) for n, d in zip(noisy, deterministic, strict=True)))
