"""nft_loss: every implementation against float64 autograd, the published loss, and its numerical pitfalls."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import devices
import star_kernels as sk

each_implementation = devices.each_implementation("nft_loss")


def make(shape, dtype=torch.float32, seed=0, per_location=False, weighted=True):
    """Arguments by name: noised latents, an old policy that is nearly right, and one that has moved."""
    generator, device = torch.Generator("cpu").manual_seed(seed), torch.get_default_device()
    draw = lambda *size: torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu").to(device)
    batch = shape[0]
    places = (shape[0], shape[1]) if len(shape) == 3 else (shape[0], *shape[2:])
    axes = (-1, *(1,) * (len(shape) - 1))
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    sigma = draw(batch).sigmoid().to(arithmetic)
    clean, noise = draw(*shape), draw(*shape)
    at = sigma.double().view(axes)
    old_velocity = noise - clean + 0.5 * draw(*shape)
    weights = draw(*places).abs() + 0.1
    weights = weights / weights.flatten(1).mean(1).view(axes[: len(places)])
    return dict(
        velocity=(old_velocity + 0.3 * draw(*shape)).to(dtype),
        old_velocity=old_velocity.to(dtype),
        sample=((1 - at) * clean + at * noise).to(dtype),
        clean=clean.to(dtype),
        sigma=sigma,
        reward_prob=draw(*(places if per_location else (batch,))).sigmoid().to(arithmetic),
        weights=weights.to(arithmetic) if weighted else None,
    )


def to_double(arguments):
    return {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def run(arguments, **options):
    """(loss, statistics, gradient of the velocity)."""
    velocity = arguments["velocity"].detach().clone().requires_grad_()
    result = sk.nft_loss(**{**arguments, **options, "velocity": velocity})
    (gradient,) = torch.autograd.grad(result.loss, velocity)
    return result.loss.detach(), result.statistics, gradient


def flat(result):
    loss, statistics, gradient = result
    return [loss, *statistics, gradient]


def published(forward_prediction, old_prediction, ref_prediction, x0, xt, t, r, beta, adv_clip_max, kl_beta):
    """DiffusionNFT's loss from its script's formulas: r, t (B,), everything averaged over a sample, then the batch."""
    axes = tuple(range(1, x0.ndim))
    t = t.view(-1, *[1] * (x0.ndim - 1))
    positive_prediction = beta * forward_prediction + (1 - beta) * old_prediction.detach()
    negative_prediction = (1.0 + beta) * old_prediction.detach() - beta * forward_prediction
    losses = []
    for prediction in (positive_prediction, negative_prediction):
        x0_prediction = xt - t * prediction
        with torch.no_grad():
            size = (x0_prediction.double() - x0.double()).abs().mean(dim=axes, keepdim=True).clip(min=0.00001)
        losses.append(((x0_prediction - x0) ** 2 / size).mean(dim=axes))
    loss = ((r * losses[0] / beta + (1 - r) * losses[1] / beta) * adv_clip_max).mean()
    return loss + kl_beta * ((forward_prediction - ref_prediction) ** 2).mean(dim=axes).mean()


def close(got, expected, tolerance, floor=0.0):
    got, expected = got.double(), expected.double()
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item() + floor)


def roundings(arguments):
    """What sums over a sample's elements may be off by, relatively: errors of both branches are of the inputs' size."""
    velocity = arguments["velocity"]
    eps = torch.finfo(torch.float64 if velocity.dtype == torch.float64 else torch.float32).eps
    return 64 * (10 + math.sqrt(velocity[0].numel())) * eps


@each_implementation
@pytest.mark.parametrize("shape", [(4, 3, 8, 6), (4, 3, 2, 4, 5), (4, 20, 3)], ids=["planar", "video", "packed"])
@pytest.mark.parametrize("weights", ["none", "ones"])
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_without_weights_it_is_the_published_loss(impl, shape, weights, beta):
    arguments = make(shape)
    arguments["reward_prob"] = torch.tensor([0.0, 0.3, 0.8, 1.0])
    arguments["weights"] = None if weights == "none" else torch.ones_like(arguments["weights"])
    arguments["reference_velocity"] = arguments["old_velocity"] + 0.1
    double = to_double(arguments)
    velocity = double["velocity"].clone().requires_grad_()
    expected = published(
        velocity, double["old_velocity"], double["reference_velocity"], double["clean"], double["sample"],
        double["sigma"], double["reward_prob"], beta, 5.0, 0.01,
    )  # fmt: skip
    (expected_gradient,) = torch.autograd.grad(expected, velocity)
    loss, statistics, gradient = run(arguments, beta=beta, kl_coef=0.01, impl=impl)
    close(loss, expected, roundings(arguments))
    close(gradient, expected_gradient, roundings(arguments))
    assert statistics.kl > 0


@each_implementation
@pytest.mark.parametrize("shape", [(3, 4, 8, 6), (3, 20, 4)], ids=["planar", "packed"])
def test_equal_probabilities_of_locations_are_one_of_the_sample(impl, shape):
    arguments = make(shape)
    expected = run(arguments, impl=impl)
    places = arguments["weights"].shape
    arguments["reward_prob"] = arguments["reward_prob"].view(-1, *(1,) * (len(places) - 1)).expand(places)
    got = run(arguments, impl=impl)
    for one, other in zip(flat(got), flat(expected), strict=True):
        close(one, other, 4 * torch.finfo(torch.float32).eps)


@each_implementation
def test_a_location_follows_its_own_reward(impl):
    """r = 1 pulls a location to its clean latents, r = 0 pushes the mirrored branch there: opposite gradients."""
    arguments = make((2, 3, 4, 6), weighted=False)
    arguments["velocity"] = arguments["old_velocity"]  # both branches have the same error
    reward_prob = torch.ones(2, 4, 6)
    reward_prob[:, :, :2], reward_prob[:, :, 2:4] = 0.0, 0.5
    ones = run({**arguments, "reward_prob": torch.ones(2)}, impl=impl)[2]
    got = run({**arguments, "reward_prob": reward_prob}, impl=impl)[2]
    close(got[..., 4:], ones[..., 4:], 1e-6)
    close(got[..., :2], -ones[..., :2], 1e-6)
    assert got[..., 2:4].abs().max() <= 1e-6 * ones.abs().max() and ones.abs().min() > 0


def oracle(arguments, beta, adaptive, adaptive_min, adv_clip, kl_coef):
    """Loss, gradient and statistics in float64, from the definitions: autograd makes the derivatives."""
    double = to_double(arguments)
    velocity, old, x, x0 = (double[name] for name in ("velocity", "old_velocity", "sample", "clean"))
    velocity = velocity.clone().requires_grad_()
    axes, channel = (-1, *(1,) * (x.ndim - 1)), 2 if x.ndim == 3 else 1
    sigma, r = double["sigma"].view(axes), double["reward_prob"]
    r = r.view(axes) if r.ndim == 1 else r.unsqueeze(channel)
    w = torch.ones_like(x) if double["weights"] is None else double["weights"].unsqueeze(channel)
    terms, errors, finite = [], [], True
    for sign, share in ((1, r), (-1, 1 - r)):
        error = x - sigma * (old + sign * beta * (velocity - old)) - x0
        errors.append(error.detach().abs().flatten(1).mean(1))
        size = errors[-1].clamp_min(adaptive_min) if adaptive else torch.ones_like(errors[-1])
        terms.append((w * share * error**2 / size.view(axes)).mean())
        finite = finite & error.detach().isfinite().all(channel)
    loss = adv_clip / beta * sum(terms)
    moved = (velocity - old).detach().square()
    kl = torch.zeros((), dtype=torch.float64)
    if double.get("reference_velocity") is not None:
        kl = (velocity - double["reference_velocity"]).square().mean()
        loss = loss + kl_coef * kl
    (gradient,) = torch.autograd.grad(loss, velocity)
    values = [*terms, errors[0].mean(), errors[1].mean(), moved.mean(), moved.max(), kl, (~finite).sum()]
    return loss.detach(), gradient, dict(zip(sk.NFTStatistics._fields, (one.detach() for one in values), strict=True))


@each_implementation
@given(
    layout=st.sampled_from(["planar", "video", "packed", "strided", "channels_last", "expanded"]),
    size=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 7)),
    per_location=st.booleans(),
    weighted=st.booleans(),
    kl=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    wide=st.booleans(),
    beta=st.sampled_from([1.0, 0.1, 2.5]),
    adaptive_min=st.sampled_from([None, 1e-5, 0.7]),
)
def test_value_gradient_and_statistics(impl, layout, size, per_location, weighted, kl, dtype, wide, beta, adaptive_min):
    batch, channels, rows, columns = size
    shape = {"packed": (batch, rows * columns, channels), "video": (batch, channels, 2, rows, columns)}.get(
        layout, size
    )
    arguments = make(shape, dtype, sum(size), per_location, weighted)
    if kl:
        arguments["reference_velocity"] = arguments["velocity"] + 0.1 * torch.randn(shape).to(dtype)
    if wide:  # latents in the arithmetic's type beside velocities of the model's
        for name in ("sample", "clean"):
            arguments[name] = arguments[name].to(arguments["sigma"].dtype)
    for name, value in arguments.items():
        if not isinstance(value, torch.Tensor):
            continue
        if layout == "strided" and value.ndim > 1:
            arguments[name] = value.repeat_interleave(2, -1)[..., ::2]
        elif layout == "channels_last" and value.ndim == 4:
            arguments[name] = value.contiguous(memory_format=torch.channels_last)
        elif layout == "expanded" and name in ("weights", "reward_prob", "sigma"):
            arguments[name] = value[:1].expand_as(value)
    kl_coef = 0.3 if kl else 0.0
    adaptive, least = adaptive_min is not None, adaptive_min or 1e-5
    expected, expected_gradient, statistics = oracle(arguments, beta, adaptive, least, 3.0, kl_coef)
    options = dict(beta=beta, adaptive=adaptive, adaptive_min=least, adv_clip=3.0, kl_coef=kl_coef)
    loss, got, gradient = run(arguments, **options, impl=impl)
    tolerance = roundings(arguments)
    assert gradient.dtype == dtype and gradient.shape == torch.Size(shape)
    assert loss.dtype == arguments["sigma"].dtype
    close(loss, expected, tolerance)
    floor = torch.finfo(dtype).smallest_normal if dtype == torch.float16 else 0.0  # below it bits are lost
    close(gradient, expected_gradient, tolerance + torch.finfo(dtype).eps, floor)
    for name, value in got._asdict().items():
        assert value.dtype == torch.float32
        close(value, statistics[name], tolerance + torch.finfo(torch.float32).eps)


@each_implementation
@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 100, 171), (1, 5000, 8)], ids=["planar", "packed"])
def test_samples_of_several_tiles(impl, per_location, shape):
    arguments = make(shape, per_location=per_location)
    arguments["reference_velocity"] = arguments["clean"]
    expected, expected_gradient, statistics = oracle(arguments, 0.5, True, 1e-5, 5.0, 0.1)
    loss, got, gradient = run(arguments, beta=0.5, kl_coef=0.1, impl=impl)
    close(loss, expected, 1e-6)  # sums go on in float64
    close(gradient, expected_gradient, 16 * torch.finfo(torch.float32).eps)
    for name, value in got._asdict().items():
        close(value, statistics[name], 1e-6)


@each_implementation
@pytest.mark.parametrize("per_location", [False, True])
@pytest.mark.parametrize("shape", [(2, 2, 1, 3), (2, 3, 2)], ids=["planar", "packed"])
def test_gradcheck(impl, per_location, shape):
    # The normalizers are constants by definition, which differences of the loss do not know: 7.0 is above them.
    arguments = make(shape, torch.float64, per_location=per_location)
    velocity = arguments.pop("velocity").requires_grad_()
    reference = torch.randn(velocity.shape, dtype=torch.float64)
    for fixed in (dict(adaptive=False), dict(adaptive_min=7.0)):
        options = dict(beta=0.7, kl_coef=0.1, reference_velocity=reference, impl=impl) | fixed
        assert torch.autograd.gradcheck(lambda v, o=options: sk.nft_loss(v, **arguments, **o).loss, velocity)


@each_implementation
def test_a_small_step_keeps_its_digits(impl):
    """Near the old policy the branches differ by 1e-6, of which beta v + (1 - beta) v_old would round a tenth away."""
    arguments = make((2, 4, 16, 16), weighted=False) | dict(reward_prob=torch.full((2,), 0.5))
    arguments["velocity"] = arguments["old_velocity"] + 1e-4 * torch.randn(2, 4, 16, 16)
    double = to_double(arguments)
    # With r = 1/2 and no normalizer the pull of the errors cancels: what is left is sigma beta times the move.
    moved = double["velocity"] - double["old_velocity"]
    expected = 5.0 * 2 * double["sigma"].view(-1, 1, 1, 1) ** 2 * 0.01 * moved / moved.numel()
    _, _, gradient = run(arguments, beta=0.01, adaptive=False, impl=impl)
    # Half a unit in the last place of a branch's error, which is of order one, is 0.02 of the largest move.
    assert (gradient.double() - expected).abs().max() <= 0.04 * expected.abs().max()


@each_implementation
def test_zero_weight_gives_no_gradient(impl):
    arguments = make((2, 4, 6, 6))
    arguments["weights"][:, :2] = 0
    _, _, gradient = run(arguments, impl=impl)
    assert not gradient[:, :, :2].any() and gradient[:, :, 2:].abs().min() > 0
    arguments["weights"][:] = 0
    loss, statistics, gradient = run(arguments, impl=impl)
    assert loss == 0 and statistics.values.isfinite().all() and not gradient.any()


@each_implementation
def test_a_perfect_prediction_is_no_division_by_zero(impl):
    arguments = make((2, 3, 4, 4), weighted=False)
    for name in ("velocity", "old_velocity", "sample", "clean"):
        arguments[name] = torch.zeros(2, 3, 4, 4)
    loss, statistics, gradient = run(arguments, impl=impl)
    assert loss == 0 and not gradient.any() and not statistics.values.any()


@each_implementation
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["velocity", "old_velocity", "sample", "clean"])
@pytest.mark.parametrize("packed", [False, True])
def test_nonfinite_inputs_are_counted_and_not_hidden(impl, bad, name, packed):
    arguments = make((2, 5, 7) if packed else (2, 3, 4, 4))
    arguments[name][1, 0, 2] = bad
    loss, statistics, gradient = run(arguments, impl=impl)
    assert not loss.isfinite() and statistics.nonfinite == (1 if packed else 4)
    assert not statistics.positive_error.isfinite() and not statistics.negative_error.isfinite()
    if "velocity" in name:
        assert not statistics.old_deviation.isfinite() and not statistics.old_deviation_max.isfinite()
    assert gradient[0].isfinite().all() and not gradient[1].isfinite().all()


@each_implementation
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_nan_shows_in_the_largest_deviation(impl, row):
    arguments = make((3, 2, 4, 8))
    arguments["velocity"][row, 0, 1, 2] = torch.nan
    statistics = run(arguments, impl=impl)[1]
    assert statistics.old_deviation_max.isnan() and statistics.nonfinite == 1


@each_implementation
@pytest.mark.parametrize("name", ["reward_prob", "weights"])
def test_nan_factors_reach_the_loss(impl, name):
    arguments = make((2, 3, 4, 4), per_location=True)
    arguments[name][-1, -1, -1] = torch.nan
    loss, statistics, gradient = run(arguments, impl=impl)
    assert loss.isnan() and statistics.nonfinite == 0
    assert gradient[0].isfinite().all() and gradient[1].isnan().sum() == 3


@each_implementation
@pytest.mark.parametrize("shape", [(5, 4, 33, 17), (1, 3, 95, 197), (1, 9000, 3)], ids=["samples", "tiles", "packed"])
def test_same_bits_for_any_number_of_threads_and_every_run(impl, shape, at_thread_counts):
    arguments = make(shape, per_location=len(shape) == 4)
    arguments["reference_velocity"] = arguments["clean"]
    first, *others = at_thread_counts(lambda: run(arguments, kl_coef=0.1, impl=impl))
    for other in (*others, run(arguments, kl_coef=0.1, impl=impl)):
        assert all(torch.equal(x, y) for x, y in zip(flat(first), flat(other), strict=True))


OPTIONS = (0.7, True, 1e-5, 5.0, 0.3)  # beta, adaptive, adaptive_min, adv_clip, kl_coef


def positional(arguments):
    """The arguments as an operator of torch.library takes them."""
    names = ("velocity", "old_velocity", "sample", "clean", "sigma", "reward_prob", "weights", "reference_velocity")
    return (*(arguments.get(name) for name in names), *OPTIONS)


@each_implementation
def test_errors_do_not_depend_on_the_batch(impl):
    arguments = make((3, 3, 95, 97))
    operator = getattr(torch.ops.star, f"nft_loss_{impl}")
    one = {name: x[1:2] for name, x in arguments.items()}
    assert torch.equal(operator(*positional(one))[2], operator(*positional(arguments))[2][1:2])


@each_implementation
def test_only_the_velocity_gets_a_gradient(impl):
    arguments = make((2, 3, 4, 4), per_location=True) | dict(reference_velocity=torch.randn(2, 3, 4, 4))
    arguments = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    loss, statistics = sk.nft_loss(**arguments, kl_coef=0.1, impl=impl)
    gradients = torch.autograd.grad(loss, list(arguments.values()), allow_unused=True)
    assert gradients[0] is not None and all(gradient is None for gradient in gradients[1:])
    assert not statistics.values.requires_grad


@each_implementation
def test_backward_passes_of_every_kind(impl):
    """Scaled, repeated, with a graph: each has the gradient, and spoils no other's; a second derivative is refused."""
    arguments = make((2, 3, 4, 4))
    expected = run(arguments, impl=impl)[2]
    velocity = arguments.pop("velocity").requires_grad_()
    loss = sk.nft_loss(velocity, **arguments, impl=impl).loss
    backward = lambda loss, **options: torch.autograd.grad(loss, velocity, **options)[0]
    first = backward(0.5 * loss, retain_graph=True)
    second = backward(loss, retain_graph=True)
    third = backward(loss, create_graph=True)
    assert torch.equal(second, expected) and torch.equal(third, expected)
    for got, factor in ((first, 0.5), (backward(-3.0 * loss, retain_graph=True), -3.0)):
        torch.testing.assert_close(got, factor * expected, rtol=1e-6, atol=0)
    with pytest.raises(RuntimeError, match="nft_loss: no second derivative"):
        third.sum().backward()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # vmap calls the kernel for each entry
@each_implementation
def test_functional_gradients_are_those_of_autograd(impl):
    arguments = make((2, 3, 4, 4))
    expected = run(arguments, impl=impl)[2]
    velocity = arguments.pop("velocity")
    gradient = torch.func.grad(lambda v: sk.nft_loss(v, **arguments, impl=impl).loss)
    assert torch.equal(gradient(velocity), expected)
    assert torch.equal(torch.vmap(gradient)(velocity.expand(2, *velocity.shape).clone()), torch.stack([expected] * 2))
    with pytest.raises(RuntimeError, match="forward mode"):
        torch.func.jvp(lambda v: sk.nft_loss(v, **arguments, impl=impl).loss, (velocity,), (velocity,))


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
            sk.nft_loss(**arguments, impl=impl)
        loss = sk.nft_loss(**arguments, impl=impl).loss
        loss.backward()
    early = impl == "native" and loss.device.type == "cpu"
    expected = ["nft_loss", "nft_loss_with_gradient"] if early else ["nft_loss"] * 2 + ["nft_loss_gradient"]
    assert [name for name in seen if name.startswith("nft_loss")] == [f"{name}_{impl}.default" for name in expected]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_loss_with_gradient_has_the_bits_of_both(dtype, at_thread_counts):
    both, loss, gradient = (
        getattr(torch.ops.star, f"nft_loss{name}_native") for name in ("_with_gradient", "", "_gradient")
    )
    for shape in ((3, 4, 70, 71), (3, 4, 5, 3), (1, 5000, 7), (3, 50, 16)):
        with torch.device("cpu"):
            arguments = make(shape, dtype, per_location=len(shape) == 4)
            arguments["reference_velocity"] = arguments["clean"] if shape[0] == 3 else None
        rest = positional(arguments)
        *expected, errors = loss(*rest)
        expected += [errors, gradient(torch.ones_like(expected[0]), errors, *rest)]
        for result in at_thread_counts(lambda rest=rest: both(*rest)):
            assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@each_implementation
def test_a_gradient_scaler_saves_float16_gradients(impl):
    """Small gradients lose their bits in float16: the scaler's factor must come before."""
    arguments = make((3, 16, 64, 64), torch.float16, weighted=False)
    _, expected, _ = oracle(arguments, 1.0, True, 1e-5, 5.0, 0.0)
    velocity = arguments.pop("velocity").requires_grad_()
    (gradient,) = torch.autograd.grad(65536.0 * sk.nft_loss(velocity, **arguments, impl=impl).loss, velocity)
    assert gradient.dtype == torch.float16
    error = (gradient.double() / 65536 - expected).abs()
    assert (error <= 1e-3 * expected.abs() + 1e-5 * expected.abs().max()).all()


@each_implementation
@pytest.mark.parametrize("name", ["old_velocity", "reference_velocity"])
@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
def test_another_velocity_keeps_its_bits_beside_a_narrow_one(impl, name, wide):
    """Rounded to the velocity's type it would be the velocity, and what is between them 0."""
    arguments = make((2, 3, 4, 8), torch.bfloat16)
    arguments["reference_velocity"] = arguments["velocity"]
    arguments[name] = arguments["velocity"].to(wide) + 1e-4
    statistics = run(arguments, kl_coef=1.0, impl=impl)[1]
    gap = statistics.kl if name == "reference_velocity" else statistics.old_deviation
    assert gap.item() == pytest.approx(1e-8, rel=0.02)


@each_implementation
def test_a_gradient_in_another_type_than_the_arithmetic(impl):
    """Made in float64 and converted: a copy of it must not be taken before it is there."""
    arguments = make((2, 3, 32, 32))
    arguments["sample"] = arguments["sample"].double()
    for _ in range(8):  # memory that is not written has other bits every time
        got = run(arguments, impl=impl)
        expected = run(to_double(arguments), impl="reference")
        assert got[2].dtype == torch.float32
        close(got[2], expected[2], 1e-6)


@each_implementation
def test_a_sum_beyond_float32_has_a_mean(impl):
    arguments = make((2, 2, 4, 8), weighted=False)
    arguments = {name: x * 1e19 if x is not None and x.ndim > 1 else x for name, x in arguments.items()}
    loss, _, gradient = run(arguments, adv_clip=1e18, adaptive=False, impl=impl)
    assert loss > 1e38 or loss == math.inf  # squares near the end of float32
    loss, _, _ = run(arguments, impl=impl)
    assert loss.isfinite() and gradient.isfinite().all()


@each_implementation
def test_autocast_changes_no_bit(impl):
    arguments = make((2, 2, 4, 8))
    expected = run(arguments, impl=impl)
    with torch.autocast(arguments["velocity"].device.type, torch.bfloat16):
        got = run(arguments, impl=impl)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[2], expected[2])


@each_implementation
def test_opcheck(impl):
    operator = getattr(torch.ops.star, f"nft_loss_{impl}").default
    gradient = getattr(torch.ops.star, f"nft_loss_gradient_{impl}").default
    for shape, layout in (
        ((2, 3, 4, 4), torch.contiguous_format),
        ((2, 3, 4, 4), torch.channels_last),
        ((2, 5, 3), torch.contiguous_format),
    ):
        arguments = make(shape, per_location=layout == torch.channels_last)
        for name in ("velocity", "sample"):
            arguments[name] = arguments[name].contiguous(memory_format=layout)
        arguments["reference_velocity"] = arguments["sample"]
        rest = positional(arguments)
        torch.library.opcheck(operator, rest)
        errors = operator(*rest)[2]
        assert errors.shape == (2, 2)
        torch.library.opcheck(gradient, (torch.tensor(0.5), errors, *rest))


@each_implementation
def test_compiles_without_a_graph_break(impl):
    arguments = make((2, 3, 4, 4))
    velocity = arguments["velocity"].requires_grad_()
    expected = run(arguments, impl=impl)

    def step(velocity):
        return sk.nft_loss(**{**arguments, "velocity": velocity * 1.0}, impl=impl).loss * 2

    loss = torch.compile(step, fullgraph=True, backend="aot_eager")(velocity)
    assert torch.equal(loss.detach(), 2 * expected[0])
    (gradient,) = torch.autograd.grad(loss, velocity)
    assert torch.equal(gradient, 2 * expected[2])


def test_the_reference_runs_on_meta_tensors():
    on_meta = {name: value.to("meta") for name, value in make((2, 2, 4, 8)).items()}
    assert sk.nft_loss(**on_meta).loss.device.type == "meta"


@pytest.mark.parametrize("impl", ["reference", "native"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(sigma=torch.tensor([0.5, 500.0])), r"sigma: has values outside \[0, 1\]; it is the noise level"),
        (dict(reward_prob=torch.tensor([0.5, -0.1])), r"reward_prob: has values outside \[0, 1\]; it is made of"),
        (dict(reward_prob=torch.full((2, 4, 5), 1.01)), r"reward_prob: has values outside \[0, 1\]"),
    ],
)
def test_values_that_are_no_shares_are_refused(impl, change, words):
    """A timestep for a noise level, or an advantage for a probability, would train something else in silence."""
    with pytest.raises(ValueError, match=words) as caught:
        sk.nft_loss(**{**make((2, 3, 4, 5)), **change}, impl=impl)
    assert "\n" not in str(caught.value)


def test_statistics_unpack_like_a_named_tuple():
    statistics = sk.nft_loss(**make((2, 3, 4, 4))).statistics
    assert statistics._fields == tuple(statistics._asdict()) and len(statistics) == len(statistics._fields) == 8
    for name, value, one in zip(statistics._fields, statistics.values, statistics, strict=True):
        assert getattr(statistics, name) == value == one
    with pytest.raises(AttributeError, match="NFTStatistics has no 'ratio_mean', expected one of"):
        statistics.ratio_mean  # noqa: B018


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(velocity=torch.randn(2, 3)), ValueError, r"velocity: got shape \(2, 3\), expected"),
        (dict(velocity=torch.randn(2, 3, 0, 5)), ValueError, r"velocity: got shape \(2, 3, 0, 5\), expected at least"),
        (dict(old_velocity=torch.randn(2, 3, 4, 4)), ValueError, r"old_velocity: got shape .*\(2, 3, 4, 5\)"),
        (dict(sample=None), TypeError, "sample: got NoneType, expected a torch.Tensor"),
        (dict(clean=torch.randn(1, 3, 4, 5)), ValueError, r"clean: got shape \(1, 3, 4, 5\), expected \(2, 3, 4, 5\)"),
        (dict(sigma=torch.rand(2, 1)), ValueError, r"sigma: got shape \(2, 1\), expected \(2\)"),
        (dict(sigma=torch.tensor([500, 3])), TypeError, "sigma: got torch.int64, expected a floating-point tensor"),
        (dict(reward_prob=torch.rand(2, 4)), ValueError, r"reward_prob: got shape .*expected \(2,\) or \(2, 4, 5\)"),
        (dict(weights=torch.ones(2, 5, 4)), ValueError, r"weights: got shape \(2, 5, 4\), expected \(2, 4, 5\)"),
        (dict(reference_velocity=torch.ones(2)), ValueError, r"reference_velocity: got shape \(2,\), expected"),
        (dict(kl_coef=0.1), ValueError, "reference_velocity: got None, expected a tensor for kl_coef=0.1"),
        (dict(kl_coef=math.nan), ValueError, "kl_coef: got nan, expected a finite number"),
        (dict(beta=0), ValueError, "beta: got 0, expected a number > 0"),
        (dict(beta="x"), TypeError, "beta: got str, expected a number > 0"),
        (dict(adv_clip=math.inf), ValueError, "adv_clip: got inf, expected a finite number > 0"),
        (dict(adaptive=1e-5), TypeError, "adaptive: got float, expected True or False"),
        (dict(adaptive_min=0.0), ValueError, "adaptive_min: got 0.0, expected a number > 0"),
        (dict(impl="cuda"), ValueError, "impl: got 'cuda', expected 'auto' or one of"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, error, words):
    with pytest.raises(error, match=words) as caught:
        sk.nft_loss(**{**make((2, 3, 4, 5)), **change})
    assert "\n" not in str(caught.value)
