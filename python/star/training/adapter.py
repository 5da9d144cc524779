"""Adapters from files: in diffusers' format, as `star train` exports them, or in PEFT's own, as other trainers do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file

from star.config import ConfigError, Model
from star.training.pipeline import TRAINED, adapter_names, is_target, reason

REFERENCE = "reference"  # the name of the copy that stays what it is


def load_adapter(pipeline: Any, path: str, name: str = TRAINED) -> None:
    """Add an adapter to a pipeline under a name, and check that every weight of the file is used.

    path: a folder or hub id in diffusers' format (pytorch_lora_weights.safetensors) or in PEFT's (adapter_config.json,
    adapter_model.safetensors).

    Raises:
        ConfigError: there is none, or it does not fit the transformer.
    """
    transformer = pipeline.transformer
    try:
        folder = _local_folder(path)
        if (folder / "adapter_config.json").is_file():
            state = {
                key.removeprefix("base_model.model."): value
                for key, value in load_file(folder / "adapter_model.safetensors").items()
            }
            transformer.add_adapter(LoraConfig.from_pretrained(folder), adapter_name=name)
            set_peft_model_state_dict(transformer, state, adapter_name=name)
            given = set(state)
        else:
            # Without it a damaged file is followed by the search for a pickle.
            options = {"use_safetensors": True} if any(folder.glob("*.safetensors")) else {}
            keys = type(pipeline).lora_state_dict(str(folder), **options)
            given = {key.removeprefix("transformer.") for key in keys if key.startswith("transformer.")}
            pipeline.load_lora_weights(str(folder), adapter_name=name, **options)
    except ConfigError:
        raise
    except Exception as error:  # of a damaged file the libraries raise many kinds
        raise ConfigError(f"adapter: {path!r} cannot be loaded ({reason(error)})") from error
    used = (
        set(get_peft_model_state_dict(transformer, adapter_name=name)) if name in adapter_names(transformer) else set()
    )
    for words, left in (("is not in the model", given - used), ("is missing in the file", used - given)):
        if left:
            raise ConfigError(f"adapter: {path!r} does not fit the transformer: {_some(left)} {words}")
    if not given:
        raise ConfigError(f"adapter: {path!r} has no weights of a transformer")


def _local_folder(path: str) -> Path:
    """The folder of an adapter; a hub id is fetched, or found where it was fetched before."""
    folder = Path(path).expanduser()
    if folder.exists():
        return folder
    if path.startswith(("/", ".", "~")):
        raise ConfigError(f"adapter: {path!r} is no adapter (there is no such folder)")
    # Whole models, which a slip may name, have their weights in folders of their own.
    return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.bin"], ignore_patterns="*/*"))


def start_from(pipeline: Any, model: Model) -> None:
    """Begin with `model.adapter`: one copy to train, and one that stays what it is, for the KL term.

    Raises:
        ConfigError: the adapter is not of the rank, the scale or the layers that the configuration says.
    """
    if model.adapter is None:
        raise ConfigError("model.adapter: not set")
    load_adapter(pipeline, model.adapter, TRAINED)
    load_adapter(pipeline, model.adapter, REFERENCE)
    pipeline.transformer.set_adapter(TRAINED)
    config = pipeline.transformer.peft_config[TRAINED]
    for name, expected in (("lora_rank", config.r), ("lora_alpha", config.lora_alpha)):
        if getattr(model, name) != expected:
            raise ConfigError(f"model.{name}: got {getattr(model, name)}, {model.adapter} has {expected}; use that")
    layers = {key.rpartition(".lora_")[0] for key in get_peft_model_state_dict(pipeline.transformer)}
    for layer in layers:
        if not is_target(layer, model.lora_targets):
            raise ConfigError(f"model.lora_targets: {model.adapter} has {layer}, which no target matches; add it")


def has_reference(transformer: torch.nn.Module) -> bool:
    """Whether the run began with an adapter, with which the KL term then compares."""
    return REFERENCE in adapter_names(transformer)


def _some(names: set[str]) -> str:
    first, more = min(names), len(names) - 1
    return f"{first} and {more} more" if more else first
