"""Other objectives with the same weights, each against its unweighted original written from its paper's formulas."""

import math

import pytest
import torch
import torch.nn.functional as F

from builders import random_weights, scheduler
from star.objective import (
    awm_loss,
    diffusion_dpo_loss,
    nft_loss,
    reinforce_loss,
    sde_step_with_logprob,
    weighted_gradient,
)

SHAPES = pytest.mark.parametrize(
    ("shape", "locations"), [((4, 3, 4, 5), (4, 4, 5)), ((4, 3, 2, 4, 5), (4, 2, 4, 5)), ((4, 20, 3), (4, 20))]
)


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# --- DDPO: importance-sampled (TRL, ddpo-pytorch) and REINFORCE -------------------------------------------------------


def ddim_log_prob(noise_pred, sample, prev_sample, alpha_t, alpha_prev, eta=1.0):
    """DDPO's elementwise log-density of a DDIM step (Song et al. 2021, equation 12), for an epsilon model."""
    x0 = (sample - (1 - alpha_t) ** 0.5 * noise_pred) / alpha_t**0.5
    s = eta * math.sqrt((1 - alpha_prev) / (1 - alpha_t) * (1 - alpha_t / alpha_prev))
    mean = alpha_prev**0.5 * x0 + math.sqrt(1 - alpha_prev - s**2) * noise_pred
    return -((prev_sample - mean) ** 2) / (2 * s**2) - math.log(s) - 0.5 * math.log(2 * math.pi)


def ddpo_loss(log_prob, old_log_prob, advantages, clip=1e-4, adv_clip=10.0):
    advantages = advantages.clamp(-adv_clip, adv_clip)
    r = torch.exp(log_prob - old_log_prob)
    return torch.maximum(-advantages * r, -advantages * r.clamp(1 - clip, 1 + clip)).mean()


@pytest.mark.parametrize("clip", [1e-4, 0.5])
def test_ddpo_importance_sampled(clip):
    noise_pred, sample, prev = draw(4, 3, 4, 5).requires_grad_(), draw(4, 3, 4, 5), draw(4, 3, 4, 5)
    advantages, weights = torch.tensor([1.0, -0.5, 2.0, -1.5]).double(), random_weights((4, 4, 5), torch.float64)
    old = ddim_log_prob(noise_pred.detach() + 0.05 * draw(4, 3, 4, 5), sample, prev, 0.6, 0.7).mean((1, 2, 3))

    def loss(weights):
        prediction = weighted_gradient(noise_pred, weights)
        return ddpo_loss(ddim_log_prob(prediction, sample, prev, 0.6, 0.7).mean((1, 2, 3)), old, advantages, clip)

    assert loss(weights) == loss(None) == loss(torch.ones_like(weights))
    plain, ones, weighted = (
        torch.autograd.grad(loss(w), noise_pred)[0] for w in (None, torch.ones_like(weights), weights)
    )
    assert torch.equal(plain, ones)
    torch.testing.assert_close(weighted, plain * weights[:, None], rtol=1e-13, atol=0)


def test_ddpo_reinforce():
    noise_pred, sample, prev = draw(4, 3, 4, 5).requires_grad_(), draw(4, 3, 4, 5), draw(4, 3, 4, 5)
    advantages, weights = torch.tensor([1.0, -0.5, 9.0, -1.5]).double(), random_weights((4, 4, 5), torch.float64)
    log_prob = lambda v: ddim_log_prob(v, sample, prev, 0.6, 0.7)
    original = -(advantages.clamp(-5, 5) * log_prob(noise_pred).mean((1, 2, 3))).mean()
    for got in (
        reinforce_loss(log_prob(noise_pred).mean((1, 2, 3)), advantages),
        reinforce_loss(log_prob(noise_pred).mean(1), advantages),
        reinforce_loss(log_prob(noise_pred).mean(1), advantages, torch.ones_like(weights)),
    ):
        torch.testing.assert_close(got, original, rtol=1e-13, atol=0)
    weighted = lambda v: reinforce_loss(log_prob(v).mean(1), advantages, weights)
    assert torch.autograd.gradcheck(weighted, noise_pred)
    (plain,), (gradient,) = (torch.autograd.grad(x, noise_pred) for x in (original, weighted(noise_pred)))
    torch.testing.assert_close(gradient, plain * weights[:, None], rtol=1e-13, atol=0)


# --- GRPO-Guard in a trainer's own code: the bias of the mean needs the weights too -----------------------------------


def test_guard_in_a_trainers_own_words_needs_the_weights_in_the_mean_too():
    plan = scheduler()
    v, x = draw(4, 3, 4, 5).requires_grad_(), draw(4, 3, 4, 5)
    advantages, weights = torch.tensor([1.0, -0.5, 2.0, -1.5]).double(), random_weights((4, 4, 5), torch.float64)
    timestep = plan.timesteps[3:4]
    prev, old_log_prob, old_mean, _ = sde_step_with_logprob(plan, v.detach() + 0.05 * draw(4, 3, 4, 5), timestep, x)

    def loss(step_weights, mean_weights):
        _, log_prob, mean, std_dev_t, sqrt_dt = sde_step_with_logprob(
            plan, v, timestep, x, prev_sample=prev, weights=step_weights, return_sqrt_dt=True
        )
        scale = sqrt_dt.mean() * std_dev_t.mean()
        mean = weighted_gradient(mean, mean_weights)
        bias = (mean - old_mean).pow(2).mean((1, 2, 3)) / (2 * scale**2)
        r = torch.exp((log_prob - old_log_prob + bias) * scale)
        return torch.maximum(-advantages * r, -advantages * r.clamp(0.5, 1.5)).mean() / sqrt_dt.mean() ** 2

    (plain,), (weighted,), (half,) = (
        torch.autograd.grad(loss(*pair), v) for pair in ((None, None), (weights, weights), (weights, None))
    )
    assert loss(None, None) == loss(weights, weights)
    torch.testing.assert_close(weighted, plain * weights[:, None], rtol=1e-11, atol=1e-15)
    assert not torch.allclose(half, plain * weights[:, None], rtol=1e-3)


# --- DiffusionNFT -----------------------------------------------------------------------------------------------------


def original_nft(v, old, x0, xt, t, r, beta, factor, floor):
    """Zheng et al. 2025, the contrastive regression, with the official code's per-sample normalizer."""
    dims, t = tuple(range(1, v.ndim)), t.view(-1, *(1,) * (v.ndim - 1))
    result = 0
    for sign, share in ((1, r), (-1, 1 - r)):
        prediction = xt - t * (old + sign * beta * (v - old))
        size = 1.0
        if floor is not None:
            size = (prediction - x0).abs().mean(dims, keepdim=True).clamp(min=floor).detach()
        result = result + share * ((prediction - x0) ** 2 / size).mean(dims)
    return (result / beta * factor).mean()


@SHAPES
@pytest.mark.parametrize("floor", [1e-5, 10.0, None])
def test_nft(shape, locations, floor):
    v, old, x0, noise = draw(*shape).requires_grad_(), draw(*shape), draw(*shape), draw(*shape)
    t, r = torch.tensor([0.1, 0.4, 0.7, 1.0]).double(), torch.tensor([0.0, 0.3, 0.8, 1.0]).double()
    xt = (1 - t.view(-1, *(1,) * (v.ndim - 1))) * x0 + t.view(-1, *(1,) * (v.ndim - 1)) * noise
    weights = random_weights(locations, torch.float64)
    loss = lambda w, v=v: nft_loss(v, old, x0, xt, t, r, w, beta=0.4, adv_clip_max=3.0, adaptive_weight_min=floor)
    expected = original_nft(v, old, x0, xt, t, r, 0.4, 3.0, floor)
    (plain,) = torch.autograd.grad(expected, v)
    for w in (None, torch.ones_like(weights)):
        torch.testing.assert_close(loss(w), expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss(w), v)[0], plain, rtol=1e-12, atol=1e-15)
    (gradient,) = torch.autograd.grad(loss(weights), v)
    axis = 2 if len(shape) == 3 else 1
    torch.testing.assert_close(gradient, plain * weights.unsqueeze(axis), rtol=1e-12, atol=1e-15)
    assert not torch.allclose(loss(weights), expected)
    if floor is None:  # with the normalizer, a constant by definition, differences of values see more than the gradient
        assert torch.autograd.gradcheck(lambda v: loss(weights, v), v)


def test_nft_errors():
    x, t = draw(2, 3, 4, 5), torch.ones(2).double()
    with pytest.raises(ValueError, match=r"t: got shape \(2, 1, 1, 1\), expected \(2\)"):
        nft_loss(x, x, x, x, t.view(2, 1, 1, 1), t, beta=1.0)
    with pytest.raises(ValueError, match=r"reward_prob: got shape \(2, 1\), expected \(2,\) or \(2, 4, 5\)"):
        nft_loss(x, x, x, x, t, t[:, None], beta=1.0)
    with pytest.raises(ValueError, match=r"xt: got shape \(1, 3, 4, 5\), expected \(2, 3, 4, 5\)"):
        nft_loss(x, x, x, x[:1], t, t, beta=1.0)
    with pytest.raises(ValueError, match="beta: got 0"):
        nft_loss(x, x, x, x, t, t, beta=0)
    with pytest.raises(ValueError, match=r"weights: got shape \(2, 1, 1\), expected \(2, 4, 5\)"):
        nft_loss(x, x, x, x, t, t, torch.ones(2, 1, 1), beta=1.0)


# --- Advantage Weighted Matching --------------------------------------------------------------------------------------

WEIGHTINGS = {"Uniform": (0, 1), "t": (1, 1), "t**2": (2, 1), "ghuber": (1, 0.25)}


def original_awm(v, old, target, t, advantages, weighting, clip, limit):
    """Xue et al. 2025: the matching loss as a negative log-density, under one of the official code's weightings."""

    def log_prob(v):
        error = ((v - target) ** 2).flatten(1).mean(1)
        if weighting == "ghuber":
            return -t / 0.25 * ((error + 1e-10) ** 0.25 - 1e-10**0.25)
        return -error * {"Uniform": 1, "t": t, "t**2": t**2}[weighting]

    r, a = torch.exp(log_prob(v) - log_prob(old)), advantages.clamp(-limit, limit) / limit
    return torch.maximum(-a * r, -a * r.clamp(1 - clip, 1 + clip)).mean()


@SHAPES
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_awm(shape, locations, weighting):
    v, target = draw(*shape).requires_grad_(), draw(*shape)
    old = v.detach() + 0.2 * draw(*shape)
    t, advantages = torch.tensor([0.1, 0.4, 0.7, 1.0]).double(), torch.tensor([9.0, -0.5, 2.0, -1.5]).double()
    weights = random_weights(locations, torch.float64)
    sigma_power, error_power = WEIGHTINGS[weighting]
    for clip, policy in ((1.0, old), (0.01, old), (1.0, v.detach())):

        def loss(w, a=advantages, clip=clip, policy=policy, ratio="token"):
            powers = {"sigma_power": sigma_power, "error_power": error_power}
            return awm_loss(v, policy, target, t, a, w, **powers, clip_range=clip, adv_clip_max=3.0, ratio=ratio).loss

        expected = original_awm(v, policy, target, t, advantages, weighting, clip, 3.0)
        (plain,) = torch.autograd.grad(expected, v)
        each = advantages.view(-1, *(1,) * (len(locations) - 1)).expand(locations)
        for w, a, ratio in (
            (None, advantages, "token"),
            (torch.ones_like(weights), each, "token"),
            (None, advantages, "sample"),
        ):
            torch.testing.assert_close(loss(w, a, ratio=ratio), expected, rtol=1e-13, atol=1e-15)
            torch.testing.assert_close(
                torch.autograd.grad(loss(w, a, ratio=ratio), v)[0], plain, rtol=1e-11, atol=1e-15
            )
        torch.testing.assert_close(loss(weights), expected, rtol=1e-13, atol=1e-15)
        (gradient,) = torch.autograd.grad(loss(weights), v)
        torch.testing.assert_close(
            gradient, plain * weights.unsqueeze(2 if len(shape) == 3 else 1), rtol=1e-11, atol=1e-15
        )
        assert plain.abs().max() > 0


@pytest.mark.parametrize("error_power", [0.25, 1.0])
def test_awm_log_ratios_keep_their_digits(error_power):
    """A small step in float32: the difference of two log-densities would lose most of it."""
    target, v, step = (draw(2, 4, 16, 16).float() for _ in range(3))
    t, advantages = torch.tensor([0.3, 0.9]), torch.tensor([1.0, -1.0])
    old = v + 1e-5 * step
    got = awm_loss(v, old, target, t, advantages, error_power=error_power).statistics
    exact = [x.double() for x in (v, old, target, t, advantages)]
    expected = awm_loss(*exact, error_power=error_power).statistics
    torch.testing.assert_close(got.approx_kl, expected.approx_kl, rtol=1e-4, atol=0)
    same = awm_loss(v, v, target, t, advantages, error_power=error_power).statistics
    assert [same.approx_kl, same.ratio_min, same.ratio_max] == [0, 1, 1] and expected.approx_kl > 0
    perfect = awm_loss(target, old, target, t, advantages, error_power=error_power)
    assert perfect.loss.isfinite() and perfect.statistics.nonfinite == 0
    broken = awm_loss(v.index_fill(0, torch.tensor([1]), torch.inf), old, target, t, advantages)
    assert broken.loss.isnan() and broken.statistics.nonfinite == 256


def test_awm_errors():
    x, t = draw(2, 3, 4, 5), torch.ones(2).double()
    with pytest.raises(ValueError, match=r"sigma: has values outside \[0, 1\]; it is the noise level"):
        awm_loss(x, x, x, 1000 * t, t)
    with pytest.raises(ValueError, match="error_power: got 0"):
        awm_loss(x, x, x, t, t, error_power=0)
    with pytest.raises(ValueError, match="adv_clip_max: got inf, expected a finite number > 0"):
        awm_loss(x, x, x, t, t, adv_clip_max=float("inf"))
    with pytest.raises(ValueError, match=r"target: got shape \(1, 3, 4, 5\), expected \(2, 3, 4, 5\)"):
        awm_loss(x, x, x[:1], t, t)
    with pytest.raises(ValueError, match=r"advantages: got shape \(2, 1\), expected \(2,\) or \(2, 4, 5\)"):
        awm_loss(x, x, x, t, t[:, None])


# --- Diffusion-DPO ----------------------------------------------------------------------------------------------------


def original_dpo(pred, pred_ref, target, beta):
    """Wallace et al. 2023, equation 14, at one noise level."""
    error = lambda p: ((p - target) ** 2).flatten(1).mean(1)
    gain = error(pred) - error(pred_ref)
    half = len(target) // 2
    return -F.logsigmoid(-beta / 2 * (gain[:half] - gain[half:])).mean()


@SHAPES
def test_diffusion_dpo(shape, locations):
    pred, target = draw(*shape).requires_grad_(), draw(*shape)
    pred_ref, weights = pred.detach() + 0.1 * draw(*shape), random_weights(locations, torch.float64)
    expected = original_dpo(pred, pred_ref, target, 7.0)
    (plain,) = torch.autograd.grad(expected, pred)
    for w in (None, torch.ones_like(weights)):
        loss, accuracy = diffusion_dpo_loss(pred, pred_ref, target, w, beta=7.0)
        torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
        torch.testing.assert_close(torch.autograd.grad(loss, pred)[0], plain, rtol=1e-12, atol=1e-15)
        assert accuracy in (0, 0.5, 1)
    weighted = lambda pred: diffusion_dpo_loss(pred, pred_ref, target, weights, beta=7.0).loss
    assert torch.autograd.gradcheck(weighted, pred)
    # Written out: the same loss of predictions whose errors are scaled by the root of the weights.
    root = weights.sqrt().unsqueeze(2 if len(shape) == 3 else 1)
    torch.testing.assert_close(
        weighted(pred), original_dpo(root * pred, root * pred_ref, root * target, 7.0), rtol=1e-13, atol=0
    )
    assert not torch.allclose(weighted(pred), expected)


def test_diffusion_dpo_errors():
    x = draw(3, 2, 4, 5)
    with pytest.raises(ValueError, match="target: got 3 rows, expected the chosen images and as many rejected ones"):
        diffusion_dpo_loss(x, x, x, beta=1.0)
    with pytest.raises(ValueError, match=r"model_pred_ref: got shape \(2, 2, 4, 5\), expected \(3, 2, 4, 5\)"):
        diffusion_dpo_loss(x, x[:2], x, beta=1.0)
