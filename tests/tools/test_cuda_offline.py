"""The CUDA kernels build for the H100 (slow: for every GPU of a release), keep to registers and 16-byte accesses, and
load without a GPU."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from star_kernels import native
from star_kernels.ops import OPERATORS

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")

ROOT = Path(__file__).resolve().parents[2]
LAUNCHERS = sorted(name for name, operator in OPERATORS.items() if "cuda" in operator.native)
RUNTIME = {
    *("cudaLaunchKernel", "__cudaLaunchKernel", "cudaLaunchKernelExC", "cudaGetLastError", "cudaGetErrorString"),
    *("__cudaPushCallConfiguration", "__cudaPopCallConfiguration", "__cudaGetKernel"),
    *("__cudaRegisterFatBinary", "__cudaRegisterFatBinaryEnd", "__cudaUnregisterFatBinary", "__cudaRegisterFunction"),
    *("__cudaInitModule", "__cudaRegisterVar", "cudaGetDevice", "cudaDeviceGetAttribute"),
}  # it starts kernels, asks for errors and for the GPU's kind, and registers code
RELEASE = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "compute_120"]


@pytest.fixture(scope="module", params=[["sm_90"], pytest.param(RELEASE, marks=pytest.mark.slow)], ids=["one", "all"])
def architectures(request):
    return request.param


@pytest.fixture(scope="module")
def library(architectures):
    import cuda_offline

    if architectures == RELEASE:
        return cuda_offline.build(ROOT / "build" / "cuda_offline")
    return cuda_offline.build(ROOT / "build" / "cuda_offline_sm_90", "9.0")


@needs_nvcc
def test_every_kernel_keeps_to_registers_and_wide_accesses(library, architectures):
    import cuda_offline

    kernels = cuda_offline.kernels(library)
    compiled = {name for name in architectures if name.startswith("sm_")}
    assert {kernel["architecture"] for kernel in kernels} == compiled
    names = {re.match(r"\w+", kernel["kernel"])[0] for kernel in kernels}
    launches = {
        f"{loss}_{launch}_kernel" for loss in ("policy_loss", "nft_loss") for launch in ("sums", "finish", "gradient")
    }
    assert names == launches | {"gaussian_step_kernel", "allocate_kernel"}
    assert sum(map(cuda_offline.is_wide, kernels)) == len(compiled) * (
        6 * 2
        + 3 * 2  # the losses' two launches over the latents, in six combinations of types and in three
        + 2 * 2  # gaussian_step: two types, noise that is given or drawn
    )
    assert not [(kernel, wrong) for kernel in kernels if (wrong := cuda_offline.problems(kernel))]


@needs_nvcc
def test_the_library_loads_beside_a_torch_without_cuda(library, architectures):
    code = (
        "import importlib.util, torch, star_kernels\n"
        f"spec = importlib.util.spec_from_file_location('_cuda', {str(library)!r})\n"
        "module = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(module)\n"
        f"names = [f'star::{{name}}_native' for name in {LAUNCHERS}]\n"
        "print(module.ARCHITECTURES, *(torch._C._dispatch_has_kernel_for_dispatch_key(n, 'CUDA') for n in names))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [*architectures, *["True"] * len(LAUNCHERS)]


# Whatever waits for the GPU, or allocates or frees memory itself, is not for a CUDA graph.
# The wait of a kernel for the one before it (cudaGridDependencySynchronize) is the GPU's own.
WAITING = r"cuda(?!GridDependency)\w*(?:Synchronize|Memcpy|Memset|Malloc|Free|Query|ElapsedTime)|cudaEvent|cudaHost"


def test_the_launchers_neither_wait_nor_allocate():
    sources = [*(ROOT / "csrc" / "cuda").iterdir(), ROOT / "csrc" / "star_math.h"]
    assert len(sources) > 8
    assert not [(path.name, found) for path in sources if (found := re.findall(WAITING, path.read_text()))]
    triton = (ROOT / "star_kernels" / "triton" / "attention_maps.py").read_text()
    assert not re.findall(r"\.(?:item|tolist|cpu|numpy|nonzero|synchronize)\(|\.any\(\)|\.all\(\)", triton)


@needs_nvcc
def test_the_launchers_call_nothing_that_waits(library):
    """Not by way of a header either: all that they want of CUDA's runtime."""
    objects = sorted(library.parents[1].glob("temp/**/*.cuda.o"))
    assert [path.name.split(".")[0] for path in objects] == LAUNCHERS
    for path in objects:
        names = subprocess.run(["nm", "--undefined-only", path], capture_output=True, text=True, check=True).stdout
        wanted = set(re.findall(r"\b_*cuda\w+", names))
        assert "cudaLaunchKernel" in " ".join(wanted)
        assert wanted <= RUNTIME, path.name


def test_a_toolkit_that_is_asked_for_and_not_there_is_one_clear_line():
    environment = {"STAR_CUDA": "1", "CUDA_HOME": "/nowhere", "PATH": ""}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    # Without what torch itself logs.
    lines = [line for line in result.stderr.splitlines() if "torch/utils/cpp_extension.py" not in line]
    assert lines == ["STAR_CUDA=1: found no nvcc; install the CUDA toolkit or set CUDA_HOME"]


@pytest.mark.parametrize(
    ("built", "capability", "runs"),
    [
        ("sm_80", (8, 0), True),
        ("sm_80", (8, 9), True),  # code runs on later GPUs of its generation
        ("sm_89", (8, 6), False),
        ("sm_80", (9, 0), False),
        ("sm_80 compute_80", (9, 0), True),  # PTX on all later ones
        ("compute_120", (9, 0), False),
        ("sm_90a", (9, 0), True),
        ("sm_100a", (10, 3), False),
        ("sm_100f", (10, 3), True),
        ("sm_100", (12, 0), False),
        ("sm_80 sm_86 sm_89 sm_90 sm_100 sm_120 compute_120", (12, 1), True),
    ],
)
def test_which_gpus_a_build_covers(built, capability, runs):
    assert native.covers(native.architectures(built), capability) is runs
