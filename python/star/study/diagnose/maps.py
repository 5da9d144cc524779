"""Where the maps look, and how concentrated they are: at every step, before and after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from star.config import Config
from star.study.tables import Table, format_number
from star.training.preview import trace_prompts
from star_kernels import allocate


@torch.no_grad()
def concentration(pipeline: Any, config: Config, prompts: Mapping[str, Sequence[str]]) -> dict[str, list[float]]:
    """By category of prompts the mean square of the relative map at each step; 1 means flat."""
    by_category = {}
    for category, texts in prompts.items():
        rollout = trace_prompts(pipeline, config, texts)
        fields = allocate(rollout.captured_maps(), rollout.grid, mix=1.0, cap=1e30, patch=1)  # (S, B, rows, columns)
        by_category[category] = fields.square().mean((1, 2, 3)).tolist()
    return by_category


def tables(measured: dict) -> list[Table]:
    """localization: by step. concentration: by arm, "untrained" first, category and step."""
    trained = measured["trained_steps"]
    steps = [f"sigma {sigma:.2f}{' (trained)' * (i in trained)}" for i, sigma in enumerate(measured["sigmas"])]
    localization = Table(
        "where each concept's map looks: its own object in the finished image",
        ["", *steps],
        [
            [label, *(format_number(step.get(key), 2) for step in measured["localization"])]
            for label, key in (("AUC", "auc"), ("mass over area", "mass_over_area"))
        ],
    )
    untrained = measured["concentration"]["untrained"]
    before = Table(
        "concentration of the maps before training (mean square of the relative map; 1: flat)",
        ["prompts", *steps],
        [[category, *(format_number(value, 2) for value in values)] for category, values in untrained.items()],
    )
    after = Table(
        "concentration of the maps after training, at the trained steps",
        ["arm", *untrained],
        [
            [arm, *(format_number(np.mean([values[i] for i in trained]), 2) for values in by_category.values())]
            for arm, by_category in measured["concentration"].items()
        ],
    )
    return [localization, before, after]
