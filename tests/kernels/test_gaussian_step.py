"""gaussian_step: every implementation against its formula, in the same bits as each other and as policy_loss."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import devices
import star_kernels as sk
from star_kernels import reference

each_implementation = devices.each_implementation("gaussian_step")
FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def transition(batch, dtype=torch.float32):
    return sk.Transition.gaussian(*(torch.rand(3, batch, dtype=dtype) + 0.5).unbind(0))


def laid_out(x, layout):
    """The values of x in other strides."""
    if layout == "strided":
        return x.repeat_interleave(2, -1)[..., ::2]
    if layout == "channels_last" and x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "reversed":
        return x.permute(*reversed(range(x.ndim))).contiguous().permute(*reversed(range(x.ndim)))
    return x


layouts = st.sampled_from(["contiguous", "strided", "channels_last", "reversed"])


@each_implementation
@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 9), st.integers(1, 70)),
        st.tuples(st.integers(0, 3), st.integers(1, 700)),
        st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    ),
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 4),
    layout=st.tuples(*[layouts] * 4),
    noised=st.sampled_from(["by the caller", "the same for all", "by seeds", "not"]),
    scale=st.sampled_from([None, 0, 1.0, 4.5, -2.0]),
)
def test_value(impl, shape, dtypes, layout, noised, scale):
    torch.manual_seed(sum(shape))
    sample, velocity, unconditional, noise = (
        laid_out(torch.randn(shape, dtype=torch.float64).to(dtype), kind)
        for dtype, kind in zip(dtypes, layout, strict=True)
    )
    step, options = transition(shape[0]), {}
    v, terms = velocity.double(), velocity.double().abs()
    if scale is not None:
        options |= {"unconditional_velocity": unconditional, "guidance_scale": scale}
        u = unconditional.double()
        v, terms = u + scale * (v - u), u.abs() + abs(scale) * (terms + u.abs())
    if noised == "the same for all":
        noise = noise[:1].expand(shape) if shape[0] else noise
    elif noised == "by seeds":
        options["seeds"] = torch.randint(-(2**63), 2**63 - 1, (shape[0],))
        noise = reference.normals(options["seeds"], math.prod(shape[1:])).view(shape)
    given = noise if noised in ("by the caller", "the same for all") else None
    noise = torch.zeros(shape) if noised == "not" else noise
    prev_sample, mean = sk.gaussian_step(sample, velocity, given, step, **options, impl=impl)
    a, b, s = (field.double().view(-1, *(1,) * (len(shape) - 1)) for field in step[:3])
    wide = torch.float64 in dtypes[: 2 if scale is None else 3]
    assert mean.dtype == (torch.float64 if wide else torch.float32) and prev_sample.dtype == dtypes[0]
    assert mean.shape == prev_sample.shape == shape and mean.is_contiguous() and prev_sample.is_contiguous()
    terms = (a * sample.double()).abs() + b.abs() * terms
    expected = a * sample.double() + b * v
    eps = torch.finfo(mean.dtype).eps
    assert ((mean.double() - expected).abs() <= (2 if scale is None else 4) * eps * terms).all()
    expected = expected + s * noise.double()
    rounding = torch.finfo(dtypes[0]).eps * expected.abs()
    assert ((prev_sample.double() - expected).abs() <= 6 * eps * (terms + (s * noise.double()).abs()) + rounding).all()
    # No sums, so the same bits everywhere: a rollout on one device can be updated on another.
    got = sk.gaussian_step(sample, velocity, given, step, **options, impl="reference")
    assert torch.equal(got[0], prev_sample) and torch.equal(got[1], mean)
    assert noised != "not" or torch.equal(prev_sample, mean.to(dtypes[0]))


@each_implementation
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("first", ["unconditional", "conditional"])
def test_guidance_has_the_bits_of_pytorchs_own_operations(impl, dtype, first):
    """Of a model's output with its halves in either order: an update that guides with autograd has a ratio of 1."""
    output, sample, noise = torch.randn(6, 4, 7, 5).to(dtype), torch.randn(3, 4, 7, 5), torch.randn(3, 4, 7, 5)
    unconditional, conditional = output.chunk(2) if first == "unconditional" else reversed(output.chunk(2))
    step, options = transition(3), dict(unconditional_velocity=unconditional, guidance_scale=4.3)
    prev_sample, mean = sk.gaussian_step(sample, conditional, noise, step, **options, impl=impl)
    u, c = (half if dtype == torch.float64 else half.float() for half in (unconditional, conditional))
    velocity = u + 4.3 * (c - u)
    by_hand = sk.gaussian_step(sample, velocity, noise, step, impl=impl)
    assert torch.equal(by_hand[0], prev_sample) and torch.equal(by_hand[1], mean)
    seen = sk.policy_loss(velocity, sample, prev_sample, step, torch.randn(3), old_mean=mean, clip_range=0.0).statistics
    assert seen.approx_kl == 0 and seen.ratio_min == seen.ratio_max == 1
    swapped = dict(unconditional_velocity=conditional, guidance_scale=4.3)
    assert not torch.equal(sk.gaussian_step(sample, unconditional, noise, step, **swapped, impl=impl)[1], mean)


def philox_by_hand(key, words):
    """In Python's integers. key: of 64 bits. words: four of 32 bits."""
    key = [key % 2**32, key >> 32]
    for _ in range(10):
        first, second = words[0] * 0xD2511F53, words[2] * 0xCD9E8D57
        words = (second >> 32 ^ words[1] ^ key[0], second % 2**32, first >> 32 ^ words[3] ^ key[1], first % 2**32)
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return words


# Of the generator's authors (Random123's known answers for philox4x32-10).
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)


@pytest.mark.parametrize(
    ("key", "words", "expected"),
    [
        (0, (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (2**64 - 1, (2**32 - 1,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (0xA4093822 | 0x299F31D0 << 32, PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
    ],
)
def test_the_generators_words_are_those_that_its_authors_give(key, words, expected):
    assert philox_by_hand(key, words) == expected
    if words[2:] == (0, 0):
        assert tuple(map(int, reference.philox(torch.tensor([key]), torch.tensor([words[0]])))) == expected


def test_drawn_noise_is_the_transform_of_the_generators_words():
    seeds = torch.tensor([0, 1, -1, 2**40 + 17, -(2**63)])
    large = torch.tensor([2**32 - 1, 2**32, 2**40 + 3])  # of elements beyond 2**34
    found = torch.stack(reference.philox(seeds, large), -1).tolist()
    by_hand = lambda seed, c: list(philox_by_hand(seed % 2**64, (c % 2**32, c >> 32, 0, 0)))
    assert found == [[by_hand(seed, c) for c in large.tolist()] for seed in seeds.tolist()]
    drawn = reference.normals(seeds, 4 * 50)
    for seed, row in zip(seeds.tolist(), drawn.double().view(5, 50, 2, 2), strict=True):
        words = torch.tensor([by_hand(seed, counter) for counter in range(50)])
        radius = (-2 * ((words[:, ::2] | 1).float().double() / 2**32).log()).sqrt()
        angle = 2 * math.pi * words[:, 1::2].double() / 2**32
        expected = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)
        # A rounding of the angle, and a few of the rest.
        assert ((row - expected).abs() <= 4 * torch.finfo(torch.float32).eps * radius[..., None]).all()


def test_normals_of_the_words_at_the_ends_of_their_range():
    ends = [0, 1, 2, 2**29 - 1, 2**29, 2**30, 2**31 - 1, 2**31, 3 * 2**30, 2**32 - 2**29, 2**32 - 2, 2**32 - 1]
    first, second = torch.cartesian_prod(torch.tensor(ends), torch.tensor(ends)).unbind(1)
    radius = (-2 * ((first | 1).float().double() / 2**32).log()).sqrt()
    angle = 2 * math.pi * second.double() / 2**32
    for got, turned in zip(reference.normal_pair(first, second), (angle.cos(), angle.sin()), strict=True):
        assert ((got.double() - radius * turned).abs() <= 4 * torch.finfo(torch.float32).eps * radius).all()


def test_drawn_noise_is_standard_normal_and_independent():
    drawn = reference.normals(torch.arange(4), 1 << 18).double()
    count = drawn.numel()
    for power, expected, spread in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs((drawn**power).mean().item() - expected) < 5 * (spread / count) ** 0.5
    for level in (-2.0, -0.5, 0.0, 1.0, 3.0):
        expected = 0.5 * (1 + math.erf(level / 2**0.5))
        assert abs((drawn < level).double().mean().item() - expected) < 5 * (expected * (1 - expected) / count) ** 0.5
    between = torch.corrcoef(drawn)  # of samples with neighboring seeds
    neighbors = torch.corrcoef(drawn.view(-1, 8).T)  # of elements, of one draw and of two
    for found in (between - torch.eye(4), neighbors - torch.eye(8)):
        assert found.abs().max() < 6 * (8 / count) ** 0.5


@each_implementation
@pytest.mark.parametrize("elements", [1, 3, 4, 1021, 1024, 2600])
def test_drawn_noise_follows_from_the_seed_and_the_elements_number(impl, elements):
    seeds = torch.tensor([5, -3, 2**62 + 1, 5])
    nothing, step = torch.zeros(4, elements), transition(4)._replace(s=torch.ones(4))
    drawn = sk.gaussian_step(nothing, nothing, None, step, seeds=seeds, impl=impl)[0]
    assert torch.equal(drawn, reference.normals(seeds, elements))
    assert torch.equal(drawn[0], drawn[3]) and not torch.equal(drawn[0], drawn[1])
    alone = sk.gaussian_step(nothing[2:3], nothing[2:3], None, step.rows(slice(2, 3)), seeds=seeds[2:3], impl=impl)[0]
    assert torch.equal(alone[0], drawn[2])
    every_second = torch.stack([seeds, seeds + 1], 1).flatten()[::2]
    assert torch.equal(sk.gaussian_step(nothing, nothing, None, step, seeds=every_second, impl=impl)[0], drawn)


@each_implementation
@devices.each_implementation("policy_loss", "loss")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(3, 4, 7, 5), (3, 35, 4)], ids=["planar", "packed"])
@pytest.mark.parametrize("ratio", ["token", "location"])
def test_policy_loss_makes_the_same_mean(impl, loss, dtype, shape, ratio):
    """On policy the log-ratio is exactly 0 everywhere, whoever took the step and whoever updates."""
    sample, velocity, noise = torch.randn(3, *shape).to(dtype).unbind(0)
    step = transition(3)
    prev_sample, mean = sk.gaussian_step(sample, velocity, noise, step, impl=impl)
    seen = sk.policy_loss(
        velocity, sample, prev_sample, step, torch.randn(3), old_mean=mean, ratio=ratio, clip_range=0.0, impl=loss
    ).statistics
    assert seen.approx_kl == 0 and seen.ratio_min == seen.ratio_max == 1 and seen.clip_fraction == 0


@each_implementation
def test_without_noise_the_step_is_its_mean_and_no_gradient_flows(impl):
    sample, velocity, noise = torch.randn(3, 2, 4, 5, 6, requires_grad=True).unbind(0)
    step = transition(2)._replace(s=torch.zeros(2))
    prev_sample, mean = sk.gaussian_step(sample, velocity, noise, step, impl=impl)
    assert torch.equal(prev_sample, mean)
    assert not prev_sample.requires_grad and not mean.requires_grad


def test_log_prob_is_the_density_of_the_step():
    sample, velocity, noise = torch.randn(3, 2, 4, 5, 6).unbind(0)
    step = transition(2)
    prev_sample, mean = sk.gaussian_step(sample, velocity, noise, step)
    a, b, s = (field.double().view(2, 1, 1, 1) for field in step[:3])
    expected = torch.distributions.Normal(a * sample + b * velocity, s).log_prob(prev_sample.double())
    got = sk.log_prob(prev_sample, mean, step)
    torch.testing.assert_close(got.double(), expected.mean((1, 2, 3)), rtol=1e-5, atol=1e-5)
    per_location = sk.log_prob(prev_sample, mean, step, per_location=True)
    torch.testing.assert_close(per_location.double(), expected.mean(1), rtol=1e-4, atol=1e-4)


@each_implementation
def test_same_bits_for_any_number_of_threads(impl, at_thread_counts):
    sample, velocity, noise = torch.randn(3, 5, 4, 97, 101).unbind(0)
    step = transition(5)
    first, *others = at_thread_counts(lambda: sk.gaussian_step(sample, velocity.bfloat16(), noise, step, impl=impl))
    for other in others:
        assert torch.equal(first[0], other[0]) and torch.equal(first[1], other[1])


@each_implementation
def test_opcheck(impl):
    op = getattr(torch.ops.star, f"gaussian_step_{impl}").default
    sample, velocity, noise = torch.randn(3, 2, 4, 3, 3).unbind(0)
    torch.library.opcheck(op, (sample, velocity, noise, *transition(2)[:3]))
    sample = sample.to(torch.bfloat16, memory_format=torch.channels_last)
    torch.library.opcheck(op, (sample, velocity, noise.double(), *transition(1).expand(2)[:3]))
    torch.library.opcheck(op, (sample, velocity, None, *transition(2)[:3], velocity.double(), 2.0, torch.arange(2)))


def test_a_number_that_changes_between_the_calls_of_a_compiled_step():
    def step(sample, scale):
        options = dict(unconditional_velocity=sample + 1, guidance_scale=scale)
        prev_sample, _ = sk.gaussian_step(sample, sample, None, STEP, **options)
        return sk.allocate(prev_sample.flatten(2).abs(), (3, 4), cap=scale)

    torch._dynamo.reset()
    sample, compiled = torch.randn(2, 4, 3, 4), torch.compile(step, fullgraph=True, backend="aot_eager")
    for scale in (3.0, 4.5, 2.25, 5, 6):
        assert torch.equal(compiled(sample, scale), step(sample, scale))


STEP = transition(2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(sample=torch.randn(2)), ValueError, r"sample: got shape \(2,\), expected \(B, \.\.\.\)"),
        (dict(sample=[1.0]), TypeError, "sample: got list, expected a torch.Tensor"),
        (dict(velocity=torch.randn(2, 4, 3)), ValueError, r"velocity: got shape \(2, 4, 3\), expected \(2, 3, 4\)"),
        (dict(noise=torch.ones(2, 3, 4, dtype=torch.int32)), TypeError, "noise: got torch.int32"),
        (dict(transition=STEP.rows(slice(0, 1))), ValueError, r"transition.a: got shape \(1,\), expected \(2\)"),
        (
            dict(guidance_scale=3.0),
            ValueError,
            "unconditional_velocity: got None, expected a tensor for guidance_scale=3.0",
        ),
        (dict(guidance_scale=float("nan")), ValueError, "guidance_scale: got nan, expected a finite number"),
        (dict(guidance_scale="x"), TypeError, "guidance_scale: got str, expected a finite number"),
        (
            dict(unconditional_velocity=torch.randn(2, 3)),
            ValueError,
            r"unconditional_velocity: got shape \(2, 3\), exp",
        ),
        (dict(unconditional_velocity=3), TypeError, "unconditional_velocity: got int, expected a torch.Tensor"),
        (dict(seeds=torch.arange(2)), ValueError, "noise, seeds: got both, expected at most one of them"),
        (dict(noise=None, seeds=torch.arange(3)), ValueError, r"seeds: got shape \(3,\), expected \(2\)"),
        (dict(noise=None, seeds=torch.ones(2)), TypeError, "seeds: got torch.float32, expected an int64 tensor"),
        (dict(noise=None, seeds=7), TypeError, "seeds: got int, expected an int64 tensor"),
        (dict(transition=None), TypeError, "transition: got NoneType, expected a star_kernels.Transition"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, error, words):
    tensors = dict.fromkeys(("sample", "velocity", "noise"), torch.randn(2, 3, 4))
    with pytest.raises(error, match=words) as caught:
        sk.gaussian_step(**{**tensors, "transition": STEP, **change})
    assert "\n" not in str(caught.value)
