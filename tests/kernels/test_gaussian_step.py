"""gaussian_step: every implementation against its formula, in the same bits as each other and as policy_loss."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import devices
import star_kernels as sk

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
    dtypes=st.tuples(*[st.sampled_from(FLOATS)] * 3),
    layout=st.tuples(layouts, layouts, layouts),
    expanded=st.booleans(),
)
def test_value(impl, shape, dtypes, layout, expanded):
    torch.manual_seed(sum(shape))
    sample, velocity, noise = (
        laid_out(torch.randn(shape, dtype=torch.float64).to(dtype), kind)
        for dtype, kind in zip(dtypes, layout, strict=True)
    )
    if expanded:  # one noise for the whole batch
        noise = noise[:1].expand(shape) if shape[0] else noise
    step = transition(shape[0])
    prev_sample, mean = sk.gaussian_step(sample, velocity, noise, step, impl=impl)
    a, b, s = (field.double().view(-1, *(1,) * (len(shape) - 1)) for field in step[:3])
    wide = torch.float64 in dtypes[:2]
    assert mean.dtype == (torch.float64 if wide else torch.float32) and prev_sample.dtype == dtypes[0]
    assert mean.shape == prev_sample.shape == shape and mean.is_contiguous() and prev_sample.is_contiguous()
    terms = (a * sample.double()).abs() + (b * velocity.double()).abs()
    expected = a * sample.double() + b * velocity.double()
    eps = torch.finfo(mean.dtype).eps
    assert ((mean.double() - expected).abs() <= 2 * eps * terms).all()
    expected = expected + s * noise.double()
    rounding = torch.finfo(dtypes[0]).eps * expected.abs()
    assert ((prev_sample.double() - expected).abs() <= 4 * eps * (terms + (s * noise.double()).abs()) + rounding).all()
    # No sums, so the same bits everywhere: a rollout on one device can be updated on another.
    got = sk.gaussian_step(sample, velocity, noise, step, impl="reference")
    assert torch.equal(got[0], prev_sample) and torch.equal(got[1], mean)


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


STEP = transition(2)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(sample=torch.randn(2)), ValueError, r"sample: got shape \(2,\), expected \(B, \.\.\.\)"),
        (dict(sample=[1.0]), TypeError, "sample: got list, expected a torch.Tensor"),
        (dict(velocity=torch.randn(2, 4, 3)), ValueError, r"velocity: got shape \(2, 4, 3\), expected \(2, 3, 4\)"),
        (dict(noise=torch.ones(2, 3, 4, dtype=torch.int32)), TypeError, "noise: got torch.int32"),
        (dict(transition=STEP.rows(slice(0, 1))), ValueError, r"transition.a: got shape \(1,\), expected \(2\)"),
        (dict(transition=None), TypeError, "transition: got NoneType, expected a star_kernels.Transition"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, error, words):
    tensors = dict.fromkeys(("sample", "velocity", "noise"), torch.randn(2, 3, 4))
    with pytest.raises(error, match=words) as caught:
        sk.gaussian_step(**{**tensors, "transition": STEP, **change})
    assert "\n" not in str(caught.value)
