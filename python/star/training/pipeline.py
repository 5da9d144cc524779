"""The pipeline that is trained: loading and checking it, and which of its weights are trained."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from diffusers.training_utils import cast_training_params
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from peft import LoraConfig
from safetensors import SafetensorError, safe_open

from star import files
from star.config import Config, ConfigError
from star.messages import WHOLE, one_line
from star.training.families import family_of, named_family
from star.training.families.family import Family, ModelShape
from star.training.families.family import check_size as check_unit

TRAINED = "default"  # the trained adapter's name, PEFT's own


def load_pipeline(path: str, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline that can be trained, in evaluation mode, from a folder or hub id. The autoencoder stays in float32
    whatever the dtype: its last layers overflow in float16."""
    path = folder_or_hub_id(path, "model.path")
    try:
        if Path(path).is_dir():
            check_files(Path(path))
        index = DiffusionPipeline.load_config(path)
        family = named_family([index["_class_name"]], f"model.path: {path!r}")
        # A pipeline that was saved without a part is loaded only if told so.
        absent = [name for name in family.optional if index.get(name, [None])[0] is None]
        encoders = {
            name: load_encoder(path, name, kind[1], dtype)
            for name, kind in index.items()
            if name.startswith("text_encoder") and name not in absent
        }
        pipeline = getattr(diffusers, family.pipeline).from_pretrained(
            path, dtype={"default": dtype, "vae": torch.float32}, **dict.fromkeys(absent), **encoders
        )
    except ConfigError:
        raise
    except Exception as error:  # of a damaged file the libraries raise many kinds
        raise ConfigError(f"model.path: {path!r} cannot be loaded ({reason(error)})") from error
    check_tokenizers(pipeline, path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def load_any(path: str, device: torch.device | str, dtype: torch.dtype) -> Any:
    """Any pipeline of diffusers from a folder or hub id, in evaluation mode."""
    path = folder_or_hub_id(path, "model")
    try:
        index = DiffusionPipeline.load_config(path)
        # Parts that a pipeline was saved without are left out only if told so.
        absent = [name for name, kind in index.items() if isinstance(kind, list) and kind[:1] == [None]]
        pipeline = DiffusionPipeline.from_pretrained(path, torch_dtype=dtype, **dict.fromkeys(absent))
    except Exception as error:  # of a damaged file the libraries raise many kinds
        raise ConfigError(f"model: {path!r} cannot be loaded ({reason(error)})") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def folder_or_hub_id(path: str, setting: str) -> str:
    """A pipeline's path without a ~. Raises ConfigError for what is written as a folder and is none: an id of the hub
    has two parts."""
    path = str(Path(path).expanduser()) if path.startswith("~") else path
    if (path.startswith(("/", ".")) or path.count("/") > 1) and not Path(path).is_dir():
        raise ConfigError(f"{setting}: {path!r} is no pipeline (there is no such folder)")
    return path


def check_files(folder: Path, weights: bool = True) -> None:
    """Raise ConfigError for a file of a pipeline's folder that is missing or damaged, by its name: the libraries make
    up what a configuration lacks, and name no file. weights: look at those too."""
    try:
        index = files.parse_object(files.read_text(folder / "model_index.json"), folder / "model_index.json")
        for name, kind in index.items():
            if isinstance(kind, list) and kind[:1] not in ([None], []):
                parts = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
                path = folder / name / parts.get(name.partition("_")[0], "config.json")
                if not files.parse_object(files.read_text(path), path):
                    raise files.Unreadable(f"{path} is empty")
        for path in folder.glob("*/*.json"):
            if not files.parse_object(files.read_text(path), path) and path.name == "tokenizer.json":
                raise files.Unreadable(f"{path} is empty")
    except files.Unreadable as error:
        raise ConfigError(f"model.path: {error}; download it again") from error
    for path in folder.glob("*/*.safetensors") if weights else ():
        try:
            with safe_open(path, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"model.path: {path} is damaged ({one_line(error)}); download it again") from error


def check_tokenizers(pipeline: Any, path: str) -> None:
    """Raise ConfigError for a tokenizer that does not fit its text encoder: where its files are missing, transformers
    makes one without words."""
    for name, tokenizer in pipeline.components.items():
        encoder = getattr(pipeline, name.replace("tokenizer", "text_encoder"))
        if not name.startswith("tokenizer") or tokenizer is None or encoder is None:
            continue
        words, rows = len(tokenizer), encoder.get_input_embeddings().num_embeddings
        named = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
        if tokenizer.pad_token is None or words > rows or not named:
            raise ConfigError(
                f"model.path: the {name} of {path!r} has {words} words and the padding {tokenizer.pad_token!r}, its "
                f"encoder {rows} words; files of it are missing, download it again"
            )


def load_encoder(path: str, name: str, kind: str, dtype: torch.dtype) -> torch.nn.Module:
    """A text encoder of a pipeline. Raises ConfigError if weights are missing, which would else be drawn at random."""
    encoder, report = getattr(transformers, kind).from_pretrained(
        path, subfolder=name, dtype=dtype, output_loading_info=True
    )
    missing = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if missing:
        raise ConfigError(
            f"model.path: {path!r} lacks {len(missing)} weights of its {name} ({missing[0]}, ...); download it again"
        )
    return encoder.eval()


def reason(error: BaseException) -> str:
    """A library's message on one line, and what to do about the failures that users of gated models meet first."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None:
        causes.append(cause)
    # diffusers says of a model that the hub refuses that there is none; the hub's own words are behind that.
    refusal = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), error)
    text = one_line(refusal, WHOLE)
    if isinstance(refusal, LookupError | TypeError | AttributeError):  # their message alone is a name
        text = f"{type(refusal).__name__}: {text}; a file of it is damaged or of something else"
    everything = " ".join(f"{type(cause).__name__} {cause}".lower() for cause in causes)
    if "gated" in everything or "401" in everything or "403" in everything:
        return f"{text}; the model is gated: ask for access on its page, then log in with `hf auth login`"
    # The libraries' advice on being offline is also in what they say when the hub does not answer.
    if constants.HF_HUB_OFFLINE and ("offline" in everything or "local_files_only" in everything):
        return f"{text}; the hub is not asked while HF_HUB_OFFLINE is set: unset it, or name a folder"
    if "no space left" in everything:
        return f"{text}; the disk is full"
    if "connect" in everything or "resolve" in everything or "timed out" in everything:
        return f"{text}; the hub cannot be reached: try again, or name a folder"
    return text


def model_shape(pipeline: Any) -> ModelShape:
    """Channels and patch size of a pipeline's latents."""
    return family_of(pipeline).shape(pipeline.transformer)


def check_size(pipeline: Any, height: int, width: int, section: str = "") -> None:
    """Raise ConfigError for images, of so many pixels, that the model cannot draw. section: of the two settings."""
    check_unit(family_of(pipeline), pipeline.transformer, pipeline.vae_scale_factor, (height, width), section)


def check_model(family: Family, transformer: torch.nn.Module, config: Config) -> None:
    """Raise ConfigError for settings that only some kinds of models have."""
    scale, length = config.sampling.guidance_scale, config.model.max_sequence_length
    family.check_guidance(transformer, scale)
    if config.loss.is_forward_process and family.is_guided(scale):
        raise ConfigError(
            f"sampling.guidance_scale: got {scale:g}, expected 1: loss.objective {config.loss.objective} trains "
            "without classifier-free guidance"
        )
    if length not in family.text_lengths:
        lengths = f"{family.text_lengths[0]}..{family.text_lengths[-1]}"
        raise ConfigError(f"model.max_sequence_length: got {length}, expected {lengths} of a {family.pipeline}")


def text_encoders(pipeline: Any) -> list[torch.nn.Module]:
    """The text encoders that a pipeline has."""
    parts = pipeline.components.items()
    return [part for name, part in parts if name.startswith("text_encoder") and part is not None]


def latent_size(pipeline: Any, height: int, width: int) -> tuple[int, int]:
    """(h, w) of the latents of an image of `height` and `width` pixels."""
    return height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor


def adapter_names(transformer: torch.nn.Module) -> Iterable[str]:
    """The names of a transformer's adapters, empty without any."""
    return getattr(transformer, "peft_config", {})


def is_target(layer: str, targets: Iterable[str]) -> bool:
    """Whether a layer's name ends with one of model.lora_targets, as PEFT matches them."""
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def check_targets(transformer: torch.nn.Module, targets: Sequence[str]) -> None:
    """Raise ConfigError for a name in model.lora_targets that ends no linear layer's name."""
    names = [name for name, module in transformer.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in targets:
        if not any(is_target(name, [target]) for name in names):
            raise ConfigError(f"model.lora_targets: {target!r} matches no linear layer of the transformer")


def make_trainable(pipeline: Any, config: Config) -> list[torch.nn.Parameter]:
    """Freeze everything, then add an adapter (or, with rank 0, free the transformer). Returns what is trained."""
    for module in pipeline.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False)
    transformer, model = pipeline.transformer, config.model
    transformer.requires_grad_(model.lora_rank == 0)
    # What is trained is float32 even where the frozen weights are not: an update is smaller than half precision sees.
    if not model.lora_rank:
        if transformer.dtype != torch.float32:
            transformer.float()
    elif adapter_names(transformer):  # it begins with an adapter from a file, whose copy stays frozen
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(f".{TRAINED}." in name)
        cast_training_params(transformer, torch.float32)
    else:
        check_targets(transformer, model.lora_targets)
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
        for blocks in transformer.children():
            for block in blocks if isinstance(blocks, torch.nn.ModuleList) else ():
                block.compile(backend=model.compile)
    return [parameter for parameter in transformer.parameters() if parameter.requires_grad]
