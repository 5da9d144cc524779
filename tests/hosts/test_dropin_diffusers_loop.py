"""The loop with diffusers alone: its loss is the formula's, its rollout is on policy, the weights matter."""

import pytest
import torch

from builders import EPS, clipped, step_by_formula
from dropin import load_example
from star.objective import fused_grpo_loss, grpo_loss, sde_step_with_logprob
from star.shapes.model import LATENT_SIZE, load_pipeline

loop = load_example("diffusers_loop.py")
loop.GROUP = 3
TEXTS = ["a red circle", "two green rings"]


@pytest.fixture(scope="module")
def rolled():
    pipeline = load_pipeline()
    _, embeds, pooled, tokens = loop.encode(pipeline, TEXTS)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, 4, LATENT_SIZE, LATENT_SIZE, generator=generator).repeat_interleave(3, 0)
    return pipeline, embeds, pooled, *loop.rollout(pipeline, noise, embeds, pooled, tokens, generator)


def test_rollout(rolled):
    *_, latents, means, weights = rolled
    assert len(latents) == loop.STEPS + 1 and set(means) == set(loop.TRAINED)
    assert weights.shape == (6, loop.STEPS, LATENT_SIZE, LATENT_SIZE)
    # The images of a prompt part at the first trained step.
    assert torch.equal(latents[1][0], latents[1][2]) and not torch.equal(latents[2][0], latents[2][2])


@pytest.mark.parametrize("i", loop.TRAINED)
def test_loss(rolled, i):
    pipeline, embeds, pooled, latents, means, weights = rolled
    plan, t = pipeline.scheduler, pipeline.scheduler.timesteps[i]
    with torch.no_grad():
        on_policy = pipeline.transformer(latents[i], embeds, pooled, t.expand(6), return_dict=False)[0]
    v = (on_policy + 0.01 * torch.randn_like(on_policy)).requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 0.0, 2.0, -0.5, -1.5])
    call = lambda v, w: fused_grpo_loss(
        plan, v, t, latents[i], latents[i + 1], advantages, w, prev_sample_mean=means[i], clip_range=0.5
    )
    # The stored means are float32 in another order of operations than the kernel's.
    assert abs(call(on_policy, None).statistics.ratio_mean - 1) < 64 * EPS
    loss, weighted = call(v, None).loss, call(v, weights[:, i]).loss
    sigmas = plan.sigmas[i].expand(6), plan.sigmas[i + 1].expand(6), plan.sigmas[1].item()
    args = (latents[i].double(), 0.7, "sde", latents[i + 1].double())
    new, old = (step_by_formula(*sigmas, x.double(), *args)[0] for x in (v, on_policy))
    torch.testing.assert_close(loss.double(), clipped(new, old, advantages.double(), 0.5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weighted, loss, rtol=1e-5, atol=1e-6)
    (plain,), (allocated,) = (torch.autograd.grad(x, v) for x in (loss, weighted))
    torch.testing.assert_close(allocated, plain * weights[:, i, None], rtol=1e-4, atol=1e-6 * plain.abs().max().item())
    # The same from log-probs, in plain PyTorch.
    at = lambda x: sde_step_with_logprob(plan, x, t, latents[i], prev_sample=latents[i + 1], per_location=True)[1]
    again = grpo_loss(at(v), at(on_policy), advantages, weights[:, i], clip_range=0.5).loss
    torch.testing.assert_close(again, weighted, rtol=1e-4, atol=1e-5)
    (again,) = torch.autograd.grad(again, v)
    torch.testing.assert_close(again, allocated, rtol=1e-3, atol=1e-5 * plain.abs().max().item())


def test_training_runs_with_and_without_weights(capsys, monkeypatch):
    monkeypatch.setattr(loop, "GROUP", 2)
    assert len(loop.train(2)) == 2
    assert "top tenth 0.100" not in capsys.readouterr().out
    loop.train(1, weighted=False)
    assert "top tenth 0.100" in capsys.readouterr().out
