"""What tests are built from: small models with the true structure, small runs, formulas written a second time. Nothing
is downloaded."""

import dataclasses
import math

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
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Mask2FormerConfig,
    Mask2FormerForUniversalSegmentation,
    PreTrainedTokenizerFast,
    SwinConfig,
    T5Config,
    T5EncoderModel,
)

from star import config as configuration
from star.presets import preset
from star.rewards import image_reward
from star.rewards.geneval import Detector
from star.shapes.task import TASK
from star.training.prompts import Prompt
from star.training.scoring import sample_images

EPS = torch.finfo(torch.float32).eps
LENGTH, SIZE, PATCH, WIDTH, DIM = 12, 32, 8, 64, 16  # of a small CLIP: tokens, pixels, channels, embedding
HEADS, TEXT, GRID = 2, 6, (3, 5)  # a grid that is not square shows rows and columns that are mixed up

# Arguments of a `star train` that takes seconds.
TINY_RUN = [
    *("--preset", "shapes", "--sampling.prompts-per-iteration", "2", "--sampling.images-per-prompt", "2"),
    *("--sampling.steps", "4", "--optimization.iterations", "1", "--scoring.count", "0", "--run.no-figures"),
]


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


def flux_inputs(batch=2, grid=GRID) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    rows, columns = torch.meshgrid(torch.arange(grid[0]), torch.arange(grid[1]), indexing="ij")
    ids = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1)
    return dict(
        hidden_states=torch.randn(batch, grid[0] * grid[1], 8, generator=generator),
        encoder_hidden_states=torch.randn(batch, TEXT, 24, generator=generator),
        pooled_projections=torch.randn(batch, 20, generator=generator),
        timestep=torch.full((batch,), 0.5),
        img_ids=ids.float(),
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


def small_vae(channels, scaling, shift) -> AutoencoderKL:
    """An autoencoder that is 8 times smaller. scaling, shift: of its latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=channels,
        layers_per_block=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=scaling,
        shift_factor=shift,
    ).eval()


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
    vae = small_vae(channels=16, scaling=1.5305, shift=0.0609)
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


def small_run(out, **changes):
    """The shapes preset with the fewest images; changes as in YAML."""
    config = preset("shapes")
    base = {
        "model": {"lora_rank": 16, "lora_alpha": 32},
        "sampling": {
            **{"prompts_per_iteration": 3, "images_per_prompt": 2},
            **{"steps": 4, "trained_steps": [1, 2], "noise_level": 0.7},
        },
        "optimization": {"iterations": 2, "learning_rate": 1e-2, "ema_decay": 0.0},
        "scoring": {"count": 0},
        "run": {"out": str(out), "figures": False, "save_every": 1},
    }
    for section, values in changes.items():
        base.setdefault(section, {}).update(values)
    return configuration.update(config, base)


WORDS = "a red blue circle square and ring".split()


def plain_images(pipeline, texts, seed):
    """(B, 3, H, W): what the plain pipeline draws for prompts of the embedded world."""
    options = dataclasses.replace(TASK.images, seed=seed)
    return torch.cat([images for _, images in sample_images(pipeline, [Prompt(t) for t in texts], options)])


def word_tokenizer(folder, start, end, pad):
    """One token a word; between `start` and `end` as CLIP's and BERT's have them."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([pad, "[UNK]", *WORDS, start, end]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = [(token, vocabulary[token]) for token in (start, end)]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{start} $A {end}", special_tokens=special)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad, eos_token=end, unk_token="[UNK]")
    fast.save_pretrained(folder)
    return fast


def scheduler(steps=10, shift=3.0):
    result = FlowMatchEulerDiscreteScheduler(shift=shift)
    result.set_timesteps(steps)
    return result


def random_weights(shape, dtype=torch.float32):
    """Not negative, mean 1 over each sample."""
    w = torch.rand(shape, dtype=dtype) + 0.05
    return w / w.flatten(1).mean(1).view(-1, *(1,) * (w.ndim - 1))


def step_by_formula(sigma, sigma_next, sigma_max, v, x, noise_level, sde_type, prev_sample):
    """Flow-GRPO's step from its paper's formulas, in the type of v. sigma, sigma_next: (B,)."""
    sigma, sigma_next = (s.to(v.dtype).view(-1, *(1,) * (v.ndim - 1)) for s in (sigma, sigma_next))
    dt = sigma_next - sigma
    if sde_type == "cps":
        std = sigma_next * math.sin(noise_level * math.pi / 2)
        x0, x1 = x - sigma * v, x + (1 - sigma) * v
        mean = (1 - sigma_next) * x0 + (sigma_next**2 - std**2).sqrt() * x1
        return -(prev_sample - mean).square().flatten(1).mean(1), mean, std
    std = noise_level * (sigma / (1 - torch.where(sigma == 1, sigma_max, sigma))).sqrt()
    mean = x + (v + std**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
    spread = std * (-dt).sqrt()
    log_density = torch.distributions.Normal(mean, spread.expand_as(mean)).log_prob(prev_sample)
    return log_density.flatten(1).mean(1), mean, std


def clipped(log_prob, old_log_prob, advantages, clip, adv_clip=5.0):
    """The clipped surrogate that Flow-GRPO, DanceGRPO, MixGRPO, DDPO write for one ratio per sample."""
    r, a = (log_prob - old_log_prob).exp(), advantages.clamp(-adv_clip, adv_clip)
    return torch.stack([-a * r, -a * r.clamp(1 - clip, 1 + clip)]).amax(0).mean()


def save_small_clip(path):
    """A small CLIP in transformers' format."""
    end = word_tokenizer(path, "<s>", "<e>", "!").convert_tokens_to_ids("<e>")
    tower = {"hidden_size": WIDTH, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
             "hidden_act": "gelu"}  # fmt: skip
    tokens = {"eos_token_id": end, "bos_token_id": end - 1, "pad_token_id": 0}
    model = CLIPModel(
        CLIPConfig(
            text_config={**tower, **tokens, "vocab_size": end + 1, "max_position_embeddings": LENGTH},
            vision_config={**tower, "image_size": SIZE, "patch_size": PATCH},
            projection_dim=DIM,
        )
    )
    for parameter in model.parameters():  # the initial values are so small that everything looks alike
        torch.nn.init.normal_(parameter, std=0.2)
    model.logit_scale.data.fill_(math.log(90.0))
    model.save_pretrained(path)


def open_clip_state(layers=2, vocabulary=11):
    """A random CLIP with open_clip's names."""
    state = {
        "logit_scale": torch.tensor(4.0),
        "token_embedding.weight": torch.randn(vocabulary, WIDTH),
        "positional_embedding": torch.randn(LENGTH, WIDTH) * 0.3,
        "text_projection": torch.randn(WIDTH, DIM) / 8,
        "visual.class_embedding": torch.randn(WIDTH),
        "visual.positional_embedding": torch.randn((SIZE // PATCH) ** 2 + 1, WIDTH) * 0.3,
        "visual.conv1.weight": torch.randn(WIDTH, 3, PATCH, PATCH) / 14,
        "visual.proj": torch.randn(WIDTH, DIM) / 8,
    }
    for name in ("ln_final", "visual.ln_pre", "visual.ln_post"):
        state |= {f"{name}.weight": 1 + 0.1 * torch.randn(WIDTH), f"{name}.bias": 0.1 * torch.randn(WIDTH)}
    for tower in ("transformer", "visual.transformer"):
        for i in range(layers):
            prefix = f"{tower}.resblocks.{i}."
            for name, rows, columns in (
                ("attn.in_proj_", 3 * WIDTH, WIDTH), ("attn.out_proj.", WIDTH, WIDTH),
                ("mlp.c_fc.", 96, WIDTH), ("mlp.c_proj.", WIDTH, 96),
            ):  # fmt: skip
                state |= {
                    f"{prefix}{name}weight": torch.randn(rows, columns) / 8,
                    f"{prefix}{name}bias": torch.randn(rows) / 8,
                }
            for name in ("ln_1", "ln_2"):
                state |= {
                    f"{prefix}{name}.weight": 1 + 0.1 * torch.randn(WIDTH),
                    f"{prefix}{name}.bias": torch.zeros(WIDTH),
                }
    return state


def head_state(width):
    sizes = [(8, width), (6, 8), (1, 6)]
    return {
        key: value
        for number, (rows, columns) in zip((0, 2, 4), sizes, strict=True)
        for key, value in {
            f"layers.{number}.weight": torch.randn(rows, columns),
            f"layers.{number}.bias": torch.randn(rows),
        }.items()
    }


def image_reward_state(width=128, text=64, vocabulary=11, layers=2):
    """A random ImageReward with the original names: vision `width`, BERT `text` wide."""
    state = {}

    def linear(name, rows, columns):
        state.update(
            {f"{name}.weight": torch.randn(rows, columns) / columns**0.5, f"{name}.bias": 0.1 * torch.randn(rows)}
        )

    def norm(name, size):
        state.update({f"{name}.weight": 1 + 0.1 * torch.randn(size), f"{name}.bias": 0.1 * torch.randn(size)})

    vision, bert = "blip.visual_encoder", "blip.text_encoder"
    state[f"{vision}.cls_token"] = torch.randn(1, 1, width)
    state[f"{vision}.pos_embed"] = torch.randn(1, (SIZE // PATCH) ** 2 + 1, width)
    state[f"{vision}.patch_embed.proj.weight"] = torch.randn(width, 3, PATCH, PATCH) / 14
    state[f"{vision}.patch_embed.proj.bias"] = torch.randn(width)
    norm(f"{vision}.norm", width)
    for i in range(layers):
        prefix = f"{vision}.blocks.{i}"
        for name in ("norm1", "norm2"):
            norm(f"{prefix}.{name}", width)
        linear(f"{prefix}.attn.qkv", 3 * width, width)
        linear(f"{prefix}.attn.proj", width, width)
        linear(f"{prefix}.mlp.fc1", 80, width)
        linear(f"{prefix}.mlp.fc2", width, 80)
    state[f"{bert}.embeddings.position_ids"] = torch.arange(image_reward.LENGTH)[None]
    state[f"{bert}.embeddings.word_embeddings.weight"] = torch.randn(vocabulary, text)
    state[f"{bert}.embeddings.position_embeddings.weight"] = torch.randn(image_reward.LENGTH, text)
    norm(f"{bert}.embeddings.LayerNorm", text)
    for i in range(layers):
        prefix = f"{bert}.encoder.layer.{i}"
        for attention, source in (("attention", text), ("crossattention", width)):
            linear(f"{prefix}.{attention}.self.query", text, text)
            linear(f"{prefix}.{attention}.self.key", text, source)
            linear(f"{prefix}.{attention}.self.value", text, source)
            linear(f"{prefix}.{attention}.output.dense", text, text)
            norm(f"{prefix}.{attention}.output.LayerNorm", text)
        linear(f"{prefix}.intermediate.dense", 72, text)
        linear(f"{prefix}.output.dense", text, 72)
        norm(f"{prefix}.output.LayerNorm", text)
    return state | {f"mlp.{key}": value for key, value in head_state(text).items()}


def small_detector():
    config = Mask2FormerConfig(
        backbone_config=SwinConfig(
            image_size=64, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=4,
            out_features=["stage1", "stage2", "stage3", "stage4"],
        ),
        hidden_dim=32, mask_feature_size=32, feature_size=32, encoder_layers=1, decoder_layers=2, num_queries=6,
        num_attention_heads=2, dim_feedforward=16, encoder_feedforward_dim=16,
        id2label={0: "dog", 1: "cat", 2: "cup"}, label2id={"dog": 0, "cat": 1, "cup": 2},
    )  # fmt: skip
    model = Mask2FormerForUniversalSegmentation(config)
    for parameter in model.class_predictor.parameters():
        torch.nn.init.normal_(parameter)
    return Detector(model, short=48, long=80)
