"""policy_loss, forward and backward to the velocity, against the public Flow-GRPO computation and against a copy."""

import functools
import math

import pytest
import torch

import star_kernels as sk
from pairs import alternate
from peaks import in_a_process, linux

SHAPES = ((9, 16, 64, 64), (8, 16, 128, 128))  # 512 and 1024 px; float32. A row holds the worse of the two.
CLIP = 1e-4


def step(shape):
    """A step at sigma 0.7 of ten, noise 0.7, and a policy that has drifted a little since. float32."""
    torch.manual_seed(0)
    batch, _, rows, columns = shape
    sigma, dt, noise_level = torch.full((batch,), 0.7), torch.full((batch,), -0.08), 0.7
    std = noise_level * (sigma / (1 - sigma)).sqrt()
    transition = sk.Transition.gaussian(
        1 + std**2 / (2 * sigma) * dt, (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt, std * (-dt).sqrt(), std
    )
    sample, velocity = torch.randn(shape), torch.randn(shape)
    prev_sample, old_mean = sk.gaussian_step(sample, velocity, torch.randn(shape), transition)
    weights = sk.allocate(torch.rand(batch, 2, rows * columns // 4), (rows // 2, columns // 2))
    velocity = (velocity + 1e-4 * torch.randn(shape)).requires_grad_()
    return dict(velocity=velocity, sample=sample, prev_sample=prev_sample, old_mean=old_mean, transition=transition,
                advantages=torch.randn(batch), weights=weights), (sigma, dt, std)  # fmt: skip


def flow_grpo(velocity, sample, prev_sample, sigma, dt, std, advantages, old_log_prob):
    """The scalar loss from Flow-GRPO's formulas: sd3_sde_with_logprob.py and the "grpo logic" of train_sd3.py."""
    sigma, dt, std = (t.view(-1, 1, 1, 1) for t in (sigma, dt, std))
    drift = (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    mean = sample * (1 + std**2 / (2 * sigma) * dt) + velocity * drift
    s = std * torch.sqrt(-dt)
    log_prob = -((prev_sample - mean) ** 2) / (2 * s**2) - torch.log(s) - math.log(math.sqrt(2 * math.pi))
    ratio = torch.exp(log_prob.mean(dim=(1, 2, 3)) - old_log_prob)
    advantages = torch.clamp(advantages, -5, 5)
    return torch.maximum(-advantages * ratio, -advantages * torch.clamp(ratio, 1 - CLIP, 1 + CLIP)).mean()


def both(shape, compiled=False, delta=False, **changes):
    """(ours, Flow-GRPO's), each a function that returns loss and gradient; first shown to agree at weights of one.

    Ours takes what theirs takes, the old log-probs, or with `delta` the old mean, one tensor more to read.
    """
    arguments, schedule = step(shape)
    old_log_prob = sk.log_prob(arguments["prev_sample"], arguments["old_mean"], arguments["transition"])
    if not delta:
        arguments |= dict(old_mean=None, old_log_prob=old_log_prob)
    loss_of = torch.compile(flow_grpo) if compiled else flow_grpo

    def ours(**changes):
        loss = sk.policy_loss(**{**arguments, **changes}, clip_range=CLIP, impl="native").loss
        return loss, torch.autograd.grad(loss, arguments["velocity"])[0]

    def theirs():
        velocity = arguments["velocity"]
        loss = loss_of(velocity, arguments["sample"], arguments["prev_sample"], *schedule, arguments["advantages"],
                       old_log_prob)  # fmt: skip
        return loss, torch.autograd.grad(loss, velocity)[0]

    (loss, gradient), (expected, expected_gradient) = ours(weights=None), theirs()
    # Their log-probs are of order one in float32, so their ratio is off by a few 1e-7.
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6 * expected_gradient.abs().max().item())
    return functools.partial(ours, **changes), theirs


def describe(shape, first, second):
    return f"{shape}: {first * 1e3:.2f} ms against {second * 1e3:.2f} ms"


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_against_flow_grpo(compiled, benchmark, row):
    ratios, notes = [], []
    for shape in SHAPES:
        ours, theirs = both(shape, compiled=compiled)
        delta, _ = both(shape, delta=True)
        pair, delta_pair = alternate(ours, theirs), alternate(delta, theirs)
        ratios.append(pair.ratio)
        notes.append(
            f"{describe(shape, pair.first, pair.second)} (from the old mean {delta_pair.ratio:.2f} times faster)"
        )
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    name, limit = ("loss_vs_compiled", 1.3) if compiled else ("loss_vs_eager", 6.0)
    row(name, min(ratios), at_least=limit, note="; ".join(notes))


def test_spatial_against_scalar(benchmark, row):
    ratios, notes = [], []
    for shape in SHAPES:
        spatial, _ = both(shape, delta=True)
        scalar, _ = both(shape, delta=True, weights=None)
        pair = alternate(scalar, spatial, rounds=61)
        ratios.append(pair.ratio)
        notes.append(describe(shape, pair.second, pair.first))
    benchmark.pedantic(spatial, rounds=5, warmup_rounds=1)
    row("loss_spatial_vs_scalar", max(ratios), at_most=1.10, note="; ".join(notes))


def test_bandwidth(benchmark, row):
    """Bytes per second, each input and output counted once, against copy_ moving (reading + writing) as many.

    The bare operator beside it shows what is the call's and what is the kernel's.
    """
    ratios, notes = [], []
    for shape in SHAPES:
        ours, _ = both(shape, delta=True)
        arguments, _ = step(shape)
        velocity = arguments["velocity"].detach()

        def kernel(arguments=arguments, velocity=velocity):
            flat = (velocity, arguments["sample"], arguments["prev_sample"], *arguments["transition"],
                    arguments["advantages"], arguments["weights"], arguments["old_mean"], None, None, None,
                    "token", CLIP, CLIP, 5.0, 0.0, False)  # fmt: skip
            with torch.no_grad():
                loss, _, log_ratio = torch.ops.star.policy_loss_native(*flat)
                return torch.ops.star.policy_loss_gradient_native(torch.ones_like(loss), log_ratio, *flat)

        elements = 5 * math.prod(shape) + math.prod(shape) // shape[1]  # four inputs, the gradient, the weights
        source = torch.randn(elements // 2)
        target = torch.empty_like(source)

        def copy(target=target, source=source):
            return target.copy_(source)

        pair, bare = alternate(ours, copy), alternate(kernel, copy)
        ratios.append(pair.ratio)
        rates = [4e-9 * elements / seconds for seconds in (pair.first, bare.first, pair.second)]
        notes.append("{}: {:.1f} GB/s, the operator alone {:.1f}, copy {:.1f}".format(shape, *rates))
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    row("loss_bandwidth", min(ratios), at_least=0.7, note="; ".join(notes))


def loss_peak(peak, shape) -> tuple[int]:
    """Peak memory of forward and backward beyond the gradient."""
    arguments, _ = step(shape)

    def call():
        loss = sk.policy_loss(**arguments, clip_range=CLIP, impl="native").loss
        return torch.autograd.grad(loss, arguments["velocity"])[0]

    for _ in range(3):
        call()
    return (peak(call) - arguments["velocity"].nbytes,)


@linux
def test_memory(benchmark, row):
    shares, notes = [], []

    def measure():
        for shape in SHAPES:
            (extra,) = in_a_process("test_loss", "loss_peak", shape)
            inputs = 4 * (4 * math.prod(shape) + math.prod(shape) // shape[1])
            shares.append(extra / inputs)
            notes.append(f"{shape}: {extra >> 10} KiB beside {inputs >> 20} MiB of inputs")

    benchmark.pedantic(measure, rounds=1)
    row("loss_memory", max(shares), at_most=0.01, note="; ".join(notes))
