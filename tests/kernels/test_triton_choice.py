"""What a device gets: CUDA where it is built, then Triton, and plain PyTorch last, which is told once."""

import warnings

import pytest
import torch

from star_kernels import api
from star_kernels.ops import OPERATORS

each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))


def forget():
    """What was chosen and told."""
    api.choose.cache_clear()
    api.warn_once.cache_clear()


@pytest.fixture(autouse=True)
def nothing_told_yet():
    forget()
    yield
    forget()


@each_operator
def test_cuda_comes_first_then_triton(operator, monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(api, "HAS_TRITON", True)
    if "cuda" in operator.native:
        monkeypatch.setattr(api.native, "reason", lambda device: None)
        assert api.resolve(operator.name, "auto", gpu) == "native"
    forget()
    monkeypatch.setattr(api.native, "reason", lambda device: "not built")
    if operator.triton is not None:
        assert api.resolve(operator.name, "auto", gpu) == "triton"


@each_operator
def test_plain_pytorch_on_a_gpu_is_told_once(operator, monkeypatch):
    monkeypatch.setattr(api, "HAS_TRITON", False)
    monkeypatch.setattr(api.native, "CUDA_REASON", "built without GPU kernels; reinstall with nvcc and STAR_CUDA=1")
    with pytest.warns(RuntimeWarning) as told:
        for _ in range(2):
            assert api.resolve(operator.name, "auto", torch.device("cuda", 0)) == "reference"
    (one,) = told
    text = str(one.message)
    assert text.startswith(f"{operator.name} runs as plain PyTorch on cuda tensors: ") and "\n" not in text
    assert operator.triton is None or "Triton is not installed; pip install 'triton" in text
    assert "cuda" not in operator.native or "reinstall with nvcc and STAR_CUDA=1" in text


@each_operator
def test_what_was_asked_for_is_not_told(operator, monkeypatch):
    monkeypatch.setattr(api, "HAS_TRITON", False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert api.resolve(operator.name, "reference", torch.device("cuda")) == "reference"
        monkeypatch.setenv("STAR_IMPL", "reference")
        assert api.resolve(operator.name, "auto", torch.device("cuda")) == "reference"
        monkeypatch.delenv("STAR_IMPL")
        api.resolve(operator.name, "auto", torch.device("cpu"))


@pytest.mark.parametrize("device", ["xpu", "mps"])
@each_operator
def test_devices_without_kernels_use_the_reference(operator, device):
    with pytest.warns(RuntimeWarning, match=f"{operator.name} runs as plain PyTorch on {device} tensors"):
        assert api.resolve(operator.name, "auto", torch.device(device)) == "reference"
    for name in ("native", "triton"):
        if name in api.implementations(operator.name, device):
            with pytest.raises(RuntimeError, match=f"impl='{name}': .*{device} tensors"):
                api.resolve(operator.name, name, torch.device(device))
