"""TRL's own DDPO loss with a weighted prediction, where a trl that has its trainer is installed (up to 0.23.1)."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler

from builders import random_weights
from star.objective import grpo_loss, weighted_gradient

trl = pytest.importorskip("trl.trainer.ddpo_trainer", reason="no trl with a DDPOTrainer is installed (trl<=0.23.1)")
step = pytest.importorskip("trl.models.modeling_sd_base").scheduler_step


class Unet(torch.nn.Module):
    """A prediction that is a parameter, weighted or not, in the two rows of guidance."""

    def __init__(self, weights):
        super().__init__()
        self.prediction = torch.nn.Parameter(torch.randn(8, 4, 6, 6, generator=torch.Generator().manual_seed(0)))
        self.weights = weights

    def forward(self, latents, timesteps, embeds):
        return SimpleNamespace(sample=weighted_gradient(self.prediction, self.weights))


def trainer(weights, scheduler):
    config = SimpleNamespace(
        train_cfg=True, sample_guidance_scale=5.0, sample_eta=1.0, train_adv_clip_max=10.0, train_clip_range=1e-4
    )
    pipeline = SimpleNamespace(unet=Unet(weights), scheduler_step=lambda *a, **k: step(scheduler, *a, **k))
    result = SimpleNamespace(config=config, sd_pipeline=pipeline, autocast=contextlib.nullcontext)
    result.loss = lambda *arguments: trl.DDPOTrainer.loss(result, *arguments)
    return result


def test_trls_own_loss():
    scheduler = DDIMScheduler()
    scheduler.set_timesteps(10)
    latents, timesteps = torch.randn(4, 4, 6, 6), scheduler.timesteps[3].repeat(4)
    next_latents, advantages = torch.randn(4, 4, 6, 6), torch.tensor([1.0, -0.5, 2.0, -1.5])
    weights = random_weights((4, 6, 6)).repeat(2, 1, 1)
    found = {}
    for name, w in (("off", None), ("ones", torch.ones(8, 6, 6)), ("on", weights)):
        host = trainer(w, scheduler)
        with torch.no_grad():
            v = host.sd_pipeline.unet.prediction.chunk(2)
            guided = v[0] + 5.0 * (v[1] - v[0])
            log_probs = step(scheduler, guided, timesteps, latents, eta=1.0, prev_sample=next_latents).log_probs
        old = log_probs + torch.tensor([1e-5, 2e-3, -2e-3, 0.0])
        loss, kl, clipfrac = trl.DDPOTrainer.calculate_loss(
            host, latents, timesteps, next_latents, old, advantages, torch.zeros(8, 1)
        )
        (gradient,) = torch.autograd.grad(loss, host.sd_pipeline.unet.prediction)
        found[name] = loss.detach(), kl.detach(), clipfrac, gradient
    for a, b, c in zip(*(found[name][:3] for name in ("off", "ones", "on")), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert torch.equal(found["off"][3], found["ones"][3])
    torch.testing.assert_close(found["on"][3], found["off"][3] * weights[:, None])
    ours = grpo_loss(log_probs, old, advantages, adv_clip_max=10.0)
    torch.testing.assert_close(ours.loss, found["off"][0])
    torch.testing.assert_close(ours.approx_kl, found["off"][1])
    assert ours.clip_fraction == found["off"][2] == 0.5
