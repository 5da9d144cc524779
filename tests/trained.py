"""Tiny random pipelines of the kinds that `star train` knows beside SD3, with encoders and autoencoders of the true
classes, which can be saved and loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import torch
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)

from builders import clip_tokenizer, small_sd35, small_vae, t5_tokenizer
from pipelines import chat_tokenizer

DIM = 24
# Sigmas that follow the number of image tokens, as FLUX.1's and Qwen-Image's do.
SHIFTED = dict(use_dynamic_shifting=True, base_image_seq_len=4, max_image_seq_len=64)


def small_flux_pipeline(corpus: Sequence[str], guidance: bool = True) -> Any:
    """FLUX.1 dev's structure; without guidance schnell's."""
    torch.manual_seed(3)
    tokenizer, tokenizer_2 = clip_tokenizer(corpus, vocabulary=120), t5_tokenizer(corpus, vocabulary=100)
    clip = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        projection_dim=16, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    t5 = T5Config(vocab_size=len(tokenizer_2), d_model=DIM, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                  feed_forward_proj="gated-gelu")  # fmt: skip
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=DIM, pooled_projection_dim=16, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    pipeline = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, **SHIFTED),
        vae=small_vae(channels=4, scaling=0.3611, shift=0.1159),
        text_encoder=CLIPTextModel(clip).eval(),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5).eval(),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def small_qwen_image_pipeline(corpus: Sequence[str]) -> Any:
    torch.manual_seed(3)
    tokenizer = chat_tokenizer()
    size = dict(num_hidden_layers=1, hidden_size=DIM, intermediate_size=32, num_attention_heads=2)
    rope = {"mrope_section": [2, 2, 2], "rope_type": "default", "type": "default"}
    encoder = Qwen2_5_VLConfig(
        text_config=dict(**size, num_key_value_heads=1, vocab_size=len(tokenizer), rope_scaling=rope),
        vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=DIM),
    )
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=DIM, axes_dims_rope=(4, 6, 6),
    ).eval()  # fmt: skip
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[-0.7, 0.1, 0.2, 0.3], latents_std=[2.8, 1.4, 2.3, 0.9],
    ).eval()  # fmt: skip
    pipeline = diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift_terminal=0.02, **SHIFTED),
        vae=vae,
        text_encoder=Qwen2_5_VLForConditionalGeneration(encoder).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


BUILD = {"sd3": small_sd35, "flux": small_flux_pipeline, "qwen_image": small_qwen_image_pipeline}
