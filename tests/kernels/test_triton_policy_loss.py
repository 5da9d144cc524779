"""policy_loss in Triton: sums over many tiles and samples, and exp(x) - 1, which Triton does not have."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
import triton
import triton.language as tl

import star_kernels as sk
import triton_bfloat16  # noqa: F401
from star_kernels.triton import policy_loss as kernels
from star_kernels.triton.policy_loss import expm1


def arguments(batch, channels, *size):
    shape, step = (batch, channels, *size), sk.Transition.gaussian(*(torch.rand(3, batch) + 0.5).unbind(0))
    velocity, sample, noise = torch.randn(3, *shape).unbind(0)
    prev_sample, old_mean = sk.gaussian_step(sample, velocity, noise, step)
    velocity = velocity + 0.1 * torch.randn(shape)
    return velocity, sample, prev_sample, step, torch.randn(batch), torch.rand(batch, *size), old_mean


def run(velocity, sample, prev_sample, step, advantages, weights, old_mean, **options):
    velocity = velocity.clone().requires_grad_()
    out = sk.policy_loss(velocity, sample, prev_sample, step, advantages, weights, old_mean=old_mean, **options)
    return out.loss.detach(), torch.stack(tuple(out.statistics)), torch.autograd.grad(out.loss, velocity)[0]


@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 66, 512), (kernels.BLOCK_B + 1, 3, 5, 5)],
    ids=["more tiles than are added at once", "more samples than are added at once"],
)
def test_many_tiles_and_many_samples(ratio, size):
    given, options = arguments(*size), dict(ratio=ratio, clip_range=(0.05, 0.1))
    cut = kernels.cut(size)
    assert cut.grid[0] > kernels.BLOCK_T or cut.batch > kernels.BLOCK_B
    for got, expected in zip(
        run(*given, **options, impl="triton"), run(*given, **options, impl="reference"), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=3e-5, atol=1e-6 * expected.abs().max().item())


def test_more_channels_than_a_program_holds_at_once():
    given = arguments(1, kernels.MOST_CHANNELS + 3, 2, 3)
    for got, expected in zip(run(*given, impl="triton"), run(*given, impl="reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=3e-5, atol=1e-6 * expected.abs().max().item())


def test_log_ratios_do_not_depend_on_the_batch():
    velocity, sample, prev_sample, step, advantages, weights, old_mean = arguments(3, 4, 9, 9)
    call = lambda i: kernels.launch(
        velocity[i], sample[i], prev_sample[i], *step.rows(i), advantages[i], weights[i], old_mean[i], None, None, None,
        "sample", 0.1, 0.1, 5.0, 0.0, False,
    )  # fmt: skip
    assert torch.equal(call(slice(1, 2))[2], call(slice(0, 3))[2][1:2])


@triton.jit
def apply_expm1(x, y, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y + at, expm1(tl.load(x + at)))


@pytest.mark.parametrize(("dtype", "roundings"), [(torch.float32, 32), (torch.float64, 4)])
def test_expm1(dtype, roundings):
    """Within 2 roundings near 0; further out the exponential of x in a type is off by x of its roundings."""
    x = torch.cat([torch.linspace(-30, 30, 257), torch.logspace(-12, 0, 127), -torch.logspace(-12, 0, 127)])
    x = torch.cat([x, torch.tensor([0.0])])[:512].to(dtype)
    y = torch.empty_like(x)
    apply_expm1[(1,)](x, y, BLOCK=512)
    expected = torch.from_numpy(np.expm1(x.cpu().to(torch.float64).numpy()))
    error = ((y.cpu().double() - expected) / expected.where(expected != 0, 1)).abs() / torch.finfo(dtype).eps
    assert error[x.cpu().abs() <= 0.5].max() <= 2 and error.max() <= roundings
    assert y[x == 0].abs().max() == 0
