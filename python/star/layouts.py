"""Where image and text lie in the attention of each kind of transformer: a row of a table for each.

A model of your own is one more row: `star.layouts.LAYOUTS["MyTransformer2DModel"] = Layout(...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Arguments = Callable[[str], Any]  # a forward pass's argument by its name, None where it was not given
Reader = Callable[[Arguments], "Pass"]
Batch = Tensor | Sequence[Tensor]  # its rows; a list where their shapes may differ


class Pass(NamedTuple):
    """What a forward pass shows before its first block runs."""

    latents: Batch
    """B of (...), of the images that are denoised."""
    embeds: Batch
    """B of (T, D), of the texts."""
    tokens: int
    """N, the tokens of the image that is denoised, without reference images."""
    grid: tuple[int, ...] | None
    """Their (rows, columns), of a video (frames, rows, columns), or None where the pass does not show them."""
    image: int
    """The first of them among the queries; they follow one another."""
    text: int
    """The first text token among the keys; T follow one another."""
    keys: int | None = None
    """How many keys the attention to the text has; None where a processor has no other attention."""

    def text_tokens(self) -> int:
        """The largest T."""
        return self.embeds.shape[1] if isinstance(self.embeds, Tensor) else max(map(len, self.embeds))


@dataclass(frozen=True)
class Layout:
    """How maps are read from a kind of transformer.

    attentions: its attention modules that read text, in the order of the blocks, each with a `processor`.
    reader: of the model; makes a Pass of a forward pass's arguments. One serves all passes of a `capture`.
    default: how many of the attentions are captured by default, from the first on; None: all.
    conditional: which half of a batch with guidance has the prompts in diffusers' pipeline, 0 or 1.
    """

    attentions: Callable[[Any], Sequence[Any]]
    reader: Callable[[Any], Reader]
    default: Callable[[Any], int] | None = None
    conditional: int = 1


def layout_of(model: torch.nn.Module) -> Layout:
    """The table's row of a model's class or of the nearest class that it is derived from. Raises TypeError."""
    for kind in type(model).__mro__:
        if kind.__name__ in LAYOUTS:
            return LAYOUTS[kind.__name__]
    raise TypeError(
        f"transformer: got {type(model).__name__}, expected one of {', '.join(LAYOUTS)}, or a class with a row in "
        "star.layouts.LAYOUTS"
    )


def _grid_of_ids(ids: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of the first image in position ids as diffusers makes them: (N, 3 or more) of (image, row,
    column, ...), row by row, reference images after the one that is denoised. None for others. Waits for the device."""
    ids = (ids[0] if ids.ndim == 3 else ids).float().cpu()
    if ids.ndim != 2 or ids.shape[1] < 3 or len(ids) == 0 or not ids.isfinite().all():
        return None
    first = ids[: int((ids[:, 0] == ids[0, 0]).cumprod(0).sum())]
    rows, columns = (int(first[:, axis].max()) + 1 for axis in (1, 2))
    if rows * columns != len(first):
        return None
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).view(-1, 2)
    return (rows, columns) if torch.equal(first[:, 1:3], expected.float()) else None


def _tokens_of(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """The grid of the tokens that have patches of the latents' sizes."""
    return tuple(size // part for size, part in zip(sizes, patch, strict=True))


def _sd3(model: Any) -> Reader:
    """The image first; its grid is the latents' height and width over the patch size."""
    patch = model.config.patch_size

    def read(argument: Arguments) -> Pass:
        latents = argument("hidden_states")
        grid = _tokens_of(latents.shape[2:], (patch, patch))
        tokens = math.prod(grid)
        return Pass(latents, argument("encoder_hidden_states"), tokens, grid, image=0, text=tokens)

    return read


def _flux(model: Any) -> Reader:
    """The text first, then packed latents, then those of reference images; img_ids have the grid."""
    last: tuple[Tensor | None, tuple[int, int] | None] = (None, None)

    def read(argument: Arguments) -> Pass:
        nonlocal last
        latents, embeds, ids = (argument(name) for name in ("hidden_states", "encoder_hidden_states", "img_ids"))
        grid = None
        if ids is not None and not torch.compiler.is_compiling():
            if ids is not last[0]:  # reading them waits for the device, so the steps of a sampler do it once
                last = (ids, _grid_of_ids(ids))
            grid = last[1]
        tokens = latents.shape[1] if grid is None else grid[0] * grid[1]
        return Pass(latents[:, :tokens], embeds, tokens, grid, image=embeds.shape[1], text=0)

    return read


def _qwen_image(model: Any) -> Reader:
    """The text first, then packed latents, then those of reference images; img_shapes have (frames, rows, columns)."""

    def read(argument: Arguments) -> Pass:
        latents, embeds, shapes = (argument(n) for n in ("hidden_states", "encoder_hidden_states", "img_shapes"))
        _, rows, columns = shapes[0][0] if isinstance(shapes[0], list) else shapes[0]
        tokens = rows * columns
        return Pass(latents[:, :tokens], embeds, tokens, (rows, columns), image=embeds.shape[1], text=0)

    return read


def _cross(patches: Callable[[Any], tuple[int, ...]]) -> Callable[[Any], Reader]:
    """Cross attention from the latents (B, C, [frames,] height, width), in patches of that size, to the text alone."""

    def reader(model: Any) -> Reader:
        patch = patches(model)

        def read(argument: Arguments) -> Pass:
            latents, embeds = argument("hidden_states"), argument("encoder_hidden_states")
            grid = _tokens_of(latents.shape[2:], patch)
            return Pass(latents, embeds, math.prod(grid), grid, image=0, text=0, keys=embeds.shape[1])

        return read

    return reader


def _ltx(model: Any) -> Reader:
    """Cross attention from packed latents to the text alone; num_frames, height and width are those of the latents."""
    sizes = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)

    def read(argument: Arguments) -> Pass:
        latents, embeds = argument("hidden_states"), argument("encoder_hidden_states")
        shape = [argument(name) for name in ("num_frames", "height", "width")]
        grid = None if None in shape else _tokens_of(shape, sizes)
        return Pass(latents, embeds, latents.shape[1], grid, image=0, text=0, keys=embeds.shape[1])

    return read


def _z_image(model: Any) -> Reader:
    """Of each image the latents (C, frames, height, width), padded to a multiple of 32 tokens, then the text."""
    multiple = 32

    def read(argument: Arguments) -> Pass:
        images, captions = argument("x"), argument("cap_feats")
        patch, patch_frames = argument("patch_size") or 2, argument("f_patch_size") or 1
        shapes = {tuple(image.shape) for image in images if isinstance(image, Tensor)}
        if len(shapes) != 1:
            raise ValueError("transformer: maps of Z-Image need images of one size, and none of reference")
        _, frames, height, width = shapes.pop()
        rows, columns = height // patch, width // patch
        grid = (rows, columns) if frames == patch_frames else (frames // patch_frames, rows, columns)
        tokens = math.prod(grid)
        return Pass(images, captions, tokens, grid, image=0, text=-(-tokens // multiple) * multiple)

    return read


def _hunyuan_image(model: Any) -> Reader:
    """The image first, then the text, in which the glyphs' tokens of a second encoder come before the others."""
    patch = model.config.patch_size

    def read(argument: Arguments) -> Pass:
        latents = argument("hidden_states")
        if argument("encoder_hidden_states_2") is not None:
            raise ValueError("transformer: with encoder_hidden_states_2 the text tokens lie elsewhere in every row")
        grid = _tokens_of(latents.shape[2:], patch)
        tokens = math.prod(grid)
        return Pass(latents, argument("encoder_hidden_states"), tokens, grid, image=0, text=tokens)

    return read


def _blocks(lists: Sequence[str], attention: str = "attn") -> Callable[[Any], list[Any]]:
    """The attention modules of all blocks in these lists of a model."""
    return lambda model: [getattr(block, attention) for name in lists for block in getattr(model, name)]


def _doubles(model: Any) -> int:
    """How many double-stream blocks a model has, which come before the single-stream ones."""
    return len(model.transformer_blocks)


_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_FLUX = Layout(_blocks([_DOUBLE, _SINGLE]), _flux, default=_doubles)

LAYOUTS: dict[str, Layout] = {
    "SD3Transformer2DModel": Layout(_blocks([_DOUBLE]), _sd3),
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": Layout(_blocks([_DOUBLE]), _qwen_image),
    "ZImageTransformer2DModel": Layout(_blocks(["layers"], "attention"), _z_image, conditional=0),
    "HunyuanImageTransformer2DModel": Layout(_blocks([_DOUBLE, _SINGLE]), _hunyuan_image, default=_doubles),
    "SanaTransformer2DModel": Layout(_blocks([_DOUBLE], "attn2"), _cross(lambda model: (model.config.patch_size,) * 2)),
    "WanTransformer3DModel": Layout(_blocks(["blocks"], "attn2"), _cross(lambda model: tuple(model.config.patch_size))),
    "LTXVideoTransformer3DModel": Layout(_blocks([_DOUBLE], "attn2"), _ltx),
}
