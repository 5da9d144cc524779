"""What a run will take, before anything is loaded: images, passes, FLOPs and memory of each GPU.

The models are built from their configurations without weights. FLOPs and activations are those of a pass with fake
tensors, which go through every operator but hold no numbers. They are predictions: what the allocator, the
communication library and attention's workspaces need comes on top.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from star.config import Config, ConfigError
from star.training.distributed import share_rows
from star.training.families import FAMILIES, family_of, named_family
from star.training.families.family import Family, Text, check_size
from star.training.families.known import KNOWN
from star.training.forward_process import has_pass_before
from star.training.pipeline import check_files, check_model, make_trainable, reason, text_encoders
from star.training.rollout import DECODED_AT_ONCE, group_members
from star.training.task import Task, configured_task

CONCEPTS = 3  # of a prompt, for the size of the maps; GenEval's have one or two


@dataclass(frozen=True)
class Architecture:
    """Models of a pipeline without weights, on the meta device."""

    family: Family
    transformer: Any
    vae: Any
    text_encoders: tuple[nn.Module, ...]
    clip_tokens: int = 77

    @property
    def components(self) -> dict[str, nn.Module]:
        """The same parts by name, as a pipeline has them."""
        return {str(i): part for i, part in enumerate((self.transformer, self.vae, *self.text_encoders))}

    def text_tokens(self, max_sequence_length: int) -> int:
        """The largest number of text tokens of a prompt."""
        return max_sequence_length + (self.clip_tokens if self.family.begins_with_clip else 0)


def task_architecture(task: Task) -> Architecture:
    """The architecture of a task's pipeline, which is loaded for it."""
    pipeline = task.pipeline("cpu", torch.float32)
    return Architecture(
        family_of(pipeline),
        pipeline.transformer.to("meta"),
        pipeline.vae.to("meta"),
        tuple(encoder.to("meta") for encoder in text_encoders(pipeline)),
        clip_tokens=pipeline.tokenizer.model_max_length,
    )


def architecture(path: str) -> Architecture:
    """The architecture of a known public model or of a pipeline's folder. Raises ConfigError for anything else."""
    with torch.device("meta"):
        if path in KNOWN:
            kind, parts = KNOWN[path]
            transformer, vae, encoders = parts()
            return Architecture(FAMILIES[kind], transformer, vae, encoders)
        folder = Path(path).expanduser()
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"model.path: got {path!r}, expected a pipeline's folder or one of {sorted(KNOWN)}")
        check_files(folder, weights=False)
        try:
            return _folder_architecture(folder)
        except ConfigError:
            raise
        except Exception as error:  # of a damaged file the libraries raise many kinds
            raise ConfigError(f"model.path: {path!r} cannot be loaded ({reason(error)})") from error


def _folder_architecture(folder: Path) -> Architecture:
    index = DiffusionPipeline.load_config(folder)
    family = named_family([index["_class_name"]], f"model.path: {str(folder)!r}")

    def part(name: str) -> Any:
        kind = getattr(diffusers, index[name][1])
        return kind.from_config(kind.load_config(folder, subfolder=name))

    encoders = []
    for name in sorted(index):
        if name.startswith("text_encoder") and index[name][0] is not None:
            encoder = getattr(transformers, index[name][1])
            encoders.append(encoder(encoder.config_class.from_pretrained(folder / name)))
    return Architecture(family, part("transformer"), part("vae"), tuple(encoders))


@contextmanager
def faked(module: nn.Module) -> Iterator[None]:
    """Within it the meta tensors of a module are fake CPU ones: attention then takes its real kernel."""
    with FakeTensorMode():
        for part in module.modules():
            for name, x in part._parameters.items():
                if x is not None:
                    part._parameters[name] = nn.Parameter(torch.empty(x.shape, dtype=x.dtype), x.requires_grad)
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    part._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)
            for name, x in vars(part).items():  # complex numbers, which are no buffers
                if isinstance(x, Tensor):
                    setattr(part, name, torch.empty(x.shape, dtype=x.dtype))
        yield


def flop_counter() -> FlopCounterMode:
    """Counts the CPU's attention too, which torch's own table leaves out."""

    def forward(query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_flop_count(query, key, value)

    def backward(grad: Any, query: Any, key: Any, value: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return sdpa_backward_flop_count(grad, query, key, value)

    aten = torch.ops.aten
    return FlopCounterMode(
        display=False,
        custom_mapping={
            aten._scaled_dot_product_flash_attention_for_cpu: forward,
            aten._scaled_dot_product_flash_attention_for_cpu_backward: backward,
        },
    )


class SavedBytes(torch.autograd.graph.saved_tensors_hooks):
    """Bytes that autograd keeps for the backward pass beside the model's own parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.bytes = 0
        self.seen = {x.untyped_storage()._cdata for x in (*module.parameters(), *module.buffers())}
        super().__init__(self.pack, lambda x: x)

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in self.seen:
            self.seen.add(storage._cdata)
            self.bytes += storage.nbytes()
        return x


def count_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


# What is in memory for a while, by what is there at the same time: a pass with gradients, images that are decoded or
# scored, a step that is sampled, an update.
PHASES = (
    ("activations", "weights set aside, pass"),
    ("decoding", "weights set aside, images", "text encoders, offloaded"),
    ("merged adapter",),
    ("measured update",),
)


@dataclass(frozen=True)
class Plan:
    """What one iteration takes. rows: images times steps of one GPU, twice with guidance. trained_steps: of an image;
    with the forward process its noise levels. old_rows: those of its passes without gradients. memory: bytes of one
    GPU."""

    images: int
    images_per_gpu: int
    trained_steps: int
    rollout_rows: int
    update_rows: int
    old_rows: int
    reference_rows: int
    forward_flops: int
    backward_flops: int
    reference_flops: int
    parameters: int
    trained_parameters: int
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def flops_per_gpu(self) -> int:
        """The transformer's FLOPs."""
        forward = self.rollout_rows + self.update_rows + self.old_rows
        policy = forward * self.forward_flops + self.update_rows * self.backward_flops
        return policy + self.reference_rows * self.reference_flops

    @property
    def peak(self) -> int:
        """What is always there, and the most that one of the PHASES needs beside it."""
        passing = {name for phase in PHASES for name in phase}
        resident = sum(size for name, size in self.memory.items() if name not in passing)
        return resident + max(sum(self.memory[name] for name in phase) for phase in PHASES)


def plan(config: Config, gpus: int = 1, fsdp: bool = False) -> Plan:
    """Predict a run. Raises ConfigError for what cannot be run on so many GPUs."""
    config.check(gpus)
    models = architecture(config.model.path) if config.model.path else task_architecture(configured_task(config))
    sampling, optimization = config.sampling, config.optimization
    transformer, dtype = models.transformer, getattr(torch, config.model.frozen_dtype)
    for module in (transformer, *models.text_encoders):
        module.to(dtype)
    factor = models.family.scale_factor(models.vae)
    check_size(models.family, transformer, factor, (config.model.height, config.model.width), "model.")
    check_model(models.family, transformer, config)
    # An adapter that training starts from takes the memory of a new one, and again for its frozen copy.
    trained = make_trainable(models, config)
    images = sampling.prompts_per_iteration * sampling.images_per_prompt
    own = images // gpus
    # The other processes have groups of the same sizes.
    groups = share_rows(images, optimization.updates_per_iteration, gpus)[0] % sampling.prompts_per_iteration
    chunks = groups.split(optimization.micro_batch or own // optimization.updates_per_iteration)
    guided = 2 if models.family.is_guided(sampling.guidance_scale) else 1
    noised = config.loss.is_forward_process
    count = (config.loss.noise_levels if noised else sampling.window) or len(sampling.trained_steps)
    steps = () if noised else sampling.trained_steps[:count]
    shared = min(steps) + 1 if sampling.shared_noise else 0

    def rows(step: int) -> int:
        if step >= shared:
            return own
        return sum(len(group_members(part)[0]) for part in (chunks if step in steps else [groups]))

    # Images that are sampled first, for their masks.
    first = sampling.steps * (len(group_members(groups)[0]) if sampling.shared_noise else own)
    first_rows = first if sampling.explore == "masks" else 0
    update_rows = own * count if noised else guided * sum(rows(step) for step in steps)
    largest = max(len(chunk) for chunk in chunks)
    height, width = config.model.height // factor, config.model.width // factor
    channels, patch = models.family.shape(transformer)
    latents = channels * height * width
    text = models.text_tokens(config.model.max_sequence_length)
    parameters = sum(p.numel() for p in transformer.parameters())
    trained_parameters = sum(p.numel() for p in trained)
    shards = gpus if fsdp else 1
    encoders = sum(count_bytes(encoder.parameters()) for encoder in models.text_encoders)
    embedding = text * transformer.config.joint_attention_dim * dtype.itemsize
    tokens, locations = height * width // patch**2, height * width
    weights = 4 * trained_parameters // shards
    keeps_reference = bool(config.loss.kl_coef) and not config.model.lora_rank
    merged = [m.get_base_layer().weight for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
    memory = {
        "transformer": count_bytes(transformer.parameters()) // shards,
        "text encoders": 0 if config.model.offload_encoders else encoders,
        "text encoders, offloaded": encoders if config.model.offload_encoders else 0,
        "autoencoder": count_bytes(models.vae.parameters()),
        "gradients": weights,
        "optimizer": 8 * trained_parameters // shards,
        "moving average": weights if optimization.ema_decay else 0,
        "old policy": weights if config.loss.keeps_old else 0,
        "reference": weights if keeps_reference else 0,
        # A copy of the trained weights waits while others are written into them. GRPO alone has its graph by then.
        "weights set aside, pass": weights if keeps_reference and not noised else 0,
        "weights set aside, images": weights if config.loss.keeps_old or optimization.ema_decay else 0,
        "merged adapter": count_bytes(merged) if sampling.merge_adapter else 0,
        "measured update": 0 if optimization.update_norm is None else 2 * weights,
        "rollout": 0 if sampling.rollout_device == "cpu" else 3 * len(steps) * own * latents * 4,
        "maps and weights": count * own * (CONCEPTS * tokens + locations) * 4,
        "text": (sampling.prompts_per_iteration + guided - 1) * embedding,
        "decoding": decoding(models, (min(DECODED_AT_ONCE, own), channels, height, width)),
    }
    size = (channels, height, width)
    with faked(transformer):
        with flop_counter() as flops:
            out = predict(models, (1, *size), text, config)
            forward = flops.get_total_flops()
            out.sum().backward()  # with what gradient checkpointing computes again
            backward = flops.get_total_flops() - forward
        saved = SavedBytes(transformer)
        with saved:
            predict(models, (guided * largest, *size), text, config)
        memory["activations"] = saved.bytes
        reference = 0
        if config.loss.kl_coef:
            if config.model.lora_rank:
                transformer.disable_adapters()
            with flop_counter() as flops, torch.no_grad():
                predict(models, (1, *size), text, config)
            reference = flops.get_total_flops()
    return Plan(
        images=images,
        images_per_gpu=own,
        trained_steps=count,
        rollout_rows=guided * (first_rows + sum(rows(step) for step in range(sampling.steps))),
        update_rows=update_rows,
        old_rows=update_rows if noised and has_pass_before(config) else 0,
        reference_rows=update_rows if config.loss.kl_coef else 0,
        forward_flops=forward,
        backward_flops=backward,
        reference_flops=reference,
        parameters=parameters,
        trained_parameters=trained_parameters,
        memory=memory,
    )


def predict(models: Architecture, shape: tuple[int, ...], tokens: int, config: Config) -> Tensor:
    """One forward pass for latents of a shape (B, C, H, W), in the run's precision."""
    mixed = config.optimization.mixed_precision
    precision = None if mixed == "no" else getattr(torch, mixed)
    dtype, shapes = getattr(torch, config.model.frozen_dtype), models.transformer.config
    pooled = shapes.get("pooled_projection_dim")
    text = Text(
        torch.empty(shape[0], tokens, shapes.joint_attention_dim, dtype=dtype),
        None if pooled is None else torch.empty(shape[0], pooled, dtype=dtype),
    )
    latents, timesteps = torch.empty(shape, dtype=dtype), torch.empty(shape[0])
    with torch.autocast("cpu", precision) if precision else nullcontext():
        return models.family.velocity(models.transformer, latents, timesteps, text, config.sampling.guidance_scale)


def decoding(models: Architecture, shape: tuple[int, ...]) -> int:
    """Bytes of the largest layer's input and output while latents of a shape (B, C, H, W) are decoded."""
    largest = 0

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, count_bytes([*(x for x in inputs if isinstance(x, Tensor)), output]))

    handles = [m.register_forward_hook(see) for m in models.vae.decoder.modules() if not list(m.children())]
    with torch.no_grad():
        models.family.decode(models.vae, torch.empty(shape, device="meta"))
    for handle in handles:
        handle.remove()
    return largest
