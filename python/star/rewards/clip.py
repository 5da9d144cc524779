"""Rewards from CLIP: PickScore, CLIPScore and HPSv2 compare image and prompt, LAION's aesthetic predictor looks at
the image alone. The encoders are transformers', the weights come from a folder, a file or the hub."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from star.rewards import Metadata, RewardError, Scores
from star.rewards.loading import fill, load_head, load_pretrained, load_state, load_tokenizer, unreadable

OPENAI_L = "openai/clip-vit-large-patch14"
LAION_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
PICKSCORE = "yuvalkirstain/PickScore_v1"
HPS = ("xswu/HPSv2", "HPS_v2.1_compressed.pt")
AESTHETIC = ("trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth")
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BATCH = 32


def preprocess(images: Tensor, size: int) -> Tensor:
    """CLIP's: shorter side to `size` (bicubic), center crop, its mean and deviation. images: (B, 3, H, W) in 0..1."""
    images = (images.float() * 255).round().clamp(0, 255) / 255  # as the 8 bits of a file
    height, width = images.shape[-2:]
    short = min(height, width)
    shape = (int(size * height / short), int(size * width / short))
    if shape != (height, width):
        images = F.interpolate(images, shape, mode="bicubic", antialias=True, align_corners=False).clamp(0, 1)
    top, left = (round((side - size) / 2) for side in shape)
    images = images[..., top : top + size, left : left + size]
    mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (MEAN, STD))
    return (images - mean) / std


class CLIP:
    """A CLIP model with unit embeddings."""

    def __init__(self, model: CLIPModel, tokenizer: PreTrainedTokenizerBase) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer

    @torch.no_grad()
    def images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in 0..1 -> (B, D) of length 1."""
        images = preprocess(images.to(self.model.device), self.model.config.vision_config.image_size)
        parts = [self.model.vision_model(pixel_values=part).pooler_output for part in images.split(BATCH)]
        return F.normalize(self.model.visual_projection(torch.cat(parts)), dim=-1)

    @torch.no_grad()
    def texts(self, texts: Sequence[str]) -> Tensor:
        """B texts, cut at the model's length -> (B, D) of length 1."""
        length = self.model.config.text_config.max_position_embeddings
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        tokens = {name: tokens[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return F.normalize(self.model.text_projection(self.model.text_model(**tokens).pooler_output), dim=-1)


@dataclass(frozen=True)
class Similarity:
    """scale * cosine of image and prompt."""

    clip: CLIP
    scale: float

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        return Scores(self.scale * (self.clip.images(images) * self.clip.texts(prompts)).sum(-1))


@dataclass(frozen=True)
class Aesthetic:
    """A head's opinion of the image's embedding."""

    clip: CLIP
    head: nn.Module

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        return Scores(self.head(self.clip.images(images))[:, 0])


# --- loading ----------------------------------------------------------------------------------------------------------


def load_clip(name: str, key: str, path: str, device: torch.device | str, tokenizer: str | None = None) -> CLIP:
    """A CLIPModel and its tokenizer, from folders or hub ids. name: of the reward. key: of run.reward_models, which
    says where the tokenizer is. tokenizer: where it is, if not with the model."""
    model = load_pretrained(name, CLIPModel, path, device)
    return CLIP(model, clip_tokenizer(name, key, tokenizer or path, model.config))


def clip_tokenizer(name: str, key: str, path: str, config: CLIPConfig) -> PreTrainedTokenizerBase:
    """A tokenizer that ends a text with the token whose output the text network reads: without it, CLIP reads the
    output of the first token, which knows nothing of the prompt. key: of run.reward_models."""
    text = config.text_config
    tokenizer = load_tokenizer(name, key, path, text.vocab_size)
    tokens = tokenizer("a")["input_ids"]
    # CLIP's first configurations say 2 where they mean the largest number of a text.
    end = max(tokens, default=None) if text.eos_token_id == 2 else text.eos_token_id
    if end not in tokens or tokens.index(end) != len(tokens) - 1:
        raise RewardError(
            f"reward: {name!r} found a tokenizer in {path!r} that does not end a text with token {end}, which its text "
            f"network reads; set run.reward_models {key} to the tokenizer that it was trained with"
        )
    return tokenizer


def pickscore(path: str | None, tokenizer: str | None, device: torch.device | str) -> Similarity:
    """PickScore (Kirstain et al. 2023) over 26, as in Flow-GRPO's pickscore_scorer.py: about 0.7..0.95.

    path: a CLIPModel. tokenizer: where its tokenizer is, if not there.
    """
    clip = load_clip(
        "pickscore", "pickscore_tokenizer", path or PICKSCORE, device, tokenizer or (None if path else LAION_H)
    )
    return Similarity(clip, clip.model.logit_scale.exp().item() / 26)


def clipscore(path: str | None, device: torch.device | str) -> Similarity:
    """CLIP's logit over 30, as in Flow-GRPO's clip_scorer.py: about 0.5..1.1. Hessel et al. 2021: 2.5 * cosine."""
    clip = load_clip("clipscore", "clipscore", path or OPENAI_L, device)
    return Similarity(clip, clip.model.logit_scale.exp().item() / 30)


def hps(path: str | None, clip_path: str | None, device: torch.device | str) -> Similarity:
    """HPSv2.1 (Wu et al. 2023): the cosine, about 0.2..0.35.

    path: a CLIPModel's folder, or a file with open_clip's names as it is published; for such a file the shapes and the
    tokenizer come from clip_path.
    """
    if path and Path(path).is_dir():
        if clip_path:
            raise ValueError(
                "reward_models: 'hps_clip' is not used, because 'hps' is a folder with a tokenizer; leave it out"
            )
        return Similarity(load_clip("hps", "hps", path, device), 1.0)
    base = clip_path or LAION_H
    state, shown = load_state("hps", path, HPS)
    try:
        config = CLIPConfig.from_pretrained(base)
    except Exception as error:  # transformers raises many kinds
        raise unreadable("hps", base, error) from error
    model = CLIPModel(config)
    fill("hps", shown, model, from_open_clip(state))
    return Similarity(CLIP(model.to(device), clip_tokenizer("hps", "hps_clip", base, config)), 1.0)


def aesthetic(path: str | None, clip_path: str | None, device: torch.device | str) -> Aesthetic:
    """LAION's aesthetic predictor V2 on CLIP ViT-L/14: about 1..10. path: of its head, a state dict."""
    state, shown = load_state("aesthetic", path, AESTHETIC)
    clip = load_clip("aesthetic", "aesthetic_clip", clip_path or OPENAI_L, device)
    return Aesthetic(clip, load_head("aesthetic", shown, state, clip.model.config.projection_dim).to(device))


def from_open_clip(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """open_clip's names of a CLIP -> transformers'. A name that is not one of them stays as it is."""
    fixed = {
        "logit_scale": "logit_scale",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    }
    norms = {"ln_final": "text_model.final_layer_norm", "visual.ln_pre": "vision_model.pre_layrnorm",
             "visual.ln_post": "vision_model.post_layernorm"}  # fmt: skip
    layer = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj",
             "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}  # fmt: skip
    renamed = {}
    for name, value in state.items():
        name, value = name.removeprefix("module."), value.float()
        module, _, kind = name.rpartition(".")
        if name in fixed:
            renamed[fixed[name]] = value
        elif name in ("text_projection", "visual.proj"):
            # open_clip multiplies by them from the right.
            renamed[{"visual.proj": "visual_projection"}.get(name, name) + ".weight"] = value.T.contiguous()
        elif module in norms:
            renamed[f"{norms[module]}.{kind}"] = value
        elif "resblocks." in name:
            tower = "vision_model" if name.startswith("visual.") else "text_model"
            number, _, rest = name.partition("resblocks.")[2].partition(".")
            prefix = f"{tower}.encoder.layers.{number}."
            if rest.startswith("attn.in_proj_"):
                for part, piece in zip("qkv", value.chunk(3), strict=True):
                    renamed[f"{prefix}self_attn.{part}_proj.{rest.removeprefix('attn.in_proj_')}"] = piece.contiguous()
            elif rest.rpartition(".")[0] in layer:
                renamed[f"{prefix}{layer[rest.rpartition('.')[0]]}.{kind}"] = value
            else:
                renamed[name] = value
        else:
            renamed[name] = value
    return renamed
