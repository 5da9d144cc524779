"""attention_maps in Triton: what its cuts into programs, its block sizes and its compiled variants must not change."""

import pytest
import torch

pytest.importorskip("triton")
import triton_bfloat16  # noqa: F401
from star_kernels.triton import attention_maps as kernels


def example_input(batch=1, heads=5, queries=20, keys=40, width=16, concepts=2, slots=3, dtype=torch.float32):
    query = torch.randn(batch, heads, queries, width).to(dtype)
    key = torch.randn(batch, heads, keys, width).to(dtype)
    return query, key, torch.randint(0, keys, (batch, concepts, slots))


def run(query, key, index, weight=None, lse=None, head_weight=None, **options):
    return kernels.launch(query, key, index, weight, lse, 0.25, head_weight, **options)


def row_lse(query, key):
    return torch.logsumexp(query.float() @ key.float().mT * 0.25, -1)


def expected(query, key, index):
    """One column at a time, in float64."""
    p = torch.softmax(query.double() @ key.double().mT * 0.25, -1).mean(1)
    return torch.stack([sum(p[:, :, j] for j in one) for one in index[0]], 1)


@pytest.mark.parametrize("heads", [1, 5, 11, 19])  # chunks of 1, 1, 2 and 3 heads, the last one shorter
@pytest.mark.parametrize("equal", [True, False])
def test_bits_depend_neither_on_the_groups_nor_on_the_batch(heads, equal):
    query, key, index = example_input(batch=2, heads=heads, dtype=torch.bfloat16)
    lse, weight = row_lse(query, key), torch.rand(index.shape)
    head_weight = None if equal else torch.rand(heads)
    whole, *others = (run(query, key, index, weight, lse, head_weight, groups=groups) for groups in (1, 2, 3, 8))
    assert all(torch.equal(whole, other) for other in others)
    row = run(query[1:], key[1:], index[1:], weight[1:], lse[1:], head_weight, groups=5)
    assert torch.equal(row, whole[1:])
    if equal and heads == 11:
        query, key, index, lse = query[:1], key[:1], index[:1], lse[:1]
        maps = run(query, key, index, lse=lse).double()
        torch.testing.assert_close(maps, expected(query, key, index), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("concepts", "slots"), [(3, 30), (17, 2), (1, 1)])  # blocks of columns, many concepts, one
@pytest.mark.parametrize("groups", [1, 4])
def test_columns_and_concepts_of_any_number(concepts, slots, groups):
    query, key, index = example_input(heads=4, keys=90, concepts=concepts, slots=slots)
    maps = run(query, key, index, lse=row_lse(query, key), groups=groups)
    torch.testing.assert_close(maps.double(), expected(query, key, index), rtol=2e-5, atol=0)


def test_every_cut_has_each_chunk_once():
    for heads in range(1, 70):
        for groups in range(1, 10):
            cut = kernels.tiling(2, heads, 100, 2, 8, 100, 64, groups)
            assert cut.chunk * (cut.chunks - 1) < heads <= cut.chunk * cut.chunks and cut.chunks <= kernels.CHUNKS
            assert cut.owned * (cut.groups - 1) < cut.chunks <= cut.owned * cut.groups
            assert cut.groups <= groups


def test_a_batch_that_fills_the_device_needs_no_second_launch():
    """SD3.5-large at 1024 px: 38 heads, which no small number divides but 2."""
    assert kernels.tiling(9, 38, 4096, 2, 8, 132, 64).alone
    assert kernels.tiling(9, 38, 1024, 2, 8, 132, 64).groups == 4
    assert kernels.tiling(1, 38, 1024, 2, 8, 132, 64).groups == 8


@pytest.mark.parametrize("blocks", [kernels.Blocks(32, 4, 1), kernels.Blocks(128, 8, 4)])
def test_block_sizes_are_free(blocks):
    query, key, index = example_input(queries=150)
    maps = run(query, key, index, lse=row_lse(query, key), blocks=blocks)
    torch.testing.assert_close(maps.double(), expected(query, key, index), rtol=2e-5, atol=0)
