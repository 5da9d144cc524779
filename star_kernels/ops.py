"""Schemas of the operators, one torch.library operator per implementation, and their fakes.

`star::NAME_reference` is plain PyTorch. `star::NAME_native` is implemented in C++ for the devices it was built for.
The schemas exist before anything optional is imported, so that torch.compile sees every operator whatever is installed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels import reference


def fake_attention_maps(query, key, concept_index, concept_weight, lse, scale, head_weight) -> Tensor:
    shape = (query.shape[0], concept_index.shape[1], query.shape[2])
    return query.new_empty(shape, dtype=reference.compute_dtype(query, key))


def fake_allocate(maps, rows, columns, combine, smooth, sharpen, cap, mix, patch) -> Tensor:
    return maps.new_empty((maps.shape[0], rows * patch, columns * patch), dtype=reference.compute_dtype(maps))


def fake_gaussian_step(sample, velocity, noise, a, b, s) -> tuple[Tensor, Tensor]:
    mean = sample.new_empty(sample.shape, dtype=reference.compute_dtype(sample, velocity))
    return sample.new_empty(sample.shape), mean


def fake_policy_loss(velocity, sample, prev_sample, *_) -> tuple[Tensor, Tensor, Tensor]:
    loss = velocity.new_empty((), dtype=reference.compute_dtype(velocity, sample, prev_sample))
    return loss, velocity.new_empty((10,), dtype=torch.float32), velocity.new_empty(velocity.shape)


def attention_maps_triton(*args, out: Tensor | None = None) -> Tensor:
    from star_kernels.triton.attention_maps import launch  # not before it runs: star_kernels needs torch alone

    return launch(*args, out=out)


# operator: (schema, fake, reference, other implementations)
OPERATORS = {
    "attention_maps": (
        "(Tensor query, Tensor key, Tensor concept_index, Tensor? concept_weight, Tensor? lse, float scale, "
        "Tensor? head_weight) -> Tensor",
        fake_attention_maps,
        reference.attention_maps,
        ("native", "triton"),
    ),
    "allocate": (
        "(Tensor maps, int rows, int columns, str combine, float smooth, float sharpen, float cap, float mix, "
        "int patch) -> Tensor",
        fake_allocate,
        reference.allocate,
        ("native",),
    ),
    "gaussian_step": (
        "(Tensor sample, Tensor velocity, Tensor noise, Tensor a, Tensor b, Tensor s) -> (Tensor, Tensor)",
        fake_gaussian_step,
        reference.gaussian_step,
        ("native",),
    ),
    "policy_loss": (
        "(Tensor velocity, Tensor sample, Tensor prev_sample, Tensor a, Tensor b, Tensor s, Tensor precision, "
        "Tensor log_norm, Tensor kl_precision, Tensor advantages, Tensor? weights, Tensor? old_mean, "
        "Tensor? old_log_prob, Tensor? reference_velocity, Tensor? step_weights, str ratio, float clip_low, "
        "float clip_high, float adv_clip, float kl_coef, bool guard) -> (Tensor, Tensor, Tensor)",
        fake_policy_loss,
        reference.policy_loss,
        ("native",),
    ),
}

for _operator, (_schema, _fake, _reference, _others) in OPERATORS.items():
    for _implementation in ("reference", *_others):
        _name = f"star::{_operator}_{_implementation}"
        torch.library.define(_name, _schema)
        torch.library.register_fake(_name, _fake)
    torch.library.impl(f"star::{_operator}_reference", "CompositeExplicitAutograd", _reference)
torch.library.impl("star::attention_maps_triton", ("CPU", "CUDA"), attention_maps_triton)
