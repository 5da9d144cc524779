"""ImageReward (Xu et al. 2023): BLIP reads the prompt while looking at the picture, a head says how well they go
together. Mean 0 and deviation 1 over its authors' data, about -2.3..2. The networks are transformers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)

from star.rewards import Metadata, Scores
from star.rewards.clip import BATCH, load_head, load_state, preprocess, unreadable

WEIGHTS = ("THUDM/ImageReward", "ImageReward.pt")
TOKENIZER = "bert-base-uncased"
LENGTH = 35  # tokens
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score, from ImageReward.py
HEAD_WIDTH = 64  # of an attention head, in both networks

_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj": "embeddings.patch_embedding",
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "norm": "post_layernorm",
    "attn.qkv": "self_attn.qkv",
    "attn.proj": "self_attn.projection",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


@dataclass(frozen=True)
class ImageReward:
    """vision: picture -> patches. text: prompt, attending to the patches. head: of the first token."""

    vision: BlipVisionModel
    text: BlipTextModel
    head: nn.Module
    tokenizer: PreTrainedTokenizerBase

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        images = preprocess(images.to(self.vision.device), self.vision.config.image_size)
        tokens = self.tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        ).to(images.device)
        raw = []
        for rows in torch.arange(len(images)).split(BATCH):
            patches = self.vision(pixel_values=images[rows]).last_hidden_state
            output = self.text(
                input_ids=tokens.input_ids[rows],
                attention_mask=tokens.attention_mask[rows],
                encoder_hidden_states=patches,
                encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.int64, device=images.device),
            )
            raw.append(self.head(output.last_hidden_state[:, 0])[:, 0])
        return Scores((torch.cat(raw) - MEAN) / STD)


def networks(state: Mapping[str, Tensor]) -> tuple[BlipVisionModel, BlipTextModel]:
    """Both networks of a checkpoint with the original names, their sizes read off its shapes."""
    vision_state, text_state = {}, {}
    for name, value in state.items():
        module, _, kind = name.removeprefix("blip.visual_encoder.").rpartition(".")
        if name.startswith("blip.visual_encoder.blocks."):
            _, number, part = module.split(".", 2)
            vision_state[f"encoder.layers.{number}.{_VISION[part]}.{kind}"] = value.float()
        elif name.startswith("blip.visual_encoder."):
            vision_state[f"{_VISION[module]}.{kind}" if module else _VISION[kind]] = value.float()
        elif name.startswith("blip.text_encoder.") and not name.endswith("position_ids"):
            text_state[name.removeprefix("blip.text_encoder.")] = value.float()
    kernel = vision_state["embeddings.patch_embedding.weight"]  # (hidden, 3, patch, patch)
    places = vision_state["embeddings.position_embedding"].shape[1] - 1
    words = text_state["embeddings.word_embeddings.weight"]  # (vocabulary, hidden)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=len(kernel),
            intermediate_size=len(vision_state["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=len({name.split(".")[2] for name in vision_state if ".layers." in name}),
            num_attention_heads=len(kernel) // HEAD_WIDTH,
            patch_size=kernel.shape[-1],
            image_size=round(places**0.5) * kernel.shape[-1],
            layer_norm_eps=1e-6,
        )
    )
    text = BlipTextModel(
        BlipTextConfig(
            vocab_size=len(words),
            hidden_size=words.shape[1],
            encoder_hidden_size=len(kernel),
            intermediate_size=len(text_state["encoder.layer.0.intermediate.dense.weight"]),
            num_hidden_layers=len({name.split(".")[2] for name in text_state if ".layer." in name}),
            num_attention_heads=words.shape[1] // HEAD_WIDTH,
            max_position_embeddings=len(text_state["embeddings.position_embeddings.weight"]),
        ),
        add_pooling_layer=False,
    )
    vision.load_state_dict(vision_state)
    text.load_state_dict(text_state)
    return vision.eval().requires_grad_(False), text.eval().requires_grad_(False)


def load_image_reward(path: str | None, tokenizer: str | None, device: torch.device | str) -> ImageReward:
    """path: the published ImageReward.pt. tokenizer: a folder or hub id of BERT's (uncased)."""
    state = load_state("image_reward", path, WEIGHTS)
    try:
        vision, text = networks(state)
    except (KeyError, RuntimeError) as error:
        raise unreadable("image_reward", path or WEIGHTS[1], error) from error
    head = load_head("image_reward", {k.removeprefix("mlp."): v for k, v in state.items() if k.startswith("mlp.")})
    try:
        words = AutoTokenizer.from_pretrained(tokenizer or TOKENIZER)
    except (OSError, ValueError) as error:
        raise unreadable("image_reward", tokenizer or TOKENIZER, error) from error
    return ImageReward(vision.to(device), text.to(device), head.to(device), words)
