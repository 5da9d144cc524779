"""Where the signal of the first update's gradient is: in regions of the image, and under the weights of each arm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from star.config import Config
from star.objective import permute_across_groups
from star.study.gradient_signal import compare_with_scalar, draw_coordinates
from star.study.tables import Table, format_number
from star.train import Trainer
from star.training.credit import rollout_weights
from star.training.rollout import Rollout
from star_kernels import policy_loss

SCALAR = "all"  # the weights of every location are 1
REGIONS = (SCALAR, "inside", "outside", "elsewhere")

Fields = Mapping[str, Tensor | None]
"""Weights of the trained steps by name, (S, B, H, W), or None for weights of 1 everywhere."""


class Gradients:
    """Collects gradients of a policy that is not trained meanwhile, one for each batch and field of weights.

    arms: the configurations whose weights are compared; those that give the same weights share the first one's name.
    """

    def __init__(self, trainer: Trainer, arms: Mapping[str, Config]) -> None:
        self.trainer = trainer
        # The ratios differ by their clipping alone, which begins with the second update: the first has one gradient.
        distinct: dict[str, str] = {}
        for arm, config in arms.items():
            distinct.setdefault(f"{config.allocation} {config.run.reward}", arm)
        self.arms = {arm: arms[arm] for arm in distinct.values()}
        self.coordinates = draw_coordinates(trainer.policy.parameters.values())
        self.gradients: dict[str, list[np.ndarray]] = defaultdict(list)
        self.unweighted = [SCALAR]  # all of these have one gradient
        self.areas: list[float] = []

    def add(
        self,
        rollout: Rollout,
        advantages: Tensor,
        inside: Tensor,
        masks: Mapping[str, Tensor | None],
        generator: torch.Generator,
        seed: int,
    ) -> None:
        """Measure a batch.

        Args:
            rollout: with the maps of every step.
            advantages: (B,).
            inside: (B, rows, columns) bool, the image tokens that belong to objects.
            masks: by arm (B, H, W) of its reward, in pixels.
            generator: draws whose objects are `elsewhere`.
            seed: of the arms that draw weights.
        """
        fields = self.regions(rollout, inside, generator)
        for arm, config in self.arms.items():
            fields[arm] = arm_weights(self.trainer, config, rollout, masks[arm], seed)
        self.unweighted = [name for name, weights in fields.items() if weights is None]
        weighted = {name: weights for name, weights in fields.items() if weights is not None}
        measured = batch_gradients(self.trainer, rollout, advantages, {SCALAR: None, **weighted}, self.coordinates)
        for name, gradient in measured.items():
            self.gradients[name].append(gradient)
        self.areas.append(float(inside.float().mean()))

    def regions(self, rollout: Rollout, inside: Tensor, generator: torch.Generator) -> dict[str, Tensor | None]:
        """The fields of REGIONS: `elsewhere` are the objects of an image of another group."""
        patch = self.trainer.objective.patch
        objects = inside.float().repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        others = objects[permute_across_groups(rollout.groups, len(objects), generator)]
        steps = len(rollout.steps.trained)
        regions = (None, *(field.expand(steps, *field.shape) for field in (objects, 1 - objects, others)))
        return dict(zip(REGIONS, regions, strict=True))

    def result(self) -> dict:
        """object_area: mean share of the image. gradients: see `compare_with_scalar`, by region, then by arm."""
        compared = compare_with_scalar({name: np.stack(g) for name, g in self.gradients.items()}, SCALAR)
        names = dict.fromkeys((*REGIONS, *self.arms))
        return {
            "object_area": float(np.mean(self.areas)),
            "gradients": {name: compared[SCALAR if name in self.unweighted else name] for name in names},
        }


def batch_gradients(
    trainer: Trainer, rollout: Rollout, advantages: Tensor, fields: Fields, coordinates: Tensor
) -> dict[str, np.ndarray]:
    """For each field of weights the chosen coordinates of the first update's gradient."""
    parameters = list(trainer.policy.parameters.values())
    trained, loss = len(rollout.steps.trained), trainer.config.loss
    advantages, coordinates = (x.to(rollout.latents.device) for x in (advantages, coordinates))
    totals = {name: torch.zeros(len(coordinates)) for name in fields}
    chunks = torch.arange(len(rollout.groups)).split(trainer.chunk)
    for rows in chunks:
        for k in range(trained):
            samples, prev_samples, old_means, transition = rollout.transition(k, rows)
            velocity = rollout.velocity(trainer.policy.transformer, k, rows)
            for name, weights in fields.items():
                value, _ = policy_loss(
                    velocity,
                    samples,
                    prev_samples,
                    transition,
                    advantages[rows],
                    None if weights is None else weights[k, rows],
                    old_mean=old_means,
                    clip_range=loss.clip_range,
                    adv_clip=loss.adv_clip,
                )
                gradients = torch.autograd.grad(
                    value / (trained * len(chunks)),
                    parameters,
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                totals[name] += torch.cat([g.flatten() for g in gradients])[coordinates].float().cpu()
    return {name: total.numpy() for name, total in totals.items()}


def arm_weights(trainer: Trainer, config: Config, rollout: Rollout, masks: Tensor | None, seed: int) -> Tensor | None:
    """The weights that an arm gives to a rollout that has the maps of every step."""
    return rollout_weights(
        config.allocation,
        rollout,
        masks,
        torch.Generator().manual_seed(seed),
        share=trainer.share,
        groups=trainer.groups,
        patch=trainer.objective.patch,
        iteration=trainer.iteration,
    )


def table(measured: dict) -> Table:
    """What `Gradients.result` says, a row for each region and arm."""
    gradients = measured["gradients"]
    scalar_norm = gradients[SCALAR]["norm"]
    rows = [
        [
            name,
            _with_error(values, "snr", "standard_error"),
            _with_error(values, "agreement"),
            _with_error(values, "agreement_gain"),
            _with_error(values, "adamw_agreement"),
            _with_error(values, "adamw_agreement_gain"),
            format_number(values["norm"] / scalar_norm if scalar_norm else None, 3),
        ]
        for name, values in gradients.items()
    ]
    title = (
        "signal to noise of the first update's gradient: all locations, inside the objects, outside, inside another "
        "image's objects; then of each arm's weights. Cosines are with the scalar gradient of other batches, ± is a "
        "standard error, of differences a paired one"
    )
    columns = [
        "weights",
        "SNR",
        "cosine",
        "difference to all",
        "cosine of AdamW's step",
        "difference to all",
        "norm over that of all",
    ]
    return Table(title, columns, rows)


def _with_error(values: dict[str, float | None], name: str, error: str | None = None) -> str:
    return f"{format_number(values[name], 4)} ± {format_number(values[error or f'{name}_error'], 4)}"
