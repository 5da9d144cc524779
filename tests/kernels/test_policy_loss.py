"""policy_loss: every implementation against float64 autograd, Flow-GRPO's scalar loss, and its numerical pitfalls."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import devices
import star_kernels as sk
from star_kernels import api

each_implementation = devices.each_implementation("policy_loss")


def make(shape, dtype=torch.float32, seed=0, drift=0.05, s=0.4):
    """A step taken by a policy whose velocity has since drifted. Returns arguments by name."""
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(device)
    batch = shape[0]
    places = (shape[0], shape[1]) if len(shape) == 3 else (shape[0], *shape[2:])
    transition = sk.Transition.gaussian(
        1 + 0.1 * draw(batch), -0.2 + 0.02 * draw(batch), torch.full((batch,), s), torch.full((batch,), 2.2 * s)
    )
    transition = sk.Transition(
        *(field.to(torch.float64 if dtype == torch.float64 else torch.float32) for field in transition)
    )
    sample, velocity = draw(*shape).to(dtype), draw(*shape).to(dtype)
    prev_sample, old_mean = sk.gaussian_step(sample, velocity, draw(*shape), transition)
    weights = draw(*places).abs() + 0.1
    weights = weights / weights.flatten(1).mean(1).view(-1, *(1,) * (len(places) - 1))
    return dict(
        velocity=(velocity.double() + drift * draw(*shape)).to(dtype),
        sample=sample,
        prev_sample=prev_sample,
        transition=transition,
        advantages=draw(batch).to(transition.a.dtype),
        weights=weights.to(transition.a.dtype),
        old_mean=old_mean,
    )


def to_double(arguments):
    convert = lambda x: x.double() if isinstance(x, torch.Tensor) else x
    out = {name: convert(value) for name, value in arguments.items()}
    out["transition"] = sk.Transition(*(field.double() for field in arguments["transition"]))
    return out


def run(arguments, **options):
    """(loss, statistics, gradient of the velocity)."""
    velocity = arguments["velocity"].detach().clone().requires_grad_()
    result = sk.policy_loss(**{**arguments, **options, "velocity": velocity})
    (gradient,) = torch.autograd.grad(result.loss, velocity)
    return result.loss.detach(), result.statistics, gradient


def flat(result):
    """What `run` gives, as a list of tensors."""
    loss, statistics, gradient = result
    return [loss, *statistics, gradient]


def flow_grpo(velocity, sample, prev_sample, transition, advantages, old_log_prob, clip, adv_clip=5.0):
    """Scalar Flow-GRPO written from its formulas: log-prob averaged over everything, ratio, clip, mean."""
    shape = (-1, 1, 1, 1)
    mean = transition.a.view(shape) * sample + transition.b.view(shape) * velocity
    s = transition.s.view(shape)
    log_prob = -((prev_sample - mean) ** 2) / (2 * s**2) - s.log() - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob.mean((1, 2, 3))
    ratio = torch.exp(log_prob - old_log_prob)
    adv = advantages.clamp(-adv_clip, adv_clip)
    return torch.maximum(-adv * ratio, -adv * ratio.clamp(1 - clip, 1 + clip)).mean()


@each_implementation
@pytest.mark.parametrize("clip", [1e-6, 1.0], ids=["clipped", "unclipped"])
@pytest.mark.parametrize("weights", ["none", "ones"])
def test_uniform_token_ratio_is_flow_grpo(impl, clip, weights):
    arguments = make((6, 4, 8, 6), drift=0.2)
    arguments["advantages"] = torch.tensor([1.5, -0.7, 9.0, -9.0, 0.3, -0.1])
    double = to_double(arguments)
    velocity = double["velocity"].clone().requires_grad_()
    old = sk.log_prob(double["prev_sample"], double["old_mean"], double["transition"])
    expected = flow_grpo(
        velocity, double["sample"], double["prev_sample"], double["transition"], double["advantages"], old, clip
    )
    (expected_gradient,) = torch.autograd.grad(expected, velocity)
    arguments["weights"] = None if weights == "none" else torch.ones_like(arguments["weights"])
    loss, statistics, gradient = run(arguments, clip_range=clip, impl=impl)
    shape = (-1, 1, 1, 1)
    mean = (
        double["transition"].a.view(shape) * double["sample"] + double["transition"].b.view(shape) * double["velocity"]
    )
    excess = torch.expm1(sk.log_prob(double["prev_sample"], mean, double["transition"]) - old)
    assert ((excess * double["advantages"] > 0).any()) and ((excess * double["advantages"] < 0).any())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=1e-4, atol=1e-6 * expected_gradient.abs().max().item()
    )
    assert (expected_gradient.flatten(1).abs().amax(1) == 0).any() == (clip < 1)
    assert statistics.clip_fraction == (1.0 if clip < 1 else 0.0)


def oracle(arguments, ratio, low, high, adv_clip, guard, kl_coef):
    """Loss, gradient, ratios and statistics in float64, from the definitions: autograd makes the derivatives."""
    double = to_double(arguments)
    channel = 2 if double["sample"].ndim == 3 else 1
    shape = (-1, *(1,) * (double["sample"].ndim - 1))
    at = lambda name: getattr(double["transition"], name)
    velocity = double["velocity"].clone().requires_grad_()
    mean_of = lambda v: at("a").view(shape) * double["sample"] + at("b").view(shape) * v
    mean, x = mean_of(velocity), double["prev_sample"]
    batch = x.shape[0]
    precision = at("precision").view(shape)
    if guard:
        old = double["old_mean"]
        per_channel = ((x - old) ** 2 - (x - mean) ** 2 + (mean - old) ** 2) * precision * at("s").view(shape)
    elif "old_mean" in double:
        per_channel = ((x - double["old_mean"]) ** 2 - (x - mean) ** 2) * precision
    else:
        per_channel = -((x - mean) ** 2) * precision - at("log_norm").view(shape)
    delta = per_channel.mean(channel).flatten(1)  # (B, P)
    if "old_log_prob" in double:
        delta = delta - double["old_log_prob"].reshape(batch, -1)
    weights = torch.ones_like(delta) if double["weights"] is None else double["weights"].reshape(batch, -1)
    adv = double["advantages"].clamp(-adv_clip, adv_clip).reshape(batch, -1)
    factor = double["step_weights"][:, None] if double.get("step_weights") is not None else 1.0
    if guard:
        factor = factor * (at("precision") / at("kl_precision"))[:, None]
    if ratio == "token":
        log_ratio = delta.mean(1, keepdim=True).detach() + delta - delta.detach()
    elif ratio == "location":
        log_ratio = delta
    else:
        log_ratio = (weights * delta).mean(1, keepdim=True)
    r, w = torch.exp(log_ratio), torch.ones_like(delta) if ratio == "sample" else weights
    loss = (factor * w * torch.maximum(-adv * r, -adv * r.clamp(1 - low, 1 + high))).mean()
    (gradient,) = torch.autograd.grad(loss, velocity, retain_graph=True)
    below, above = (r < 1 - low).double().mean(), (r > 1 + high).double().mean()
    statistics = dict(
        approx_kl=0.5 * log_ratio.square().mean(),
        clip_fraction=below + above,
        clip_fraction_low=below,
        clip_fraction_high=above,
        ratio_mean=r.mean(),
        ratio_min=r.min(),
        ratio_max=r.max(),
        kl=torch.zeros((), dtype=torch.float64),
        nonfinite=torch.zeros((), dtype=torch.float64),
    )
    if double.get("reference_velocity") is not None:
        gap = ((mean - mean_of(double["reference_velocity"])) ** 2 * at("kl_precision").view(shape)).mean()
        loss = loss + kl_coef * gap
        statistics["kl"] = gap
        gradient = gradient + torch.autograd.grad(kl_coef * gap, velocity)[0]
    return loss.detach(), gradient, r.detach(), {name: value.detach() for name, value in statistics.items()}


@each_implementation
@given(
    layout=st.sampled_from(["planar", "video", "packed", "strided", "channels_last", "expanded"]),
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 7)),
    ratio=st.sampled_from(["token", "location", "sample"]),
    old=st.sampled_from(["mean", "log_prob", "log_prob_map", "guard"]),
    advantages=st.sampled_from(["image", "location"]),
    weighted=st.booleans(),
    stepped=st.booleans(),
    kl=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    clip=st.sampled_from([(0.0, 0.0), (1e-3, 2e-3), (0.2, 0.3)]),
)
def test_value_gradient_and_statistics(impl, layout, size, ratio, old, advantages, weighted, stepped, kl, dtype, clip):
    batch, channels, rows, columns = size
    shape = {"packed": (batch, rows * columns, channels), "video": (batch, channels, 2, rows, columns)}.get(
        layout, size
    )
    arguments = make(shape, dtype, seed=sum(size), drift=0.1)
    if ratio == "sample":
        advantages = "image"
    places = arguments["weights"].shape
    if advantages == "location":
        arguments["advantages"] = torch.randn(places, dtype=arguments["weights"].dtype)
    if not weighted:
        arguments["weights"] = None
    if stepped:
        arguments["step_weights"] = torch.rand(batch, dtype=arguments["transition"].a.dtype)
    kl_coef = 0.3 if kl else 0.0
    if kl:
        arguments["reference_velocity"] = arguments["velocity"] + 0.1 * torch.randn(shape).to(dtype)
    needs_map = ratio == "location" or (ratio == "sample" and weighted)
    if old == "log_prob" and needs_map:
        old = "log_prob_map"
    if old.startswith("log_prob"):
        old_mean = arguments.pop("old_mean")
        arguments["old_log_prob"] = sk.log_prob(
            arguments["prev_sample"], old_mean, arguments["transition"], per_location=old == "log_prob_map"
        )
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        if layout == "strided" and value.ndim > 1:
            arguments[name] = value.repeat_interleave(2, -1)[..., ::2]
        elif layout == "channels_last" and value.ndim == 4:
            arguments[name] = value.contiguous(memory_format=torch.channels_last)
        elif layout == "expanded" and name in ("weights", "step_weights", "advantages"):
            arguments[name] = value[:1].expand_as(value)
    guard = old == "guard"
    expected, expected_gradient, r, statistics = oracle(arguments, ratio, *clip, 5.0, guard, kl_coef)
    # Rounding may put a ratio on the other side of an edge, where the gradient jumps: such draws decide nothing.
    rounding = 1e-10 if dtype == torch.float64 else 1e-4
    on_edge = min((r - edge).abs().min().item() for edge in (1 - clip[0], 1 + clip[1])) < rounding
    loss, got, gradient = run(arguments, ratio=ratio, clip_range=clip, guard=guard, kl_coef=kl_coef, impl=impl)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # Subtracting log-probs of order one costs eps absolutely; everything else is relative to sums of C * P terms.
    tolerance = 200 * (channels * rows * columns + 10) * eps
    assert gradient.dtype == dtype and gradient.shape == torch.Size(shape)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    size = expected_gradient.abs()
    if not on_edge:
        rtol = tolerance + torch.finfo(dtype).eps
        # float16 gradients below its smallest normal number lose bits.
        floor = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 0.0
        torch.testing.assert_close(
            gradient.double(), expected_gradient, rtol=rtol, atol=tolerance * size.max().item() + floor
        )
    rtol = tolerance + torch.finfo(torch.float32).eps
    for name, value in got._asdict().items():
        atol = tolerance
        if name == "approx_kl":
            atol *= r.log().abs().max().item() + tolerance
        if not (on_edge and name.startswith("clip")):
            torch.testing.assert_close(value.double(), statistics[name], rtol=rtol, atol=atol, msg=name)


@each_implementation
@pytest.mark.parametrize("shape", [(2, 3, 200, 180), (3, 1500, 24)], ids=["planar", "packed"])
def test_many_locations(impl, shape):
    arguments = make(shape, drift=0.1)
    expected, expected_gradient, _, statistics = oracle(arguments, "token", 1.0, 1.0, 5.0, False, 0.0)
    loss, got, gradient = run(arguments, clip_range=1.0, impl=impl)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.approx_kl.double(), statistics["approx_kl"], rtol=1e-4, atol=0)
    size = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5 * size)


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("old", ["mean", "guard", "log_prob"])
@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (2, 5, 3)], ids=["planar", "packed"])
def test_gradcheck(impl, ratio, old, shape):
    # `token` hides its true derivative from differences of its value, but for equal weights, where it is `sample`.
    arguments = make(shape, torch.float64)
    if ratio == "token":
        arguments["weights"] = None
    if old == "log_prob":
        arguments["old_log_prob"] = sk.log_prob(
            arguments["prev_sample"], arguments.pop("old_mean"), arguments["transition"], per_location=True
        )
    velocity = arguments.pop("velocity").requires_grad_()
    options = dict(ratio=ratio, clip_range=(0.3, 0.4), guard=old == "guard", kl_coef=0.1, impl=impl)
    options["reference_velocity"] = torch.randn(velocity.shape, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda v: sk.policy_loss(v, **arguments, **options).loss, velocity)


@each_implementation
def test_statistics_of_locations_on_both_sides(impl):
    """A case in which every statistic has something to say."""
    arguments = make((4, 3, 4, 5), torch.float64, drift=0.5)
    arguments["reference_velocity"] = torch.randn(4, 3, 4, 5, dtype=torch.float64)
    expected = oracle(arguments, "location", 0.1, 0.2, 5.0, False, 0.0)[3]
    assert expected["clip_fraction_low"] > 0 and expected["clip_fraction_high"] > 0 and expected["kl"] > 0
    got = sk.policy_loss(**arguments, ratio="location", clip_range=(0.1, 0.2), impl=impl).statistics
    for name, value in got._asdict().items():
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), expected[name], rtol=2e-7, atol=0, msg=name)


@each_implementation
@pytest.mark.parametrize(
    ("ratio", "advantages"),
    [("token", "image"), ("token", "location"), ("location", "image"), ("location", "location"), ("sample", "image")],
)
@pytest.mark.parametrize("weights", ["none", "positive", "zero"])
@pytest.mark.parametrize("shape", [(3, 3, 40, 31), (2, 1240, 8)], ids=["planar", "packed"])
def test_statistics_are_the_reference_ones(impl, ratio, advantages, weights, shape):
    """Every one of them, on samples of several tiles, with weights that are all 0, of both signs."""
    arguments = make(shape, torch.float64, drift=0.5)
    if advantages == "location":
        arguments["advantages"] = torch.randn_like(arguments["weights"])
    if weights == "zero":
        arguments["weights"][0] *= 0
        arguments["weights"][0, ..., ::2] *= -1
    elif weights == "none":
        arguments["weights"] = None
    options = dict(ratio=ratio, clip_range=(1e-3, 2e-3), kl_coef=0.1, reference_velocity=arguments["sample"])
    _, expected, _ = run(arguments, **options, impl="reference")
    _, statistics, _ = run(arguments, **options, impl=impl)
    torch.testing.assert_close(statistics.values, expected.values, rtol=1e-6, atol=1e-7)


@each_implementation
def test_on_policy_ratio_is_exactly_one(impl):
    arguments = make((3, 4, 6, 6), drift=0.0)
    _, statistics, gradient = run(arguments, clip_range=0.0, impl=impl)
    assert statistics.ratio_mean == statistics.ratio_min == statistics.ratio_max == 1
    assert statistics.clip_fraction == 0
    assert gradient.abs().flatten(1).amax(1).min() > 0  # the edge 1 +- 0 belongs to the inside


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
def test_zero_advantage_and_zero_weight_give_no_gradient(impl, ratio):
    arguments = make((3, 4, 6, 6))
    arguments["advantages"] = torch.tensor([0.0, 1.0, -1.0])
    arguments["weights"][:, :2] = 0
    loss, statistics, gradient = run(arguments, ratio=ratio, clip_range=1.0, impl=impl)
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
    assert torch.equal(gradient[:, :, :2], torch.zeros_like(gradient[:, :, :2]))
    assert loss.isfinite() and gradient[1:, :, 2:].abs().min() > 0
    arguments["weights"][:] = 0
    loss, statistics, gradient = run(arguments, ratio=ratio, impl=impl)
    assert loss == 0 or ratio == "sample"  # whose ratio is then 1
    assert statistics.values.isfinite().all() and torch.equal(gradient, torch.zeros_like(gradient))


def one_element(log_ratio, dtype=torch.float32):
    """A step of a single element with exactly this log-ratio and a gradient of -A r 2 precision."""
    scalar = lambda value: torch.full((1, 1, 1, 1), value, dtype=dtype)
    old, terms = (-2.0, 8.0) if log_ratio > 0 else (1.0, -1.0)  # (0 - old)((1 - 0) + (1 - old))
    fields = [torch.full((1,), value, dtype=dtype) for value in (1.0, 1.0, 1.0, log_ratio / terms, 0.0, 1.0)]
    return dict(
        velocity=scalar(0.0),
        sample=scalar(0.0),
        prev_sample=scalar(1.0),
        old_mean=scalar(old),
        transition=sk.Transition(*fields),
    )


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [2.0**-19, 2.0**-2])
@pytest.mark.parametrize("sign", [1, -1], ids=["high", "low"])
def test_the_edge_of_the_clip_range_belongs_to_its_inside(impl, ratio, dtype, size, sign):
    """Of neighboring numbers for the clip range one is exactly the ratio's distance from 1. From it on the gradient is
    whole, below it nothing is left; a strict comparison, or a ratio rounded before 1 is subtracted, would fail."""
    arguments = one_element(sign * size, dtype)
    whole = -math.exp(sign * size) * 2 * arguments["transition"].precision.item()
    edge, upward = torch.tensor(abs(math.expm1(sign * size)), dtype=dtype), torch.tensor(torch.inf, dtype=dtype)
    for _ in range(4):
        edge = torch.nextafter(edge, -upward)
    inside = []
    for _ in range(9):
        clip = (9.0, edge.item()) if sign > 0 else (edge.item(), 9.0)
        arguments["advantages"] = torch.full((1,), float(sign), dtype=dtype)  # the clip stops this direction
        loss, statistics, gradient = run(arguments, ratio=ratio, clip_range=clip, impl=impl)
        inside.append(gradient.item() != 0)
        assert statistics.clip_fraction == (0 if inside[-1] else 1)
        # 200 eps: the ratio and its product, and 1 - e against e
        assert loss.item() == pytest.approx(-sign * math.exp(sign * size), rel=200 * torch.finfo(dtype).eps)
        assert gradient.item() in (0, pytest.approx(sign * whole, rel=200 * torch.finfo(dtype).eps))
        arguments["advantages"] = -arguments["advantages"]  # and never that one
        assert run(arguments, ratio=ratio, clip_range=clip, impl=impl)[2].item() == pytest.approx(-sign * whole)
        edge = torch.nextafter(edge, upward)
    assert inside == sorted(inside) and True in inside and False in inside


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("form", ["delta", "log_prob"])
def test_log_ratios_of_a_hundred_stay_finite(impl, ratio, sign, form):
    arguments = one_element(100.0 * sign)
    if form == "log_prob":
        mean = arguments.pop("old_mean")
        arguments["old_log_prob"] = sk.log_prob(arguments["prev_sample"], mean, arguments["transition"], True)
    limited = math.exp(30 * sign)
    for advantage, expected in ((2.0, -2 * min(limited, 1.2)), (-2.0, 2 * max(limited, 0.8))):
        arguments["advantages"] = torch.tensor([advantage])
        loss, statistics, gradient = run(arguments, ratio=ratio, clip_range=0.2, impl=impl)
        assert loss.item() == pytest.approx(expected, rel=1e-5)
        assert gradient.item() == 0 and statistics.values.isfinite().all() and statistics.nonfinite == 0
        assert statistics.ratio_max.item() == pytest.approx(limited, rel=1e-5, abs=1e-7)


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["velocity", "sample", "prev_sample", "old_mean"])
def test_nonfinite_inputs_are_counted_and_not_hidden(impl, ratio, bad, name):
    arguments = make((2, 3, 4, 4))
    arguments[name][1, 0, 2, 3] = bad
    loss, statistics, gradient = run(arguments, ratio=ratio, impl=impl)
    assert loss.isnan() and statistics.nonfinite == 1
    assert statistics.ratio_min.isnan() and statistics.ratio_max.isnan()
    assert gradient[0].isfinite().all() and not gradient[1].isfinite().all()


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("name", ["advantages", "weights"])
def test_nan_factors_reach_the_loss(impl, ratio, name):
    arguments = make((2, 3, 4, 4))
    arguments[name].view(-1)[-1] = torch.nan
    loss, _, gradient = run(arguments, ratio=ratio, impl=impl)
    assert loss.isnan() and gradient[0].isfinite().all() and gradient[1].isnan().any()


@each_implementation
def test_delta_form_is_exact_where_subtracting_log_probs_is_not(impl):
    """Early step, s = 0.7: the log-ratio is 1e-5, and float32 log-probs of order one are a few 1e-7 apart."""
    arguments = make((8, 16, 32, 32), drift=3e-4, s=0.7)
    exact = oracle(arguments, "token", 1.0, 1.0, 5.0, False, 0.0)[2][:, 0].log()
    a, b = (field.view(-1, 1, 1, 1) for field in arguments["transition"][:2])
    new, old = (
        sk.log_prob(arguments["prev_sample"], mean, arguments["transition"])
        for mean in (a * arguments["sample"] + b * arguments["velocity"], arguments["old_mean"])
    )
    for i in range(8):
        one = {name: x[i : i + 1] for name, x in arguments.items() if isinstance(x, torch.Tensor)}
        one["transition"] = arguments["transition"].rows(slice(i, i + 1))
        # approx_kl = log_ratio^2 / 2 shows the log-ratio without the 1 + that float32 rounds away.
        log_ratio = math.sqrt(2 * sk.policy_loss(**one, impl=impl).statistics.approx_kl.item())
        assert abs(log_ratio - exact[i].abs().item()) < 1e-9
    assert ((new - old).double() - exact).abs().max() > 5e-8


STEPS = torch.tensor([1.0, 0.964, 0.923, 0.875, 0.818, 0.75, 0.667, 0.562, 0.429, 0.25, 0.009, 0.0])


@each_implementation
@pytest.mark.parametrize("step", range(11))
@pytest.mark.parametrize("guard", [False, True])
def test_every_step_of_a_schedule(impl, step, guard):
    """From sigma = 1, where Flow-GRPO's std takes the second sigma, to the last step, whose s of 0.006 makes it nearly
    deterministic: a precision of 14,000."""
    steps = STEPS.to(torch.get_default_device())
    sigma, dt = steps[step].double(), (steps[step + 1] - steps[step]).double()
    std = 0.7 * (sigma / (1 - (steps[1].double() if step == 0 else sigma))).sqrt()
    fields = (1 + std**2 / (2 * sigma) * dt, (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt, std * (-dt).sqrt(), std)
    transition = sk.Transition.gaussian(*(field.expand(2) for field in fields))
    s = transition.s[0].item()
    assert step < 10 or s < 0.0065
    arguments = make((2, 4, 8, 8), drift=0.0) | dict(transition=sk.Transition(*(field.float() for field in transition)))
    noise = torch.randn(arguments["sample"].shape)
    arguments["prev_sample"], arguments["old_mean"] = sk.gaussian_step(
        arguments["sample"], arguments["velocity"], noise, arguments["transition"]
    )
    # A drift that moves the mean by a hundredth of its noise, whatever the step makes of it.
    drift = 0.01 * s / fields[1].abs().item()
    arguments["velocity"] = arguments["velocity"] + drift * torch.randn(noise.shape)
    expected, expected_gradient, r, _ = oracle(arguments, "token", 0.5, 0.5, 5.0, guard, 0.0)
    assert (r != 1).all()
    loss, _, gradient = run(arguments, clip_range=0.5, guard=guard, impl=impl)
    # The float32 mean is of order 4 and off by eps of that, which is measured in units of s.
    tolerance = 16 * torch.finfo(torch.float32).eps * (1 + 1 / s)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=0)
    peak = expected_gradient.abs().max().item()
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=tolerance, atol=tolerance * peak)


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("shape", [(5, 4, 33, 17), (1, 3, 95, 97)], ids=["samples", "tiles"])
def test_same_bits_for_any_number_of_threads_and_every_run(impl, ratio, shape, at_thread_counts):
    arguments = make(shape)
    first, *others = at_thread_counts(lambda: run(arguments, ratio=ratio, impl=impl))
    for other in (*others, run(arguments, ratio=ratio, impl=impl)):
        assert all(torch.equal(x, y) for x, y in zip(flat(first), flat(other), strict=True))


@pytest.mark.parametrize("impl", ["native", "cuda_forward"])
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
def test_log_ratios_do_not_depend_on_the_batch(impl, ratio):
    arguments = make((3, 3, 95, 97))
    operator = getattr(torch.ops.star, f"policy_loss_{impl}")

    def log_ratio(rows):
        tensors = [arguments[name][rows] for name in ("velocity", "sample", "prev_sample")]
        step = [field[rows] for field in arguments["transition"]]
        rest = [arguments[name][rows] for name in ("advantages", "weights", "old_mean")]
        return operator(*tensors, *step, *rest, None, None, None, ratio, 0.1, 0.1, 5.0, 0.0, False)[2]

    assert torch.equal(log_ratio(slice(1, 2)), log_ratio(slice(0, 3))[1:2])


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
def test_only_the_velocity_gets_a_gradient(impl, ratio):
    arguments = make((2, 3, 4, 4))
    names = ("velocity", "sample", "prev_sample", "advantages", "weights", "old_mean", "reference_velocity")
    arguments["reference_velocity"] = torch.randn(2, 3, 4, 4)
    for name in names:
        arguments[name] = arguments[name].clone().requires_grad_()
    loss = sk.policy_loss(**arguments, ratio=ratio, kl_coef=0.1, impl=impl).loss
    gradients = torch.autograd.grad(loss, [arguments[name] for name in names], allow_unused=True)
    assert gradients[0] is not None and all(gradient is None for gradient in gradients[1:])


@each_implementation
def test_backward_scales_and_refuses_a_second_derivative(impl):
    arguments = make((2, 3, 4, 4))
    velocity = arguments.pop("velocity").requires_grad_()
    loss = sk.policy_loss(velocity, **arguments, impl=impl).loss
    (plain,) = torch.autograd.grad(loss, velocity, retain_graph=True)
    (scaled,) = torch.autograd.grad(0.25 * loss, velocity, retain_graph=True)
    assert torch.equal(scaled, 0.25 * plain)
    (again,) = torch.autograd.grad(loss, velocity, create_graph=True)
    assert torch.equal(again, plain)
    with pytest.raises(RuntimeError, match="policy_loss: no second derivative"):
        again.sum().backward()


@each_implementation
def test_functional_gradients_are_those_of_autograd(impl):
    arguments = make((2, 3, 4, 4))
    _, statistics, expected = run(arguments, impl=impl)
    velocity = arguments.pop("velocity")

    def loss_of(velocity):
        loss, statistics = sk.policy_loss(velocity, **arguments, impl=impl)
        return loss, statistics.values

    gradient, values = torch.func.grad(loss_of, has_aux=True)(velocity)
    assert torch.equal(gradient, expected) and torch.equal(values, statistics.values)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # one call of the kernel for each entry
@each_implementation
def test_vmap_and_forward_mode(impl):
    """A batch of losses and their gradients; a derivative in forward mode is refused, for tensors of no values too."""
    arguments = make((2, 3, 4, 4))
    velocity = arguments.pop("velocity")
    several = torch.stack([velocity, 1.001 * velocity])
    loss = lambda velocity, **changes: sk.policy_loss(velocity, **arguments | changes, impl=impl).loss
    assert torch.equal(torch.vmap(loss)(several), torch.stack([loss(one) for one in several]))
    gradients = torch.vmap(torch.func.grad(loss))(several)
    assert torch.equal(gradients, torch.stack([torch.func.grad(loss)(one) for one in several]))
    advantages = torch.stack([arguments["advantages"], -arguments["advantages"]])
    apart = torch.stack([loss(velocity, advantages=one) for one in advantages])
    assert torch.equal(torch.vmap(lambda one: loss(velocity, advantages=one))(advantages), apart)
    deviations = arguments["transition"].s.expand(2, -1)
    of_s = lambda s: loss(velocity, transition=arguments["transition"]._replace(s=s))
    assert torch.equal(torch.vmap(of_s)(deviations), loss(velocity).expand(2))
    for derivative in (torch.func.jacfwd(loss), lambda v: torch.func.jvp(loss, (v,), (v,))):
        with pytest.raises(RuntimeError, match="forward mode"):
            derivative(velocity)


@each_implementation
def test_tensors_of_no_values(impl):
    """Those of FakeTensorMode, forwards and backwards: nothing is read of them."""
    arguments = make((2, 3, 4, 4))
    with FakeTensorMode() as mode:
        fake = {
            name: type(x)(*map(mode.from_tensor, x)) if isinstance(x, sk.Transition) else mode.from_tensor(x)
            for name, x in arguments.items()
            if x is not None
        }
        velocity = fake.pop("velocity").requires_grad_()
        (gradient,) = torch.autograd.grad(sk.policy_loss(velocity, **fake, impl=impl).loss, velocity)
    assert gradient.shape == velocity.shape


@each_implementation
def test_the_gradient_is_made_when_it_is_asked_for(impl):
    """Under no_grad nothing of the velocity's size comes into being, elsewhere than on the CPU's native kernels neither
    before the backward pass."""
    arguments = make((2, 3, 4, 4))
    arguments["velocity"].requires_grad_()
    seen = []

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    with Operators():
        with torch.no_grad():
            sk.policy_loss(**arguments, impl=impl)
        loss = sk.policy_loss(**arguments, impl=impl).loss
        early = impl == "native" and loss.device.type == "cpu"
        loss.backward()
    expected = ["policy_loss", "policy_loss_with_gradient"] if early else ["policy_loss"] * 2 + ["policy_loss_gradient"]
    assert [name for name in seen if name.startswith("policy_loss")] == [f"{name}_{impl}.default" for name in expected]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("form", ["delta", "guard", "log_prob"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_with_gradient_has_the_bits_of_both(ratio, form, dtype, at_thread_counts):
    both, loss, gradient = (
        getattr(torch.ops.star, f"policy_loss{name}_native") for name in ("_with_gradient", "", "_gradient")
    )
    for shape, kl_coef in (((3, 4, 70, 71), 0.0), ((3, 4, 5, 3), 0.3), ((1, 5000, 7), 0.0), ((3, 50, 16), 0.3)):
        with torch.device("cpu"):
            arguments = make(shape, dtype)
            arguments["old_log_prob"] = torch.rand(shape[0]) if form == "log_prob" else None
        old_mean = None if form == "log_prob" else arguments["old_mean"]
        rest = (
            *(arguments[name] for name in ("velocity", "sample", "prev_sample")), *arguments["transition"],
            arguments["advantages"], arguments["weights"], old_mean, arguments["old_log_prob"],
            arguments["sample"] if kl_coef else None, None, ratio, 0.1, 0.1, 5.0, kl_coef, form == "guard",
        )  # fmt: skip
        *expected, log_ratio = loss(*rest)
        expected += [log_ratio, gradient(torch.ones_like(expected[0]), log_ratio, *rest)]
        for result in at_thread_counts(lambda rest=rest: both(*rest)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


class Undefined(torch.autograd.Function):
    """The identity, whose gradient is none at all."""

    @staticmethod
    def forward(ctx, value):
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


@each_implementation
def test_backward_passes_of_every_kind(impl):
    """Scaled, repeated, with a graph, not asked for: each has the gradient, and spoils no other's."""
    arguments = make((2, 3, 4, 4))
    velocity = arguments["velocity"].requires_grad_()
    expected = run(arguments, impl=impl)[2]
    loss = sk.policy_loss(**arguments, impl=impl).loss
    backward = lambda loss, **options: torch.autograd.grad(loss, velocity, **options)[0]
    close = lambda got, factor: torch.testing.assert_close(got, factor * expected, rtol=1e-6, atol=0)
    first = backward(0.5 * loss, retain_graph=True)
    second = backward(loss, retain_graph=True)
    third = backward(loss, create_graph=True)
    assert torch.equal(second, expected) and torch.equal(third, expected)
    for got, factor in ((first, 0.5), (backward(-3.0 * loss), -3.0)):
        close(got, factor)
    undefined = backward(Undefined.apply(sk.policy_loss(**arguments, impl=impl).loss), allow_unused=True)
    assert undefined is None or not undefined.any()


def test_statistics_are_views_that_unpack_like_a_named_tuple():
    statistics = sk.policy_loss(**make((2, 3, 4, 4))).statistics
    assert statistics._fields == tuple(statistics._asdict()) and len(statistics) == len(statistics._fields) == 9
    for name, value, one in zip(statistics._fields, statistics.values, statistics, strict=True):
        assert getattr(statistics, name) == value == one == statistics._asdict()[name]
    with pytest.raises(AttributeError, match="Statistics has no 'gradient_share', expected one of"):
        statistics.gradient_share  # noqa: B018


@each_implementation
def test_under_autocast_the_loss_keeps_its_bits(impl):
    """A model under autocast gives a bfloat16 velocity; the loss is what it is for that velocity without autocast."""
    arguments = make((2, 3, 4, 4))
    model = torch.nn.Conv2d(3, 3, 1)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        velocity = model(arguments["sample"])
        loss = sk.policy_loss(**{**arguments, "velocity": velocity}, clip_range=1.0, impl=impl).loss
    assert velocity.dtype == torch.bfloat16
    (gradient,) = torch.autograd.grad(loss, velocity, retain_graph=True)
    expected, _, expected_gradient = run({**arguments, "velocity": velocity.detach()}, clip_range=1.0, impl=impl)
    assert torch.equal(loss.detach(), expected) and torch.equal(gradient, expected_gradient)
    loss.backward()
    assert model.weight.grad.abs().min() > 0


@each_implementation
def test_a_gradient_scaler_saves_float16_gradients(impl):
    """At 512 px gradients are about 1e-6, of which float16 keeps five bits: the scaler's factor must come before."""
    arguments = make((9, 16, 64, 64), torch.float16)
    arguments["weights"] = None
    _, expected, _, _ = oracle(arguments, "token", 1.0, 1.0, 5.0, False, 0.0)
    velocity = arguments.pop("velocity").requires_grad_()
    loss = sk.policy_loss(velocity, **arguments, clip_range=1.0, impl=impl).loss
    (gradient,) = torch.autograd.grad(65536.0 * loss, velocity)
    assert gradient.dtype == torch.float16
    error = (gradient.double() / 65536 - expected).abs()
    assert (error <= 1e-3 * expected.abs() + 1e-5 * expected.abs().max()).all()


@each_implementation
def test_opcheck(impl):
    operator = getattr(torch.ops.star, f"policy_loss_{impl}").default
    gradient = getattr(torch.ops.star, f"policy_loss_gradient_{impl}").default
    for shape, ratio, layout in (
        ((2, 3, 4, 4), "token", torch.contiguous_format),
        ((2, 3, 4, 4), "sample", torch.channels_last),
        ((2, 5, 3), "location", torch.contiguous_format),
    ):
        arguments = make(shape)
        velocity = arguments["velocity"].contiguous(memory_format=layout)
        sample = arguments["sample"].contiguous(memory_format=layout)
        rest = (
            velocity,
            sample,
            arguments["prev_sample"],
            *arguments["transition"],
            arguments["advantages"],
            arguments["weights"],
            *((arguments["old_mean"], None) if ratio == "token" else (None, arguments["weights"])),
            sample,
            torch.rand(2),
            *(ratio, 0.1, 0.1, 5.0, 0.3, False),
        )
        torch.library.opcheck(operator, rest)
        log_ratio = operator(*rest)[2]
        assert log_ratio.shape == ((2, 5) if ratio == "location" else (2,))
        torch.library.opcheck(gradient, (torch.tensor(0.5), log_ratio, *rest))


@each_implementation
def test_compiles_without_a_graph_break(impl):
    arguments = make((2, 3, 4, 4))
    velocity = arguments["velocity"].requires_grad_()
    expected = run(arguments, impl=impl)

    def step(velocity):
        return sk.policy_loss(**{**arguments, "velocity": velocity * 1.0}, impl=impl).loss * 2

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(velocity)
    assert torch.equal(loss.detach(), 2 * expected[0])
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert torch.equal(gradient, 2 * expected[2])


def test_inductor_compiles_the_operators_in_one_graph():
    query, key, index = torch.randn(2, 2, 12, 8), torch.randn(2, 2, 20, 8), torch.tensor([[[13, 14], [15, -1]]])
    sample = torch.randn(2, 4, 6, 8).contiguous(memory_format=torch.channels_last)
    velocity, noise = torch.randn(2, 2, 4, 6, 8).unbind(0)
    step = make((2, 4, 6, 8))["transition"]

    def everything(query, key, sample, velocity, noise):
        weights = sk.allocate(sk.attention_maps(query, key, index.expand(2, -1, -1)), (3, 4), smooth=1.0)
        prev_sample, mean = sk.gaussian_step(sample, velocity * 0.9, noise, step)
        loss = sk.policy_loss(velocity, sample, prev_sample, step, noise[:, 0, 0, 0], weights, old_mean=mean).loss
        return weights, prev_sample, mean, loss

    arguments = (query, key, sample, velocity.requires_grad_(), noise)
    compiled = torch.compile(everything, fullgraph=True)(*arguments)
    eager = everything(*arguments)
    for got, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert torch.equal(*(torch.autograd.grad(out[-1], velocity)[0] for out in (compiled, eager)))


def test_explicit_implementation_never_falls_back(monkeypatch):
    arguments = make((1, 2, 3, 3))
    monkeypatch.setenv("STAR_IMPL", "nonsense")
    with pytest.raises(ValueError, match="impl: got 'nonsense'"):
        sk.policy_loss(**arguments)
    monkeypatch.setattr("star_kernels.native.REASON", "not built")
    monkeypatch.setattr(api, "choose", api.choose.__wrapped__)  # which remembers what was built
    with pytest.raises(RuntimeError, match="impl='native': not built"):
        sk.policy_loss(**arguments, impl="native")


@each_implementation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_a_reference_velocity_keeps_its_bits_beside_a_narrow_velocity(impl, dtype, wide):
    """Rounded to the velocity's type it would be the velocity: KL and its gradient would be 0."""
    arguments = make((2, 3, 4, 8), dtype)
    arguments["reference_velocity"] = arguments["velocity"].to(wide) + 1e-4
    _, statistics, gradient = run(arguments, kl_coef=1e3, advantages=torch.zeros(2), impl=impl)
    expected = run(to_double(arguments), kl_coef=1e3, advantages=torch.zeros(2).double(), impl="reference")
    # The difference of 1e-4 of two numbers of order 1 in float32, or of the velocity in float64's reference.
    assert expected[1].kl > 0
    torch.testing.assert_close(statistics.kl, expected[1].kl, rtol=0.02, atol=0)
    torch.testing.assert_close(gradient.double(), expected[2], rtol=0.02, atol=expected[2].abs().max().item() * 0.02)


@each_implementation
def test_a_gradient_in_another_type_than_the_arithmetic(impl):
    """Made in float64 and converted: a copy of it must not be taken before it is there."""
    arguments = make((2, 3, 32, 32))
    arguments["sample"] = arguments["sample"].double()
    for _ in range(8):  # memory that is not written has other bits every time
        got = run(arguments, clip_range=10.0, impl=impl)
        expected = run(to_double(arguments), clip_range=10.0, impl="reference")
        assert got[2].dtype == torch.float32
        torch.testing.assert_close(got[2].double(), expected[2], rtol=1e-6, atol=1e-6 * expected[2].abs().max().item())


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_nan_shows_in_every_statistic_of_the_ratio(impl, ratio, row):
    arguments = make((3, 2, 4, 8))
    arguments["velocity"] = arguments["velocity"].clone()
    arguments["velocity"][row, 0, 1, 2] = torch.nan
    loss, statistics, _ = run(arguments, ratio=ratio, impl=impl)
    assert loss.isnan() and statistics.nonfinite == 1
    for name in ("approx_kl", "ratio_mean", "ratio_min", "ratio_max"):
        assert getattr(statistics, name).isnan(), name
    assert statistics.clip_fraction.isfinite()


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
def test_infinite_numbers_stay_where_they_are(impl, ratio):
    arguments = make((2, 2, 4, 8))
    step = arguments["transition"]
    _, statistics, gradient = run(arguments, ratio=ratio, impl=impl)
    # Nobody asks for the KL term.
    kl_precision = torch.full_like(step.kl_precision, torch.inf)
    changed = run(arguments, transition=step._replace(kl_precision=kl_precision), ratio=ratio, impl=impl)
    assert torch.equal(changed[1].values, statistics.values) and torch.equal(changed[2], gradient)
    # An advantage of infinity is a loss of infinity, not NaN: no part of it is 0 times infinity.
    advantages = torch.tensor([-math.inf, 1.0])
    loss, _, _ = run(arguments, advantages=advantages, adv_clip=math.inf, clip_range=10.0, ratio=ratio, impl=impl)
    assert loss == math.inf


@each_implementation
def test_a_sum_beyond_float32_has_a_mean(impl):
    arguments = make((2, 2, 4, 8))
    advantages = torch.tensor([-3e37, -3e37])
    loss, _, _ = run(arguments, advantages=advantages, adv_clip=math.inf, clip_range=10.0, weights=None, impl=impl)
    assert loss.isfinite() and loss > 1e37


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_an_s_that_float32_rounds_to_0_is_refused(impl):
    arguments = make((2, 2, 4, 8))
    tiny = arguments["transition"]._replace(s=torch.full((2,), 1e-60, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"transition\.s: has values <= 0"):
        sk.policy_loss(**{**arguments, "transition": tiny}, impl=impl)


@each_implementation
def test_autocast_changes_no_bit(impl):
    arguments = make((2, 2, 4, 8))
    expected = run(arguments, impl=impl)
    with torch.autocast(arguments["velocity"].device.type, torch.bfloat16):
        got = run(arguments, impl=impl)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])


def test_the_reference_runs_on_meta_tensors():
    on_meta = {
        n: v.to("meta") if isinstance(v, torch.Tensor | sk.Transition) else v for n, v in make((2, 2, 4, 8)).items()
    }
    assert sk.policy_loss(**on_meta).loss.device.type == "meta"


BASE = make((2, 3, 4, 5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(velocity=torch.randn(2, 3)), ValueError, r"velocity: got shape \(2, 3\), expected"),
        (dict(velocity=torch.randn(2, 3, 0, 5)), ValueError, r"velocity: got shape \(2, 3, 0, 5\), expected at least"),
        (dict(sample=torch.randn(2, 3, 4, 4)), ValueError, r"sample: got shape .* expected \(2, 3, 4, 5\)"),
        (
            dict(transition=BASE["transition"].rows(slice(0, 1))),
            ValueError,
            r"transition.a: got shape \(1,\), expected \(2\)",
        ),
        (dict(transition=3), TypeError, "transition: got int, expected a star_kernels.Transition"),
        (
            dict(advantages=torch.randn(2, 1)),
            ValueError,
            r"advantages: got shape \(2, 1\), expected \(2,\) or \(2, 4, 5\)",
        ),
        (dict(advantages=torch.ones(2, dtype=torch.int64)), TypeError, "advantages: got torch.int64"),
        (dict(weights=torch.ones(2, 5, 4)), ValueError, r"weights: got shape \(2, 5, 4\), expected \(2, 4, 5\)"),
        (dict(old_mean=None), ValueError, "old_mean, old_log_prob: got neither, expected exactly one"),
        (dict(old_log_prob=torch.ones(2)), ValueError, "old_mean, old_log_prob: got both, expected exactly one"),
        (
            dict(old_mean=None, old_log_prob=torch.ones(2), ratio="location"),
            ValueError,
            "old_log_prob: got one per sample, expected",
        ),
        (dict(old_mean=None, old_log_prob=torch.ones(2), guard=True), ValueError, "guard: needs old_mean"),
        (dict(ratio="tokens"), ValueError, "ratio: got 'tokens'"),
        (dict(ratio="sample", advantages=torch.ones(2, 4, 5)), ValueError, "advantages: ratio='sample'"),
        (dict(clip_range=-1.0), ValueError, "clip_range: got -1.0"),
        (dict(clip_range=(0.1,)), ValueError, r"clip_range: got 1 numbers, expected e >= 0 or \(low, high\)"),
        (dict(clip_range=None), TypeError, "clip_range: got NoneType, expected e >= 0"),
        (dict(clip_range=(0.1, math.nan)), ValueError, "clip_range: got nan, expected e >= 0"),
        (dict(adv_clip="x"), TypeError, "adv_clip: got str, expected a number > 0"),
        (dict(kl_coef=math.nan), ValueError, "kl_coef: got nan, expected a finite number"),
        (dict(guard=1), TypeError, "guard: got int, expected True or False"),
        (dict(velocity=torch.ones(1, 1, 1, 1).expand(2**20, 2**20, 4, 5)), ValueError, r"velocity: sizes .*2\*\*40"),
        (dict(adv_clip=0.0), ValueError, "adv_clip: got 0.0"),
        (dict(kl_coef=0.1), ValueError, "reference_velocity: got None, expected a tensor for kl_coef=0.1"),
        (dict(step_weights=torch.ones(3)), ValueError, r"step_weights: got shape \(3,\), expected \(2\)"),
        (dict(transition=BASE["transition"]._replace(s=torch.zeros(2))), ValueError, "transition.s: has values <= 0"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, error, words):
    with pytest.raises(error, match=words) as caught:
        sk.policy_loss(**{**BASE, **change})
    assert "\n" not in str(caught.value)


@each_implementation
@pytest.mark.parametrize("packed", [False, True])
def test_the_gradient_is_contiguous_whatever_the_latents_are(impl, packed):
    """As the fake says: compiled code reads it by those strides."""
    arguments = make((2, 12, 3) if packed else (2, 3, 4, 8))
    for name in ("velocity", "sample", "prev_sample", "old_mean"):
        if packed:
            arguments[name] = arguments[name].transpose(1, 2).contiguous().transpose(1, 2)
        else:
            arguments[name] = arguments[name].to(memory_format=torch.channels_last)
        assert not arguments[name].is_contiguous()
    *_, gradient = run(arguments, impl=impl)
    assert gradient.is_contiguous()
