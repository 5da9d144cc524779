"""Tiny pipelines of diffusers for every text encoder, around tokenizers that are trained here and encoders whose row of
a token depends on that token alone, so that a changed word shows in its own rows of the embeddings."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput

import versions
from builders import clip_tokenizer
from models import (
    HEADS,
    WIDTH,
    small_flux,
    small_flux2,
    small_hunyuan_image,
    small_ltx,
    small_qwen_image,
    small_sana,
    small_wan,
    small_z_image,
)

SYSTEM_MESSAGE = versions.module_or_skip("diffusers.pipelines.flux2.system_messages").SYSTEM_MESSAGE
CORPUS = [
    "a photo of a red bench left of two green cats on the grass of a park, in soft morning light",
    'a sign that says "OPEN" on a blue door, a red bench, one that says "SHUT"',
    "a tan park and an old sign on a bear",
]
# With their words a template has about as many tokens as in the true vocabularies.
TEMPLATES = [
    SYSTEM_MESSAGE,
    *(
        inspect.getsource(pipeline.__init__)
        for pipeline in (diffusers.QwenImageEditPipeline, diffusers.HunyuanVideo15Pipeline)
    ),
    str(DEFAULT_PROMPT_TEMPLATE),
    str(inspect.signature(diffusers.SanaPipeline.__call__).parameters["complex_human_instruction"].default),
]
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}{% else %}"
    "{{ m.content[0].text | trim }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
PAD, END = "<|endoftext|>", "<|im_end|>"
QWEN_TOKENS = [PAD, "<|im_start|>", END, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


class WordWise(torch.nn.Module):
    """A text encoder: (B, T, width) hidden states, each of its own token alone."""

    def __init__(self, width: int = 24, projects: bool = False, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(width)
        self.table = torch.nn.Embedding(2000, width, dtype=dtype)
        self.projects = projects
        self.config = SimpleNamespace(d_model=width, hidden_size=width)
        self.model = torch.nn.Module()
        self.model.norm = torch.nn.Identity()

    @property
    def dtype(self) -> torch.dtype:
        return self.table.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.table.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> Any:
        states = self.table(input_ids)
        layers = (states,) * 40
        if self.projects:
            return CLIPTextModelOutput(text_embeds=states[:, 0], last_hidden_state=states, hidden_states=layers)
        return BaseModelOutputWithPooling(last_hidden_state=states, pooler_output=states[:, 0], hidden_states=layers)


class CLIPTextModelWithProjection(WordWise):
    """By the name of the class that pipelines annotate."""

    def __init__(self, width: int) -> None:
        super().__init__(width, projects=True)


def chat_tokenizer(side: str = "right", template: str = CHAT, length: int = 4096) -> PreTrainedTokenizerFast:
    """Byte-level BPE with control tokens and a chat template, as Qwen's and Mistral's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=alphabet, special_tokens=QWEN_TOKENS, show_progress=False
    )
    tokenizer.train_from_iterator([*CORPUS * 200, *TEMPLATES], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, padding_side=side, chat_template=template,
        model_max_length=length,
    )  # fmt: skip


def unigram(begin: bool = False, side: str = "right", words: Sequence[str] = CORPUS) -> PreTrainedTokenizerFast:
    """Unigram with a mark for spaces: every word of the corpus is a token, others are spelled. It has an end token, as
    T5's and UMT5's, or a begin token, as Gemma's."""
    whole = sorted({f"▁{word}" for text in words for word in text.replace(",", " ,").split()})
    letters = sorted({"▁", *"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,:;'\"!?-0123456789()[]\n"})
    pieces = (
        [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)] + [(p, -1.0) for p in whole] + [(p, -9.0) for p in letters]
    )
    tokenizer = Tokenizer(models.Unigram(pieces, 2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A" if begin else "$A </s>", special_tokens=[("</s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", padding_side=side
    )


def gemma_tokenizer() -> PreTrainedTokenizerFast:
    return unigram(begin=True, side="left")


class NoVideos:
    merge_size = 2


class VisionProcessor(transformers.Qwen2_5_VLProcessor):
    """Qwen's, which puts the tokens of its images into a text; without its videos, which need torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, **_: Any) -> None:
        images = image_processor or transformers.Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 84)
        super().__init__(images, tokenizer or chat_tokenizer(), NoVideos(), chat_template=CHAT)

    def check_argument_for_proper_class(self, name: str, value: Any) -> type:
        return type(value)


class Vae(torch.nn.Module):
    """What pipelines ask of an autoencoder before they use it."""

    config = SimpleNamespace(
        latent_channels=4, temporal_compression_ratio=4, spatial_compression_ratio=8, scaling_factor=1.0
    )
    temporal_compression_ratio, spatial_compression_ratio = 4, 8
    dtype, device = torch.float32, torch.device("cpu")


class Transformer(torch.nn.Module):
    """What pipelines ask of a transformer before they encode prompts."""

    config = SimpleNamespace(in_channels=4, target_size=640, image_embed_dim=8, use_meanflow=False)
    dtype, device = torch.bfloat16, torch.device("cpu")


def picture(size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new("RGB", size, (200, 30, 30))


def scheduler(**options: Any) -> diffusers.FlowMatchEulerDiscreteScheduler:
    return diffusers.FlowMatchEulerDiscreteScheduler(**options)


def sd3() -> Any:
    from builders import small_sd35

    pipeline = small_sd35(CORPUS * 200)
    width = pipeline.text_encoder.config.hidden_size
    pipeline.text_encoder, pipeline.text_encoder_2 = (
        CLIPTextModelWithProjection(width),
        CLIPTextModelWithProjection(pipeline.text_encoder_2.config.hidden_size),
    )
    pipeline.tokenizer_3 = unigram()
    pipeline.text_encoder_3 = WordWise(pipeline.transformer.config.joint_attention_dim)
    return pipeline


def flux(kind: type = diffusers.FluxPipeline) -> Any:
    return kind(
        scheduler=scheduler(), vae=None, transformer=small_flux(), text_encoder=WordWise(20),
        tokenizer=clip_tokenizer(CORPUS * 200, vocabulary=400), text_encoder_2=WordWise(24), tokenizer_2=unigram(),
    )  # fmt: skip


def flux2(side: str = "right") -> Any:
    return diffusers.Flux2Pipeline(
        scheduler=scheduler(), vae=None, text_encoder=WordWise(8), tokenizer=chat_tokenizer(side),
        transformer=small_flux2(),
    )  # fmt: skip


def flux2_klein() -> Any:
    return diffusers.Flux2KleinPipeline(
        scheduler=scheduler(), vae=None, text_encoder=WordWise(8), tokenizer=chat_tokenizer(), transformer=small_flux2()
    )


def qwen_image() -> Any:
    return diffusers.QwenImagePipeline(
        scheduler=scheduler(), vae=None, text_encoder=WordWise(), tokenizer=chat_tokenizer(),
        transformer=small_qwen_image(),
    )  # fmt: skip


def qwen_image_edit(kind: type = diffusers.QwenImageEditPipeline) -> Any:
    tokenizer = chat_tokenizer()
    return kind(
        scheduler=scheduler(), vae=None, text_encoder=WordWise(), tokenizer=tokenizer,
        processor=VisionProcessor(tokenizer=tokenizer), transformer=small_qwen_image(),
    )  # fmt: skip


def qwen_image21() -> Any:
    return diffusers.QwenImage21Pipeline(
        scheduler=scheduler(), vae=None, text_encoder=WordWise(), processor=VisionProcessor(), transformer=None
    )


def z_image() -> Any:
    return diffusers.ZImagePipeline(
        scheduler=scheduler(), vae=None, text_encoder=WordWise(), tokenizer=chat_tokenizer(),
        transformer=small_z_image(),
    )  # fmt: skip


def hunyuan_image() -> Any:
    return diffusers.HunyuanImagePipeline(
        scheduler=scheduler(), vae=None, text_encoder=WordWise(), tokenizer=chat_tokenizer(),
        text_encoder_2=WordWise(8), tokenizer_2=transformers.ByT5Tokenizer(), transformer=small_hunyuan_image(),
    )  # fmt: skip


def hunyuan_video15() -> Any:
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=WordWise(), tokenizer=chat_tokenizer(), transformer=Transformer(), vae=Vae(),
        scheduler=scheduler(), text_encoder_2=WordWise(8), tokenizer_2=transformers.ByT5Tokenizer(),
        guider=diffusers.guiders.ClassifierFreeGuidance(),
    )  # fmt: skip


def hunyuan_video() -> Any:
    return diffusers.HunyuanVideoPipeline(
        text_encoder=WordWise(), tokenizer=chat_tokenizer(), transformer=Transformer(), vae=None, scheduler=scheduler(),
        text_encoder_2=WordWise(8), tokenizer_2=clip_tokenizer(CORPUS * 200, vocabulary=400),
    )  # fmt: skip


def sana() -> Any:
    transformer = small_sana()
    transformer.register_to_config(sample_size=32)
    return diffusers.SanaPipeline(
        tokenizer=gemma_tokenizer(), text_encoder=WordWise(), vae=None, transformer=transformer, scheduler=scheduler()
    )


def wan() -> Any:
    return diffusers.WanPipeline(
        tokenizer=unigram(), text_encoder=WordWise(), transformer=small_wan(), vae=None,
        scheduler=scheduler(),
    )  # fmt: skip


def ltx() -> Any:
    return diffusers.LTXPipeline(
        scheduler=scheduler(), vae=None, text_encoder=WordWise(), tokenizer=unigram(),
        transformer=small_ltx(),
    )  # fmt: skip


def ltx2_connectors(**changes: Any) -> Any:
    """LTX-2.3's without blocks, which mix tokens: with them a word changes every row."""
    from diffusers.pipelines.ltx2 import LTX2TextConnectors

    torch.manual_seed(0)
    options: dict[str, Any] = dict(
        caption_channels=4, text_proj_in_factor=40, per_modality_projections=True, video_hidden_dim=HEADS * WIDTH,
        audio_hidden_dim=HEADS * WIDTH,
    )  # fmt: skip
    for name in ("video", "audio"):
        options |= {f"{name}_connector_num_attention_heads": HEADS, f"{name}_connector_attention_head_dim": WIDTH}
        options[f"{name}_connector_num_layers"] = 0
    return LTX2TextConnectors(**options | changes)


def ltx2() -> Any:
    return diffusers.LTX2Pipeline(
        scheduler=scheduler(), vae=None, audio_vae=None, text_encoder=WordWise(4), tokenizer=gemma_tokenizer(),
        connectors=ltx2_connectors(), transformer=None, vocoder=None,
    )  # fmt: skip


@dataclass(frozen=True)
class Encoding:
    """A pipeline and what its call is given besides prompts.

    rows: of what encode_prompt returns, the embeddings as the transformer gets them. alone: it takes one prompt.
    """

    build: Callable[[], Any]
    call: dict[str, Any] = field(default_factory=dict)
    rows: Callable[[Any, Any], Sequence[Tensor]] = lambda pipeline, result: result[0]
    alone: bool = False


def connected(pipeline: Any, result: Any) -> Tensor:
    return pipeline.connectors(result[0], result[1], padding_side=pipeline.tokenizer.padding_side)[0]


ENCODINGS = {
    "sd3": Encoding(sd3),
    "flux": Encoding(flux),
    "kontext": Encoding(lambda: flux(diffusers.FluxKontextPipeline)),
    "flux2": Encoding(flux2),
    "flux2_left": Encoding(lambda: flux2("left")),
    "flux2_klein": Encoding(flux2_klein),
    "qwen_image": Encoding(qwen_image),
    "qwen_image_edit": Encoding(qwen_image_edit, dict(image=picture()), alone=True),
    "qwen_image_edit_plus": Encoding(
        lambda: qwen_image_edit(diffusers.QwenImageEditPlusPipeline),
        dict(image=[picture(), picture()]),
        alone=True,
    ),
    "qwen_image21": Encoding(qwen_image21),
    "qwen_image21_edit": Encoding(qwen_image21, dict(image=[picture()], output_resolution=64)),
    "z_image": Encoding(z_image),
    "hunyuan_image": Encoding(hunyuan_image),
    "hunyuan_video15": Encoding(hunyuan_video15),
    "hunyuan_video": Encoding(hunyuan_video),
    "sana": Encoding(sana),
    "sana_plain": Encoding(sana, dict(complex_human_instruction=None)),
    "wan": Encoding(wan),
    "ltx": Encoding(ltx),
    "ltx2": Encoding(ltx2, rows=connected),
}
