"""Reads concept maps out of a transformer while it runs, without changing a bit of what it computes.

    with capture(transformer, tokens) as maps:
        transformer(...)
    weights = star_kernels.allocate(maps.read(), maps.grid)

`record` does the same around a whole sampler and keeps the maps of every pass; `allocated` makes weights of them at
once and gives them to the gradient of the pass's output.

The joint attention of the chosen blocks runs through the very kernel that F.scaled_dot_product_attention would have
picked, which is asked for its log-sum-exp as well; from that and the few key columns of the concepts the maps follow.
The processors do what diffusers' do in the very order: a checkpointed block may be captured, and computed again in a
backward pass outside the context by diffusers' own processor, which then saves the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.attention import SDPBackend

from star.concepts import ConceptTokens, concept_tokens
from star.objective import Allocation, allocation_weights, weighted_gradient
from star_kernels import attention_maps
from star_kernels.api import Implementation

NORMALIZATIONS = ("raw", "content", "concepts")
Rows = slice | Sequence[int] | Tensor
Modules = Sequence[Any]  # of an attention; a norm may be None


def in_backward() -> bool:
    """True while autograd runs, as in the recomputation of a checkpointed block."""
    return torch._C._current_graph_task_id() >= 0


def write_map(
    slots: Tensor,
    written: Tensor,
    slot: int,
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor,
    lse: Tensor | None,
    head_weight: Tensor | None,
    scale: float,
    impl: str,
) -> None:
    """slots[slot] = attention_maps(...), written[slot] = True. Does nothing in a recomputation, so that the backward
    pass of an old forward pass cannot overwrite newer maps."""
    if not in_backward():
        out = slots[slot]
        attention_maps(
            query,
            key,
            concept_index,
            concept_weight,
            lse=lse,
            scale=scale,
            head_weight=head_weight,
            out=out,
            impl=impl,  # type: ignore[arg-type]  # a schema of torch.library has no Literal
        )
        written[slot] = True


# What torch.compile sees. Calling it costs more time than the maps of a small layer, so eager passes do not.
write_maps = torch.library.custom_op("star::write_maps", write_map, mutates_args=("slots", "written"))


@write_maps.register_fake
def _(*_: Any) -> None:
    return None


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """F.scaled_dot_product_attention with the bits it would have, and the log-sum-exp of its rows where it has one.

    query, key, value: (B, H, S, D). Returns (output, lse (B, H, S) or padded, or None).
    """
    aten = torch.ops.aten
    if not torch.compiler.is_compiling():
        choice = SDPBackend(torch._fused_sdp_choice(query, key, value))
    elif query.device.type == "cpu":
        choice = SDPBackend.FLASH_ATTENTION  # the only fused kernel there
    else:
        choice = SDPBackend.MATH  # the choice cannot be traced: leave it to PyTorch and let the operator make the LSE
    # The flash kernels take head widths in multiples of 8; F.scaled_dot_product_attention pads others itself.
    if choice == SDPBackend.FLASH_ATTENTION and query.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[:2]
    if choice == SDPBackend.FLASH_ATTENTION and query.shape[-1] % 8 == 0:
        return aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    if choice == SDPBackend.EFFICIENT_ATTENTION:
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    if choice == SDPBackend.CUDNN_ATTENTION:
        return aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]
    return F.scaled_dot_product_attention(query, key, value), None


class Pass(NamedTuple):
    """What a forward pass shows before its first block runs.

    latents: (B, C, H, W) or packed (B, N, C). embeds: (B, T, D) of the text. tokens: N, the image tokens. grid: their
    (rows, columns), or None where the pass does not show them.
    """

    latents: Tensor
    embeds: Tensor
    tokens: int
    grid: tuple[int, int] | None


@dataclass(kw_only=True, eq=False)
class Maps:
    """Maps of the last forward pass inside `capture`.

    A pass begins with empty slots: a block that it skips has no map, never that of an older pass.
    """

    tokens: ConceptTokens
    """Concepts of the captured rows."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the image tokens; None until the first pass shows them."""
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
    slots: Tensor = field(init=False)
    """(L, B, G, N) float32, NaN where the pass has written nothing yet."""
    written: Tensor = field(init=False)
    """(L,) bool on the CPU."""

    def __post_init__(self) -> None:
        self.text_tokens = int(self.tokens.index.max()) + 1 if self.tokens.index.numel() else 0
        if self.layer_weights is None:
            count = len(self.blocks)
            self.layer_weights = torch.full((count,), 1 / count, dtype=torch.float32, device=self.tokens.index.device)
        self.begin(0 if self.grid is None else self.grid[0] * self.grid[1])

    def begin(self, image_tokens: int) -> None:
        """Empty the slots for a pass of so many image tokens."""
        index = self.tokens.index
        shape = (len(self.blocks), *index.shape[:2], image_tokens)
        self.slots = torch.full(shape, torch.nan, dtype=torch.float32, device=index.device)
        self.written = torch.zeros(len(self.blocks), dtype=torch.bool, device="cpu")
        # The tokens' columns in a joint sequence that has the image first.
        self.after_image = torch.where(index < 0, index, index + image_tokens)

    def move(self, device: torch.device) -> None:
        """Have everything on the device of the block that runs: under offload, and with a model over several devices,
        only the pass shows it."""
        if self.slots.device == device:
            return
        self.tokens = ConceptTokens(*(x.to(device) for x in self.tokens))
        self.slots, self.after_image = self.slots.to(device), self.after_image.to(device)
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


def captured_attention(
    maps: Maps, slot: int, query: Tensor, key: Tensor, value: Tensor, text_tokens: int, text_first: bool
) -> Tensor:
    """Attention of a joint sequence that writes its maps into a slot. query, key, value, result: (B, H, N + T, D)."""
    if maps.grid is None:
        raise RuntimeError("transformer: its forward was called; call the module itself, so that its hooks run")
    image_tokens = query.shape[2] - text_tokens
    if image_tokens != maps.slots.shape[-1] or text_tokens < 0:
        raise ValueError(f"grid: {maps.grid} has {maps.slots.shape[-1]} tokens, the model runs {image_tokens}")
    if maps.text_tokens > text_tokens:
        raise ValueError(
            f"tokens: point at text token {maps.text_tokens - 1}, the model runs {text_tokens}; "
            "find them with the max_sequence_length of the embeddings"
        )
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        # F.scaled_dot_product_attention casts under autocast; the kernels below it do not.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    joint, lse = attention_with_lse(query, key, value)

    maps.move(query.device)
    index, rows = maps.tokens.index if text_first else maps.after_image, slice(None) if maps.rows is None else maps.rows
    if isinstance(rows, Tensor):
        rows = rows.to(query.device)
    first = text_tokens if text_first else 0
    image = slice(first, first + image_tokens)
    query, key = query.detach()[rows, :, image], key.detach()[rows]
    if len(query) != len(index):
        raise ValueError(f"tokens: have {len(index)} rows, the model runs {len(query)} of those asked for")
    if lse is not None:
        # One kernel pads its rows, another adds a trailing axis.
        lse = lse.detach().flatten(2)[rows, :, image] if maps.lse else None
    write = write_maps if torch.compiler.is_compiling() else write_map
    write(
        slots=maps.slots,
        written=maps.written,
        slot=slot,
        query=query,
        key=key,
        concept_index=index,
        concept_weight=maps.tokens.weight,
        lse=lse,
        head_weight=maps.head_weight,
        scale=query.shape[-1] ** -0.5,
        impl=maps.impl,
    )
    return joint


class CapturingJointAttnProcessor:
    """Joint attention of SD3 (image tokens first, then text) that writes concept maps into one slot."""

    def __init__(self, maps: Maps, slot: int) -> None:
        self.maps, self.slot = maps, slot

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        batch, image_tokens, _ = hidden_states.shape
        image = self._heads(attn, (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k), hidden_states)
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k)
        text = self._heads(attn, *added, encoder_hidden_states)
        query, key, value = (torch.cat(pair, dim=2) for pair in zip(image, text, strict=True))
        del image, text  # over the attention they would be memory that diffusers' processor does not hold
        joint = captured_attention(
            self.maps, self.slot, query, key, value, encoder_hidden_states.shape[1], text_first=False
        )
        joint = joint.transpose(1, 2).reshape(batch, -1, attn.inner_dim).to(query.dtype)
        image_out, text_out = joint[:, :image_tokens], joint[:, image_tokens:]
        if not attn.context_pre_only:
            text_out = attn.to_add_out(text_out)
        return attn.to_out[1](attn.to_out[0](image_out)), text_out

    @staticmethod
    def _heads(attn: Attention, projections: Modules, norms: Modules, states: Tensor) -> list[Tensor]:
        """Query, key and value of one stream, (B, H, N, D)."""
        heads = [linear(states).unflatten(-1, (attn.heads, -1)).transpose(1, 2) for linear in projections]
        normed = [x if norm is None else norm(x) for x, norm in zip(heads[:2], norms, strict=True)]
        return [*normed, heads[2]]


class CapturingFluxAttnProcessor:
    """Attention of FLUX (text tokens first, then packed latents) that writes concept maps into one slot.

    In the double-stream blocks the text comes beside the image, in the single-stream blocks both are one sequence.
    """

    def __init__(self, maps: Maps, slot: int) -> None:
        self.maps, self.slot = maps, slot

    def __call__(
        self,
        attn: FluxAttention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if attention_mask is not None:
            raise ValueError("attention_mask: maps can be captured without a mask only")
        image = [linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v)]
        text: list[Tensor] = []
        text_tokens = hidden_states.shape[1] - self.maps.slots.shape[-1]
        if encoder_hidden_states is not None:
            text = [linear(encoder_hidden_states) for linear in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            text_tokens = encoder_hidden_states.shape[1]
        joint = self._heads(attn, image, (attn.norm_q, attn.norm_k))
        if text:
            text = self._heads(attn, text, (attn.norm_added_q, attn.norm_added_k))
            joint = [torch.cat(pair, dim=1) for pair in zip(text, joint, strict=True)]
        query, key, value = joint
        del image, text, joint
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        heads = captured_attention(self.maps, self.slot, query, key, value, text_tokens, text_first=True)
        states = heads.transpose(1, 2).flatten(2, 3).to(query.dtype)
        if encoder_hidden_states is None:
            return states
        text_out, image_out = states.split_with_sizes([text_tokens, states.shape[1] - text_tokens], dim=1)
        return attn.to_out[1](attn.to_out[0](image_out.contiguous())), attn.to_add_out(text_out.contiguous())

    @staticmethod
    def _heads(attn: FluxAttention, projected: Sequence[Tensor], norms: Modules) -> list[Tensor]:
        """Query, key and value of one stream, (B, S, H, D)."""
        heads = [x.unflatten(-1, (-1, attn.head_dim)) for x in projected]
        normed = [x if norm is None else norm(x) for x, norm in zip(heads[:2], norms, strict=True)]
        return [*normed, heads[2]]


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


def _check_processor(layer: int, attn: Any, expected: type) -> None:
    """Raise TypeError unless the block computes plain attention as the capturing processors do."""
    processor = attn.processor
    given: type = type(processor)
    kind = given.__name__
    if given is not expected:
        fused = " (unfuse the projections: fused SD3 attention skips the q/k norms)" if "Fused" in kind else ""
        raise TypeError(f"transformer: block {layer} has a {kind}, expected {expected.__name__}{fused}")
    if getattr(attn, "fused_projections", False):
        raise TypeError(f"transformer: block {layer} has fused projections, unfuse them to capture maps")
    if expected is FluxAttnProcessor:
        backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        if AttentionBackendName(backend) != AttentionBackendName.NATIVE or processor._parallel_config is not None:
            raise TypeError(f"transformer: block {layer} runs attention backend {backend}, expected the native one")


def _argument(position: int, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """An argument of a model's forward, however it was given."""
    return args[position] if len(args) > position else kwargs.get(name)


def _sd3_pass(model: SD3Transformer2DModel) -> Callable[[tuple, dict[str, Any]], Pass]:
    """Reads a pass of SD3: the grid is the latents' height and width over the patch size."""
    patch = model.config.patch_size

    def read(args: tuple, kwargs: dict[str, Any]) -> Pass:
        latents = _argument(0, "hidden_states", args, kwargs)
        rows, columns = latents.shape[-2] // patch, latents.shape[-1] // patch
        embeds = _argument(1, "encoder_hidden_states", args, kwargs)
        return Pass(latents, embeds, rows * columns, (rows, columns))

    return read


def _flux_grid(ids: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of img_ids as diffusers makes them, (N, 3) of (0, row, column) row by row; None for others."""
    ids = (ids[0] if ids.ndim == 3 else ids).float().cpu()
    if ids.ndim != 2 or ids.shape[1] != 3 or len(ids) == 0 or not ids.isfinite().all():
        return None
    rows, columns = (int(ids[:, axis].max()) + 1 for axis in (1, 2))
    if rows * columns != len(ids):
        return None
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    return (rows, columns) if torch.equal(ids[:, 1:], expected.float()) else None


def _flux_pass(model: FluxTransformer2DModel) -> Callable[[tuple, dict[str, Any]], Pass]:
    """Reads a pass of FLUX: img_ids have the grid where they are diffusers'."""
    last: tuple[Tensor | None, tuple[int, int] | None] = (None, None)

    def read(args: tuple, kwargs: dict[str, Any]) -> Pass:
        nonlocal last
        latents = _argument(0, "hidden_states", args, kwargs)
        embeds = _argument(1, "encoder_hidden_states", args, kwargs)
        ids = _argument(4, "img_ids", args, kwargs)
        if torch.compiler.is_compiling() or ids is None:
            return Pass(latents, embeds, latents.shape[1], None)
        if ids is not last[0]:  # reading them waits for the device, so the steps of a sampler do it once
            last = (ids, _flux_grid(ids))
        return Pass(latents, embeds, latents.shape[1], last[1])

    return read


class Family(NamedTuple):
    """A kind of transformer. blocks: all that have joint attention, and how many of them are captured by default.
    plain, capturing: its attention processor and ours. reader: makes the function that reads a pass's arguments."""

    blocks: Callable[[Any], tuple[list[Any], int]]
    plain: type
    capturing: type
    reader: Callable[[Any], Callable[[tuple, dict[str, Any]], Pass]]


FAMILIES: dict[type, Family] = {
    SD3Transformer2DModel: Family(
        blocks=lambda model: ([*model.transformer_blocks], len(model.transformer_blocks)),
        plain=JointAttnProcessor2_0,
        capturing=CapturingJointAttnProcessor,
        reader=_sd3_pass,
    ),
    FluxTransformer2DModel: Family(
        blocks=lambda model: (
            [*model.transformer_blocks, *model.single_transformer_blocks],
            len(model.transformer_blocks),
        ),
        plain=FluxAttnProcessor,
        capturing=CapturingFluxAttnProcessor,
        reader=_flux_pass,
    ),
}


def _family(model: torch.nn.Module) -> Family:
    for kind, family in FAMILIES.items():
        if isinstance(model, kind):
            return family
    expected = " or a ".join(kind.__name__ for kind in FAMILIES)
    raise TypeError(f"transformer: got {type(model).__name__}, expected an {expected}")


def _chosen_blocks(family: Family, model: torch.nn.Module, layers: Sequence[int] | None) -> dict[int, Any]:
    """The blocks to capture by their numbers, each with plain attention."""
    blocks, default = family.blocks(model)
    layers = range(default) if layers is None else list(layers)
    if not layers or not all(0 <= layer < len(blocks) for layer in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"layers: got {list(layers)}, expected distinct blocks in 0..{len(blocks) - 1}")
    for layer in layers:
        _check_processor(layer, blocks[layer].attn, family.plain)
    return {layer: blocks[layer] for layer in layers}


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


def _grid(asked: tuple[int, int] | None, shown: Pass) -> tuple[int, int]:
    """The grid of a pass: what it shows, or what was asked for, which must agree."""
    if asked is not None and shown.grid is not None and tuple(asked) != shown.grid:
        raise ValueError(f"grid: got {tuple(asked)}, the pass has (rows, columns) = {shown.grid}")
    grid = asked or shown.grid
    if grid is None:
        raise ValueError(f"grid: the pass does not show it, give (rows, columns) of its {shown.tokens} image tokens")
    rows, columns = grid
    if rows * columns != shown.tokens:
        raise ValueError(f"grid: {(rows, columns)} has {rows * columns} tokens, the model runs {shown.tokens}")
    return rows, columns


def _is_guidance(shown: Pass) -> bool:
    """Whether the halves of a batch are the same latents with different texts. Waits for the device."""
    (first, second), (negative, positive) = shown.latents.chunk(2), shown.embeds.chunk(2)
    return torch.allclose(first, second, rtol=0, atol=0, equal_nan=True) and not torch.equal(negative, positive)


def _inferred_rows(images: int, shown: Pass) -> slice:
    """All rows of a pass, or the second half of twice as many: the conditional rows in diffusers' order."""
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
    return slice(batch - images, batch)


def _given_rows(rows: Rows, images: int, shown: Pass) -> slice | Tensor:
    """The rows that were asked for, as a slice where they are neighbors: those are read where they are."""
    batch = len(shown.latents)
    if isinstance(rows, slice):
        chosen = list(range(*rows.indices(batch)))
    else:
        chosen = rows.tolist() if isinstance(rows, Tensor) else list(rows)
    if len(chosen) != images or not all(0 <= row < batch for row in chosen):
        raise ValueError(
            f"rows: got {chosen} of the {batch} rows of the pass, expected one for each of the {images} rows of tokens"
        )
    # More images than rows of tokens, and rows from the first half: with guidance some of those are unconditional.
    suspicious = batch % 2 == 0 and images < batch // 2 and min(chosen) < batch // 2
    if suspicious and not torch.compiler.is_compiling() and _is_guidance(shown):
        raise ValueError(
            f"rows: got {chosen}, but the pass guides {batch // 2} images and its first {batch // 2} rows are "
            "unconditional; give one row of tokens for each image"
        )
    if chosen == list(range(chosen[0], chosen[0] + images)):
        return slice(chosen[0], chosen[0] + images)
    return torch.tensor(chosen, device=shown.latents.device)


@contextmanager
def capture(
    transformer: torch.nn.Module,
    tokens: ConceptTokens,
    *,
    grid: tuple[int, int] | None = None,
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
        transformer: an SD3Transformer2DModel or FluxTransformer2DModel, with adapters or without, compiled or not,
            also inside DistributedDataParallel, offloaded or over several devices (the maps are then on the device of
            the last captured block). Only `.attn` of the chosen blocks is touched, and put back whatever happens.
        tokens: concepts of the captured rows, one row for each image, from `star.concept_tokens`.
        grid: (rows, columns) of the image tokens: latent height and width over the patch size. None: what the pass
            shows. Needed for packed latents whose img_ids are not diffusers', and for a FLUX compiled as a whole.
        rows: rows of the batch to read. None: all of them; in a batch of twice as many rows as tokens the second half,
            which is the conditional one in diffusers' order.
        layers: numbers of blocks, default all joint ones; FLUX counts its single-stream blocks after the double-stream
            ones and leaves them out by default. layer_weights: one for each, default equal.
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
    family = _family(model)
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: got {normalize!r}, expected one of {list(NORMALIZATIONS)}")
    blocks = _chosen_blocks(family, model, layers)
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
    )
    read, images = family.reader(model), len(tokens.index)
    chosen: dict[int, slice | Tensor] = {}  # by size of the batch, so that a sampler waits for the device once

    def choose(shown: Pass) -> slice | Tensor:
        return _inferred_rows(images, shown) if rows is None else _given_rows(rows, images, shown)

    def begin(module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        compiling = torch.compiler.is_compiling()
        if not compiling and in_backward():
            return  # a pass that is computed again
        shown = read(args, kwargs)
        maps.grid = _grid(grid, shown)
        if not compiling and len(shown.latents) not in chosen:
            chosen[len(shown.latents)] = choose(shown)
        maps.rows = choose(shown) if compiling else chosen[len(shown.latents)]
        maps.begin(shown.tokens)

    before = {layer: block.attn.processor for layer, block in blocks.items()}
    handle = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        for slot, block in enumerate(blocks.values()):
            block.attn.processor = family.capturing(maps, slot)
        yield maps
    finally:
        handle.remove()
        for layer, block in blocks.items():
            block.attn.processor = before[layer]


def _tokens(prompts: Sequence[str] | ConceptTokens, pipeline: DiffusionPipeline | None) -> ConceptTokens:
    """Tokens that are ready, or those of the prompts."""
    if isinstance(prompts, ConceptTokens):
        if pipeline is not None:
            raise ValueError("pipeline: got one beside ready tokens; leave it out, or give prompts")
        return prompts
    if pipeline is None:
        raise ValueError("pipeline: got None, but it is needed to find the tokens of prompts")
    return concept_tokens(pipeline, prompts)


def _own_maps_allocation(allocation: Allocation | None) -> Allocation:
    """The allocation, which must need nothing but a sample's own maps."""
    allocation = Allocation() if allocation is None else allocation
    if allocation.strategy not in ("attention", "random"):
        raise ValueError(f"allocation: got strategy {allocation.strategy!r}, expected 'attention' or 'random'")
    return allocation


def _velocity_weights(allocation: Allocation, maps: Tensor, grid: tuple[int, int], shape: Sequence[int]) -> Tensor:
    """Weights of the locations of a velocity of that shape, (B', C, H, W) or packed (B', L, C), for the B rows of maps:
    (B, H, W) or (B, L)."""
    packed = len(shape) == 3
    weights = allocation_weights(allocation, maps, grid, patch=1 if packed else shape[-1] // grid[1])
    assert weights is not None  # only of the strategy "uniform" there are none
    return weights.flatten(1) if packed else weights


@dataclass(eq=False)
class Record:
    """What `record` kept of the passes inside it, in their order."""

    maps: list[Tensor] = field(default_factory=list)
    """(B, G, N) float32 of each pass."""
    grid: tuple[int, int] | None = None
    """(rows, columns) of the image tokens; None before the first pass."""
    velocity_shape: tuple[int, ...] = ()
    """Of the passes' output: (B', C, H, W) or packed (B', L, C)."""

    def add(self, maps: Tensor, grid: tuple[int, int], velocity_shape: tuple[int, ...]) -> None:
        """Keep a pass. Raises ValueError if its grid is not that of the others."""
        if self.grid is not None and self.grid != grid:
            raise ValueError(f"grid: got a pass with {grid} after one with {self.grid} in one `record`")
        self.maps.append(maps)
        self.grid, self.velocity_shape = grid, velocity_shape

    def weights(self, allocation: Allocation | None = None) -> Tensor:
        """(B, S, H, W) float32 of mean 1 over the locations of each of the S passes; (B, S, L) for packed latents.

        allocation: strategy "attention" (the default) or "random", and options. Raises ValueError for another one,
        RuntimeError if no pass was made yet."""
        allocation = _own_maps_allocation(allocation)
        if self.grid is None:
            raise RuntimeError("weights: no pass was made inside `record` yet")
        weights = [_velocity_weights(allocation, maps, self.grid, self.velocity_shape) for maps in self.maps]
        return torch.stack(weights, 1)


@contextmanager
def record(
    transformer: torch.nn.Module,
    prompts: Sequence[str] | ConceptTokens,
    pipeline: DiffusionPipeline | None = None,
    *,
    grid: tuple[int, int] | None = None,
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
        prompts, pipeline: as in `allocated`.
        grid, rows, layers, normalize: of `capture`.

    Yields:
        A Record that each pass adds its maps to.

    Raises:
        What `capture` and `Maps.read` raise. RuntimeError: no pass was made through this module.
    """
    result = Record()
    tokens = _tokens(prompts, pipeline)
    with capture(transformer, tokens, grid=grid, rows=rows, layers=layers, normalize=normalize) as maps:

        def keep(module: torch.nn.Module, arguments: tuple, output: Any) -> None:
            values = maps.read().to(output[0].device)
            assert maps.grid is not None  # the pass has shown it
            result.add(values, maps.grid, tuple(output[0].shape))

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
    grid: tuple[int, int] | None = None,
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
            `star.concepts.locate`: needed where the embeddings were made with another max_sequence_length than the
            pipeline's default; then without pipeline.
        pipeline: the StableDiffusion3Pipeline or FluxPipeline whose tokenizers split the prompts.
        grid, layers, normalize: of `capture`.
        rows: of `capture`; all of the conditional rows, one after the other. With guidance in one batch the
            unconditional rows get their weights too: guidance is linear, so that weights the guided velocity.
        allocation: strategy "attention" (the default) or "random", and options.
        first_pass: every pass inside the context gets the weights of the first: for guidance in two passes, the
            conditional one before the unconditional one.

    Yields:
        The Maps of the last pass.

    Raises:
        What `capture` and `Maps.read` raise. ValueError: another strategy, prompts without a pipeline or a pipeline
        without prompts; in the pass an output that does not fit the grid.
    """
    allocation = _own_maps_allocation(allocation)
    tokens = _tokens(prompts, pipeline)
    weights: Tensor | None = None  # of the last pass, or with first_pass of the first
    with capture(transformer, tokens, grid=grid, rows=rows, layers=layers, normalize=normalize) as maps:

        def weight(module: torch.nn.Module, arguments: tuple, output: Any) -> Any:
            nonlocal weights
            velocity = output[0]
            if not velocity.requires_grad:
                return None
            assert maps.grid is not None and maps.rows is not None  # the pass has shown them
            if weights is None or not first_pass:
                weights = _velocity_weights(allocation, maps.read().to(velocity.device), maps.grid, velocity.shape)
            velocity = weighted_gradient(velocity, _repeat_for_rows(weights, maps.rows, len(velocity)))
            return (velocity, *output[1:]) if isinstance(output, tuple) else type(output)(sample=velocity)

        handle = transformer.register_forward_hook(weight)
        try:
            yield maps
        finally:
            handle.remove()
