"""What a run shows at its end: held-out scores before and after, and pictures of the curve, the images and the maps."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from torch import Tensor

from star import files
from star.config import Config, ConfigError
from star.objective import Allocation, allocation_weights
from star.reports import tracking
from star.shapes import measure, scenes
from star.training.rollout import Rollout, decode, encode, make_steps, sample

HELD_OUT_SEED = 2026  # the same prompts and noise for every run, so that runs can be compared
SHOWN = 8


@dataclass(frozen=True)
class HeldOut:
    """Scores on the held-out prompts and the first few pictures, (SHOWN, S, S, 3)."""

    prompts: tuple[str, ...]
    scores: measure.Scores
    images: np.ndarray


def held_out(
    pipeline: StableDiffusion3Pipeline, config: Config, label: str, *, known: bool = False, write: bool = True
) -> HeldOut | None:
    """Score the held-out prompts of the embedded world, or, when `known`, read what an earlier part of the run scored.

    With several processes all of them score; only one may write.
    """
    if not config.run.held_out:
        return None
    texts = scenes.prompts(config.run.held_out, HELD_OUT_SEED, "heldout", distinct=True)
    categories = tuple(scenes.parse_scene(text).category for text in texts)
    path = config.run.out / f"held_out_{label}.npz"
    if known:
        # The policy has moved since: measuring it now would call trained scores untrained.
        if not path.exists():
            raise ConfigError("run.held_out: the run was started without it, so its scores before are not known; use 0")
        with np.load(path) as stored:
            if len(stored["soft"]) != len(texts):
                raise ConfigError(f"run.held_out: got {len(texts)}, the run was started with {len(stored['soft'])}")
            scores = measure.Scores(stored["strict"], stored["soft"], categories)
            return HeldOut(tuple(texts), scores, stored["images"])
    images = measure.sample(pipeline, texts, HELD_OUT_SEED, config.sampling.steps)
    result = HeldOut(tuple(texts), measure.score(images, texts), images[:SHOWN])
    if write:
        arrays = {"strict": result.scores.strict, "soft": result.scores.soft, "images": result.images}
        files.replace(path, lambda file: np.savez(file, **arrays))
    return result


def compare(before: HeldOut | None, after: HeldOut | None) -> dict[str, float]:
    """Mean scores before and after, and the standard error of the paired difference of the soft ones."""
    if before is None or after is None:
        return {}
    difference = after.scores.soft - before.scores.soft
    values = {
        "soft_before": before.scores.soft.mean(),
        "soft_after": after.scores.soft.mean(),
        "soft_standard_error": difference.std(ddof=1) / len(difference) ** 0.5,
        "strict_before": before.scores.strict.mean(),
        "strict_after": after.scores.strict.mean(),
    }
    return {name: round(float(value), 5) for name, value in values.items()}


def pictures(
    pipeline: StableDiffusion3Pipeline,
    config: Config,
    before: HeldOut | None,
    after: HeldOut | None,
    *,
    write: bool = True,
) -> None:
    """Write reward_curve.png, and for the embedded world before_after.png and allocation.png.

    With several processes all of them sample; only one may write.
    """
    out = config.run.out
    if write:
        reward_curve(tracking.read(out), out / "reward_curve.png")
    if before is None or after is None:
        return
    if write:
        before_after(before, after, out / "before_after.png")
    # Two-object prompts say most about where the maps look.
    texts = scenes.prompts(4, HELD_OUT_SEED, "heldout", ("position", "color_attribution"), distinct=True)
    sampling = config.sampling
    rollout = trace(pipeline, texts, config.model.max_sequence_length, sampling.steps, sampling.guidance_scale,
                    (config.model.height, config.model.width), HELD_OUT_SEED, sampling.layers)  # fmt: skip
    if write:
        allocation_picture(pipeline, rollout, config.allocation, out / "allocation.png")


def reward_curve(metrics: list[dict[str, float]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    x, y = [line["iteration"] + 1 for line in metrics], np.array([line["reward"] for line in metrics])
    axes.plot(x, y, color="0.75", linewidth=1, label="each iteration")
    width = max(1, len(y) // 10)
    if len(y) >= width:
        smooth = np.convolve(y, np.ones(width) / width, "valid")
        axes.plot(x[width - 1 :], smooth, color="tab:blue", linewidth=2, label=f"mean of {width}")
    axes.set(xlabel="iteration", ylabel="reward")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _wrap(text: str, width: int = 22) -> str:
    lines = [""]
    for word in text.split():
        if len(lines[-1]) + len(word) >= width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return "\n".join(lines)


def before_after(before: HeldOut, after: HeldOut, path: Path) -> None:
    count = len(before.images)
    figure, axes = plt.subplots(2, count, figsize=(1.5 * count, 3.9), layout="constrained", squeeze=False)
    for row, (label, result) in enumerate((("before", before), ("after", after))):
        for column in range(count):
            axis = axes[row, column]
            axis.imshow(result.images[column], interpolation="nearest")
            axis.set_xticks([])
            axis.set_yticks([])
            right = result.scores.strict[column] == 1
            for spine in axis.spines.values():
                spine.set(color="tab:green" if right else "tab:red", linewidth=2)
            axis.set_xlabel(f"{result.scores.soft[column]:.2f}", fontsize=8)
            if row == 0:
                axis.set_title(_wrap(result.prompts[column]), fontsize=7)
        axes[row, 0].set_ylabel(label)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def trace(
    pipeline: StableDiffusion3Pipeline,
    texts: list[str],
    max_sequence_length: int,
    steps: int,
    guidance_scale: float,
    pixels: tuple[int, int],
    seed: int,
    layers: tuple[int, ...] | None,
) -> Rollout:
    """Sample one picture a prompt without noise in the steps, with the maps of every step."""
    conditions = encode(pipeline, texts, max_sequence_length, guidance_scale)
    factor = pipeline.vae_scale_factor
    return sample(
        pipeline.transformer,
        conditions,
        torch.arange(len(texts)),
        make_steps(pipeline.scheduler, steps, (), "ode", 0.0),
        size=(pixels[0] // factor, pixels[1] // factor),
        generator=torch.Generator().manual_seed(seed),
        guidance_scale=guidance_scale,
        shared_noise=False,
        captured=range(steps),
        layers=layers,
    )


def _overlay(axis, image: np.ndarray, field: Tensor, largest: float) -> None:
    """A field over a picture in gray; latent positions are stretched to the picture's size."""
    height, width = image.shape[:2]
    axis.imshow(image.mean(-1), cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    extent = (-0.5, width - 0.5, height - 0.5, -0.5)
    axis.imshow(
        field.cpu().numpy(), cmap="inferno", vmin=0, vmax=largest, alpha=0.75, extent=extent, interpolation="nearest"
    )
    axis.set_xticks([])
    axis.set_yticks([])


def rollout_grid(
    pipeline: StableDiffusion3Pipeline, rollout: Rollout, weights: Tensor | None, rewards: Tensor, path: Path
) -> None:
    """The first pictures of a rollout with their rewards and, below, the weights of every trained step."""
    count = min(SHOWN, len(rollout.latents))
    images = decode(pipeline, rollout.latents[:count]).permute(0, 2, 3, 1).cpu().numpy()
    fields = [] if weights is None else [step[:count].float().cpu() for step in weights]
    prompts = [rollout.conditions.prompts[i] for i in rollout.groups[:count].tolist()]
    figure, axes = plt.subplots(
        len(fields) + 1,
        count,
        figsize=(1.5 * count, 0.6 + 1.6 * (len(fields) + 1)),
        layout="constrained",
        squeeze=False,
    )
    for column in range(count):
        axes[0, column].imshow(images[column], interpolation="nearest")
        axes[0, column].set(xticks=[], yticks=[], xlabel=f"{float(rewards[column]):.2f}")
        axes[0, column].set_title(_wrap(prompts[column]), fontsize=7)
        for row, field in enumerate(fields):
            _overlay(axes[row + 1, column], images[column], field[column], max(float(f.max()) for f in fields))
    axes[0, 0].set_ylabel("reward")
    for row, step in enumerate(rollout.steps.trained if fields else ()):
        axes[row + 1, 0].set_ylabel(f"sigma {rollout.steps.sigmas[step]:.2f}", fontsize=7)
    path.parent.mkdir(exist_ok=True)
    files.replace(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)


def allocation_picture(
    pipeline: StableDiffusion3Pipeline, rollout: Rollout, allocation: Allocation, path: Path
) -> None:
    """Each prompt's picture and, step by step, the weights that attention would allocate."""
    images = decode(pipeline, rollout.latents).permute(0, 2, 3, 1).cpu().numpy()
    shown = Allocation(**{**vars(allocation), "strategy": "attention"})
    patch = pipeline.transformer.config.patch_size
    weights = [allocation_weights(shown, maps, rollout.grid, patch=patch) for maps in rollout.maps]
    prompts = rollout.conditions.prompts
    figure, axes = plt.subplots(
        len(prompts), len(weights) + 1, figsize=(1.25 * (len(weights) + 1), 1.5 * len(prompts)), layout="constrained",
        squeeze=False,
    )  # fmt: skip
    largest = max(float(w.max()) for w in weights)
    for row, prompt in enumerate(prompts):
        axes[row, 0].imshow(images[row], interpolation="nearest")
        axes[row, 0].set_title(_wrap(prompt), fontsize=6)
        axes[row, 0].axis("off")
        for column, field in enumerate(weights):
            _overlay(axes[row, column + 1], images[row], field[row], largest)
            if row == 0:
                axes[row, column + 1].set_title(f"sigma {rollout.steps.sigmas[column]:.2f}", fontsize=7)
    bar = figure.colorbar(axes[0, 1].images[-1], ax=axes[:, -1], fraction=0.08)
    bar.set_label("weight (mean 1)", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def maps_picture(
    pipeline: StableDiffusion3Pipeline,
    by_layer: dict[int, Rollout],
    allocation: Allocation,
    names: list[str],
    path: Path,
) -> None:
    """One prompt: its picture, each concept's map by layer (rows) and step (columns), and the weights of the mean."""
    rollouts = list(by_layer.values())
    image = decode(pipeline, rollouts[0].latents)[0].permute(1, 2, 0).cpu().numpy()
    steps, grid = len(rollouts[0].maps), rollouts[0].grid
    rows = [(f"{name}\nblock {layer}", [m[0, g] for m in rollout.maps])
            for g, name in enumerate(names) for layer, rollout in by_layer.items()]  # fmt: skip
    mean = torch.stack([rollout.maps for rollout in rollouts]).mean(0)
    patch = pipeline.transformer.config.patch_size
    weights = [allocation_weights(allocation, maps, grid, patch=patch)[0] for maps in mean]
    figure, axes = plt.subplots(
        len(rows) + 1,
        steps + 1,
        figsize=(1.2 * (steps + 1), 1.3 * (len(rows) + 1)),
        layout="constrained",
        squeeze=False,
    )
    for axis in axes[:, 0]:
        axis.axis("off")
    axes[0, 0].imshow(image, interpolation="nearest")
    axes[0, 0].set_title(_wrap(rollouts[0].conditions.prompts[0]), fontsize=7)
    for row, (label, fields) in enumerate(rows):
        for column, field in enumerate(fields):
            relative = (field / field.mean().clamp_min(1e-30)).view(grid)
            _overlay(axes[row, column + 1], image, relative, max(4.0, float(relative.max())))
        axes[row, 1].set_ylabel(label, fontsize=7)
    for column, field in enumerate(weights):
        _overlay(axes[-1, column + 1], image, field, float(torch.stack(weights).max()))
        axes[0, column + 1].set_title(f"sigma {rollouts[0].steps.sigmas[column]:.2f}", fontsize=7)
    axes[-1, 1].set_ylabel("weights", fontsize=7)
    figure.savefig(path, dpi=130)
    plt.close(figure)
