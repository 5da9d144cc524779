"""DiffusionNFT's objective: the policy is drawn to its good images and away from its bad ones, in the forward process.

The old policy samples the images with any deterministic sampler. Each image is noised again, to levels of its own, and
the velocity of the old policy there is what the new one moves away from. The maps are those of that same pass, so that
they cost no pass of their own, and they are read before the noise can tell what the reward liked.
"""

from __future__ import annotations

import random

import torch
from torch import Tensor

from star.config import Config
from star.objective import allocation_weights, blend_weights
from star.training.credit import Credit, Pass, concept_metrics, steps_with_maps, token_masks
from star.training.distributed import Share
from star.training.policy import Policy
from star.training.rollout import Batch, MapOptions, Rollout
from star_kernels import nft_loss


class NFT:
    """groups, patch: as in `GRPO`."""

    def __init__(self, config: Config, policy: Policy, share: Share, groups: Tensor, patch: int) -> None:
        self.config, self.policy, self.share, self.groups, self.patch = config, policy, share, groups, patch
        self.iteration = 0
        self.masks: Tensor | None = None

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        return ()

    def captured_steps(self, stochastic: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def passes(self, rollout: Rollout) -> int:
        """Of each image in an iteration: the noise levels that it is trained at."""
        return self.config.loss.noise_levels or len(self.config.sampling.trained_steps)

    def credit(
        self,
        rollout: Rollout,
        advantages: Tensor,
        masks: Tensor | None,
        generator: torch.Generator,
        iteration: int,
        concepts: Tensor | None = None,
    ) -> Credit:
        """advantages: (b,) or (b, H, W), masks: (b, height, width) or None, concepts: (b, G) or None, of this process'
        images. The weights are made in the passes, where the maps are."""
        self.iteration = iteration
        self.masks = token_masks(masks, rollout.grid, rollout.latents.device)
        return Credit(advantages, None, None, concepts, self.config.loss.concept_maps == "other")

    def loss(self, rollout: Rollout, k: int, rows: Tensor, credit: Credit) -> Pass:
        """Of some samples at the k-th of their noise levels."""
        config, image = self.config.loss, rollout.latents[rows]
        steps, noise = self.draw(k, rows, image)
        sigma = rollout.steps.sigmas[steps].to(image)
        latents = torch.lerp(image, noise, sigma.view(-1, 1, 1, 1))
        batch, timesteps = Batch(rollout.conditions, rollout.groups[rows], shared=False), rollout.steps.timesteps[steps]

        def velocity(transformer: torch.nn.Module) -> Tensor:
            return batch.velocity(transformer, latents, timesteps, rollout.guidance_scale)

        sampling, reads_maps = self.config.sampling, steps_with_maps(self.config, self.config.sampling.trained_steps)
        with self.policy.old(), torch.no_grad():
            transformer = self.policy.unwrapped()
            if reads_maps:
                reading = MapOptions(rollout.grid, sampling.layers, sampling.normalize)
                seen, maps = batch.captured_velocity(transformer, latents, timesteps, rollout.guidance_scale, reading)
                old_velocity = seen.guided()
            else:
                old_velocity, maps = velocity(transformer), None
        weights = allocation_weights(
            self.config.allocation,
            maps,
            rollout.grid,
            patch=self.patch,
            groups=rollout.groups[rows],
            masks=None if self.masks is None else self.masks[rows],
            generator=self.generator("weights", k, int(self.share.rows[rows[0]])),
        )
        strength = self.config.allocation.strength(rollout.steps.sigmas[steps], self.iteration)  # (b,)
        weights = None if weights is None else blend_weights(weights, strength)
        own = credit.at(k, rows)
        advantages = own.located(maps, rollout.grid, self.patch, strength.to(image.device))
        reference = None
        if config.kl_coef:
            with self.policy.reference() as transformer:
                reference = velocity(transformer)
        loss, statistics = nft_loss(
            velocity(self.policy.transformer),
            old_velocity,
            latents,
            image,
            sigma,
            (advantages / config.adv_clip).clamp(-1, 1) / 2 + 0.5,
            weights,
            reference_velocity=reference,
            beta=config.beta,
            adv_clip=config.adv_clip,
            kl_coef=config.kl_coef,
        )
        return Pass(loss, statistics._asdict() | concept_metrics(own, advantages), weights)

    def draw(self, k: int, rows: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The step (b,) whose noise level is each sample's k-th one, and the noise (b, C, H, W). An image's own numbers
        decide them: they are the same however the images are spread over chunks and processes."""
        images, trained = self.share.rows[rows].tolist(), list(self.config.sampling.trained_steps)
        steps = [random.Random(self.seed("steps", i)).sample(trained, len(trained))[k] for i in images]
        noise = [torch.randn(image.shape[1:], generator=self.generator("noise", i, k)) for i in images]
        return torch.tensor(steps), torch.stack(noise).to(image)

    def seed(self, *numbers: object) -> str:
        return "/".join(str(number) for number in (self.config.run.seed, self.iteration, *numbers))

    def generator(self, *numbers: object) -> torch.Generator:
        return torch.Generator().manual_seed(random.Random(self.seed(*numbers)).getrandbits(32))
