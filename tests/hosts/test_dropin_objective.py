"""The drop-in for other trainers: weights without a change of values, Flow-GRPO's step, and the loss in one call."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import star_kernels as sk
from builders import EPS, clipped, random_weights, scheduler, step_by_formula
from star.objective import (
    fused_grpo_loss,
    grpo_loss,
    reinforce_loss,
    scheduler_transition,
    sde_step_with_logprob,
    weighted_gradient,
)
from star.transition import schedule

SHAPE = (3, 4, 6, 8)


# --- weighted_gradient ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "locations"), [(SHAPE, (3, 6, 8)), ((2, 4, 3, 6, 8), (2, 3, 6, 8)), ((2, 24, 16), (2, 24))]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_stay_and_gradients_are_weighted(shape, locations, dtype):
    x, weights, outside = (
        torch.randn(shape, dtype=dtype, requires_grad=True),
        random_weights(locations),
        torch.randn(shape),
    )
    y = weighted_gradient(x, weights)
    assert torch.equal(y, x) and y.dtype == dtype
    (gradient,) = torch.autograd.grad((y * outside.to(dtype)).sum(), x)
    axis = 2 if len(shape) == 3 else 1
    expected = (outside.to(dtype).double() * weights.double().unsqueeze(axis)).to(dtype)
    # The weights are float32; the product is rounded once to the gradient's type.
    rtol = max(2 * torch.finfo(dtype).eps, EPS)
    torch.testing.assert_close(gradient, expected, rtol=rtol, atol=0)
    assert weighted_gradient(x, None) is x


def test_weights_are_constants_and_must_fit():
    x = torch.randn(SHAPE, requires_grad=True)
    weights = random_weights((3, 6, 8)).requires_grad_()
    weighted_gradient(x, weights).sum().backward()
    assert weights.grad is None
    for bad in (torch.ones(3), torch.ones(3, 1, 1), torch.ones(3, 8, 6), torch.ones(3, 1, 6, 8), torch.ones(1, 6, 8)):
        with pytest.raises(ValueError, match=r"weights: got shape .*, expected \(3, 6, 8\)"):
            weighted_gradient(x, bad)
    with pytest.raises(TypeError, match=r"weights: got torch.int64, expected a floating-point tensor"):
        weighted_gradient(x, torch.ones(3, 6, 8, dtype=torch.int64))


def test_weighted_gradient_compiles():
    x, weights = torch.randn(SHAPE, requires_grad=True), random_weights((3, 6, 8))
    run = lambda x: (weighted_gradient(x, weights) ** 2).sum()
    (expected,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(torch.compile(run, fullgraph=True, backend="aot_eager")(x), x)
    torch.testing.assert_close(got, expected)


# --- sde_step_with_logprob --------------------------------------------------------------------------------------------


def one_step(shape=SHAPE, dtype=torch.float32, sde_type="sde", steps=(0, 3, 8)):
    plan = scheduler()
    index = torch.tensor([steps[i % len(steps)] for i in range(shape[0])])
    v, x = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    timestep = plan.timesteps[index]
    sigmas = plan.sigmas[index], plan.sigmas[index + 1], plan.sigmas[1].item()
    prev, *_ = sde_step_with_logprob(plan, v, timestep, x, 0.7, sde_type=sde_type)
    return plan, timestep, sigmas, v + 0.01 * torch.randn(shape, dtype=dtype), x, prev


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("shape", [SHAPE, (3, 4, 2, 6, 8), (3, 24, 16)], ids=["image", "video", "packed"])
def test_step_against_the_formulas(sde_type, shape):
    plan, timestep, sigmas, v, x, prev = one_step(shape, torch.float64, sde_type)
    out = sde_step_with_logprob(plan, v, timestep, x, 0.7, prev, sde_type=sde_type, return_sqrt_dt=True)
    log_prob, mean, std = step_by_formula(*sigmas, v, x, 0.7, sde_type, prev)
    assert out[0] is prev and out[1].shape == (3,) and out[3].shape == (3, *(1,) * (len(shape) - 1))
    for got, expected in zip(out[1:4], (log_prob, mean, std), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out[4].flatten(), (sigmas[0] - sigmas[1]).double().sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_step_agrees_with_the_transitions_of_the_package(sde_type):
    plan, timestep, _, v, x, prev = one_step(sde_type=sde_type)
    step = scheduler_transition(plan, timestep, 0.7, sde_type)
    whole = schedule(plan.sigmas, {"sde": "flow_sde"}.get(sde_type, sde_type), 0.7)
    assert all(torch.equal(a, b[torch.tensor([0, 3, 8])]) for a, b in zip(step, whole, strict=True))
    _, log_prob, mean, _ = sde_step_with_logprob(plan, v, timestep, x, 0.7, prev, sde_type=sde_type)
    expected = step.a.view(-1, 1, 1, 1) * x + step.b.view(-1, 1, 1, 1) * v
    torch.testing.assert_close(mean, expected, rtol=16 * EPS, atol=16 * EPS)
    # The error of a squared difference of means of order one, over twice the variance, which is 0.05 at step 8.
    torch.testing.assert_close(log_prob, sk.log_prob(prev, expected, step), rtol=0, atol=200 * EPS)
    per_location = sde_step_with_logprob(plan, v, timestep, x, 0.7, prev, sde_type=sde_type, per_location=True)[1]
    assert per_location.shape == (3, 6, 8)
    torch.testing.assert_close(per_location.mean((1, 2)), log_prob, rtol=8 * EPS, atol=8 * EPS)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
def test_weights_change_the_gradient_and_no_bit_of_a_value(sde_type):
    plan, timestep, _, v, x, prev = one_step(sde_type=sde_type)
    v, weights = v.requires_grad_(), random_weights((3, 6, 8))
    plain = sde_step_with_logprob(plan, v, timestep, x, 0.7, prev, sde_type=sde_type)
    weighted = sde_step_with_logprob(plan, v, timestep, x, 0.7, prev, sde_type=sde_type, weights=weights)
    assert all(torch.equal(a, b) for a, b in zip(plain, weighted, strict=True))
    (plain_gradient,) = torch.autograd.grad(plain[1].sum(), v, retain_graph=True)
    (gradient,) = torch.autograd.grad(weighted[1].sum(), v, retain_graph=True)
    torch.testing.assert_close(gradient, plain_gradient * weights[:, None], rtol=4 * EPS, atol=0)
    # A KL term made of the mean is not weighted.
    means = [torch.autograd.grad(out[2].sum(), v, retain_graph=True)[0] for out in (plain, weighted)]
    assert torch.equal(*means)


def test_half_precision_inputs_are_computed_in_float32_and_one_timestep_serves_all():
    plan = scheduler()
    v, x = torch.randn(SHAPE).half(), torch.randn(SHAPE).half()
    draw = lambda t: sde_step_with_logprob(plan, v, t, x, generator=torch.Generator().manual_seed(5))
    first, second, third = draw(plan.timesteps[2:3]), draw(plan.timesteps[2]), draw(plan.timesteps[2].expand(3))
    assert all(part.dtype == torch.float32 for part in first)
    for a, b, c in zip(first, second, third, strict=True):
        assert torch.equal(a, b) and torch.equal(a.expand_as(c), c)


def test_noise_is_diffusers_noise():
    from diffusers.utils.torch_utils import randn_tensor

    plan = scheduler()
    v, x = torch.zeros(SHAPE), torch.zeros(SHAPE)
    for make in (
        lambda: torch.Generator().manual_seed(3),
        lambda: [torch.Generator().manual_seed(i) for i in range(3)],
    ):
        prev, _, mean, std = sde_step_with_logprob(plan, v, plan.timesteps[4], x, generator=make())
        noise = randn_tensor(SHAPE, generator=make(), dtype=torch.float32)
        spread = std * (plan.sigmas[4] - plan.sigmas[5]).sqrt()
        torch.testing.assert_close(prev, mean + spread * noise, rtol=4 * EPS, atol=4 * EPS)


def test_step_errors():
    plan, timestep, _, v, x, prev = one_step()
    with pytest.raises(ValueError, match=r"timestep: got \[1\.5\], expected values of scheduler.timesteps"):
        sde_step_with_logprob(plan, v, torch.tensor([1.5]), x)
    with pytest.raises(ValueError, match="timestep: got 2 values, expected 1 or 3"):
        sde_step_with_logprob(plan, v, timestep[:2], x)
    with pytest.raises(ValueError, match=r"sample: got shape \(3, 4, 6, 7\), expected \(3, 4, 6, 8\)"):
        sde_step_with_logprob(plan, v, timestep, x[..., :7])
    with pytest.raises(ValueError, match=r"prev_sample: got shape \(1, 4, 6, 8\)"):
        sde_step_with_logprob(plan, v, timestep, x, prev_sample=prev[:1])
    with pytest.raises(ValueError, match="sde_type: got 'ode', expected one of"):
        sde_step_with_logprob(plan, v, timestep, x, sde_type="ode")
    with pytest.raises(ValueError, match="weights: got them with per_location=True"):
        sde_step_with_logprob(plan, v, timestep, x, weights=torch.ones(3, 6, 8), per_location=True)
    with pytest.raises(ValueError, match="generator: got 2, expected one for each of 3 samples"):
        sde_step_with_logprob(plan, v, timestep, x, generator=[torch.Generator(), torch.Generator()])


# --- the loss in one call ---------------------------------------------------------------------------------------------


def log_probs(per_location, dtype=torch.float64):
    shape = (6, 4, 5) if per_location else (6,)
    old = torch.randn(shape, dtype=dtype)
    return (old + 0.05 * torch.randn(shape, dtype=dtype)).requires_grad_(), old


ADVANTAGES = torch.tensor([1.5, -0.7, 9.0, -9.0, 0.3, -0.1], dtype=torch.float64)


@pytest.mark.parametrize("clip", [1e-4, 0.02, 1.0])
def test_one_log_prob_per_sample_is_the_loss_of_the_trainers(clip):
    new, old = log_probs(False)
    got, expected = grpo_loss(new, old, ADVANTAGES, clip_range=clip), clipped(new, old, ADVANTAGES, clip)
    torch.testing.assert_close(got.loss, expected, rtol=1e-14, atol=0)
    gradients = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (got.loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-13, atol=0)
    ratio = (new - old).exp()
    torch.testing.assert_close(got.approx_kl, 0.5 * ((new - old) ** 2).mean())
    assert got.clip_fraction == ((ratio - 1).abs() > clip).double().mean()
    assert got.clip_fraction_low == (ratio < 1 - clip).double().mean()
    assert got.clip_fraction_high == (ratio > 1 + clip).double().mean()


@pytest.mark.parametrize("ratio", ["token", "sample"])
@pytest.mark.parametrize("weights", [None, "ones"])
def test_per_location_without_weights_is_the_scalar_loss(ratio, weights):
    new, old = log_probs(True)
    weights = None if weights is None else torch.ones(6, 4, 5, dtype=torch.float64)
    got = grpo_loss(new, old, ADVANTAGES, weights, ratio=ratio, clip_range=0.01).loss
    expected = clipped(new.mean((1, 2)), old.mean((1, 2)), ADVANTAGES, 0.01)
    torch.testing.assert_close(got, expected, rtol=1e-13, atol=0)
    gradients = [torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (got, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=0)
    if ratio == "token":
        assert grpo_loss(new, old.mean((1, 2)), ADVANTAGES, weights, clip_range=0.01).loss == got


@pytest.mark.parametrize(
    ("ratio", "per_location_advantages"),
    [("token", False), ("token", True), ("location", False), ("location", True), ("sample", False)],
)
@pytest.mark.parametrize("clip", [(0.002, 0.003), (0.5, 0.5)])
def test_three_doors_to_one_loss(ratio, per_location_advantages, clip):
    """sde_step + grpo_loss, fused_grpo_loss, and for "token" sde_step with weights + any scalar loss."""
    plan, timestep, _, v, x, prev = one_step(dtype=torch.float64)
    v, weights = v.requires_grad_(), random_weights((3, 6, 8), torch.float64)
    advantages = torch.randn(3, 6, 8).double() if per_location_advantages else torch.tensor([1.5, -2.0, 7.0]).double()
    old_v = v.detach() + 0.02 * torch.randn(SHAPE).double()
    step = lambda v, **options: sde_step_with_logprob(plan, v, timestep, x, 0.7, prev, **options)
    old_mean = step(old_v)[2]
    new, old = step(v, per_location=True)[1], step(old_v, per_location=True)[1]
    losses = {"one call": grpo_loss(new, old, advantages, weights, ratio=ratio, clip_range=clip).loss}
    for name, stored in (("mean", dict(prev_sample_mean=old_mean)), ("log_probs", dict(log_probs=old))):
        losses[name] = fused_grpo_loss(
            plan, v, timestep, x, prev, advantages, weights, ratio=ratio, clip_range=clip, **stored
        ).loss
    if ratio == "token" and not per_location_advantages:
        r = (step(v, weights=weights)[1] - step(old_v)[1]).exp()
        a = advantages.clamp(-5, 5)
        losses["step"] = torch.maximum(-a * r, -a * r.clamp(1 - clip[0], 1 + clip[1])).mean()
    gradients = {name: torch.autograd.grad(loss, v, retain_graph=True)[0] for name, loss in losses.items()}
    for name in losses:
        # The schedule is float32, so the transition's coefficients agree with the step's to float32.
        torch.testing.assert_close(losses[name], losses["mean"], rtol=0, atol=1e-4, msg=name)
        peak = gradients["mean"].abs().max().item()
        torch.testing.assert_close(gradients[name], gradients["mean"], rtol=0, atol=1e-4 * peak, msg=name)
    assert gradients["mean"].abs().max() > 0


def test_fused_kl_and_guard():
    plan, timestep, _, v, x, prev = one_step(dtype=torch.float64)
    v = v.requires_grad_()
    advantages, reference = torch.tensor([1.0, -1.0, 0.5]).double(), v.detach() + 0.1
    _, log_prob, mean, std, sqrt_dt = sde_step_with_logprob(plan, v, timestep, x, 0.7, prev, return_sqrt_dt=True)
    _, old_log_prob, old_mean, _ = sde_step_with_logprob(plan, v.detach() + 0.02, timestep, x, 0.7, prev)
    mean_ref = sde_step_with_logprob(plan, reference, timestep, x, 0.7, prev)[2]
    call = lambda **options: fused_grpo_loss(
        plan, v, timestep, x, prev, advantages, prev_sample_mean=old_mean, clip_range=0.5, **options
    )
    kl = (((mean - mean_ref) ** 2).mean((1, 2, 3), keepdim=True) / (2 * std**2)).mean()
    got, expected = call(beta=0.3, model_output_ref=reference).loss, clipped(log_prob, old_log_prob, advantages, 0.5)
    torch.testing.assert_close(got, expected + 0.3 * kl, rtol=1e-4, atol=0)
    # GRPO-Guard, sample by sample because its scales are those of one timestep.
    scale = (sqrt_dt * std).flatten()
    bias = (mean - old_mean).square().mean((1, 2, 3)) / (2 * scale**2)
    r = ((log_prob - old_log_prob + bias) * scale).exp()
    guarded = (torch.maximum(-advantages * r, -advantages * r.clamp(0.5, 1.5)) / sqrt_dt.flatten() ** 2).mean()
    got = call(guard=True).loss
    torch.testing.assert_close(got, guarded, rtol=1e-4, atol=0)
    gradients = [torch.autograd.grad(loss, v, retain_graph=True)[0] for loss in (got, guarded)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())


def test_gradcheck_of_every_loss_whose_value_is_weighted():
    new, old = log_probs(True)
    weights = random_weights((6, 4, 5), torch.float64)
    for options in (dict(ratio="location", clip_range=(0.03, 0.04)), dict(ratio="sample", clip_range=0.001)):
        check = lambda x, options=options: grpo_loss(x, old, ADVANTAGES, weights, **options).loss
        assert torch.autograd.gradcheck(check, new)
    assert torch.autograd.gradcheck(lambda x: grpo_loss(x, old, ADVANTAGES, clip_range=0.01).loss, new)
    assert torch.autograd.gradcheck(lambda x: reinforce_loss(x, ADVANTAGES, weights), new)


@given(
    batch=st.integers(1, 4),
    rows=st.integers(1, 5),
    columns=st.integers(1, 5),
    ratio=st.sampled_from(["token", "location", "sample"]),
)
def test_on_policy_gradient_is_the_weighted_score(batch, rows, columns, ratio):
    """At the rollout's own policy every ratio has the gradient -A w d log_prob, and REINFORCE has it by definition."""
    new = torch.randn(batch, rows, columns, dtype=torch.float64, requires_grad=True)
    advantages, weights = torch.randn(batch).double(), random_weights((batch, rows, columns), torch.float64)
    loss = grpo_loss(new, new.detach(), advantages, weights, ratio=ratio, clip_range=0.1).loss
    expected = reinforce_loss(new, advantages, weights)
    gradients = [torch.autograd.grad(value, new)[0] for value in (loss, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(
        gradients[1], -(advantages.view(-1, 1, 1) * weights) / new.numel(), rtol=1e-12, atol=1e-15
    )


def test_loss_errors():
    new, old = log_probs(True)
    flat, flat_old = log_probs(False)
    ones = torch.ones(6, 4, 5, dtype=torch.float64)
    cases = (
        ((flat, flat_old, ADVANTAGES, ones), {}, "weights: log_prob has one number per sample"),
        ((new, old, ADVANTAGES, ones[:, :, :1]), {}, r"weights: got shape \(6, 4, 1\), expected \(6, 4, 5\)"),
        ((flat, flat_old[:, None], ADVANTAGES), {}, r"old_log_prob: got shape \(6, 1\), expected \(6,\)"),
        ((flat, flat_old, ADVANTAGES[:, None]), {}, r"advantages: got shape \(6, 1\), expected \(6,\) or \(6,\)"),
        (
            (new, old.mean((1, 2)), ADVANTAGES),
            dict(ratio="location"),
            "old_log_prob: got shape .* for ratio='location'",
        ),
        ((new, old, ones), dict(ratio="sample"), "advantages: ratio='sample' takes one per sample"),
        ((new, old, ADVANTAGES), dict(ratio="pixel"), "ratio: got 'pixel'"),
        ((new, old, ADVANTAGES), dict(clip_range=(-1e-4, 1e-4)), r"clip_range: got \(-0.0001, 0.0001\)"),
    )
    for arguments, options, words in cases:
        with pytest.raises(ValueError, match=words):
            grpo_loss(*arguments, **options)


@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
def test_a_log_ratio_is_limited_as_in_policy_loss(ratio):
    """Far off the policy: the same loss as the kernel's, to the limit of 30, and no gradient beyond it."""
    for far in (20.0, 29.0, 31.0, 100.0, 1e5):
        new = torch.tensor([[far, far], [-far, -far]], dtype=torch.float64, requires_grad=True)
        loss = grpo_loss(new, torch.zeros_like(new), torch.tensor([-1.0, 1.0]), ratio=ratio, clip_range=0.1).loss
        (gradient,) = torch.autograd.grad(loss, new)
        expected = (torch.tensor(min(far, 30.0)).double().exp() - torch.tensor(-min(far, 30.0)).double().exp()) / 2
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
        assert gradient.isfinite().all() and (gradient[0] != 0).all() == (far < 30)
        zero = grpo_loss(new, torch.zeros_like(new), torch.zeros(2), ratio=ratio)
        assert zero.loss == 0 and torch.equal(torch.autograd.grad(zero.loss, new)[0], torch.zeros_like(new))


@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_log_ratio_that_is_not_finite_makes_loss_and_gradient_nan(ratio, value):
    new = torch.zeros(2, 3, dtype=torch.float64)
    new[0, 1] = value
    new.requires_grad_()
    out = grpo_loss(new, torch.zeros(2, 3), torch.ones(2), ratio=ratio)
    (gradient,) = torch.autograd.grad(out.loss, new)
    assert out.loss.isnan() and out.approx_kl.isnan()
    assert gradient[0, 1].isnan() and gradient[1].isfinite().all()


LATENTS, PER_SAMPLE = torch.ones(2, 3, 4, 5), torch.ones(2)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: grpo_loss(3, PER_SAMPLE, PER_SAMPLE), TypeError, "log_prob: got int, expected a torch.Tensor"),
        (lambda: grpo_loss(PER_SAMPLE[0], PER_SAMPLE, PER_SAMPLE), ValueError, r"log_prob: got shape \(\), expected"),
        (
            lambda: grpo_loss(PER_SAMPLE[:0], PER_SAMPLE, PER_SAMPLE),
            ValueError,
            r"log_prob: got shape \(0,\), expected",
        ),
        (lambda: grpo_loss(PER_SAMPLE, None, PER_SAMPLE), TypeError, "old_log_prob: got NoneType"),
        (lambda: grpo_loss(PER_SAMPLE, PER_SAMPLE, [1, 2]), TypeError, "advantages: got list"),
        (lambda: grpo_loss(PER_SAMPLE, PER_SAMPLE, PER_SAMPLE.long()), TypeError, "advantages: got torch.int64"),
        (lambda: grpo_loss(*[PER_SAMPLE] * 3, clip_range=(1,)), ValueError, "clip_range: got 1 numbers, expected"),
        (lambda: grpo_loss(*[PER_SAMPLE] * 3, clip_range=None), TypeError, "clip_range: got NoneType, expected"),
        (
            lambda: grpo_loss(*[PER_SAMPLE] * 3, adv_clip_max=0),
            ValueError,
            "adv_clip_max: got 0, expected a number > 0",
        ),
        (lambda: grpo_loss(*[PER_SAMPLE] * 3, adv_clip_max=None), TypeError, "adv_clip_max: got NoneType, expected"),
        (lambda: reinforce_loss(None, PER_SAMPLE), TypeError, "log_prob: got NoneType"),
        (lambda: reinforce_loss(PER_SAMPLE, PER_SAMPLE, adv_clip_max=-1), ValueError, "adv_clip_max: got -1"),
        (lambda: weighted_gradient(None, PER_SAMPLE), TypeError, "x: got NoneType"),
        (lambda: weighted_gradient(PER_SAMPLE, PER_SAMPLE), ValueError, r"x: got shape \(2,\), expected"),
        (lambda: weighted_gradient(LATENTS, 3), TypeError, "weights: got int"),
        (lambda: sde_step_with_logprob(scheduler(), None, 1.0, LATENTS), TypeError, "model_output: got NoneType"),
        (lambda: sde_step_with_logprob(scheduler(), LATENTS, 1.0, 3), TypeError, "sample: got int"),
        (lambda: fused_grpo_loss(scheduler(), None, 1.0, LATENTS, LATENTS, PER_SAMPLE), TypeError, "model_output: got"),
        (
            lambda: scheduler_transition(scheduler(), 1.0, -1.0),
            ValueError,
            "noise_level: got -1.0, expected a number >=",
        ),
        (lambda: scheduler_transition(scheduler(), 1.0, torch.nan), ValueError, "noise_level: got nan"),
    ],
)
def test_wrong_arguments_are_one_clear_line(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
