"""allocate: every implementation against its formulas in float64, its exact cases, its checks."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st

import devices
import star_kernels as sk

each_implementation = devices.each_implementation("allocate")
EPS = torch.finfo(torch.float32).eps


def by_hand(maps, rows, columns, combine="mean", smooth=0.0, sharpen=1.0, cap=4.0, mix=0.5, patch=2):
    """Weights (frames * rows * patch, columns * patch) of one sample (G, N) in float64."""
    relative = torch.stack([m / m.mean() for m in maps.double() if m.mean() > 0])
    field = (relative.mean(0) if combine == "mean" else relative.max(0).values).view(-1, rows, columns)
    if smooth > 0:  # as a convolution, divided by what it makes of a field of ones
        distance = torch.arange(-math.ceil(3 * smooth), math.ceil(3 * smooth) + 1, dtype=torch.float64)
        tap = torch.exp(-0.5 * (distance / smooth) ** 2)
        kernel = torch.outer(tap, tap)[None, None]
        blur = lambda x: F.conv2d(x[:, None], kernel, padding=len(tap) // 2)[:, 0]
        field = blur(field) / blur(torch.ones_like(field))
    field = field.flatten(0, 1) ** sharpen
    weights = (1 - mix) + mix * (field / field.mean()).clamp(max=cap)
    return torch.kron(weights / weights.mean(), torch.ones(patch, patch, dtype=torch.float64))


@each_implementation
@example(1, 1, 1, "contiguous", torch.float32, "mean", 0.0, 1.0, 4.0, 0.5, 2, False)
@example(16, 9, 2, "strided", torch.bfloat16, "max", 2.5, 3.0, 1.5, 1.0, 3, True)
@given(
    rows=st.integers(1, 17),
    columns=st.integers(1, 17),
    concepts=st.integers(1, 4),
    layout=st.sampled_from(["contiguous", "transposed", "expanded", "strided", "cut"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    combine=st.sampled_from(["mean", "max"]),
    smooth=st.sampled_from([0.0, 0.3, 1.0, 2.5, 30.0]),
    sharpen=st.sampled_from([0.5, 1.0, 2.0, 3.3]),
    cap=st.sampled_from([0.5, 1.5, 4.0, 1e9]),
    mix=st.sampled_from([0.0, 0.5, 1.0]),
    patch=st.integers(1, 3),
    missing=st.booleans(),
)
def test_value(impl, rows, columns, concepts, layout, dtype, combine, smooth, sharpen, cap, mix, patch, missing):
    torch.manual_seed(rows * 100 + columns)
    tokens = rows * columns
    shapes = {
        "transposed": (concepts, 2, tokens),
        "strided": (2, concepts, 2 * tokens),
        "cut": (2, concepts, tokens + 3),
    }
    maps = (torch.rand(shapes.get(layout, (2, concepts, tokens)), dtype=torch.float64) + 0.01).to(dtype)
    if layout == "transposed":
        maps = maps.transpose(0, 1)
    elif layout == "expanded":
        maps = maps[:1].expand(2, -1, -1)
    elif layout == "strided":
        maps = maps[..., ::2]
    elif layout == "cut":  # rows that start at odd addresses
        maps = maps[..., 3:]
    if missing and concepts > 1:  # a concept that is not there is left out
        maps = maps.clone()
        maps[0, -1] = 0
    options = dict(combine=combine, smooth=smooth, sharpen=sharpen, cap=cap, mix=mix, patch=patch)
    weights = sk.allocate(maps, (rows, columns), **options, impl=impl)
    expected = torch.stack([by_hand(m, rows, columns, **options) for m in maps])
    assert weights.shape == (2, rows * patch, columns * patch) and weights.is_contiguous()
    assert weights.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    # Every term is positive: each sum adds a rounding for every term at most, a power multiplies what it finds.
    terms = 10 + concepts + tokens**0.5 + (2 * (rows + columns) if smooth else 0)
    tolerance = torch.finfo(weights.dtype).eps * terms * max(sharpen, 1)
    torch.testing.assert_close(weights.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights.mean((1, 2)), torch.ones(2, dtype=weights.dtype), rtol=0, atol=tolerance)


@each_implementation
@pytest.mark.parametrize(("concepts", "rows", "columns"), [(2, 70, 80), (40, 9, 11), (33, 1, 5200), (5, 64, 64)])
def test_many_tokens_and_many_concepts(impl, concepts, rows, columns):
    """Beyond what a block keeps in shared memory, and beyond a warp for each map."""
    maps = torch.rand(2, concepts, rows * columns) + 0.01
    weights = sk.allocate(maps, (rows, columns), smooth=1.0, sharpen=1.5, patch=1, impl=impl)
    expected = torch.stack([by_hand(m, rows, columns, smooth=1.0, sharpen=1.5, patch=1) for m in maps])
    tolerance = EPS * (10 + concepts + (rows * columns) ** 0.5)
    torch.testing.assert_close(weights.double(), expected, rtol=tolerance, atol=tolerance)
    maps[1, -1, -1] = torch.nan
    assert torch.equal(sk.allocate(maps, (rows, columns), impl=impl)[1], torch.ones(2 * rows, 2 * columns))


@each_implementation
@pytest.mark.parametrize("options", [{}, dict(smooth=1.5, sharpen=2.0, cap=2.0, combine="max", patch=1)])
@pytest.mark.parametrize("size", [(3, 5, 7), (1, 4, 3), (5, 31, 43)])
def test_a_video_has_mean_one_over_the_clip_and_smooth_frames(impl, size, options):
    frames, rows, columns = size
    maps = torch.rand(2, 3, frames, rows, columns) + 0.01
    maps[1, :, 0] *= 20  # a frame that shows more than the others
    maps = maps.flatten(2)
    weights = sk.allocate(maps, size, **options, impl=impl)
    patch = options.get("patch", 2)
    assert weights.shape == (2, frames, rows * patch, columns * patch)
    expected = torch.stack([by_hand(m, rows, columns, **options) for m in maps]).view_as(weights)
    tolerance = EPS * (13 + maps.shape[2] ** 0.5 + 2 * (rows + columns)) * 2
    torch.testing.assert_close(weights.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(weights.mean((1, 2, 3)), torch.ones(2), rtol=0, atol=tolerance)
    assert frames == 1 or weights[1, 0].mean() > 1.3 * weights[1, 1].mean()


@each_implementation
def test_nothing_is_smoothed_from_one_frame_to_the_next(impl):
    point = torch.zeros(1, 1, 3, 4, 5)
    point[0, 0, 1, 0, 2] = 1  # beside the last row of the frame before
    weights = sk.allocate(point.flatten(2), (3, 4, 5), smooth=2.0, mix=1.0, cap=1e9, patch=1, impl=impl)[0]
    assert (weights[1] > 0).all() and not weights[0].any() and not weights[2].any()
    alone = sk.allocate(point[:, :, 1].flatten(2), (4, 5), smooth=2.0, mix=1.0, cap=1e9, patch=1, impl=impl)
    torch.testing.assert_close(weights[1], 3 * alone[0], rtol=32 * EPS, atol=0)
    whole = sk.allocate(point[:, :, 1].flatten(2), (1, 4, 5), smooth=2.0, mix=1.0, cap=1e9, patch=1, impl=impl)
    assert torch.equal(whole[:, 0], alone)


@each_implementation
def test_smoothing_keeps_constants_and_spreads_a_point(impl):
    point = torch.zeros(1, 1, 15 * 17)
    point[0, 0, 7 * 17 + 8] = 1
    out = sk.allocate(point, (15, 17), smooth=1.0, cap=1e9, mix=1.0, patch=1, impl=impl)[0]
    distance = torch.tensor([math.exp(-0.5 * d * d) for d in range(4)])
    torch.testing.assert_close(out[7, 8:12] / out[7, 8], distance, rtol=20 * EPS, atol=0)
    torch.testing.assert_close(out[7:11, 8] / out[7, 8], distance, rtol=20 * EPS, atol=0)
    assert out[7, 12] == 0 and out[11, 8] == 0  # beyond three standard deviations
    flat = sk.allocate(torch.ones(1, 1, 63), (7, 9), smooth=2.0, patch=1, impl=impl)
    torch.testing.assert_close(flat, torch.ones(1, 7, 9), rtol=0, atol=32 * EPS)


@each_implementation
@pytest.mark.parametrize("kind", ["no concept", "all zero", "nan", "inf", "-inf", "negative"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_information_the_weights_are_exactly_one(impl, kind, dtype):
    maps = torch.rand(2, 3, 12).to(dtype)
    if kind == "no concept":
        maps = maps[:, :0]
    elif kind == "all zero":
        maps[0] = 0
    else:
        maps[0, 1, 5] = {"nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf, "negative": -1.0}[kind]
    out = sk.allocate(maps, (3, 4), smooth=1.0, sharpen=0.5, impl=impl)
    assert torch.equal(out[0], torch.ones(6, 8))
    assert out.isfinite().all()
    assert kind == "no concept" or not torch.equal(out[1], torch.ones(6, 8))


@each_implementation
@pytest.mark.parametrize("layout", ["contiguous", "samples first", "one for all"])
def test_several_steps_at_once_are_those_of_each_alone(impl, layout):
    maps = torch.rand(3, 2, 3, 5 * 7) + 0.01
    maps[1, 0] = 0  # a sample that says nothing in one of the steps
    if layout == "samples first":
        maps = maps.transpose(0, 1).contiguous().transpose(0, 1)
    elif layout == "one for all":
        maps = maps[1:2].expand(3, -1, -1, -1)
    options = dict(smooth=1.0, sharpen=1.5, combine="max", patch=3, impl=impl)
    weights = sk.allocate(maps, (5, 7), **options)
    assert weights.shape == (3, 2, 15, 21) and weights.is_contiguous()
    alone = torch.stack([sk.allocate(step, (5, 7), **options) for step in maps])
    # PyTorch's own products may add in another order for another number of samples.
    torch.testing.assert_close(weights, alone, rtol=8 * EPS if impl == "reference" else 0, atol=0)
    assert torch.equal(weights[1, 0], torch.ones(15, 21)) and not torch.equal(weights[1, 1], torch.ones(15, 21))
    video = sk.allocate(maps, (5, 1, 7), impl=impl)
    assert torch.equal(video, torch.stack([sk.allocate(step, (5, 1, 7), impl=impl) for step in maps]))
    for steps, samples in ((3, 0), (0, 2), (0, 0)):
        none = sk.allocate(maps[:steps, :samples], (5, 7), impl=impl)
        assert none.shape == (steps, samples, 10, 14) and none.dtype == torch.float32


@each_implementation
def test_uniform_means_one(impl):
    maps = torch.rand(2, 3, 35)
    assert torch.equal(sk.allocate(maps, (5, 7), mix=0.0, impl=impl), torch.ones(2, 10, 14))
    flat = sk.allocate(torch.full((2, 1, 35), 0.37), (5, 7), mix=0.3, cap=2.0, impl=impl)
    torch.testing.assert_close(flat, torch.ones(2, 10, 14), rtol=0, atol=4 * EPS)


@each_implementation
def test_the_scale_of_a_map_does_not_matter(impl):
    """Neither a model whose attention is spread thin nor a layer's factor changes an allocation: the same bits."""
    maps = torch.rand(2, 3, 35)
    factor = torch.tensor([2.0**-60, 1.0, 2.0**40])[:, None]
    assert torch.equal(sk.allocate(maps * factor, (5, 7), impl=impl), sk.allocate(maps, (5, 7), impl=impl))


@each_implementation
def test_a_map_whose_sum_overflows_is_like_any_other(impl):
    maps = torch.rand(1, 3, 35) + 0.1
    huge = maps * torch.tensor([1.0, 2.0**127, 1.0])[:, None]
    assert huge.isfinite().all() and huge[0, 1].sum().isinf()
    assert torch.equal(sk.allocate(huge, (5, 7), impl=impl), sk.allocate(maps, (5, 7), impl=impl))


@each_implementation
@pytest.mark.parametrize("sharpen", [60.0, 1e4])
def test_strong_sharpening_keeps_the_peak_and_does_not_overflow(impl, sharpen):
    maps = torch.zeros(1, 1, 1024)
    maps[0, 0, 77] = 1.0
    maps[0, 0, 78] = 0.5
    weights = sk.allocate(maps, (32, 32), sharpen=sharpen, cap=100.0, mix=0.5, patch=1, impl=impl).flatten()
    assert weights.argmax() == 77 and weights.isfinite().all()
    expected = (0.5 + 0.5 * 100) / (0.5 + 0.5 * 100 / 1024)
    assert weights[77].item() == pytest.approx(expected, rel=1e-5)


@each_implementation
def test_no_gradient_flows_and_an_empty_batch_is_empty(impl):
    maps = torch.rand(2, 3, 12, requires_grad=True)
    assert not sk.allocate(maps, (3, 4), impl=impl).requires_grad
    assert sk.allocate(maps[:0], (3, 4), impl=impl).shape == (0, 6, 8)


@pytest.mark.usefixtures("compiled")
def test_native_bits_depend_on_neither_threads_nor_batch(at_thread_counts):
    maps = torch.rand(7, 3, 33 * 65)
    first, *others = at_thread_counts(lambda: sk.allocate(maps, (33, 65), smooth=1.2, sharpen=1.5, impl="native"))
    assert all(torch.equal(first, other) for other in others)
    assert torch.equal(sk.allocate(maps[3:4], (33, 65), smooth=1.2, sharpen=1.5, impl="native"), first[3:4])


@each_implementation
def test_autocast_changes_no_bit(impl):
    maps = torch.rand(2, 3, 12)
    expected = sk.allocate(maps, (3, 4), smooth=1.0, impl=impl)
    with torch.autocast(maps.device.type, torch.bfloat16):
        assert torch.equal(sk.allocate(maps, (3, 4), smooth=1.0, impl=impl), expected)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_options_at_the_ends_of_their_ranges(impl, dtype):
    maps = torch.rand(2, 3, 12, dtype=dtype)
    for smooth in (1e10, 1e308, math.inf):  # as flat as can be
        got = sk.allocate(maps, (3, 4), smooth=smooth, impl=impl)
        torch.testing.assert_close(got, torch.ones_like(got), rtol=0, atol=1e-6)
    plain = sk.allocate(maps, (3, 4), impl=impl)
    assert torch.equal(sk.allocate(maps, (3, 4), smooth=1e-300, impl=impl), plain)
    for cap in (1e300, math.inf):
        assert torch.equal(sk.allocate(maps, (3, 4), cap=cap, impl=impl), sk.allocate(maps, (3, 4), cap=1e6, impl=impl))
    assert sk.allocate(maps, (3, 4), sharpen=1e6, cap=1e-6, mix=1, impl=impl).isfinite().all()


@each_implementation
def test_opcheck(impl):
    op = getattr(torch.ops.star, f"allocate_{impl}").default
    torch.library.opcheck(op, (torch.rand(2, 3, 12), 3, 4, "mean", 1.0, 1.0, 4.0, 0.5, 2))
    torch.library.opcheck(op, (torch.rand(2, 12, 3).bfloat16().mT, 3, 4, "max", 0.0, 2.0, 4.0, 0.5, 1))
    torch.library.opcheck(op, (torch.rand(2, 3, 24), 3, 4, "mean", 1.0, 1.0, 4.0, 0.5, 2))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(maps=torch.rand(1, 12)), ValueError, r"maps: got shape \(1, 12\), expected \(B, G, N\) or \(S, B, G, N"),
        (dict(maps=torch.rand(1, 1, 1, 1, 12)), ValueError, r"maps: got shape \(1, 1, 1, 1, 12\), expected \(B, G, N"),
        (dict(maps=torch.ones(1, 1, 12, dtype=torch.int64)), TypeError, "maps: got torch.int64, expected a floating"),
        (dict(grid=(3, 5)), ValueError, r"grid: got \(3, 5\), expected .* of product 12"),
        (dict(grid=(-3, -4)), ValueError, r"grid: got \(-3, -4\), expected .* of product 12"),
        (dict(mix=2), ValueError, "mix: got 2, expected a number between"),
        (dict(cap=0), ValueError, "cap: got 0, expected a number >= 1e-6"),
        (dict(sharpen=0.0), ValueError, "sharpen: got 0.0, expected a number between 1e-6 and 1e6"),
        (dict(smooth=-1.0), ValueError, "smooth: got -1.0, expected a number >= 0"),
        (dict(patch=0), ValueError, "patch: got 0, expected a number >= 1"),
        (dict(cap=1e-50), ValueError, "cap: got 1e-50, expected a number >= 1e-6"),
        (dict(mix=float("nan")), ValueError, "mix: got nan, expected a number between 0 and 1"),
        (dict(patch=2**62 + 1), ValueError, r"patch: got 4611686018427387905, expected at most 2\*\*30 locations"),
        (dict(patch=2**20), ValueError, r"patch: got 1048576, expected at most 2\*\*30 locations of a grid of 3 x 4"),
        (dict(patch=2.0), TypeError, "patch: got float, expected a number >= 1"),
        (dict(grid=None), TypeError, r"grid: got None, expected \(rows, columns\)"),
        (
            dict(grid=(1, 1, 3, 4)),
            ValueError,
            r"grid: got \(1, 1, 3, 4\), expected \(rows, columns\) or ",
        ),
        (dict(grid=(2, 3, 4)), ValueError, r"grid: got \(2, 3, 4\), expected .* of product 12"),
        (dict(grid=(12,)), ValueError, r"grid: got \(12,\), expected \(rows, columns\)"),
        (dict(grid=()), ValueError, r"grid: got \(\), expected \(rows, columns\)"),
        (dict(grid=(3.0, 4.0)), TypeError, r"grid: got float, expected \(rows, columns\)"),
        (dict(smooth=None), TypeError, "smooth: got NoneType, expected a number >= 0"),
        (dict(combine="sum"), ValueError, "combine: got 'sum'"),
        (dict(impl="cuda"), ValueError, "impl: got 'cuda', expected 'auto' or one of"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, error, words):
    with pytest.raises(error, match=words) as caught:
        sk.allocate(**{"maps": torch.rand(1, 1, 12), "grid": (3, 4), **change})
    assert "\n" not in str(caught.value)
