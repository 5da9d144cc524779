"""One GRPO iteration of the embedded world in the way of the public Flow-GRPO scripts.

A pass per image and step, lists of steps, log-probabilities from rollout and update subtracted, an eager loss.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from star.training.rollout import decode
from star.training.task import draw_prompts


def sde_step_with_logprob(velocity, sample, sigma, sigma_next, sigma_max, noise_level, noise=None, prev_sample=None):
    """Flow-GRPO's formulas (flow_grpo/diffusers_patch/sd3_sde_with_logprob.py) in float32. sigma, ...: float."""
    dt = sigma_next - sigma
    std = noise_level * math.sqrt(sigma / (1 - (sigma_max if sigma == 1 else sigma)))
    drift = (1 + std**2 * (1 - sigma) / (2 * sigma)) * dt
    mean = sample * (1 + std**2 / (2 * sigma) * dt) + velocity * drift
    s = std * math.sqrt(-dt)
    if prev_sample is None:
        prev_sample = mean + s * noise
    log_prob = -((prev_sample.detach() - mean) ** 2) / (2 * s**2) - math.log(s) - math.log(math.sqrt(2 * math.pi))
    return prev_sample, log_prob.mean(dim=tuple(range(1, log_prob.ndim)))


class EagerLoop:
    """Takes pipeline, prompts, reward and settings from a `star.train.Trainer`, and nothing else."""

    def __init__(self, trainer) -> None:
        config = trainer.config
        self.config, self.task, self.pipeline, self.reward = config, trainer.task, trainer.pipeline, trainer.reward
        self.groups, self.size = trainer.groups, trainer.size
        self.parameters = [p for p in self.pipeline.transformer.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, config.optimization.learning_rate, weight_decay=config.optimization.weight_decay
        )
        self.iteration = 0

    def velocity(self, latents, timestep, embeds, pooled):
        return self.pipeline.transformer(latents, embeds, pooled, timestep.expand(len(latents)), return_dict=False)[0]

    def step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """One iteration. Returns final latents, rewards and the gradient's mean norm over the updates."""
        config, groups = self.config, self.groups
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + self.iteration)
        prompts = [draw_prompts(self.task, config, self.iteration)[group].text for group in groups.tolist()]
        scheduler = self.pipeline.scheduler
        scheduler.set_timesteps(config.sampling.steps)
        sigmas, timesteps = scheduler.sigmas.tolist(), scheduler.timesteps
        with torch.no_grad():
            embeds, _, pooled, _ = self.pipeline.encode_prompt(
                prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
            )
            channels = self.pipeline.transformer.config.in_channels
            latents = torch.randn(int(groups.max()) + 1, channels, *self.size, generator=generator)[groups]
            all_latents, all_next, all_log_probs = [], [], []
            for i, timestep in enumerate(timesteps):
                velocity = self.velocity(latents, timestep, embeds, pooled)
                if i in config.sampling.trained_steps:
                    all_latents.append(latents)
                    noise = torch.randn(latents.shape, generator=generator)
                    latents, log_prob = sde_step_with_logprob(
                        velocity, latents, sigmas[i], sigmas[i + 1], sigmas[1], config.sampling.noise_level, noise
                    )
                    all_next.append(latents)
                    all_log_probs.append(log_prob)
                else:
                    latents = latents + (sigmas[i + 1] - sigmas[i]) * velocity
            rewards = self.reward(decode(self.pipeline, latents), prompts).reward
        advantages = self.advantages(rewards.numpy())
        norms = []
        updates, trained = config.optimization.updates_per_iteration, config.sampling.trained_steps
        for rows in torch.arange(len(groups)).chunk(updates):
            for k, i in enumerate(trained):
                velocity = self.velocity(all_latents[k][rows], timesteps[i], embeds[rows], pooled[rows])
                _, log_prob = sde_step_with_logprob(
                    *(velocity, all_latents[k][rows], sigmas[i], sigmas[i + 1], sigmas[1], config.sampling.noise_level),
                    prev_sample=all_next[k][rows],
                )
                clip, adv_clip = config.loss.clip_range, config.loss.adv_clip
                adv = torch.clamp(advantages[rows], -adv_clip, adv_clip)
                ratio = torch.exp(log_prob - all_log_probs[k][rows])
                unclipped, clipped = -adv * ratio, -adv * torch.clamp(ratio, 1 - clip, 1 + clip)
                loss = torch.mean(torch.maximum(unclipped, clipped))
                (loss / len(trained)).backward()
            norms.append(torch.nn.utils.clip_grad_norm_(self.parameters, config.optimization.max_grad_norm).item())
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.iteration += 1
        return latents, rewards, sum(norms) / len(norms)

    def advantages(self, rewards: np.ndarray) -> torch.Tensor:
        """Flow-GRPO's PerPromptStatTracker: over the group's deviation, or that of all rewards."""
        groups, advantages = self.groups.numpy(), np.zeros_like(rewards)
        for group in np.unique(groups):
            own = rewards[groups == group]
            std = np.std(rewards if self.config.loss.global_std else own)
            advantages[groups == group] = (own - own.mean()) / (std + self.config.loss.advantage_eps)
        return torch.as_tensor(advantages)
