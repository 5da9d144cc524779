"""Small models with the true structure, built from config; nothing is downloaded."""

import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel

HEADS, TEXT, GRID = 2, 6, (3, 5)  # a grid that is not square shows rows and columns that are mixed up


def small_transformer(layers=3, dual=(0,), qk_norm="rms_norm", head_dim=16) -> SD3Transformer2DModel:
    """SD3.5-like: dual attention in the first block, the last block without text output."""
    torch.manual_seed(1)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=layers,
        attention_head_dim=head_dim,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        caption_projection_dim=HEADS * head_dim,
        pooled_projection_dim=20,
        pos_embed_max_size=8,
        dual_attention_layers=dual,
        qk_norm=qk_norm,
    )
    with torch.no_grad():  # sharper attention than fresh weights have, so that maps differ visibly
        for block in model.transformer_blocks:
            block.attn.to_q.weight *= 3
            block.attn.add_k_proj.weight *= 3
    return model.eval()


def small_inputs(batch=2, grid=GRID) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return dict(
        hidden_states=torch.randn(batch, 4, 2 * grid[0], 2 * grid[1], generator=generator),
        encoder_hidden_states=torch.randn(batch, TEXT, 24, generator=generator),
        pooled_projections=torch.randn(batch, 20, generator=generator),
        timestep=torch.full((batch,), 500.0),
    )


def small_flux() -> FluxTransformer2DModel:
    """Two double-stream blocks and two single-stream blocks."""
    torch.manual_seed(1)
    model = FluxTransformer2DModel(
        in_channels=8,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=HEADS,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        for block in (*model.transformer_blocks, *model.single_transformer_blocks):
            block.attn.norm_q.weight *= 3
    return model.eval()


def flux_inputs(batch=2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows, columns = torch.meshgrid(torch.arange(GRID[0]), torch.arange(GRID[1]), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    return dict(
        hidden_states=torch.randn(batch, GRID[0] * GRID[1], 8, generator=generator),
        encoder_hidden_states=torch.randn(batch, TEXT, 24, generator=generator),
        pooled_projections=torch.randn(batch, 20, generator=generator),
        timestep=torch.full((batch,), 0.5),
        img_ids=places.float(),
        txt_ids=torch.zeros(TEXT, 3),
    )
