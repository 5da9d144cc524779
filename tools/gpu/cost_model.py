"""What STAR adds on GPUs that are not here, predicted: `python tools/gpu/cost_model.py`.

Every launch is counted with the traffic of each of its tensors, its floating-point operations on the matrix units,
its programs and its longest chain of dependent memory accesses; block sizes and grids are those of the code that
launches. A layer and an iteration without STAR are taken twice: at their best, with matrix units or memory at their
datasheet rate without a pause, and as diffusers runs them, kernel by kernel, under the assumptions that STAR's
launches are taken with. Both are nothing but the attention blocks, with frozen weights and no recomputation. Nothing
is measured.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from math import ceil, prod
from pathlib import Path

import torch
from diffusers.models.attention import JointTransformerBlock
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from star_kernels.triton import attention_maps as maps_code

# Assumptions.
LAUNCH = 2e-6  # seconds that one more dependent launch takes in a stream whose queue is full
TRIP = 0.6e-6  # seconds from a load to its use
EFFICIENCY = 0.8  # of the datasheet's bandwidth
MATRIX_EFFICIENCY = 0.75  # of the datasheet's rate, for the large products of a layer
L2_RATE = 1.5  # of the memory's bandwidth: what several programs ask for comes from the second-level cache
RESIDENT = 4  # programs that a processor runs at once; docs/gpu.md has what registers and shared memory allow

LAYER_GOAL, ITERATION_GOAL = 0.005, 0.002  # of the time without STAR


@dataclass(frozen=True)
class Device:
    """Datasheet numbers. bandwidth: bytes/s; matrix: dense bfloat16 operations/s; l2, shared (per block): bytes."""

    name: str
    architecture: str
    processors: int
    bandwidth: float
    matrix: float
    l2: int
    shared: int
    source: str


KIB, MIB = 1 << 10, 1 << 20
DEVICES = (
    Device("A100 SXM 80GB", "sm_80", 108, 2.039e12, 312e12, 40 * MIB, 163 * KIB, "NVIDIA A100 datasheet, whitepaper"),
    Device("H100 SXM", "sm_90", 132, 3.35e12, 989.4e12, 50 * MIB, 227 * KIB, "NVIDIA H100 datasheet, whitepaper"),
    Device("H200", "sm_90", 132, 4.8e12, 989.4e12, 50 * MIB, 227 * KIB, "NVIDIA H200 datasheet"),
    Device("B200", "sm_100", 148, 8e12, 2250e12, 126 * MIB, 227 * KIB, "NVIDIA DGX B200 datasheet, tuning guide"),
    Device("RTX 4090", "sm_89", 128, 1.008e12, 165.2e12, 72 * MIB, 99 * KIB, "NVIDIA Ada whitepaper (float32 sums)"),
    Device("MI300X", "gfx942", 304, 5.3e12, 1307.4e12, 32 * MIB, 64 * KIB, "AMD MI300X datasheet (L2: 4 MiB per die)"),
)


@dataclass(frozen=True)
class Launch:
    """One kernel. bytes: each tensor's traffic, as the programs ask for it, of which `repeated` asks for what another
    program or pass has read already. trips: dependent accesses of a program."""

    kernel: str
    programs: int
    bytes: dict[str, int]
    repeated: int = 0
    flops: int = 0
    trips: int = 1
    starts: int = 1  # 0 for what a kernel does that would have run anyway

    def seconds(self, device: Device) -> float:
        filled = min(1.0, self.programs / device.processors)
        asked, rate = sum(self.bytes.values()), device.bandwidth * EFFICIENCY * filled
        traffic = max((asked - self.repeated) / rate, asked / (L2_RATE * rate))
        products = self.flops / (device.matrix * filled)
        waiting = self.trips * TRIP * max(1.0, self.programs / (device.processors * RESIDENT))
        return self.starts * LAUNCH + max(traffic, products, waiting)


def total(launches: list[Launch], device: Device) -> float:
    return sum(launch.seconds(device) for launch in launches)


# --- STAR's operators -------------------------------------------------------------------------------------------------


def attention_maps(
    batch: int, heads: int, queries: int, width: int, concepts: int, slots: int, processors: int, size: int = 2
) -> list[Launch]:
    """With the attention's log-sum-exp, equal heads, the tokens' weights, every slot used. size: of an element."""
    columns = concepts * slots
    block = maps_code.blocks_of("", size).queries
    cut = maps_code.tiling(batch, heads, queries, concepts, slots, processors, block)
    block_d = maps_code.block_width(width, size, maps_code.dot_precision(size))
    products = cut.tiles * block * cut.column_blocks * maps_code.block_columns(columns)
    rows = batch * heads * queries
    result = 4 * batch * concepts * queries
    once = {"query": rows * width * size, "key": batch * heads * columns * width * size, "lse": 4 * rows,
            "index": 8 * batch * columns, "weight": 4 * batch * columns,
            "partial": result if cut.alone else cut.parts * result}  # fmt: skip
    # Every block of columns reads the queries, every tile of queries the columns, which each group of heads finds.
    times = {"query": cut.column_blocks, "lse": cut.column_blocks, "key": cut.tiles}
    times |= {"index": cut.tiles * cut.groups, "weight": cut.tiles * cut.groups}
    asked = {name: times.get(name, 1) * count for name, count in once.items()}
    maps = Launch(
        "maps_kernel",
        prod(cut.grid),
        asked,
        repeated=sum(asked.values()) - sum(once.values()),
        flops=2 * batch * heads * products * ceil(width / block_d) * block_d,
        trips=1 + cut.owned * cut.chunk,
    )
    if cut.alone:
        return [maps]
    programs = ceil(result / 4 / maps_code.BLOCK_SUM)
    return [maps, Launch("sum_kernel", programs, {"partial": cut.parts * result, "maps": result})]


def capture(batch: int, heads: int, queries: int, text: int, width: int, concepts: int, slots: int, processors: int):
    """What star.capture adds to a layer: the log-sum-exp that the attention kernel writes, and the maps."""
    lse = Launch("log-sum-exp", processors, {"lse": 4 * batch * heads * (queries + text)}, trips=0, starts=0)
    return [lse, *attention_maps(batch, heads, queries, width, concepts, slots, processors)]


def read_maps(layers: int, batch: int, concepts: int, tokens: int) -> list[Launch]:
    """Maps.read: a copy of all layers' maps, times their weights, summed."""
    one = 4 * batch * concepts * tokens
    every, programs = layers * one, ceil(layers * one / 4 / 512)
    return [
        Launch("copy", programs, {"slots": every, "maps": every}),
        Launch("multiply", programs, {"maps": every, "weighted": every}),
        Launch("sum", ceil(one / 4 / 128), {"weighted": every, "maps": one}, trips=ceil(layers / 4)),
    ]


@cache
def constant(file: str, name: str) -> int:
    """A number of csrc/cuda."""
    text = (Path(__file__).parents[2] / "csrc" / "cuda" / file).read_text()
    return int(re.search(rf"constexpr int(?:64_t)? [^;]*\b{name} = (\d+)", text)[1])


WARP = constant("device.cuh", "WARP")


def allocate(batch: int, concepts: int, tokens: int, patch: int, smooth: bool = True) -> list[Launch]:
    """One block per sample, whose fields stay in shared memory. float32."""
    threads = constant("allocate.cuh", "ALLOCATE_THREADS")
    places, each, warps = tokens * patch**2, ceil(tokens / threads), threads // WARP
    shares = max(1, warps // concepts)
    means = ceil(concepts / (warps // shares)) * ceil(tokens / shares / WARP / 4)
    return [
        Launch(
            "allocate_kernel",
            batch,
            {"maps": 4 * batch * 2 * concepts * tokens, "weights": 4 * batch * places},
            repeated=4 * batch * concepts * tokens,
            # The smoothing's turns and the two sums wait for shared memory, a tenth of the time.
            trips=means + each * ceil(concepts / 2) + (2 if smooth else 0) + 1 + ceil(places / threads / 4),
        )
    ]


def gaussian_step(
    batch: int, elements: int, sizes: tuple[int, int, int] = (4, 4, 4), guided: bool = False
) -> list[Launch]:
    """elements: of a sample. sizes: of an element of sample, velocity and noise; 0 for noise that is drawn."""
    tiles = ceil(elements / (constant("gaussian_step.cuh", "THREADS") * constant("gaussian_step.cuh", "STEP_VECTOR")))
    tensors = dict(zip(("sample", "velocity", "noise", "prev_sample", "mean"), (*sizes, sizes[0], 4), strict=True))
    tensors |= {"unconditional_velocity": sizes[1]} if guided else {}
    traffic = {name: batch * elements * size for name, size in tensors.items()}
    return [Launch("gaussian_step_kernel", batch * tiles, traffic)]


def loss_tile(batch: int, channels: int, places: int, packed: bool) -> int:
    """Locations of a block of policy_loss, as its launcher chooses them. float32 arithmetic."""
    tile, lanes = constant("latents.cuh", "TILE"), min(WARP, 1 << ceil(channels / 4 - 1).bit_length())
    if packed:
        least, most = (
            constant("latents.cuh", "LOSS_THREADS") // lanes,
            constant("latents.cuh", "PACKED_ELEMENTS"),
        )
        while tile > least and tile * channels > most:
            tile //= 2
    else:
        few = constant("latents.cuh", "FEW_BLOCKS")
        while tile > constant("latents.cuh", "SHORT_TILE") and batch * places < few * tile:
            tile //= 2
    return tile


def policy_loss(
    batch: int, channels: int, places: int, weighted: bool, size: int = 4, latent: int = 4, packed: bool = False
) -> list[Launch]:
    """Forward and backward. size, latent: of an element of the velocity, of the latents."""
    every, spots = batch * channels * places, 4 * batch * places
    tile = loss_tile(batch, channels, places, packed)
    tiles = ceil(places / tile)
    sums = batch * tiles * (7 + 2) * 8  # LocationSums
    latents = {"velocity": size * every, "sample": latent * every, "prev_sample": latent * every}
    weights = {"weights": spots} if weighted else {}
    rounds = ceil(batch / constant("latents.cuh", "FINISH_WARPS")) * ceil(tiles / WARP / 4)
    # A thread reads its vectors of four one after the other, the first together with what belongs to the sample.
    trips = 1 + ceil(channels * tile / 4 / constant("latents.cuh", "LOSS_THREADS"))
    return [
        Launch(
            "policy_loss_sums_kernel",
            batch * tiles,
            latents | {"old_mean": 4 * every, "sums": sums} | weights,
            trips=trips,
        ),
        Launch("policy_loss_finish_kernel", 1, {"sums": sums}, trips=1 + rounds),
        Launch(
            "policy_loss_gradient_kernel", batch * tiles, latents | {"gradient": size * every} | weights, trips=trips
        ),
    ]


# --- the models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """A transformer at a size of image. rows: of a pass per image, 2 with guidance."""

    name: str
    heads: int
    width: int  # of a head
    joint: int  # layers with two streams: those that are captured
    image: int  # tokens
    text: int
    rows: int
    channels: int  # of the latents
    patch: int
    dual: int = 0  # the first of them, with attention among the image tokens too
    single: int = 0  # layers with one stream
    last_without_text: bool = True

    @property
    def locations(self) -> int:
        return self.image * self.patch**2


def sd35(name: str, heads: int, layers: int, dual: int, pixels: int) -> Model:
    return Model(f"{name}, {pixels} px", heads, 64, layers, (pixels // 16) ** 2, 205, 2, 16, 2, dual=dual)


MODELS = (
    sd35("SD3.5-medium", 24, 24, 13, 512),
    sd35("SD3.5-medium", 24, 24, 13, 1024),
    sd35("SD3.5-large", 38, 38, 0, 512),
    sd35("SD3.5-large", 38, 38, 0, 1024),
    Model("FLUX.1, 1024 px", 24, 128, 19, 4096, 512, 1, 64, 1, single=38, last_without_text=False),
)
CONCEPTS, SLOTS = 2, 8  # of a prompt, and text tokens of a concept
STEPS, TRAINED = 10, 9  # Flow-GRPO's sampling
BATCHES = (1, 9)  # images of a pass: one, and Flow-GRPO's micro batch


@dataclass(frozen=True)
class Layer:
    """Of one row. linear, attention: floating-point operations. weights, states: elements."""

    linear: int
    attention: int
    weights: int
    states: int

    def seconds(self, device: Device, rows: int) -> float:
        flops = rows * (self.linear + self.attention) / device.matrix
        return max(flops, 2 * (self.weights + 2 * rows * self.states) / device.bandwidth)

    def backward(self, device: Device, rows: int) -> float:
        """Gradients of the states through frozen weights; attention takes five products for its two."""
        flops = rows * (self.linear + 2.5 * self.attention) / device.matrix
        return max(flops, 2 * (self.weights + 3 * rows * self.states) / device.bandwidth)


def layer(model: Model, kind: str = "joint") -> Layer:
    """kind: "joint", "dual", "last" (whose text is not computed any further) or "single"."""
    d, tokens = model.heads * model.width, model.image + model.text
    matrices, modulation, attention = 12 * tokens, 12, tokens**2
    weights = 24
    if kind == "dual":
        matrices, modulation, attention, weights = matrices + 4 * model.image, 15, attention + model.image**2, 28
    elif kind == "last":
        matrices, modulation, weights = 12 * model.image + 3 * model.text, 8, 15
    elif kind == "single":
        modulation, weights = 3, 12
    return Layer(2 * d * d * (matrices + modulation), 4 * d * attention, d * d * (weights + modulation), tokens * d)


def kinds(model: Model) -> list[str]:
    """Of the layers."""
    last = int(model.last_without_text)
    joint = ["dual"] * model.dual + ["joint"] * (model.joint - model.dual - last) + ["last"] * last
    return joint + ["single"] * model.single


def block(model: Model, kind: str = "joint") -> torch.nn.Module:
    """diffusers' own layer of this kind at its true size."""
    d = model.heads * model.width
    if model.single:
        return (FluxSingleTransformerBlock if kind == "single" else FluxTransformerBlock)(d, model.heads, model.width)
    options = {"use_dual_attention": kind == "dual", "context_pre_only": kind == "last", "qk_norm": "rms_norm"}
    return JointTransformerBlock(d, model.heads, model.width, **options)


def inputs(model: Model, rows: int, requires_grad: bool = False) -> list[Tensor]:
    d = model.heads * model.width
    states = [torch.empty(rows, n, d, requires_grad=requires_grad) for n in (model.image, model.text)]
    return [*states, torch.empty(rows, d)]


class Kernels(TorchDispatchMode):
    """(bytes, floating-point operations) of every kernel that eager PyTorch starts within it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        read, written = ([t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in ((args, kwargs), out))
        held = {t.untyped_storage()._cdata for t in read}
        is_view = all(t.untyped_storage()._cdata in held for t in written) and not func._schema.is_mutable
        if read and not is_view:
            flops = 0
            if "scaled_dot_product" in func.__name__:
                backward = "backward" in func.__name__
                query, key = args[1:3] if backward else args[:2]
                flops = (10 if backward else 4) * query.numel() * key.shape[-2]
            elif func.overloadpacket in flop_registry:
                flops = flop_registry[func.overloadpacket](*args, **(kwargs or {}), out_val=out)
            self.found.append((sum(t.numel() * t.element_size() for t in read + written), flops))
        return out


@cache
def kernels(model: Model, kind: str, rows: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Those of a layer's forward pass, and of its gradients of the states, in bfloat16."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with FakeTensorMode(), torch.device("cpu"), torch.enable_grad():
            module, states = block(model, kind).requires_grad_(False), inputs(model, rows, requires_grad=True)
            with Kernels() as forward:
                out = module(*states)
            out = [x for x in (out if isinstance(out, tuple) else (out,)) if x is not None]
            gradients = [torch.empty_like(x) for x in out]
            with Kernels() as backward:
                torch.autograd.grad(out, states[:2], gradients, allow_unused=True)
    finally:
        torch.set_default_dtype(default)
    return forward.found, backward.found


def eager_seconds(found: list[tuple[int, int]], device: Device) -> float:
    bandwidth, matrix = EFFICIENCY * device.bandwidth, MATRIX_EFFICIENCY * device.matrix
    return sum(LAUNCH + max(size / bandwidth, flops / matrix) for size, flops in found)


@dataclass(frozen=True)
class Prediction:
    """Seconds without STAR, at best and as diffusers runs it, and what STAR adds."""

    best: float
    eager: float
    added: float

    @property
    def of_best(self) -> float:
        return self.added / self.best

    @property
    def of_eager(self) -> float:
        return self.added / self.eager


def predict_layer(model: Model, device: Device, images: int) -> Prediction:
    """A captured layer of the cheapest kind that there is more than one of."""
    rows = model.rows * images
    added = capture(images, model.heads, model.image, model.text, model.width, CONCEPTS, SLOTS, device.processors)
    eager = eager_seconds(kernels(model, "joint", rows)[0], device)
    return Prediction(layer(model).seconds(device, rows), eager, total(added, device))


def floor(model: Model, device: Device, images: int) -> float:
    """Seconds to read the queries once and do nothing with them: no kernel beside the attention adds less."""
    return 2 * images * model.heads * model.image * model.width / device.bandwidth


def predict_iteration(model: Model, device: Device, images: int) -> Prediction:
    """Rollout with maps and update of the images of one pass. Without STAR the transition and the scalar loss touch
    every tensor once, in one launch each and one more for the gradient."""
    rows, elements = model.rows * images, model.channels * model.locations
    once = 4 * images * elements / device.bandwidth
    plain_step, plain_loss = LAUNCH + 4 * once, 2 * LAUNCH + 4 * once

    def plain(forward: float, backward: float) -> float:
        return STEPS * (forward + plain_step) + TRAINED * (forward + backward + plain_loss)

    of_layers = [layer(model, kind) for kind in kinds(model)]
    best = plain(*(sum(f(x) for x in of_layers) for f in (
        lambda x: x.seconds(device, rows), lambda x: x.backward(device, rows))))  # fmt: skip
    started = [kernels(model, kind, rows) for kind in kinds(model)]
    eager = plain(*(sum(eager_seconds(found[i], device) for found in started) for i in range(2)))
    captured = capture(images, model.heads, model.image, model.text, model.width, CONCEPTS, SLOTS, device.processors)
    maps = model.joint * total(captured, device) + total(read_maps(model.joint, images, CONCEPTS, model.image), device)
    weights = total(allocate(images, CONCEPTS, model.image, model.patch), device)
    launches = policy_loss(images, model.channels, model.locations, weighted=True, packed=model.patch == 1)
    loss = total(launches, device) - plain_loss
    step = total(gaussian_step(images, elements), device) - plain_step
    return Prediction(best, eager, STEPS * step + TRAINED * (maps + weights + loss))


def table() -> str:
    """Markdown. In bold what misses the goal."""
    titles = "model | images | device | layer at best | by diffusers | STAR adds | of best | of diffusers | floor"
    titles += " | iteration at best | by diffusers | STAR adds | of best | of diffusers"
    lines = [f"| {titles} |", "|---" * 14 + "|"]
    for model in MODELS:
        for images in BATCHES:
            for device in DEVICES:
                one, whole = predict_layer(model, device, images), predict_iteration(model, device, images)
                cells = [model.name, str(images), device.name]
                cells += [f"{1e6 * x:.0f} us" for x in (one.best, one.eager)] + [f"{1e6 * one.added:.1f} us"]
                cells += [mark(x, LAYER_GOAL) for x in (one.of_best, one.of_eager)]
                cells.append(f"{100 * floor(model, device, images) / one.best:.2f} %")
                cells += [f"{1e3 * x:.0f} ms" for x in (whole.best, whole.eager)] + [f"{1e3 * whole.added:.2f} ms"]
                cells += [mark(x, ITERATION_GOAL) for x in (whole.of_best, whole.of_eager)]
                lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def device_table() -> str:
    """Markdown."""
    lines = [
        "| device | | processors | memory | bfloat16 | L2 | shared | source |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for d in DEVICES:
        cells = [
            d.name,
            d.architecture,
            str(d.processors),
            f"{d.bandwidth / 1e12:.2f} TB/s",
            f"{d.matrix / 1e12:.0f} T/s",
        ]
        lines.append(f"| {' | '.join(cells)} | {d.l2 // MIB} MiB | {d.shared // KIB} KiB | {d.source} |")
    return "\n".join(lines)


def mark(share: float, goal: float) -> str:
    return f"{100 * share:.2f} %" if share <= goal else f"**{100 * share:.2f} %**"


if __name__ == "__main__":
    print(device_table(), table(), sep="\n\n")
