"""The samplers against their published formulas, written here step by step in float64."""

import math

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from star.transition import schedule
from star_kernels import gaussian_step, log_prob

SIGMAS = torch.linspace(1, 0, 11, dtype=torch.float64)
SHIFTED = 3 * SIGMAS / (1 + 2 * SIGMAS)


def draw():
    return torch.randn(3, 4, 5, 5, dtype=torch.float64).unsqueeze(1)  # x, v, noise with batch 1


def published(sampler, sigmas, i, noise_level, x, v):
    """Mean, step deviation and std as the public implementations compute them."""
    sigma, following = sigmas[i].item(), sigmas[i + 1].item()
    dt = following - sigma
    if sampler == "flow_sde":
        std = math.sqrt(sigma / (1 - (sigmas[1].item() if sigma == 1 else sigma))) * noise_level
        mean = x * (1 + std**2 / (2 * sigma) * dt) + v * (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
        return mean, std * math.sqrt(-dt), std
    if sampler == "dance_sde":
        clean = x - sigma * v
        score = -(x - clean * (1 - sigma)) / sigma**2
        return x + dt * v - 0.5 * noise_level**2 * score * dt, noise_level * math.sqrt(-dt), noise_level
    std = following * math.sin(noise_level * math.pi / 2)
    clean, noise = x - sigma * v, x + v * (1 - sigma)
    return clean * (1 - following) + noise * math.sqrt(following**2 - std**2), std, std


@pytest.mark.parametrize("sampler", ["flow_sde", "dance_sde", "cps"])
@pytest.mark.parametrize("step", range(10))
def test_published_formulas(sampler, step):
    x, v, noise = draw()
    transition = schedule(SHIFTED, sampler, 0.7, dtype=torch.float64).rows(slice(step, step + 1))
    mean, s, std = published(sampler, SHIFTED, step, 0.7, x, v)
    after, got = gaussian_step(x, v, noise, transition)
    torch.testing.assert_close(got, mean, rtol=1e-12, atol=1e-12)
    assert transition.s.item() == pytest.approx(s, rel=1e-12, abs=1e-15)
    if s == 0:
        return  # cps ends without noise
    torch.testing.assert_close(after, mean + s * noise, rtol=1e-12, atol=1e-12)
    assert transition.kl_precision.item() == pytest.approx(1 / (2 * std**2))
    error = (after - mean) ** 2
    expected = -error if sampler == "cps" else -error / (2 * s**2) - math.log(s) - math.log(math.sqrt(2 * math.pi))
    torch.testing.assert_close(log_prob(after, got, transition), expected.mean((1, 2, 3)), rtol=1e-9, atol=1e-9)


def test_published_deviations_of_ten_shifted_steps():
    """Ten steps of SD3.5's scheduler at noise level 0.7, as they follow from Flow-GRPO's code."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    s = schedule(scheduler.sigmas, "flow_sde", 0.7).s
    expected = torch.tensor([0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.0063])
    torch.testing.assert_close(s, expected, rtol=0, atol=6e-4)


def test_steps_outside_the_window_are_euler_steps():
    transitions = schedule(SIGMAS, "flow_sde", 0.7, stochastic=(2, 3), dtype=torch.float64)
    assert (transitions.s > 0).tolist() == [i in (2, 3) for i in range(10)]
    x, v, noise = draw()
    after, mean = gaussian_step(x, v, noise, transitions.rows(slice(5, 6)))
    torch.testing.assert_close(after, x + (SIGMAS[6] - SIGMAS[5]) * v)
    assert torch.equal(after, mean)


def test_the_sde_keeps_the_marginal_distribution():
    """With the exact velocity of Gaussian data, many small steps end in the data's distribution, as the ODE does."""
    mean, spread = 1.5, 0.5
    sigmas = torch.linspace(1, 0, 401, dtype=torch.float64)
    for sampler, level in (("flow_sde", 0.7), ("dance_sde", 0.3), ("cps", 0.3), ("ode", 0.0)):
        transitions = schedule(sigmas, sampler, level, dtype=torch.float64)
        x = torch.randn(20_000, 1, dtype=torch.float64)
        for i in range(400):
            sigma = sigmas[i]
            variance = (1 - sigma) ** 2 * spread**2 + sigma**2
            # E[noise - data | x] for x = (1 - sigma) data + sigma noise.
            residual = (x - (1 - sigma) * mean) / variance
            v = sigma * residual - (mean + (1 - sigma) * spread**2 * residual)
            step = transitions.rows(slice(i, i + 1)).expand(len(x))
            x, _ = gaussian_step(x, v, torch.randn_like(x), step)
        # Four standard errors of the mean and of the deviation, and the steps' own error of a few thousandths.
        assert x.mean().item() == pytest.approx(mean, abs=4 * spread / math.sqrt(20_000) + 0.01), sampler
        assert x.std().item() == pytest.approx(spread, abs=4 * spread / math.sqrt(40_000) + 0.01), sampler


def test_errors():
    with pytest.raises(ValueError, match="sampler: got 'ddim'"):
        schedule(SIGMAS, "ddim")
    with pytest.raises(ValueError, match=r"noise_level: got 1.0, expected 0 < level < 1"):
        schedule(SIGMAS, "cps", 1.0)
    with pytest.raises(ValueError, match=r"noise_level: got -0.1, expected > 0"):
        schedule(SIGMAS, "flow_sde", -0.1)
    with pytest.raises(ValueError, match="sigmas: got"):
        schedule(SIGMAS.flip(0))
    with pytest.raises(ValueError, match=r"stochastic: got \[10\], expected steps in 0..9"):
        schedule(SIGMAS, stochastic=[10])
