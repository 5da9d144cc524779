"""How well a model's attention localizes, against the true masks. `python -m star.shapes.measure` prints a table."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from rich.console import Console
from rich.table import Table
from scipy.stats import rankdata
from torch import Tensor

from star.capture import capture
from star.concepts import concept_tokens
from star.shapes.model import GRID, load_pipeline
from star.shapes.scenes import parse_scene, prompts, render

STEPS = 4  # the demo's sampling: four Euler steps, no guidance
OBJECT_SHARE = 0.4  # coverage from which an image token belongs to the object


def auc(values: np.ndarray, inside: np.ndarray) -> float:
    """Probability that a value inside exceeds one outside, ties counted half. values, inside: (N,)."""
    n_in, n_out = inside.sum(), (~inside).sum()
    return float((rankdata(values)[inside].sum() - n_in * (n_in + 1) / 2) / (n_in * n_out))


def object_tokens(masks: Tensor, grid: tuple[int, int]) -> Tensor:
    """Which image tokens belong to an object. masks: (B, H, W) or (B, G, H, W) float in 0..1, in pixels. Returns a bool
    tensor, (B, *grid) or (B, G, *grid)."""
    return F.adaptive_avg_pool2d(masks, grid) > OBJECT_SHARE


@dataclass(frozen=True)
class Localization:
    """How well one layer's maps find the true objects at one noise level.

    auc: of each concept's map against its own object. auc_any: of the mean map against all objects.
    mass_ratio: share of a map's mass on its object over the object's share of the area (1: no localization).
    """

    layer: int
    t: float
    auc: float
    auc_any: float
    mass_ratio: float


@torch.no_grad()
def measure_localization(
    pipeline: StableDiffusion3Pipeline, levels: Sequence[float] = (0.5,), n: int = 128, seed: int = 0
) -> list[Localization]:
    """Maps of held-out two-object scenes, rendered, encoded and noised to each level t, against the true masks."""
    texts = prompts(n, seed, "heldout", ("color_attribution", "position"))
    drawn = [render(parse_scene(text), random.Random(f"{seed}/{i}")) for i, text in enumerate(texts)]
    images = torch.from_numpy(np.stack([image for image, _ in drawn])).permute(0, 3, 1, 2) * 2 - 1
    masks = torch.from_numpy(np.stack([masks for _, masks in drawn]))
    inside = object_tokens(masks, GRID).flatten(2).numpy()  # (B, 2, N)

    vae, transformer = pipeline.vae, pipeline.transformer
    latents = (vae.encode(images).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    embeds, _, pooled, _ = pipeline.encode_prompt(
        texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
    )
    tokens = concept_tokens(pipeline, texts)
    measured = []
    for t in levels:
        with capture(transformer, tokens, grid=GRID) as maps:
            transformer(torch.lerp(latents, noise, t), embeds, pooled, torch.full((n,), t * 1000), return_dict=False)
            layers = maps.layers().numpy()  # (L, B, G, N)
        for layer, values in enumerate(layers):
            relative = values / values.mean(-1, keepdims=True)
            pairs = [(relative[b, g], inside[b, g]) for b in range(n) for g in range(2) if inside[b, g].any()]
            whole = [(relative[b].mean(0), inside[b].any(0)) for b in range(n)]
            measured.append(
                Localization(
                    layer,
                    t,
                    auc=float(np.mean([auc(*pair) for pair in pairs])),
                    auc_any=float(np.mean([auc(*pair) for pair in whole if pair[1].any()])),
                    mass_ratio=float(np.mean([value[mask].mean() for value, mask in pairs])),
                )
            )
    return measured


def print_localization(pipeline: StableDiffusion3Pipeline) -> None:
    """Print AUC and mass over area of every layer's maps at several noise levels."""
    table = Table("t", "layer", "AUC", "AUC any object", "mass over area", title="localization of concept maps")
    for entry in measure_localization(pipeline, (0.95, 0.85, 0.7, 0.5, 0.3)):
        cells = (f"{entry.auc:.3f}", f"{entry.auc_any:.3f}", f"{entry.mass_ratio:.2f}")
        table.add_row(f"{entry.t}", str(entry.layer), *cells)
    Console().print(table)


if __name__ == "__main__":
    print_localization(load_pipeline())
