"""What a training run is made of: dataclasses, YAML in and out."""

from __future__ import annotations

import dataclasses
import logging
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from star import files
from star.objective import Allocation

log = logging.getLogger("star")


class ConfigError(ValueError):
    """A configuration that cannot be run; its message is one line for the user."""


@dataclass
class Model:
    """The model and which of its weights are trained."""

    path: str | None = None
    """Folder or hub id of a StableDiffusion3Pipeline. None: the task's."""
    max_sequence_length: int = 128
    """Tokens of the T5 part; 0 for a pipeline without T5."""
    height: int = 512
    """Height of the images in pixels."""
    width: int = 512
    """Width of the images in pixels."""
    lora_rank: int = 32
    """Rank of the adapters. 0: all weights of the transformer are trained."""
    lora_alpha: int = 64
    """Scale of the adapters; their product is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = (
        *("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"),
        *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    )
    """Matrices of the transformer that get an adapter, by the end of their names."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: Literal["no", "inductor", "aot_eager"] = "no"
    """Backend of torch.compile for the transformer's blocks. With inductor the on-policy ratio may not be exactly 1."""
    frozen_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the frozen weights: text encoders, and the transformer beside its adapters. Trained weights and the
    autoencoder stay in float32."""
    offload_encoders: bool = False
    """Keep the text encoders on the CPU while they do not encode."""


@dataclass
class Sampling:
    """How images are sampled for training."""

    steps: int = 10
    """Denoising steps."""
    guidance_scale: float = 4.5
    """Scale of classifier-free guidance. 1 or less: no guidance."""
    sampler: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    """The stochastic step: Flow-GRPO's, DanceGRPO's or coefficients-preserving sampling."""
    noise_level: float = 0.7
    """Size of the noise of stochastic steps."""
    trained_steps: tuple[int, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    """Steps that are stochastic and trained on; the others are ODE steps."""
    window: int = 0
    """Train on a random contiguous window of this many of `trained_steps` per iteration (Flow-GRPO-Fast). 0: all."""
    shared_noise: bool = False
    """The images of a prompt start from one noise and part at the first trained step."""
    prompts: str | None = None
    """A text file with one prompt a line, or .jsonl with metadata (GenEval's format). None: the task's prompts."""
    prompts_per_iteration: int = 48
    """Prompts of an iteration."""
    images_per_prompt: int = 24
    """Images of each prompt: the group whose rewards are compared."""
    layers: tuple[int, ...] | None = None
    """Transformer blocks whose attention is read. None: all."""
    normalize: Literal["raw", "content", "concepts"] = "raw"
    """Normalization of the maps; see star.capture.capture."""
    text_cache: int = 0
    """Prompts whose embeddings stay on the CPU from iteration to iteration; each is then encoded alone. 0: none."""
    rollout_device: Literal["model", "cpu"] = "model"
    """Where the latents of a rollout wait for the update; cpu bounds the memory of the device."""
    merge_adapter: bool = False
    """Run steps that are not trained with the adapter merged into a copy of its weights: faster, the same to rounding.
    Needs model.frozen_dtype float32: in half precision an update is smaller than the weights resolve."""


@dataclass
class Loss:
    """The objective; see star_kernels.policy_loss."""

    ratio: Literal["token", "location", "sample"] = "token"
    """What is clipped: the sample's ratio with the gradient of each location, the ratio of each location, or one ratio
    of the weighted log-ratios."""
    clip_range: float = 1e-4
    """The ratio is clipped to 1 - clip_range .. 1 + clip_range."""
    adv_clip: float = 5.0
    """Advantages are clamped to +-adv_clip."""
    kl_coef: float = 0.0
    """Coefficient of the KL term to the model without its adapter. 0: no such term."""
    guard: bool = False
    """Normalize ratios as GRPO-Guard does."""
    global_std: bool = False
    """Divide advantages by the standard deviation of all rewards instead of the group's."""
    advantage_eps: float = 1e-4
    """Added to that standard deviation. A larger value gives groups whose rewards hardly differ less say."""
    advantage: Literal["image", "location"] = "image"
    """One advantage for each image, or one for each location from a reward that localizes."""
    normalize_rewards: bool = False
    """Turn each of several rewards into advantages before they are weighted, so that their scales do not matter."""


@dataclass
class Optimization:
    """How the policy is updated."""

    iterations: int = 100
    """Iterations of rollout and update."""
    updates_per_iteration: int = 2
    """Optimizer steps for each rollout, each on its own share of the images."""
    micro_batch: int = 0
    """Images per forward pass. 0: all of an update's."""
    learning_rate: float = 3e-4
    """AdamW's learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW's betas."""
    adam_epsilon: float = 1e-8
    """Added to the root of AdamW's second moment. Far above the gradients (1, say), with no weight_decay, an update is
    the plain gradient with momentum."""
    weight_decay: float = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Norm to which the gradient is cut."""
    update_norm: float | None = None
    """Euclidean norm to which every update of the weights is rescaled, so that runs differ in its direction alone.
    0: the norm is only measured. None: neither; both need a copy of the trained weights."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """Precision of the matrix products, as in accelerate."""
    ema_decay: float = 0.0
    """Decay of a moving average of the weights; the average is then scored and exported. 0: no average."""
    ema_every: int = 8
    """Updates from one averaging to the next."""


@dataclass
class Scoring:
    """How the policy is scored on held-out prompts: before training, on a schedule and after training."""

    count: int = 0
    """Held-out prompts that are scored, always with the same noise. 0: the policy is not scored."""
    prompts: str | None = None
    """A file like sampling.prompts; if it has more prompts than `count`, a sample of them, if fewer, they repeat with
    other noise. None: the task's held-out prompts."""
    reward: str | dict[str, float] | None = None
    """A reward like run.reward. None: the one that is trained on."""
    every: int = 0
    """Iterations from one scoring to the next. 0: only before and after training."""
    images_per_prompt: int = 1
    """Images of each held-out prompt."""
    steps: int | None = None
    """Denoising steps. None: those of sampling.steps."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance. None: that of sampling.guidance_scale."""
    batch: int | None = None
    """Images per forward pass. None: the task's, else 8."""
    seed: int = 2026
    """Seed of noise and prompts; runs with equal seeds can be compared image by image."""


@dataclass
class Run:
    """Where the run lives and what it writes."""

    out: Path = Path("runs/star")
    """The run's folder."""
    seed: int = 0
    """Seed of prompts, noise and adapters."""
    reward: str | dict[str, float] | None = None
    """A reward's name, "module:function", or several with their weights: "ocr:1.0,pickscore:0.5", in YAML also as a
    mapping; see docs/rewards.md. None: the task's reward."""
    reward_models: dict[str, str] = field(default_factory=dict)
    """Where rewards find their weights, by name: a folder, a file or a hub id; an http:// address asks a server."""
    reward_timeout: float = 600.0
    """Seconds for a batch of images, after which their reward counts as failed."""
    reward_strict: bool = False
    """End the run at the first image whose reward fails, instead of counting it and going on."""
    save_every: int = 50
    """Iterations from one checkpoint to the next."""
    keep_checkpoints: int = 2
    """Checkpoints that are kept, the newest ones."""
    figures: bool = True
    """Draw the reward's curve, images before and after, and the allocation at the end."""
    grid_every: int = 0
    """Iterations from one grid of the rollout's images and weights to the next, in grids/. 0: none."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the metrics go besides metrics.jsonl."""
    timeout_minutes: int = 30
    """Minutes that a process waits for the others before it gives the run up."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, or from its beginning if it has none yet."""
    overwrite: bool = False
    """Delete what is in `out`."""


@dataclass
class Config:
    """Post-training of a text-to-image model with spatiotemporal reward allocation."""

    task: str | None = None
    """What is trained, in one name: "shapes", the embedded world, or "module:attribute" of a star.training.task.Task.
    It gives pipeline, prompts and reward where model.path, sampling.prompts, scoring.prompts and run.reward are not
    set. None: these are set."""
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)
    allocation: Allocation = field(default_factory=Allocation)
    loss: Loss = field(default_factory=Loss)
    optimization: Optimization = field(default_factory=Optimization)
    scoring: Scoring = field(default_factory=Scoring)
    run: Run = field(default_factory=Run)

    def check(self, processes: int = 1) -> None:
        """Raise ConfigError for values that do not go together, or not with this number of processes."""
        self._check_task()
        sampling, optimization = self.sampling, self.optimization
        images = sampling.prompts_per_iteration * sampling.images_per_prompt
        if images % optimization.updates_per_iteration:
            raise ConfigError(
                f"optimization.updates_per_iteration: {optimization.updates_per_iteration} does not divide "
                f"{images} images"
            )
        update = images // optimization.updates_per_iteration
        if update % processes:
            raise ConfigError(f"accelerate: {processes} processes do not divide an update's {update} images")
        if optimization.micro_batch and update // processes % optimization.micro_batch:
            each = f", {update // processes} for each process" if processes > 1 else ""
            raise ConfigError(
                f"optimization.micro_batch: {optimization.micro_batch} does not divide an update's "
                f"{update} images{each}"
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
        self._check_scoring()
        if self.loss.normalize_rewards and self.loss.advantage == "location":
            raise ConfigError("loss.normalize_rewards: not with loss.advantage 'location'; weigh the maps instead")
        if self.run.resume and self.run.overwrite:
            raise ConfigError("run.resume, run.overwrite: choose one")

    def _check_task(self) -> None:
        given = {
            "model.path": self.model.path,
            "sampling.prompts": self.sampling.prompts,
            "run.reward": self.run.reward,
        }
        for name, value in given.items():
            if value is None and self.task is None:
                raise ConfigError(f"{name}: not set; set it, or --task for a task that has one, or begin with --preset")

    def _check_scoring(self) -> None:
        scoring = self.scoring
        if scoring.count < 0 or scoring.every < 0 or scoring.images_per_prompt < 1:
            raise ConfigError(
                f"scoring.count, every, images_per_prompt: got {scoring.count}, {scoring.every}, "
                f"{scoring.images_per_prompt}, expected at least 0, 0, 1"
            )
        if scoring.every and not scoring.count:
            raise ConfigError("scoring.every: needs scoring.count, the number of held-out prompts")
        if scoring.count and self.task is None and scoring.prompts is None:
            raise ConfigError("scoring.prompts: not set; set it to a file of held-out prompts, or scoring.count to 0")


def to_dict(config: Any) -> Any:
    """Plain values for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def flatten(config: Config) -> dict[str, Any]:
    """The values by dotted name."""
    flat = {}
    for name, value in to_dict(config).items():
        nested = dataclasses.is_dataclass(getattr(config, name))
        flat |= {f"{name}.{key}": item for key, item in value.items()} if nested else {name: value}
    return flat


# Keys that have another name or another section now, and values that are said in another way.
OLD_KEYS = {
    "sampling.normalise": "sampling.normalize",
    "loss.normalise_rewards": "loss.normalize_rewards",
    "run.held_out": "scoring.count",
    "run.held_out_prompts": "scoring.prompts",
    "run.evaluate_every": "scoring.every",
    "run.pictures": "run.figures",
}
OLD_SECTIONS = {"optimisation": "optimization"}
TASK_KEYS = ("model.path", "sampling.prompts", "scoring.prompts", "run.reward")
EMBEDDED = "shapes"
OLD_REWARDS = {f"star.study.rewards:{name}": f"star.shapes.reward:{name}" for name in ("noise", "every_object")}


def modernize(values: dict) -> tuple[dict, dict[str, str]]:
    """The values of a configuration file of any version as those of this one, and what was renamed: {old: new}."""
    new: dict[str, Any] = {}
    renamed: dict[str, str] = {}
    for section, entries in values.items():
        if section in OLD_SECTIONS:
            renamed[section] = OLD_SECTIONS[section]
            section = OLD_SECTIONS[section]
        if not isinstance(entries, dict):
            new[section] = entries
            continue
        new.setdefault(section, {})
        for key, value in entries.items():
            name = f"{section}.{key}"
            if name in OLD_KEYS:
                renamed[name] = OLD_KEYS[name]
                name = OLD_KEYS[name]
            if name in TASK_KEYS and value == EMBEDDED:
                renamed[f"{name} {value}"] = f"task {value}"
                new["task"], value = value, None
            if name == "run.reward" and isinstance(value, str) and value in OLD_REWARDS:
                renamed[value] = OLD_REWARDS[value]
                value = OLD_REWARDS[value]
            place, _, key = name.partition(".")
            new.setdefault(place, {})[key] = value
    return new, renamed


def update(config: Any, values: dict, prefix: str = "") -> Any:
    """A copy of a dataclass with the values of a nested dict; for a Config also with the keys of older versions. Raises
    ConfigError for an unknown key or wrong type."""
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: got {values!r}, expected keys and values")
    if isinstance(config, Config):
        values, _ = modernize(values)
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


def read(path: str | Path) -> dict:
    """The keys and values of a YAML file. Raises ConfigError if it cannot be read."""
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise ConfigError(f"config: {path} cannot be read ({error.strerror})") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"config: {path} is not YAML ({' '.join(str(error).split())})") from error
    if not isinstance(values or {}, dict):
        raise ConfigError(f"config: {path} has {values!r}, expected keys and values")
    return values or {}


def load(path: str | Path, base: Config | None = None) -> Config:
    """Read a YAML file over a base (default: plain defaults). One line tells which of its keys have new names."""
    values = read(path)
    _, renamed = modernize(values)
    if renamed:
        log.warning("config: %s: %s", path, ", ".join(f"{old} is now {new}" for old, new in renamed.items()))
    return update(base or Config(), values)


def save(config: Config, path: Path) -> None:
    files.replace_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))
