"""The specification: attention_maps, allocate and gaussian_step against independent formulas, their checks, opcheck."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import star_kernels as sk


def softmax_maps(query, key, index, weight, scale, head_weight):
    """Independent oracle: the whole attention matrix in float64."""
    p = torch.softmax(query.double() @ key.double().transpose(-1, -2) * scale, -1)  # (B, H, N, S)
    p = (p * head_weight.double()[None, :, None, None]).sum(1)  # (B, N, S)
    out = torch.zeros(index.shape[0], index.shape[1], query.shape[2], dtype=torch.float64)
    for b in range(index.shape[0]):
        for g in range(index.shape[1]):
            for k in range(index.shape[2]):
                if index[b, g, k] >= 0:
                    out[b, g] += weight[b, g, k].double() * p[b, :, index[b, g, k]]
    return out


@given(
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    queries=st.integers(1, 37),
    extra=st.integers(1, 21),
    width=st.sampled_from([8, 32, 64]),
    groups=st.integers(1, 3),
    slots=st.integers(1, 5),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    with_lse=st.booleans(),
    layout=st.sampled_from(["contiguous", "transposed", "expanded"]),
)
def test_attention_maps(batch, heads, queries, extra, width, groups, slots, dtype, with_lse, layout):
    torch.manual_seed(queries * 31 + extra)
    keys = queries + extra
    if layout == "transposed":
        query = torch.randn(batch, queries, heads, width).to(dtype).transpose(1, 2)
        key = torch.randn(batch, keys, heads, width).to(dtype).transpose(1, 2)
    else:
        query, key = (
            torch.randn(batch, heads, queries, width).to(dtype),
            torch.randn(batch, heads, keys, width).to(dtype),
        )
    if layout == "expanded":
        key = key[:1].expand(batch, -1, -1, -1)
    index = torch.randint(-1, keys, (batch, groups, slots))
    weight, head_weight = torch.rand(batch, groups, slots), torch.rand(heads)
    scale = width**-0.5
    lse = torch.logsumexp(query.double() @ key.double().transpose(-1, -2) * scale, -1).float() if with_lse else None
    maps = sk.attention_maps(query, key, index, weight, lse=lse, head_weight=head_weight)
    expected = softmax_maps(query, key, index, weight, scale, head_weight)
    assert maps.dtype == torch.float32 and maps.shape == (batch, groups, queries)
    # A score is a sum of `width` products: its error is at most width * eps times the product of the norms.
    size = query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * scale
    tolerance = 4 * (width + 4) * torch.finfo(torch.float32).eps * max(size.item(), 1)
    torch.testing.assert_close(maps.double(), expected, rtol=tolerance, atol=1e-30)


def test_all_columns_sum_to_one_and_no_gradient_flows():
    query = torch.randn(2, 3, 11, 16, requires_grad=True)
    key = torch.randn(2, 3, 17, 16, requires_grad=True)
    maps = sk.attention_maps(query, key, torch.arange(17).expand(2, 1, 17))
    torch.testing.assert_close(maps, torch.ones(2, 1, 11), rtol=0, atol=17 * torch.finfo(torch.float32).eps)
    assert not maps.requires_grad


def test_large_scores_and_empty_rows():
    query, key = torch.full((1, 1, 2, 8), 100.0), torch.full((1, 1, 3, 8), 100.0)
    key[0, 0, 1] = -100.0
    maps = sk.attention_maps(query, key, torch.tensor([[[0], [1], [-1]]]))
    # A score of 28,284 has an absolute rounding error of that many eps, the probability the same relatively.
    torch.testing.assert_close(maps[0, :, 0], torch.tensor([0.5, 0.0, 0.0]), rtol=28_284 * 1.2e-7, atol=0)
    empty = sk.attention_maps(query, key, torch.tensor([[[0]]]), lse=torch.full((1, 1, 2), -torch.inf))
    assert torch.equal(empty, torch.zeros(1, 1, 2))


def test_lse_layouts_of_the_vendor_kernels():
    query, key = torch.randn(1, 2, 5, 32), torch.randn(1, 2, 9, 32)
    value = torch.randn(1, 2, 9, 32)
    index = torch.tensor([[[1, 7]]])
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[1]
    expected = sk.attention_maps(query, key, index, lse=lse)
    padded = torch.nn.functional.pad(lse, (0, 27))
    assert torch.equal(sk.attention_maps(query, key, index, lse=padded), expected)
    assert torch.equal(sk.attention_maps(query, key, index, lse=lse[..., None]), expected)


def weights_by_hand(maps, rows, columns, combine, cap, mix, sharpen):
    maps = maps.double()
    relative = torch.stack([m / m.mean() for m in maps if m.mean() > 0])
    field = relative.mean(0) if combine == "mean" else relative.max(0).values
    field = field**sharpen
    field = torch.minimum(field / field.mean(), torch.tensor(cap, dtype=torch.float64))
    weights = (1 - mix) + mix * field
    weights = (weights / weights.mean()).view(rows, columns)
    return torch.kron(weights, torch.ones(2, 2, dtype=torch.float64))


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    groups=st.integers(1, 4),
    combine=st.sampled_from(["mean", "max"]),
    cap=st.sampled_from([1.5, 4.0]),
    mix=st.sampled_from([0.0, 0.5, 1.0]),
    sharpen=st.sampled_from([0.5, 1.0, 2.0]),
)
def test_allocate(rows, columns, groups, combine, cap, mix, sharpen):
    torch.manual_seed(rows * 10 + columns)
    maps = torch.rand(2, groups, rows * columns) + 0.01
    if groups > 1:
        maps[0, -1] = 0  # a concept that is not there is left out
    out = sk.allocate(maps, (rows, columns), combine=combine, cap=cap, mix=mix, sharpen=sharpen)
    assert out.shape == (2, 2 * rows, 2 * columns)
    expected = torch.stack([weights_by_hand(m, rows, columns, combine, cap, mix, sharpen) for m in maps])
    tolerance = 8 * rows * columns * torch.finfo(torch.float32).eps
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(out.mean((1, 2)), torch.ones(2), rtol=0, atol=tolerance)


def test_allocate_smoothing_keeps_constants_and_spreads_a_point():
    point = torch.zeros(1, 1, 15 * 17)
    point[0, 0, 7 * 17 + 8] = 1
    out = sk.allocate(point, (15, 17), smooth=1.0, cap=1e9, mix=1.0, patch=1)[0]
    distance = torch.tensor([math.exp(-0.5 * d * d) for d in range(4)])
    torch.testing.assert_close(out[7, 8:12] / out[7, 8], distance, rtol=1e-4, atol=0)
    assert out[7, 12] == 0  # beyond three standard deviations
    flat = sk.allocate(torch.ones(1, 1, 63), (7, 9), smooth=2.0, patch=1)
    torch.testing.assert_close(flat, torch.ones(1, 7, 9), rtol=0, atol=63 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("kind", ["no concept", "all zero", "nan", "inf", "negative"])
def test_allocate_without_information_is_exactly_one(kind):
    maps = torch.rand(2, 3, 12)
    if kind == "no concept":
        maps = torch.rand(2, 0, 12)
    elif kind == "all zero":
        maps[0] = 0
    else:
        maps[0, 1, 5] = {"nan": torch.nan, "inf": torch.inf, "negative": -1.0}[kind]
    out = sk.allocate(maps, (3, 4), smooth=1.0, sharpen=0.5)
    assert torch.equal(out[0], torch.ones(6, 8))
    assert out.isfinite().all()
    assert kind == "no concept" or not torch.equal(out[1], torch.ones(6, 8))


def test_gaussian_step_and_log_prob():
    sample, velocity, noise = torch.randn(3, 2, 4, 5, 6).unbind(0)
    a, b, s = torch.rand(3, 2) + 0.5
    prev_sample, mean = sk.gaussian_step(sample, velocity, noise, sk.Transition.gaussian(a, b, s))
    normal = torch.distributions.Normal(
        a.double().view(2, 1, 1, 1) * sample + b.double().view(2, 1, 1, 1) * velocity, s.double().view(2, 1, 1, 1)
    )
    torch.testing.assert_close(mean.double(), normal.mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(prev_sample, mean + s.view(2, 1, 1, 1) * noise)
    transition = sk.Transition.gaussian(a, b, s)
    expected = normal.log_prob(prev_sample.double())
    torch.testing.assert_close(
        sk.log_prob(prev_sample, mean, transition).double(), expected.mean((1, 2, 3)), rtol=1e-5, atol=1e-5
    )
    per_location = sk.log_prob(prev_sample, mean, transition, per_location=True)
    torch.testing.assert_close(per_location.double(), expected.mean(1), rtol=1e-4, atol=1e-4)
    low = sk.gaussian_step(sample.bfloat16(), velocity, noise, transition)
    assert low[0].dtype == torch.bfloat16 and low[1].dtype == torch.float32


def test_opcheck():
    query, key = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 9, 8)
    arguments = (query, key, torch.tensor([[[1, -1, 3]]]), torch.rand(1, 1, 3), None, 0.3, None)
    torch.library.opcheck(torch.ops.star.attention_maps_reference.default, arguments)
    arguments = (torch.rand(2, 3, 12), 3, 4, "mean", 1.0, 1.0, 4.0, 0.5, 2)
    torch.library.opcheck(torch.ops.star.allocate_reference.default, arguments)
    arguments = (*torch.randn(3, 2, 4, 3, 3).unbind(0), *torch.rand(3, 2).unbind(0))
    torch.library.opcheck(torch.ops.star.gaussian_step_reference.default, arguments)


def test_compiles_without_a_graph_break():
    query, key, index = torch.randn(1, 2, 12, 8), torch.randn(1, 2, 20, 8), torch.tensor([[[13, 14], [15, -1]]])
    sample, velocity, noise = torch.randn(3, 1, 4, 6, 8).unbind(0)
    transition = sk.Transition.gaussian(*torch.rand(3, 1).unbind(0))

    def everything(query, key, sample, velocity):
        weights = sk.allocate(sk.attention_maps(query, key, index), (3, 4))
        prev_sample, mean = sk.gaussian_step(sample, velocity, noise, transition)
        return weights, prev_sample, mean

    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager")
    arguments = (query, key, sample, velocity)
    for got, expected in zip(compiled(*arguments), everything(*arguments), strict=True):
        assert torch.equal(got, expected)


Q, K = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 9, 8)
INDEX = torch.zeros(2, 1, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: sk.attention_maps(Q[0], K, INDEX),
            ValueError,
            r"query: got shape \(2, 4, 8\), expected \(B, H, N, D\)",
        ),
        (lambda: sk.attention_maps(Q, K[..., :4], INDEX), ValueError, r"key: got shape .* expected \(2, 2, S, 8\)"),
        (
            lambda: sk.attention_maps(Q, K, INDEX.float()),
            TypeError,
            "concept_index: got torch.float32, expected an int64",
        ),
        (lambda: sk.attention_maps(Q, K, INDEX + 9), ValueError, r"concept_index: values in \[9, 9\], .* \[0, 9\)"),
        (lambda: sk.attention_maps(Q, K, INDEX, torch.ones(2, 1, 2)), ValueError, "concept_weight: got shape"),
        (lambda: sk.attention_maps(Q, K, INDEX, lse=torch.ones(2, 2, 3)), ValueError, "lse: got shape"),
        (lambda: sk.attention_maps(Q, K, INDEX, head_weight=torch.ones(3)), ValueError, "head_weight: got shape"),
        (lambda: sk.attention_maps(Q, K, INDEX, impl="nonsense"), ValueError, "impl: got 'nonsense'"),
        (lambda: sk.attention_maps([1], K, INDEX), TypeError, "query: got list, expected a torch.Tensor"),
        (lambda: sk.allocate(torch.rand(1, 1, 12), (3, 5)), ValueError, r"grid: got \(3, 5\), expected .* = 12"),
        (lambda: sk.allocate(torch.rand(1, 1, 12), (3, 4), mix=2), ValueError, "mix: got 2, expected a number between"),
        (lambda: sk.allocate(torch.rand(1, 1, 12), (3, 4), cap=0), ValueError, "cap: got 0, expected a number > 0"),
        (lambda: sk.allocate(torch.rand(1, 1, 12), (3, 4), combine="sum"), ValueError, "combine: got 'sum'"),
        (lambda: sk.implementations("sdpa"), ValueError, "operator: got 'sdpa'"),
    ],
)
def test_bad_arguments_are_one_clear_line(call, error, words):
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
