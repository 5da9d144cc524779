"""The table of all benchmarks. A row is a few lines: a name, a unit, what makes both sides, a goal where there is one.

A row compares `ours` with another side that computes the same (`runner.Sides`): `%` and `us` are what ours adds, `x`
how often ours fits into the other. Its limit is the goal or 1.3 times what the machine last did (`verdicts.limit_of`).
"""

from __future__ import annotations

from functools import partial

import torch

import captures
import iterations
import losses
import nft_losses
import steps
from runner import Row

SIZES = (512, 1024)


def of_capture() -> list[Row]:
    rows = []
    for name, shape, columns, goal, times, quick, seconds in (
        ("capture_k16_512", "512", 16, 0.8, 1, True, 480),
        ("capture_k16_1024", "1024", 16, 0.4, 1, False, 120),
        ("capture_k64_512", "512", 64, 2.5, 1, True, 120),
        ("capture_all_512", "512", 205, 5.8, 1, True, 120),
        ("capture_qwen_1024", "qwen_1024", 16, 0.5, 2, False, 480),
        ("capture_flux2_1024", "flux2_1024", 16, 0.5, 2, False, 480),
        ("capture_wan_480p", "wan_480p", 16, 0.5, 2, False, 120),
    ):
        rows += [
            Row(name, "%", partial(captures.of_a_layer, shape, columns=columns), goal, quick, seconds),
            Row(f"{name}_vs_torch", "x", partial(captures.maps_of_a_layer, shape, columns=columns), times, quick),
        ]
    for shape, goal in (("512", 2.8), ("qwen_1024", 1.9), ("flux2_1024", 1.9), ("wan_480p", 1.9)):
        rows.append(Row(f"capture_{shape}_vs_matrix", "x", partial(captures.against_the_matrix, shape), goal))
    for name, layers, goal in (("stack_capture_one", [1], 0.2), ("stack_capture_all", None, 1)):
        rows += [
            Row(name, "%", partial(captures.of_a_stack, layers), goal, seconds=300),
            Row(f"{name}_vs_torch", "x", partial(captures.of_a_stack, layers, by_torch=True), seconds=120),
        ]
    return [
        *rows,
        Row("capture_nolse_512", "%", partial(captures.of_a_layer, "512", guided=True, lse=False), 14, True),
        Row("capture_nolse_512_vs_torch", "x", captures.own_log_sum_exp, quick=True),
        Row("capture_host_layer", "us", captures.host, 40, quick=True),
        Row("capture_host_layer_vs_torch", "x", partial(captures.host, by_torch=True), quick=True),
        Row("capture_memory_1024", "MiB", captures.memory_of_capture, 1),
        Row("checkpoint_memory", "%", captures.memory_with_checkpointing, 0.1),
    ]


def of_iterations() -> list[Row]:
    return [
        Row("iteration_wall", "%", partial(iterations.overhead, iterations.medium_trainer), 1, seconds=600),
        Row("shapes_iteration_wall", "%", partial(iterations.overhead, iterations.shapes_trainer), 1, seconds=240),
        Row("iteration_memory", "%", iterations.memory, 0.1),
        Row("shapes_vs_eager_loop", "x", iterations.against_eager_loop, 1.55, seconds=120),
    ]


def of_losses() -> list[Row]:
    rows = []
    for size in SIZES:
        rows += [
            Row(f"loss_vs_eager_{size}", "x", partial(losses.against_flow_grpo, size), 6, True),
            Row(f"loss_vs_eager_{size}_delta", "x", partial(losses.against_flow_grpo, size, delta=True), 6),
            Row(f"loss_vs_compiled_{size}", "x", partial(losses.against_flow_grpo, size, True), 1.3),
            Row(f"loss_spatial_vs_scalar_{size}", "%", partial(losses.spatial, size), 3, True),
            Row(f"loss_bandwidth_{size}", "x", partial(losses.bandwidth, size), 0.55, True),
            Row(f"loss_bandwidth_{size}_operator", "x", partial(losses.bandwidth, size, True), 0.8, True),
            Row(f"loss_memory_{size}", "KiB", partial(losses.memory, size), 16),
            Row(f"nft_loss_vs_eager_{size}", "x", partial(nft_losses.against_diffusion_nft, size), 6, True),
            Row(f"nft_loss_vs_compiled_{size}", "x", partial(nft_losses.against_diffusion_nft, size, True), 1.3),
            Row(f"nft_loss_bandwidth_{size}", "x", partial(nft_losses.bandwidth, size), 0.7),
            Row(f"nft_loss_bandwidth_{size}_operator", "x", partial(nft_losses.bandwidth, size, True), 0.8),
        ]
    return [*rows, Row("loss_host", "us", losses.host, 55, True)]


def of_steps() -> list[Row]:
    rows = []
    for size in SIZES:
        half = partial(steps.step, size, torch.bfloat16)
        rows += [
            Row(f"step_vs_reference_{size}", "x", partial(steps.step, size), 2.1, True),
            Row(f"step_vs_reference_{size}_bfloat16", "x", half, 2.2, True),
            Row(f"allocate_vs_reference_{size}", "x", partial(steps.allocation, size, smooth=0.0), 1, True),
            Row(f"allocate_vs_reference_{size}_smooth", "x", partial(steps.allocation, size, smooth=1.0), 5.7, True),
        ]
    return rows


ROWS = (*of_capture(), *of_iterations(), *of_losses(), *of_steps())
