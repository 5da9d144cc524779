"""allocate in Triton: samples of more tokens than a program holds at once."""

import pytest
import torch

import star_kernels as sk

pytest.importorskip("triton")
from star_kernels.triton import allocate as kernels


def test_a_field_of_several_blocks():
    rows, columns = 71, 60
    assert kernels.MOST_TOKENS < rows * columns < 2 * kernels.MOST_TOKENS
    maps = torch.rand(2, 2, rows * columns)
    maps[1, 0, -1] = torch.nan  # in the last block alone
    options = dict(smooth=1.0, sharpen=1.5, cap=1.5, patch=1)
    weights = sk.allocate(maps, (rows, columns), **options, impl="triton")
    expected = sk.allocate(maps.double(), (rows, columns), **options, impl="reference")
    torch.testing.assert_close(weights.double(), expected, rtol=2e-5, atol=0)
    assert torch.equal(weights[1], torch.ones(rows, columns))


def test_bits_do_not_depend_on_the_batch():
    maps = torch.rand(3, 2, 35)
    weights = sk.allocate(maps, (5, 7), smooth=1.0, impl="triton")
    assert torch.equal(sk.allocate(maps[1:2], (5, 7), smooth=1.0, impl="triton"), weights[1:2])
