"""Small models with the true structure, built from config; nothing is downloaded."""

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

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


CLIP_LENGTH = 77


def clip_tokenizer(corpus, length=CLIP_LENGTH, vocabulary=60) -> PreTrainedTokenizerFast:
    """Byte-pair encoding with end-of-word marks and lower-casing, begin and end tokens, like CLIP's."""
    tokenizer = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<|startoftext|>", "<|endoftext|>"]
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=vocabulary, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A <|endoftext|>", special_tokens=[(s, tokenizer.token_to_id(s)) for s in special]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=length, pad_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def t5_tokenizer(corpus, vocabulary=50) -> PreTrainedTokenizerFast:
    """Unigram with a mark for spaces and an end token, like T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=vocabulary, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def small_sd35(corpus) -> StableDiffusion3Pipeline:
    """SD3.5-medium's structure: two CLIP encoders of different widths and T5, dual attention in the first blocks, an
    autoencoder with 16 channels that is 8 times smaller; 77 CLIP tokens."""
    torch.manual_seed(3)
    tokenizer = clip_tokenizer(corpus, vocabulary=120)

    def clip(width):
        return CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=3,
                num_attention_heads=2,
                projection_dim=width,
                eos_token_id=tokenizer.eos_token_id,
            )
        ).eval()

    tokenizer_3 = t5_tokenizer(corpus, vocabulary=100)
    t5 = T5Config(vocab_size=len(tokenizer_3), d_model=48, d_kv=8, d_ff=64, num_layers=2, num_heads=2,
                  feed_forward_proj="gated-gelu")  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=16,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    ).eval()
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=36,
        pos_embed_max_size=16,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    ).eval()
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        text_encoder=clip(16),
        tokenizer=tokenizer,
        text_encoder_2=clip(20),
        tokenizer_2=tokenizer,
        text_encoder_3=T5EncoderModel(t5).eval(),
        tokenizer_3=tokenizer_3,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
