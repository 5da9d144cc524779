"""Tiny random models of every class that maps are captured from, with inputs as their pipelines give them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from builders import GRID, TEXT, flux_inputs, small_flux, small_inputs, small_transformer

HEADS, WIDTH = 2, 16


@dataclass(frozen=True)
class Case:
    """A model and where its attention to the text is.

    inputs: of a batch and a grid. grid: (rows, columns) of the image tokens, of a video (frames, rows, columns).
    image, text: first image token among the queries and first text token among the keys, of that grid.
    output: first image token in a packed output.
    calls: slice of the attention calls of a pass, all of F.scaled_dot_product_attention, that read the text.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int, tuple[int, ...]], dict[str, Any]]
    image: int = 0
    text: int = 0
    output: int = 0
    calls: tuple[int | None, ...] = (None, None)
    grid: tuple[int, ...] = GRID


def seeded(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The model with weights in which maps differ visibly."""
    torch.manual_seed(1)
    model = build().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and ("norm_q" in name or "norm_added_q" in name):
                parameter.mul_(3)
            elif parameter.ndim == 1 or "scale_shift_table" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def image_ids(grid: tuple[int, int], axes: int, image: int = 0) -> Tensor:
    ids = torch.zeros(*grid, axes)
    ids[..., 0] = image
    ids[..., 1], ids[..., 2] = torch.meshgrid(*map(torch.arange, grid), indexing="ij")
    return ids.flatten(0, 1)


def kontext_inputs(batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    """The latents of a reference image follow those of the image."""
    inputs = flux_inputs(batch, grid)
    inputs["img_ids"] = torch.cat([inputs["img_ids"], image_ids((2, 4), 3, image=1)])
    inputs["hidden_states"] = torch.cat([inputs["hidden_states"], draw(batch, 8, 8)], 1)
    return inputs


def small_flux2() -> torch.nn.Module:
    return diffusers.Flux2Transformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=WIDTH, num_attention_heads=HEADS,
        joint_attention_dim=24, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def flux2_inputs(batch: int, grid: tuple[int, int], references: bool = False) -> dict[str, Any]:
    ids, latents = image_ids(grid, 4), draw(batch, grid[0] * grid[1], 8)
    if references:
        ids = torch.cat([ids, image_ids((2, 4), 4, image=10)])
        latents = torch.cat([latents, draw(batch, 8, 8)], 1)
    text_ids = torch.zeros(TEXT, 4)
    text_ids[:, 3] = torch.arange(TEXT)
    return dict(
        hidden_states=latents, encoder_hidden_states=draw(batch, TEXT, 24), timestep=torch.full((batch,), 0.5),
        img_ids=ids, txt_ids=text_ids, guidance=torch.full((batch,), 4.0),
    )  # fmt: skip


def small_qwen_image() -> torch.nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=3, attention_head_dim=WIDTH, num_attention_heads=HEADS,
        joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def qwen_image_inputs(batch: int, grid: tuple[int, int], masked: bool = False, references: bool = False) -> dict:
    """masked: the last row's text is shorter, as in a batch of prompts."""
    latents, shapes = draw(batch, grid[0] * grid[1], 16), [(1, *grid)]
    if references:
        latents, shapes = torch.cat([latents, draw(batch, 8, 16)], 1), [*shapes, (1, 2, 4)]
    inputs = dict(
        hidden_states=latents, encoder_hidden_states=draw(batch, TEXT, 24), timestep=torch.full((batch,), 0.5),
        img_shapes=[shapes] * batch,
    )  # fmt: skip
    if masked:
        mask = torch.ones(batch, TEXT, dtype=torch.bool)
        mask[-1, -2:] = False
        inputs["encoder_hidden_states_mask"] = mask
    return inputs


def small_z_image() -> torch.nn.Module:
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip


def z_image_inputs(batch: int, grid: tuple[int, int], texts: tuple[int, ...] = (TEXT,)) -> dict[str, Any]:
    """texts: lengths of the captions in turn."""
    latents = draw(batch, 4, 1, 2 * grid[0], 2 * grid[1])
    captions = [draw(texts[row % len(texts)], 24 + row)[:, :24] for row in range(batch)]
    return dict(x=list(latents), t=torch.full((batch,), 0.5), cap_feats=captions)


def small_hunyuan_image() -> torch.nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=WIDTH, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=24, rope_axes_dim=(8, 8),
    )  # fmt: skip


def hunyuan_image_inputs(batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT, dtype=torch.long)
    mask[-1, -2:] = 0
    return dict(
        hidden_states=draw(batch, 4, *grid), timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=draw(batch, TEXT, 24), encoder_attention_mask=mask,
    )  # fmt: skip


def small_sana() -> torch.nn.Module:
    return diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=WIDTH, num_layers=3,
        num_cross_attention_heads=HEADS, cross_attention_head_dim=WIDTH, cross_attention_dim=HEADS * WIDTH,
        caption_channels=24, sample_size=8,
    )  # fmt: skip


def sana_inputs(batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT)
    mask[-1, -2:] = 0
    return dict(
        hidden_states=draw(batch, 4, *grid), timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=draw(batch, TEXT, 24), encoder_attention_mask=mask,
    )  # fmt: skip


def small_wan(added: bool = False) -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32,
        **(dict(added_kv_proj_dim=HEADS * WIDTH, image_dim=24) if added else {}),
    )  # fmt: skip


def wan_inputs(batch: int, grid: tuple[int, ...], image: bool = False) -> dict[str, Any]:
    inputs = dict(
        hidden_states=draw(batch, 4, grid[0], 2 * grid[1], 2 * grid[2]), timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=draw(batch, 512 if image else TEXT, 24),
    )  # fmt: skip
    return inputs | (dict(encoder_hidden_states_image=draw(batch, 5, 24)) if image else {})


def small_ltx() -> torch.nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=WIDTH,
        cross_attention_dim=HEADS * WIDTH, num_layers=3, caption_channels=24,
    )  # fmt: skip


def ltx_inputs(batch: int, grid: tuple[int, ...]) -> dict[str, Any]:
    mask = torch.ones(batch, TEXT)
    mask[-1, -2:] = 0
    frames, rows, columns = grid
    return dict(
        hidden_states=draw(batch, frames * rows * columns, 8), timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=draw(batch, TEXT, 24), encoder_attention_mask=mask,
        num_frames=frames, height=rows, width=columns,
    )  # fmt: skip


CASES = {
    "sd3": Case(lambda: small_transformer(dual=()), small_inputs, text=15),
    "flux": Case(small_flux, flux_inputs, image=TEXT),
    "kontext": Case(small_flux, kontext_inputs, image=TEXT),
    "flux2": Case(small_flux2, flux2_inputs, image=TEXT),
    "flux2_edit": Case(small_flux2, lambda *size: flux2_inputs(*size, references=True), image=TEXT),
    "qwen_image": Case(small_qwen_image, qwen_image_inputs, image=TEXT),
    "qwen_image_masked": Case(small_qwen_image, lambda *size: qwen_image_inputs(*size, masked=True), image=TEXT),
    "qwen_image_edit": Case(small_qwen_image, lambda *size: qwen_image_inputs(*size, references=True), image=TEXT),
    "z_image": Case(small_z_image, z_image_inputs, text=32, calls=(-3, None)),
    "z_image_masked": Case(
        small_z_image, lambda *size: z_image_inputs(*size, texts=(TEXT, TEXT + 33)), text=32, calls=(-3, None)
    ),
    "hunyuan_image": Case(small_hunyuan_image, hunyuan_image_inputs, text=15, calls=(-4, None)),
    "sana": Case(small_sana, sana_inputs),
    "wan": Case(small_wan, wan_inputs, calls=(1, None, 2), grid=(2, *GRID)),
    "wan_image": Case(
        lambda: small_wan(added=True), lambda *size: wan_inputs(*size, image=True), calls=(2, None, 3), grid=(2, *GRID)
    ),
    "ltx": Case(small_ltx, ltx_inputs, calls=(1, None, 2), grid=(2, *GRID)),
}
