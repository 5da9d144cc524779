"""What reading maps costs: one layer's attention at SD3.5-medium's shape, a stack of blocks, and peak memory."""

import copy
import cProfile
import math
import os
import pstats
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel

from medium import HEADS, WIDTH, medium_transformer
from pairs import alternate
from peaks import in_a_process, linux
from star.capture import Maps, Observer, capture
from star.concepts import ConceptTokens
from star.layouts import Pass
from star.tap import Tapped, attention_with_lse
from star_kernels import attention_maps

SIZES = {512: (205, (32, 32)), 1024: (333, (64, 64))}  # pixels: text tokens (Flow-GRPO's, diffusers'), image tokens
BLOCKS = 4


def concepts(batch: int, columns: int = 16, text: int = 205) -> ConceptTokens:
    """`columns` text tokens in concepts of at most eight."""
    width = next(width for width in range(8, 0, -1) if columns % width == 0)
    index = (torch.arange(columns) * text // columns).view(-1, width)
    return ConceptTokens(index.expand(batch, -1, -1), torch.full((batch, *index.shape), 1 / width))


def empty_maps(tokens: ConceptTokens, grid: tuple[int, int], layers: int = 1, rows=None, lse: bool = True) -> Maps:
    return Maps(tokens=tokens, grid=grid, blocks=tuple(range(layers)), rows=rows, lse=lse, impl="native")


def attention_inputs(pixels: int, batch: int = 1) -> torch.Tensor:
    """(3, batch, HEADS, image + text tokens, WIDTH) float32: query, key, value."""
    text, grid = SIZES[pixels]
    torch.manual_seed(0)
    return torch.randn(3, batch, HEADS, grid[0] * grid[1] + text, WIDTH)


def materialized_attention(query, key, value, maps: Maps) -> torch.Tensor:
    """What tools that show attention maps do: hold softmax(QK^T), multiply, and pick the columns."""
    probability = torch.softmax(query @ key.mT * query.shape[-1] ** -0.5, -1)
    image = maps.slots.shape[-1]
    mean = probability[:, :, :image, image:].mean(1)  # (B, N, T)
    for row, (index, weight) in enumerate(zip(maps.tokens.index, maps.tokens.weight, strict=True)):
        maps.slots[0, row] = (mean[row, :, index] * weight).sum(-1).T
    return probability @ value


def tapped_attention(maps: Maps, text: int) -> list[Callable[..., torch.Tensor]]:
    """Of each layer: F.scaled_dot_product_attention of a sequence of image and text, with capture into the maps."""
    batch, image = len(maps.tokens.index), maps.slots.shape[-1]
    maps.begin(Pass(torch.empty(batch, 0), torch.empty(batch, text, 0), image, maps.grid, image=0, text=image))
    calls = []
    for number in range(len(maps.blocks)):
        call = Tapped()
        call.star_observer = Observer(maps, number)
        calls.append(call.star_scaled_dot_product_attention)
    return calls


@pytest.mark.parametrize(
    ("name", "pixels", "columns", "limit"),
    [
        ("capture_k16_512", 512, 16, 0.8),
        ("capture_k16_1024", 1024, 16, 0.4),
        ("capture_k64_512", 512, 64, 2.5),
        ("capture_all_512", 512, 205, 8.0),
    ],
)
def test_capture_of_a_layer(name, pixels, columns, limit, benchmark, row):
    text, grid = SIZES[pixels]
    qkv = attention_inputs(pixels)
    maps, truth = (empty_maps(concepts(1, columns, text), grid) for _ in range(2))

    @torch.no_grad()
    def attention():
        return F.scaled_dot_product_attention(*qkv)

    (attend,) = tapped_attention(maps, text)

    @torch.no_grad()
    def captured():
        return attend(*qkv)

    assert torch.equal(attention(), captured())
    materialized_attention(*qkv, truth)
    torch.testing.assert_close(maps.slots, truth.slots, rtol=1e-4, atol=1e-7)
    pair = alternate(attention, captured, rounds=21 if pixels == 1024 else 101)
    benchmark.pedantic(captured, rounds=1)
    note = f"percent; attention {pair.first * 1e3:.2f} ms, with capture {pair.second * 1e3:.2f} ms"
    row(name, 100 * (pair.ratio - 1), at_most=limit, note=note)


def test_own_log_sum_exp(benchmark, row):
    """Guidance doubles the rows of attention; only the conditional half is read."""
    text, grid = SIZES[512]
    qkv = attention_inputs(512, batch=2)
    maps, truth = (empty_maps(concepts(1), grid, rows=slice(1, 2), lse=lse) for lse in (False, True))

    @torch.no_grad()
    def attention():
        return F.scaled_dot_product_attention(*qkv)

    (attend,), (attend_truth,) = tapped_attention(maps, text), tapped_attention(truth, text)

    @torch.no_grad()
    def captured(attend=attend):
        return attend(*qkv)

    assert torch.equal(captured(), captured(attend_truth))
    torch.testing.assert_close(maps.slots, truth.slots, rtol=1e-4, atol=1e-7)
    pair = alternate(attention, captured, rounds=31)
    benchmark.pedantic(captured, rounds=1)
    note = f"percent; attention of two rows {pair.first * 1e3:.1f} ms, with capture {pair.second * 1e3:.1f} ms"
    row("capture_nolse_512", 100 * (pair.ratio - 1), at_most=60, note=note)


def test_against_materializing(benchmark, row):
    text, grid = SIZES[512]
    qkv = attention_inputs(512)
    maps, truth = (empty_maps(concepts(1), grid) for _ in range(2))

    (attend,) = tapped_attention(maps, text)

    @torch.no_grad()
    def captured():
        return attend(*qkv)

    @torch.no_grad()
    def materialized():
        return materialized_attention(*qkv, truth)

    torch.testing.assert_close(captured(), materialized(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(maps.slots, truth.slots, rtol=1e-4, atol=1e-7)
    pair = alternate(captured, materialized, rounds=15)
    benchmark.pedantic(captured, rounds=1)
    note = f"times faster; {pair.first * 1e3:.1f} ms against {pair.second * 1e3:.1f} ms"
    row("materialize_512", pair.ratio, at_least=3.5, note=note)


@dataclass(frozen=True)
class Shape:
    """The attention of a model that reads its text, and how much of it is measured on a CPU.

    grid: of image tokens, of a video (frames, rows, columns). text: tokens. joint: image and text attend to both; else
    the image attends to the text, and in a call of its own to itself. heads: of the model. share: of the heads, or of
    a video's frames, one in so many is measured: time is proportional to both. STAR_BENCH_FULL=1 measures all.
    """

    model: str
    grid: tuple[int, ...]
    text: int
    joint: bool
    heads: int
    share: int
    width: int = 128

    @property
    def measured_heads(self) -> int:
        return self.heads // (self.share if self.joint and not FULL else 1)

    @property
    def measured_grid(self) -> tuple[int, ...]:
        return self.grid if self.joint or FULL else (self.grid[0] // self.share, *self.grid[1:])


FULL = os.environ.get("STAR_BENCH_FULL") == "1"
# Heads, widths and lengths of the published configurations; a video of 81 frames, 832 x 480.
MODELS = {
    "capture_qwen_1024": Shape("Qwen-Image", (64, 64), 512, True, 24, share=4),
    "capture_flux2_1024": Shape("FLUX.2 dev", (64, 64), 512, True, 48, share=8),
    "capture_wan_480p": Shape("Wan 2.1 1.3B", (21, 30, 52), 512, False, 12, share=21),
}


def maps_by_torch(query, key, lse, maps: Maps) -> torch.Tensor:
    """What is left to do in plain PyTorch when the attention's own log-sum-exp is there."""
    index = maps.columns.flatten(1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    scores = query @ key.gather(2, index).mT * query.shape[-1] ** -0.5
    mass = torch.exp(scores - lse[..., None]).mean(1)  # (B, N, G * K)
    return (mass.unflatten(-1, maps.columns.shape[1:]) * maps.weights[:, None]).sum(-1).mT


@pytest.mark.parametrize("name", MODELS)
def test_capture_at_the_shapes_of_models(name, benchmark, row):
    """One sample, 16 columns: capture of a layer, of its maps alone against five lines of PyTorch, and against holding
    the matrix."""
    shape = MODELS[name]
    heads, grid, width, text = shape.measured_heads, shape.measured_grid, shape.width, shape.text
    image, keys = math.prod(grid), math.prod(shape.grid)
    torch.manual_seed(0)
    tokens = concepts(1, text=text)
    maps = Maps(tokens=tokens, grid=grid, impl="native")
    first = image if shape.joint else 0  # where the text lies among the keys
    maps.begin(Pass(torch.empty(1, 0), torch.empty(1, text, 0), image, grid, image=0, text=first))
    query = torch.randn(1, heads, image + text if shape.joint else image, width)
    key, value = torch.randn(2, 1, heads, image + text if shape.joint else text, width).unbind(0)
    call = Tapped()
    call.star_observer = Observer(maps, 0)

    @torch.no_grad()
    def attention():
        return F.scaled_dot_product_attention(query, key, value)

    @torch.no_grad()
    def captured():
        return call.star_scaled_dot_product_attention(query, key, value)

    @torch.no_grad()
    def materialized():
        probability = torch.softmax(query @ key.mT * width**-0.5, -1)
        columns = probability[:, :, :image].mean(1)[:, :, first:]
        found = columns[:, :, tokens.index[0]] * tokens.weight[0]
        return probability @ value, found.sum(-1).mT

    assert torch.equal(attention(), captured())
    with torch.no_grad():
        lse = attention_with_lse(query, key, value)[1]
        assert lse is not None
        seen, norm = query[:, :, :image], lse[:, :, :image]
        ours = lambda: attention_maps(seen, key, maps.columns, maps.weights, lse=norm)
        plain = lambda: maps_by_torch(seen, key, norm, maps)
        torch.testing.assert_close(ours(), plain(), rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(maps.slots[0], materialized()[1], rtol=1e-4, atol=1e-7)
        pair, alone, matrix = (
            alternate(attention, captured, 15),
            alternate(ours, plain, 31),
            alternate(captured, materialized, 5),
        )
        share, own = 1.0, ""
        if not shape.joint:
            others = torch.randn(2, 1, heads, keys, width)
            itself = alternate(lambda: F.scaled_dot_product_attention(query, *others), attention, 5)
            share = itself.second / (itself.first + itself.second)
            own = f" and to the {keys} tokens of the video {itself.first * 1e3:.0f} ms"
    benchmark.pedantic(captured, rounds=1)
    part = f"{shape.model}, {heads} of {shape.heads} heads, {image} of {keys} image tokens' queries, float32"
    low, high = (100 * share * (ratio - 1) for ratio in pair.quartiles)
    note = f"percent of the layer's attention, quartiles {low:.2f}, {high:.2f}; {part}: attention to the text "
    row(name, 100 * share * (pair.ratio - 1), at_most=0.5, note=f"{note}{pair.first * 1e3:.1f} ms{own}")
    note = f"times faster than five lines of PyTorch with the attention's log-sum-exp; {part}: "
    times = f"{alone.first * 1e3:.2f} ms against {alone.second * 1e3:.2f} ms"
    row(f"{name}_vs_torch", alone.ratio, at_least=2, note=f"{note}{times}")
    times = f"{matrix.first * 1e3:.1f} ms against {matrix.second * 1e3:.1f} ms"
    row(f"{name}_vs_matrix", matrix.ratio, at_least=1, note=f"times faster than holding the matrix; {part}: {times}")


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


def test_host_time_of_a_captured_layer(benchmark, row):
    """Tensors so small that nearly all time is the host's: 24 blocks of 32 channels, one thread."""
    layers, passes = 24, 50
    sizes = dict(num_layers=layers, attention_head_dim=16, num_attention_heads=2, sample_size=16, in_channels=4)
    text = dict(joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=16)
    model = SD3Transformer2DModel(**sizes, **text, patch_size=2, qk_norm="rms_norm").eval().requires_grad_(False)
    other = copy.deepcopy(model)
    inputs = dict(
        hidden_states=torch.randn(2, 4, 6, 10),
        encoder_hidden_states=torch.randn(2, 7, 24),
        pooled_projections=torch.randn(2, 20),
        timestep=torch.full((2,), 500.0),
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.no_grad(), capture(other, concepts(2, 4, text=7)) as maps:
            plain, captured = (lambda m=m: m(**inputs, return_dict=False)[0] for m in (model, other))
            assert torch.equal(plain(), captured()) and maps.read().isfinite().all()
            pair = alternate(plain, captured, rounds=101, round_seconds=0.05)
            where = host_breakdown(lambda: [captured() for _ in range(passes)], layers * passes)
    finally:
        torch.set_num_threads(threads)
    benchmark.pedantic(lambda: None, rounds=1)
    us = lambda ratio: (ratio - 1) * pair.first / layers * 1e6
    low, high = map(us, pair.quartiles)
    note = f"us; quartiles {low:.1f}, {high:.1f}; a layer without capture {pair.first / layers * 1e6:.0f} us; with a "
    row("capture_host_layer", us(pair.ratio), at_most=40, note=f"{note}profiler: {where}")


def stack(blocks: int = BLOCKS) -> tuple[SD3Transformer2DModel, dict[str, torch.Tensor]]:
    """Blocks of SD3.5-medium's width, the first two with dual attention, and inputs of one sample at 512 px."""
    torch.manual_seed(0)
    text, grid = SIZES[512]
    model = medium_transformer(blocks)
    inputs = dict(
        hidden_states=torch.randn(1, 16, 2 * grid[0], 2 * grid[1]),
        encoder_hidden_states=torch.randn(1, text, 4096),
        pooled_projections=torch.randn(1, 2048),
        timestep=torch.tensor([500.0]),
    )
    return model.eval().requires_grad_(False), inputs


@pytest.mark.parametrize(
    ("name", "layers", "limit"), [("stack_capture_one", [1], 0.2), ("stack_capture_all", None, 1.0)]
)
def test_stack(name, layers, limit, benchmark, row):
    model, inputs = stack()

    @torch.no_grad()
    def plain():
        return model(**inputs, return_dict=False)[0]

    @torch.no_grad()
    def captured():
        with capture(model, concepts(1), grid=SIZES[512][1], layers=layers):
            return model(**inputs, return_dict=False)[0]

    assert torch.equal(plain(), captured())
    pair = alternate(plain, captured, rounds=31)
    benchmark.pedantic(captured, rounds=1)
    note = f"percent; forward pass of {BLOCKS} blocks {pair.first:.2f} s, with capture {pair.second:.2f} s"
    row(name, 100 * (pair.ratio - 1), at_most=limit, note=note)


def layer_peaks(peak, batch: int) -> tuple[int, int, int]:
    """Peak of attention alone, with capture into the slots of 24 layers, and of one sample with its matrix held."""
    (text, grid), layers = SIZES[1024], 24

    def attend(maps, qkv, text):
        # Layer after layer into its slot, as in a model: what one needs must not stay behind for the next.
        for call in tapped_attention(maps, text)[:2]:
            call(*qkv)

    with torch.no_grad():
        # Loads what is loaded once.
        attend(empty_maps(concepts(1, text=100), (4, 8), 2), torch.randn(3, 1, HEADS, 132, WIDTH), 100)
        maps, qkv = empty_maps(concepts(batch, text=text), grid, layers), attention_inputs(1024, batch)
        query, key, _ = qkv
        alone = peak(lambda: F.scaled_dot_product_attention(*qkv))
        captured = peak(lambda: attend(maps, qkv, text))
        materialized = peak(lambda: torch.softmax(query[:1, :, : grid[0] * grid[1]] @ key[:1].mT / 8, -1).mean(1))
    assert bool((maps.slots[:2] > 0).all())
    return alone, captured, materialized


@linux
def test_memory_of_capture(benchmark, row):
    batch = int(os.environ.get("STAR_BENCH_BATCH", "8"))
    peaks = []
    benchmark.pedantic(lambda: peaks.extend(in_a_process("test_capture", "layer_peaks", batch)), rounds=1)
    alone, captured, materialized = peaks
    note = (
        f"MiB beyond the slots, batch {batch}, 4096 + 333 tokens, float32; attention alone peaks at {alone >> 20} MiB, "
        f"the materialized matrix of a single sample at {materialized >> 20} MiB"
    )
    row("capture_memory_1024", (captured - alone) / 2**20, at_most=4, note=note)


def checkpoint_peak(peak, captured: bool) -> tuple[int]:
    """Peak of a forward and backward pass of the stack with block checkpointing."""
    model, inputs = stack()
    model.requires_grad_(True).train()
    model.enable_gradient_checkpointing()

    def step():
        if captured:
            with capture(model, concepts(1), grid=SIZES[512][1]) as maps:
                output = model(**inputs, return_dict=False)[0]
            assert bool((maps.read() > 0).all())
        else:
            output = model(**inputs, return_dict=False)[0]
        output.square().mean().backward()
        # Gradients that wait for the next pass would be held before it, and not be seen in its peak.
        model.zero_grad(set_to_none=True)

    step()
    return (peak(step),)


@linux
def test_memory_with_checkpointing(benchmark, row):
    peaks = []
    benchmark.pedantic(
        lambda: peaks.extend(in_a_process("test_capture", "checkpoint_peak", on)[0] for on in (False, True)), rounds=1
    )
    plain, captured = peaks
    note = (
        f"percent; forward and backward of {BLOCKS} checkpointed blocks peak at {plain >> 20} MiB, "
        f"with capture on all of them at {captured >> 20} MiB"
    )
    row("checkpoint_memory", 100 * (captured / plain - 1), at_most=1.0, note=note)
