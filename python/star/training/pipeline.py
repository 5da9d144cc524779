"""The pipeline that is trained, and which of its weights."""

from __future__ import annotations

import torch
from diffusers import StableDiffusion3Pipeline
from diffusers.training_utils import cast_training_params
from peft import LoraConfig

from star.config import Config, ConfigError


def load_pipeline(
    path: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> StableDiffusion3Pipeline:
    """A pipeline in evaluation mode from a folder or hub id. The autoencoder stays in float32 whatever the dtype: its
    last layers overflow in float16."""
    try:
        index = StableDiffusion3Pipeline.load_config(path)
        # A pipeline that was saved without T5 is loaded only if told so.
        absent = [name for name in ("text_encoder_3", "tokenizer_3") if index.get(name, [None])[0] is None]
        pipeline = StableDiffusion3Pipeline.from_pretrained(
            path, dtype={"default": dtype, "vae": torch.float32}, **dict.fromkeys(absent)
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"model.path: {path!r} is no pipeline ({str(error).splitlines()[0]})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def make_trainable(pipeline: StableDiffusion3Pipeline, config: Config) -> list[torch.nn.Parameter]:
    """Freeze everything, then add an adapter (or, with rank 0, free the transformer). Returns what is trained."""
    for module in (pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3):
        if module is not None:
            module.requires_grad_(False)
    transformer, model = pipeline.transformer, config.model
    transformer.requires_grad_(model.lora_rank == 0)
    # What is trained is float32 even where the frozen weights are not: an update is smaller than half precision sees.
    if not model.lora_rank:
        if transformer.dtype != torch.float32:
            transformer.float()
    else:
        adapter = LoraConfig(
            r=model.lora_rank,
            lora_alpha=model.lora_alpha,
            init_lora_weights="gaussian",
            target_modules=list(model.lora_targets),
        )
        transformer.add_adapter(adapter)
        cast_training_params(transformer, torch.float32)
    if model.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    if model.compile != "no":
        for block in transformer.transformer_blocks:
            block.compile(backend=model.compile)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
