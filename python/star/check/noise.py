"""How far the log-ratio of a policy to itself is from 0: what a trainer's clip range has to lie above."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from star.capture.blocks import unwrapped
from star.check.passes import Passes
from star.messages import one_line
from star.transition import schedule

BATCH = "one image at a time"
AUTOCAST = "autocast to bfloat16 in one of them alone"


class Way(NamedTuple):
    """How an update's pass differs: the context it runs in, and whether each image has a pass of its own."""

    context: Callable[[], AbstractContextManager]
    alone: bool = False


@dataclass(frozen=True)
class Floor:
    """The largest |log-ratio| of an image when the update's pass differs from the rollout's in one way.

    difference: in difference form, as star_kernels.policy_loss makes it. subtracted: of two log-probs in float32, as
    trainers make them. error: what the pass raised instead.
    """

    way: str
    difference: float = 0.0
    subtracted: float = 0.0
    error: str | None = None

    @property
    def largest(self) -> float:
        return max(self.difference, self.subtracted)


def floors(passes: Passes, noise_level: float, seed: int) -> list[Floor]:
    """Of every way in which trainers' updates differ from their rollouts, over all steps but the last.

    Flow-GRPO's stochastic step is taken from latents of unit size with noise of this level; guidance as the pipeline
    has it."""
    transformer = passes.transformer
    steps = range(max(len(passes.steps) - 1, 1))
    with evaluating(transformer), torch.no_grad():
        rollout = [passes.velocity(step) for step in steps]
    found = []
    for name, way in _ways(passes).items():
        try:
            with evaluating(transformer), way.context():
                update = [passes.velocity(step, way.alone).detach() for step in steps]
        except (RuntimeError, TypeError, ValueError) as error:  # also of a model that is too large to train here
            found.append(Floor(name, error=one_line(error)))
            continue
        ratios = [_log_ratios(passes.sigmas, step, noise_level, seed, rollout[step], update[step]) for step in steps]
        difference, subtracted = (max(one[form].abs().max().item() for one in ratios) for form in (0, 1))
        found.append(Floor(name, difference, subtracted))
    return found


def _ways(passes: Passes) -> dict[str, Way]:
    """What trainers' updates do otherwise than their rollouts, by name."""
    transformer = passes.transformer
    weight = next(transformer.parameters())
    ways = {
        "the same pass again": Way(torch.no_grad),
        "train mode, with gradients": Way(partial(_training, transformer)),
    }
    if getattr(unwrapped(transformer), "_supports_gradient_checkpointing", False):
        ways["and gradient checkpointing"] = Way(partial(_checkpointing, transformer))
    if passes.images > 1:
        ways[BATCH] = Way(torch.no_grad, alone=True)
    if weight.dtype == torch.float32:
        ways[AUTOCAST] = Way(partial(_autocast, weight.device.type))
    return ways


def _log_ratios(
    sigmas: Tensor, step: int, noise_level: float, seed: int, old: Tensor, new: Tensor
) -> tuple[Tensor, Tensor]:
    """(B,) of two velocities (B, ...): in difference form in float64, and as two log-probs subtracted in float32."""
    one = schedule(sigmas, "flow_sde", noise_level, dtype=torch.float64)
    a, b, s = (float(x[step]) for x in (one.a, one.b, one.s))
    generator = torch.Generator().manual_seed(seed)
    sample, noise = (torch.randn(old.shape, generator=generator).to(old.device) for _ in range(2))
    old_mean, new_mean = (a * sample + b * velocity for velocity in (old, new))
    sample = old_mean + s * noise
    log_probs = [(-((sample - mean) ** 2) / (2 * s**2)).flatten(1).mean(1) for mean in (new_mean, old_mean)]
    moved = b * (new.double() - old.double())
    exact = (moved * (2 * s * noise.double() - moved) / (2 * s**2)).flatten(1).mean(1)
    return exact, log_probs[0] - log_probs[1]


@contextmanager
def evaluating(transformer: torch.nn.Module, training: bool = False) -> Iterator[None]:
    """The transformer in evaluation mode, or in training mode."""
    before = {module: module.training for module in transformer.modules()}
    transformer.train(training)
    try:
        yield
    finally:
        for module, mode in before.items():
            module.training = mode


@contextmanager
def _training(transformer: torch.nn.Module) -> Iterator[None]:
    with evaluating(transformer, training=True), torch.enable_grad():
        yield


@contextmanager
def _checkpointing(transformer: torch.nn.Module) -> Iterator[None]:
    model: Any = unwrapped(transformer)
    before = model.is_gradient_checkpointing
    model.enable_gradient_checkpointing()
    try:
        with _training(transformer):
            yield
    finally:
        if not before:
            model.disable_gradient_checkpointing()


@contextmanager
def _autocast(device: str) -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad(), torch.autocast(device, torch.bfloat16):
        # torch warns that mixed types miss a fused kernel; here they are mixed on purpose.
        warnings.filterwarnings("ignore", "Mismatch dtype between input and weight", UserWarning)
        yield
