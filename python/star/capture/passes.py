"""What a pass shows before its blocks run: its grid, and which of its rows have the concepts."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from star.capture.graph import begin_pass, in_backward, numbered, outside
from star.capture.maps import Maps
from star.layouts import Arguments, Batch, Pass


def _grid(asked: tuple[int, ...] | None, shown: Pass) -> tuple[int, ...]:
    """The grid of a pass: that which it shows, or the given one; the two must agree."""
    if asked is not None and shown.grid is not None and asked != shown.grid:
        axes = ("frames", "rows", "columns")[-len(shown.grid) :]
        raise ValueError(f"grid: got {asked}, expected ({', '.join(axes)}) = {shown.grid}, that of the pass")
    grid = asked or shown.grid
    if grid is None:
        raise ValueError(
            f"grid: got None, which the pass does not show; give (rows, columns) of its {shown.tokens} image tokens"
        )
    if math.prod(grid) != shown.tokens:
        raise ValueError(f"grid: got {grid} of {math.prod(grid)} tokens, expected {shown.tokens} tokens")
    return grid


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


def _require_guidance(images: int, shown: Pass, require: Callable[[Tensor, str], None]) -> None:
    """ValueError for a pass of more rows than tokens that does not guide."""
    message = (
        f"tokens: got {images} rows, the pass has {len(shown.latents)} and no guidance (the same latents with two "
        "texts); give one row for each image, or rows="
    )
    require(_is_guidance(shown), message)


def _inferred_rows(images: int, shown: Pass, conditional: int) -> slice:
    """All rows of a pass, or of twice as many the half with the prompts in diffusers' order."""
    batch = len(shown.latents)
    if batch not in (images, 2 * images):
        raise ValueError(
            f"tokens: got {images} rows, expected {batch}, one for each row of the pass, or {batch / 2:g} with "
            "guidance; for another order give rows="
        )
    first = 0 if batch == images else conditional * images
    return slice(first, first + images)


def _given_rows(
    rows: slice | list[int], images: int, shown: Pass, conditional: int, require: Callable[[Tensor, str], None]
) -> slice | Tensor:
    """The given rows, as a slice where they are neighbors: those are read where they are."""
    batch = len(shown.latents)
    chosen = list(range(batch))[rows] if isinstance(rows, slice) else rows
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

    read: of the layout. grid, rows: those of `capture`, checked."""

    def __init__(
        self,
        maps: Maps,
        read: Callable[[Arguments], Pass],
        conditional: int,
        grid: tuple[int, ...] | None,
        rows: slice | list[int] | None,
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
            options = (images, shown, self.conditional)
            self.chosen[images, batch] = (
                _inferred_rows(*options) if self.rows is None else _given_rows(self.rows, *options, maps.require)
            )
        # Of each pass, since the next one of as many rows may not guide. A graph would check nothing but its capture.
        recorded = shown.latents[0].device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.rows is None and batch > images and not recorded:
            _require_guidance(images, shown, maps.require)
        maps.rows = self.chosen[images, batch]
        maps.begin(shown)


def _tensors(rows: Batch) -> tuple[list[Tensor], bool]:
    """A batch as a list, and whether its rows were one tensor."""
    if isinstance(rows, Tensor):
        return [rows.detach()], True
    return [row.detach() for row in rows], False
