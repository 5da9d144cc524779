"""Tiny random models of every class that maps are captured from, with inputs as their pipelines give them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

from builders import GRID, TEXT, flux_inputs, small_flux, small_inputs, small_transformer
from versions import built_or_skip

HEADS, WIDTH = 2, 16


@dataclass(frozen=True)
class Case:
    """A model and where its attention to the text is.

    inputs: of a batch and a grid. grid: (rows, columns) of the image tokens, of a video (frames, rows, columns).
    image, text: first image token among the queries and first text token among the keys, of that grid. Text tokens that
        do not follow one another: (2, T), the key of each in the two rows.
    output: first image token in a packed output.
    calls: slice of the attention calls of a pass, all of F.scaled_dot_product_attention, that read the text.
    """

    build: Callable[[], torch.nn.Module]
    inputs: Callable[[int, tuple[int, ...]], dict[str, Any]]
    image: int = 0
    text: int | Sequence[Sequence[int]] = 0
    output: int = 0
    calls: tuple[int | None, ...] = (None, None)
    grid: tuple[int, ...] = GRID


def seeded(build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    """The model with weights in which maps differ visibly."""
    torch.manual_seed(1)
    model = built_or_skip(build).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            of_norm = parameter.ndim == 1 and ("norm_q" in name or "norm_added_q" in name)
            if of_norm or name.endswith("attn2.to_q.weight"):  # where there is no norm
                parameter.mul_(3)
            elif parameter.ndim == 1 or "scale_shift_table" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def class_name(case: Case) -> str:
    """The name of its model's class, also of one that an older library lacks."""
    try:
        return type(case.build()).__name__
    except AttributeError as error:
        return str(error.name)


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
    model = diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=3, n_refiner_layers=1, n_heads=HEADS, n_kv_heads=HEADS, cap_feat_dim=24,
        axes_dims=[4, 6, 6], axes_lens=[256, 64, 64],
    )  # fmt: skip
    for token in (model.x_pad_token, model.cap_pad_token):
        torch.nn.init.zeros_(token)  # diffusers 0.38 does not set them
    return model


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


def small_wan(added: bool = False, patch_size: tuple[int, int, int] = (1, 2, 2)) -> torch.nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=3, cross_attn_norm=True, rope_max_seq_len=32, patch_size=patch_size,
        **(dict(added_kv_proj_dim=HEADS * WIDTH, image_dim=24) if added else {}),
    )  # fmt: skip


def wan_inputs(batch: int, grid: tuple[int, ...], image: bool = False) -> dict[str, Any]:
    inputs = dict(
        hidden_states=draw(batch, 4, grid[0], 2 * grid[1], 2 * grid[2]), timestep=torch.full((batch,), 500.0),
        encoder_hidden_states=draw(batch, 512 if image else TEXT, 24),
    )  # fmt: skip
    # 257 image tokens as CLIP has: diffusers 0.33 counts on them.
    return inputs | (dict(encoder_hidden_states_image=draw(batch, 257, 24)) if image else {})


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


def small_flux_like(kind: str, **options: Any) -> torch.nn.Module:
    """A model with FLUX's arguments."""
    common = dict(num_layers=2, num_single_layers=2, attention_head_dim=WIDTH, num_attention_heads=HEADS)
    return getattr(diffusers, kind)(
        in_channels=8, joint_attention_dim=24, axes_dims_rope=(4, 6, 6), **common | options
    )  # fmt: skip


def small_chroma() -> torch.nn.Module:
    return small_flux_like("ChromaTransformer2DModel", approximator_hidden_dim=32, approximator_layers=1)


def flux_like_inputs(batch: int, grid: tuple[int, int], masked: bool = False, **others: Any) -> dict[str, Any]:
    """masked: the last row's text is shorter, and the mask is of queries and keys, all of them or the images'."""
    inputs = flux_inputs(batch, grid)
    del inputs["pooled_projections"]
    if masked:
        inputs["attention_mask"] = torch.ones(batch, TEXT + grid[0] * grid[1])
        inputs["attention_mask"][-1, TEXT - 2 : TEXT] = 0
    return inputs | others


def bria_fibo_inputs(batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    """With a layer of the text encoder for each block, and a mask of keys alone."""
    mask = flux_like_inputs(batch, grid, masked=True)["attention_mask"].bool()[:, None, None]
    return flux_like_inputs(
        batch, grid, pooled_projections=None, text_encoder_layers=[draw(batch, TEXT, 12)] * 4, guidance=None,
        joint_attention_kwargs=dict(attention_mask=mask),
    )  # fmt: skip


def small_ernie() -> torch.nn.Module:
    model = diffusers.ErnieImageTransformer2DModel(
        hidden_size=HEADS * WIDTH, num_attention_heads=HEADS, num_layers=2, ffn_hidden_size=32, in_channels=4,
        out_channels=4, patch_size=2, text_in_dim=24, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    torch.nn.init.normal_(model.final_linear.weight)  # fresh ones are 0
    return model


def ernie_inputs(batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    inputs = latents_inputs(batch, grid, 2, text_lens=shorter(batch).sum(1).long())
    return inputs | dict(text_bth=inputs.pop("encoder_hidden_states"))


def small_prx() -> torch.nn.Module:
    return diffusers.PRXTransformer2DModel(
        in_channels=4, patch_size=2, context_in_dim=24, hidden_size=HEADS * WIDTH, num_heads=HEADS, depth=2,
        axes_dim=[8, 8],
    )  # fmt: skip


def small_qwen_image_21() -> torch.nn.Module:
    return diffusers.QwenImage21Transformer2DModel(
        in_channels=8, out_channels=8, num_layers=2, attention_head_dim=WIDTH, num_attention_heads=HEADS,
        context_in_dim=24, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def qwen_image_21_inputs(batch: int, grid: tuple[int, int], references: bool = False, cached: bool = False) -> dict:
    """The last row's text is shorter. references: two image slots, for 8 tokens, stand before the third text token."""
    tokens = grid[0] * grid[1]
    text = TEXT + (2 if references else 0)
    image_mask = torch.zeros(batch, text + tokens // 4, dtype=torch.bool)
    image_mask[:, text:] = True
    mask = torch.ones(batch, text, dtype=torch.bool)
    mask[-1, -2:] = False
    latents, shapes = draw(batch, tokens, 8), [(1, *grid)]
    if references:
        image_mask[:, 2:4] = True
        latents, shapes = torch.cat([draw(batch, 8, 8), latents], 1), [(1, 2, 4), (1, *grid)]
    return dict(
        hidden_states=latents, encoder_hidden_states=draw(batch, text, 24), timestep=torch.full((batch,), 0.5),
        img_shapes=[shapes] * batch, img_mask=image_mask, encoder_hidden_states_mask=mask,
    )  # fmt: skip


def small_aura_flow() -> torch.nn.Module:
    return diffusers.AuraFlowTransformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, num_mmdit_layers=2, num_single_dit_layers=2,
        attention_head_dim=WIDTH, num_attention_heads=HEADS, joint_attention_dim=24, out_channels=4,
        caption_projection_dim=HEADS * WIDTH, pos_embed_max_size=64,
    )  # fmt: skip


def latents_inputs(batch: int, grid: tuple[int, ...], patch: int, time: float = 500.0, **others: Any) -> dict[str, Any]:
    """Latents (B, 4, [frames,] rows, columns) in square patches, and a text."""
    *frames, rows, columns = grid
    return dict(
        hidden_states=draw(batch, 4, *frames, patch * rows, patch * columns),
        encoder_hidden_states=draw(batch, TEXT, 24),
        timestep=torch.full((batch,), time),
        **others,
    )


def shorter(batch: int, text: int = TEXT) -> Tensor:
    """A mask (batch, text) that ends before the last two tokens in the last row."""
    mask = torch.ones(batch, text)
    mask[-1, -2:] = 0
    return mask


def small_cog_view() -> torch.nn.Module:
    return diffusers.CogView4Transformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=WIDTH, num_attention_heads=HEADS, out_channels=4,
        text_embed_dim=24, time_embed_dim=8, condition_dim=4, pos_embed_max_size=64, sample_size=16,
        rope_axes_dim=(8, 8),
    )  # fmt: skip


def cog_view_inputs(batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    size = torch.tensor([[16.0, 16.0]]).repeat(batch, 1)
    return latents_inputs(
        batch, grid, 2, original_size=size, target_size=size, crop_coords=0 * size, attention_mask=shorter(batch)
    )


def small_cog_view_3() -> torch.nn.Module:
    return diffusers.CogView3PlusTransformer2DModel(
        patch_size=2, in_channels=4, num_layers=2, attention_head_dim=WIDTH, num_attention_heads=HEADS, out_channels=4,
        text_embed_dim=24, time_embed_dim=8, condition_dim=4, pos_embed_max_size=64, sample_size=16,
    )  # fmt: skip


def cog_view_3_inputs(batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    inputs = cog_view_inputs(batch, grid)
    del inputs["attention_mask"]
    return inputs


def small_hunyuan_image_2() -> torch.nn.Module:
    return diffusers.HunyuanImageTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=WIDTH, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, text_embed_dim=24, text_embed_2_dim=12, rope_axes_dim=(8, 8),
    )  # fmt: skip


def glyphs(batch: int) -> dict[str, Any]:
    """Of a second encoder: three tokens in the last row, two in the others; masked ones may come first."""
    mask = torch.tensor([0, 1, 1, 0]).repeat(batch, 1)
    mask[-1] = torch.tensor([1, 1, 1, 0])
    return dict(encoder_hidden_states_2=draw(batch, 4, 12), encoder_attention_mask_2=mask)


def hunyuan_image_2_inputs(batch: int, grid: tuple[int, int]) -> dict[str, Any]:
    return hunyuan_image_inputs(batch, grid) | glyphs(batch)


def small_hunyuan_video() -> torch.nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=WIDTH, num_layers=2,
        num_single_layers=2, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=24,
        pooled_projection_dim=8, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def hunyuan_video_inputs(batch: int, grid: tuple[int, ...]) -> dict[str, Any]:
    others = dict(encoder_attention_mask=shorter(batch).long(), pooled_projections=draw(batch, 8))
    return latents_inputs(batch, grid, 2, **others, guidance=torch.full((batch,), 6000.0))


def small_hunyuan_video_15() -> torch.nn.Module:
    return diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=WIDTH, num_layers=2,
        num_refiner_layers=1, text_embed_dim=24, text_embed_2_dim=12, image_embed_dim=12, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip


def hunyuan_video_15_inputs(batch: int, grid: tuple[int, ...], image: bool = False) -> dict[str, Any]:
    embeds = draw(batch, 3, 12) if image else torch.zeros(batch, 3, 12)
    mask = shorter(batch).long()
    return latents_inputs(batch, grid, 1, encoder_attention_mask=mask, image_embeds=embeds, **glyphs(batch))


def small_pixart() -> torch.nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, out_channels=8, num_layers=2,
        cross_attention_dim=HEADS * WIDTH, sample_size=8, patch_size=2, caption_channels=24,
        use_additional_conditions=False,
    )  # fmt: skip


def masked_inputs(batch: int, grid: tuple[int, ...], patch: int = 2) -> dict[str, Any]:
    return latents_inputs(batch, grid, patch, encoder_attention_mask=shorter(batch))


def small_sana_video() -> torch.nn.Module:
    return diffusers.SanaVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=WIDTH, num_layers=2,
        num_cross_attention_heads=HEADS, cross_attention_head_dim=WIDTH, cross_attention_dim=HEADS * WIDTH,
        caption_channels=24, sample_size=8, qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip


def small_cosmos() -> torch.nn.Module:
    return diffusers.CosmosTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=HEADS, attention_head_dim=WIDTH, num_layers=2,
        text_embed_dim=24, adaln_lora_dim=4, max_size=(4, 16, 16), patch_size=(1, 2, 2), concat_padding_mask=False,
        extra_pos_embed_type=None,
    )  # fmt: skip


def small_allegro() -> torch.nn.Module:
    return diffusers.AllegroTransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=24, in_channels=4, out_channels=4, num_layers=2,
        cross_attention_dim=HEADS * 24, sample_width=10, sample_height=6, sample_frames=2, patch_size=2, patch_size_t=1,
        caption_channels=24,
    )  # fmt: skip


def small_vace() -> torch.nn.Module:
    return diffusers.WanVACETransformer3DModel(
        num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32, vace_layers=[0], vace_in_channels=6,
    )  # fmt: skip


def vace_inputs(batch: int, grid: tuple[int, ...]) -> dict[str, Any]:
    control = draw(batch, 6, grid[0], 2 * grid[1], 2 * grid[2])
    return wan_inputs(batch, grid) | dict(control_hidden_states=control)


def small_wan_like(kind: str) -> torch.nn.Module:
    return getattr(diffusers, kind)(
        num_attention_heads=HEADS, attention_head_dim=WIDTH, in_channels=4, out_channels=4, text_dim=24, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
    )  # fmt: skip


def small_ltx2() -> torch.nn.Module:
    return diffusers.LTX2VideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=HEADS, attention_head_dim=WIDTH,
        cross_attention_dim=HEADS * WIDTH, audio_in_channels=4, audio_out_channels=4, audio_num_attention_heads=HEADS,
        audio_attention_head_dim=8, audio_cross_attention_dim=HEADS * 8, num_layers=2, caption_channels=24,
    )  # fmt: skip


def ltx2_inputs(batch: int, grid: tuple[int, ...]) -> dict[str, Any]:
    """With a sound of four tokens, fewer than the text has."""
    inputs = ltx_inputs(batch, grid) | dict(timestep=torch.full((batch, 1), 500.0))
    return inputs | dict(
        audio_hidden_states=draw(batch, 4, 4), audio_encoder_hidden_states=draw(batch, TEXT, 24), audio_num_frames=4,
        audio_encoder_attention_mask=shorter(batch), fps=24.0,
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
    "chroma": Case(small_chroma, flux_like_inputs, image=TEXT),
    "chroma_masked": Case(small_chroma, lambda *size: flux_like_inputs(*size, masked=True), image=TEXT),
    "bria": Case(
        lambda: small_flux_like("BriaTransformer2DModel", pooled_projection_dim=None, guidance_embeds=False),
        lambda *size: flux_like_inputs(*size, pooled_projections=None),
        image=TEXT,
    ),
    "bria_fibo": Case(
        lambda: small_flux_like("BriaFiboTransformer2DModel", guidance_embeds=False, text_encoder_dim=12),
        bria_fibo_inputs,
        image=TEXT,
    ),
    "ernie": Case(small_ernie, ernie_inputs, text=15),
    "prx": Case(small_prx, lambda *size: latents_inputs(*size, 2, 0.5, attention_mask=shorter(size[0]))),
    "longcat_image": Case(
        lambda: small_flux_like("LongCatImageTransformer2DModel"),
        lambda *size: flux_like_inputs(*size, img_ids=flux_inputs(*size)["img_ids"] + torch.tensor([1, 100, 100])),
        image=TEXT,
    ),
    "ovis_image": Case(lambda: small_flux_like("OvisImageTransformer2DModel"), flux_like_inputs, image=TEXT),
    "qwen_image_21": Case(small_qwen_image_21, qwen_image_21_inputs, calls=(1, None, 2), grid=(4, 6), output=TEXT),
    "qwen_image_21_edit": Case(
        small_qwen_image_21,
        lambda *size: qwen_image_21_inputs(*size, references=True),
        text=[[0, 1, 2, 6, 10, 11, 12, 13]] * 2,
        calls=(3, None, 4),
        grid=(4, 6),
        output=TEXT + 8,
    ),
    "aura_flow": Case(small_aura_flow, lambda *size: latents_inputs(*size, 2, 0.5), image=8 + TEXT, text=8),
    "cog_view_3": Case(small_cog_view_3, cog_view_3_inputs, image=TEXT),
    "cog_view": Case(small_cog_view, cog_view_inputs, image=TEXT),
    "hunyuan_image_2": Case(
        small_hunyuan_image_2,
        hunyuan_image_2_inputs,
        text=[[17, 18, 19, 20, 21, 22], [18, 19, 20, 21, 23, 24]],
        calls=(-4, None),
    ),
    "hunyuan_video": Case(small_hunyuan_video, hunyuan_video_inputs, text=30, calls=(-4, None), grid=(2, *GRID)),
    "hunyuan_video_15": Case(
        small_hunyuan_video_15,
        hunyuan_video_15_inputs,
        text=[[32, 33, 34, 35, 36, 37], [33, 34, 35, 36, 41, 42]],
        calls=(-2, None),
        grid=(2, *GRID),
    ),
    "hunyuan_video_15_image": Case(
        small_hunyuan_video_15,
        lambda *size: hunyuan_video_15_inputs(*size, image=True),
        text=[[35, 36, 37, 38, 39, 40], [36, 37, 38, 39, 41, 42]],
        calls=(-2, None),
        grid=(2, *GRID),
    ),
    "pixart": Case(small_pixart, masked_inputs, calls=(1, None, 2)),
    "sana_video": Case(small_sana_video, lambda *size: masked_inputs(*size, 2), grid=(2, *GRID)),
    "cosmos": Case(small_cosmos, lambda *size: latents_inputs(*size, 2), calls=(1, None, 2), grid=(2, *GRID)),
    "allegro": Case(small_allegro, masked_inputs, calls=(1, None, 2), grid=(2, *GRID)),
    "wan_vace": Case(small_vace, vace_inputs, calls=(3, None, 2), grid=(2, *GRID)),
    "chrono_edit": Case(
        lambda: small_wan_like("ChronoEditTransformer3DModel"), wan_inputs, calls=(1, None, 2), grid=(2, *GRID)
    ),
    "sky_reels": Case(
        lambda: small_wan_like("SkyReelsV2Transformer3DModel"), wan_inputs, calls=(1, None, 2), grid=(2, *GRID)
    ),
    "ltx2": Case(small_ltx2, ltx2_inputs, calls=(2, None, 6), grid=(2, *GRID)),
}
