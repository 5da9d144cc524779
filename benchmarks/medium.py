"""Stable Diffusion 3.5 Medium's transformer at its true width, with few blocks and random weights."""

from diffusers import SD3Transformer2DModel

HEADS, WIDTH = 24, 64  # attention heads and channels of a head


def medium_transformer(blocks: int) -> SD3Transformer2DModel:
    """The first 13 blocks with dual attention."""
    return SD3Transformer2DModel(
        sample_size=128,
        num_layers=blocks,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=4096,
        caption_projection_dim=HEADS * WIDTH,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(min(blocks, 13))),
        qk_norm="rms_norm",
    )
