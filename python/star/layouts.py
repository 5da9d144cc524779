"""Where image and text lie in the attention of each kind of transformer: a row of a table for each.

A model of your own is one more row: `star.layouts.LAYOUTS["MyTransformer2DModel"] = Layout(...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
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
    text: int | Tensor
    """The first text token among the keys, where T follow one another. Or (B, T) int64: each of them among the keys."""
    keys: int | None = None
    """How many keys the attention to the text has; None where a processor has no other attention."""

    def text_tokens(self) -> int:
        """The largest T."""
        return self.embeds.shape[1] if isinstance(self.embeds, Tensor) else max(map(len, self.embeds))

    def columns(self, index: Tensor, rows: slice | Tensor) -> Tensor:
        """Text tokens (B', ...) of these rows of the batch, -1 where there is none, as numbers of keys."""
        if isinstance(self.text, int):
            return torch.where(index < 0, index, index + self.text)
        keys = self.text.to(index.device)[rows.to(index.device) if isinstance(rows, Tensor) else rows]
        return torch.where(index < 0, index, keys.gather(1, index.clamp_min(0).flatten(1)).view_as(index))


@dataclass(frozen=True)
class Layout:
    """How maps are read from a kind of transformer.

    attentions: its attention modules that read text, in the order of the blocks, each with a `processor`.
    reader: of the model; makes a Pass of a forward pass's arguments. One serves all passes of a `capture`.
    default: how many of the attentions are captured by default, from the first on; None: all.
    conditional: which half of a batch with guidance has the prompts in diffusers' pipeline, 0 or 1.
    query_mask: whether its masks have a row for each query, which is the same for all image tokens.
    last: whether the image that is denoised is the last one in a packed output.
    """

    attentions: Callable[[Any], Sequence[Any]]
    reader: Callable[[Any], Reader]
    default: Callable[[Any], int] | None = None
    conditional: int = 1
    query_mask: bool = False
    last: bool = False


def layout_of(model: torch.nn.Module) -> Layout:
    """The table's row of a model's class or of the nearest class that it is derived from. Raises TypeError."""
    for kind in type(model).__mro__:
        if kind.__name__ in LAYOUTS:
            return LAYOUTS[kind.__name__]
    for kind in type(model).__mro__:
        if kind.__name__ in REFUSED:
            raise TypeError(
                f"transformer: {kind.__name__} is not supported: {REFUSED[kind.__name__]}; an entry of your own in "
                "star.layouts.LAYOUTS may read it"
            )
    raise TypeError(
        f"transformer: got {type(model).__name__}, expected one of {', '.join(LAYOUTS)}, or a class with an entry in "
        "star.layouts.LAYOUTS"
    )


def _grid_of_ids(ids: Tensor) -> tuple[int, int] | None:
    """(rows, columns) of the first image in position ids as diffusers makes them: (N, 3 or more) of (image, row,
    column, ...), row by row from any first one, reference images after the one that is denoised. None for others. Waits
    for the device."""
    ids = (ids[0] if ids.ndim == 3 else ids).float().cpu()
    if ids.ndim != 2 or ids.shape[1] < 3 or len(ids) == 0 or not ids.isfinite().all():
        return None
    first = ids[: int((ids[:, 0] == ids[0, 0]).cumprod(0).sum())]
    locations = first[:, 1:3] - first[0, 1:3]
    rows, columns = (int(size) + 1 for size in locations.amax(0))
    if rows * columns != len(first) or not torch.equal(first, first.round()):
        return None
    cpu = torch.device("cpu")  # whatever the default device is
    expected = torch.cartesian_prod(torch.arange(rows, device=cpu), torch.arange(columns, device=cpu)).view(-1, 2)
    return (rows, columns) if torch.equal(locations, expected.float()) else None


def _tokens_of(sizes: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """The grid of the tokens that have patches of the latents' sizes."""
    return tuple(size // part for size, part in zip(sizes, patch, strict=True))


def _flux(model: Any) -> Reader:
    """The text first, then packed latents, then those of reference images; img_ids have the grid."""
    last: tuple[Tensor | None, int | None, tuple[int, int] | None] = (None, None, None)

    def read(argument: Arguments) -> Pass:
        nonlocal last
        latents, embeds, ids = (argument(name) for name in ("hidden_states", "encoder_hidden_states", "img_ids"))
        if argument("kv_cache_mode") is not None:
            raise ValueError("kv_cache_mode: got a mode, expected None: kept reference images stand before the image")
        grid = None
        if ids is not None and not torch.compiler.is_compiling():
            # Reading them waits for the device, so the steps of a sampler do it once. A buffer may be written again,
            # which only a tensor of inference mode does not tell.
            version = None if ids.is_inference() else ids._version
            if ids is not last[0] or version != last[1]:
                last = (ids, version, _grid_of_ids(ids))
            grid = last[2]
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


def _qwen_image_21(model: Any) -> Reader:
    """One sequence: the text, in which reference images stand, then packed latents. The image has an attention call of
    its own, over all keys."""
    slot = 4  # tokens of an image for each of its slots in the text

    def read(argument: Arguments) -> Pass:
        latents, embeds, shapes = (argument(n) for n in ("hidden_states", "encoder_hidden_states", "img_shapes"))
        _, rows, columns = shapes[0][-1]
        tokens = rows * columns
        references = latents.shape[1] - tokens
        text: int | Tensor = 0
        if references:
            # The model reads the first row alone, and the mask may have fewer of them than the batch.
            lengths = torch.where(argument("img_mask")[:1, : embeds.shape[1]], slot, 1)
            text = (lengths.cumsum(1) - lengths).expand(len(latents), -1)
        keys = embeds.shape[1] - references // slot + latents.shape[1]
        return Pass(latents[:, references:], embeds, tokens, (rows, columns), image=0, text=text, keys=keys)

    return read


def _cross(patches: Callable[[Any], tuple[int, ...]], alone: bool = True) -> Callable[[Any], Reader]:
    """Attention from the latents (B, C, [frames,] height, width), in patches of that size, to the text alone, or to the
    text and then themselves."""

    def reader(model: Any) -> Reader:
        patch = patches(model)

        def read(argument: Arguments) -> Pass:
            latents, embeds = argument("hidden_states"), argument("encoder_hidden_states")
            if not isinstance(embeds, Tensor):
                raise ValueError("encoder_hidden_states: got several, expected one tensor of the text alone")
            grid = _tokens_of(latents.shape[2:], patch)
            return Pass(
                latents, embeds, math.prod(grid), grid, image=0, text=0, keys=embeds.shape[1] if alone else None
            )

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
            raise ValueError("x: got images of several sizes or reference images, expected images of one size")
        _, frames, height, width = shapes.pop()
        rows, columns = height // patch, width // patch
        grid = (rows, columns) if frames == patch_frames else (frames // patch_frames, rows, columns)
        tokens = math.prod(grid)
        return Pass(images, captions, tokens, grid, image=0, text=-(-tokens // multiple) * multiple)

    return read


def _behind(image: int, others: Tensor, mask: Tensor, keys: int) -> Tensor:
    """(B, T) the keys of text tokens with a mask (B, T), which follow the image's and so many `others` (B,); those that
    are masked are the last of all."""
    mask = mask.bool()
    valid = image + others[:, None] + mask.cumsum(1) - 1
    masked = keys - mask.shape[1] + mask.sum(1, keepdim=True) + (~mask).cumsum(1) - 1
    return torch.where(mask, valid, masked)


def _hunyuan_image(model: Any) -> Reader:
    """The image first, then the text; of two encoders the glyphs' tokens, then the others, then all masked ones."""
    patch = model.config.patch_size

    def read(argument: Arguments) -> Pass:
        latents, embeds, glyphs = (
            argument(n) for n in ("hidden_states", "encoder_hidden_states", "encoder_hidden_states_2")
        )
        grid = _tokens_of(latents.shape[2:], patch)
        tokens = math.prod(grid)
        text: int | Tensor = tokens
        if glyphs is not None and model.context_embedder_2 is not None:
            before = argument("encoder_attention_mask_2").bool().sum(1)
            keys = tokens + glyphs.shape[1] + embeds.shape[1]
            text = _behind(tokens, before, argument("encoder_attention_mask"), keys)
        return Pass(latents, embeds, tokens, grid, image=0, text=text)

    return read


def _hunyuan_video_15(model: Any) -> Reader:
    """The video first, then a reference image, the glyphs' tokens, the text, and all that is masked."""
    patch = (model.config.patch_size_t, model.config.patch_size, model.config.patch_size)

    def read(argument: Arguments) -> Pass:
        latents, embeds, image = (argument(n) for n in ("hidden_states", "encoder_hidden_states", "image_embeds"))
        grid = _tokens_of(latents.shape[2:], patch)
        tokens = math.prod(grid)
        before = argument("encoder_attention_mask_2").bool().sum(1) + image.shape[1] * (image != 0).any()
        keys = tokens + image.shape[1] + argument("encoder_hidden_states_2").shape[1] + embeds.shape[1]
        text = _behind(tokens, before, argument("encoder_attention_mask"), keys)
        return Pass(latents, embeds, tokens, grid, image=0, text=text)

    return read


def _image_first(
    patches: Callable[[Any], tuple[int, ...]], embeds: str = "encoder_hidden_states"
) -> Callable[[Any], Reader]:
    """The latents (B, C, [frames,] height, width), in patches of that size, then the text."""

    def reader(model: Any) -> Reader:
        patch = patches(model)

        def read(argument: Arguments) -> Pass:
            latents = argument("hidden_states")
            grid = _tokens_of(latents.shape[2:], patch)
            tokens = math.prod(grid)
            return Pass(latents, argument(embeds), tokens, grid, image=0, text=tokens)

        return read

    return reader


def _text_first(registers: Callable[[Any], int]) -> Callable[[Any], Reader]:
    """So many learned tokens, then the text, then the latents (B, C, height, width) in square patches."""

    def reader(model: Any) -> Reader:
        patch, text = model.config.patch_size, registers(model)

        def read(argument: Arguments) -> Pass:
            latents, embeds = argument("hidden_states"), argument("encoder_hidden_states")
            grid = _tokens_of(latents.shape[2:], (patch, patch))
            return Pass(latents, embeds, math.prod(grid), grid, image=text + embeds.shape[1], text=text)

        return read

    return reader


def _blocks(lists: Sequence[str], attention: str = "attn") -> Callable[[Any], list[Any]]:
    """The attention modules of all blocks in these lists of a model."""
    return lambda model: [getattr(block, attention) for name in lists for block in getattr(model, name)]


def _doubles(model: Any) -> int:
    """How many double-stream blocks a model has, which come before the single-stream ones."""
    return len(model.transformer_blocks)


def _square(model: Any) -> tuple[int, int]:
    """The patch of images."""
    return (model.config.patch_size,) * 2


def _solid(model: Any) -> tuple[int, ...]:
    """The patch of videos whose configuration has it for all axes."""
    return tuple(model.config.patch_size)


def _frames_and_square(model: Any) -> tuple[int, int, int]:
    """The patch of videos whose configuration has it for the frames and for rows and columns."""
    return (model.config.patch_size_t, *_square(model))


_DOUBLE, _SINGLE = "transformer_blocks", "single_transformer_blocks"
_BOTH = _blocks([_DOUBLE, _SINGLE])
_FLUX = Layout(_BOTH, _flux, default=_doubles)
_WAN = Layout(_blocks(["blocks"], "attn2"), _cross(_solid))
_LTX = Layout(_blocks([_DOUBLE], "attn2"), _ltx)

LAYOUTS: dict[str, Layout] = {
    "SD3Transformer2DModel": Layout(_blocks([_DOUBLE]), _image_first(_square)),
    "FluxTransformer2DModel": _FLUX,
    "Flux2Transformer2DModel": _FLUX,
    "ChromaTransformer2DModel": replace(_FLUX, query_mask=True),
    "BriaTransformer2DModel": _FLUX,
    "BriaFiboTransformer2DModel": replace(_FLUX, query_mask=True),
    "LongCatImageTransformer2DModel": _FLUX,
    "OvisImageTransformer2DModel": _FLUX,
    "QwenImageTransformer2DModel": Layout(_blocks([_DOUBLE]), _qwen_image),
    "QwenImage21Transformer2DModel": Layout(_blocks([_DOUBLE]), _qwen_image_21, last=True),
    "ZImageTransformer2DModel": Layout(_blocks(["layers"], "attention"), _z_image, conditional=0),
    "AuraFlowTransformer2DModel": Layout(
        _blocks(["joint_transformer_blocks", "single_transformer_blocks"]),
        _text_first(lambda model: model.register_tokens.shape[1]),
        default=lambda model: len(model.joint_transformer_blocks),
    ),
    "CogView3PlusTransformer2DModel": Layout(_blocks([_DOUBLE], "attn1"), _text_first(lambda model: 0)),
    "CogView4Transformer2DModel": Layout(_blocks([_DOUBLE], "attn1"), _text_first(lambda model: 0), query_mask=True),
    "ErnieImageTransformer2DModel": Layout(_blocks(["layers"], "self_attention"), _image_first(_square, "text_bth")),
    "PRXTransformer2DModel": Layout(
        _blocks(["blocks"], "attention"), _cross(lambda model: (model.patch_size,) * 2, alone=False)
    ),
    "HunyuanImageTransformer2DModel": Layout(_BOTH, _hunyuan_image, default=_doubles),
    "HunyuanVideoTransformer3DModel": Layout(_BOTH, _image_first(_frames_and_square), default=_doubles),
    "HunyuanVideo15Transformer3DModel": Layout(_blocks([_DOUBLE]), _hunyuan_video_15, query_mask=True),
    "PixArtTransformer2DModel": Layout(_blocks([_DOUBLE], "attn2"), _cross(_square)),
    "SanaTransformer2DModel": Layout(_blocks([_DOUBLE], "attn2"), _cross(_square)),
    "SanaVideoTransformer3DModel": Layout(_blocks([_DOUBLE], "attn2"), _cross(_solid)),
    "CosmosTransformer3DModel": Layout(_blocks([_DOUBLE], "attn2"), _cross(_solid)),
    "AllegroTransformer3DModel": Layout(_blocks([_DOUBLE], "attn2"), _cross(_frames_and_square)),
    "WanTransformer3DModel": _WAN,
    "WanVACETransformer3DModel": _WAN,
    "ChronoEditTransformer3DModel": _WAN,
    "SkyReelsV2Transformer3DModel": _WAN,
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": _LTX,
}

REFUSED = {
    "AnyFlowTransformer3DModel": "the frames of its latents come before their channels",
    "CogVideoXTransformer3DModel": "the frames of its latents come before their channels",
    "ConsisIDTransformer3DModel": "the frames of its latents come before their channels",
    "DiTTransformer2DModel": "it reads class labels and no text",
    "HiDreamImageTransformer2DModel": "every block puts another layer of its text encoder behind the text",
    "HunyuanVideoFramepackTransformer3DModel": "frames of the past stand among those that are denoised",
    "Kandinsky5Transformer3DModel": "the channels of its latents come last",
    "LatteTransformer3DModel": "its attention takes every frame as a row of the batch",
    "Lumina2Transformer2DModel": "the image follows the text of each row and begins elsewhere in every one",
    "MochiTransformer3DModel": "its attention is called for each row of the batch by itself",
    "OmniGenTransformer2DModel": "text and images are one sequence, in an order that the pass does not show",
    "WanAnimateTransformer3DModel": "a frame of reference stands among those that are denoised",
}
"""Kinds of transformers without a row, and why."""
