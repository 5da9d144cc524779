"""What is drawn of a run: arrays out of the pipeline, for the figures, which know none."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from star.concepts import Marks
from star.config import Config
from star.messages import one_line
from star.objective import Allocation, allocation_weights
from star.reports import shown, tracking
from star.reports.evaluations import read_evaluations
from star.training.conditions import encode
from star.training.pipeline import latent_size, model_shape
from star.training.prompts import Prompt, concepts_of
from star.training.rollout import Rollout, SamplerOptions, decode, trace
from star.training.scoring import SHOWN, HeldOut, first_noise

log = logging.getLogger("star")
TRACED = 4  # prompts whose allocation is drawn step by step


@dataclass(frozen=True)
class Preview:
    """Some images of a rollout. images: (n, H, W, 3) in 0..1. rewards: (n,), NaN where one failed. weights: (S, n, h,
    w) of the steps that `labels` name, or None for uniform ones."""

    prompts: list[str]
    images: np.ndarray
    rewards: np.ndarray
    weights: np.ndarray | None
    labels: list[str]


def of_rollout(pipeline: Any, rollout: Rollout, weights: Tensor | None, rewards: Tensor) -> Preview:
    """The first images of a rollout. weights: (S, B, H, W) of its trained steps; without any, of each image at noise
    levels of its own, whose mean is shown."""
    count = min(SHOWN, len(rollout.latents))
    labels = _labels(rollout.steps.sigmas[list(rollout.steps.trained)])
    if weights is not None and not labels:
        weights, labels = weights.mean(0, keepdim=True), ["mean weights"]
    return Preview(
        prompts=[rollout.conditions.prompts[i] for i in rollout.groups[:count].tolist()],
        images=_arrays(decode(pipeline, rollout.latents[:count])),
        rewards=rewards[:count].cpu().numpy(),
        weights=None if weights is None else weights[:, :count].float().cpu().numpy(),
        labels=labels,
    )


def trace_prompts(
    pipeline: Any,
    config: Config,
    prompts: Sequence[str],
    concepts: Sequence[Marks | None] | None = None,
) -> Rollout:
    """An image of each prompt with the maps of every step, as a run with this configuration reads them. concepts: as
    for `encode`."""
    sampling = config.sampling
    options = SamplerOptions(
        size=latent_size(pipeline, config.model.height, config.model.width),
        guidance_scale=sampling.guidance_scale,
        layers=sampling.layers,
        normalize=sampling.normalize,
    )
    length, scale = config.model.max_sequence_length, sampling.guidance_scale
    conditions = encode(pipeline, prompts, length, scale, sampling.concepts, concepts)
    return trace(pipeline, conditions, sampling.steps, options, config.scoring.seed)


def of_prompts(
    pipeline: Any,
    config: Config,
    prompts: Sequence[str],
    concepts: Sequence[Marks | None] | None = None,
) -> Preview:
    """An image of each prompt with the weights that attention would allocate at every step. concepts: as for
    `encode`."""
    rollout = trace_prompts(pipeline, config, prompts, concepts)
    return Preview(
        prompts=list(prompts),
        images=_arrays(decode(pipeline, rollout.latents)),
        rewards=np.full(len(prompts), np.nan),
        weights=attention_weights(pipeline, rollout, config.allocation),
        labels=_labels(rollout.steps.sigmas[:-1]),
    )


def _labels(sigmas: Tensor) -> list[str]:
    return [f"sigma {sigma:.2f}" for sigma in sigmas.tolist()]


def attention_weights(pipeline: Any, rollout: Rollout, allocation: Allocation) -> np.ndarray:
    """(S, B, h, w): what the strategy "attention" allocates at every step of a trace, whatever the run's own is."""
    attention = dataclasses.replace(allocation, strategy="attention")
    patch = model_shape(pipeline).patch_size
    weights = allocation_weights(attention, rollout.captured_maps(), rollout.grid, patch=patch)
    assert weights is not None  # only of the strategy "uniform" there are none
    return weights.cpu().numpy()


def _arrays(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).cpu().numpy()


def _read(paths: Sequence[Path]) -> np.ndarray:
    """(n, H, W, 3) uint8."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


def held_out_maps(pipeline: Any, config: Config, held_out: HeldOut) -> dict[int, list[shown.Field]]:
    """Where attention looks while the held-out images that are kept are sampled again: by the image's number the mean
    over the steps of each concept's map and of the weights that attention would allocate."""
    kept, options, sampling = held_out.prompts[:SHOWN], held_out.options, config.sampling
    size = latent_size(pipeline, options.height, options.width)
    reading = SamplerOptions(
        size, options.guidance_scale, chunk=options.batch, layers=sampling.layers, normalize=sampling.normalize
    )
    conditions = encode(
        pipeline,
        [prompt.text for prompt in kept],
        options.max_sequence_length,
        options.guidance_scale,
        sampling.concepts,
        [prompt.concepts for prompt in kept],
    )
    noise = first_noise(len(held_out.prompts), (model_shape(pipeline).in_channels, *size), options)
    rollout = trace(pipeline, conditions, options.steps, reading, options.seed, noise)
    maps = rollout.captured_maps().float().mean(0).unflatten(-1, rollout.grid).cpu().numpy()  # (B, G, rows, columns)
    weights = attention_weights(pipeline, rollout, config.allocation).mean(0)
    fields = {}
    for i, concepts in enumerate(concepts_of(kept, sampling.concepts)):
        found = [("map", concept.text, field) for concept, field in zip(concepts, maps[i], strict=False)]
        found.append(("weights", "weights", weights[i]))
        own = [shown.Field(kind, name, field / field.mean()) for kind, name, field in found if field.mean() > 0]
        if len(own) > 1:  # a prompt without concepts has weights of 1, which say nothing
            fields[i] = own
    return fields


# --- drawing: a figure that cannot be drawn costs a warning, never the run --------------------------------------------


def draw_rollout(preview: Preview, path: Path) -> None:
    """The grid of a rollout."""
    from star.reports import figures  # matplotlib is slow to import

    path.parent.mkdir(exist_ok=True)
    _attempt(path, lambda: figures.rollout_grid(preview, path))


def draw_run(pipeline: Any, config: Config, prompts: Sequence[Prompt], *, write: bool) -> None:
    """What a run shows at its end: reward_curve.png, before_after.png where it was scored, allocation.png.

    With several processes all of them sample; only one may write.
    """
    # Prompts of several concepts say most about where the maps look.
    distinct = list({prompt.text: prompt for prompt in prompts[:512]}.values())
    found = concepts_of(distinct, config.sampling.concepts)
    chosen = [distinct[i] for i in sorted(range(len(distinct)), key=lambda i: -len(found[i]))[:TRACED]]
    traced = of_prompts(pipeline, config, [p.text for p in chosen], [p.concepts for p in chosen])
    if not write:
        return
    from star.reports import figures  # matplotlib is slow to import

    out = config.run.out
    metrics = tracking.read(out)
    iterations = [int(line["iteration"]) + 1 for line in metrics]
    rewards = [line.get("reward", np.nan) for line in metrics]
    _attempt(out / "reward_curve.png", lambda: figures.reward_curve(iterations, rewards, out / "reward_curve.png"))
    evaluations = read_evaluations(out)
    if len(evaluations) > 1:
        first, last = evaluations[0].values["reward"], evaluations[-1].values["reward"]

        def draw() -> None:
            before, after = shown.image_paths(out, "before"), shown.image_paths(out, "after")
            kept = sorted(before.keys() & after.keys())
            pairs = figures.BeforeAfter(
                [prompts[i].text for i in kept],
                _read([before[i] for i in kept]),
                _read([after[i] for i in kept]),
                first[kept],
                last[kept],
            )
            figures.before_after(pairs, out / "before_after.png")

        _attempt(out / "before_after.png", draw)
    _attempt(out / "allocation.png", lambda: figures.allocation(traced, out / "allocation.png"))


def _attempt(path: Path, draw: Callable[[], None]) -> None:
    try:
        draw()
    except Exception as error:
        log.warning("figures: %s could not be drawn (%s: %s)", path, type(error).__name__, one_line(error))
