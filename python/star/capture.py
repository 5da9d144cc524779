"""Reads concept maps out of a transformer while it runs, without changing a bit of what it computes.

    with capture(transformer, tokens) as maps:
        transformer(...)
    weights = star_kernels.allocate(maps.read(), maps.grid)

`record` does the same around a whole sampler and keeps the maps of every pass; `allocated` makes weights of them at
once and gives them to the gradient of the pass's output.

The attention of the chosen blocks runs as it would (`star.tap`); the kernel of F.scaled_dot_product_attention is asked
for its log-sum-exp as well, and from that and the few key columns of the concepts the maps follow. Where image and text
lie is a row of a table (`star.layouts`). A checkpointed block may be captured, and computed again in a backward pass
outside the context by diffusers' own processor, which saves the same tensors in the same order.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel

from star.concepts import ConceptTokens, Marks, concept_tokens
from star.layouts import Arguments, Batch, Layout, Pass, layout_of
from star.objective import Allocation, allocation_weights, weighted_gradient
from star.tap import Tapped, tapped
from star_kernels import attention_maps
from star_kernels.api import Implementation

NORMALIZATIONS = ("raw", "content", "concepts")
Rows = slice | Sequence[int] | Tensor


def in_backward() -> bool:
    """True while autograd runs, as in the recomputation of a checkpointed block."""
    return torch._C._current_graph_task_id() >= 0


def write_map(
    out: Tensor,
    written: Tensor,
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor,
    lse: Tensor | None,
    head_weight: Tensor | None,
    key_bias: Tensor | None,
    scale: float,
    impl: str,
) -> None:
    """out = attention_maps(...), written = True. Does nothing in a recomputation, so that the backward pass of an old
    forward pass cannot overwrite newer maps."""
    if not in_backward():
        attention_maps(
            query,
            key,
            concept_index,
            concept_weight,
            lse=lse,
            scale=scale,
            head_weight=head_weight,
            key_bias=key_bias,
            out=out,
            impl=impl,  # type: ignore[arg-type]  # a schema of torch.library has no Literal
        )
        written.fill_(True)


# What torch.compile sees. Calling it costs more time than the maps of a small layer, so eager passes do not.
write_maps = torch.library.custom_op("star::write_maps", write_map, mutates_args=("out", "written"))


@write_maps.register_fake
def _(*_: Any) -> None:
    return None


@dataclass(kw_only=True, eq=False)
class Maps:
    """Maps of the last forward pass inside `capture`.

    A pass begins with empty slots: a block that it skips has no map, never that of an older pass.
    """

    tokens: ConceptTokens
    """Concepts of the captured rows."""
    grid: tuple[int, ...] | None = None
    """(rows, columns) of the image tokens, of a video (frames, rows, columns); None until the first pass shows them."""
    rows: slice | Tensor | None = None
    """Rows of the batch that are read; None: all."""
    blocks: tuple[int, ...] = (0,)
    """Number of each captured block, in the order of the slots."""
    layer_weights: Tensor | None = None
    """(L,) one for each captured block; None: equal ones that sum to 1."""
    head_weight: Tensor | None = None
    """(H,); None: equal."""
    normalize: Literal["raw", "content", "concepts"] = "raw"
    """As in `capture`; "content" takes the last concept of `tokens` for the content."""
    lse: bool = True
    """Use the log-sum-exp of the attention kernel."""
    impl: Implementation = "auto"
    """Of `star_kernels.attention_maps`."""
    query_mask: bool = False
    """As in `star.layouts.Layout`."""
    slots: Tensor = field(init=False)
    """(L, B, G, N) float32, NaN where the pass has written nothing yet."""
    written: Tensor = field(init=False)
    """(L,) bool on the CPU."""
    image: int = field(init=False, default=0)
    """The first image token among the queries of the pass."""
    keys: int | None = field(init=False, default=None)
    """How many keys the attention to the text has; None: any number."""
    columns: Tensor = field(init=False)
    """The concepts' tokens among the keys of the pass, as `tokens.index` has them among the texts'."""

    def __post_init__(self) -> None:
        self.text_tokens = int(self.tokens.index.max()) + 1 if self.tokens.index.numel() else 0
        if self.layer_weights is None:
            count = len(self.blocks)
            self.layer_weights = torch.full((count,), 1 / count, dtype=torch.float32, device=self.tokens.index.device)
        self.empty(0 if self.grid is None else math.prod(self.grid))

    def begin(self, shown: Pass) -> None:
        """Empty the slots for a pass. Raises ValueError for tokens beyond its texts."""
        if self.text_tokens > shown.text_tokens():
            raise ValueError(
                f"tokens: point at text token {self.text_tokens - 1}, the model runs {shown.text_tokens()}; "
                "find them with the max_sequence_length of the embeddings"
            )
        self.empty(shown.tokens)
        self.image, self.keys = shown.image, shown.keys
        self.columns = shown.columns(self.tokens.index, slice(None) if self.rows is None else self.rows)

    def empty(self, image_tokens: int) -> None:
        """New slots, of so many image tokens."""
        index = self.tokens.index
        shape = (len(self.blocks), *index.shape[:2], image_tokens)
        self.slots = torch.full(shape, torch.nan, dtype=torch.float32, device=index.device)
        self.written = torch.zeros(len(self.blocks), dtype=torch.bool, device="cpu")

    def move(self, device: torch.device) -> None:
        """Have everything on the device of the block that runs: under offload, and with a model over several devices,
        only the pass shows it."""
        if self.slots.device == device:
            return
        self.tokens = ConceptTokens(*(x.to(device) for x in self.tokens))
        self.slots, self.columns = self.slots.to(device), self.columns.to(device)
        self.rows = self.rows.to(device) if isinstance(self.rows, Tensor) else self.rows
        assert self.layer_weights is not None  # since __post_init__
        self.layer_weights = self.layer_weights.to(device)
        self.head_weight = None if self.head_weight is None else self.head_weight.to(device)

    def layers(self) -> Tensor:
        """(L, B, G, N) float32: mean over the heads of each captured block, normalized; NaN for one that did not run.

        Later passes leave the copy alone."""
        maps = self.slots
        if self.normalize == "content":
            maps, content = maps[:, :, :-1], maps[:, :, -1:]
            maps = maps / content.clamp_min(torch.finfo(maps.dtype).tiny)
        elif self.normalize == "concepts":
            maps = maps / maps.sum(2, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        return maps.clone()

    def read(self) -> Tensor:
        """(B, G, N) float32: weighted mean over the captured blocks, in a copy that later passes leave alone.

        Raises RuntimeError if no pass was made, or one that skipped a captured block."""
        missing = [block for block, done in zip(self.blocks, self.written.tolist(), strict=True) if not done]
        if len(missing) == len(self.blocks):
            raise RuntimeError(f"maps: no pass has run the captured blocks {missing}")
        if missing:
            raise RuntimeError(f"layers: the last pass skipped blocks {missing}; capture others with layers=")
        assert self.layer_weights is not None  # since __post_init__
        return (self.layers() * self.layer_weights[:, None, None, None]).sum(0)


def _key_bias(mask: Tensor, query: Tensor, key: Tensor, rows: slice | Tensor) -> Tensor:
    """(B, S) float32 of an attention mask (B or 1, H or 1, 1, S), boolean or added to the scores, for the rows of the
    maps. Raises ValueError for one that is not the same for all queries."""
    if mask.ndim != 4 or mask.shape[2] != 1:
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected (B, H or 1, 1, {key.shape[2]}): maps need a mask "
            "that is the same for every query"
        )
    bias = mask[:, 0, 0]  # the heads of a mask are copies
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, -torch.inf)
    bias = bias.detach().float()
    return bias[rows] if len(bias) > 1 else bias.expand(len(query), -1)


class Observer:
    """Writes the maps of one block from the attention call that reads the text."""

    def __init__(self, maps: Maps) -> None:
        self.maps = maps
        self.out: Tensor | None = None
        self.written: Tensor | None = None

    def begin(self, number: int) -> None:
        """A pass begins; the block's number among those captured. Only tensors tell the blocks apart while they run, so
        that compiled blocks share a graph."""
        self.number = number
        self.out, self.written = self.maps.slots[number], self.maps.written[number : number + 1]

    def sees(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None) -> None:
        maps = self.maps
        if mask is not None and not isinstance(mask, Tensor):
            raise TypeError(
                f"attention_mask: got a {type(mask).__name__}, expected a tensor; set a processor of the model that "
                "needs none"
            )
        if maps.keys is not None and maps.keys != key.shape[2]:
            return  # attention to something else than the text
        if maps.grid is None or self.out is None or self.written is None:
            raise RuntimeError("transformer: its forward was called; call the module itself, so that its hooks run")
        if self.out.device != query.device:
            maps.move(query.device)
            self.begin(self.number)
        tokens = self.out.shape[-1]
        image = slice(maps.image, maps.image + tokens)
        if image.stop > query.shape[2]:
            raise ValueError(f"grid: {maps.grid} has {tokens} tokens, the model runs {query.shape[2] - maps.image}")
        rows = slice(None) if maps.rows is None else maps.rows
        if mask is not None and maps.query_mask and mask.ndim == 4 and mask.shape[2] == query.shape[2]:
            mask = mask[:, :, image][:, :, :1]  # of the first image token; others have the same
        query, key = query.detach()[rows, :, image], key.detach()[rows]
        if len(query) != len(maps.columns):
            raise ValueError(f"tokens: have {len(maps.columns)} rows, the model runs {len(query)} of those asked for")
        if lse is not None:
            # One kernel pads its rows, another adds a trailing axis.
            lse = lse.detach().flatten(2)[rows, :, image] if maps.lse else None
        write = write_maps if torch.compiler.is_compiling() else write_map
        write(
            out=self.out,
            written=self.written,
            query=query,
            key=key,
            concept_index=maps.columns,
            concept_weight=maps.tokens.weight,
            lse=lse,
            head_weight=maps.head_weight,
            key_bias=None if mask is None else _key_bias(mask, query, key, rows),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            impl=maps.impl,
        )


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
        raise TypeError(f"transformer: block {layer} splits its sequence over devices; its maps would be of a part")
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
    layers = range(default) if layers is None else list(layers)
    if not layers or not all(0 <= layer < len(attentions) for layer in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"layers: got {list(layers)}, expected distinct blocks in 0..{len(attentions) - 1}")
    return {layer: attentions[layer] for layer in layers}


def _with_content_concept(tokens: ConceptTokens) -> ConceptTokens:
    """One more concept: every token of all the others, so that its map is the whole mass of the content."""
    index, weight = tokens
    batch, groups, width = index.shape
    content = torch.full((batch, 1, groups * width), -1, dtype=torch.int64, device=index.device)
    for row, used in zip(content, index.flatten(1), strict=True):
        distinct = used[used >= 0].unique()
        row[0, : len(distinct)] = distinct
    padding = (0, content.shape[2] - width)
    return ConceptTokens(
        torch.cat([F.pad(index, padding, value=-1), content], 1),
        torch.cat([F.pad(weight, padding), (content >= 0).float()], 1),
    )


def _grid(asked: tuple[int, ...] | None, shown: Pass) -> tuple[int, ...]:
    """The grid of a pass: what it shows, or what was asked for, which must agree."""
    if asked is not None and shown.grid is not None and tuple(asked) != shown.grid:
        axes = ("frames", "rows", "columns")[-len(shown.grid) :]
        raise ValueError(f"grid: got {tuple(asked)}, the pass has ({', '.join(axes)}) = {shown.grid}")
    grid = asked or shown.grid
    if grid is None:
        raise ValueError(f"grid: the pass does not show it, give (rows, columns) of its {shown.tokens} image tokens")
    if math.prod(grid) != shown.tokens:
        raise ValueError(f"grid: {tuple(grid)} has {math.prod(grid)} tokens, the model runs {shown.tokens}")
    return tuple(grid)


def _equal(rows: Batch, others: Batch) -> bool:
    """Whether tensors have the same values, NaN for NaN. Waits for the device."""
    if isinstance(rows, Tensor) and isinstance(others, Tensor):
        return rows.shape == others.shape and torch.allclose(rows, others, rtol=0, atol=0, equal_nan=True)
    return all(_equal(row, other) for row, other in zip(rows, others, strict=True))


def _is_guidance(shown: Pass) -> bool:
    """Whether the halves of a batch are the same latents with different texts. Waits for the device."""
    half = len(shown.latents) // 2
    latents, embeds = shown.latents, shown.embeds
    return _equal(latents[:half], latents[half:]) and not _equal(embeds[:half], embeds[half:])


def _inferred_rows(images: int, shown: Pass, conditional: int) -> slice:
    """All rows of a pass, or of twice as many the half with the prompts in diffusers' order."""
    batch = len(shown.latents)
    if batch not in (images, 2 * images):
        raise ValueError(
            f"tokens: got {images} rows, the pass has {batch}; give one row for each image, {batch} of them or "
            f"{batch / 2:g} with guidance, or rows="
        )
    if batch > images and not torch.compiler.is_compiling() and not _is_guidance(shown):
        raise ValueError(
            f"tokens: got {images} rows, the pass has {batch} and no guidance (the same latents with two texts); "
            "give one row for each image, or rows="
        )
    first = 0 if batch == images else conditional * images
    return slice(first, first + images)


def _given_rows(rows: Rows, images: int, shown: Pass, conditional: int) -> slice | Tensor:
    """The rows that were asked for, as a slice where they are neighbors: those are read where they are."""
    batch = len(shown.latents)
    if isinstance(rows, slice):
        chosen = list(range(batch))[rows]
    else:
        chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    if len(chosen) != images or not all(0 <= row < batch for row in chosen):
        raise ValueError(
            f"rows: got {chosen} of the {batch} rows of the pass, expected one for each of the {images} rows of tokens"
        )
    # More images than rows of tokens: with guidance some rows of the wrong half are unconditional.
    half = batch // 2
    wrong = [row for row in chosen if row // max(half, 1) != conditional]
    if batch % 2 == 0 and images < half and wrong and not torch.compiler.is_compiling() and _is_guidance(shown):
        raise ValueError(
            f"rows: got {chosen}, but the pass guides {half} images and its {('last', 'first')[conditional]} {half} "
            "rows are unconditional; give one row of tokens for each image"
        )
    if chosen == list(range(chosen[0], chosen[0] + images)):
        return slice(chosen[0], chosen[0] + images)
    return torch.tensor(chosen, device=shown.latents[0].device)


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
            double-stream ones and leaves them out by default. layer_weights: one for each, default equal.
        head_weight: (H,), default equal.
        normalize: "raw" mass; "content": divided by the mass of all concepts' tokens together; "concepts": divided by
            the sum over the concepts.
        lse: use the log-sum-exp of the attention kernel; otherwise the operator makes its own.
        impl: of `star_kernels.attention_maps`.

    Yields:
        Maps. The model's output has the same bits as without it.

    Raises:
        TypeError: a model or an attention processor that is not known. ValueError: wrong layers or options; in the
        pass a grid or rows that do not fit it.
    """
    model = unwrapped(transformer)
    layout = layout_of(model)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: got {normalize!r}, expected one of {list(NORMALIZATIONS)}")
    blocks = _chosen_attentions(layout, model, layers)
    if layer_weights is not None and len(layer_weights) != len(blocks):
        raise ValueError(f"layer_weights: got {len(layer_weights)}, expected one for each of {len(blocks)} layers")
    if normalize == "content":
        tokens = _with_content_concept(tokens)
    device = next(model.parameters()).device
    if device.type == "meta":  # offloaded; the pass shows where it runs
        device = tokens.index.device
    maps = Maps(
        tokens=ConceptTokens(tokens.index.to(device), tokens.weight.to(device)),
        blocks=tuple(blocks),
        layer_weights=None
        if layer_weights is None
        else torch.tensor(layer_weights, dtype=torch.float32, device=device),
        head_weight=None if head_weight is None else head_weight.to(device),
        normalize=normalize,
        lse=lse,
        impl=impl,
        query_mask=layout.query_mask,
    )
    read, images = layout.reader(model), len(tokens.index)
    names = [*inspect.signature(type(model).forward).parameters][1:]
    chosen: dict[int, slice | Tensor] = {}  # by size of the batch, so that a sampler waits for the device once

    def choose(shown: Pass) -> slice | Tensor:
        half = layout.conditional
        return _inferred_rows(images, shown, half) if rows is None else _given_rows(rows, images, shown, half)

    def begin(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling and in_backward():
            return  # a pass that is computed again
        shown = read(_arguments(names, args, kwargs))
        maps.grid = _grid(grid, shown)
        if not compiling and len(shown.latents) not in chosen:
            chosen[len(shown.latents)] = choose(shown)
        maps.rows = choose(shown) if compiling else chosen[len(shown.latents)]
        maps.begin(shown)
        for number, observer in enumerate(observers):
            observer.begin(number)

    observers = [Observer(maps) for _ in blocks]
    before = {layer: attention.processor for layer, attention in blocks.items()}
    during = [_tapped(*block, observer) for block, observer in zip(before.items(), observers, strict=True)]
    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        for attention, processor in zip(blocks.values(), during, strict=True):
            attention.processor = processor
        yield maps
    finally:
        handle.remove()
        for layer, attention in blocks.items():
            attention.processor = before[layer]


def _tokens(
    prompts: Sequence[str] | ConceptTokens,
    pipeline: DiffusionPipeline | None,
    concepts: Sequence[Marks | None] | None,
    brackets: bool,
) -> ConceptTokens:
    """Tokens that are ready, or those of the prompts."""
    if isinstance(prompts, ConceptTokens):
        if pipeline is not None:
            raise ValueError("pipeline: got one beside ready tokens; leave it out, or give prompts")
        if concepts is not None or brackets:
            raise ValueError("concepts, brackets: got them beside ready tokens; give them to star.concept_tokens")
        return prompts
    if pipeline is None:
        raise ValueError("pipeline: got None, but it is needed to find the tokens of prompts")
    return concept_tokens(pipeline, prompts, concepts=concepts, brackets=brackets)


def _own_maps_allocation(allocation: Allocation | None) -> Allocation:
    """The allocation, which must need nothing but a sample's own maps."""
    allocation = Allocation() if allocation is None else allocation
    if allocation.strategy not in ("attention", "topk", "random"):
        raise ValueError(f"allocation: got strategy {allocation.strategy!r}, expected 'attention', 'topk' or 'random'")
    if allocation.is_limited():
        raise ValueError(
            "allocation: got a noise_window or a warmup, but a pass shows neither sigma nor iteration; "
            "give `blend_weights` the weights and Allocation.strength"
        )
    return allocation


def _batch(velocity: Tensor | list[Tensor]) -> Tensor:
    """(B, C, H, W) of what Z-Image gives, a list of (C, 1, H, W); others as they are."""
    return velocity if isinstance(velocity, Tensor) else torch.stack(velocity).squeeze(2)


def _velocity_weights(allocation: Allocation, maps: Tensor, grid: tuple[int, ...], shape: Sequence[int]) -> Tensor:
    """Weights of the locations of a velocity of that shape, (B', C, [T,] H, W) or packed (B', L, C), for the B rows of
    maps: (B, [T,] H, W) or (B, L) of the image or the video that is denoised."""
    packed = len(shape) == 3
    weights = allocation_weights(allocation, maps, grid, patch=1 if packed else shape[-1] // grid[-1])
    assert weights is not None  # only of the strategy "uniform" there are none
    if packed:
        return weights.flatten(1)
    # A token may stand for several latent frames.
    return weights.repeat_interleave(shape[2] // grid[0], 1) if len(grid) == 3 else weights


@dataclass(eq=False)
class Record:
    """What `record` kept of the passes inside it, in their order."""

    maps: list[Tensor] = field(default_factory=list)
    """(B, G, N) float32 of each pass."""
    grid: tuple[int, ...] | None = None
    """(rows, columns) of the image tokens, of a video (frames, rows, columns); None before the first pass."""
    velocity_shape: tuple[int, ...] = ()
    """Of the passes' output: (B', C, H, W), (B', C, T, H, W) or packed (B', L, C)."""

    def add(self, maps: Tensor, grid: tuple[int, ...], velocity_shape: tuple[int, ...]) -> None:
        """Keep a pass. Raises ValueError if its grid is not that of the others."""
        if self.grid is not None and self.grid != grid:
            raise ValueError(f"grid: got a pass with {grid} after one with {self.grid} in one `record`")
        self.maps.append(maps)
        self.grid, self.velocity_shape = grid, velocity_shape

    def weights(self, allocation: Allocation | None = None, *, steps: Iterable[int] | None = None) -> Tensor:
        """(B, S, H, W) float32 of mean 1 over the locations of each of the S passes; (B, S, T, H, W) for a video and
        (B, S, L) for packed latents.

        allocation: strategy "attention" (the default), "topk" or "random", and options. steps: numbers of the passes,
        for a trainer that trains on some of them; None: all. Raises ValueError for another strategy or a number that
        no pass has, RuntimeError if no pass was made yet."""
        allocation = _own_maps_allocation(allocation)
        if self.grid is None:
            raise RuntimeError("weights: no pass was made inside `record` yet")
        chosen = range(len(self.maps)) if steps is None else [int(step) for step in steps]
        if not chosen or not all(0 <= step < len(self.maps) for step in chosen):
            raise ValueError(f"steps: got {list(chosen)}, expected numbers of passes in 0..{len(self.maps) - 1}")
        maps = [self.maps[step] for step in chosen]
        weights = [_velocity_weights(allocation, each, self.grid, self.velocity_shape) for each in maps]
        return torch.stack(weights, 1)


@contextmanager
def record(
    transformer: torch.nn.Module,
    prompts: Sequence[str] | ConceptTokens,
    pipeline: DiffusionPipeline | None = None,
    *,
    concepts: Sequence[Marks | None] | None = None,
    brackets: bool = False,
    grid: tuple[int, ...] | None = None,
    rows: Rows | None = None,
    layers: Sequence[int] | None = None,
    normalize: Literal["raw", "content", "concepts"] = "raw",
) -> Iterator[Record]:
    """Concept maps of every forward pass inside the context, in order: one for each step of a trainer's sampler.

        with star.record(pipeline.transformer, prompts, pipeline) as record:
            images = pipeline(prompts, ...)
        weights = record.weights()  # (B, steps, H, W)

    Args:
        transformer: the very module that the sampler calls, in whatever wrapper.
        prompts, pipeline, concepts, brackets: as in `allocated`.
        grid, rows, layers, normalize: of `capture`.

    Yields:
        A Record that each pass adds its maps to.

    Raises:
        What `capture` and `Maps.read` raise. RuntimeError: no pass was made through this module.
    """
    result = Record()
    tokens = _tokens(prompts, pipeline, concepts, brackets)
    with capture(transformer, tokens, grid=grid, rows=rows, layers=layers, normalize=normalize) as maps:

        def keep(module: torch.nn.Module, arguments: tuple, output: Any) -> None:
            velocity = _batch(output[0])
            assert maps.grid is not None  # the pass has shown it
            result.add(maps.read().to(velocity.device), maps.grid, tuple(velocity.shape))

        handle = transformer.register_forward_hook(keep)
        try:
            yield result
        finally:
            handle.remove()
    if not result.maps:
        raise RuntimeError("transformer: made no pass inside `record`; give it the module that the sampler calls")


def _repeat_for_rows(weights: Tensor, rows: slice | Tensor, batch: int) -> Tensor:
    """Weights of the rows that were read -> of all rows of the batch: the unconditional row of an image gets the
    weights of its conditional one."""
    images = len(weights)
    if not isinstance(rows, slice) or rows.start % images or batch % images:
        shown = [rows.start, rows.stop - 1] if isinstance(rows, slice) else rows.tolist()
        raise ValueError(f"rows: got {shown} of {batch}; weights need all of the conditional rows, one after the other")
    return weights.repeat(batch // images, *(1,) * (weights.ndim - 1))


@contextmanager
def allocated(
    transformer: torch.nn.Module,
    prompts: Sequence[str] | ConceptTokens,
    pipeline: DiffusionPipeline | None = None,
    *,
    concepts: Sequence[Marks | None] | None = None,
    brackets: bool = False,
    grid: tuple[int, ...] | None = None,
    rows: Rows | None = None,
    layers: Sequence[int] | None = None,
    normalize: Literal["raw", "content", "concepts"] = "raw",
    allocation: Allocation | None = None,
    first_pass: bool = False,
) -> Iterator[Maps]:
    """Inside the context the transformer's output has its own values and a gradient weighted by its own maps.

        with star.allocated(transformer, prompts, pipeline):
            noise_pred = transformer(...)

    For an update whose loss is made elsewhere: nothing else changes, and nothing has to be stored. Also a decorator.

    Args:
        transformer: the very module that is called, in whatever wrapper.
        prompts: one for each image of the batch. Or their tokens, from `star.concept_tokens` or
            `star.concepts.locate`: needed where the embeddings were made otherwise than by the pipeline's call with its
            defaults, as with another max_sequence_length or an image; then without pipeline.
        pipeline: of diffusers, whose call would encode the prompts; its text encoders are not needed.
        concepts, brackets: of `star.concept_tokens`. With brackets the embeddings must be of the prompts without them.
        grid, layers, normalize: of `capture`.
        rows: of `capture`; all of the conditional rows, one after the other. With guidance in one batch the
            unconditional rows get their weights too: guidance is linear, so that weights the guided velocity.
        allocation: strategy "attention" (the default) or "random", and options.
        first_pass: every pass inside the context gets the weights of the first, and no later one is read, whose texts
            may be shorter: for guidance in two passes, the conditional one before the unconditional one.

    Yields:
        The Maps of the last pass; with first_pass of the first.

    Raises:
        What `capture` and `Maps.read` raise. ValueError: another strategy, prompts without a pipeline or a pipeline
        without prompts; in the pass an output that does not fit the grid.
    """
    allocation = _own_maps_allocation(allocation)
    tokens = _tokens(prompts, pipeline, concepts, brackets)
    last = layout_of(unwrapped(transformer)).last
    weights: Tensor | None = None  # of the last pass, or with first_pass of the first
    with ExitStack() as capturing:
        maps = capturing.enter_context(
            capture(transformer, tokens, grid=grid, rows=rows, layers=layers, normalize=normalize)
        )

        def weight(module: torch.nn.Module, arguments: tuple, output: Any) -> Any:
            nonlocal weights
            velocity = _batch(output[0])
            if not (velocity.requires_grad or first_pass):
                return None
            assert maps.grid is not None and maps.rows is not None  # the pass has shown them
            if weights is None or not first_pass:
                weights = _velocity_weights(allocation, maps.read().to(velocity.device), maps.grid, velocity.shape)
            if first_pass:
                capturing.close()
            if not velocity.requires_grad:
                return None
            every = _repeat_for_rows(weights, maps.rows, len(velocity))
            if every.ndim == 2:  # packed, with the reference images' tokens and the text's, which nobody reads
                others = velocity.shape[1] - every.shape[1]
                every = F.pad(every, (others, 0) if last else (0, others), value=1.0)
            velocity = weighted_gradient(velocity, every)
            result = velocity if isinstance(output[0], Tensor) else [*velocity.unsqueeze(2)]
            return (result, *output[1:]) if isinstance(output, tuple) else replace(output, sample=result)

        handle = transformer.register_forward_hook(weight)
        try:
            yield maps
        finally:
            handle.remove()
