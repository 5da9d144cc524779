"""The policy: the trained transformer with its optimizer, and the moving average of its weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor

from star.config import Config, ConfigError, Loss, Optimization
from star.training.adapter import REFERENCE, has_reference, start_from
from star.training.checkpoint import CheckpointError
from star.training.checkpoint import load as load_checkpoint
from star.training.distributed import full_tensor, gather_again, shard_like
from star.training.pipeline import TRAINED, make_trainable


class Policy:
    """transformer: as accelerate wraps it for this run; pipeline.transformer is the bare one.

    parameters: what is trained, by name. updates: optimizer steps so far, skipped ones included.
    """

    def __init__(self, pipeline: Any, config: Config, accelerator: Accelerator) -> None:
        self.accelerator, self.bare, self.config = accelerator, pipeline.transformer, config.optimization
        if config.model.adapter:
            start_from(pipeline, config.model)
        trained = make_trainable(pipeline, config)
        optimizer = torch.optim.AdamW(
            trained,
            self.config.learning_rate,
            betas=self.config.betas,
            eps=self.config.adam_epsilon,
            weight_decay=self.config.weight_decay,
        )
        self.transformer, self.optimizer = accelerator.prepare(pipeline.transformer, optimizer)
        self.parameters = {n: p for n, p in self.bare.named_parameters() if p.requires_grad}
        if config.sampling.merge_adapter and any(isinstance(p, DTensor) for p in self.parameters.values()):
            raise ConfigError(
                "sampling.merge_adapter: got True, expected False with weights that are sharded over processes (FSDP)"
            )
        self.updates = 0
        # How many there were when the average and the old policy began: what grows with the updates grows from there.
        self.ema_begin = self.old_begin = 0
        self.ema = None
        if self.config.ema_decay:
            self.ema = EMAModel(self.parameters.values(), decay=self.config.ema_decay)
        self.lag = config.loss
        self.old_parameters: list[Tensor] | None = None
        if config.loss.keeps_old:
            self.old_parameters = [p.detach().clone() for p in self.parameters.values()]
        self.reference_parameters: list[Tensor] | None = None
        if config.loss.kl_coef and not config.model.lora_rank:
            self.reference_parameters = [p.detach().clone() for p in self.parameters.values()]

    def step(self) -> tuple[float, bool, float | None]:
        """Clip the gradients, update and forget them. Returns their norm, whether the update was skipped because it was
        not finite, and, where update_norm is set, the norm of the update before it was rescaled."""
        norm = self.accelerator.clip_grad_norm_(self.transformer.parameters(), self.config.max_grad_norm)
        norm = float(full_tensor(norm))
        skipped = not torch.isfinite(torch.tensor(norm)).item()
        measured, moved = self.config.update_norm is not None, None
        before = [p.detach().clone() for p in self.parameters.values()] if measured else []
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, self.updates)
        # A gradient scaler skips the step itself, and must see it to lower its scale.
        if not skipped or self.accelerator.scaler is not None:
            self.optimizer.step()
            skipped = skipped or self.optimizer.step_was_skipped
        self.optimizer.zero_grad()
        if self.config.update_norm is not None:
            moved = self.rescale(before, self.config.update_norm)
        self.updates += 1
        if self.ema is not None and self.updates % self.config.ema_every == 0:
            # Flow-GRPO's warm-up counts updates, not averages: min(decay, (1 + n) / (10 + n)).
            self.ema.optimization_step = self.updates - self.ema_begin - 1
            self.ema.step(self.parameters.values())
        return norm, skipped, moved

    @torch.no_grad()
    def rescale(self, before: list[Tensor], norm: float) -> float:
        """Rescale the update since `before` to this norm; 0 leaves it. Returns its norm before."""
        way = [p - old for p, old in zip(self.parameters.values(), before, strict=True)]
        length = float(full_tensor(torch.nn.utils.get_total_norm(way)))
        if norm and length:
            for parameter, old, step in zip(self.parameters.values(), before, way, strict=True):
                parameter.copy_(old + step * (norm / length))
        return length

    def averaged(self) -> AbstractContextManager[None]:
        """Within it the transformer has the averaged weights, if an average is kept."""
        return nullcontext() if self.ema is None else self.replaced(self.ema.shadow_params)

    def old(self) -> AbstractContextManager[None]:
        """Within it the transformer has the weights of the old policy, if there is one."""
        return nullcontext() if self.old_parameters is None else self.replaced(self.old_parameters)

    def sampler(self) -> AbstractContextManager[None]:
        """Within it the transformer has the weights of the policy that samples the images."""
        return self.old() if self.lag.old_samples else nullcontext()

    @contextmanager
    def replaced(self, values: list[Tensor]) -> Iterator[None]:
        """Within it the trained weights have other values; neither graph nor optimizer must see them."""
        trained = [p.detach().clone() for p in self.parameters.values()]
        self.overwrite(values)
        try:
            yield
        finally:
            self.overwrite(trained)

    def overwrite(self, values: list[Tensor]) -> None:
        """Write values into the trained weights, unseen by graph and optimizer."""
        _copy(values, self.parameters.values())
        gather_again(self.bare)

    @torch.no_grad()
    def follow(self) -> None:
        """The old policy, if there is one, becomes `decay` of itself and the rest of the policy; the decay grows with
        the updates."""
        if self.old_parameters is None:
            return
        decay = old_decay(self.lag, self.updates - self.old_begin)
        for old, parameter in zip(self.old_parameters, self.parameters.values(), strict=True):
            old.mul_(decay).add_(parameter, alpha=1 - decay)

    def unwrapped(self) -> torch.nn.Module:
        """The transformer as passes without gradients take it: in the run's precision, without its processes."""
        return self.accelerator.unwrap_model(self.transformer)

    @contextmanager
    def reference(self) -> Iterator[torch.nn.Module]:
        """The model before this run, without gradients: with the adapter that it began with, with none, or, where all
        weights are trained, with the weights that it began with."""
        if self.reference_parameters is not None:
            before = self.replaced(self.reference_parameters)
        else:
            before = self.starting_adapter() if has_reference(self.bare) else self.without_adapter()
        with before, torch.no_grad():
            yield self.unwrapped()

    @contextmanager
    def starting_adapter(self) -> Iterator[None]:
        trained = {name: p.requires_grad for name, p in self.bare.named_parameters()}
        self.bare.set_adapter(REFERENCE)
        try:
            yield
        finally:
            self.bare.set_adapter(TRAINED)
            for name, p in self.bare.named_parameters():  # which set_adapter changes
                p.requires_grad_(trained[name])

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        self.bare.disable_adapters()
        try:
            yield
        finally:
            self.bare.enable_adapters()

    @contextmanager
    def merged(self) -> Iterator[None]:
        """Within it the adapter is part of the weights: the same function to rounding, without the adapter's products.

        The plain weights are set aside, not computed back, so that nothing of them is lost.
        """
        layers = [m for m in self.bare.modules() if isinstance(m, BaseTunerLayer)]
        if not layers:
            yield
            return
        plain = [layer.get_base_layer().weight.data for layer in layers]
        try:
            with torch.no_grad():
                for layer, weight in zip(layers, plain, strict=True):
                    layer.get_base_layer().weight.data = weight + layer.get_delta_weight(TRAINED).to(weight.dtype)
            with self.without_adapter(), torch.no_grad():
                yield
        finally:
            for layer, weight in zip(layers, plain, strict=True):
                layer.get_base_layer().weight.data = weight

    def state_dict(self) -> dict[str, Any]:
        """Everything of the policy that the next update depends on, whole tensors on the CPU whatever the number of
        processes. A collective; complete on the first process only."""
        keep = self.accelerator.is_main_process
        optimizer = self.optimizer.state_dict()
        moments = {
            i: {name: full_tensor(x, keep) if isinstance(x, Tensor) else x for name, x in values.items()}
            for i, values in optimizer["state"].items()
        }
        ema = None
        if self.ema is not None:
            ema = self.ema.state_dict() | {"shadow_params": [full_tensor(x, keep) for x in self.ema.shadow_params]}
        return {
            "parameters": {name: full_tensor(p, keep) for name, p in self.parameters.items()},
            "optimizer": {"state": moments, "param_groups": optimizer["param_groups"]},
            "ema": ema,
            "old": None if self.old_parameters is None else [full_tensor(x, keep) for x in self.old_parameters],
            "updates": self.updates,
            "ema_begin": self.ema_begin,
            "old_begin": self.old_begin,
            "scaler": None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict(),
        }

    def fits(self, state: dict[str, Any]) -> bool:
        """Whether a state is of this model and adapter."""
        return _fits(state["parameters"], self.parameters)

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        own = list(self.parameters.values())
        for name, parameter in self.parameters.items():
            parameter.copy_(shard_like(state["parameters"][name], parameter))
        moments = {
            # Adam's moments have the parameter's shape; its step count is a scalar.
            i: {name: shard_like(x, own[i]) if x.shape == own[i].shape else x for name, x in values.items()}
            for i, values in state["optimizer"]["state"].items()
        }
        # The moments are the checkpoint's, the settings this run's.
        groups = [
            {**saved, **{name: group[name] for name in ("lr", "betas", "eps", "weight_decay")}}
            for saved, group in zip(state["optimizer"]["param_groups"], self.optimizer.param_groups, strict=True)
        ]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.ema is not None and state["ema"] is None:
            self.ema = EMAModel(own, decay=self.config.ema_decay)  # an average that begins now
            self.ema_begin = state["updates"]
        elif self.ema is not None:
            self.ema_begin = state.get("ema_begin", 0)
            average = [shard_like(x, p) for x, p in zip(state["ema"]["shadow_params"], own, strict=True)]
            self.ema.load_state_dict({**state["ema"], "shadow_params": average, "decay": self.config.ema_decay})
        if self.old_parameters is not None:
            # A run that was not of this objective begins with itself.
            is_new = not state.get("old")
            self.old_begin = state["updates"] if is_new else state.get("old_begin", 0)
            saved = [state["parameters"][name] for name in self.parameters] if is_new else state["old"]
            self.old_parameters = [shard_like(x, p).clone() for x, p in zip(saved, own, strict=True)]
        if self.accelerator.scaler is not None and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        self.updates = state["updates"]


def _fits(saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> bool:
    return {name: x.shape for name, x in saved.items()} == {name: p.shape for name, p in parameters.items()}


def load_averaged(pipeline: Any, config: Config, path: Path) -> None:
    """Give a fresh pipeline the weights that a run is scored with at a checkpoint: the moving average, if it keeps one.

    config: of the run. Raises CheckpointError for a checkpoint that is damaged or of another model.
    """
    state = load_checkpoint(path)
    if config.model.adapter:
        start_from(pipeline, config.model)
    make_trainable(pipeline, config)
    weights = state["parameters"]
    trained = {name: p for name, p in pipeline.transformer.named_parameters() if p.requires_grad}
    if not _fits(weights, trained):
        raise CheckpointError(f"checkpoint: {path} is of another model or adapter")
    average = weights.values() if state["ema"] is None else state["ema"]["shadow_params"]
    _copy(average, (trained[name] for name in weights))


def old_decay(loss: Loss, updates: int) -> float:
    """The share of itself that the old policy keeps after so many updates. Source: `return_decay` of DiffusionNFT."""
    return min(max(0, updates - loss.old_decay_start) * loss.old_decay_rate, loss.old_decay)


def learning_rate(config: Optimization, updates: int) -> float:
    """The learning rate after so many updates. The first one of a warm-up is not 0, nor is the last one of a run."""
    rise = min(1.0, (updates + 1) / (config.warmup + 1))
    left = max(0.0, 1 - updates / (config.iterations * config.updates_per_iteration))
    falls = {"constant": 1.0, "linear": left, "cosine": (1 - math.cos(math.pi * left)) / 2}
    return config.learning_rate * rise * falls[config.schedule]


def _copy(values: Iterable[Tensor], parameters: Iterable[Tensor]) -> None:
    for value, parameter in zip(values, parameters, strict=True):
        parameter.data.copy_(value)
