"""The table of the operators, and one torch.library operator for each implementation.

`star::NAME_reference` is plain PyTorch. `star::NAME_native` is implemented in C++ for the devices it was built for.
The schemas exist before anything optional is imported, so that torch.compile sees every operator whatever is installed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star_kernels import reference


def fake_attention_maps(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None,
    lse: Tensor | None,
    scale: float,
    head_weight: Tensor | None,
) -> Tensor:
    shape = (query.shape[0], concept_index.shape[1], query.shape[2])
    return query.new_empty(shape, dtype=reference.compute_dtype(query, key))


def fake_allocate(
    maps: Tensor,
    rows: int,
    columns: int,
    combine: str,
    smooth: float,
    sharpen: float,
    cap: float,
    mix: float,
    patch: int,
) -> Tensor:
    return maps.new_empty((maps.shape[0], rows * patch, columns * patch), dtype=reference.compute_dtype(maps))


def fake_gaussian_step(
    sample: Tensor, velocity: Tensor, noise: Tensor, a: Tensor, b: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    mean = sample.new_empty(sample.shape, dtype=reference.compute_dtype(sample, velocity))
    return sample.new_empty(sample.shape), mean


def fake_policy_loss(velocity: Tensor, sample: Tensor, prev_sample: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss = velocity.new_empty((), dtype=reference.compute_dtype(velocity, sample, prev_sample))
    return loss, velocity.new_empty((10,), dtype=torch.float32), velocity.new_empty(velocity.shape)


def triton_launcher(operator: str) -> Callable:
    """`launch` of star_kernels.triton.OPERATOR, not imported before it runs: star_kernels needs torch alone."""

    def launch(*arguments, **options):
        return importlib.import_module(f"star_kernels.triton.{operator}").launch(*arguments, **options)

    return launch


@dataclass(frozen=True)
class Operator:
    """One operator, as torch.library and the door in api.py know it.

    name: of the door, and of star::NAME_IMPLEMENTATION.
    schema: arguments and results, as torch.library writes them; the arguments are those of `reference`.
    fake: shapes and types of the results, from the same arguments.
    reference: plain PyTorch on every device, the specification.
    native: types of the devices that have a compiled kernel, csrc/DEVICE.
    triton: the launcher of the Triton kernels, for CUDA tensors; None without one.
    """

    name: str
    schema: str
    fake: Callable
    reference: Callable
    native: tuple[str, ...]
    triton: Callable | None = None

    def define(self, implementation: str) -> str:
        """Define star::NAME_IMPLEMENTATION, which has no kernel yet, and return this name."""
        qualified = f"star::{self.name}_{implementation}"
        torch.library.define(qualified, self.schema)
        torch.library.register_fake(qualified, self.fake)
        return qualified

    def run(self, implementation: str) -> Callable:
        """The torch.library operator of an implementation."""
        return getattr(torch.ops.star, f"{self.name}_{implementation}")


ATTENTION_MAPS = Operator(
    name="attention_maps",
    schema=(
        "(Tensor query, Tensor key, Tensor concept_index, Tensor? concept_weight, Tensor? lse, float scale, "
        "Tensor? head_weight) -> Tensor"
    ),
    fake=fake_attention_maps,
    reference=reference.attention_maps,
    native=("cpu",),
    triton=triton_launcher("attention_maps"),
)

ALLOCATE = Operator(
    name="allocate",
    schema=(
        "(Tensor maps, int rows, int columns, str combine, float smooth, float sharpen, float cap, float mix, "
        "int patch) -> Tensor"
    ),
    fake=fake_allocate,
    reference=reference.allocate,
    native=("cpu", "cuda"),
    triton=triton_launcher("allocate"),
)

GAUSSIAN_STEP = Operator(
    name="gaussian_step",
    schema="(Tensor sample, Tensor velocity, Tensor noise, Tensor a, Tensor b, Tensor s) -> (Tensor, Tensor)",
    fake=fake_gaussian_step,
    reference=reference.gaussian_step,
    native=("cpu", "cuda"),
    triton=triton_launcher("gaussian_step"),
)

POLICY_LOSS = Operator(
    name="policy_loss",
    schema=(
        "(Tensor velocity, Tensor sample, Tensor prev_sample, Tensor a, Tensor b, Tensor s, Tensor precision, "
        "Tensor log_norm, Tensor kl_precision, Tensor advantages, Tensor? weights, Tensor? old_mean, "
        "Tensor? old_log_prob, Tensor? reference_velocity, Tensor? step_weights, str ratio, float clip_low, "
        "float clip_high, float adv_clip, float kl_coef, bool guard) -> (Tensor, Tensor, Tensor)"
    ),
    fake=fake_policy_loss,
    reference=reference.policy_loss,
    native=("cpu", "cuda"),
)

OPERATORS = {operator.name: operator for operator in (ATTENTION_MAPS, ALLOCATE, GAUSSIAN_STEP, POLICY_LOSS)}


def register(operator: Operator) -> None:
    """Define the operator's implementations, and register those in Python; the C++ libraries register their own."""
    torch.library.impl(operator.define("reference"), "CompositeExplicitAutograd", operator.reference)
    if operator.native:
        operator.define("native")
    if operator.triton is not None:
        torch.library.impl(operator.define("triton"), ("CPU", "CUDA"), operator.triton)


for _operator in OPERATORS.values():
    register(_operator)
