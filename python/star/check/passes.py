"""The forward passes that a pipeline makes, kept so that they can be made again in other ways."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from star.capture.blocks import unwrapped
from star.layouts import Layout, Pass, layout_of


@dataclass(frozen=True)
class Arguments:
    """Of one forward pass."""

    args: tuple
    kwargs: dict[str, Any]

    def row(self, rows: Sequence[int], batch: int) -> Arguments:
        """Those of some rows of the batch; what has not one entry for each row is shared."""
        shared = {name: value for name, value in self.kwargs.items() if name.endswith("_ids")}  # of positions
        own = {name: _rows(value, rows, batch) for name, value in self.kwargs.items()}
        return Arguments(tuple(_rows(value, rows, batch) for value in self.args), own | shared)


def _rows(value: Any, rows: Sequence[int], batch: int) -> Any:
    if isinstance(value, Tensor) and value.ndim and len(value) == batch:
        return value[list(rows)]
    return [value[row] for row in rows] if isinstance(value, list) and len(value) == batch else value


@dataclass(frozen=True)
class Passes:
    """What a pipeline's denoising of B prompts asked its transformer for.

    steps: the passes of each step, two where the pipeline guides in two. sigmas: (S+1,) of the schedule. scale: of its
    guidance, if it has one.
    """

    transformer: torch.nn.Module
    images: int
    steps: tuple[tuple[Arguments, ...], ...]
    sigmas: Tensor
    scale: float

    @property
    def layout(self) -> Layout:
        return layout_of(unwrapped(self.transformer))

    def shown(self, one: Arguments) -> Pass:
        """What a pass shows of its texts and images."""
        model = unwrapped(self.transformer)
        names = [*inspect.signature(type(model).forward).parameters][1:]
        given = dict(zip(names, one.args, strict=False)) | one.kwargs
        return self.layout.reader(model)(given.get)

    @property
    def guidance(self) -> float | None:
        """The scale by which conditional and unconditional outputs are combined; None where they are not."""
        first = self.steps[0]
        guided = len(first) == 2 or len(self.shown(first[0]).latents) == 2 * self.images
        return self.scale if guided else None

    def rows(self, shown: Pass) -> slice:
        """The rows of the prompts in a pass."""
        first = self.layout.conditional * self.images if len(shown.latents) == 2 * self.images else 0
        return slice(first, first + self.images)

    def output(self, one: Arguments) -> Tensor:
        """What the transformer gives in a pass, in one tensor."""
        return first_tensor(self.transformer(*one.args, **one.kwargs))

    def velocity(self, step: int, alone: bool = False) -> Tensor:
        """(B, ...) float32, guided as the pipeline does, of what is denoised. alone: each image in its own pass."""
        outputs = [self._each_alone(one) if alone else self.output(one) for one in self.steps[step]]
        tokens = self.shown(self.steps[step][0]).tokens
        if outputs[0].ndim == 3 and outputs[0].shape[1] > tokens:  # packed, with an edit's reference beside
            own = slice(-tokens, None) if self.layout.last else slice(tokens)
            outputs = [output[:, own] for output in outputs]
        conditional, *others = outputs
        if not others and len(conditional) == 2 * self.images:
            halves = conditional.chunk(2)
            conditional, others = halves[self.layout.conditional], [halves[1 - self.layout.conditional]]
        conditional = conditional.float()
        return others[0].float() + self.scale * (conditional - others[0].float()) if others else conditional

    def _each_alone(self, one: Arguments) -> Tensor:
        batch = len(self.shown(one).latents)
        parts = [tuple(range(image, batch, self.images)) for image in range(self.images)]
        outputs = [self.output(one.row(rows, batch)) for rows in parts]
        order = [row for rows in parts for row in rows]
        return torch.cat(outputs)[torch.tensor(order).argsort().to(outputs[0].device)]


def first_tensor(output: Any) -> Tensor:
    """The first tensor of a transformer's output; the images of a list in one."""
    while not isinstance(output, Tensor):
        if isinstance(output, list) and output and all(isinstance(one, Tensor) for one in output):
            return torch.stack(output)
        output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
    return output


def record(pipeline: Any, prompts: Sequence[str], call: Mapping[str, Any]) -> Passes:
    """The passes of one call of a pipeline, whose images are not decoded; of two transformers those of the first that
    runs. call: what the pipeline is given besides prompts."""
    kept: list[tuple[torch.nn.Module, Arguments]] = []

    def keep(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        kept.append((module, Arguments(*_copies((args, kwargs)))))

    models = [getattr(pipeline, name, None) for name in ("transformer", "transformer_2")]
    handles = [m.register_forward_pre_hook(keep, with_kwargs=True) for m in models if isinstance(m, torch.nn.Module)]
    try:
        pipeline(prompt=list(prompts), output_type="latent", **call)
    finally:
        for handle in handles:
            handle.remove()
    count = call["num_inference_steps"]
    each, rest = divmod(len(kept), count)
    if not each or rest:
        raise ValueError(
            f"pipeline: made {len(kept)} passes of its transformer in {count} steps, expected as many in each step"
        )
    every = [kept[step * each : step * each + min(each, 2)] for step in range(count)]
    # Wan 2.2 leaves the later steps to a second transformer.
    steps = tuple(tuple(one for _, one in step) for step in every if step[0][0] is kept[0][0])
    sigmas = _sigmas(pipeline, count)[: len(steps) + 1]
    return Passes(kept[0][0], len(prompts), steps, sigmas, _scale(pipeline, call))


def _copies(value: Any) -> Any:
    """Tensors as they are now: a sampler may write into its latents."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, list | tuple):
        return type(value)(_copies(one) for one in value) if type(value) in (list, tuple) else value
    return {name: _copies(one) for name, one in value.items()} if isinstance(value, dict) else value


def _sigmas(pipeline: Any, count: int) -> Tensor:
    """(S+1,) of the pipeline's schedule; evenly spaced ones where it does not show any that decrease from 1 to 0."""
    sigmas = getattr(pipeline.scheduler, "sigmas", None)
    if isinstance(sigmas, Tensor) and len(sigmas) == count + 1:
        sigmas = sigmas.detach().double().cpu()
        if bool((sigmas.diff() < 0).all()) and sigmas[0] <= 1 and sigmas[-1] >= 0:
            return sigmas
    return torch.linspace(1, 0, count + 1, dtype=torch.float64)


def _scale(pipeline: Any, call: Mapping[str, Any]) -> float:
    """Of the guidance of a call: Qwen-Image's by its name, a guider's, else what the pipeline has kept."""
    true = inspect.signature(type(pipeline).__call__).parameters.get("true_cfg_scale")
    kept = getattr(getattr(pipeline, "guider", None) or pipeline, "guidance_scale", None)
    scale = kept if true is None else call.get("true_cfg_scale", true.default)
    return float(scale) if isinstance(scale, int | float) else 1.0
