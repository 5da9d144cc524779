"""What a training run is made of: dataclasses with a preset for each, YAML in and out."""

from __future__ import annotations

import dataclasses
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from star import files
from star.objective import Allocation


class ConfigError(ValueError):
    """A configuration that cannot be run; its message is one line for the user."""


@dataclass
class Model:
    """What is trained."""

    path: str = "shapes"
    """A StableDiffusion3Pipeline: a folder or hub id; "shapes" is the embedded model."""
    max_sequence_length: int = 128
    """Tokens of the T5 part; 0 for a pipeline without T5."""
    height: int = 512
    width: int = 512
    lora_rank: int = 32
    """Rank of the adapters; 0 trains all weights of the transformer."""
    lora_alpha: int = 64
    lora_targets: tuple[str, ...] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    gradient_checkpointing: bool = False
    compile: Literal["no", "inductor", "aot_eager"] = "no"
    """Backend of torch.compile for the transformer's blocks. With inductor the on-policy ratio may not be exactly 1."""
    frozen_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the text encoders and of what adapters leave frozen; trained weights and the autoencoder stay in float32."""
    offload_encoders: bool = False
    """Keep the text encoders on the CPU while they are not encoding."""


@dataclass
class Sampling:
    """How pictures are made for training."""

    steps: int = 10
    guidance_scale: float = 4.5
    """1 or less: no guidance."""
    sampler: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    noise_level: float = 0.7
    trained_steps: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    """Steps that are stochastic and trained on; the others are ODE steps."""
    window: int = 0
    """Of these, so many in a row from a place drawn for each iteration; 0: all of them."""
    shared_noise: bool = False
    """The pictures of a prompt start from one noise and part at the first trained step."""
    prompts: str = "shapes"
    """A text file with one prompt a line, or .jsonl with metadata (GenEval's format); "shapes" draws from the embedded
    world."""
    prompts_per_iteration: int = 48
    images_per_prompt: int = 24
    layers: tuple[int, ...] | None = None
    """Blocks whose attention is read; None: all."""
    normalize: Literal["raw", "content", "concepts"] = "raw"
    text_cache: int = 0
    """Prompts whose embeddings are kept on the CPU from iteration to iteration; each is then encoded alone."""
    rollout_device: Literal["model", "cpu"] = "model"
    """Where the latents of a rollout wait for the update; cpu bounds the memory of the device."""
    merge_adapter: bool = False
    """Steps that are not trained run with the adapter merged into a copy of its weights: faster, the same to rounding.
    Needs model.frozen_dtype float32: in half precision an update is smaller than the weights resolve."""


@dataclass
class Loss:
    """The objective; see star_kernels.policy_loss."""

    ratio: Literal["token", "location", "sample"] = "token"
    clip_range: float = 1e-4
    adv_clip: float = 5.0
    kl_coef: float = 0.0
    guard: bool = False
    global_std: bool = False
    """Advantages over the standard deviation of all rewards instead of the group's."""
    advantage_eps: float = 1e-4
    """Added to that standard deviation. Larger: groups whose rewards hardly differ count for less."""
    advantage: Literal["image", "location"] = "image"
    """One advantage per picture, or one per place from a reward that localizes."""
    normalize_rewards: bool = False
    """Of several rewards, turn each into advantages before they are weighed, so that their scales do not matter."""


@dataclass
class Optimization:
    """How the policy is updated."""

    iterations: int = 100
    updates_per_iteration: int = 2
    """Optimizer steps per rollout, each on its own share of the pictures."""
    micro_batch: int = 0
    """Pictures per forward pass; 0: all of an update's."""
    learning_rate: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = 1e-8
    """Added to the root of AdamW's second moment. Far above the gradients (1, say), with no weight_decay, an update is
    the plain gradient with momentum."""
    weight_decay: float = 1e-4
    max_grad_norm: float = 1.0
    update_norm: float | None = None
    """Euclidean norm that every update of the weights is rescaled to, so that runs differ in its direction alone.
    0: the norm is only measured. None: neither; both need a copy of the trained weights."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    ema_decay: float = 0.0
    """Of a moving average of the weights, which is then what is scored and exported; 0: none."""
    ema_every: int = 8
    """Updates from one averaging to the next."""


@dataclass
class Run:
    """Where the run lives and what it reports."""

    out: Path = Path("runs/star")
    seed: int = 0
    reward: str | dict[str, float] = "shapes"
    """A reward's name, "module:function", or several with their weights: "ocr:1.0,pickscore:0.5", in YAML also as a
    mapping. See docs/rewards.md."""
    reward_models: dict[str, str] = field(default_factory=dict)
    """Where rewards find their weights, by name: a folder, a file or a hub id; an http:// address asks a server."""
    reward_timeout: float = 600.0
    """Seconds for a batch of pictures, after which their reward counts as failed."""
    reward_strict: bool = False
    """End the run at the first picture whose reward fails, instead of counting it and going on."""
    save_every: int = 50
    keep_checkpoints: int = 2
    held_out: int = 0
    """Held-out prompts of the embedded world scored before and after; 0: none."""
    held_out_prompts: str = "shapes"
    """Other prompts of the embedded world for `evaluate_every`: a text file, repeated until there are `held_out`."""
    evaluate_every: int = 0
    """Iterations from one scoring of the held-out prompts to the next, written to evaluations.jsonl; 0: none."""
    pictures: bool = True
    """Write reward curve, before/after grid and allocation pictures at the end."""
    grid_every: int = 0
    """Iterations from one grid of the rollout's pictures and weights to the next, in grids/; 0: none."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the metrics go beside metrics.jsonl."""
    timeout_minutes: int = 30
    """How long a process waits for the others before it gives the run up."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, or from its beginning if it has none yet."""
    overwrite: bool = False
    """Delete what is in `out`."""


@dataclass
class Config:
    """Post-training of a text-to-image model with spatiotemporal reward allocation."""

    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)
    allocation: Allocation = field(default_factory=Allocation)
    loss: Loss = field(default_factory=Loss)
    optimization: Optimization = field(default_factory=Optimization)
    run: Run = field(default_factory=Run)

    def check(self, processes: int = 1) -> None:
        """Raise ConfigError for values that do not go together, or not with this number of processes."""
        sampling, optimization = self.sampling, self.optimization
        images = sampling.prompts_per_iteration * sampling.images_per_prompt
        if images % optimization.updates_per_iteration:
            raise ConfigError(
                f"optimization.updates_per_iteration: {optimization.updates_per_iteration} does not divide "
                f"{images} pictures"
            )
        update = images // optimization.updates_per_iteration
        if update % processes:
            raise ConfigError(f"accelerate: {processes} processes do not divide an update's {update} pictures")
        if optimization.micro_batch and update // processes % optimization.micro_batch:
            each = f", {update // processes} for each process" if processes > 1 else ""
            raise ConfigError(
                f"optimization.micro_batch: {optimization.micro_batch} does not divide an update's "
                f"{update} pictures{each}"
            )
        if not sampling.trained_steps or not all(0 <= i < sampling.steps - 1 for i in sampling.trained_steps):
            # The last step is nearly deterministic: its log-ratio would drown all others.
            raise ConfigError(
                f"sampling.trained_steps: got {sampling.trained_steps}, expected some of 0..{sampling.steps - 2}"
            )
        if not 0 <= sampling.window <= len(sampling.trained_steps):
            raise ConfigError(
                f"sampling.window: got {sampling.window}, expected 0..{len(sampling.trained_steps)}, the trained steps"
            )
        if self.allocation.temporal == "concentration" and self.allocation.strategy == "uniform":
            raise ConfigError("allocation.temporal: concentration needs a strategy other than uniform")
        if sampling.images_per_prompt < 2:
            raise ConfigError(f"sampling.images_per_prompt: got {sampling.images_per_prompt}, a group needs at least 2")
        if self.loss.kl_coef and not self.model.lora_rank:
            raise ConfigError(
                "loss.kl_coef: needs an adapter (model.lora_rank > 0): without it the reference is the model"
            )
        half = {"float16": "fp16", "bfloat16": "bf16"}
        if self.model.frozen_dtype in half and optimization.mixed_precision != half[self.model.frozen_dtype]:
            raise ConfigError(
                f"model.frozen_dtype: {self.model.frozen_dtype} needs optimization.mixed_precision "
                f"{half[self.model.frozen_dtype]}, got {optimization.mixed_precision}"
            )
        if sampling.merge_adapter and self.model.frozen_dtype != "float32":
            raise ConfigError(
                f"sampling.merge_adapter: needs model.frozen_dtype float32, got {self.model.frozen_dtype}"
            )
        if not 0 <= optimization.ema_decay < 1 or optimization.ema_every < 1:
            raise ConfigError(
                f"optimization.ema_decay, ema_every: got {optimization.ema_decay}, {optimization.ema_every}, "
                "expected 0 <= decay < 1 and at least 1"
            )
        if optimization.adam_epsilon <= 0:
            raise ConfigError(f"optimization.adam_epsilon: got {optimization.adam_epsilon}, expected above 0")
        if optimization.update_norm is not None and optimization.update_norm < 0:
            raise ConfigError(f"optimization.update_norm: got {optimization.update_norm}, expected at least 0 or none")
        if self.run.evaluate_every and not self.run.held_out:
            raise ConfigError("run.evaluate_every: needs run.held_out, the number of prompts that are scored")
        if self.loss.normalize_rewards and self.loss.advantage == "location":
            raise ConfigError("loss.normalize_rewards: not with loss.advantage 'location'; weigh the maps instead")
        if self.run.resume and self.run.overwrite:
            raise ConfigError("run.resume, run.overwrite: choose one")


def shapes() -> Config:
    """The embedded world on two CPU cores: `make demo`.

    One stochastic step, early and with much noise: of what was tried it moves the reward most, and up to it one pass
    per prompt serves the whole group, in the update too. At this size adapters lose what lies outside their rank: they
    have the rank of the model's width, on every matrix of the blocks, and learn as full fine-tuning does. The moving
    average takes out most of the noise of the single updates.
    """
    stream = ("to_q", "to_k", "to_v", "to_out.0")
    return Config(
        model=Model(
            max_sequence_length=0,
            height=36,
            width=36,
            lora_rank=128,
            lora_alpha=1024,
            lora_targets=(
                *(f"{attention}.{matrix}" for attention in ("attn", "attn2") for matrix in stream),
                *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
                *(f"{part}.net.{matrix}" for part in ("ff", "ff_context") for matrix in ("0.proj", "2")),
                *("norm1.linear", "norm1_context.linear", "proj_out"),
            ),
        ),
        sampling=Sampling(
            steps=4,
            guidance_scale=1.0,
            noise_level=1.2,
            trained_steps=(1,),
            shared_noise=True,
            prompts_per_iteration=16,
            images_per_prompt=6,
            layers=(2, 3),
            merge_adapter=True,
        ),
        loss=Loss(clip_range=2e-3, global_std=True),
        optimization=Optimization(iterations=240, learning_rate=7e-5, ema_decay=0.98, ema_every=1),
        run=Run(out=Path("runs/shapes"), held_out=512, grid_every=60),
    )


def sd35m(task: str, fast: bool = False) -> Config:
    """Stable Diffusion 3.5 Medium with Flow-GRPO's published settings and STAR's allocation (the defaults).

    Sources: flow_grpo config/base.py and config/grpo.py, `geneval_sd3`, `general_ocr_sd3` and `pickscore_sd3`; LoRA and
    the 128 tokens of T5 from scripts/train_sd3.py. fast: `geneval_sd3_fast_nocfg` and `pickscore_sd3_fast_nocfg`; there
    is no such configuration for OCR, so it takes GenEval's.
    """
    published = Config(
        # Flow-GRPO keeps the frozen transformer in float32; its products are in float16 there too.
        model=Model(path="stabilityai/stable-diffusion-3.5-medium", frozen_dtype="float16"),
        sampling=Sampling(
            prompts=f"dataset/{task}/{'train_metadata.jsonl' if task == 'geneval' else 'train.txt'}",
            text_cache=1024,  # 205 x 4096 numbers each: 1.7 GB in half precision
        ),
        loss=Loss(kl_coef=0.01 if task == "pickscore" else 0.04, global_std=True),
        optimization=Optimization(
            # Flow-GRPO sets 100000 and is stopped by hand.
            iterations=5000,
            # train_batch_size; 48 x 24 pictures in 2 updates: up to 64 processes with whole micro batches.
            micro_batch=9,
            mixed_precision="fp16",
            ema_decay=0.9,  # both in scripts/train_sd3.py
            ema_every=8,
        ),
        run=Run(out=Path(f"runs/{task}-sd35m"), seed=42, reward=task, save_every=60, grid_every=60),
    )
    if not fast:
        return published
    groups = {"prompts_per_iteration": 64, "images_per_prompt": 18} if task == "pickscore" else {}
    return dataclasses.replace(
        published,
        sampling=dataclasses.replace(
            published.sampling,
            guidance_scale=1.0,
            sampler="cps",
            noise_level=0.8,
            # sde_window_size 3 in sde_window_range (0, 5).
            trained_steps=(0, 1, 2, 3, 4),
            window=3,
            **groups,
        ),
        loss=dataclasses.replace(published.loss, clip_range=1e-5, kl_coef=0.0),
        run=dataclasses.replace(published.run, out=Path(f"runs/{task}-sd35m-fast")),
    )


PRESETS = {
    "shapes": shapes,
    "geneval-sd35m": lambda: sd35m("geneval"),
    "geneval-sd35m-fast": lambda: sd35m("geneval", fast=True),
    "ocr-sd35m": lambda: sd35m("ocr"),
    "ocr-sd35m-fast": lambda: sd35m("ocr", fast=True),
    "pickscore-sd35m": lambda: sd35m("pickscore"),
    "pickscore-sd35m-fast": lambda: sd35m("pickscore", fast=True),
}


def preset(name: str) -> Config:
    if name not in PRESETS:
        raise ConfigError(f"preset: unknown {name!r}, expected one of {sorted(PRESETS)}")
    return PRESETS[name]()


def to_dict(config: Any) -> Any:
    """Plain values for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def update(config: Any, values: dict, prefix: str = "") -> Any:
    """A copy of a dataclass with the values of a nested dict. Raises ConfigError for an unknown key or wrong type."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: got {values!r}, expected keys and values")
    hints = typing.get_type_hints(type(config))
    changes = {}
    for key, value in values.items():
        if key not in hints:
            raise ConfigError(f"{prefix}{key}: unknown key, expected one of {sorted(hints)}")
        old = getattr(config, key)
        if dataclasses.is_dataclass(old):
            changes[key] = update(old, value, f"{prefix}{key}.")
        else:
            changes[key] = _convert(f"{prefix}{key}", value, hints[key])
    return dataclasses.replace(config, **changes)


def _convert(name: str, value: Any, kind: Any) -> Any:
    """A YAML value as the type of a field."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        mapping = [a for a in kinds if typing.get_origin(a) is dict and isinstance(value, dict)]
        return _convert(name, value, (mapping or kinds)[0])
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{name}: got {value!r}, expected one of {list(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name}: got {value!r}, expected a list")
        return tuple(_convert(name, item, arguments[0]) for item in value)
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: got {value!r}, expected keys and values")
        return {str(key): _convert(f"{name}.{key}", item, arguments[1]) for key, item in value.items()}
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{name}: got {value!r}, expected {kind.__name__}")


def load(path: str | Path, base: Config | None = None) -> Config:
    """Read a YAML file over a base (default: plain defaults)."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config: {path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path} is not YAML ({' '.join(str(error).split())})") from error
    return update(base or Config(), values or {})


def save(config: Config, path: Path) -> None:
    files.replace_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))
