"""Implementations of an operator as test parameters: on the CPU, and where there is a GPU on it too.

A parameter for the GPU has the mark `gpu`, under which tensors are made on it (see conftest.py); `pytest -m gpu` runs
these alone. The kernels that CUDA_ON_HOST compiles for the CPU run there.
"""

from __future__ import annotations

import pytest
import torch

import cuda_on_host
from star_kernels import api, implementations

if api.HAS_TRITON:
    import triton_bfloat16  # noqa: F401


def on_gpu(operator: str) -> list:
    if not torch.cuda.is_available():
        return []
    return [
        pytest.param(name, id=f"gpu_{name}", marks=pytest.mark.gpu)
        for name, reason in implementations(operator, "cuda").items()
        if reason is None
    ]


def each_implementation(operator: str, argument: str = "impl") -> pytest.MarkDecorator:
    """Parametrizes a test over all that can run here."""
    return pytest.mark.parametrize(argument, [*cuda_on_host.and_runnable(operator), *on_gpu(operator)])
