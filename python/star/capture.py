"""Reads concept maps out of a transformer while it runs, without changing a bit of what it computes.

    with capture(transformer, tokens, grid=(32, 32)) as maps:
        transformer(...)
    weights = star_kernels.allocate(maps.read(), maps.grid)

`record` does the same around a whole sampler and keeps the maps of every pass; `allocated` makes weights of them at
once and gives them to the gradient of the pass's output.

The joint attention of the chosen blocks runs through the very kernel that F.scaled_dot_product_attention would have
picked, which is asked for its log-sum-exp as well; from that and the few key columns of the concepts the maps follow.
The processors do what diffusers' do in the very order: a checkpointed block may be captured, and computed again in a
backward pass outside the context by diffusers' own processor, which then saves the same tensors in the same places.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from diffusers.models.attention_processor import Attention, JointAttnProcessor2_0
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttention, FluxAttnProcessor
from torch import Tensor
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.attention import SDPBackend

from star.concepts import ConceptTokens
from star.objective import Allocation, allocation_weights, weighted_gradient
from star_kernels import attention_maps

NORMALIZATIONS = ("raw", "content", "concepts")


def in_backward() -> bool:
    """True while autograd runs, as in the recomputation of a checkpointed block."""
    return torch._C._current_graph_task_id() >= 0


def write(
    slots: Tensor,
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
    """slots[slot] = attention_maps(...). Does nothing in a recomputation, so that the backward pass of an old forward
    pass cannot overwrite newer maps."""
    if not in_backward():
        out = slots[slot]
        attention_maps(
            query, key, concept_index, concept_weight, lse=lse, scale=scale, head_weight=head_weight, out=out, impl=impl
        )


# What torch.compile sees. Calling it costs more time than the maps of a small layer, so eager passes do not.
write_maps = torch.library.custom_op("star::write_maps", write, mutates_args=("slots",))


@write_maps.register_fake
def _(slots, slot, query, key, concept_index, concept_weight, lse, head_weight, scale, impl) -> None:
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


class Maps:
    """Maps of the last forward pass inside `capture`. grid: (rows, columns) of the image tokens."""

    def __init__(
        self,
        slots: Tensor,
        tokens: ConceptTokens,
        grid: tuple[int, int],
        layer_weights: Tensor,
        normalize: str,
        rows: Tensor | slice | None,
        head_weight: Tensor | None,
        lse: bool,
        impl: str,
    ) -> None:
        self.slots, self.tokens, self.grid = slots, tokens, grid
        self.layer_weights, self.normalize, self.rows = layer_weights, normalize, rows
        self.head_weight, self.lse, self.impl = head_weight, lse, impl
        self.text_tokens = int(tokens.index.max()) + 1 if tokens.index.numel() else 0
        # The tokens' columns in a joint sequence that has the image first.
        self.after_image = torch.where(tokens.index < 0, tokens.index, tokens.index + slots.shape[-1])

    def layers(self) -> Tensor:
        """(L, B, G, N) float32: mean over the heads of each captured layer, normalized."""
        maps = self.slots
        if self.normalize == "content":
            maps, content = maps[:, :, :-1], maps[:, :, -1:]
            maps = maps / content.clamp_min(torch.finfo(maps.dtype).tiny)
        elif self.normalize == "concepts":
            maps = maps / maps.sum(2, keepdim=True).clamp_min(torch.finfo(maps.dtype).tiny)
        return maps.clone()

    def read(self) -> Tensor:
        """(B, G, N) float32: weighted mean over the captured layers, in a copy that later passes leave alone."""
        return (self.layers() * self.layer_weights[:, None, None, None]).sum(0)


def captured_attention(
    maps: Maps, slot: int, query: Tensor, key: Tensor, value: Tensor, text_tokens: int, text_first: bool
) -> Tensor:
    """Attention of a joint sequence that writes its maps into a slot. query, key, value, result: (B, H, N + T, D)."""
    image_tokens = query.shape[2] - text_tokens
    if image_tokens != maps.slots.shape[-1] or text_tokens < 0:
        raise ValueError(f"grid: {maps.grid} has {maps.slots.shape[-1]} tokens, the model runs {image_tokens}")
    if maps.text_tokens > text_tokens:
        raise ValueError(f"tokens: point at text token {maps.text_tokens - 1}, the model runs {text_tokens}")
    device = query.device.type
    if torch.is_autocast_enabled(device):
        # F.scaled_dot_product_attention casts under autocast; the kernels below it do not.
        query, key, value = (x.to(torch.get_autocast_dtype(device)) for x in (query, key, value))
    joint, lse = attention_with_lse(query, key, value)

    index, rows = maps.tokens.index if text_first else maps.after_image, slice(None) if maps.rows is None else maps.rows
    first = text_tokens if text_first else 0
    image = slice(first, first + image_tokens)
    query, key = query.detach()[rows, :, image], key.detach()[rows]
    if len(query) != len(index):
        raise ValueError(f"tokens: have {len(index)} rows, the model runs {len(query)} of those asked for")
    if lse is not None:
        # One kernel pads its rows, another adds a trailing axis.
        lse = lse.detach().flatten(2)[rows, :, image] if maps.lse else None
    (write_maps if torch.compiler.is_compiling() else write)(
        *(maps.slots, slot, query, key),
        *(index, maps.tokens.weight, lse, maps.head_weight, query.shape[-1] ** -0.5, maps.impl),
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
        image, text = joint[:, :image_tokens], joint[:, image_tokens:]
        if not attn.context_pre_only:
            text = attn.to_add_out(text)
        return attn.to_out[1](attn.to_out[0](image)), text

    @staticmethod
    def _heads(attn: Attention, projections, norms, states: Tensor) -> list[Tensor]:
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
        double = encoder_hidden_states is not None
        image = [linear(hidden_states) for linear in (attn.to_q, attn.to_k, attn.to_v)]
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj) if double else ()
        text = [linear(encoder_hidden_states) for linear in added]
        joint = self._heads(attn, image, (attn.norm_q, attn.norm_k))
        if double:
            text = self._heads(attn, text, (attn.norm_added_q, attn.norm_added_k))
            joint = [torch.cat(pair, dim=1) for pair in zip(text, joint, strict=True)]
            text_tokens = encoder_hidden_states.shape[1]
        else:
            text_tokens = hidden_states.shape[1] - self.maps.slots.shape[-1]
        query, key, value = joint
        del image, text, joint
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        heads = captured_attention(
            *(self.maps, self.slot, *(x.transpose(1, 2) for x in (query, key, value)), text_tokens), text_first=True
        )
        states = heads.transpose(1, 2).flatten(2, 3).to(query.dtype)
        if not double:
            return states
        text, image = states.split_with_sizes([text_tokens, states.shape[1] - text_tokens], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())

    @staticmethod
    def _heads(attn: FluxAttention, projected: Sequence[Tensor], norms) -> list[Tensor]:
        """Query, key and value of one stream, (B, S, H, D)."""
        heads = [x.unflatten(-1, (-1, attn.head_dim)) for x in projected]
        normed = [x if norm is None else norm(x) for x, norm in zip(heads[:2], norms, strict=True)]
        return [*normed, heads[2]]


def unwrapped(model: torch.nn.Module) -> torch.nn.Module:
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


def _check_processor(layer: int, attn: torch.nn.Module, expected: type) -> None:
    """Raise TypeError unless the block computes plain attention as the capturing processors do."""
    processor = attn.processor
    kind = type(processor).__name__
    if type(processor) is not expected:
        fused = " (unfuse the projections: fused SD3 attention skips the q/k norms)" if "Fused" in kind else ""
        raise TypeError(f"transformer: block {layer} has a {kind}, expected {expected.__name__}{fused}")
    if getattr(attn, "fused_projections", False):
        raise TypeError(f"transformer: block {layer} has fused projections, unfuse them to capture maps")
    if expected is FluxAttnProcessor:
        backend = processor._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        if AttentionBackendName(backend) != AttentionBackendName.NATIVE or processor._parallel_config is not None:
            raise TypeError(f"transformer: block {layer} runs attention backend {backend}, expected the native one")


@contextmanager
def capture(
    transformer: torch.nn.Module,
    tokens: ConceptTokens,
    *,
    grid: tuple[int, int],
    rows: slice | Sequence[int] | Tensor | None = None,
    layers: Sequence[int] | None = None,
    layer_weights: Sequence[float] | None = None,
    head_weight: Tensor | None = None,
    normalize: Literal["raw", "content", "concepts"] = "raw",
    lse: bool = True,
    impl: str = "auto",
) -> Iterator[Maps]:
    """Capture concept maps of every forward pass of `transformer` inside the context; the last one is kept.

    Args:
        transformer: an SD3Transformer2DModel or FluxTransformer2DModel, with adapters or without, compiled or not,
            also inside DistributedDataParallel. Only `.attn` of the chosen blocks is touched, and put back whatever
            happens.
        tokens: concepts of the captured rows, from `star.concepts.locate`; for FLUX of the T5 part alone.
        grid: (rows, columns) of the image tokens: latent height and width over the patch size.
        rows: batch rows to read. With classifier-free guidance the conditional ones: slice(B, 2 * B) for diffusers'
            pipelines. None: all rows.
        layers: indices of blocks, default all joint ones; FLUX counts its single-stream blocks after the double-stream
            ones and leaves them out by default. layer_weights: one for each, default equal.
        head_weight: (H,), default equal.
        normalize: "raw" mass; "content": divided by the mass of all concepts' tokens together; "concepts": divided by
            the sum over the concepts.
        lse: use the log-sum-exp of the attention kernel; otherwise the operator makes its own.
        impl: of `star_kernels.attention_maps`.

    Yields:
        Maps. The model's output has the same bits as without it.

    Raises:
        TypeError: a model or an attention processor that is not known. ValueError: wrong layers, shapes or options.
    """
    model = unwrapped(transformer)
    if isinstance(model, SD3Transformer2DModel):
        blocks, default = list(model.transformer_blocks), len(model.transformer_blocks)
        plain, capturing = JointAttnProcessor2_0, CapturingJointAttnProcessor
    elif isinstance(model, FluxTransformer2DModel):
        blocks, default = [*model.transformer_blocks, *model.single_transformer_blocks], len(model.transformer_blocks)
        plain, capturing = FluxAttnProcessor, CapturingFluxAttnProcessor
    else:
        raise TypeError(
            f"transformer: got {type(model).__name__}, expected an SD3Transformer2DModel or a FluxTransformer2DModel"
        )
    if normalize not in NORMALIZATIONS:
        raise ValueError(f"normalize: got {normalize!r}, expected one of {list(NORMALIZATIONS)}")
    layers = list(range(default)) if layers is None else list(layers)
    if not layers or not all(0 <= layer < len(blocks) for layer in layers) or len(set(layers)) != len(layers):
        raise ValueError(f"layers: got {layers}, expected distinct blocks in 0..{len(blocks) - 1}")
    for layer in layers:
        _check_processor(layer, blocks[layer].attn, plain)
    if layer_weights is not None and len(layer_weights) != len(layers):
        raise ValueError(f"layer_weights: got {len(layer_weights)}, expected one for each of {len(layers)} layers")
    device = next(model.parameters()).device
    index, weight = tokens.index.to(device), tokens.weight.to(device)
    batch, groups, slots_per_concept = index.shape
    if normalize == "content":
        # One more concept: every token of all the others, so that its map is the content's whole mass.
        whole = torch.full((batch, 1, groups * slots_per_concept), -1, dtype=torch.int64, device=device)
        for row, used in zip(whole, index.flatten(1), strict=True):
            distinct = used[used >= 0].unique()
            row[0, : len(distinct)] = distinct
        index = torch.cat([F.pad(index, (0, whole.shape[2] - slots_per_concept), value=-1), whole], 1)
        weight = torch.cat([F.pad(weight, (0, whole.shape[2] - slots_per_concept)), (whole >= 0).float()], 1)
    if isinstance(rows, slice):
        start, step = rows.start or 0, rows.step or 1
        rows = range(start, start + batch * step if rows.stop is None else rows.stop, step)
    if rows is not None:
        rows = rows.tolist() if isinstance(rows, Tensor) else list(rows)
        if len(rows) != batch:
            raise ValueError(f"rows: got {len(rows)}, expected one for each of the {batch} rows of tokens")
        # Neighbors are read in place; anything else has to be gathered into a copy.
        if rows == list(range(rows[0], rows[0] + batch)):
            rows = slice(rows[0], rows[-1] + 1 or None)
        else:
            rows = torch.tensor(rows, device=device)
    equal = torch.full((len(layers),), 1 / len(layers))
    maps = Maps(
        slots=torch.zeros(len(layers), batch, index.shape[1], grid[0] * grid[1], device=device),
        tokens=ConceptTokens(index, weight),
        grid=tuple(grid),
        layer_weights=(equal if layer_weights is None else torch.tensor(layer_weights, dtype=torch.float32)).to(device),
        normalize=normalize,
        rows=rows,
        head_weight=None if head_weight is None else head_weight.to(device),
        lse=lse,
        impl=impl,
    )
    before = [blocks[layer].attn.processor for layer in layers]
    try:
        for slot, layer in enumerate(layers):
            blocks[layer].attn.processor = capturing(maps, slot)
        yield maps
    finally:
        for layer, processor in zip(layers, before, strict=True):
            blocks[layer].attn.processor = processor


@contextmanager
def record(
    transformer: torch.nn.Module,
    tokens: ConceptTokens,
    *,
    grid: tuple[int, int],
    rows: slice | Sequence[int] | Tensor | None = None,
    layers: Sequence[int] | None = None,
    normalize: Literal["raw", "content", "concepts"] = "raw",
) -> Iterator[list[Tensor]]:
    """Concept maps of every forward pass inside the context, in order: one for each step of a trainer's sampler.

        with record(pipeline.transformer, tokens, grid=(32, 32), rows=slice(B, 2 * B)) as maps:
            images = pipeline(...)
        weights = torch.stack([allocate(m, (32, 32)) for m in maps], 1)  # (B, steps, H, W)

    Args:
        transformer: the very module that the sampler calls, in whatever wrapper.
        tokens, grid, rows, layers, normalize: of `capture`.

    Yields:
        A list that each pass adds its maps to, (B, G, N) float32.

    Raises:
        What `capture` raises. RuntimeError: no pass was made through this module.
    """
    passes: list[Tensor] = []
    with capture(transformer, tokens, grid=grid, rows=rows, layers=layers, normalize=normalize) as maps:
        handle = transformer.register_forward_hook(lambda *_: passes.append(maps.read()))
        try:
            yield passes
        finally:
            handle.remove()
    if not passes:
        raise RuntimeError("transformer: made no pass inside `record`; give it the module that the sampler calls")


@contextmanager
def allocated(
    transformer: torch.nn.Module,
    tokens: ConceptTokens,
    *,
    grid: tuple[int, int],
    rows: slice | Sequence[int] | Tensor | None = None,
    layers: Sequence[int] | None = None,
    normalize: Literal["raw", "content", "concepts"] = "raw",
    allocation: Allocation | None = None,
    first_pass: bool = False,
) -> Iterator[Maps]:
    """Inside the context the transformer's output has its own values and a gradient weighted by its own maps.

        with allocated(transformer, tokens, grid=(32, 32), rows=slice(B, 2 * B)):
            noise_pred = transformer(...)

    For an update whose loss is made elsewhere: nothing else changes, and nothing has to be stored. Also a decorator.

    Args:
        transformer: the very module that is called, in whatever wrapper.
        tokens, grid, rows, layers, normalize: of `capture`. With guidance in one batch, rows are the conditional ones;
            the unconditional ones get their weights too: guidance is linear, so that weights the guided velocity.
        allocation: strategy "attention" (the default) or "random", and options.
        first_pass: every pass inside the context gets the weights of the first: for guidance in two passes, the
            conditional one before the unconditional one.

    Yields:
        The Maps of the last pass.

    Raises:
        What `capture` raises. ValueError: another strategy, or an output that does not fit the grid.
    """
    allocation = Allocation() if allocation is None else allocation
    if allocation.strategy not in ("attention", "random"):
        raise ValueError(f"allocation: got strategy {allocation.strategy!r}, expected 'attention' or 'random'")

    read: list[Tensor] = []  # with first_pass the maps of the first pass
    with capture(transformer, tokens, grid=grid, rows=rows, layers=layers, normalize=normalize) as maps:

        def weight(module: torch.nn.Module, arguments: tuple, output):
            velocity = output[0]
            if not velocity.requires_grad:
                return None
            if not (first_pass and read):
                read[:] = [maps.read()]
            packed = velocity.ndim == 3
            side = 1 if packed else velocity.shape[-1] // maps.grid[1]
            weights = allocation_weights(allocation, read[0], maps.grid, patch=side)
            weights = weights.flatten(1) if packed else weights
            weights = weights.repeat(len(velocity) // len(weights), *(1,) * (weights.ndim - 1))
            velocity = weighted_gradient(velocity, weights)
            return (velocity, *output[1:]) if isinstance(output, tuple) else type(output)(sample=velocity)

        handle = transformer.register_forward_hook(weight)
        try:
            yield maps
        finally:
            handle.remove()
