"""Prompts to images, with everything the update needs: latents before and after the trained steps, means, maps."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from star.capture import capture
from star.config import ConfigError
from star.objective.allocation import repeat_tokens
from star.training.conditions import Conditions
from star.training.families import family_of
from star.training.families.family import Text, Velocity
from star.training.pipeline import model_shape
from star.transition import schedule
from star_kernels import Transition, gaussian_step

DECODED_AT_ONCE = 16  # images
Normalization = Literal["raw", "content", "concepts"]
Explore = Callable[[int, Tensor, Tensor | None], Tensor | None]
"""step of the schedule, rows (b,) of the rollout and their maps (b, G, N) at that step, or None if they were not read
-> (b, rows, columns) bool, the image tokens that the step noises; None: all of them."""


@dataclass(frozen=True)
class Steps:
    """A sampling schedule. sigmas: (T+1,). timesteps: (T,) as the model takes them. transitions: fields (T,)."""

    sigmas: Tensor
    timesteps: Tensor
    transitions: Transition
    trained: tuple[int, ...]


def make_steps(
    pipeline: Any, size: tuple[int, int], count: int, trained: Sequence[int], sampler: str, noise_level: float
) -> Steps:
    """`count` steps of a pipeline's flow-matching scheduler, as its own call makes them for latents of a size (height,
    width); stochastic (and trained on) at `trained`, else ODE."""
    scheduler, patch = copy.deepcopy(pipeline.scheduler), model_shape(pipeline).patch_size
    family_of(pipeline).set_timesteps(scheduler, count, (size[0] // patch) * (size[1] // patch))
    sigmas = scheduler.sigmas.double().cpu()
    transitions = schedule(sigmas, sampler, noise_level, trained)
    return Steps(sigmas, scheduler.timesteps.float().cpu(), transitions, tuple(trained))


def check_steps(pipeline: Any, size: tuple[int, int], count: int, name: str = "steps") -> None:
    """Raise ConfigError for a number of steps that a pipeline's scheduler cannot make, as some cannot make 1. size: of
    the latents. name: of the setting."""
    try:
        make_steps(pipeline, size, count, (), "ode", 0.0)
    except ValueError as error:
        raise ConfigError(f"{name}: got {count}, which the model's scheduler cannot make; expected more") from error


def draw_window(steps: Sequence[int], size: int, seed: str) -> tuple[int, ...]:
    """`size` consecutive trained steps from a start that the seed decides, as Flow-GRPO-Fast draws its SDE window;
    0: all of them."""
    start = random.Random(f"{seed}/window").randint(0, len(steps) - size) if size else 0
    return tuple(steps[start : start + size] if size else steps)


def predict_velocity(
    transformer: torch.nn.Module, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance_scale: float
) -> Tensor:
    """Velocity with classifier-free guidance, if there is any. See `predict`. Returns (B, C, H, W) float32."""
    return predict(transformer, latents, timestep, conditions, guidance_scale).guided()


def predict(
    transformer: torch.nn.Module, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance_scale: float
) -> Velocity:
    """One pass; with guidance the unconditional rows come first, as in diffusers.

    latents: (B, C, H, W). timestep: () or, without guidance, (B,).
    """
    family, text, inputs = conditions.family, conditions.text, latents.to(conditions.text.embeds.dtype)
    if conditions.negative is not None:
        text = Text.joined([conditions.negative.each(lambda x: x.expand(len(latents), *x.shape[1:])), text])
        inputs = torch.cat([inputs, inputs])
    timesteps = timestep.to(inputs.device).expand(len(inputs))
    velocity = family.velocity(transformer, inputs, timesteps, text, guidance_scale)
    if conditions.negative is None:
        return Velocity(velocity, None, guidance_scale)
    unconditional, conditional = velocity.chunk(2)
    return family.guide(conditional, unconditional, guidance_scale)


def drawn(seeds: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(b, *shape) float32 standard normals on the device of seeds (b,): the noise of a step from zeros."""
    nothing, zero = torch.zeros(len(seeds), *shape, device=seeds.device), torch.zeros(len(seeds), device=seeds.device)
    return gaussian_step(nothing, nothing, None, Transition.gaussian(zero, zero, zero + 1), seeds=seeds)[0]


def group_members(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The P distinct ones of (B,) int64 groups, the first sample of each, and (B,) the index of each sample's group
    among the P."""
    ids, member = groups.unique(return_inverse=True)
    first = torch.full_like(ids, len(groups)).scatter_reduce_(0, member, torch.arange(len(groups)), "amin")
    return ids, first, member


def _maps_at(maps: Tensor | None, captured: tuple[int, ...], step: int, rows: Tensor | slice) -> Tensor | None:
    """Maps of some samples at a step, from (M, B, G, N) at the M captured steps; None if it was not captured."""
    return None if maps is None or step not in captured else maps[captured.index(step), rows]


@dataclass(frozen=True)
class Rollout:
    """B samples and their S trained steps. Samples are cut into chunks, which are also the update's minibatches.

    groups: (B,) int64 index of each sample's prompt. conditions: of the distinct prompts. samples, prev_samples,
    old_means: (S, B, C, H, W), on the device that stores them. maps: (M, B, G, N) at the steps `captured`, or None.
    explored: (S, B, rows, columns) bool, the image tokens that the step's noise reached; None: all of them. latents:
    (B, C, H, W), the end. shared: the first `shared` steps of the schedule found the samples of a group at one and the
    same latents.
    """

    conditions: Conditions
    groups: Tensor
    steps: Steps
    samples: Tensor
    prev_samples: Tensor
    old_means: Tensor
    maps: Tensor | None
    captured: tuple[int, ...]
    explored: Tensor | None
    latents: Tensor
    grid: tuple[int, int]
    shared: int
    guidance_scale: float

    def captured_maps(self) -> Tensor:
        """(M, B, G, N). Raises ValueError if no step was captured."""
        if self.maps is None:
            raise ValueError("captured: no step was captured, so the rollout has no maps")
        return self.maps

    def maps_of(self, steps: Sequence[int]) -> Tensor | None:
        """(S, B, G, N) of some steps of the schedule, or None if there are none, or the maps of one were not read."""
        steps = tuple(steps)
        if self.maps is None or not steps or not set(steps) <= set(self.captured):
            return None
        return self.maps if steps == self.captured else self.maps[[self.captured.index(step) for step in steps]]

    def maps_at(self, step: int, rows: Tensor | slice = slice(None)) -> Tensor | None:
        """(B', G, N) of some samples at a step of the schedule, or None if its maps were not read."""
        return _maps_at(self.maps, self.captured, step, rows)

    def velocity(self, transformer: torch.nn.Module, k: int, rows: Tensor) -> Tensor:
        """Velocity (B', C, H, W) of some samples at the k-th trained step, from the very batch that `sample` ran when
        `rows` is one of its chunks: matrix products of another batch size may differ in the last bit, and the
        on-policy ratio would not be exactly 1."""
        step = self.steps.trained[k]
        batch = Batch(self.conditions, self.groups[rows], step < self.shared)
        samples = self.samples[k, rows].to(self.latents.device)
        return batch.velocity(transformer, samples, self.steps.timesteps[step], self.guidance_scale)

    def explored_at(self, k: int, rows: Tensor) -> Tensor | None:
        """(B', rows, columns) bool of some samples at the k-th trained step, or None: their noise was everywhere."""
        return None if self.explored is None else self.explored[k, rows].to(self.latents.device)

    def transition(self, k: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Transition]:
        """samples, prev_samples, old_means (B', C, H, W) and transition of some samples at the k-th trained step."""
        step, device = self.steps.trained[k], self.latents.device
        samples, prev_samples, old_means = (
            x[k, rows].to(device) for x in (self.samples, self.prev_samples, self.old_means)
        )
        transition = self.steps.transitions.rows(slice(step, step + 1)).to(device).expand(len(rows))
        return samples, prev_samples, old_means, transition


class MapOptions(NamedTuple):
    """How maps are read. grid: (rows, columns) of the image tokens. layers, normalize: as in `star.capture.capture`."""

    grid: tuple[int, int]
    layers: Sequence[int] | None
    normalize: Normalization


class Batch:
    """One forward pass for some samples; one row for each of their prompts while they share their latents."""

    def __init__(self, conditions: Conditions, groups: Tensor, shared: bool) -> None:
        self.first: Tensor | None = None
        self.member: Tensor | None = None
        if shared:
            groups, self.first, self.member = group_members(groups)
        self.conditions = conditions.rows(groups)

    def velocity(
        self, transformer: torch.nn.Module, latents: Tensor, timestep: Tensor, guidance_scale: float
    ) -> Tensor:
        """(B, C, H, W) float32, guided."""
        if self.first is not None:
            latents = latents[self.first]
        return self.expand(predict_velocity(transformer, latents, timestep, self.conditions, guidance_scale))

    def predict(
        self, transformer: torch.nn.Module, latents: Tensor, timestep: Tensor, guidance_scale: float
    ) -> Velocity:
        """The samples' velocities; `guided` gives the bits of `velocity`."""
        if self.first is not None:
            latents = latents[self.first]
        velocity = predict(transformer, latents, timestep, self.conditions, guidance_scale)
        unconditional = None if velocity.unconditional is None else self.expand(velocity.unconditional)
        return Velocity(self.expand(velocity.conditional), unconditional, guidance_scale)

    def captured_velocity(
        self,
        transformer: torch.nn.Module,
        latents: Tensor,
        timestep: Tensor,
        guidance_scale: float,
        reading: MapOptions,
    ) -> tuple[Velocity, Tensor]:
        """`predict`, and the maps (B, G, N) of the pass; with guidance those of the rows with the prompts."""
        length = len(self.conditions.prompts)
        with capture(
            transformer,
            self.conditions.tokens,
            grid=reading.grid,
            rows=None if self.conditions.negative is None else slice(length, 2 * length),
            layers=reading.layers,
            normalize=reading.normalize,
        ) as maps:
            velocity = self.predict(transformer, latents, timestep, guidance_scale)
        return velocity, self.expand(maps.read())

    def expand(self, x: Tensor) -> Tensor:
        """(P, ...) rows of the pass -> (B, ...) rows of the samples. index_select: its gradient is summed in a fixed
        order on the CPU."""
        return x if self.member is None else x.index_select(0, self.member.to(x.device))


@dataclass(frozen=True)
class SamplerOptions:
    """How a rollout is sampled, whatever its prompts and its noise are.

    size: latent (height, width). guidance_scale: 1 or less means no guidance. shared_noise: the samples of a group
    start from one noise (Flow-GRPO-Fast) and part after the first trained step; up to and including it one pass per
    prompt serves the whole group. chunk: samples per forward pass, and per minibatch of the update
    (`Rollout.velocity`); None means all. captured: steps at which maps are read; None means the trained ones, an empty
    sequence none. layers, normalize: as in `star.capture.capture`. stored_on_cpu: the latents for the update wait in
    (pinned) memory of the CPU. noise_on_cpu: noise is drawn on the CPU, that of the whole batch in every process;
    False: where the model is, in the kernel of the step, from a seed for each sample and step.
    """

    size: tuple[int, int]
    guidance_scale: float = 1.0
    shared_noise: bool = True
    chunk: int | None = None
    captured: Sequence[int] | None = None
    layers: Sequence[int] | None = None
    normalize: Normalization = "raw"
    stored_on_cpu: bool = False
    noise_on_cpu: bool = True


class Buffers:
    """What a rollout keeps for the update, filled step by step.

    samples, prev_samples, old_means: (S, b, C, H, W) at the trained steps. maps: (M, b, G, N) at the captured steps, or
    None before the first. explored: (S, b, rows, columns) bool, the tokens that were noised, or None while that is all
    of them. The noise of a trained step waits in the buffer of the step's result, so that it costs no memory.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        steps: Steps,
        captured: Sequence[int],
        options: SamplerOptions,
        device: torch.device,
    ) -> None:
        self.trained, self.captured, self.device = steps.trained, tuple(captured), device
        on_cpu = options.stored_on_cpu
        stored = torch.empty(
            (3, len(self.trained), *shape),
            device="cpu" if on_cpu else device,
            pin_memory=on_cpu and device.type == "cuda",
        )
        self.samples, self.prev_samples, self.old_means = stored
        self.maps: Tensor | None = None
        self.explored: Tensor | None = None

    def set_noise(self, k: int, noise: Tensor) -> None:
        self.prev_samples[k] = noise

    def noise(self, k: int, rows: Tensor) -> Tensor:
        return self.prev_samples[k, rows].to(self.device)

    def store(self, k: int, rows: Tensor, sample: Tensor, prev_sample: Tensor, mean: Tensor) -> None:
        """Keep the k-th trained step of some samples; its noise is gone then."""
        self.samples[k, rows] = sample.to(self.samples.device)
        self.prev_samples[k, rows] = prev_sample.to(self.samples.device)
        self.old_means[k, rows] = mean.to(self.samples.device)

    def store_maps(self, step: int, rows: Tensor, maps: Tensor) -> None:
        if self.maps is None:
            shape = (len(self.captured), self.samples.shape[1], *maps.shape[1:])
            self.maps = torch.zeros(shape, device=self.device)
        self.maps[self.captured.index(step), rows] = maps

    def maps_at(self, step: int, rows: Tensor) -> Tensor | None:
        return _maps_at(self.maps, self.captured, step, rows)

    def store_explored(self, k: int, rows: Tensor, chosen: Tensor) -> None:
        if self.explored is None:
            shape = (len(self.trained), self.samples.shape[1], *chosen.shape[1:])
            self.explored = torch.ones(shape, dtype=torch.bool, device=self.samples.device)
        self.explored[k, rows] = chosen.to(self.samples.device)


@dataclass(frozen=True)
class Sampler:
    """Takes samples from step to step. shared: the first steps at which the samples of a group have the same
    latents. seeds: (b,) int64 of each trained step's noise; None: it waits in the buffers. explore: where the noise of
    the trained steps goes; None: everywhere."""

    transformer: torch.nn.Module
    conditions: Conditions
    groups: Tensor
    steps: Steps
    options: SamplerOptions
    buffers: Buffers
    shared: int
    seeds: list[Tensor] | None
    explore: Explore | None

    def advance(self, step: int, rows: Tensor, latents: Tensor) -> Tensor:
        """The latents of some samples after a step of the schedule."""
        velocity = self.velocity(step, rows, latents)
        transition = self.steps.transitions.rows(slice(step, step + 1)).to(latents.device).expand(len(rows))
        if step not in self.steps.trained:
            return velocity.step(latents, None, transition)[0]
        k = self.steps.trained.index(step)
        if self.seeds is None:
            prev_sample, mean = velocity.step(latents, self.buffers.noise(k, rows), transition)
        else:
            seeds = self.seeds[k][rows].to(latents.device)
            prev_sample, mean = velocity.step(latents, None, transition, seeds)
        chosen = None if self.explore is None else self.explore(step, rows, self.buffers.maps_at(step, rows))
        if chosen is not None:
            self.buffers.store_explored(k, rows, chosen)
            noised = repeat_tokens(chosen.to(latents.device), latents.shape[-1] // chosen.shape[-1])[:, None]
            step_size = float(self.steps.sigmas[step + 1] - self.steps.sigmas[step])
            deterministic = latents + step_size * velocity.guided()
            prev_sample, mean = (torch.where(noised, x, deterministic) for x in (prev_sample, mean))
        self.buffers.store(k, rows, latents, prev_sample, mean)
        return prev_sample

    def velocity(self, step: int, rows: Tensor, latents: Tensor) -> Velocity:
        """Velocity of some samples; their maps are kept if the step is captured."""
        batch = Batch(self.conditions, self.groups[rows], step < self.shared)
        timestep, guidance_scale = self.steps.timesteps[step], self.options.guidance_scale
        if step not in self.buffers.captured:
            return batch.predict(self.transformer, latents, timestep, guidance_scale)
        patch = self.conditions.family.shape(self.transformer).patch_size
        grid = (self.options.size[0] // patch, self.options.size[1] // patch)
        reading = MapOptions(grid, self.options.layers, self.options.normalize)
        velocity, maps = batch.captured_velocity(self.transformer, latents, timestep, guidance_scale, reading)
        self.buffers.store_maps(step, rows, maps)
        return velocity

    def run(
        self,
        steps: range,
        rows: Tensor,
        latents: Tensor,
        merged: Callable[[], AbstractContextManager[None]],
    ) -> Tensor:
        """The latents of some samples after several steps; those that are not trained run within `merged`."""
        for is_trained, part in groupby(steps, lambda step: step in self.steps.trained):
            with nullcontext() if is_trained else merged():
                for step in part:
                    latents = self.advance(step, rows, latents)
        return latents


@torch.no_grad()
def sample(
    transformer: torch.nn.Module,
    conditions: Conditions,
    groups: Tensor,
    steps: Steps,
    options: SamplerOptions,
    generator: torch.Generator,
    *,
    rows: Tensor | None = None,
    merged: Callable[[], AbstractContextManager[None]] = nullcontext,
    finished: Callable[[Tensor, Tensor], None] | None = None,
    explore: Explore | None = None,
    start: Tensor | None = None,
) -> Rollout:
    """Run the sampler, chunk after chunk.

    Args:
        transformer: the policy, of the pipeline that encoded the conditions.
        conditions: of P distinct prompts.
        groups: (B,) int64, each sample's prompt.
        steps: from `make_steps`.
        options: see SamplerOptions.
        generator: on the CPU, so that a seed means the same everywhere.
        rows: (b,) int64, the samples to make of the B; None means all. Their noise is what it is in the whole batch,
            which is drawn whole; the rollout is of these b samples.
        merged: a context for the steps that are not trained, which may compute the same velocity in another way
            (`Policy.merged`).
        finished: is called with each chunk's rows among the samples, (b',), and its final latents, before the next
            one begins.
        explore: says which image tokens the noise of a trained step reaches; the others take the deterministic step.
            None: all of them.
        start: (b, C, H, W), the noise that these samples start from. None: it is drawn.
    """
    device, rows = conditions.text.embeds.device, torch.arange(len(groups)) if rows is None else rows
    total, groups, size = len(groups), groups[rows], options.size
    model = conditions.family.shape(transformer)
    channels, batch = model.in_channels, len(groups)
    captured = steps.trained if options.captured is None else options.captured
    buffers = Buffers((batch, channels, *size), steps, captured, options, device)

    def draw(count: int, chosen: Tensor) -> Tensor:
        """Noise of some of `count` samples, or seeds where the device draws it."""
        if options.noise_on_cpu:
            return torch.randn(count, channels, *size, generator=generator)[chosen]
        return torch.randint(2**62, (count,), generator=generator)[chosen]

    if start is None:
        first = draw(*((len(conditions.prompts), groups) if options.shared_noise else (total, rows))).to(device)
        latents = first if options.noise_on_cpu else drawn(first, (channels, *size))
    else:
        latents = start.to(device, copy=True)
    seeds = None
    if options.noise_on_cpu:
        for k in range(len(steps.trained)):
            buffers.set_noise(k, draw(total, rows))
    else:
        seeds = [draw(total, rows) for _ in steps.trained]

    count = len(steps.timesteps)
    alone = min(steps.trained, default=count) if options.shared_noise else 0  # steps that run before samples part
    shared = min(alone + 1, count) if options.shared_noise else 0
    sampler = Sampler(transformer, conditions, groups, steps, options, buffers, shared, seeds, explore)
    latents = sampler.run(range(alone), torch.arange(batch), latents, merged)
    for chosen in torch.arange(batch).split(options.chunk or batch):
        latents[chosen] = sampler.run(range(alone, count), chosen, latents[chosen], merged)
        if finished is not None:
            finished(chosen, latents[chosen])
    return Rollout(
        conditions,
        groups,
        steps,
        buffers.samples,
        buffers.prev_samples,
        buffers.old_means,
        buffers.maps,
        buffers.captured,
        buffers.explored,
        latents,
        grid=(size[0] // model.patch_size, size[1] // model.patch_size),
        shared=shared,
        guidance_scale=options.guidance_scale,
    )


def trace(
    pipeline: Any,
    conditions: Conditions,
    steps: int,
    options: SamplerOptions,
    seed: int,
    start: Tensor | None = None,
) -> Rollout:
    """Sample one image for each prompt without noise in the steps, with the maps of every step. start: (B, C, H, W),
    their noise. None: it is drawn from the seed."""
    return sample(
        pipeline.transformer,
        conditions,
        torch.arange(len(conditions.prompts)),
        make_steps(pipeline, options.size, steps, (), "ode", 0.0),
        replace(options, shared_noise=False, captured=range(steps)),
        torch.Generator().manual_seed(seed),
        start=start,
    )


@torch.no_grad()
def decode(pipeline: Any, latents: Tensor, slice_size: int = DECODED_AT_ONCE) -> Tensor:
    """Latents (B, C, H, W) to images (B, 3, H', W') float32 in 0..1, a few at a time to bound the memory."""
    family = family_of(pipeline)
    images = [family.decode(pipeline.vae, part).float() for part in latents.split(slice_size)]
    return (torch.cat(images) / 2 + 0.5).clamp(0, 1)
