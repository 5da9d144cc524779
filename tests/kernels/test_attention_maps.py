"""Every implementation of attention_maps against the whole attention matrix in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st

import devices
import star_kernels as sk
from star_kernels.api import Part, checked_attention_maps
from versions import compiled_or_skip

pytest.importorskip("triton")
import triton_bfloat16  # noqa: F401

each_implementation = devices.each_implementation("attention_maps")


def softmax_maps(query, key, index, weight=None, scale=None, head_weight=None):
    """Independent oracle: softmax over all keys in float64, one column picked at a time."""
    batch, heads, queries, width = query.shape
    scale = width**-0.5 if scale is None else scale
    head_weight = torch.full((heads,), 1 / heads, dtype=torch.float64) if head_weight is None else head_weight
    p = torch.softmax(query.double() @ key.double().transpose(-1, -2) * scale, -1)  # (B, H, N, S)
    p = (p * head_weight.double()[:, None, None]).sum(1)  # (B, N, S)
    maps = torch.zeros(batch, index.shape[1], queries, dtype=torch.float64)
    for b, g, k in torch.cartesian_prod(*(torch.arange(size) for size in index.shape)).tolist():
        if index[b, g, k] >= 0:
            maps[b, g] += (1.0 if weight is None else weight[b, g, k].double()) * p[b, :, index[b, g, k]]
    return maps


def log_sum_exp(query, key, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return torch.logsumexp(query.double() @ key.double().transpose(-1, -2) * scale, -1).float()


def assert_close(maps, expected, query, key, scale=None):
    """A score is a sum of D products in float32, which exp turns into a relative error of the probability; S terms in
    the log-sum-exp and the sums over heads and slots add their roundings."""
    width, keys = query.shape[-1], key.shape[2]
    scale = width**-0.5 if scale is None else abs(scale)
    size = (query.double().norm(dim=-1).max() * key.double().norm(dim=-1).max() * scale).item()
    eps = torch.finfo(torch.float32).eps
    rtol = eps * (2 * (width + 4) * max(size, 1) + keys**0.5 + query.shape[1] + 16)
    assert maps.dtype == torch.float32
    torch.testing.assert_close(maps.double(), expected, rtol=rtol, atol=1e-30)


def example_input(batch=2, heads=3, queries=45, keys=77, width=32, groups=2, slots=3, dtype=torch.float32):
    query = torch.randn(batch, heads, queries, width).to(dtype)
    key = torch.randn(batch, heads, keys, width).to(dtype)
    return query, key, torch.randint(0, keys, (batch, groups, slots))


@each_implementation
def test_against_the_whole_matrix(impl):
    # The interpreter takes some 10 ms for each turn of a loop.
    @settings(max_examples=12 if impl == "triton" else 60)
    @example(1, 1, 1, 0, 8, 1, 1, torch.float32, False, "contiguous", 0)
    @example(1, 1, 33, 64, 96, 1, 1, torch.bfloat16, False, "transposed", 0)
    @example(2, 2, 65, 7, 128, 2, 9, torch.float16, True, "reversed", 1)
    @given(
        batch=st.integers(1, 2),
        heads=st.integers(1, 3),
        queries=st.integers(1, 70),
        extra=st.integers(0, 70),
        width=st.sampled_from([8, 20, 32, 64, 96, 128]),
        groups=st.integers(1, 3),
        slots=st.integers(1, 25),
        dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
        with_lse=st.booleans(),
        layout=st.sampled_from(["contiguous", "transposed", "expanded", "reversed"]),
        seed=st.integers(0, 9),
    )
    def check(batch, heads, queries, extra, width, groups, slots, dtype, with_lse, layout, seed):
        torch.manual_seed(seed)
        query, key, index = example_input(batch, heads, queries, queries + extra, width, groups, slots, dtype)
        if layout == "transposed":  # as the projections of a transformer leave them
            query, key = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (query, key))
        elif layout == "expanded":
            query, key = query[:, :1].expand(-1, heads, -1, -1), key[:1].expand(batch, -1, -1, -1)
        elif layout == "reversed":  # no unit stride at all
            query, key = (x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0) for x in (query, key))
        index = torch.where(torch.rand(index.shape) < 0.2, -1, index)
        weight, head_weight = torch.rand(index.shape), torch.rand(heads)
        lse = log_sum_exp(query, key) if with_lse else None
        maps = sk.attention_maps(query, key, index, weight, lse=lse, head_weight=head_weight, impl=impl)
        assert_close(maps, softmax_maps(query, key, index, weight, None, head_weight), query, key)

    check()


@each_implementation
@pytest.mark.parametrize("with_lse", [True, False])
@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_biased_and_masked_keys_that_heads_share(impl, with_lse, heads, key_heads, dtype):
    """As grouped-query attention with a float mask has them, more queries than keys and fewer."""
    for queries, keys in ((70, 9), (5, 150)):
        query, key, index = example_input(heads=heads, queries=queries, keys=keys, dtype=dtype)
        key, weight, head_weight = key[:, :key_heads], torch.rand(index.shape), torch.rand(heads)
        bias = torch.randn(2, keys).masked_fill(torch.rand(2, keys) < 0.3, -torch.inf)
        bias[:, 0] = 0.5
        repeated = key.repeat_interleave(heads // key_heads, 1)
        bias = bias.to(dtype)
        scores = query.double() @ repeated.double().mT * query.shape[-1] ** -0.5 + bias.double()[:, None, None]
        lse = torch.logsumexp(scores, -1).float() if with_lse else None
        options = dict(lse=lse, head_weight=head_weight, key_bias=bias, impl=impl)
        maps = sk.attention_maps(query, key, index, weight, **options)
        p = (torch.softmax(scores, -1) * head_weight.double()[:, None, None]).sum(1)
        columns = p.gather(2, index.flatten(1)[:, None].expand(-1, queries, -1)).unflatten(2, index.shape[1:])
        assert_close(maps, (columns * weight.double()[:, None]).sum(-1).mT, query, key)
        assert not maps[(bias.gather(1, index.flatten(1)).view(index.shape) == -torch.inf).all(-1)].any()


@each_implementation
def test_all_columns_sum_to_one_and_no_gradient_flows(impl):
    query, key, _ = example_input(queries=5, keys=101)
    query.requires_grad_(), key.requires_grad_()
    maps = sk.attention_maps(query, key, torch.arange(101).expand(2, 1, 101), impl=impl)
    assert_close(maps, torch.ones(2, 1, 5, dtype=torch.float64), query, key)
    assert not maps.requires_grad


@each_implementation
def test_duplicates_count_twice_and_empty_concepts_are_zero(impl):
    query, key, _ = example_input(batch=1)
    index = torch.tensor([[[4, 4, 9], [4, -1, -1], [-1, -1, -1]]])
    maps = sk.attention_maps(query, key, index, impl=impl)
    assert_close(maps, softmax_maps(query, key, index), query, key)
    assert torch.equal(maps[:, 2], torch.zeros(1, 45))
    assert sk.attention_maps(query, key, index[:, :0], impl=impl).shape == (1, 0, 45)
    assert torch.equal(sk.attention_maps(query, key, index[:, :, :0], impl=impl), torch.zeros(1, 3, 45))


@each_implementation
@pytest.mark.parametrize("scale", [1.0, -1.0])
def test_scores_of_ten_thousand(impl, scale):
    query, key, index = example_input(batch=1, queries=40, keys=50, width=16, slots=20)
    query, key = 40 * query, 40 * key  # scores of +-1e4
    maps = sk.attention_maps(query, key, index, scale=scale, impl=impl)
    assert maps.isfinite().all()
    assert_close(
        maps.clamp_min(1e-30), softmax_maps(query, key, index, scale=scale).clamp_min(1e-30), query, key, scale
    )


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # numpy, in the interpreter
@each_implementation
def test_masked_keys_and_rows(impl):
    query, key, index = torch.rand(1, 1, 6, 8) + 0.1, torch.rand(1, 1, 9, 8), torch.tensor([[[2], [3]]])
    key[0, 0, 2] = -torch.inf  # a key that no query sees
    maps = sk.attention_maps(query, key, index, impl=impl)
    seen = [j for j in range(9) if j != 2]
    assert torch.equal(maps[:, 0], torch.zeros(1, 6))
    assert_close(maps[:, 1:], softmax_maps(query, key[:, :, seen], torch.tensor([[[2]]])), query, key[:, :, seen])
    lse = log_sum_exp(query, key)
    lse[0, 0, 4] = -torch.inf  # a query that sees no key
    maps = sk.attention_maps(query, key, index, lse=lse, impl=impl)
    assert torch.equal(maps[..., 4], torch.zeros(1, 2)) and (maps[:, 1, :4] > 0).all()


@each_implementation
@pytest.mark.parametrize("shared", [-1e4, torch.finfo(torch.float32).min, 3e38])
def test_what_a_bias_adds_to_every_key_changes_nothing(impl, shared):
    """As the mask of an empty text, whose values leave float32 no room for the scores beside them."""
    query, key, index = torch.randn(2, 2, 6, 8), torch.randn(2, 2, 9, 8), torch.tensor([[[2, 4]], [[3, -1]]])
    plain = sk.attention_maps(query, key, index, impl=impl)
    maps = sk.attention_maps(query, key, index, key_bias=torch.full((2, 9), shared), impl=impl)
    torch.testing.assert_close(maps, plain, rtol=1e-5, atol=1e-7)


@each_implementation
def test_what_is_not_finite_shows(impl):
    query, key, index = example_input(batch=1, queries=3, keys=9)
    query[0, 0, 1, 0] = torch.nan
    maps = sk.attention_maps(query, key, index, impl=impl)
    assert maps[..., 1].isnan().all() and maps[..., [0, 2]].isfinite().all()


@each_implementation
def test_an_unused_slot_brings_nothing_of_what_is_not_finite(impl):
    query, key, index = example_input(batch=1, queries=3, keys=9)
    index = torch.tensor([[[1, -1], [2, -1]]])
    expected = sk.attention_maps(query, key, index, impl=impl)
    weight = torch.ones(index.shape)
    weight[:, :, 1] = torch.nan
    assert torch.equal(sk.attention_maps(query, key, index, weight, impl=impl), expected)
    key, lse = key.clone(), torch.zeros(query.shape[:3])
    expected = sk.attention_maps(query, key, index, lse=lse, impl=impl)
    key[:, :, 0] = torch.inf  # which no slot names
    assert torch.equal(sk.attention_maps(query, key, index, lse=lse, impl=impl), expected)
    none = torch.full_like(index, -1)
    assert torch.equal(sk.attention_maps(query, key[:, :, :0], none, impl=impl), torch.zeros(1, 2, 3))


@each_implementation
def test_a_weight_of_0_does_not_hide_what_is_not_finite(impl):
    query, key, _ = example_input(batch=1, queries=3, keys=9)
    key = key.clone()
    key[0, 0, 1, 0] = torch.nan
    index, weight = torch.tensor([[[1, 2], [2, 3]]]), torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])
    maps = sk.attention_maps(query, key, index, weight, lse=torch.zeros(query.shape[:3]), impl=impl)
    assert maps[:, 0].isnan().all() and maps[:, 1].isfinite().all()


@each_implementation
def test_an_infinite_score_leaves_no_softmax(impl):
    query, key, _ = example_input(batch=1, queries=3, keys=9)
    query, key = query.abs() + 0.1, key.clone()
    key[0, 0, 4, 0] = torch.inf
    assert sk.attention_maps(query, key, torch.tensor([[[1]]]), impl=impl).isnan().all()


@each_implementation
def test_autocast_changes_no_bit(impl):
    query, key, index = example_input()
    expected = sk.attention_maps(query, key, index, impl=impl)
    with torch.autocast(query.device.type, torch.bfloat16):
        assert torch.equal(sk.attention_maps(query, key, index, impl=impl), expected)


def test_an_error_is_the_same_whatever_torch_makes_of_the_kernels(monkeypatch):
    compiled_or_skip()

    def refuse(*_):
        raise RuntimeError("from C++, with\na stack")

    compiled = SimpleNamespace(default=SimpleNamespace(_op=refuse))
    monkeypatch.setattr("star_kernels.ops.Operator.run", lambda *_: compiled)
    with pytest.raises(ValueError, match=r"^concept_index: values in \[9, 9\], expected -1 or columns in \[0, 9\)$"):
        sk.attention_maps(Q, K, INDEX + 9)
    with pytest.raises(RuntimeError, match="from C"):  # an error of another kind stays
        sk.attention_maps(Q, K, INDEX)


@each_implementation
@pytest.mark.parametrize("index", [9, -2, 2**40])
def test_an_index_beyond_the_keys_raises_or_shows(impl, index):
    query, key, _ = example_input(batch=1, queries=3, keys=9)
    concepts = torch.tensor([[[1, index], [2, -1]]])
    if query.device.type == "cpu":
        with pytest.raises((ValueError, RuntimeError), match="concept_index"):
            sk.attention_maps(query, key, concepts, impl=impl)
    if impl == "native":  # it has looked
        return
    # Where nobody looks before it runs: on a GPU, in a compiled graph.
    run = getattr(torch.ops.star, f"attention_maps_{impl}")
    for weight in (None, torch.zeros(1, 2, 2)):
        maps = run(query, key, concepts, weight, None, 0.25, None, None)
        assert maps[:, 0].isnan().all() and maps[:, 1].isfinite().all()


@each_implementation
def test_lse_layouts_of_the_vendor_kernels(impl):
    query, key, index = example_input(queries=45)
    lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query.cpu(), key.cpu(), key.cpu())[1]
    lse = lse.to(query.device)
    assert lse.stride(2) != 1  # strided on the CPU
    maps = sk.attention_maps(query, key, index, lse=lse, impl=impl)
    assert_close(maps, softmax_maps(query, key, index), query, key)
    padded = F.pad(lse, (0, 19), value=torch.nan)  # the memory-efficient kernel rounds N up to a multiple of 32
    assert torch.equal(sk.attention_maps(query, key, index, lse=padded, impl=impl), maps)
    assert torch.equal(sk.attention_maps(query, key, index, lse=lse[..., None], impl=impl), maps)  # cuDNN


@each_implementation
@pytest.mark.parametrize("with_lse", [True, False])
def test_a_row_alone_and_a_part_of_the_queries_have_the_same_bits(impl, with_lse):
    query, key, index = example_input(queries=70)
    lse = log_sum_exp(query, key) if with_lse else None
    maps = sk.attention_maps(query, key, index, lse=lse, impl=impl)
    alone = sk.attention_maps(query[1:], key[1:], index[1:], lse=lse[1:] if with_lse else None, impl=impl)
    if impl != "reference":  # whose matrix products choose their order by the shape
        assert torch.equal(alone, maps[1:])
    again = sk.attention_maps(query, key, index, lse=lse, impl=impl)
    assert torch.equal(again, maps)


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("with_lse", [True, False])
def test_native_bits_do_not_depend_on_the_threads(with_lse, at_thread_counts):
    query, key, index = example_input(queries=170, slots=20)
    lse = log_sum_exp(query, key) if with_lse else None
    first, *others = at_thread_counts(lambda: sk.attention_maps(query, key, index, lse=lse, impl="native"))
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("impl", ["reference", "native"])
def test_float64(impl):
    query, key, index = example_input(dtype=torch.float64)
    query, key = query + torch.randn_like(query) * 1e-9, key + torch.randn_like(key) * 1e-9
    maps = sk.attention_maps(query, key, index, impl=impl)
    assert maps.dtype == torch.float64
    torch.testing.assert_close(maps, softmax_maps(query, key, index), rtol=1e-13, atol=0)


def test_triton_refuses_float64():
    query, key, index = example_input(dtype=torch.float64)
    with pytest.raises(TypeError, match=r"query: got torch\.float64, which impl='triton' does not take"):
        sk.attention_maps(query, key, index, impl="triton")


@each_implementation
@pytest.mark.parametrize("processors", [1, 3])
def test_out_takes_the_maps(impl, processors, monkeypatch):
    from star_kernels.triton import attention_maps as triton_code

    monkeypatch.setattr(triton_code, "processors", lambda device: processors)  # 3: a sum over groups of heads
    query, key, index = example_input(queries=20)
    expected = sk.attention_maps(query, key, index, impl=impl)
    slots = torch.full((3, *expected.shape), 7.0)
    out = sk.attention_maps(query, key, index, out=slots[1], impl=impl)
    assert out.data_ptr() == slots[1].data_ptr() and torch.equal(slots[1], expected)
    assert (slots[::2] == 7).all()
    turned = torch.zeros(expected.transpose(1, 2).shape, dtype=torch.float64).transpose(1, 2)
    assert torch.equal(sk.attention_maps(query, key, index, out=turned, impl=impl), expected.double())
    assert not sk.attention_maps(query, key, index[:, :, :0], out=slots[1], impl=impl).any()


@each_implementation
def test_autograd_sees_that_out_has_changed(impl):
    query, key, index = example_input(queries=20)
    factor = torch.ones(2, 2, 20, requires_grad=True)
    out = torch.ones(2, 2, 20)
    loss = (factor * out).sum()
    sk.attention_maps(query, key, index, out=out, impl=impl)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    with torch.inference_mode():  # where tensors have no version
        assert sk.attention_maps(query, key, index, out=torch.ones(2, 2, 20), impl=impl).isfinite().all()


@each_implementation
@pytest.mark.parametrize("name", ["query", "key", "lse"])
def test_out_may_lie_in_the_memory_of_what_is_read(impl, name):
    query, key, index = example_input(queries=70, width=16)
    arguments = {"query": query, "key": key, "lse": log_sum_exp(query, key)}
    expected = sk.attention_maps(**arguments, concept_index=index, impl=impl)
    # Later rows are read where the first row's maps are written.
    out = arguments[name].view(-1)[-expected.numel() :].view_as(expected)
    assert torch.equal(sk.attention_maps(**arguments, concept_index=index, out=out, impl=impl), expected)


@each_implementation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("part", [Part(0, 4, 0, 40), Part(1, 2, 7, 33), Part(3, 1, 0, 5)])
def test_a_part_has_the_bits_of_its_slices(impl, part, dtype):
    if impl == "triton" and dtype == torch.float64:
        pytest.skip("float64 is not for Triton")
    query, key, index = example_input(batch=4, queries=40, width=16, dtype=dtype)
    index[:, 0, :] = index[:, 0, :1]  # slots that name the same column
    index[:, 1, 2] = -1
    query.requires_grad_()
    lse = F.pad(log_sum_exp(query, key), (0, 5), value=torch.nan).detach()  # padded, as some kernels give it
    rows = slice(part.first_row, part.first_row + part.rows)
    options = dict(head_weight=torch.rand(3), key_bias=torch.randn(4, 77)[rows], impl=impl)
    arguments = index[rows], torch.rand(index.shape)[rows]
    seen = query[rows, :, part.first_query : part.first_query + part.queries]
    own = [] if impl == "triton" else [(None, None)]  # which the interpreter makes slowly
    for norm, narrow in [*own, (lse, lse[rows, :, part.first_query :])]:
        expected = sk.attention_maps(seen, key[rows], *arguments, lse=narrow, **options)
        assert expected.isfinite().all()
        out = torch.full((3, *expected.shape), torch.nan, dtype=expected.dtype, device=expected.device)
        make = checked_attention_maps(query, key, *arguments, lse=norm, out=out[0], part=part, **options)
        for slot in (1, 2):  # prepared once for several
            assert make(query, key, norm, out[slot]) is not None
        assert out[0].isnan().all() and not out.requires_grad
        assert torch.equal(out[1], expected) and torch.equal(out[2], expected)
        made = checked_attention_maps(query, key, *arguments, lse=norm, part=part, **options)(query, key, norm, None)
        assert torch.equal(made, expected)


@pytest.mark.usefixtures("compiled")
def test_a_part_beyond_the_call_is_refused():
    query, key, index = example_input(batch=2, queries=40)
    lse, run = log_sum_exp(query, key), torch.ops.star.write_attention_maps_native
    for first_row, first_query, shape, words in (
        (1, 0, (2, 2, 40), "fewer rows"),
        (-1, 0, (2, 2, 40), "fewer rows"),
        (0, 8, (2, 2, 33), "fewer queries"),
        (0, -1, (2, 2, 33), "fewer queries"),
        (0, 0, (2, 3, 40), "another shape"),
        (0, 0, (2, 2, 80), "fewer queries"),
    ):
        out = torch.zeros(shape)
        with pytest.raises(RuntimeError, match=words):
            run(query, key, index, None, lse, 0.2, None, None, first_row, first_query, out)
        assert not out.any()
    for out in (torch.zeros(2, 2, 40).double(), torch.zeros(40, 2, 2).transpose(0, 2)):
        with pytest.raises(RuntimeError, match="contiguous memory"):
            run(query, key, index, None, lse, 0.2, None, None, 0, 0, out)


@each_implementation
def test_opcheck(impl):
    query, key, index = example_input(queries=9, keys=11, groups=1)
    if impl != "triton":
        write = getattr(torch.ops.star, f"write_attention_maps_{impl}").default
        torch.library.opcheck(write, (query, key, index, None, None, 0.2, None, None, 0, 4, torch.empty(2, 1, 5)))
    op = getattr(torch.ops.star, f"attention_maps_{impl}").default
    torch.library.opcheck(op, (query, key, index, torch.rand(index.shape), None, 0.2, torch.rand(3), torch.rand(2, 11)))
    torch.library.opcheck(op, (query, key, index, None, log_sum_exp(query, key), 0.2, None, None))


@pytest.mark.parametrize("impl", ["native", "triton"])
def test_inductor(impl):
    query, key, index = example_input(queries=9, keys=11)

    def capture(query, key, index):
        return sk.attention_maps(query * 2, key, index, impl=impl) + 1

    compiled = torch.compile(capture, fullgraph=True)
    assert torch.equal(compiled(query, key, index), capture(query, key, index))


Q, K = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 9, 8)
INDEX = torch.zeros(2, 1, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (dict(query=Q[0]), ValueError, r"query: got shape \(2, 4, 8\), expected \(B, H, N, D\)"),
        (dict(query=[1]), TypeError, "query: got list, expected a torch.Tensor"),
        (dict(key=K[..., :4]), ValueError, r"key: got shape .* expected \(2, H', S, 8\)"),
        (dict(key=K[:, [0, 1, 1]]), ValueError, "key: got 3 heads, expected a divisor of query's 2"),
        (dict(key=K[:, :0]), ValueError, "key: got 0 heads, expected a divisor of query's 2"),
        (dict(key_bias=torch.ones(2, 8)), ValueError, r"key_bias: got shape \(2, 8\), expected \(2, 9\)"),
        (dict(concept_index=INDEX.float()), TypeError, "concept_index: got torch.float32, expected an int64"),
        (dict(concept_index=INDEX + 9), ValueError, r"concept_index: .*9.* \[0, 9\)"),
        (dict(concept_weight=torch.ones(2, 1, 2)), ValueError, "concept_weight: got shape"),
        (dict(lse=torch.ones(2, 2, 3)), ValueError, "lse: got shape"),
        (dict(lse=3), TypeError, "lse: got int, expected a torch.Tensor"),
        (dict(query=Q[..., :0], key=K[..., :0]), ValueError, r"query: got shape \(2, 2, 4, 0\), expected D >= 1"),
        (dict(query=Q.to_sparse()), TypeError, "query: got layout torch.sparse_coo, expected a dense tensor"),
        (dict(lse=torch.nested.nested_tensor([Q[0, 0], Q[0, 1]])), TypeError, "lse: got a nested tensor, expected"),
        (dict(scale="x"), TypeError, "scale: got str, expected a finite number"),
        (dict(scale=float("nan")), ValueError, "scale: got nan, expected a finite number"),
        (dict(scale=10**5000), ValueError, "scale: got a number beyond float's range, expected a finite number"),
        (dict(scale=torch.ones(2)), TypeError, "scale: got Tensor of several numbers, expected a finite number"),
        (dict(query=Q[:, :, :1].expand(2, 2, 2**40, 8)), ValueError, "query, concept_index: sizes .* 2\\*\\*40"),
        (dict(impl=["native"]), TypeError, "impl: got list, expected 'auto' or the name"),
        (dict(head_weight=torch.ones(3)), ValueError, "head_weight: got shape"),
        (dict(out=torch.ones(2, 1, 3)), ValueError, r"out: got shape \(2, 1, 3\), expected \(2, 1, 4\)"),
        (dict(impl="nonsense"), ValueError, "impl: got 'nonsense'"),
    ],
)
def test_bad_arguments_are_one_clear_line(change, error, words):
    with pytest.raises(error, match=words) as caught:
        sk.attention_maps(**{"query": Q, "key": K, "concept_index": INDEX, **change})
    assert "\n" not in str(caught.value)


def test_unknown_operators_have_no_implementations():
    with pytest.raises(ValueError, match=r"operator: got 'sdpa', expected one of \['allocate', 'attention_maps'"):
        sk.implementations("sdpa")
