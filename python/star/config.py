"""What a training run is made of: dataclasses, YAML in and out."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import sys
import types
import typing
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import torch
import yaml

from star import files
from star.messages import one_line
from star.objective import Allocation, allocation_weights

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

log = logging.getLogger("star")
Settings = TypeVar("Settings", bound="DataclassInstance")


@dataclass(frozen=True)
class Range:
    """The numbers that a field takes, declared beside it. above and below are not included themselves."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def holds(self, value: float) -> bool:
        # Neither infinity, NaN nor an integer that is no float.
        return abs(value) <= sys.float_info.max and self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        limits = {"at least": self.least, "above": self.above, "at most": self.most, "below": self.below}
        return (
            " and ".join(f"{word} {limit:.10g}" for word, limit in limits.items() if math.isfinite(limit)) or "finite"
        )


Count = Annotated[int, Range(least=0)]
Positive = Annotated[int, Range(least=1)]
Seed = Annotated[int, Range(least=0, most=2**32 - 1)]  # NumPy takes no larger one
Finite = Annotated[float, Range()]
NotNegative = Annotated[float, Range(least=0)]
AboveZero = Annotated[float, Range(above=0)]
Decay = Annotated[float, Range(least=0, below=1)]


class ConfigError(ValueError):
    """A configuration that cannot be run; its message is one line for the user."""


@dataclass
class Model:
    """The model and which of its weights are trained."""

    path: str | None = None
    """Folder or hub id of a StableDiffusion3Pipeline, a FluxPipeline (FLUX.1) or a QwenImagePipeline. None: the
    task's."""
    max_sequence_length: Count = 128
    """Tokens of the T5 part, of which an SD3 without T5 has none; of Qwen-Image the most tokens of a prompt."""
    height: Positive = 512
    """Height of the images, in pixels."""
    width: Positive = 512
    """Width of the images, in pixels."""
    lora_rank: Count = 32
    """Rank of the adapters. 0: all weights of the transformer are trained."""
    lora_alpha: Positive = 64
    """Scale of the adapters: their product is multiplied by lora_alpha / lora_rank."""
    lora_targets: tuple[str, ...] = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    """Matrices of the transformer that get an adapter, given by the end of their names."""
    adapter: str | None = None
    """Folder or hub id of the adapter that training starts from, with the rank, alpha and targets above. The KL term
    compares with it. None: a new adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, more time."""
    compile: Literal["no", "inductor", "aot_eager"] = "no"
    """Backend of torch.compile for the transformer's blocks. With inductor the on-policy ratio may differ from 1."""
    frozen_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Type of the frozen weights: those of the text encoders, and those of the transformer where it has adapters.
    Trained weights and the autoencoder stay in float32."""
    offload_encoders: bool = False
    """Keep the text encoders on the CPU while they do not encode."""


@dataclass
class Sampling:
    """How images are sampled for training."""

    steps: Positive = 10
    """Denoising steps."""
    guidance_scale: Finite = 4.5
    """Scale of classifier-free guidance, 1 or less: no guidance. Of FLUX.1 dev the guidance that it takes as an
    input, without a second pass."""
    sampler: Literal["flow_sde", "dance_sde", "cps"] = "flow_sde"
    """The stochastic step: Flow-GRPO's, DanceGRPO's, or coefficients-preserving sampling's."""
    noise_level: AboveZero = 0.7
    """Size of the noise of stochastic steps."""
    trained_steps: tuple[Count, ...] = (0, 1, 2, 3, 4, 5, 6, 7, 8)
    """Steps that are stochastic and trained on; the others are ODE steps."""
    window: Count = 0
    """Number of `trained_steps` that an iteration trains on: a contiguous window at random (Flow-GRPO-Fast). 0: all."""
    shared_noise: bool = False
    """The images of a prompt start from the same noise and differ from the first trained step on."""
    prompts: str | None = None
    """A text file with one prompt a line, or .jsonl with metadata (GenEval's format). None: the task's prompts."""
    prompts_per_iteration: Positive = 48
    """Prompts of an iteration."""
    images_per_prompt: Annotated[int, Range(least=2)] = 24
    """Images of each prompt: the group whose rewards are compared."""
    explore: Literal["everywhere", "maps", "masks"] = "everywhere"
    """Which locations a trained step noises; at the others the step is deterministic, and the loss leaves them out.
    maps: the image tokens with the largest maps at that step. masks: what the reward finds in an image that is sampled
    first, from the same start and without noise in its steps."""
    explore_share: Annotated[float, Range(above=0, most=1)] = 0.4
    """Share of the image tokens that `explore maps` noises."""
    layers: tuple[Count, ...] | None = None
    """Transformer blocks whose attention is read. None: all."""
    normalize: Literal["raw", "content", "concepts"] = "raw"
    """Normalization of the maps; see star.capture.capture."""
    concepts: str = "rules"
    """How concepts are found: rules (English), spacy (a model of the prompt's language) or spacy:MODEL."""
    brackets: bool = False
    """Prompts mark their concepts: "a [red bench] left of [two cats]". Model and reward see them without brackets."""
    text_cache: Count = 0
    """Number of prompts whose embeddings stay on the CPU between iterations. Each is then encoded alone. 0: none."""
    rollout_device: Literal["model", "cpu"] = "model"
    """Where the latents of a rollout wait for the update; cpu bounds the memory of the device."""
    noise_device: Literal["model", "cpu"] = "cpu"
    """Where noise is drawn. cpu: torch's generator draws the noise of all images in every process. model: the step's
    kernel draws it from a seed for each image and step. Either way the noise of a run's seed is the same on every
    device."""
    merge_adapter: bool = False
    """Run the steps that are not trained with the adapter merged into a copy of its weights: faster, equal to rounding.
    Needs model.frozen_dtype float32: in half precision an update is smaller than the weights resolve."""


@dataclass
class Loss:
    """The objective; see star_kernels.policy_loss, star_kernels.nft_loss and star.objective.awm_loss."""

    objective: Literal["grpo", "nft", "awm"] = "grpo"
    """grpo: the clipped ratio of the rollout's stochastic steps (Flow-GRPO). nft: the forward process of the images
    (DiffusionNFT). An old policy, which follows the trained one, then samples the images without noise in the steps.
    awm: the forward process too, with the matching loss as the log-density (Advantage Weighted Matching)."""
    ratio: Literal["token", "location", "sample"] = "token"
    """What is clipped. token: the sample's ratio, with the gradient of each location. location: the ratio of each
    location. sample: one ratio of the sample, of the weighted log-ratios."""
    clip_range: NotNegative = 1e-4
    """grpo, awm: the ratio is clipped to 1 - clip_range .. 1 + clip_range."""
    adv_clip: AboveZero = 5.0
    """Advantages are clamped to +-adv_clip. nft: at these ends the probability that an image is good is 1 and 0. awm:
    they are divided by it too."""
    kl_coef: NotNegative = 0.0
    """Coefficient of the KL term to the model before the run. nft, awm: of the squared difference to its velocity. 0:
    no such term."""
    guard: bool = False
    """Normalize ratios as GRPO-Guard does."""
    global_std: bool = False
    """Divide advantages by the standard deviation of all rewards instead of the group's."""
    advantage_eps: NotNegative = 1e-4
    """Added to that standard deviation. A larger value lowers the advantages of groups whose rewards hardly differ."""
    advantage: Literal["image", "location", "concept"] = "image"
    """image: one advantage for each image. location: one for each location, from a reward with maps. concept: the
    image's advantage plus, where a concept's map looks, the concept's, from a reward with credits of concepts."""
    location_share: Annotated[float, Range(least=0, most=1)] = 1.0
    """location: share of the locations' own advantages in the advantage. The rest is the image's, which alone shows
    that something is missing."""
    concept_strength: NotNegative = 1.0
    """Factor of the concepts' advantages. 0: the image's alone."""
    concept_maps: Literal["own", "other"] = "own"
    """The map that places a concept's advantage. own: the concept's. other: another concept's of the same prompt, a
    control."""
    noise_levels: Count = 0
    """nft, awm: number of noise levels that an iteration trains each image at, drawn from those of
    sampling.trained_steps. 0: all of them."""
    beta: AboveZero = 1.0
    """nft: distance of the implicit positive and negative policies to the old policy."""
    old_decay: Annotated[float, Range(least=0, most=1)] = 0.5
    """nft, awm: largest share of itself that the old policy keeps after an iteration. 0: it becomes the trained
    policy."""
    old_decay_rate: NotNegative = 1e-3
    """nft, awm: growth of that share with each update, from 0."""
    old_decay_start: Count = 0
    """nft, awm: number of updates before the share begins to grow."""
    old_kl_coef: NotNegative = 1.0
    """awm: coefficient of the squared difference to the old policy's velocity. 0: no such term."""
    off_policy: bool = False
    """awm: the old policy samples the images, and the ratio compares with it; with old_decay 0 that is the policy as it
    began the iteration. False: the policy samples them itself, and its ratio is 1: one update an iteration."""
    sigma_power: NotNegative = 1.0
    """awm: power of the noise level that multiplies a sample's matching error in the log-density."""
    error_power: Annotated[float, Range(above=0, most=1)] = 0.25
    """awm: power of that error. Below 1, samples and noise levels with a large error count less."""
    normalize_rewards: bool = False
    """Turn each of several rewards into advantages before they are weighted, so that their scales do not matter."""

    @property
    def is_forward_process(self) -> bool:
        """Whether the objective adds noise to finished images; grpo trains on the rollout's own steps."""
        return self.objective != "grpo"

    @property
    def old_samples(self) -> bool:
        """Whether an old policy samples the images."""
        return self.objective == "nft" or (self.objective == "awm" and self.off_policy)

    @property
    def keeps_old(self) -> bool:
        """Whether there is an old policy."""
        return self.old_samples or (self.objective == "awm" and self.old_kl_coef > 0)


# Options of `loss` that only these objectives use.
OBJECTIVES_BY_OPTION = {
    "ratio": ("grpo", "awm"),
    "guard": ("grpo",),
    "noise_levels": ("nft", "awm"),
    "beta": ("nft",),
    "old_decay": ("nft", "awm"),
    "old_decay_rate": ("nft", "awm"),
    "old_decay_start": ("nft", "awm"),
    "old_kl_coef": ("awm",),
    "off_policy": ("awm",),
    "sigma_power": ("awm",),
    "error_power": ("awm",),
}


@dataclass
class Optimization:
    """How the policy is updated."""

    iterations: Positive = 100
    """Iterations of rollout and update."""
    updates_per_iteration: Positive = 2
    """Optimizer steps for each rollout, each on its own share of the images."""
    micro_batch: Count = 0
    """Images per forward pass. 0: all of an update's."""
    learning_rate: NotNegative = 3e-4
    """AdamW's learning rate, the largest one of its schedule."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warmup. linear, cosine: it falls to 0 at the last update, on a line or half a cosine."""
    warmup: Count = 0
    """Number of updates over which the learning rate rises from 0."""
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    """AdamW's betas."""
    adam_epsilon: AboveZero = 1e-8
    """Added to the root of AdamW's second moment. With a value far above the gradients, such as 1, and no weight_decay,
    an update is the plain gradient with momentum."""
    weight_decay: NotNegative = 1e-4
    """AdamW's weight decay."""
    max_grad_norm: AboveZero = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""
    update_norm: NotNegative | None = None
    """Euclidean norm to which every update of the weights is rescaled, so that runs differ in its direction alone.
    0: the norm is measured only. None: neither. Both need a copy of the trained weights."""
    mixed_precision: Literal["no", "float16", "bfloat16"] = "no"
    """Precision of the matrix products."""
    ema_decay: Decay = 0.0
    """Decay of a moving average of the weights; the average is then scored and exported. 0: no average."""
    ema_every: Positive = 8
    """Number of updates between two steps of the average."""


@dataclass
class Scoring:
    """How the policy is scored on held-out prompts: before training, on a schedule and after training."""

    count: Count = 0
    """Number of held-out prompts that are scored, always with the same noise. 0: the policy is not scored."""
    prompts: str | None = None
    """A file like sampling.prompts. If it has more prompts than `count`, a sample of them is scored; if it has fewer,
    they repeat with other noise. None: the task's held-out prompts."""
    reward: str | dict[str, float] | None = None
    """A reward like run.reward. None: run.reward."""
    every: Count = 0
    """Number of iterations between scorings. 0: only before and after training. Without effect if `count` is 0."""
    images_per_prompt: Positive = 1
    """Images of each held-out prompt."""
    steps: Positive | None = None
    """Denoising steps. None: those of sampling.steps."""
    guidance_scale: Finite | None = None
    """Scale of classifier-free guidance. None: that of sampling.guidance_scale."""
    batch: Positive | None = None
    """Images per forward pass. None: the task's; without a task that of `star eval`."""
    seed: Seed = 2026
    """Seed of noise and prompts; runs with equal seeds can be compared image by image."""


@dataclass
class Run:
    """The run's folder, reward and checkpoints."""

    out: Path = Path("runs/star")
    """The run's folder."""
    seed: Seed = 0
    """Seed of prompts, noise and adapters."""
    reward: str | dict[str, float] | None = None
    """A reward's name, "module:function", or several with their weights: "ocr:1.0,pickscore:0.5", in YAML also as a
    mapping; see docs/rewards.md. None: the task's reward."""
    reward_models: dict[str, str] = field(default_factory=dict)
    """Where rewards find their weights, by name: a folder, a file, a hub id, or the http:// address of a server."""
    reward_timeout: AboveZero = 600.0
    """Seconds after which the reward of a batch of images counts as failed."""
    reward_strict: bool = False
    """End the run at the first image whose reward fails, instead of counting it and going on."""
    save_every: Positive = 50
    """Number of iterations between checkpoints."""
    keep_checkpoints: Positive = 2
    """Checkpoints that are kept, the newest ones."""
    figures: bool = True
    """Draw the reward's curve, images before and after, and the allocation at the end; keep the maps of the held-out
    images that are kept, before and after training, for `star report`."""
    grid_every: Count = 0
    """Number of iterations between grids of the rollout's images and weights, in grids/. 0: none."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    """Where the metrics go besides metrics.jsonl."""
    timeout_minutes: Positive = 30
    """Minutes that a process waits for the others before it ends the run."""
    resume: bool = False
    """Continue the run in `out` from its last checkpoint, or from its beginning if it has none yet."""
    overwrite: bool = False
    """Delete what is in `out`."""


@dataclass
class Config:
    """Post-training of a text-to-image model with spatiotemporal reward allocation."""

    task: str | None = None
    """What is trained, in one name: `shapes`, the embedded world, or `module:attribute` of a star.training.task.Task.
    It gives the pipeline, prompts and reward that model.path, sampling.prompts, scoring.prompts and run.reward do not
    set. None: they must be set."""
    model: Model = field(default_factory=Model)
    sampling: Sampling = field(default_factory=Sampling)
    allocation: Allocation = field(default_factory=Allocation)
    loss: Loss = field(default_factory=Loss)
    optimization: Optimization = field(default_factory=Optimization)
    scoring: Scoring = field(default_factory=Scoring)
    run: Run = field(default_factory=Run)

    def check(self, processes: int = 1) -> None:
        """Raise ConfigError for values that do not go together, or not with this number of processes."""
        for field_ in dataclasses.fields(self):
            if dataclasses.is_dataclass(section := getattr(self, field_.name)):
                check_ranges(section, f"{field_.name}.")
        self._check_allocation()
        self._check_task()
        sampling, optimization = self.sampling, self.optimization
        images = sampling.prompts_per_iteration * sampling.images_per_prompt
        if images % optimization.updates_per_iteration:
            raise ConfigError(
                f"optimization.updates_per_iteration: got {optimization.updates_per_iteration}, expected a divisor of "
                f"an iteration's {images} images"
            )
        update = images // optimization.updates_per_iteration
        if update % processes:
            raise ConfigError(
                f"accelerate: got {processes} processes, expected a divisor of an update's {update} images"
            )
        if optimization.micro_batch and update // processes % optimization.micro_batch:
            each = f", {update // processes} for each process" if processes > 1 else ""
            raise ConfigError(
                f"optimization.micro_batch: got {optimization.micro_batch}, expected a divisor of an update's "
                f"{update} images{each}"
            )
        # GRPO's last step is nearly deterministic: its log-ratio would drown all others.
        last = sampling.steps - (1 if self.loss.is_forward_process else 2)
        if not sampling.trained_steps or not all(0 <= i <= last for i in sampling.trained_steps):
            raise ConfigError(f"sampling.trained_steps: got {sampling.trained_steps}, expected some of 0..{last}")
        for name, values in (("trained_steps", sampling.trained_steps), ("layers", sampling.layers or ())):
            if len(set(values)) < len(values):
                raise ConfigError(f"sampling.{name}: got {values}, expected each number once")
        if not 0 <= sampling.window <= len(sampling.trained_steps):
            raise ConfigError(
                f"sampling.window: got {sampling.window}, expected 0..{len(sampling.trained_steps)}, the trained steps"
            )
        if self.allocation.temporal == "concentration" and self.allocation.strategy == "uniform":
            raise ConfigError(
                "allocation.temporal: got 'concentration', which needs another allocation.strategy than 'uniform'"
            )
        if self.model.adapter and not self.model.lora_rank:
            raise ConfigError("model.lora_rank: got 0, expected the rank of model.adapter")
        if self.model.frozen_dtype not in ("float32", optimization.mixed_precision):
            raise ConfigError(
                f"model.frozen_dtype: got {self.model.frozen_dtype!r}, expected 'float32' or that of "
                f"optimization.mixed_precision, {optimization.mixed_precision!r}"
            )
        if sampling.merge_adapter and self.model.frozen_dtype != "float32":
            raise ConfigError(
                f"sampling.merge_adapter: needs model.frozen_dtype 'float32', got {self.model.frozen_dtype!r}"
            )
        self._check_scoring()
        self._check_concepts()
        self._check_loss_options()
        if self.loss.is_forward_process:
            self._check_forward_process(optimization.micro_batch or update // processes)
        if self.loss.normalize_rewards and self.loss.advantage != "image":
            raise ConfigError(
                f"loss.normalize_rewards: got True, expected False with loss.advantage {self.loss.advantage!r}; weight "
                "the rewards in run.reward"
            )
        if self.loss.ratio == "sample" and self.loss.advantage != "image":
            raise ConfigError(
                f"loss.ratio: got 'sample', which needs loss.advantage 'image', not {self.loss.advantage!r}"
            )
        if self.run.resume and self.run.overwrite:
            raise ConfigError("run.resume, run.overwrite: got both, expected one of them")

    def _check_loss_options(self) -> None:
        """Raise ConfigError for an option of another objective, which this one would ignore in silence."""
        for option in dataclasses.fields(self.loss):
            value, objectives = getattr(self.loss, option.name), OBJECTIVES_BY_OPTION.get(option.name)
            if objectives and self.loss.objective not in objectives and value != option.default:
                raise ConfigError(
                    f"loss.{option.name}: got {value!r}, expected {option.default!r}: loss.objective "
                    f"{self.loss.objective} does not use it"
                )

    def _check_forward_process(self, chunk: int) -> None:
        """Raise ConfigError for what the forward process would ignore in silence. chunk: images of a forward pass."""
        sampling, loss = self.sampling, self.loss
        name, updates = loss.objective, self.optimization.updates_per_iteration
        if loss.noise_levels > len(sampling.trained_steps):
            raise ConfigError(
                f"loss.noise_levels: got {loss.noise_levels}, expected 0..{len(sampling.trained_steps)}, "
                "the trained steps"
            )
        refused = {
            "sampling.window": (sampling.window, 0),
            "sampling.shared_noise": (sampling.shared_noise, False),
            "sampling.explore": (sampling.explore, "everywhere"),
            "allocation.temporal": (self.allocation.temporal, "none"),
        }
        for option, (value, expected) in refused.items():
            if value != expected:
                raise ConfigError(
                    f"{option}: got {value!r}, expected {expected!r}: loss.objective {name} does not use it"
                )
        if name == "awm" and updates > 1 and not loss.off_policy:
            raise ConfigError(
                f"optimization.updates_per_iteration: got {updates}, expected 1: after the first update the policy is "
                "not the one that sampled; set loss.off_policy, with loss.old_decay 0 to begin with the policy itself"
            )
        if self.allocation.strategy == "shuffled" and chunk < 2:
            raise ConfigError(
                f"allocation.strategy: 'shuffled' needs 2 images or more in a pass of loss.objective {name}, got "
                f"{chunk}; raise optimization.micro_batch"
            )
        if self.allocation.strategy == "final_step":
            raise ConfigError(
                f"allocation.strategy: got 'final_step', which needs sampling steps; loss.objective {name} has none"
            )

    def _check_concepts(self) -> None:
        if self.sampling.concepts == "rules":
            return
        from star.concepts import check_source  # it imports the tokenizers

        try:
            check_source(self.sampling.concepts)
        except (ValueError, ImportError) as error:
            raise ConfigError(f"sampling.concepts: {str(error).removeprefix('source: ')}") from error

    def _check_allocation(self) -> None:
        """By the operator that takes these numbers, which knows their ranges."""
        try:
            allocation_weights(dataclasses.replace(self.allocation, strategy="attention"), torch.ones(1, 1, 1), (1, 1))
        except ValueError as error:
            raise ConfigError(f"allocation.{error}") from error

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
        if scoring.count and self.task is None and scoring.prompts is None:
            raise ConfigError("scoring.prompts: not set; set it to a file of held-out prompts, or scoring.count to 0")


def check_ranges(section: Any, prefix: str) -> None:
    """Raise ConfigError for a number beyond the range that its field declares."""
    for name, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value = getattr(section, name)
        for number in value if isinstance(value, tuple) else (value,):
            for limits in _ranges(hint) or [Range()]:
                if isinstance(number, int | float) and not limits.holds(number):
                    raise ConfigError(f"{prefix}{name}: got {value}, expected {_noun(value)} {limits}")


def _ranges(hint: Any) -> list[Range]:
    """The ranges in an annotation, also within a union or a tuple."""
    if typing.get_origin(hint) is Annotated:
        own = [item for item in hint.__metadata__ if isinstance(item, Range)]
        return own or _ranges(hint.__origin__)
    return [limits for argument in typing.get_args(hint) for limits in _ranges(argument)]


def _noun(value: Any) -> str:
    return "numbers" if isinstance(value, tuple) else "a number"


def expand_paths(options: Settings) -> Settings:
    """A copy of a dataclass whose paths begin with no ~, which a shell leaves in --out=~/run."""

    def expand(value: Any) -> Any:
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            return expand_paths(value)
        if isinstance(value, dict):
            return {key: expand(item) for key, item in value.items()}
        return type(value)(os.path.expanduser(value)) if isinstance(value, str | Path) else value

    values = {f.name: expand(getattr(options, f.name)) for f in dataclasses.fields(options)}
    return dataclasses.replace(options, **values)


def to_dict(config: Any) -> Any:
    """Plain values for YAML and JSON."""
    if dataclasses.is_dataclass(config):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, tuple | list):
        return [to_dict(value) for value in config]
    if isinstance(config, dict):
        return {key: to_dict(value) for key, value in config.items()}
    return str(config) if isinstance(config, Path) else config


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration's plain values by dotted name; mappings with names of the user's own stay whole."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= {f"{name}.{key}": item for key, item in value.items()} if isinstance(value, dict) else {name: value}
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
OLD_VALUES = {"optimization.mixed_precision": {"fp16": "float16", "bf16": "bfloat16"}}
OLD_SECTIONS = {"optimisation": "optimization"}
TASK_KEYS = ("model.path", "sampling.prompts", "scoring.prompts", "run.reward")
EMBEDDED = "shapes"
OLD_REWARDS = {f"star.study.rewards:{name}": f"star.shapes.reward:{name}" for name in ("noise", "every_object")}


def modernize(values: dict) -> tuple[dict, dict[str, str]]:
    """The values of a configuration file of any version as those of this one, and what was renamed: {old: new}. Raises
    ConfigError for a section that is none, where keys belong into it."""
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
                renamed[f"the value {value}"] = f"task: {value}"
                new["task"], value = value, None
            if isinstance(value, str) and value in OLD_VALUES.get(name, {}):
                renamed[value] = OLD_VALUES[name][value]
                value = renamed[value]
            if name == "run.reward" and isinstance(value, str) and value in OLD_REWARDS:
                renamed[value] = OLD_REWARDS[value]
                value = OLD_REWARDS[value]
            place, _, key = name.partition(".")
            keys = new.setdefault(place, {})
            if not isinstance(keys, dict):
                raise ConfigError(f"{place}: got {keys!r}, expected keys and values")
            if key in keys:
                raise ConfigError(f"{name}: got it twice, under its old and its new name; leave one of them out")
            keys[key] = value
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
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]
        mapping = [a for a in kinds if typing.get_origin(a) is dict and isinstance(value, dict)]
        return _convert(name, value, (mapping or kinds)[0])
    if origin is Literal:
        if value is False and "no" in arguments:
            return "no"  # YAML 1.1 reads no as a boolean
        if value not in arguments:
            raise ConfigError(f"{name}: got {value!r}, expected one of {list(arguments)}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name}: got {value!r}, expected a list")
        each = arguments[:1] * len(value) if arguments[-1] is ... else arguments
        if len(value) != len(each):
            raise ConfigError(f"{name}: got {value!r}, expected {len(each)} values")
        return tuple(_convert(name, item, kind) for item, kind in zip(value, each, strict=True))
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{name}: got {value!r}, expected keys and values")
        return {str(key): _convert(f"{name}.{key}", item, arguments[1]) for key, item in value.items()}
    if kind in (Path, str) and isinstance(value, str):
        return kind(os.path.expanduser(value))
    if kind is float and isinstance(value, str):
        # YAML 1.1 reads 1e-4 as a string.
        try:
            return float(value)
        except ValueError:
            pass
    if kind is float and type(value) is int and abs(value) <= sys.float_info.max:
        return float(value)
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        return value
    raise ConfigError(f"{name}: got {value!r}, expected {kind.__name__}")


class _UniqueKeys(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would silently keep the last."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        for key, count in counts.items():
            if count > 1:
                raise yaml.composer.ComposerError(None, None, f"the key {key!r} is there twice", node.start_mark)
        return node


def read(path: str | Path) -> dict:
    """The keys and values of a YAML file. Raises ConfigError if it cannot be read."""
    try:
        values = yaml.load(files.read_text(Path(path)), _UniqueKeys)  # a safe loader
    except files.Unreadable as error:
        raise ConfigError(f"config: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: a date that is none
        raise ConfigError(f"config: {path} is not YAML ({one_line(error)})") from error
    if _is_endless(values):
        raise ConfigError(f"config: {path} has more than {MOST_VALUES:,} values, aliases followed")
    if not isinstance(values or {}, dict):
        raise ConfigError(f"config: {path} holds {values!r}, expected keys and values")
    return values or {}


MOST_VALUES = 100_000


def _is_endless(values: Any) -> bool:
    """Whether a YAML value, whose aliases make a short file a tree without end, is too large to be shown."""
    left, count = [values], 0
    while left and count <= MOST_VALUES:
        value, count = left.pop(), count + 1
        if isinstance(value, dict):
            left += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set):
            left += value
    return count > MOST_VALUES


def read_flat(path: str | Path) -> dict[str, Any]:
    """The plain values of a configuration file of any version, by dotted name; see `flatten`. Raises ConfigError."""
    return flatten(_modernized(read(path), path)[0])


def _modernized(values: dict, path: str | Path) -> tuple[dict, dict[str, str]]:
    try:
        return modernize(values)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from error


def load(path: str | Path, base: Config | None = None) -> Config:
    """Read a YAML file over a base (default: plain defaults). One line tells which of its keys have new names."""
    values = read(path)
    _, renamed = _modernized(values, path)
    if renamed:
        log.warning("config: %s: %s", path, ", ".join(f"{old} is now {new}" for old, new in renamed.items()))
    return update_from(base or Config(), values, path)


def update_from(config: Settings, values: dict, path: str | Path) -> Settings:
    """`update` with the values of a file, which errors name."""
    try:
        return update(config, values)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {path})") from error


def save(config: Config, path: Path) -> None:
    files.replace_text(path, yaml.safe_dump(to_dict(config), sort_keys=False))
