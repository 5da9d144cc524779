"""`capture`: the blocks of a model that are seen while they run."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from star.capture.graph import in_backward, numbered, observe_attention, outside
from star.capture.maps import Maps, checked_tokens
from star.capture.passes import Passes
from star.concepts import ConceptTokens
from star.layouts import Arguments, Layout, layout_of
from star.tap import PARALLEL, Tapped, tapped
from star_kernels.api import Implementation
from star_kernels.checks import checked_integers, shown

NORMALIZATIONS = ("raw", "content", "concepts")
Rows = slice | Sequence[int] | Tensor


class Observer:
    """Writes the maps of one block from the attention call that reads the text.

    number: of the block among those captured."""

    def __init__(self, maps: Maps, number: int) -> None:
        self.maps, self.number = maps, number
        self.known_as = numbered(self)

    def sees(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None) -> None:
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"attention_mask: got a {type(mask).__name__}, expected a tensor; set a processor of the model that "
                "needs none"
            )
        if torch.compiler.is_compiling():
            lse = None if lse is None else lse.detach()
            observe_attention(self.known_as, query.detach(), key.detach(), mask, scale, lse)
        elif not in_backward():  # else the backward pass of an old forward pass could overwrite newer maps
            if torch._C._are_functorch_transforms_active():  # which forbid to write the slots
                with torch._C._DisableFuncTorch():
                    self.write(*map(outside, (query, key, mask, scale, lse)))
            else:
                self.write(query, key, mask, scale, lse)

    def write(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None) -> None:
        if self.maps.keys is None or self.maps.keys == key.shape[2]:  # else attention to something else than the text
            self.maps.write(self.number, query, key, mask, scale, lse)


def unwrapped(model: Any) -> torch.nn.Module:
    """The model inside torch.compile's, DistributedDataParallel's, FullyShardedDataParallel's and PEFT's wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel | FullyShardedDataParallel):
            model = model.module
        elif hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def _tapped(layer: int, processor: Any, observer: Observer) -> Any:
    """The processor of a block, seen by the observer. Raises TypeError where that gives no maps."""
    if isinstance(processor, Tapped):
        raise TypeError(f"transformer: block {layer} is captured already; leave that `capture` first")
    if getattr(processor, "_parallel_config", None) is not None:
        raise TypeError(f"transformer: block {layer} {PARALLEL}")
    try:
        return tapped(processor, observer)
    except TypeError as error:
        raise TypeError(f"transformer: block {layer}: {error}") from error


def _arguments(names: Sequence[str], args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a forward pass by their names, however they were given."""
    given = {**dict(zip(names[: len(args)], args, strict=True)), **kwargs}  # torch 2.6 can trace this form
    return given.get


def _chosen_attentions(layout: Layout, model: torch.nn.Module, layers: Sequence[int] | None) -> dict[int, Any]:
    """The attention modules to capture by the numbers of their blocks."""
    attentions = layout.attentions(model)
    default = len(attentions) if layout.default is None else layout.default(model)
    layers = range(default) if layers is None else checked_integers("layers", layers, "numbers of blocks")
    if not layers or not all(0 <= layer < len(attentions) for layer in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"layers: got {list(layers)}, expected distinct blocks in 0..{len(attentions) - 1}")
    return {layer: attentions[layer] for layer in layers}


def _checked_shares(layer_weights: Any, layers: int) -> Tensor:
    """(L,) float32 of as many numbers as there are layers."""
    expected = f"one for each of {layers} layers"
    try:
        shares = torch.as_tensor(layer_weights, dtype=torch.float32, device="cpu")
    except (TypeError, ValueError):
        raise TypeError(f"layer_weights: got {shown(layer_weights)}, expected {expected}") from None
    if shares.shape != (layers,):
        got = len(shares) if shares.ndim else shown(layer_weights)
        raise ValueError(f"layer_weights: got {got}, expected {expected}")
    numbers = shares.tolist()
    if not all(0 <= number < math.inf for number in numbers) or not any(numbers):
        raise ValueError(f"layer_weights: got {numbers}, expected finite numbers >= 0, not all 0")
    return shares


@contextmanager
def capture(
    transformer: torch.nn.Module,
    tokens: ConceptTokens,
    *,
    grid: tuple[int, ...] | None = None,
    rows: Rows | None = None,
    layers: Sequence[int] | None = None,
    layer_weights: Sequence[float] | None = None,
    head_weight: Tensor | None = None,
    normalize: Literal["raw", "content", "concepts"] = "raw",
    lse: bool = True,
    impl: Implementation = "auto",
) -> Iterator[Maps]:
    """Capture concept maps of every forward pass of `transformer` inside the context; the last one is kept.

    Args:
        transformer: of a class in `star.layouts.LAYOUTS`, with adapters or without, compiled or not, also inside
            DistributedDataParallel, offloaded or over several devices (the maps are then on the device of the last
            captured block). Only the attention processors of the chosen blocks are exchanged, and put back whatever
            happens.
        tokens: concepts of the captured rows, one row for each image, from `star.concept_tokens`.
        grid: (rows, columns) of the image tokens, of a video (frames, rows, columns): latent height and width over the
            patch size. None: what the pass shows. Needed for packed latents whose img_ids are not diffusers', and for a
            FLUX compiled as a whole.
        rows: rows of the batch to read. None: all of them; in a batch of twice as many rows as tokens the half that is
            the conditional one in the order of diffusers' pipeline.
        layers: numbers of blocks, default all that read text; FLUX counts its single-stream blocks after the
            double-stream ones and leaves them out by default.
        layer_weights: one for each, default equal.
        head_weight: (H,), default equal.
        normalize: "raw" mass; "content": divided by the mass of all concepts' tokens together; "concepts": divided by
            the sum over the concepts.
        lse: use the log-sum-exp of the attention kernel; otherwise the operator makes its own.
        impl: of `star_kernels.attention_maps`.

    Yields:
        Maps. The model's output has the same bits as without it.

    Raises:
        TypeError: a model or an attention processor that is not known, options that are no numbers.
        ValueError: wrong layers or options; in the pass a grid or rows that do not fit it.
    """
    model, tokens = unwrapped(transformer), checked_tokens(tokens)
    layout = layout_of(model)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: got {normalize!r}, expected one of {list(NORMALIZATIONS)}")
    blocks = _chosen_attentions(layout, model, layers)
    shares = None if layer_weights is None else _checked_shares(layer_weights, len(blocks))
    if head_weight is not None and not isinstance(head_weight, Tensor):
        raise TypeError(f"head_weight: got {type(head_weight).__name__}, expected a tensor (H,)")
    if grid is not None:
        grid = tuple(checked_integers("grid", grid, "(rows, columns) or (frames, rows, columns)"))
    chosen = rows
    if chosen is not None and not isinstance(chosen, slice):
        chosen = checked_integers("rows", chosen, "numbers of rows, or a slice")
    if getattr(model, "_parallel_config", None) is not None:
        raise TypeError(f"transformer: {PARALLEL}")
    device = next(model.parameters()).device
    if device.type == "meta":  # offloaded; the pass shows where it runs
        device = tokens.index.device
    maps = Maps(
        tokens=tokens,
        blocks=tuple(blocks),
        layer_weights=None if shares is None else shares.to(device, non_blocking=True),
        head_weight=None if head_weight is None else head_weight.to(device, non_blocking=True),
        normalize=normalize,
        lse=lse,
        impl=impl,
        device=device,
        query_mask=layout.query_mask,
    )
    passes = Passes(maps, layout.reader(model), layout.conditional, grid, chosen)
    names = [*inspect.signature(type(model).forward).parameters][1:]

    def begin(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if module is model:  # a deep copy takes its hooks along
            passes.show(_arguments(names, args, kwargs))

    observers = [Observer(maps, number) for number in range(len(blocks))]
    before = {layer: attention.processor for layer, attention in blocks.items()}
    during = [_tapped(*block, observer) for block, observer in zip(before.items(), observers, strict=True)]
    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        for attention, processor in zip(blocks.values(), during, strict=True):
            attention.processor = processor
        yield maps
    finally:
        handle.remove()
        for (layer, attention), processor in zip(blocks.items(), during, strict=True):
            if attention.processor is processor:  # else another was set meanwhile
                attention.processor = before[layer]
