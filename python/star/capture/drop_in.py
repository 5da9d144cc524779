"""`record` and `allocated`: captures around a sampler and an update that others wrote."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers import DiffusionPipeline
from torch import Tensor

from star.capture.blocks import Rows, capture, unwrapped
from star.capture.graph import in_backward
from star.capture.maps import Maps
from star.concepts import ConceptTokens, Marks, concept_tokens
from star.layouts import layout_of
from star.objective import Allocation, allocation_weights, weighted_gradient
from star_kernels.checks import checked_integer, checked_integers, shown


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
    if not isinstance(allocation, Allocation):
        raise TypeError(f"allocation: got {shown(allocation)}, expected an Allocation, as Allocation('topk')")
    allocation.check()
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
        chosen = range(len(self.maps)) if steps is None else checked_integers("steps", steps, "numbers of passes")
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
    if checked_integer("passes_per_step", passes_per_step, "an integer") < 1:
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
            if module is not transformer or in_backward():  # a deep copy, or a pass that is computed again
                return
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


class _Recomputed:
    """Whether a pass that is computed again, because the whole transformer is checkpointed, is surely the last one."""

    def __init__(self) -> None:
        self.passes, self.again = 0, False

    def count(self) -> None:
        """A pass was made, or computed again. Raises RuntimeError where several passes wait for their recomputation."""
        if not in_backward():
            self.passes, self.again = (1 if self.again else self.passes + 1), False
            return
        self.again = True
        if self.passes > 1:
            raise RuntimeError(
                f"transformer: {self.passes} passes of a checkpointed transformer wait inside one `allocated`, which "
                "keeps the weights of the last; use one context and backward pass for each, or checkpoint the blocks"
            )


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
    Where the whole transformer is checkpointed, and not its blocks, the backward pass belongs inside as well, one for
    each pass.

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
        RuntimeError: no pass was made through this module, or several passes of a checkpointed transformer wait.
        ValueError: another strategy, prompts without a pipeline or a pipeline without prompts; in the pass an output
            that does not fit the grid.
    """
    allocation = _own_maps_allocation(allocation)
    tokens = _tokens(prompts, pipeline, concepts, brackets)
    last = layout_of(unwrapped(transformer)).last
    weights: Tensor | None = None  # of the last pass, or with first_pass of the first
    recomputed = _Recomputed()
    with ExitStack() as capturing:
        maps = capturing.enter_context(
            capture(transformer, tokens, grid=grid, rows=rows, layers=layers, normalize=normalize)
        )

        def weight(module: torch.nn.Module, arguments: tuple, output: Any) -> Any:
            nonlocal weights
            if module is not transformer:  # a deep copy takes its hooks along
                return None
            if not (first_pass or torch.compiler.is_compiling()):
                recomputed.count()
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
    if maps.grid is None:
        raise RuntimeError("transformer: made no pass inside `allocated`; give it the module that is called")
