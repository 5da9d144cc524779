"""Flow-GRPO's objective: the densities of the rollout's own stochastic steps."""

from __future__ import annotations

import torch
from torch import Tensor

from star.config import Config
from star.objective import temporal_weights
from star.training.credit import Credit, Pass, concept_metrics, rollout_weights, steps_with_maps
from star.training.distributed import Share
from star.training.exploration import StepTensors, explored_loss
from star.training.policy import Policy
from star.training.rollout import Rollout, draw_window


class GRPO:
    """groups: (B,) int64 of all the iteration's images. patch: latent locations per image token and side."""

    def __init__(self, config: Config, policy: Policy, share: Share, groups: Tensor, patch: int) -> None:
        self.config, self.policy, self.share, self.groups, self.patch = config, policy, share, groups, patch
        self.iteration = 0

    def stochastic_steps(self, iteration: int) -> tuple[int, ...]:
        sampling = self.config.sampling
        return draw_window(sampling.trained_steps, sampling.window, f"{self.config.run.seed}/{iteration}")

    def captured_steps(self, stochastic: tuple[int, ...]) -> tuple[int, ...]:
        return steps_with_maps(self.config, stochastic)

    def passes(self, rollout: Rollout) -> int:
        """Number of steps that an iteration trains each image at."""
        return len(rollout.steps.trained)

    def weights(self, rollout: Rollout, masks: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """`rollout_weights` of this run."""
        return rollout_weights(
            self.config.allocation,
            rollout,
            masks,
            generator,
            share=self.share,
            groups=self.groups,
            patch=self.patch,
            iteration=self.iteration,
        )

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
        images."""
        self.iteration = iteration
        weights = self.weights(rollout, masks, generator)
        noise = rollout.steps.transitions.s[list(rollout.steps.trained), None].expand(-1, len(rollout.groups))
        temporal = self.config.allocation.temporal
        if weights is None and temporal == "concentration":
            temporal = "none"  # maps do not count in this iteration: every step has the same concentration
        step_weights = temporal_weights(temporal, noise.to(rollout.latents.device), weights)
        return Credit(advantages, weights, step_weights, concepts, self.config.loss.concept_maps == "other")

    def loss(self, rollout: Rollout, k: int, rows: Tensor, credit: Credit) -> Pass:
        """The pass of some samples at the k-th trained step."""
        config, reference, own = self.config.loss, None, credit.at(k, rows)
        samples, prev_samples, old_means, transition = rollout.transition(k, rows)
        velocity = rollout.velocity(self.policy.transformer, k, rows)
        if config.kl_coef:
            with self.policy.reference() as transformer:
                reference = rollout.velocity(transformer, k, rows)
        step = rollout.steps.trained[k]
        strength = self.config.allocation.strength(rollout.steps.sigmas[step], self.iteration)
        advantages = own.located(rollout.maps_at(step, rows), rollout.grid, self.patch, strength)
        tensors = StepTensors(
            velocity,
            samples,
            prev_samples,
            transition,
            advantages,
            own.weights,
            old_means,
            reference,
            own.step_weights,
        )
        loss, statistics = explored_loss(config, tensors, rollout.explored_at(k, rows))
        return Pass(loss, statistics._asdict() | concept_metrics(own, advantages), own.weights)
