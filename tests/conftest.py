"""Tests run in the order a reader learns: what everything needs, then room by room."""

import os

# Before torch is imported: spinning threads slow every other process on a small machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Triton decides at import whether it interprets. `make gpu-check` sets 0, to run its kernels on the GPU.
os.environ.setdefault("TRITON_INTERPRET", "1")
# Asking for GPUs must not keep the processes that tests fork from using them.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

from pathlib import Path

import hypothesis
import pytest
import torch

import cuda_on_host
import versions
from star_kernels import api

ROOMS = ("kernels", "method", "rewards", "shapes", "training", "reports", "study", "app", "hosts", "tools")

hypothesis.settings.register_profile("default", deadline=None, derandomize=True, max_examples=40)
hypothesis.settings.load_profile("default")


LONG = ("test_triton_offline", "test_cuda_offline", "test_distributed", "test_recovery")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: ROOMS.index(item.path.parent.name) if item.path.parent.name in ROOMS else -1)
    # Several processes share the tests: files that take minutes come first, or one process would work alone at the end.
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def on_its_device(request):
    """Tests that are marked `gpu` make their tensors there."""
    if request.node.get_closest_marker("gpu") is None:
        yield
        return
    parameters = getattr(request.node, "callspec", None)
    if parameters and any("cuda_" in str(value) for value in parameters.params.values()):
        pytest.skip("the CUDA kernels that are compiled for the CPU run there")
    with torch.device("cuda"):
        yield


@pytest.fixture
def fresh_accelerator():
    """accelerate allows a process one precision; here each test has its own."""
    from accelerate.state import AcceleratorState  # which the tests of the operators can do without

    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def cuda_kernels():
    """The CUDA kernels, compiled for the CPU, as implementations that the operators take."""
    if not cuda_on_host.has_stable_abi():
        versions.skip_without("torch", "stable ABI of libtorch, which the CUDA kernels use")
    build = Path(__file__).parents[1] / "build"
    if os.environ.get("STAR_SANITIZE") == "1":
        library = cuda_on_host.build(build / "sanitize" / "cuda_on_host", cuda_on_host.SANITIZE)
    else:
        library = cuda_on_host.build(build / "cuda_on_host")
    cuda_on_host.load(library)
    resolve = api.resolve
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            api, "resolve", lambda operator, impl, *rest: impl if "cuda_" in impl else resolve(operator, impl, *rest)
        )
        yield


@pytest.fixture
def compiled():
    """For tests that call the compiled operators by name."""
    versions.compiled_or_skip()


@pytest.fixture(autouse=True)
def loaded_where_asked_for(request):
    parameters = getattr(request.node, "callspec", None)
    if parameters and "native" in parameters.params.values():
        request.getfixturevalue("compiled")
    if parameters and any("cuda_" in str(parameters.params.get(name)) for name in ("impl", "loss")):
        request.getfixturevalue("cuda_kernels")


@pytest.fixture
def at_thread_counts():
    """Calls a function with 1, 2 and 5 threads and gives what it returned."""
    before = torch.get_num_threads()

    def results(call):
        out = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            out.append(call())
        return out

    yield results
    torch.set_num_threads(before)
