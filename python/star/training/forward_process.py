"""What the objectives of the forward process share: each finished image gets noise again, at levels of its own, and the
policies are compared there.

Any deterministic sampler makes the images. The maps are read in the old policy's pass, or in the policy's own where the
run keeps no old one.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from star.config import Config, Loss
from star.objective import allocation_weights, blend_weights
from star.training.credit import Credit, Pass, concept_metrics, steps_with_maps, token_masks
from star.training.distributed import Share
from star.training.policy import Policy
from star.training.rollout import Batch, MapOptions, Rollout


class Compared(NamedTuple):
    """The policies at b images with noise.

    velocity: (b, C, H, W) of the policy, with a gradient. old_velocity, reference_velocity: of the old policy and of
    the model before the run, constants; None where the run has none. latents: (b, C, H, W), (1 - sigma) image + sigma
    noise; sigma: (b,). advantages: (b,) or (b, H, W). weights: (b, H, W) of mean 1 over each sample, or None.
    """

    velocity: Tensor
    old_velocity: Tensor | None
    reference_velocity: Tensor | None
    latents: Tensor
    image: Tensor
    noise: Tensor
    sigma: Tensor
    advantages: Tensor
    weights: Tensor | None


class Method(NamedTuple):
    """The parts of one objective. terms: returns its loss (), with a gradient, and its statistics, () each, by the name
    of their metric. levels: takes an image's random numbers, the trained steps and the number of passes; returns the
    step of each pass, and maybe more."""

    terms: Callable[[Loss, Compared], tuple[Tensor, dict[str, Tensor]]]
    levels: Callable[[random.Random, Sequence[int], int], list[int]]


def has_pass_before(config: Config) -> bool:
    """Whether a pass without gradients goes before each one with them: for the old policy's velocity, or for maps."""
    return config.loss.keeps_old or bool(steps_with_maps(config, config.sampling.trained_steps))


class ForwardProcess:
    """patch: as in `GRPO`."""

    def __init__(self, config: Config, policy: Policy, share: Share, patch: int, method: Method) -> None:
        self.config, self.policy, self.share, self.patch, self.method = config, policy, share, patch, method
        self.iteration = 0
        self.masks: Tensor | None = None

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        return ()

    def captured_steps(self, stochastic: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def passes(self, rollout: Rollout) -> int:
        """Number of noise levels that an iteration trains each image at."""
        return self.level_count()

    def level_count(self) -> int:
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
        """The pass of some samples at the k-th of their noise levels."""
        config, image = self.config.loss, rollout.latents[rows]
        steps, noise = self.draw(k, rows, image)
        sigma = rollout.steps.sigmas[steps].to(image)
        latents = torch.lerp(image, noise, sigma.view(-1, 1, 1, 1))
        batch, timesteps = Batch(rollout.conditions, rollout.groups[rows], shared=False), rollout.steps.timesteps[steps]

        def velocity(transformer: torch.nn.Module) -> Tensor:
            return batch.velocity(transformer, latents, timesteps, rollout.guidance_scale)

        sampling, old_velocity, maps = self.config.sampling, None, None
        if has_pass_before(self.config):
            with self.policy.old(), torch.no_grad():
                transformer = self.policy.unwrapped()
                if steps_with_maps(self.config, sampling.trained_steps):
                    reading = MapOptions(rollout.grid, sampling.layers, sampling.normalize)
                    seen, maps = batch.captured_velocity(
                        transformer, latents, timesteps, rollout.guidance_scale, reading
                    )
                    old_velocity = seen.guided()
                else:
                    old_velocity = velocity(transformer)
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
        compared = Compared(
            velocity(self.policy.transformer),
            old_velocity if config.keeps_old else None,
            reference,
            latents,
            image,
            noise,
            sigma,
            advantages,
            weights,
        )
        loss, statistics = self.method.terms(config, compared)
        return Pass(loss, statistics | concept_metrics(own, advantages), weights)

    def draw(self, k: int, rows: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        """The step (b,) whose noise level is each sample's k-th one, and the noise (b, C, H, W). An image's own numbers
        decide them: they are the same however the images are spread over chunks and processes."""
        images, trained = self.share.rows[rows].tolist(), self.config.sampling.trained_steps
        levels = (self.method.levels(self.numbers("steps", i), trained, self.level_count()) for i in images)
        noise = [torch.randn(image.shape[1:], generator=self.generator("noise", i, k)) for i in images]
        return torch.tensor([own[k] for own in levels]), torch.stack(noise).to(image)

    def numbers(self, *of: object) -> random.Random:
        """The random numbers of one thing in this iteration, whatever was drawn before."""
        return random.Random("/".join(str(number) for number in (self.config.run.seed, self.iteration, *of)))

    def generator(self, *of: object) -> torch.Generator:
        return torch.Generator().manual_seed(self.numbers(*of).getrandbits(32))
