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

import torch
from diffusers import AutoencoderKL, SD3Transformer2DModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from star.config import Config, ConfigError
from star.training.distributed import share_rows
from star.training.forward_process import has_pass_before
from star.training.pipeline import check_files, make_trainable, reason
from star.training.rollout import DECODED_AT_ONCE, group_members
from star.training.task import Task, configured_task

CONCEPTS = 3  # of a prompt, for the size of the maps; GenEval's have one or two

_MEDIUM: dict[str, Any] = {
    "num_layers": 24,
    "num_attention_heads": 24,
    "caption_projection_dim": 1536,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
}
_LARGE: dict[str, Any] = dict(
    num_layers=38, num_attention_heads=38, caption_projection_dim=2432, pos_embed_max_size=192
)
# Public models that need an account to download even their configuration.
KNOWN = {"stabilityai/stable-diffusion-3.5-medium": _MEDIUM, "stabilityai/stable-diffusion-3.5-large": _LARGE}
_SD35: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "qk_norm": "rms_norm",
}


@dataclass(frozen=True)
class Architecture:
    """Models without weights, on the meta device."""

    transformer: SD3Transformer2DModel
    vae: AutoencoderKL
    text_encoders: tuple[nn.Module, ...]
    clip_tokens: int = 77


def _clip(width: int, layers: int) -> CLIPTextModelWithProjection:
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            projection_dim=width,
        )
    )


def task_architecture(task: Task) -> Architecture:
    """Of a task's pipeline, which is loaded for it."""
    pipeline = task.pipeline("cpu", torch.float32)
    encoders = [e for e in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.text_encoder_3) if e is not None]
    return Architecture(
        pipeline.transformer.to("meta"),
        pipeline.vae.to("meta"),
        tuple(encoder.to("meta") for encoder in encoders),
        clip_tokens=pipeline.tokenizer.model_max_length,
    )


def architecture(path: str) -> Architecture:
    """Of a known public model or a pipeline's folder. Raises ConfigError for anything else."""
    with torch.device("meta"):
        if path in KNOWN:
            vae = AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 4,
                up_block_types=("UpDecoderBlock2D",) * 4,
                block_out_channels=(128, 256, 512, 512),
                layers_per_block=2,
                latent_channels=16,
                use_quant_conv=False,
                use_post_quant_conv=False,
            )
            t5 = T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, vocab_size=32128,
                          feed_forward_proj="gated-gelu")  # fmt: skip
            known = (_clip(768, 12), _clip(1280, 32), T5EncoderModel(t5))
            return Architecture(SD3Transformer2DModel(**_SD35, **KNOWN[path]), vae, known)
        folder = Path(path).expanduser()
        if not (folder / "model_index.json").is_file():
            raise ConfigError(f"model.path: got {path!r}, expected a pipeline's folder or one of {sorted(KNOWN)}")
        check_files(folder, weights=False)
        try:
            return _folder_architecture(folder)
        except Exception as error:  # of a damaged file the libraries raise many kinds
            raise ConfigError(f"model.path: {path!r} cannot be loaded ({reason(error)})") from error


def _folder_architecture(folder: Path) -> Architecture:
    transformer = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(folder, subfolder="transformer"))
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(folder, subfolder="vae"))
    encoders: list[nn.Module] = [
        CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(folder / name))
        for name in ("text_encoder", "text_encoder_2")
    ]
    if (folder / "text_encoder_3").is_dir():
        encoders.append(T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder_3")))
    return Architecture(transformer, vae, tuple(encoders))


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
    """Of one iteration. rows: images times steps, of one GPU, twice with guidance. trained_steps: of an image; for
    the forward process its noise levels. old_rows: of the passes there that go before those with gradients. memory:
    bytes of one GPU."""

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
        """Of the transformer."""
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
    # One that training starts from takes what a new one takes, and once more for its frozen copy.
    trained = make_trainable(_Parts(transformer, models.vae, *models.text_encoders), config)
    images = sampling.prompts_per_iteration * sampling.images_per_prompt
    own = images // gpus
    # Every process has the like of the first one's.
    groups = share_rows(images, optimization.updates_per_iteration, gpus)[0] % sampling.prompts_per_iteration
    chunks = groups.split(optimization.micro_batch or own // optimization.updates_per_iteration)
    guided = 2 if sampling.guidance_scale > 1 else 1
    noised = config.loss.objective != "grpo"
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
    factor = 2 ** (len(models.vae.config.block_out_channels) - 1)
    height, width = config.model.height // factor, config.model.width // factor
    latents = transformer.config.in_channels * height * width
    patch = transformer.config.patch_size
    text = models.clip_tokens + config.model.max_sequence_length
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
        # The trained weights wait while others have their place. GRPO alone has its graph by then.
        "weights set aside, pass": weights if keeps_reference and not noised else 0,
        "weights set aside, images": weights if config.loss.keeps_old or optimization.ema_decay else 0,
        "merged adapter": count_bytes(merged) if sampling.merge_adapter else 0,
        "measured update": 0 if optimization.update_norm is None else 2 * weights,
        "rollout": 0 if sampling.rollout_device == "cpu" else 3 * len(steps) * own * latents * 4,
        "maps and weights": count * own * (CONCEPTS * tokens + locations) * 4,
        "text": (sampling.prompts_per_iteration + guided - 1) * embedding,
        "decoding": decoding(models.vae, min(DECODED_AT_ONCE, own), height, width),
    }
    size = (transformer.config.in_channels, height, width)
    with faked(transformer):
        with flop_counter() as flops:
            out = predict(transformer, 1, size, text, config)
            forward = flops.get_total_flops()
            out.sum().backward()  # with what gradient checkpointing computes again
            backward = flops.get_total_flops() - forward
        saved = SavedBytes(transformer)
        with saved:
            predict(transformer, guided * largest, size, text, config)
        memory["activations"] = saved.bytes
        reference = 0
        if config.loss.kl_coef:
            if config.model.lora_rank:
                transformer.disable_adapters()
            with flop_counter() as flops, torch.no_grad():
                predict(transformer, 1, size, text, config)
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


@dataclass(frozen=True)
class _Parts:
    """What make_trainable takes of a pipeline."""

    transformer: nn.Module
    vae: nn.Module
    text_encoder: nn.Module
    text_encoder_2: nn.Module
    text_encoder_3: nn.Module | None = None


def predict(transformer: nn.Module, rows: int, size: tuple[int, ...], text: int, config: Config) -> Tensor:
    """One forward pass, in the run's precision."""
    mixed = config.optimization.mixed_precision
    precision = None if mixed == "no" else getattr(torch, mixed)
    dtype = getattr(torch, config.model.frozen_dtype)
    shapes: Any = transformer.config
    with torch.autocast("cpu", precision) if precision else nullcontext():
        return transformer(
            torch.empty(rows, *size, dtype=dtype),
            torch.empty(rows, text, shapes.joint_attention_dim, dtype=dtype),
            torch.empty(rows, shapes.pooled_projection_dim, dtype=dtype),
            torch.empty(rows),
            return_dict=False,
        )[0]


def decoding(vae: AutoencoderKL, images: int, height: int, width: int) -> int:
    """Bytes of the largest layer's input and output."""
    largest = 0

    def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal largest
        largest = max(largest, count_bytes([*inputs, output]))

    handles = [m.register_forward_hook(see) for m in vae.decoder.modules() if not list(m.children())]
    with torch.no_grad():
        vae.decode(torch.empty(images, vae.config.latent_channels, height, width, device="meta"))
    for handle in handles:
        handle.remove()
    return largest
