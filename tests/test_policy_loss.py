"""policy_loss: every implementation against float64 autograd, Flow-GRPO's scalar loss, and its numerical pitfalls."""

import itertools
import math

import cuda_on_host
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import star_kernels as sk

IMPLEMENTATIONS = cuda_on_host.and_runnable("policy_loss")
each_implementation = pytest.mark.parametrize("impl", IMPLEMENTATIONS)


def make(shape, dtype=torch.float32, seed=0, drift=0.05, s=0.4):
    """A step taken by a policy whose velocity has since drifted. Returns arguments by name."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64)
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
    return result.loss.detach(), torch.stack(result.statistics), gradient


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
    assert statistics[1] == (1.0 if clip < 1 else 0.0)


def oracle(arguments, ratio, low, high, adv_clip, guard, kl_coef):
    """The loss by autograd, in float64, from the definitions and not from the derivatives."""
    double = to_double(arguments)
    packed = double["sample"].ndim == 3
    channel = 2 if packed else 1
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
    w = torch.ones_like(delta) if double["weights"] is None else double["weights"].reshape(batch, -1)
    adv = double["advantages"].clamp(-adv_clip, adv_clip).reshape(batch, -1)
    factor = double["step_weights"][:, None] if double.get("step_weights") is not None else 1.0
    if guard:
        factor = factor * (at("precision") / at("kl_precision"))[:, None]
    if ratio == "token":
        r = torch.exp(delta.mean(1, keepdim=True).detach() + delta - delta.detach())
    elif ratio == "location":
        r = torch.exp(delta)
    else:
        r, w = torch.exp((w * delta).mean(1, keepdim=True)), torch.ones_like(delta)
    loss = (factor * w * torch.maximum(-adv * r, -adv * r.clamp(1 - low, 1 + high))).mean()
    if double.get("reference_velocity") is not None:
        gap = ((mean - mean_of(double["reference_velocity"])) ** 2 * at("kl_precision").view(shape)).mean()
        loss = loss + kl_coef * gap
    (gradient,) = torch.autograd.grad(loss, velocity)
    return loss.detach(), gradient, r.detach()


@each_implementation
@given(
    layout=st.sampled_from(["planar", "video", "packed", "strided"]),
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
def test_value_and_gradient(impl, layout, size, ratio, old, advantages, weighted, stepped, kl, dtype, clip):
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
    if layout == "strided":
        for name in ("velocity", "sample", "prev_sample"):
            padded = torch.zeros(batch, channels, rows, 2 * columns, dtype=dtype)
            padded[..., ::2] = arguments[name]
            arguments[name] = padded[..., ::2]
    guard = old == "guard"
    expected, expected_gradient, r = oracle(arguments, ratio, *clip, 5.0, guard, kl_coef)
    # Rounding may put a ratio on the other side of an edge, where the gradient jumps: such draws decide nothing.
    rounding = 1e-10 if dtype == torch.float64 else 1e-4
    on_edge = min((r - edge).abs().min().item() for edge in (1 - clip[0], 1 + clip[1])) < rounding
    loss, _, gradient = run(arguments, ratio=ratio, clip_range=clip, guard=guard, kl_coef=kl_coef, impl=impl)
    eps = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # Subtracting log-probs of order one costs eps absolutely; everything else is relative to sums of C * P terms.
    tolerance = 200 * (channels * rows * columns + 10) * eps
    assert gradient.dtype == dtype and gradient.shape == torch.Size(shape)
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    if not on_edge:
        peak = expected_gradient.abs().max().item()
        rtol = tolerance + torch.finfo(dtype).eps
        # float16 gradients below its smallest normal number lose bits.
        floor = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 0.0
        torch.testing.assert_close(gradient.double(), expected_gradient, rtol=rtol, atol=tolerance * peak + floor)


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("guard", [False, True])
def test_gradcheck(impl, ratio, guard):
    # `token` hides its true derivative from differences of its value; `sample` with equal weights is the same function.
    arguments = make((2, 3, 2, 3), torch.float64)
    if ratio == "token":
        arguments["weights"] = None
    velocity = arguments.pop("velocity").requires_grad_()
    reference = torch.randn(velocity.shape, dtype=torch.float64)
    options = dict(
        ratio=ratio, clip_range=(0.3, 0.4), guard=guard, kl_coef=0.1, reference_velocity=reference, impl=impl
    )
    assert torch.autograd.gradcheck(lambda v: sk.policy_loss(v, **arguments, **options).loss, velocity)


@each_implementation
def test_statistics(impl):
    arguments = make((4, 3, 4, 5), torch.float64, drift=0.5)
    _, gradient, r = oracle(arguments, "location", 0.1, 0.2, 5.0, False, 0.0)
    _, statistics, _ = run(arguments, ratio="location", clip_range=(0.1, 0.2), impl=impl)
    got = sk.PolicyLoss(torch.zeros(()), type(sk.policy_loss(**arguments).statistics)(*statistics)).statistics
    low, high = (r < 0.9).double().mean(), (r > 1.2).double().mean()
    assert low > 0 and high > 0
    expected = dict(
        approx_kl=0.5 * r.log().square().mean(),
        clip_fraction=low + high,
        clip_fraction_low=low,
        clip_fraction_high=high,
        ratio_mean=r.mean(),
        ratio_min=r.min(),
        ratio_max=r.max(),
        kl=torch.zeros(()),
        nonfinite=torch.zeros(()),
    )
    size = gradient.abs().sum(1).flatten(1)
    top = arguments["weights"].flatten(1).argsort(1, descending=True)[:, :2]  # a tenth of 20 places
    expected["gradient_share"] = size.gather(1, top).sum() / size.sum()
    for name, value in expected.items():
        torch.testing.assert_close(getattr(got, name).double(), value.double(), rtol=1e-6, atol=1e-7, msg=name)


@each_implementation
@pytest.mark.parametrize(
    ("ratio", "advantages"),
    [("token", "image"), ("token", "location"), ("location", "image"), ("location", "location"), ("sample", "image")],
)
@pytest.mark.parametrize("weights", ["none", "distinct", "tied"])
@pytest.mark.parametrize("shape", [(3, 3, 20, 31), (2, 620, 8)], ids=["planar", "packed"])
def test_statistics_are_the_reference_ones(impl, ratio, advantages, weights, shape):
    """Every one of them, on samples of several blocks, with ties at the edge of the top tenth, zeros of both signs."""
    arguments = make(shape, torch.float64, drift=0.5)
    if advantages == "location":
        arguments["advantages"] = torch.randn_like(arguments["weights"])
    if weights == "tied":
        arguments["weights"] = (2 * arguments["weights"]).round() / 2
        arguments["weights"][0] *= 0
        arguments["weights"][0, ..., ::2] *= -1
        assert (arguments["weights"].flatten(1).unique(dim=1).shape[1]) < 620
    elif weights == "none":
        arguments["weights"] = None
    options = dict(ratio=ratio, clip_range=(1e-3, 2e-3), kl_coef=0.1, reference_velocity=arguments["sample"])
    _, expected, _ = run(arguments, **options, impl="reference")
    _, statistics, _ = run(arguments, **options, impl=impl)
    torch.testing.assert_close(statistics, expected, rtol=1e-6, atol=1e-7)


@each_implementation
def test_gradient_share_of_equal_weights_is_a_tenth(impl):
    arguments = make((2, 3, 4, 5))
    arguments["weights"] = torch.ones_like(arguments["weights"])
    for weights in (arguments["weights"], None):
        share = sk.policy_loss(**{**arguments, "weights": weights}, impl=impl).statistics.gradient_share
        torch.testing.assert_close(share, torch.tensor(0.1), rtol=1e-5, atol=0)


@each_implementation
def test_on_policy_ratio_is_exactly_one(impl):
    arguments = make((3, 4, 6, 6), drift=0.0)
    _, statistics, gradient = run(arguments, clip_range=0.0, impl=impl)
    assert statistics[4:7].tolist() == [1.0, 1.0, 1.0] and statistics[1] == 0
    assert gradient.abs().flatten(1).amax(1).min() > 0  # the edge 1 +- 0 belongs to the inside


@each_implementation
def test_zero_advantage_and_zero_weight_give_no_gradient(impl):
    arguments = make((3, 4, 6, 6))
    arguments["advantages"] = torch.tensor([0.0, 1.0, -1.0])
    arguments["weights"][:, :2] = 0
    loss, _, gradient = run(arguments, clip_range=1.0, impl=impl)
    assert torch.equal(gradient[0], torch.zeros_like(gradient[0]))
    assert torch.equal(gradient[:, :, :2], torch.zeros_like(gradient[:, :, :2]))
    assert loss.isfinite() and gradient[1:, :, 2:].abs().min() > 0


@each_implementation
@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("sign", [1, -1])
def test_log_ratios_of_a_hundred_stay_finite(impl, ratio, sign):
    arguments = make((2, 3, 4, 4))
    mean = arguments.pop("old_mean")
    old = sk.log_prob(arguments["prev_sample"], mean, arguments["transition"], per_location=True)
    arguments["old_log_prob"] = old - sign * 100
    arguments["advantages"] = torch.tensor([2.0, -2.0])
    loss, statistics, gradient = run(arguments, ratio=ratio, clip_range=0.2, impl=impl)
    assert loss.isfinite() and gradient.isfinite().all() and statistics.isfinite().all() and statistics[9] == 0


@each_implementation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nonfinite_inputs_are_counted_and_not_hidden(impl, bad):
    arguments = make((2, 3, 4, 4))
    arguments["velocity"][1, 0, 2, 3] = bad
    loss, statistics, _ = run(arguments, impl=impl)
    assert loss.isnan() and statistics[9] == 1


@each_implementation
def test_delta_form_is_exact_where_subtracting_log_probs_is_not(impl):
    """Early step, s = 0.7: the log-ratio is 1e-5 and float32 log-probs cannot hold it."""
    arguments = make((2, 16, 32, 32), drift=3e-4, s=0.7)
    double = to_double(arguments)
    exact = (sk.policy_loss(**double, impl="reference").statistics.ratio_mean.double() - 1).item()
    r = oracle(arguments, "token", 1.0, 1.0, 5.0, False, 0.0)[2]
    exact = (r - 1)[:, 0]
    index = torch.arange(2)
    for i in index.tolist():
        one = {
            name: value[i : i + 1] if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        one["transition"] = arguments["transition"].rows(slice(i, i + 1))
        # approx_kl = log_ratio^2 / 2 shows the log-ratio without the 1 + that float32 rounds away.
        log_ratio = math.sqrt(2 * sk.policy_loss(**one, impl=impl).statistics.approx_kl.item())
        assert abs(log_ratio - abs(math.log1p(exact[i].item()))) < 1e-9
        new_mean = (
            one["transition"].a.view(-1, 1, 1, 1) * one["sample"]
            + one["transition"].b.view(-1, 1, 1, 1) * one["velocity"]
        )
        subtracted = sk.log_prob(one["prev_sample"], new_mean, one["transition"]) - sk.log_prob(
            one["prev_sample"], one["old_mean"], one["transition"]
        )
        assert abs(subtracted.item() - math.log1p(exact[i].item())) > 1e-9


@each_implementation
def test_nearly_deterministic_last_step(impl):
    """s = 0.0063 makes the precision 12,600: value and gradient stay right."""
    arguments = make((2, 4, 8, 8), drift=1e-3, s=0.0063)
    expected, expected_gradient, _ = oracle(arguments, "token", 0.5, 0.5, 5.0, False, 0.0)
    loss, _, gradient = run(arguments, clip_range=0.5, impl=impl)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        gradient.double(), expected_gradient, rtol=1e-3, atol=1e-4 * expected_gradient.abs().max().item()
    )


@each_implementation
def test_same_bits_for_any_number_of_threads_and_every_run(impl):
    arguments = make((5, 4, 33, 17))
    results = []
    threads = torch.get_num_threads()
    for number in (1, 2, 2):
        torch.set_num_threads(number)
        results.append(run(arguments, impl=impl))
    torch.set_num_threads(threads)
    for a, b in itertools.pairwise(results):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@each_implementation
def test_backward_scales_and_refuses_a_second_derivative(impl):
    arguments = make((2, 3, 4, 4))
    velocity = arguments.pop("velocity").requires_grad_()
    loss = sk.policy_loss(velocity, **arguments, impl=impl).loss
    (plain,) = torch.autograd.grad(loss, velocity, retain_graph=True)
    (scaled,) = torch.autograd.grad(0.25 * loss, velocity, retain_graph=True)
    assert torch.equal(scaled, 0.25 * plain)
    with pytest.raises(RuntimeError, match="policy_loss: no second derivative"):
        torch.autograd.grad(loss, velocity, create_graph=True)


@each_implementation
def test_autocast_changes_nothing(impl):
    arguments = make((2, 3, 4, 4))
    expected = run(arguments, impl=impl)
    with torch.autocast("cpu", torch.bfloat16):
        got = run(arguments, impl=impl)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@each_implementation
def test_opcheck_and_compile(impl):
    arguments = make((2, 3, 4, 4))
    velocity = arguments["velocity"].requires_grad_()
    rest = (arguments["sample"], arguments["prev_sample"], *arguments["transition"], arguments["advantages"])
    tail = (arguments["weights"], arguments["old_mean"], None, None, None, "token", 0.1, 0.1, 5.0, 0.0, False)
    operator = getattr(torch.ops.star, f"policy_loss_{impl}").default
    torch.library.opcheck(operator, (velocity, *rest, *tail))
    expected = run(arguments, impl=impl)

    def step(velocity):
        return sk.policy_loss(**{**arguments, "velocity": velocity * 1.0}, impl=impl).loss * 2

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(velocity)
    assert torch.equal(loss.detach(), 2 * expected[0])
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert torch.equal(gradient, 2 * expected[2])


def test_explicit_implementation_never_falls_back(monkeypatch):
    arguments = make((1, 2, 3, 3))
    monkeypatch.setenv("STAR_IMPL", "nonsense")
    with pytest.raises(ValueError, match="impl: got 'nonsense'"):
        sk.policy_loss(**arguments)
    monkeypatch.setattr("star_kernels.native.REASON", "not built")
    with pytest.raises(RuntimeError, match="impl='native': not built"):
        sk.policy_loss(**arguments, impl="native")


BASE = make((2, 3, 4, 5))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(velocity=torch.randn(2, 3)), ValueError, r"velocity: got shape \(2, 3\), expected"),
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
        (dict(old_mean=None), ValueError, "old_mean, old_log_prob: expected exactly one"),
        (dict(old_log_prob=torch.ones(2)), ValueError, "old_mean, old_log_prob: expected exactly one"),
        (
            dict(old_mean=None, old_log_prob=torch.ones(2), ratio="location"),
            ValueError,
            "old_log_prob: ratio='location'",
        ),
        (dict(old_mean=None, old_log_prob=torch.ones(2), guard=True), ValueError, "guard: needs old_mean"),
        (dict(ratio="tokens"), ValueError, "ratio: got 'tokens'"),
        (dict(ratio="sample", advantages=torch.ones(2, 4, 5)), ValueError, "advantages: ratio='sample'"),
        (dict(clip_range=-1.0), ValueError, "clip_range: got -1.0"),
        (dict(adv_clip=0.0), ValueError, "adv_clip: got 0.0"),
        (dict(kl_coef=0.1), ValueError, "reference_velocity: needed for kl_coef=0.1"),
        (dict(step_weights=torch.ones(3)), ValueError, r"step_weights: got shape \(3,\), expected \(2\)"),
        (dict(transition=BASE["transition"]._replace(s=torch.zeros(2))), ValueError, "transition.s: has values <= 0"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, error, words):
    with pytest.raises(error, match=words) as caught:
        sk.policy_loss(**{**BASE, **change})
    assert "\n" not in str(caught.value)
