"""The maps of a pass: where its blocks write them, and how they are read."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from star.concepts import ConceptTokens
from star.layouts import Pass
from star_kernels.api import Implementation, Part, checked_attention_maps

BEYOND = 2**62  # a column that no key is at: its map is NaN


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
        if self.written[number]:
            raise RuntimeError(
                f"transformer: block {self.blocks[number]} calls its attention twice in a pass, and which one reads "
                "the text is not known; set the processor that the model came with, or leave the block out of layers"
            )
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
