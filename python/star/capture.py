"""Reads concept maps out of a transformer while it runs, without changing a bit of what it computes.

    with capture(transformer, tokens) as maps:
        transformer(...)
    weights = star_kernels.allocate(maps.read(), maps.grid)

`record` does the same around a whole sampler and keeps the maps of every pass; `allocated` makes weights of them at
once and gives them to the gradient of the pass's output.

The attention of the chosen blocks runs as it would (`star.tap`); its kernel also returns the log-sum-exp, from which
the maps follow with the few key columns of the concepts. The table `star.layouts` says where image and text lie. A
checkpointed block may be captured. A backward pass outside the context recomputes it with diffusers' own processor,
which saves the same tensors in the same order.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor
from torch._C import _functorch as functorch
from torch.distributed.fsdp import FullyShardedDataParallel

from star.concepts import ConceptTokens, Marks, concept_tokens
from star.layouts import Arguments, Batch, Layout, Pass, layout_of
from star.objective import Allocation, allocation_weights, weighted_gradient
from star.tap import PARALLEL, Tapped, tapped
from star_kernels.api import Implementation, Part, checked_attention_maps

__all__ = ["Maps", "Record", "allocated", "capture", "record"]

NORMALIZATIONS = ("raw", "content", "concepts")
Rows = slice | Sequence[int] | Tensor
BEYOND = 2**62  # a column that no key is at: its map is NaN

# torch.compile burns what it finds on an object into the graph: sizes, offsets, every tensor's shape. A compiled block
# therefore knows its observer by a number alone, whose value is not looked at: nothing of a prompt is in its graph, and
# nothing is compiled again for another prompt.
_numbers = itertools.count()
_by_number: WeakValueDictionary[int, Any] = WeakValueDictionary()


def numbered(value: Any) -> Tensor:
    """(1,) int64 on the CPU: the number by which a graph finds a value that lives outside of it."""
    number = next(_numbers)
    _by_number[number] = value
    return torch.tensor([number], device="cpu")


def checked_tokens(tokens: Any) -> ConceptTokens:
    """Raises TypeError or ValueError for what are no concepts' tokens."""
    if not isinstance(tokens, tuple) or len(tokens) != 2 or not all(isinstance(x, Tensor) for x in tokens):
        raise TypeError(
            f"tokens: got {type(tokens).__name__}, expected ConceptTokens; star.concept_tokens makes them of prompts"
        )
    index, weight = tokens
    if index.dtype != torch.int64 or not weight.is_floating_point():
        raise TypeError(
            f"tokens: got an index of {index.dtype} and weights of {weight.dtype}, expected torch.int64 and floats"
        )
    if index.ndim != 3 or weight.shape != index.shape:
        raise ValueError(
            f"tokens: got an index {tuple(index.shape)} and weights {tuple(weight.shape)}, expected (B, G, K) of both"
        )
    return ConceptTokens(index, weight)


def outside(value: Any) -> Any:
    """A tensor, or a list with some, without the wrappers of torch.func's transforms.

    Raises TypeError for one that torch.func.vmap has taken the batch of."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(outside, value))
    while isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            raise TypeError(
                "transformer: got a pass under torch.func.vmap, which hides its batch; call it with the whole batch"
            )
        value = functorch.get_unwrapped(value)
    return value


def in_backward() -> bool:
    """True while autograd runs, as in the recomputation of a checkpointed block."""
    return torch._C._current_graph_task_id() >= 0


# What torch.compile sees. Both are said to change the number, so that neither is left out nor comes out of order.
@torch.library.custom_op("star::begin_pass", mutates_args=("number",))
def begin_pass(
    number: Tensor,
    latents: Sequence[Tensor],
    stacked_latents: bool,
    embeds: Sequence[Tensor],
    stacked_embeds: bool,
    tokens: int,
    grid: Sequence[int],
    image: int,
    text: int,
    text_keys: Tensor | None,
    keys: int,
) -> None:
    shown = Pass(
        latents[0] if stacked_latents else latents,
        embeds[0] if stacked_embeds else embeds,
        tokens,
        tuple(grid) or None,
        image,
        text if text_keys is None else text_keys,
        None if keys < 0 else keys,
    )
    _by_number[int(number)].begin(shown)


@torch.library.custom_op("star::observe_attention", mutates_args=("number",))
def observe_attention(
    number: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None
) -> None:
    if not in_backward():  # when the observer may be gone
        _by_number[int(number)].write(query, key, mask, scale, lse)


@begin_pass.register_fake
def _(*_: Any) -> None:
    return None


@observe_attention.register_fake
def _(*_: Any) -> None:
    return None


@dataclass(kw_only=True, eq=False)
class Maps:
    """Maps of the last forward pass inside `capture`.

    A pass begins with empty slots: a block that it skips has no map, never that of an older pass. The slots and the
    concepts' buffers keep their addresses from pass to pass as long as the shapes fit, as CUDA graphs need it.
    """

    tokens: ConceptTokens
    """Concepts of the captured rows; `set_tokens` replaces them."""
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
    """As in `capture`."""
    lse: bool = True
    """Use the log-sum-exp of the attention kernel."""
    impl: Implementation = "auto"
    """Of `star_kernels.attention_maps`."""
    device: torch.device | None = None
    """Where the concepts are moved; None: where they are. A pass on another device takes everything along."""
    query_mask: bool = False
    """As in `star.layouts.Layout`."""
    slots: Tensor = field(init=False)
    """(L, B, G, N) float32, NaN where the pass has written nothing yet; G of the most concepts so far, and one for all
    of them together where `normalize` is "content"."""
    columns: Tensor = field(init=False)
    """(B, G, K) int64: the concepts' tokens among the keys of the pass, -1 for none."""
    weights: Tensor = field(init=False)
    """(B, G, K), of the columns."""
    written: list[bool] = field(init=False)
    """L, whether the pass has run the block."""

    def __post_init__(self) -> None:
        if self.device is None:
            self.device = self.tokens.index.device
        if self.layer_weights is None:
            count = len(self.blocks)
            self.layer_weights = torch.full((count,), 1 / count, dtype=torch.float32, device=self.device)
        self.written = [False] * len(self.blocks)
        self.image = 0
        self.keys: int | None = None
        self._texts = 0
        self._shown: Pass | None = None  # of the last pass, where the columns are
        self._doubts: list[tuple[Tensor, str]] = []
        self._kind: tuple | None = None  # of the block that was checked, with its mask
        self._mask: Tensor | None = None
        self.set_tokens(self.tokens)
        self._new_slots(0 if self.grid is None else math.prod(self.grid))

    def set_tokens(self, tokens: ConceptTokens) -> None:
        """Set other concepts for the passes that follow.

        The buffers stay if there are as many rows as before and no more concepts and tokens: one long capture serves
        every prompt, and so does a CUDA graph of its pass.

        The maps are NaN until the next pass. Nothing waits for a device. Tokens beyond a pass's texts raise ValueError
        in the pass. Tokens on an accelerator are not checked: such a concept's map is NaN."""
        tokens = checked_tokens(tokens)
        index, weight = tokens
        # Before they move, so that nobody waits for their values.
        on_cpu = index.device.type == "cpu"
        self.text_tokens = int(index.max()) + 1 if on_cpu and index.numel() else 0
        if self.normalize == "content":
            index, weight = _with_content_concept(tokens)
        self.tokens = ConceptTokens(*(x.to(self.device, non_blocking=True) for x in tokens))
        self._index = index.to(self.device, non_blocking=True)
        self.groups = tokens.index.shape[1]
        with torch.inference_mode(False):  # buffers of a pass in that mode could not be written by another pass
            shape = tuple(self.columns.shape) if hasattr(self, "columns") else (0, 0, 0)
            if shape[0] != len(index) or any(have < want for have, want in zip(shape, index.shape, strict=True)):
                shape, self._shown = tuple(index.shape), None
                self.columns = torch.empty(shape, dtype=torch.int64, device=self.device)
                self.weights = torch.empty(shape, dtype=torch.float32, device=self.device)
        _, groups, width = index.shape
        self.weights.zero_()[:, :groups, :width] = weight.to(self.device, non_blocking=True)
        self._kind = None
        if hasattr(self, "slots"):  # maps of the old concepts must not be read as those of the new ones
            self._empty_slots(self.slots.shape[-1])
        self._place()

    def _place(self) -> None:
        """The tokens' columns among the keys of a pass, once one has shown where its text is."""
        if self._shown is None:
            return
        rows = slice(None) if self.rows is None else self.rows
        _, groups, width = self._index.shape
        inside = self._shown.columns(self._index.clamp(max=self._texts - 1), rows)
        found = torch.where(self._index < self._texts, inside, BEYOND)
        self.columns.fill_(-1)[:, :groups, :width] = found

    def begin(self, shown: Pass) -> None:
        """Empty the slots for a pass. Raises ValueError for tokens beyond its texts."""
        texts = shown.text_tokens()
        if self.text_tokens > texts:
            raise ValueError(
                f"tokens: got text token {self.text_tokens - 1}, expected at most {texts - 1}, the last of the pass; "
                "find them with the max_sequence_length of the embeddings, and leave unconditional passes out "
                "(passes_per_step of star.record, first_pass of star.allocated)"
            )
        self._kind = None
        self.written = [False] * len(self.blocks)
        self.image, self.keys = shown.image, shown.keys
        if (
            self._texts != texts
            or not isinstance(shown.text, int)
            or self._shown is None
            or self._shown.text != shown.text
        ):
            self._texts, self._shown = texts, shown._replace(latents=[], embeds=[])  # which need not be kept
            self._place()
        self._empty_slots(shown.tokens)

    def _empty_slots(self, image_tokens: int) -> None:
        if self.slots.shape[1:] != (*self.columns.shape[:2], image_tokens):
            self._new_slots(image_tokens)
        else:
            self.slots.fill_(torch.nan)

    def _new_slots(self, image_tokens: int) -> None:
        shape = (len(self.blocks), *self.columns.shape[:2], image_tokens)
        with torch.inference_mode(False):
            self.slots = torch.full(shape, torch.nan, dtype=torch.float32, device=self.columns.device)
            self._outs = self.slots.unbind(0)

    def move(self, device: torch.device) -> None:
        """Have everything on the device of the block that runs.

        Under offload, and with a model over several devices, only the pass shows it."""
        self.device = device
        self.tokens = ConceptTokens(*(x.to(device) for x in self.tokens))
        self._index = self._index.to(device)
        with torch.inference_mode(False):
            self.columns, self.weights = self.columns.to(device), self.weights.to(device)
            self.slots = self.slots.to(device)
            self._outs = self.slots.unbind(0)
        self.rows = self.rows.to(device) if isinstance(self.rows, Tensor) else self.rows
        assert self.layer_weights is not None  # since __post_init__
        self.layer_weights = self.layer_weights.to(device)
        self.head_weight = None if self.head_weight is None else self.head_weight.to(device)

    def require(self, condition: Tensor, message: str) -> None:
        """ValueError unless the condition holds.

        At once on the CPU, else when the maps are read, since to look at it now would wait for the device."""
        if condition.device.type != "cpu":
            self._doubts.append((condition, message))
        elif not bool(condition):
            raise ValueError(message)

    def write(
        self, number: int, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None
    ) -> None:
        """The map of a captured block, from its attention call: see `star.tap.Observer`.

        What is checked and chosen for one block holds for those that follow with the same shapes."""
        if not self.lse:
            lse = None
        if mask is not None and self.query_mask and mask.ndim == 4 and mask.shape[2] == query.shape[2]:
            mask = mask[:, :, self.image : self.image + 1]  # of the first image token; others have the same
        kind = (query.shape, key.shape, query.dtype, key.dtype, query.device, scale, lse is None or lse.shape)
        if kind != self._kind or (mask is not self._mask and not _same_mask(mask, self._mask)):
            self._prepare(query, key, mask, scale, lse)
            self._kind, self._mask = kind, mask
        if self._gathered is not None:
            rows = self._gathered
            query, key, lse = query[rows], key[rows], None if lse is None else lse[rows]
        self._call(query, key, lse, self._outs[number])
        self.written[number] = True

    def _prepare(
        self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None
    ) -> None:
        """Check the arguments of a block that stands for those of the same shapes, and choose what makes its map."""
        if self.grid is None or self._shown is None:
            raise RuntimeError("transformer: got a call of its forward; call the module itself, so that its hooks run")
        if self.slots.device != query.device:
            self.move(query.device)
        tokens, rows = self.slots.shape[-1], slice(None) if self.rows is None else self.rows
        if self.image + tokens > query.shape[2]:
            raise ValueError(f"grid: got {self.grid} of {tokens} tokens, expected {query.shape[2] - self.image} tokens")
        neighbors = range(len(query))[rows] if isinstance(rows, slice) else None
        images = len(rows) if neighbors is None else len(neighbors)  # type: ignore[arg-type]  # no slice here
        if images != len(self.columns):
            raise ValueError(
                f"tokens: got {len(self.columns)} rows, expected {images}, the rows of the pass that are read"
            )
        first = 0
        if neighbors is not None and neighbors.step == 1:  # which are read where they are
            first, self._gathered = neighbors.start, None
        else:
            self._gathered = rows
            query, key, lse = query[rows], key[rows], None if lse is None else lse[rows]
        self._call = checked_attention_maps(
            query,
            key,
            self.columns,
            self.weights,
            lse=lse,
            scale=scale,
            head_weight=self.head_weight,
            key_bias=None if mask is None else _key_bias(mask, images, key, rows),
            out=self._outs[0],
            part=Part(first, images, self.image, tokens),
            impl=self.impl,
        )

    def layers(self) -> Tensor:
        """(L, B, G, N) float32: mean over the heads of each captured block, normalized; NaN for one that did not run.

        Later passes do not change the copy. Raises the ValueErrors of `capture` that only values on an accelerator
        show."""
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break()  # the graph does not know that its blocks write the slots
        while self._doubts:
            condition, message = self._doubts.pop()
            if not bool(condition):
                raise ValueError(message)
        maps = self.slots[:, :, : self.groups]
        if self.normalize == "content":
            content = self.slots[:, :, self.groups : self.groups + 1]
            maps = maps / content.clamp_min(torch.finfo(maps.dtype).tiny)
        elif self.normalize == "concepts":
            maps = maps / maps.sum(2, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        return maps.clone()

    def read(self) -> Tensor:
        """(B, G, N) float32: weighted mean over the captured blocks, in a copy that later passes leave alone.

        Raises RuntimeError if no pass was made, or one that skipped a captured block; and what `layers` raises."""
        layers = self.layers()
        missing = [block for block, done in zip(self.blocks, self.written, strict=True) if not done]
        if missing and self._shown is None:
            raise RuntimeError(
                f"maps: no pass has run the captured blocks {missing}; call the model inside the capture first"
            )
        if missing:
            raise RuntimeError(
                f"layers: the last pass skipped blocks {missing}, which have no maps; leave them out with layers=, or "
                "disable the cache that skips them"
            )
        assert self.layer_weights is not None  # since __post_init__
        return (layers * self.layer_weights[:, None, None, None]).sum(0)


def _key_bias(mask: Tensor, images: int, key: Tensor, rows: slice | Tensor) -> Tensor:
    """(B, S) float32 of an attention mask (B or 1, H or 1, 1 or expanded to the queries, S), boolean or added to the
    scores, for the B images, the rows of the maps. Raises ValueError for one that is not the same for all queries."""
    if mask.ndim != 4 or (mask.shape[2] != 1 and mask.stride(2) != 0):
        raise ValueError(
            f"attention_mask: got shape {tuple(mask.shape)}, expected (B, H or 1, 1, {key.shape[2]}): maps need a mask "
            "that is the same for every query"
        )
    bias = mask[:, 0, 0]  # the heads of a mask are copies
    if bias.dtype == torch.bool:
        bias = torch.zeros_like(bias, dtype=torch.float32).masked_fill(~bias, -torch.inf)
    bias = bias.detach().float()
    return bias[rows] if len(bias) > 1 else bias.expand(images, -1)


def _same_mask(mask: Tensor | None, other: Tensor | None) -> bool:
    """Whether a mask is one that is known to have the same values without waiting for a device: models give one to all
    blocks, or make it in each anew."""
    if mask is None or other is None or mask.shape != other.shape or mask.dtype != other.dtype:
        return False
    if mask.is_cpu:
        return torch.equal(mask, other)
    return mask.data_ptr() == other.data_ptr() and mask.stride() == other.stride() and not mask.is_meta


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
    layers = range(default) if layers is None else list(layers)
    if not layers or not all(0 <= layer < len(attentions) for layer in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"layers: got {list(layers)}, expected distinct blocks in 0..{len(attentions) - 1}")
    return {layer: attentions[layer] for layer in layers}


def _with_content_concept(tokens: ConceptTokens) -> ConceptTokens:
    """One more concept: every token of all the others, so that its map is the whole mass of the content."""
    index, weight = tokens
    batch, groups, width = index.shape
    content = index.reshape(batch, 1, groups * width).sort(-1).values
    content[..., 1:] = torch.where(content[..., 1:] == content[..., :-1], -1, content[..., 1:])
    padding = (0, content.shape[2] - width)
    return ConceptTokens(
        torch.cat([F.pad(index, padding, value=-1), content], 1),
        torch.cat([F.pad(weight, padding), (content >= 0).to(weight)], 1),
    )


def _grid(asked: tuple[int, ...] | None, shown: Pass) -> tuple[int, ...]:
    """The grid of a pass: that which it shows, or the given one; the two must agree."""
    if asked is not None and shown.grid is not None and tuple(asked) != shown.grid:
        axes = ("frames", "rows", "columns")[-len(shown.grid) :]
        raise ValueError(f"grid: got {tuple(asked)}, expected ({', '.join(axes)}) = {shown.grid}, that of the pass")
    grid = asked or shown.grid
    if grid is None:
        raise ValueError(
            f"grid: got None, which the pass does not show; give (rows, columns) of its {shown.tokens} image tokens"
        )
    if math.prod(grid) != shown.tokens:
        raise ValueError(f"grid: got {tuple(grid)} of {math.prod(grid)} tokens, expected {shown.tokens} tokens")
    return tuple(grid)


def _equal(rows: Batch, others: Batch) -> Tensor:
    """() bool, whether tensors have the same shapes and values, NaN for NaN."""
    if not (isinstance(rows, Tensor) and isinstance(others, Tensor)):
        return torch.stack([_equal(row, other) for row, other in zip(rows, others, strict=True)]).all()
    if rows.shape != others.shape:
        return torch.zeros((), dtype=torch.bool, device=rows.device)
    return ((rows == others) | (rows.isnan() & others.isnan())).all()


def _is_guidance(shown: Pass) -> Tensor:
    """() bool, whether the halves of a batch are the same latents with different texts."""
    half = len(shown.latents) // 2
    latents, embeds = shown.latents, shown.embeds
    return _equal(latents[:half], latents[half:]) & ~_equal(embeds[:half], embeds[half:])


def _inferred_rows(images: int, shown: Pass, conditional: int, require: Callable[[Tensor, str], None]) -> slice:
    """All rows of a pass, or of twice as many the half with the prompts in diffusers' order."""
    batch = len(shown.latents)
    if batch not in (images, 2 * images):
        raise ValueError(
            f"tokens: got {images} rows, expected {batch}, one for each row of the pass, or {batch / 2:g} with "
            "guidance; for another order give rows="
        )
    if batch > images:
        message = (
            f"tokens: got {images} rows, the pass has {batch} and no guidance (the same latents with two texts); "
            "give one row for each image, or rows="
        )
        require(_is_guidance(shown), message)
    first = 0 if batch == images else conditional * images
    return slice(first, first + images)


def _given_rows(
    rows: Rows, images: int, shown: Pass, conditional: int, require: Callable[[Tensor, str], None]
) -> slice | Tensor:
    """The given rows, as a slice where they are neighbors: those are read where they are."""
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
    if batch % 2 == 0 and images < half and wrong:
        message = (
            f"rows: got {chosen}, but the pass guides {half} images and its {('last', 'first')[conditional]} {half} "
            "rows are unconditional; give one row of tokens for each image"
        )
        require(~_is_guidance(shown), message)
    if chosen == list(range(chosen[0], chosen[0] + images)):
        return slice(chosen[0], chosen[0] + images)
    return torch.tensor(chosen).to(shown.latents[0].device, non_blocking=True)


class Passes:
    """Begins the passes of a captured model: what each shows decides where its maps are read.

    read: of the layout. grid, rows: those of `capture`."""

    def __init__(
        self,
        maps: Maps,
        read: Callable[[Arguments], Pass],
        conditional: int,
        grid: tuple[int, ...] | None,
        rows: Rows | None,
    ) -> None:
        self.maps, self.read, self.conditional, self.grid, self.rows = maps, read, conditional, grid, rows
        self.chosen: dict[tuple[int, int], slice | Tensor] = {}  # by rows of tokens and of the pass
        self.known_as = numbered(self)

    def show(self, argument: Arguments) -> None:
        """A pass with these arguments begins."""
        if not torch.compiler.is_compiling():
            if in_backward():  # a pass that is computed again
                return
            if torch._C._are_functorch_transforms_active():
                with torch._C._DisableFuncTorch():
                    self.begin(self.read(lambda name: outside(argument(name))))
            else:
                self.begin(self.read(argument))
            return
        shown = self.read(argument)
        latents, stacked_latents = _tensors(shown.latents)
        embeds, stacked_embeds = _tensors(shown.embeds)
        grid, keys = list(shown.grid or ()), -1 if shown.keys is None else shown.keys
        text, text_keys = (0, shown.text) if isinstance(shown.text, Tensor) else (shown.text, None)
        rest = (shown.tokens, grid, shown.image, text, text_keys, keys)
        begin_pass(self.known_as, latents, stacked_latents, embeds, stacked_embeds, *rest)

    def begin(self, shown: Pass) -> None:
        maps = self.maps
        maps.grid = _grid(self.grid, shown)
        images, batch = len(maps.tokens.index), len(shown.latents)
        if (images, batch) not in self.chosen:
            options = (images, shown, self.conditional, maps.require)
            self.chosen[images, batch] = (
                _inferred_rows(*options) if self.rows is None else _given_rows(self.rows, *options)
            )
        maps.rows = self.chosen[images, batch]
        maps.begin(shown)


def _tensors(rows: Batch) -> tuple[list[Tensor], bool]:
    """A batch as a list, and whether its rows were one tensor."""
    if isinstance(rows, Tensor):
        return [rows.detach()], True
    return [row.detach() for row in rows], False


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
        TypeError: a model or an attention processor that is not known.
        ValueError: wrong layers or options; in the pass a grid or rows that do not fit it.
    """
    model, tokens = unwrapped(transformer), checked_tokens(tokens)
    layout = layout_of(model)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: got {normalize!r}, expected one of {list(NORMALIZATIONS)}")
    blocks = _chosen_attentions(layout, model, layers)
    if layer_weights is not None and len(layer_weights) != len(blocks):
        raise ValueError(f"layer_weights: got {len(layer_weights)}, expected one for each of {len(blocks)} layers")
    if getattr(model, "_parallel_config", None) is not None:
        raise TypeError(f"transformer: {PARALLEL}")
    device = next(model.parameters()).device
    if device.type == "meta":  # offloaded; the pass shows where it runs
        device = tokens.index.device
    maps = Maps(
        tokens=tokens,
        blocks=tuple(blocks),
        layer_weights=None
        if layer_weights is None
        else torch.tensor(layer_weights, dtype=torch.float32).to(device, non_blocking=True),
        head_weight=None if head_weight is None else head_weight.to(device, non_blocking=True),
        normalize=normalize,
        lse=lse,
        impl=impl,
        device=device,
        query_mask=layout.query_mask,
    )
    passes = Passes(maps, layout.reader(model), layout.conditional, grid, rows)
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
            raise ValueError(
                "pipeline: got one together with ConceptTokens, which need none; leave it out, or give prompts"
            )
        if concepts is not None or brackets:
            raise ValueError(
                "concepts, brackets: got them together with ConceptTokens; give them to star.concept_tokens"
            )
        return prompts
    if pipeline is None:
        raise ValueError("pipeline: got None, expected the pipeline that encodes the prompts")
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
    maps, or those of several passes: ([S,] B, [T,] H, W) or ([S,] B, L) of the image or the video that is denoised."""
    packed = len(shape) == 3
    weights = allocation_weights(allocation, maps, grid, patch=1 if packed else shape[-1] // grid[-1])
    assert weights is not None  # only of the strategy "uniform" there are none
    if packed:
        return weights.flatten(-len(grid))
    # A token may stand for several latent frames.
    return weights.repeat_interleave(shape[2] // grid[0], -3) if len(grid) == 3 else weights


@dataclass(eq=False)
class Record:
    """The maps of the passes inside `record`, in their order."""

    maps: list[Tensor] = field(default_factory=list)
    """(B, G, N) float32 of each pass."""
    grid: tuple[int, ...] | None = None
    """(rows, columns) of the image tokens, of a video (frames, rows, columns); None before the first pass."""
    velocity_shape: tuple[int, ...] = ()
    """Of the passes' output: (B', C, H, W), (B', C, T, H, W) or packed (B', L, C)."""

    def add(self, maps: Tensor, grid: tuple[int, ...], velocity_shape: tuple[int, ...]) -> None:
        """Keep a pass. Raises ValueError if its grid is not that of the others."""
        if self.grid is not None and self.grid != grid:
            raise ValueError(f"grid: got a pass with {grid} after one with {self.grid}; use one `record` for each size")
        self.maps.append(maps)
        self.grid, self.velocity_shape = grid, velocity_shape

    def weights(self, allocation: Allocation | None = None, *, steps: Iterable[int] | None = None) -> Tensor:
        """Weights of the locations, of mean 1 over each of the S passes.

        Args:
            allocation: strategy "attention" (the default), "topk" or "random", and options.
            steps: numbers of the passes, for a trainer that trains on some of them; None: all.

        Returns:
            (B, S, H, W) float32; (B, S, T, H, W) for a video and (B, S, L) for packed latents.

        Raises:
            ValueError: another strategy, or a number that no pass has.
            RuntimeError: no pass was made yet.
        """
        allocation = _own_maps_allocation(allocation)
        if self.grid is None:
            raise RuntimeError("weights: no pass was made inside `record` yet; call the sampler first")
        chosen = range(len(self.maps)) if steps is None else [int(step) for step in steps]
        if not chosen or not all(0 <= step < len(self.maps) for step in chosen):
            raise ValueError(f"steps: got {list(chosen)}, expected numbers of passes in 0..{len(self.maps) - 1}")
        maps = torch.stack([self.maps[step] for step in chosen])
        return _velocity_weights(allocation, maps, self.grid, self.velocity_shape).transpose(0, 1).contiguous()


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
    passes_per_step: int = 1,
) -> Iterator[Record]:
    """Concept maps of every forward pass inside the context, in order: one for each step of a trainer's sampler.

        with star.record(pipeline.transformer, prompts, pipeline) as record:
            images = pipeline(prompts, ...)
        weights = record.weights()  # (B, steps, H, W)

    Args:
        transformer: the very module that the sampler calls, in whatever wrapper.
        prompts, pipeline, concepts, brackets: as in `allocated`.
        grid, rows, layers, normalize: of `capture`.
        passes_per_step: how many passes the sampler makes for each step; the first one is recorded and the others are
            left alone, whatever their texts are. 2 for guidance in two passes, the conditional one first, as in the
            pipelines of Qwen-Image, Wan and HunyuanVideo.

    Yields:
        A Record that each pass adds its maps to.

    Raises:
        TypeError, ValueError, RuntimeError: as `capture` and `Maps.read`.
        RuntimeError: no pass was made through this module.
    """
    if passes_per_step < 1:
        raise ValueError(f"passes_per_step: got {passes_per_step}, expected at least 1")
    result = Record()
    tokens = _tokens(prompts, pipeline, concepts, brackets)
    passes = 0
    with ExitStack() as capturing:

        def begin() -> Maps:
            context = capture(transformer, tokens, grid=grid, rows=rows, layers=layers, normalize=normalize)
            return capturing.enter_context(context)

        maps = begin()

        def keep(module: torch.nn.Module, arguments: tuple, output: Any) -> None:
            nonlocal maps, passes
            first = passes % passes_per_step == 0
            passes += 1
            if first:
                velocity = _batch(output[0])
                assert maps.grid is not None  # the pass has shown it
                result.add(maps.read().to(velocity.device), maps.grid, tuple(velocity.shape))
                if passes_per_step > 1:
                    capturing.close()
            elif passes % passes_per_step == 0:
                maps = begin()

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
        raise ValueError(f"rows: got {shown} of {batch}, expected all conditional rows as one slice")
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
        prompts: one for each image of the batch. Or, without pipeline, their tokens from `star.concept_tokens` or
            `star.concepts.locate`: needed if the embeddings were not made by the pipeline's call with its defaults, as
            with another max_sequence_length or an image.
        pipeline: of diffusers, whose call would encode the prompts; its text encoders are not needed.
        concepts, brackets: of `star.concept_tokens`. With brackets the embeddings must be of the prompts without them.
        grid, layers, normalize: of `capture`.
        rows: of `capture`; all conditional rows, as one slice. With guidance in one batch the unconditional rows get
            the same weights: guidance is linear, so the guided velocity is weighted.
        allocation: strategy "attention" (the default), "topk" or "random", and options.
        first_pass: every pass inside the context gets the weights of the first. Later passes are not read, and their
            texts may be shorter. For guidance in two passes, the conditional one first.

    Yields:
        The Maps of the last pass; with first_pass of the first.

    Raises:
        TypeError, ValueError, RuntimeError: as `capture` and `Maps.read`.
        ValueError: another strategy, prompts without a pipeline or a pipeline without prompts; in the pass an output
            that does not fit the grid.
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
