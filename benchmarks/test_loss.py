"""policy_loss, forward and backward to the velocity, against the public Flow-GRPO computation and against a copy."""

import math

import pytest
import torch

import star_kernels as sk
from losses import ADV_CLIP, CLIP, SHAPES, compared, loss_inputs
from pairs import alternate
from peaks import in_a_process, linux


def describe(shape, first, second):
    return f"{shape}: {first * 1e3:.2f} ms against {second * 1e3:.2f} ms"


def bare_loss(inputs):
    """The operator alone, loss and gradient, of the arguments of policy_loss."""
    flat = (inputs["velocity"].detach(), inputs["sample"], inputs["prev_sample"], *inputs["transition"],
            inputs["advantages"], inputs["weights"], inputs["old_mean"], None, None, None, "token", CLIP, CLIP,
            ADV_CLIP, 0.0, False)  # fmt: skip
    return lambda: torch.ops.star.policy_loss_with_gradient_native(*flat)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_against_flow_grpo(compiled, benchmark, row):
    ratios, notes = [], []
    for shape in SHAPES:
        ours, theirs = compared(shape, compiled=compiled)
        delta, _ = compared(shape, delta=True)
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
        spatial, _ = compared(shape, delta=True)
        scalar, _ = compared(shape, delta=True, weighted=False)
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
        ours, _ = compared(shape, delta=True)
        kernel = bare_loss(loss_inputs(shape)[0])
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


def test_host_time(benchmark, row):
    """Forward and backward of tensors so small that time is the host's, less the bare operator's time; one thread."""
    inputs, _ = loss_inputs((2, 1, 2, 2))
    velocity = inputs["velocity"]
    bare = bare_loss(inputs)

    def call():
        loss = sk.policy_loss(**inputs, clip_range=CLIP, impl="native").loss
        return torch.autograd.grad(loss, velocity)[0]

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        pair = alternate(bare, call, rounds=101)
    finally:
        torch.set_num_threads(threads)
    benchmark.pedantic(call, rounds=1)
    us = lambda ratio: (ratio - 1) * pair.first * 1e6
    low, high = map(us, pair.quartiles)
    note = f"us; quartiles {low:.1f}, {high:.1f}; the operator, loss and gradient, {pair.first * 1e6:.1f} us"
    row("loss_host", us(pair.ratio), at_most=55, note=note)


@linux
def test_memory(benchmark, row):
    shares, notes = [], []

    def measure():
        for shape in SHAPES:
            (extra,) = in_a_process("losses", "loss_peak", shape)
            inputs = 4 * (4 * math.prod(shape) + math.prod(shape) // shape[1])
            shares.append(extra / inputs)
            notes.append(f"{shape}: {extra >> 10} KiB beside {inputs >> 20} MiB of inputs")

    benchmark.pedantic(measure, rounds=1)
    row("loss_memory", max(shares), at_most=0.01, note="; ".join(notes))
