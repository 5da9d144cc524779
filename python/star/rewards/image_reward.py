"""ImageReward (Xu et al. 2023): BLIP reads the prompt while looking at the image, a head says how well they go
together. Mean 0 and deviation 1 over its authors' data, about -2.3..2. The networks are transformers'."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    BlipTextConfig,
    BlipTextModel,
    BlipVisionConfig,
    BlipVisionModel,
    PreTrainedTokenizerBase,
)

from star.rewards import Metadata, Scores
from star.rewards.clip import BATCH, preprocess
from star.rewards.loading import check_weights, fill, load_head, load_state, load_tokenizer, unreadable

WEIGHTS = ("THUDM/ImageReward", "ImageReward.pt")
TOKENIZER = "bert-base-uncased"
LENGTH = 35  # tokens
MEAN, STD = 0.16717362830052426, 1.0333394966054072  # of the raw score, from ImageReward.py
HEAD_WIDTH = 64  # of an attention head, in both networks
HEAD = "mlp."  # before the names of the head's weights
UNUSED = ("blip.vision_proj.", "blip.text_proj.")  # of BLIP's contrastive training; the score does not use them

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
    """vision: image -> patches. text: prompt, attending to the patches. head: of the first token."""

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


def networks(state: Mapping[str, Tensor], path: str) -> tuple[BlipVisionModel, BlipTextModel]:
    """Both networks of a checkpoint with the original names, their sizes read off its shapes. path: for messages."""
    vision_state, text_state, others = {}, {}, []
    for name, value in state.items():
        module, _, kind = name.removeprefix("blip.visual_encoder.").rpartition(".")
        if name.startswith("blip.visual_encoder.blocks.") and module.count(".") >= 2:
            _, number, part = module.split(".", 2)
            vision_state[f"encoder.layers.{number}.{_VISION.get(part, part)}.{kind}"] = value.float()
        elif name.startswith("blip.visual_encoder."):
            vision_state[f"{_VISION.get(module, module)}.{kind}" if module else _VISION.get(kind, kind)] = value.float()
        elif name.startswith("blip.text_encoder."):
            text_state[name.removeprefix("blip.text_encoder.")] = value.float()
        elif not name.startswith(UNUSED):
            others.append(name)
    kernel = vision_state["embeddings.patch_embedding.weight"]  # (hidden, 3, patch, patch)
    patches = vision_state["embeddings.position_embedding"].shape[1] - 1
    words = text_state["embeddings.word_embeddings.weight"]  # (vocabulary, hidden)
    vision = BlipVisionModel(
        BlipVisionConfig(
            hidden_size=len(kernel),
            intermediate_size=len(vision_state["encoder.layers.0.mlp.fc1.weight"]),
            num_hidden_layers=len({name.split(".")[2] for name in vision_state if ".layers." in name}),
            num_attention_heads=len(kernel) // HEAD_WIDTH,
            patch_size=kernel.shape[-1],
            image_size=round(patches**0.5) * kernel.shape[-1],
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
    check_weights("image_reward", path, (), others)
    fill("image_reward", path, vision, vision_state)
    fill("image_reward", path, text, text_state)
    return vision.eval().requires_grad_(False), text.eval().requires_grad_(False)


def load_image_reward(path: str | None, tokenizer: str | None, device: torch.device | str) -> ImageReward:
    """path: the published ImageReward.pt. tokenizer: a folder or hub id of BERT's (uncased)."""
    state, shown = load_state("image_reward", path, WEIGHTS)
    encoders = {name: value for name, value in state.items() if not name.startswith(HEAD)}
    try:
        vision, text = networks(encoders, shown)
    except (LookupError, ValueError, ZeroDivisionError) as error:  # shapes that no such network has
        raise unreadable("image_reward", shown, error) from error
    layers = {name.removeprefix(HEAD): value for name, value in state.items() if name.startswith(HEAD)}
    head = load_head("image_reward", shown, layers, text.config.hidden_size)
    words = load_tokenizer("image_reward", "image_reward_tokenizer", tokenizer or TOKENIZER, text.config.vocab_size)
    return ImageReward(vision.to(device), text.to(device), head.to(device), words)
