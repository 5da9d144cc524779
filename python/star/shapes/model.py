"""The embedded text-to-image model: a StableDiffusion3Pipeline in miniature, made of diffusers' own classes.

Structure of SD3.5-medium: joint attention with rms-normed queries and keys, dual attention in the first blocks,
two CLIP text encoders whose features are concatenated. Left out: T5 (call the pipeline with max_sequence_length=0).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from star.shapes.scenes import SIZE, WORDS

WEIGHTS = Path(__file__).parent / "weights"
TEXT_LENGTH = 12  # tokens: begin, at most eight words, end, padding
LATENT_CHANNELS = 4
VAE_FACTOR = 2
LATENT_SIZE = SIZE // VAE_FACTOR
PATCH = 2
GRID = (LATENT_SIZE // PATCH, LATENT_SIZE // PATCH)  # image tokens, rows and columns
HEADS, HEAD_DIM, LAYERS = 4, 32, 4
TEXT_WIDTH = 64  # of each encoder


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer over the words of the scenes, with CLIP's begin and end tokens."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<s>", "</s>", "<unk>", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", vocabulary["<s>"]), ("</s>", vocabulary["</s>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        model_max_length=TEXT_LENGTH,
    )


def make_text_encoder() -> CLIPTextModelWithProjection:
    tokenizer = make_tokenizer()
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.0,
        shift_factor=0.0,
    )


def make_transformer() -> SD3Transformer2DModel:
    """The denoiser with adaLN-zero initialization (Peebles & Xie 2023), which diffusers leaves to its caller."""
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=HEADS * HEAD_DIM,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=GRID[0],
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    modulations = [m.linear for block in transformer.transformer_blocks for m in (block.norm1, block.norm1_context)]
    for linear in (*modulations, transformer.norm_out.linear, transformer.proj_out):
        torch.nn.init.zeros_(linear.weight)
        torch.nn.init.zeros_(linear.bias)
    return transformer


def make_pipeline() -> StableDiffusion3Pipeline:
    """The whole pipeline with untrained weights; seed torch before for reproducible ones."""
    return StableDiffusion3Pipeline(
        transformer=make_transformer(),
        # Without a terminal the last step would begin at sigma 0.001 and change nothing.
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0, shift_terminal=0.2),
        vae=make_vae(),
        text_encoder=make_text_encoder(),
        tokenizer=make_tokenizer(),
        text_encoder_2=make_text_encoder(),
        tokenizer_2=make_tokenizer(),
        text_encoder_3=None,
        tokenizer_3=None,
    )


def load_pipeline(path: str | Path = WEIGHTS, dtype: torch.dtype = torch.float32) -> StableDiffusion3Pipeline:
    """The pretrained pipeline that ships with the package (or one saved elsewhere), in evaluation mode."""
    if not (Path(path) / "model_index.json").is_file():
        raise FileNotFoundError(f"path: {path} holds no pipeline (no model_index.json)")
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        path, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    pipeline.set_progress_bar_config(disable=True)
    # The argument that loads a type has another name in every library's version.
    cast((pipeline.text_encoder, pipeline.text_encoder_2, pipeline.transformer, pipeline.vae), dtype)
    return pipeline


def cast(parts: Iterable[Any], dtype: torch.dtype) -> None:
    """Give models a type; those that have it are left alone, about which diffusers would warn."""
    for part in parts:
        if part.dtype != dtype:
            part.to(dtype)
