"""nft_loss, forward and backward to the velocity, beside the public DiffusionNFT computation and beside a copy."""

from __future__ import annotations

import torch

import star_kernels as sk
from losses import SHAPES, beside_a_copy
from runner import Sides

BETA, ADV_CLIP, KL_COEF = 1.0, 5.0, 1e-4  # config/nft.py of SD3


def nft_inputs(shape) -> dict:
    """Arguments of nft_loss, float32: at sigma 0.1 to 0.9, a policy that has moved a little, a reference."""
    torch.manual_seed(0)
    batch, _, rows, columns = shape
    sigma = torch.linspace(0.1, 0.9, batch)
    clean, noise, old_velocity = torch.randn(3, *shape).unbind(0)
    at = sigma.view(-1, 1, 1, 1)
    velocity = (old_velocity + 1e-2 * torch.randn(shape)).requires_grad_()
    weights = sk.allocate(torch.rand(batch, 2, rows * columns // 4), (rows // 2, columns // 2))
    return dict(velocity=velocity, old_velocity=old_velocity, sample=(1 - at) * clean + at * noise, clean=clean,
                sigma=sigma, reward_prob=torch.rand(batch), weights=weights,
                reference_velocity=old_velocity + 1e-2 * torch.randn(shape))  # fmt: skip


def diffusion_nft(velocity, old, xt, x0, t, r, reference):
    """The scalar loss from DiffusionNFT's formulas, scripts/train_nft_sd3.py."""
    axes, t = tuple(range(1, x0.ndim)), t.view(-1, 1, 1, 1)

    def branch(prediction):
        x0_prediction = xt - t * prediction
        with torch.no_grad():
            size = torch.abs(x0_prediction.double() - x0.double()).mean(dim=axes, keepdim=True).clip(min=0.00001)
        return ((x0_prediction - x0) ** 2 / size).mean(dim=axes)

    positive, negative = BETA * velocity + (1 - BETA) * old, (1.0 + BETA) * old - BETA * velocity
    loss = (r * branch(positive) / BETA + (1.0 - r) * branch(negative) / BETA) * ADV_CLIP
    return loss.mean() + KL_COEF * ((velocity - reference) ** 2).mean(dim=axes).mean()


def loss_and_gradient(inputs: dict) -> tuple[torch.Tensor, torch.Tensor]:
    loss = sk.nft_loss(**inputs, beta=BETA, adv_clip=ADV_CLIP, kl_coef=KL_COEF, impl="native").loss
    return loss, torch.autograd.grad(loss, inputs["velocity"])[0]


def agree(ours, theirs) -> None:
    (loss, gradient), (expected, expected_gradient) = ours, theirs
    torch.testing.assert_close(loss.double(), expected.double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-6 * expected_gradient.abs().max().item())


def against_diffusion_nft(pixels: int, compiled: bool = False) -> Sides:
    """At weights of one, where both are the same; ours multiplies them as it does others."""
    inputs = nft_inputs(SHAPES[pixels])
    inputs["weights"] = torch.ones_like(inputs["weights"])
    eager = [value for name, value in inputs.items() if name != "weights"]
    published = torch.compile(diffusion_nft) if compiled else diffusion_nft

    def theirs():
        loss = published(*eager)
        return loss, torch.autograd.grad(loss, inputs["velocity"])[0]

    return Sides(lambda: loss_and_gradient(inputs), theirs, agree, f"latents {SHAPES[pixels]}", compiled=compiled)


def bandwidth(pixels: int, alone: bool = False) -> Sides:
    """Each input and output counted once: five of the latents' size, the gradient, and the weights."""
    inputs = nft_inputs(SHAPES[pixels])
    flat = [inputs["velocity"].detach(), *(value for name, value in inputs.items() if name != "velocity")]

    def operator():
        return torch.ops.star.nft_loss_with_gradient_native(*flat, BETA, True, 1e-5, ADV_CLIP, KL_COEF)

    moved = 6 * inputs["sample"].nbytes + inputs["weights"].nbytes
    return beside_a_copy(operator if alone else lambda: loss_and_gradient(inputs), moved, SHAPES[pixels])
