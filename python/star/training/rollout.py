"""Prompts to pictures, with everything the update needs: latents before and after the trained steps, means, maps."""

from __future__ import annotations

import copy
import random
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from star.capture import capture, unwrapped
from star.concepts import ConceptTokens, concept_tokens
from star.transition import schedule
from star_kernels import Transition, gaussian_step


@dataclass(frozen=True)
class Conditions:
    """What the model is told, for P distinct prompts.

    embeds: (P, T, D). pooled: (P, D'). negative_embeds, negative_pooled: (1, T, D), (1, D') of the empty prompt, or
    None without guidance. tokens: the concepts' text tokens, P rows.
    """

    prompts: tuple[str, ...]
    embeds: Tensor
    pooled: Tensor
    negative_embeds: Tensor | None
    negative_pooled: Tensor | None
    tokens: ConceptTokens

    def rows(self, index: Tensor) -> Conditions:
        """The conditions of some samples; index: (B,) int64 into the prompts."""
        return Conditions(
            tuple(self.prompts[i] for i in index.tolist()),
            self.embeds[index],
            self.pooled[index],
            self.negative_embeds,
            self.negative_pooled,
            self.tokens.rows(index.to(self.tokens.index.device)),
        )


@torch.no_grad()
def encode(
    pipeline: StableDiffusion3Pipeline, prompts: Sequence[str], max_sequence_length: int, guidance_scale: float
) -> Conditions:
    """Encode distinct prompts once. max_sequence_length: of the T5 part; 0 for a pipeline without T5."""
    guided = guidance_scale > 1
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        list(prompts),
        None,
        None,
        negative_prompt=[""] * len(prompts),
        do_classifier_free_guidance=guided,
        max_sequence_length=max_sequence_length,
    )
    tokens = concept_tokens(pipeline, prompts, max_sequence_length=max_sequence_length)
    # The empty prompt is the same in every row.
    negative, negative_pooled = (negative[:1], negative_pooled[:1]) if guided else (None, None)
    return Conditions(tuple(prompts), embeds, pooled, negative, negative_pooled, tokens)


class PromptEncoder:
    """Text embeddings of prompts. They repeat from iteration to iteration: the last `cached` are kept on the CPU.

    With a cache every prompt is encoded alone, because its embeddings must not depend on what happened to be cached.
    offload: the text encoders are on the device only while they encode.
    """

    def __init__(self, pipeline: StableDiffusion3Pipeline, max_sequence_length: int, cached: int, offload: bool):
        self.pipeline, self.length, self.cached, self.offload = pipeline, max_sequence_length, cached, offload
        self.cache: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()
        self.encoders = [e for e in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3) if e]
        self.device = pipeline.transformer.device

    def __call__(self, prompts: Sequence[str], guidance_scale: float) -> Conditions:
        if not self.cached:
            with self.on_device():
                return encode(self.pipeline, prompts, self.length, guidance_scale)
        wanted = [*prompts, ""] if guidance_scale > 1 else list(prompts)
        missing = [prompt for prompt in wanted if prompt not in self.cache]
        found = {prompt: self.cache[prompt] for prompt in wanted if prompt in self.cache}
        if missing:
            with self.on_device(), torch.no_grad():
                found |= {prompt: self.encode_one(prompt) for prompt in missing}
        self.cache |= found
        for prompt in wanted:
            self.cache.move_to_end(prompt)
        while len(self.cache) > self.cached:
            self.cache.popitem(last=False)
        embeds, pooled = (torch.cat(x).to(self.device) for x in zip(*(found[p] for p in prompts), strict=True))
        negative = (x.to(self.device) for x in found[""]) if guidance_scale > 1 else (None, None)
        tokens = concept_tokens(self.pipeline, prompts, max_sequence_length=self.length)
        return Conditions(tuple(prompts), embeds, pooled, *negative, tokens)

    def encode_one(self, prompt: str) -> tuple[Tensor, Tensor]:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            *([prompt], None, None),
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.length,
        )
        return embeds.cpu(), pooled.cpu()

    @contextmanager
    def on_device(self) -> Iterator[None]:
        if not self.offload:
            yield
            return
        for encoder in self.encoders:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder in self.encoders:
                encoder.to("cpu")


@dataclass(frozen=True)
class Steps:
    """A sampling schedule. sigmas: (T+1,). timesteps: (T,) as the model takes them. transitions: fields (T,)."""

    sigmas: Tensor
    timesteps: Tensor
    transitions: Transition
    trained: tuple[int, ...]


def make_steps(scheduler, count: int, trained: Sequence[int], sampler: str, noise_level: float) -> Steps:
    """`count` steps of a diffusers flow-matching scheduler, stochastic (and trained on) at `trained`, else ODE."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(count)
    sigmas = scheduler.sigmas.double().cpu()
    transitions = schedule(sigmas, sampler, noise_level, trained)
    return Steps(sigmas, scheduler.timesteps.float().cpu(), transitions, tuple(trained))


def draw_window(steps: Sequence[int], size: int, seed: str) -> tuple[int, ...]:
    """`size` neighbors of the trained steps at a place that the seed decides, as Flow-GRPO-Fast draws its SDE window;
    0: all of them."""
    start = random.Random(f"{seed}/window").randint(0, len(steps) - size) if size else 0
    return tuple(steps[start : start + size] if size else steps)


def predict_velocity(
    transformer: torch.nn.Module, latents: Tensor, timestep: Tensor, conditions: Conditions, guidance_scale: float
) -> Tensor:
    """Velocity with classifier-free guidance, if there is any: unconditional rows first, as diffusers has them.

    latents: (B, C, H, W). timestep: (). Returns (B, C, H, W) float32.
    """
    embeds, pooled, inputs = conditions.embeds, conditions.pooled, latents.to(conditions.embeds.dtype)
    if conditions.negative_embeds is not None:
        batch = len(latents)
        embeds = torch.cat([conditions.negative_embeds.expand(batch, -1, -1), embeds])
        pooled = torch.cat([conditions.negative_pooled.expand(batch, -1), pooled])
        inputs = torch.cat([inputs, inputs])
    timesteps = timestep.to(inputs.device).expand(len(inputs))
    velocity = transformer(inputs, embeds, pooled, timesteps, return_dict=False)[0].float()
    if conditions.negative_embeds is not None:
        unconditional, conditional = velocity.chunk(2)
        velocity = unconditional + guidance_scale * (conditional - unconditional)
    return velocity


def distinct(groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of (B,) int64: the P distinct groups, the first sample of each, and (B,) each sample's place among them."""
    ids, member = groups.unique(return_inverse=True)
    first = torch.full_like(ids, len(groups)).scatter_reduce_(0, member, torch.arange(len(groups)), "amin")
    return ids, first, member


@dataclass(frozen=True)
class Rollout:
    """B samples and their S trained steps. Samples are cut into chunks, which are also the update's minibatches.

    groups: (B,) int64 index of each sample's prompt. conditions: of the distinct prompts. samples, prev_samples,
    old_means: (S, B, C, H, W), on the device that stores them. maps: (M, B, G, N) at the captured steps, or None.
    latents: (B, C, H, W), the end. shared: the first `shared` steps of the schedule found the samples of a group at one
    and the same latents.
    """

    conditions: Conditions
    groups: Tensor
    steps: Steps
    samples: Tensor
    prev_samples: Tensor
    old_means: Tensor
    maps: Tensor | None
    latents: Tensor
    grid: tuple[int, int]
    shared: int
    guidance_scale: float

    def velocity(self, transformer: torch.nn.Module, k: int, rows: Tensor) -> Tensor:
        """Velocity (B', C, H, W) of some samples at the k-th trained step, from the very batch that `sample` ran when
        `rows` is one of its chunks: matrix products of another batch size may differ in the last bit, and the
        on-policy ratio would not be exactly 1."""
        step = self.steps.trained[k]
        batch = Batch(self.conditions, self.groups[rows], step < self.shared)
        samples = self.samples[k, rows].to(self.latents.device)
        return batch.velocity(transformer, samples, self.steps.timesteps[step], self.guidance_scale)

    def transition(self, k: int, rows: Tensor) -> tuple[Tensor, Tensor, Tensor, Transition]:
        """samples, prev_samples, old_means (B', C, H, W) and transition of some samples at the k-th trained step."""
        step, device = self.steps.trained[k], self.latents.device
        stored = (x[k, rows].to(device) for x in (self.samples, self.prev_samples, self.old_means))
        return *stored, self.steps.transitions.rows(slice(step, step + 1)).to(device).expand(len(rows))


class Batch:
    """One forward pass for some samples; one row for each of their prompts while they share their latents."""

    def __init__(self, conditions: Conditions, groups: Tensor, shared: bool) -> None:
        ids, self.first, self.member = distinct(groups) if shared else (groups, None, None)
        self.conditions = conditions.rows(ids)

    def velocity(
        self, transformer: torch.nn.Module, latents: Tensor, timestep: Tensor, guidance_scale: float
    ) -> Tensor:
        if self.first is not None:
            latents = latents[self.first]
        return self.each(predict_velocity(transformer, latents, timestep, self.conditions, guidance_scale))

    def each(self, x: Tensor) -> Tensor:
        """Rows of the pass -> rows of the samples. index_select: its gradient is summed in a fixed order on the CPU."""
        return x if self.member is None else x.index_select(0, self.member.to(x.device))


@torch.no_grad()
def sample(
    transformer: torch.nn.Module,
    conditions: Conditions,
    groups: Tensor,
    steps: Steps,
    *,
    size: tuple[int, int],
    generator: torch.Generator,
    guidance_scale: float = 1.0,
    shared_noise: bool = True,
    chunk: int | None = None,
    captured: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
    normalize: str = "raw",
    rows: Tensor | None = None,
    stored_on_cpu: bool = False,
    merged: Callable[[], AbstractContextManager[None]] = nullcontext,
    finished: Callable[[Tensor, Tensor], None] | None = None,
) -> Rollout:
    """Run the sampler, chunk after chunk.

    Args:
        transformer: the policy, an SD3Transformer2DModel.
        conditions: of P distinct prompts.
        groups: (B,) int64, each sample's prompt.
        steps: from `make_steps`.
        size: latent (height, width).
        generator: on the CPU, so that a seed means the same everywhere.
        shared_noise: the samples of a group start from one noise (Flow-GRPO-Fast) and part after the first trained
            step; up to and including it one pass per prompt serves the whole group.
        chunk: samples per minibatch of the update (`Rollout.velocity`), and per forward pass here.
        captured: steps at which maps are read. None: the trained ones. Empty: none.
        layers, normalize: of `star.capture.capture`.
        rows: (b,) int64, the samples to make of the B, None: all. Their noise is what it is in the whole batch, which
            is drawn whole; the rollout is of these b samples.
        stored_on_cpu: keep the latents for the update in (pinned) memory of the CPU.
        merged: a context for the steps that are not trained, which may compute the same velocity in another way
            (`Policy.merged`).
        finished: is called with each chunk's places among the samples, (b',), and its final latents, before the next
            one is begun.
    """
    device, rows = conditions.embeds.device, torch.arange(len(groups)) if rows is None else rows
    total, groups = len(groups), groups[rows]
    batch = len(groups)
    config = unwrapped(transformer).config
    grid = (size[0] // config.patch_size, size[1] // config.patch_size)
    trained, captured = steps.trained, steps.trained if captured is None else tuple(captured)
    channels = config.in_channels
    count = len(conditions.prompts) if shared_noise else total
    noise = torch.randn(count, channels, *size, generator=generator)
    latents = noise[groups if shared_noise else rows].to(device)
    stored = torch.empty(
        *(3, len(trained), batch, channels, *size),
        device="cpu" if stored_on_cpu else device,
        pin_memory=stored_on_cpu and device.type == "cuda",
    )
    samples, prev_samples, old_means = stored
    for k in range(len(trained)):
        # The noise of a step waits where the step's result will be.
        prev_samples[k] = torch.randn(total, channels, *size, generator=generator)[rows]
    maps = None
    alone = min(trained, default=len(steps.timesteps)) if shared_noise else 0  # steps before the samples part
    shared = min(trained, default=len(steps.timesteps) - 1) + 1 if shared_noise else 0

    def advance(i: int, chosen: Tensor, before: Tensor) -> Tensor:
        """The latents of some samples after the i-th step."""
        nonlocal maps
        part = Batch(conditions, groups[chosen], i < shared)
        if i in captured:
            length = len(part.conditions.prompts)
            with capture(
                transformer,
                part.conditions.tokens,
                grid=grid,
                rows=None if conditions.negative_embeds is None else range(length, 2 * length),
                layers=layers,
                normalize=normalize,
            ) as read:
                velocity = part.velocity(transformer, before, steps.timesteps[i], guidance_scale)
            values = part.each(read.read())
            if maps is None:
                maps = torch.zeros(len(captured), batch, *values.shape[1:], device=device)
            maps[captured.index(i), chosen] = values
        else:
            velocity = part.velocity(transformer, before, steps.timesteps[i], guidance_scale)
        transition = steps.transitions.rows(slice(i, i + 1)).to(device)
        if i not in trained:
            return before + transition.b.view(-1, 1, 1, 1) * velocity
        k = trained.index(i)
        noise = prev_samples[k, chosen].to(device)
        after, mean = gaussian_step(before, velocity, noise, transition.expand(len(chosen)))
        samples[k, chosen], prev_samples[k, chosen], old_means[k, chosen] = (
            x.to(stored.device) for x in (before, after, mean)
        )
        return after

    def run(span: range, chosen: Tensor) -> None:
        now = latents[chosen]
        for is_trained, part in groupby(span, lambda i: i in trained):
            with nullcontext() if is_trained else merged():
                for i in part:
                    now = advance(i, chosen, now)
        latents[chosen] = now

    run(range(alone), torch.arange(batch))
    for chosen in torch.arange(batch).split(chunk or batch):
        run(range(alone, len(steps.timesteps)), chosen)
        if finished is not None:
            finished(chosen, latents[chosen])
    return Rollout(conditions, groups, steps, *stored, maps, latents, grid, shared, guidance_scale)


@torch.no_grad()
def decode(pipeline: StableDiffusion3Pipeline, latents: Tensor, slice_size: int = 16) -> Tensor:
    """Latents (B, C, H, W) to pictures (B, 3, H', W') float32 in 0..1, a few at a time to bound the memory."""
    vae = pipeline.vae
    scaled = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
    pictures = [vae.decode(part, return_dict=False)[0].float() for part in scaled.split(slice_size)]
    return (torch.cat(pictures) / 2 + 0.5).clamp(0, 1)
