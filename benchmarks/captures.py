"""What reading maps costs: one layer's attention, a stack of blocks, the host's time, and peak memory.

Every capture stands beside "five lines of PyTorch": what is left to write by hand where the attention's own
log-sum-exp is at hand.
"""

from __future__ import annotations

import copy
import cProfile
import math
import os
import pstats
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from torch import Tensor

from machine import fastest
from medium import HEADS, WIDTH, medium_transformer
from memory import in_a_process
from runner import Counted, Sides
from star.capture import Maps, capture
from star.capture.blocks import Observer
from star.concepts import ConceptTokens
from star.layouts import Pass
from star.tap import Tapped, attention_with_lse
from star_kernels import attention_maps

BLOCKS = 4
FULL = os.environ.get("STAR_BENCH_FULL") == "1"


@dataclass(frozen=True)
class Shape:
    """The attention of a model that reads its text, and how much of it is measured on a CPU.

    grid: of image tokens, of a video (frames, rows, columns). text: tokens. heads: of the model, each of `width`
    channels. joint: image and text attend to both; else the image attends to the text, and in a call of its own to
    itself. share: of the heads, or of a video's frames, one in so many is measured: time is proportional to both.
    STAR_BENCH_FULL=1 measures all.
    """

    model: str
    grid: tuple[int, ...]
    text: int
    heads: int
    width: int = 128
    joint: bool = True
    share: int = 1

    @property
    def measured_heads(self) -> int:
        return self.heads // (self.share if self.joint and not FULL else 1)

    @property
    def measured_grid(self) -> tuple[int, ...]:
        return self.grid if self.joint or FULL else (self.grid[0] // self.share, *self.grid[1:])

    @property
    def image(self) -> int:
        """Measured image tokens."""
        return math.prod(self.measured_grid)


# SD3.5-medium with Flow-GRPO's and with diffusers' number of text tokens; the others' heads, widths and lengths are
# those of the published configurations; a video of 81 frames, 832 x 480.
SHAPES = {
    "512": Shape("SD3.5-medium", (32, 32), 205, HEADS, WIDTH),
    "1024": Shape("SD3.5-medium", (64, 64), 333, HEADS, WIDTH),
    "qwen_1024": Shape("Qwen-Image", (64, 64), 512, 24, share=4),
    "flux2_1024": Shape("FLUX.2 dev", (64, 64), 512, 48, share=8),
    "wan_480p": Shape("Wan 2.1 1.3B", (21, 30, 52), 512, 12, joint=False, share=21),
}
MAPS_AGREE = dict(rtol=1e-4, atol=1e-7)


def concepts(batch: int, columns: int = 16, text: int = 205) -> ConceptTokens:
    """`columns` text tokens in concepts of at most eight."""
    width = next(width for width in range(8, 0, -1) if columns % width == 0)
    index = (torch.arange(columns) * text // columns).view(-1, width)
    return ConceptTokens(index.expand(batch, -1, -1), torch.full((batch, *index.shape), 1 / width))


def maps_by_torch(query: Tensor, key: Tensor, lse: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """Five lines of PyTorch with the attention's own log-sum-exp. columns, weights: (B, G, K)."""
    index = columns.flatten(1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    scores = query @ key.gather(2, index).mT * query.shape[-1] ** -0.5
    mass = torch.exp(scores - lse[..., None]).mean(1)  # (B, N, G * K)
    return (mass.unflatten(-1, columns.shape[1:]) * weights[:, None]).sum(-1).mT


def write_by_torch(maps: Maps, number: int, query: Tensor, key: Tensor, mask, scale, lse: Tensor) -> None:
    """In the place of `Maps.write`: these five lines in a whole model."""
    rows = slice(None) if maps.rows is None else maps.rows
    tokens = slice(maps.image, maps.image + maps.slots.shape[-1])
    part = query[rows][:, :, tokens], key[rows], lse[rows][:, :, tokens]
    maps.slots[number].copy_(maps_by_torch(*part, maps.columns, maps.weights))
    maps.written[number] = True


@dataclass(frozen=True)
class Layer:
    """The tensors of one layer's attention, and maps of it."""

    query: Tensor
    key: Tensor
    value: Tensor
    maps: Maps

    def attention(self) -> Tensor:
        return F.scaled_dot_product_attention(self.query, self.key, self.value)

    def attend(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """F.scaled_dot_product_attention with capture into the maps."""
        call = Tapped()
        call.star_observer = Observer(self.maps, 0)

        def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            self.maps.written[0] = False  # every call stands for a pass of its own
            return call.star_scaled_dot_product_attention(query, key, value)

        return attend

    def with_lse(self) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """The attention's output, and (query, key, log-sum-exp) of which the maps are made."""
        output, lse = attention_with_lse(self.query, self.key, self.value)
        assert lse is not None
        rows, image = slice(None) if self.maps.rows is None else self.maps.rows, self.maps.slots.shape[-1]
        return output, (self.query[rows][:, :, :image], self.key[rows], lse[rows][:, :, :image])

    def by_matrix(self) -> tuple[Tensor, Tensor]:
        """What tools that show attention maps do: hold softmax(QK^T), multiply, and pick the columns."""
        probability = torch.softmax(self.query @ self.key.mT * self.query.shape[-1] ** -0.5, -1)
        mean = probability[:, :, : self.maps.slots.shape[-1]].mean(1)  # (B, N, keys)
        found = [(row[:, index] * weight).sum(-1).T for row, index, weight in zip(mean, *self.chosen(), strict=True)]
        return probability @ self.value, torch.stack(found)

    def chosen(self) -> tuple[Tensor, Tensor]:
        return self.maps.columns, self.maps.weights


def layer(name: str, columns: int = 16, guided: bool = False, lse: bool = True) -> Layer:
    """guided: guidance doubles the rows of attention, and only the conditional half is read."""
    shape = SHAPES[name]
    torch.manual_seed(0)
    rows, heads, image, text = 1 + guided, shape.measured_heads, shape.image, shape.text
    queries, keys = (image + text, image + text) if shape.joint else (image, text)
    query = torch.randn(rows, heads, queries, shape.width)
    key, value = torch.randn(2, rows, heads, keys, shape.width).unbind(0)
    tokens = concepts(1, columns, text)
    maps = Maps(tokens=tokens, grid=shape.measured_grid, rows=slice(1, 2) if guided else None, lse=lse, impl="native")
    first = image if shape.joint else 0  # where the text lies among the keys
    latents, embeds = torch.empty(rows, 0), torch.empty(rows, text, 0)
    maps.begin(Pass(latents, embeds, image, shape.measured_grid, image=0, text=first))
    return Layer(query, key, value, maps)


def about(name: str) -> str:
    shape = SHAPES[name]
    part = f"{shape.measured_heads} of {shape.heads} heads, " if shape.measured_heads < shape.heads else ""
    whole = math.prod(shape.grid)
    part += f"{shape.image} of {whole} image tokens, " if shape.image < whole else f"{whole} image tokens, "
    return f"{shape.model}, {part}{shape.text} of text, float32"


def same_output(captured: Tensor, attention: Tensor) -> None:
    torch.testing.assert_close(captured, attention, rtol=0, atol=0)


def of_a_layer(name: str, **options) -> Sides:
    """Attention with capture against attention."""
    one = layer(name, **options)
    attend = one.attend()
    captured = torch.no_grad(lambda: attend(one.query, one.key, one.value))

    def equal(captured: Tensor, attention: Tensor) -> None:
        same_output(captured, attention)
        torch.testing.assert_close(one.maps.slots[0], maps_by_torch(*one.with_lse()[1], *one.chosen()), **MAPS_AGREE)

    scale, note = (1.0, "") if SHAPES[name].joint else share_of_the_text(name, one)
    return Sides(captured, torch.no_grad(one.attention), equal, f"{about(name)}{note}", scale)


def share_of_the_text(name: str, one: Layer) -> tuple[float, str]:
    """Of the layer's attention: the video's to itself, which is not captured, takes most of the time."""
    keys = math.prod(SHAPES[name].grid)
    others = torch.randn(2, *one.key.shape[:2], keys, one.key.shape[-1])
    itself = fastest(lambda: F.scaled_dot_product_attention(one.query, *others))
    text = fastest(one.attention)
    return text / (itself + text), f"; the attention to the {keys} tokens of the video, {itself:.3g} s, counted in"


def maps_of_a_layer(name: str, **options) -> Sides:
    """The maps alone, from the attention's log-sum-exp, against five lines of PyTorch."""
    one = layer(name, **options)
    _, (query, key, lse) = one.with_lse()
    columns, weights = one.chosen()
    out = one.maps.slots[0]
    read = columns.numel() * key.shape[1] * key.shape[-1] * key.element_size()
    return Sides(
        torch.no_grad(lambda: attention_maps(query, key, columns, weights, lse=lse, impl="native")),
        torch.no_grad(lambda: maps_by_torch(query, key, lse, columns, weights)),
        partial(torch.testing.assert_close, **MAPS_AGREE),
        about(name),
        moved=query.nbytes + lse.nbytes + out.nbytes + read,
    )


def own_log_sum_exp(columns: int = 16) -> Sides:
    """Capture that makes its own log-sum-exp against attention that gives it and five lines of PyTorch."""
    one, truth = (layer("512", columns, guided=True, lse=lse) for lse in (False, True))
    attend = one.attend()

    def captured():
        return attend(one.query, one.key, one.value), one.maps.slots[0]

    def by_torch():
        output, seen = truth.with_lse()
        return output, maps_by_torch(*seen, *truth.chosen())

    def equal(captured, by_torch):
        same_output(captured[0], by_torch[0])
        torch.testing.assert_close(captured[1], by_torch[1], **MAPS_AGREE)

    return Sides(torch.no_grad(captured), torch.no_grad(by_torch), equal, about("512"))


def against_the_matrix(name: str) -> Sides:
    """Attention with capture against holding the attention matrix."""
    one = layer(name)
    attend = one.attend()

    def equal(captured, by_matrix):
        torch.testing.assert_close(captured[0], by_matrix[0], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(captured[1], by_matrix[1], **MAPS_AGREE)

    def captured():
        return attend(one.query, one.key, one.value), one.maps.slots[0]

    return Sides(torch.no_grad(captured), torch.no_grad(one.by_matrix), equal, about(name))


def host_breakdown(run: Callable[[], object], layers: int) -> str:
    """The functions of this project that take the most time of their own in a run, in us of each layer."""
    profile = cProfile.Profile()
    profile.runcall(run)
    own = {}
    for (file, _, function), (_, _, seconds, _, _) in pstats.Stats(profile).stats.items():
        if "/star" in file or "star" in function:
            own[function.split(".")[-1].strip(">") or "operator"] = seconds / layers * 1e6
    most = sorted(own.items(), key=lambda item: -item[1])[:6]
    return ", ".join(f"{function} {us:.1f}" for function, us in most)


def host(by_torch: bool = False) -> Sides:
    """A captured layer of tensors so small that nearly all time is the host's: 24 blocks of 32 channels, one thread.

    Against one without capture or, by_torch, one whose maps five lines of PyTorch make."""
    layers = 24
    sizes = dict(num_layers=layers, attention_head_dim=16, num_attention_heads=2, sample_size=16, in_channels=4)
    text = dict(joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=16)
    model = SD3Transformer2DModel(**sizes, **text, patch_size=2, qk_norm="rms_norm").eval().requires_grad_(False)
    inputs = dict(
        hidden_states=torch.randn(2, 4, 6, 10),
        encoder_hidden_states=torch.randn(2, 7, 24),
        pooled_projections=torch.randn(2, 20),
        timestep=torch.full((2,), 500.0),
    )
    tokens = concepts(2, 4, text=7)
    captured = Captured(copy.deepcopy(model), inputs, tokens)
    other = Captured(copy.deepcopy(model), inputs, tokens, write_by_torch) if by_torch else plain(model, inputs)
    captured()
    where = host_breakdown(lambda: [captured() for _ in range(20)], layers * 20)
    return Sides(captured, other, same_output, f"one thread; under a profiler: {where}", scale=1 / layers, threads=1)


def plain(model: SD3Transformer2DModel, inputs: dict) -> Callable[[], Tensor]:
    return torch.no_grad(lambda: model(**inputs, return_dict=False)[0])


class Captured:
    """A pass of a model that is captured as long as this lives. write: in the place of Maps.write."""

    def __init__(self, model: SD3Transformer2DModel, inputs: dict, tokens: ConceptTokens, write=None) -> None:
        self.context = capture(model, tokens, impl="native")
        maps = self.context.__enter__()
        if write is not None:
            maps.write = partial(write, maps)
        self.run = plain(model, inputs)

    def __call__(self) -> Tensor:
        return self.run()


def stack(blocks: int = BLOCKS) -> tuple[SD3Transformer2DModel, dict[str, torch.Tensor]]:
    """Blocks of SD3.5-medium's width, the first two with dual attention, and inputs of one sample at 512 px."""
    torch.manual_seed(0)
    text, grid = SHAPES["512"].text, SHAPES["512"].grid
    model = medium_transformer(blocks)
    inputs = dict(
        hidden_states=torch.randn(1, 16, 2 * grid[0], 2 * grid[1]),
        encoder_hidden_states=torch.randn(1, text, 4096),
        pooled_projections=torch.randn(1, 2048),
        timestep=torch.tensor([500.0]),
    )
    return model.eval().requires_grad_(False), inputs


def of_a_stack(layers: list[int] | None, by_torch: bool = False) -> Sides:
    """A forward pass in which some blocks are captured against one without or, by_torch, with five lines of PyTorch."""
    model, inputs = stack()

    @torch.no_grad()
    def captured(write=None):
        with capture(model, concepts(1), grid=SHAPES["512"].grid, layers=layers, impl="native") as maps:
            if write is not None:
                maps.write = partial(write, maps)
            output = model(**inputs, return_dict=False)[0]
            return output, maps.layers()

    def equal(captured, other):
        same_output(captured[0], other[0] if by_torch else other)
        if by_torch:
            torch.testing.assert_close(captured[1], other[1], **MAPS_AGREE)

    other = partial(captured, write_by_torch) if by_torch else plain(model, inputs)
    return Sides(captured, other, equal, f"forward pass of {BLOCKS} blocks of SD3.5-medium's width, 512 px")


def layer_peaks(peak, batch: int) -> tuple[int, int, int]:
    """Peak of attention alone, with capture into the slots of 24 layers, and of one sample with its matrix held."""
    shape, layers = SHAPES["1024"], 24

    def attend(maps, qkv):
        # Layer after layer into its slot, as in a model: what one needs must not stay behind for the next.
        for number in range(2):
            maps.written[number] = False
            call = Tapped()
            call.star_observer = Observer(maps, number)
            call.star_scaled_dot_product_attention(*qkv)

    def begun(batch, grid, text, layers):
        maps = Maps(tokens=concepts(batch, text=text), grid=grid, blocks=tuple(range(layers)), impl="native")
        image = math.prod(grid)
        maps.begin(Pass(torch.empty(batch, 0), torch.empty(batch, text, 0), image, grid, image=0, text=image))
        return maps

    with torch.no_grad():
        # Loads what is loaded once.
        attend(begun(1, (4, 8), 100, 2), torch.randn(3, 1, HEADS, 132, WIDTH))
        maps = begun(batch, shape.grid, shape.text, layers)
        qkv = torch.randn(3, batch, HEADS, shape.image + shape.text, WIDTH)
        query, key, _ = qkv
        alone = peak(lambda: F.scaled_dot_product_attention(*qkv))
        captured = peak(lambda: attend(maps, qkv))
        matrix = peak(lambda: torch.softmax(query[:1, :, : shape.image] @ key[:1].mT / 8, -1).mean(1))
    assert bool((maps.slots[:2] > 0).all())
    return alone, captured, matrix


def memory_of_capture() -> Counted:
    batch = int(os.environ.get("STAR_BENCH_BATCH", "8"))
    alone, captured, matrix = in_a_process("captures", "layer_peaks", batch)
    note = f"beyond the slots, batch {batch}, {about('1024')}; attention alone peaks at {alone >> 20} MiB"
    return Counted(captured, alone, f"{note}, the matrix of a single sample at {matrix >> 20} MiB")


def checkpoint_peak(peak, captured: bool) -> tuple[int]:
    """Peak of a forward and backward pass of the stack with block checkpointing."""
    model, inputs = stack()
    model.requires_grad_(True).train()
    model.enable_gradient_checkpointing()

    def step():
        if captured:
            with capture(model, concepts(1), grid=SHAPES["512"].grid) as maps:
                output = model(**inputs, return_dict=False)[0]
            assert bool((maps.read() > 0).all())
        else:
            output = model(**inputs, return_dict=False)[0]
        output.square().mean().backward()
        # Gradients that wait for the next pass would be held before it, and not be seen in its peak.
        model.zero_grad(set_to_none=True)

    step()
    return (peak(step),)


def memory_with_checkpointing() -> Counted:
    plain, captured = (in_a_process("captures", "checkpoint_peak", on)[0] for on in (False, True))
    note = f"forward and backward of {BLOCKS} checkpointed blocks peak at {plain >> 20} MiB"
    return Counted(captured, plain, note)
