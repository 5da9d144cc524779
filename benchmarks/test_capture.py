"""What keeping a capture on costs: memory at 1024 px and time of a stack of real width."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import SD3Transformer2DModel
from pairs import alternate
from star.capture import Maps, capture, captured_attention
from star.concepts import ConceptTokens

BLOCKS, TEXT, GRID = 4, 205, (32, 32)  # 512 px with Flow-GRPO's 77 + 128 text tokens
linux = pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")


def concepts(batch: int) -> ConceptTokens:
    """Two concepts of eight tokens each, in CLIP's part and in T5's."""
    index = torch.tensor([[3, 4, 5, 6, 80, 81, 82, 83], [9, 10, 11, 12, 90, 91, 92, 93]])
    return ConceptTokens(index.expand(batch, -1, -1), torch.full((batch, 2, 8), 1 / 8))


def stack() -> tuple[SD3Transformer2DModel, dict[str, torch.Tensor]]:
    """Four blocks of SD3.5-medium's width, the first two with dual attention, and inputs of one sample at 512 px."""
    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=128,
        num_layers=BLOCKS,
        attention_head_dim=64,
        num_attention_heads=24,
        joint_attention_dim=4096,
        caption_projection_dim=1536,
        pooled_projection_dim=2048,
        pos_embed_max_size=384,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    inputs = dict(
        hidden_states=torch.randn(1, 16, 2 * GRID[0], 2 * GRID[1]),
        encoder_hidden_states=torch.randn(1, TEXT, 4096),
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
        with capture(model, concepts(1), grid=GRID, layers=layers):
            return model(**inputs, return_dict=False)[0]

    assert torch.equal(plain(), captured())
    pair = alternate(plain, captured, rounds=9)
    benchmark.pedantic(captured, rounds=1)
    note = f"percent; forward pass of {BLOCKS} blocks {pair.first:.2f} s, with capture {pair.second:.2f} s"
    row(name, 100 * (pair.ratio - 1), at_most=limit, note=note)


# The kernel's own count of the most pages ever held, reset before the call; the allocator returns freed blocks at once.
PEAK = """
import sys
sys.path.insert(0, {folder!r})
import torch
import test_capture
torch.set_num_threads({threads})
def status(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) * 1024
def peak(call):
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    before = status("VmRSS")
    result = call()
    return status("VmHWM") - before
print(*getattr(test_capture, {measure!r})(peak, *{arguments!r}))
"""


def in_a_process(measure: str, *arguments) -> list[int]:
    """The bytes that `measure` finds in a process of its own."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    code = PEAK.format(
        folder=os.path.dirname(__file__), threads=torch.get_num_threads(), measure=measure, arguments=arguments
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **allocator}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.split()]


def layer_peaks(peak, batch: int) -> tuple[int, int, int]:
    """Peak of attention alone, with capture into the slots of 24 layers, and of one sample with its matrix held."""
    text, grid, layers = 333, (64, 64), 24

    def slots(grid, batch, layers):
        tokens = concepts(batch)
        empty = torch.zeros(layers, batch, 2, grid[0] * grid[1])
        return Maps(empty, tokens, grid, torch.ones(layers), "raw", None, None, True, "auto")

    def attend(maps, qkv, text):
        # Layer after layer into its slot, as in a model: what one needs must not stay behind for the next.
        for layer in range(2):
            captured_attention(maps, layer, *qkv, text, text_first=False)

    with torch.no_grad():
        attend(slots((4, 8), 1, 2), torch.randn(3, 1, 24, 132, 64), 100)  # loads what is loaded once
        maps, qkv = slots(grid, batch, layers), torch.randn(3, batch, 24, grid[0] * grid[1] + text, 64)
        query, key, _ = qkv
        alone = peak(lambda: F.scaled_dot_product_attention(*qkv))
        captured = peak(lambda: attend(maps, qkv, text))
        materialised = peak(lambda: torch.softmax(query[:1, :, : grid[0] * grid[1]] @ key[:1].mT / 8, -1).mean(1))
    assert bool((maps.slots[:2] > 0).all())
    return alone, captured, materialised


@linux
def test_memory_of_capture(benchmark, row):
    batch = int(os.environ.get("STAR_BENCH_BATCH", "8"))
    peaks = []
    benchmark.pedantic(lambda: peaks.extend(in_a_process("layer_peaks", batch)), rounds=1)
    alone, captured, materialised = peaks
    note = (
        f"MiB beyond the slots, batch {batch}, 4096 + 333 tokens, float32; attention alone peaks at {alone >> 20} MiB, "
        f"the materialised matrix of a single sample at {materialised >> 20} MiB"
    )
    row("capture_memory_1024", (captured - alone) / 2**20, at_most=4, note=note)
