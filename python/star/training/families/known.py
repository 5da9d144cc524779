"""Public models by their hub ids, built without weights: `star plan` asks no network, and some need an account."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
)


class Parts(NamedTuple):
    transformer: Any
    vae: Any
    text_encoders: tuple[nn.Module, ...]


def _clip(kind: Any, width: int, layers: int) -> nn.Module:
    return kind(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=width,
        )
    )


def _t5() -> nn.Module:
    return T5EncoderModel(
        T5Config(
            d_model=4096,
            d_kv=64,
            d_ff=10240,
            num_layers=24,
            num_heads=64,
            vocab_size=32128,
            feed_forward_proj="gated-gelu",
        )
    )


def _vae() -> nn.Module:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(128, 256, 512, 512),
        layers_per_block=2,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,  # of no matter to what it takes, but a number
    )


def _sd35(**sizes: Any) -> Parts:
    transformer = SD3Transformer2DModel(
        sample_size=128,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        attention_head_dim=64,
        joint_attention_dim=4096,
        pooled_projection_dim=2048,
        qk_norm="rms_norm",
        **sizes,
    )
    clip = (_clip(CLIPTextModelWithProjection, 768, 12), _clip(CLIPTextModelWithProjection, 1280, 32))
    return Parts(transformer, _vae(), (*clip, _t5()))


def _medium() -> Parts:
    return _sd35(
        num_layers=24,
        num_attention_heads=24,
        caption_projection_dim=1536,
        pos_embed_max_size=384,
        dual_attention_layers=tuple(range(13)),
    )


def _large() -> Parts:
    return _sd35(num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192)


def _flux(guidance: bool) -> Parts:
    """diffusers' default sizes are FLUX.1's."""
    transformer = FluxTransformer2DModel(guidance_embeds=guidance)
    return Parts(transformer, _vae(), (_clip(CLIPTextModel, 768, 12), _t5()))


def _qwen_image() -> Parts:
    """diffusers' default sizes are Qwen-Image's; its text encoder is Qwen2.5-VL-7B."""
    words = dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
    )
    images = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=3584)
    encoder = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=words, vision_config=images))
    return Parts(QwenImageTransformer2DModel(), AutoencoderKLQwenImage(), (encoder,))


KNOWN: dict[str, tuple[str, Callable[[], Parts]]] = {
    "stabilityai/stable-diffusion-3.5-medium": ("StableDiffusion3Pipeline", _medium),
    "stabilityai/stable-diffusion-3.5-large": ("StableDiffusion3Pipeline", _large),
    "black-forest-labs/FLUX.1-dev": ("FluxPipeline", lambda: _flux(guidance=True)),
    "black-forest-labs/FLUX.1-schnell": ("FluxPipeline", lambda: _flux(guidance=False)),
    "Qwen/Qwen-Image": ("QwenImagePipeline", _qwen_image),
}
"""By hub id: diffusers' class of the pipeline, and what builds its parts on the default device."""
