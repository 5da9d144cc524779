"""nft_loss, forward and backward to the velocity, against the public DiffusionNFT computation and against a copy."""

import math

import pytest
import torch

from losses import SHAPES
from nft_losses import ADV_CLIP, BETA, KL_COEF, nft_compared, nft_inputs
from pairs import alternate


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_against_diffusion_nft(compiled, benchmark, row):
    ratios, notes = [], []
    for shape in SHAPES:
        ours, theirs = nft_compared(shape, compiled=compiled)
        pair = alternate(ours, theirs)
        ratios.append(pair.ratio)
        notes.append(f"{shape}: {pair.first * 1e3:.2f} ms against {pair.second * 1e3:.2f} ms")
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    name, limit = ("nft_loss_vs_compiled", 1.3) if compiled else ("nft_loss_vs_eager", 6.0)
    row(name, min(ratios), at_least=limit, note="; ".join(notes))


def test_bandwidth(benchmark, row):
    """Bytes per second, each input and output counted once, against copy_ moving (reading + writing) as many.

    The bare operator beside it shows what is the call's and what is the kernel's.
    """
    ratios, notes = [], []
    for shape in SHAPES:
        ours, _ = nft_compared(shape)
        inputs = nft_inputs(shape)
        flat = [inputs["velocity"].detach(), *(value for name, value in inputs.items() if name != "velocity")]

        def kernel(flat=flat):
            return torch.ops.star.nft_loss_with_gradient_native(*flat, BETA, True, 1e-5, ADV_CLIP, KL_COEF)

        elements = 6 * math.prod(shape) + math.prod(shape) // shape[1]  # five inputs, the gradient, the weights
        source = torch.randn(elements // 2)
        target = torch.empty_like(source)

        def copy(target=target, source=source):
            return target.copy_(source)

        pair, bare = alternate(ours, copy), alternate(kernel, copy)
        ratios.append(pair.ratio)
        rates = [4e-9 * elements / seconds for seconds in (pair.first, bare.first, pair.second)]
        notes.append("{}: {:.1f} GB/s, the operator alone {:.1f}, copy {:.1f}".format(shape, *rates))
    benchmark.pedantic(ours, rounds=5, warmup_rounds=1)
    row("nft_loss_bandwidth", min(ratios), at_least=0.7, note="; ".join(notes))
