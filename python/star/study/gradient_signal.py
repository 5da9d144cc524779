"""How much of a noisy gradient is signal, and how much of it raises the reward, from the gradients of batches."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

COORDINATES = 2**17  # of a gradient: both signal and noise are sums over them


def draw_coordinates(parameters: Iterable[Tensor]) -> Tensor:
    """The coordinates of the parameters' gradient that are compared, the same in every call."""
    size = sum(p.numel() for p in parameters)
    return torch.randperm(size, generator=torch.Generator().manual_seed(0))[:COORDINATES]


def jackknife_error(left_out: np.ndarray) -> float:
    """Jackknife standard error of a statistic of n batches, from its n values with one of them left out."""
    n = len(left_out)
    return float(np.sqrt((n - 1) / n * np.sum((left_out - left_out.mean()) ** 2)))


def mean_inner_product(gram: np.ndarray, chosen: np.ndarray) -> float:
    """Mean inner product over pairs of different batches, unbiased for that of the means."""
    part, m = gram[np.ix_(chosen, chosen)], chosen.sum()
    return (part.sum() - np.trace(part)) / (m * (m - 1))


def signal_to_noise(gradients: np.ndarray) -> tuple[float, float, float]:
    """Of (n, D) gradients of disjoint batches: |mean|^2 over the trace of the covariance, its jackknife standard error,
    and the root mean square norm."""
    n = len(gradients)
    wide = gradients.astype(np.float64)
    gram = wide @ wide.T

    def ratio(chosen: np.ndarray) -> float:
        signal = mean_inner_product(gram, chosen)
        noise = np.trace(gram[np.ix_(chosen, chosen)]) / chosen.sum() - signal
        return signal / noise if noise > 0 else np.nan

    left_out = np.array([ratio(np.arange(n) != i) for i in range(n)])
    return ratio(np.ones(n, bool)), jackknife_error(left_out), float(np.sqrt(np.trace(gram) / n))


def agreement(gradients: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(n + 1,) unbiased cosines of (n, D) gradients with the `others` of other batches: of all batches, then with each
    batch left out.

    With the scalar arm's gradients as others it is the part of a step that raises the reward, whatever else it does.
    """
    n = len(gradients)
    gram = gradients.astype(np.float64) @ others.astype(np.float64).T
    lengths = [np.sqrt(np.square(g.astype(np.float64)).sum(1).mean()) for g in (gradients, others)]
    if 0 in lengths:
        return np.full(n + 1, np.nan)
    chosen = [np.ones(n, bool), *(np.arange(n) != i for i in range(n))]
    return np.array([mean_inner_product(gram, one) for one in chosen]) / (lengths[0] * lengths[1])


def adamw_steps(gradients: np.ndarray) -> np.ndarray:
    """(n, D) gradients with every coordinate divided by its root mean square, as AdamW does in the long run."""
    scale = np.sqrt(np.square(gradients.astype(np.float64)).mean(0))
    return gradients / np.where(scale > 0, scale, np.inf)


def agreements(gradients: np.ndarray, scalar: np.ndarray) -> dict[str, np.ndarray]:
    """The `agreement` of (n, D) gradients with the scalar ones, as they are and as AdamW's steps."""
    return {
        "agreement": agreement(gradients, scalar),
        "adamw_agreement": agreement(adamw_steps(gradients), scalar),
    }


def compare_with_scalar(gradients: dict[str, np.ndarray], scalar: str) -> dict[str, dict[str, float | None]]:
    """Signal, norm and agreement of the (n, D) gradients of several fields of weights, by the name of the field.

    scalar: the name of the gradients without weights, with which all are compared. A value that is not finite is None.
    """
    baseline, compared = agreements(gradients[scalar], gradients[scalar]), {}
    for weights, own in gradients.items():
        snr, error, norm = signal_to_noise(own)
        numbers = {"snr": snr, "standard_error": error, "norm": norm}
        for name, values in agreements(own, gradients[scalar]).items():
            gains = values - baseline[name]
            numbers |= {name: values[0], f"{name}_error": jackknife_error(values[1:])}
            numbers |= {f"{name}_gain": gains[0], f"{name}_gain_error": jackknife_error(gains[1:])}
        compared[weights] = {name: float(value) if math.isfinite(value) else None for name, value in numbers.items()}
    return compared
