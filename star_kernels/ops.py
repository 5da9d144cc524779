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
from torch._C import _functorch as functorch
from torch._subclasses import FakeTensor

from star_kernels import reference
from star_kernels.transition import channel_dim


def has_values(value: Any) -> bool:
    """Whether all tensors of an argument have values to look at: those of FakeTensorMode, which plans memory or traces,
    have none, and those of torch.func.vmap none of their own."""
    if isinstance(value, tuple):
        return all(map(has_values, value))
    return not isinstance(value, Tensor) or not (isinstance(value, FakeTensor) or functorch.is_batchedtensor(value))


def fake_attention_maps(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None,
    lse: Tensor | None,
    scale: float,
    head_weight: Tensor | None,
    key_bias: Tensor | None,
) -> Tensor:
    shape = (query.shape[0], concept_index.shape[1], query.shape[2])
    return query.new_empty(shape, dtype=reference.compute_dtype(query, key))


def fake_write(*_: Any) -> None:
    return None


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
    shape = (maps.shape[0], maps.shape[2] // columns * patch, columns * patch)
    return maps.new_empty(shape, dtype=reference.compute_dtype(maps))


def fake_gaussian_step(
    sample: Tensor,
    velocity: Tensor,
    noise: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    unconditional_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(sample, velocity, unconditional_velocity)
    mean = sample.new_empty(sample.shape, dtype=dtype)
    return sample.new_empty(sample.shape), mean


def fake_policy_loss(
    velocity: Tensor, sample: Tensor, prev_sample: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = reference.compute_dtype(velocity, sample, prev_sample)
    batch, ratio = velocity.shape[0], rest[12]
    locations = velocity.numel() // (batch * velocity.shape[channel_dim(velocity)])
    units = (batch, locations) if ratio == "location" else (batch,)
    statistics = velocity.new_empty((len(reference.STATISTICS),), dtype=torch.float32)
    return velocity.new_empty((), dtype=dtype), statistics, velocity.new_empty(units, dtype=dtype)


def fake_gradient(grad_loss: Tensor, extra: Tensor, velocity: Tensor, *_: Any) -> Tensor:
    return velocity.new_empty(velocity.shape)


def fake_policy_loss_with_gradient(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return *fake_policy_loss(velocity, *rest), velocity.new_empty(velocity.shape)


def fake_nft_loss(velocity: Tensor, old_velocity: Tensor, sample: Tensor, clean: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtype = reference.compute_dtype(velocity, sample, clean)
    statistics = velocity.new_empty((len(reference.NFT_STATISTICS),), dtype=torch.float32)
    return velocity.new_empty((), dtype=dtype), statistics, velocity.new_empty((velocity.shape[0], 2), dtype=dtype)


def fake_nft_loss_with_gradient(velocity: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return *fake_nft_loss(velocity, *rest), velocity.new_empty(velocity.shape)


def triton_launcher(operator: str, name: str = "launch") -> Callable:
    """A function of star_kernels.triton.OPERATOR, not imported before it runs: star_kernels needs torch alone."""

    def launch(*arguments, **options):
        return getattr(importlib.import_module(f"star_kernels.triton.{operator}"), name)(*arguments, **options)

    return launch


@dataclass(frozen=True)
class Operator:
    """One operator, as torch.library and api.py know it.

    name: of the public function, and of star::NAME_IMPLEMENTATION.
    schema: arguments and results, as torch.library writes them; the arguments are those of `reference`.
    fake: shapes and types of the results, from the same arguments.
    reference: plain PyTorch on every device, the specification.
    native: types of the devices that have a compiled kernel, csrc/DEVICE.
    triton: the launcher of the Triton kernels, for CUDA tensors; None without one.
    gradient: the operator that the backward pass calls, in the same implementation; None for a constant.
    with_gradient: both in one, for a gradient of 1 of the loss; None without one.
    write: the same of a part of the arguments, into memory that is there; None without one.
    """

    name: str
    schema: str
    fake: Callable
    reference: Callable
    native: tuple[str, ...]
    triton: Callable | None = None
    gradient: Operator | None = None
    with_gradient: Operator | None = None
    write: Operator | None = None

    def define(
        self, implementation: str, function: Callable | None = None, devices: str | tuple[str, ...] = ()
    ) -> None:
        """Define star::NAME_IMPLEMENTATION, of the function for the devices; without one it is for C++ to register."""
        qualified = f"star::{self.name}_{implementation}"
        torch.library.define(qualified, self.schema)
        torch.library.register_fake(qualified, self.fake)
        if function is not None:
            torch.library.impl(qualified, devices, function)

    @property
    def companions(self) -> tuple[Operator, ...]:
        """The operators that are defined beside this one."""
        return tuple(one for one in (self.gradient, self.with_gradient, self.write) if one is not None)

    def run(self, implementation: str) -> Callable:
        """The torch.library operator of an implementation."""
        return getattr(torch.ops.star, f"{self.name}_{implementation}")


_ATTENTION_MAPS_ARGUMENTS = (
    "Tensor query, Tensor key, Tensor concept_index, Tensor? concept_weight, Tensor? lse, float scale, "
    "Tensor? head_weight, Tensor? key_bias"
)

# The schema says that `out` is written, which torch.compile reads. In eager PyTorch the compiled kernel leaves out's
# version as it is: the stable ABI has no call that counts it up, and a Python kernel for the key ADInplaceOrView, as
# torch.library.custom_op has one, would cost every capture microseconds. So the door in api.py counts it up; whoever
# calls star::write_attention_maps_native itself does so with torch.autograd.graph.increment_version.
WRITE_ATTENTION_MAPS = Operator(
    name="write_attention_maps",
    schema=f"({_ATTENTION_MAPS_ARGUMENTS}, int first_row, int first_query, Tensor(a!) out) -> ()",
    fake=fake_write,
    reference=reference.write_attention_maps,
    native=("cpu",),
)

ATTENTION_MAPS = Operator(
    name="attention_maps",
    schema=f"({_ATTENTION_MAPS_ARGUMENTS}) -> Tensor",
    fake=fake_attention_maps,
    reference=reference.attention_maps,
    native=("cpu",),
    triton=triton_launcher("attention_maps"),
    write=WRITE_ATTENTION_MAPS,
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
    schema=(
        "(Tensor sample, Tensor velocity, Tensor? noise, Tensor a, Tensor b, Tensor s, "
        "Tensor? unconditional_velocity=None, float guidance_scale=1.0, Tensor? seeds=None) -> (Tensor, Tensor)"
    ),
    fake=fake_gaussian_step,
    reference=reference.gaussian_step,
    native=("cpu", "cuda"),
    triton=triton_launcher("gaussian_step"),
)

_POLICY_LOSS_ARGUMENTS = (
    "Tensor velocity, Tensor sample, Tensor prev_sample, Tensor a, Tensor b, Tensor s, Tensor precision, "
    "Tensor log_norm, Tensor kl_precision, Tensor advantages, Tensor? weights, Tensor? old_mean, "
    "Tensor? old_log_prob, Tensor? reference_velocity, Tensor? step_weights, str ratio, float clip_low, "
    "float clip_high, float adv_clip, float kl_coef, bool guard"
)

POLICY_LOSS_GRADIENT = Operator(
    name="policy_loss_gradient",
    schema=f"(Tensor grad_loss, Tensor log_ratio, {_POLICY_LOSS_ARGUMENTS}) -> Tensor",
    fake=fake_gradient,
    reference=reference.policy_loss_gradient,
    native=("cpu", "cuda"),
    triton=triton_launcher("policy_loss", "launch_gradient"),
)

POLICY_LOSS_WITH_GRADIENT = Operator(
    name="policy_loss_with_gradient",
    schema=f"({_POLICY_LOSS_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=fake_policy_loss_with_gradient,
    reference=reference.policy_loss_with_gradient,
    native=("cpu",),
)

POLICY_LOSS = Operator(
    name="policy_loss",
    schema=f"({_POLICY_LOSS_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=fake_policy_loss,
    reference=reference.policy_loss,
    native=("cpu", "cuda"),
    triton=triton_launcher("policy_loss"),
    gradient=POLICY_LOSS_GRADIENT,
    with_gradient=POLICY_LOSS_WITH_GRADIENT,
)

_NFT_LOSS_ARGUMENTS = (
    "Tensor velocity, Tensor old_velocity, Tensor sample, Tensor clean, Tensor sigma, Tensor reward_prob, "
    "Tensor? weights, Tensor? reference_velocity, float beta, bool adaptive, float adaptive_min, float adv_clip, "
    "float kl_coef"
)

NFT_LOSS_GRADIENT = Operator(
    name="nft_loss_gradient",
    schema=f"(Tensor grad_loss, Tensor errors, {_NFT_LOSS_ARGUMENTS}) -> Tensor",
    fake=fake_gradient,
    reference=reference.nft_loss_gradient,
    native=("cpu", "cuda"),
    triton=triton_launcher("nft_loss", "launch_gradient"),
)

NFT_LOSS_WITH_GRADIENT = Operator(
    name="nft_loss_with_gradient",
    schema=f"({_NFT_LOSS_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor)",
    fake=fake_nft_loss_with_gradient,
    reference=reference.nft_loss_with_gradient,
    native=("cpu",),
)

NFT_LOSS = Operator(
    name="nft_loss",
    schema=f"({_NFT_LOSS_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
    fake=fake_nft_loss,
    reference=reference.nft_loss,
    native=("cpu", "cuda"),
    triton=triton_launcher("nft_loss"),
    gradient=NFT_LOSS_GRADIENT,
    with_gradient=NFT_LOSS_WITH_GRADIENT,
)

OPERATORS = {operator.name: operator for operator in (ATTENTION_MAPS, ALLOCATE, GAUSSIAN_STEP, POLICY_LOSS, NFT_LOSS)}


def define(operator: Operator) -> None:
    """All implementations of an operator and of its companions."""
    operator.define("reference", operator.reference, "CompositeExplicitAutograd")
    if operator.native:
        operator.define("native")
    if operator.triton is not None:
        operator.define("triton", operator.triton, ("CPU", "CUDA"))
    for companion in operator.companions:
        define(companion)


for _operator in OPERATORS.values():
    define(_operator)
