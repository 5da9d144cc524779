"""Tiny pipelines of the classes that hosts load, with the true structure and random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def sharpened(pipeline: Any) -> Any:
    """The pipeline with sharper attention than fresh weights have, so that maps differ visibly."""
    with torch.no_grad():
        for block in pipeline.transformer.transformer_blocks:
            block.attn.norm_q.weight *= 3
    return pipeline


def word_tokenizer(texts: Sequence[str], template: str, special: Sequence[str], length: int) -> Any:
    """A token for each word and each character; special: begin (if any), end, padding and unknown token."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = sorted({word for text in texts for word in text.lower().split()})
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys([*special, *words]))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=special[-1]))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    in_template = [(token, vocabulary[token]) for token in special if token in template]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=in_template)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=length,
        eos_token=special[-3],
        pad_token=special[-2],
        unk_token=special[-1],
    )


def sd35(prompts: Sequence[str]) -> Any:
    """A StableDiffusion3Pipeline of SD3.5-medium's structure, 8 pixels a latent."""
    import builders

    # Tokenizers that are trained, as those of the tests, differ from one interpreter to the next.
    clip, t5 = ["<start>", "<end>", "<end>", "<end>"], ["</s>", "<pad>", "<unk>"]
    builders.clip_tokenizer = lambda *_, **__: word_tokenizer(prompts, "<start> $A <end>", clip, builders.CLIP_LENGTH)
    builders.t5_tokenizer = lambda *_, **__: word_tokenizer(prompts, "$A </s>", t5, 512)
    return sharpened(builders.small_sd35(prompts))


def flux(prompts: Sequence[str], kontext: bool = False) -> Any:
    """A FluxPipeline, or a FluxKontextPipeline, with the text encoders and the autoencoder of `sd35`."""
    from diffusers import FluxKontextPipeline, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel

    parts = sd35(prompts)
    clip = CLIPTextModel(parts.text_encoder.config).eval()
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=parts.text_encoder_3.config.d_model,
        pooled_projection_dim=clip.config.hidden_size,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    ).eval()
    pipeline = (FluxKontextPipeline if kontext else FluxPipeline)(
        scheduler=parts.scheduler,
        vae=parts.vae,
        text_encoder=clip,
        tokenizer=parts.tokenizer,
        text_encoder_2=parts.text_encoder_3,
        tokenizer_2=parts.tokenizer_3,
        transformer=transformer,
    )
    pipeline.set_progress_bar_config(disable=True)
    return sharpened(pipeline)


class Letters(torch.nn.Module):
    """A text encoder whose hidden states are each of its own token alone, in transformers' form."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, vocabulary: int, width: int) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(vocabulary, width)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        from transformers.modeling_outputs import BaseModelOutput

        states = self.table(input_ids)
        return BaseModelOutput(last_hidden_state=states, hidden_states=(states,))


def letter_tokenizer(texts: Sequence[str]) -> Any:
    """A token for each character: a template is then longer than the tokens of it that a pipeline drops."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted({letter for text in texts for letter in text})
    vocabulary = {token: number for number, token in enumerate(["<end>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    control = ("im_start", "im_end", "vision_start", "vision_end", "image_pad", "video_pad")
    tokenizer.add_special_tokens([f"<|{name}|>" for name in control])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, model_max_length=4096, eos_token="<end>", pad_token="<end>", unk_token="<unk>"
    )


def qwen_image(prompts: Sequence[str], edits: bool = False) -> Any:
    """A QwenImagePipeline, or a QwenImageEditPipeline, 8 pixels a latent."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPipeline,
        QwenImagePipeline,
    )
    from diffusers import QwenImageTransformer2DModel as Model

    class QwenImageTransformer2DModel(Model):
        """With an argument that diffusers has dropped since the hosts were written."""

        def forward(self, *args: Any, txt_seq_lens: Any = None, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs)

    torch.manual_seed(5)
    tokenizer = letter_tokenizer([*prompts, "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ<|_>:,.\n{}"])
    transformer = QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    ).eval()
    parts = dict(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(base_dim=8, dim_mult=[1, 1, 1, 1], num_res_blocks=1).eval(),
        text_encoder=Letters(len(tokenizer), 24),
        tokenizer=tokenizer,
        transformer=transformer,
    )
    if edits:
        from transformers import Qwen2VLImageProcessorPil

        from pipelines import VisionProcessor  # of the tests

        class Images(Qwen2VLImageProcessorPil):
            """Takes tensors in -1..1 too, which hosts hand over and this one refuses."""

            def preprocess(self, images: Any, *args: Any, **kwargs: Any) -> Any:
                images = list((images + 1) / 2) if isinstance(images, torch.Tensor) else images
                return super().preprocess(images, *args, **kwargs)

        images = Images(min_pixels=56 * 56, max_pixels=56 * 84)
        pipeline = QwenImageEditPipeline(**parts, processor=VisionProcessor(images, tokenizer))
    else:
        pipeline = QwenImagePipeline(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return sharpened(pipeline)
