"""What the CUDA kernels need on GPUs that are not here, read from their machine code with the tools in Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import triton

from cost_model import WARP, constant
from occupancy import PROCESSORS, occupancy

ROOT = Path(__file__).resolve().parents[2]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def build(folder: Path, gpus: str | None = None) -> Path:
    """star_kernels._cuda as `STAR_CUDA=1 pip install .` builds it, for a TORCH_CUDA_ARCH_LIST or a release's GPUs."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
    environment |= {} if gpus is None else {"TORCH_CUDA_ARCH_LIST": gpus}
    command = [sys.executable, "setup.py", "build_ext", "--build-temp", folder / "temp", "--build-lib", folder]
    result = subprocess.run(
        command, cwd=ROOT, env=environment | {"STAR_BUILD": "none", "STAR_CUDA": "1"}, capture_output=True, text=True
    )
    if result.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not build:\n{result.stdout[-4000:]}{result.stderr[-4000:]}")
    (library,) = (folder / "star_kernels").glob("_cuda*.so")
    return library


def read(*options: str, library: Path) -> str:
    return subprocess.run([CUOBJDUMP, *options, library], capture_output=True, text=True, check=True).stdout


def plain(name: str) -> str:
    """policy_loss_sums_kernel<float, float, float, 4> from a mangled name."""
    name = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(.*|^void |\w+::", "", name)


def warps(kernel: str) -> int:
    """Of a block, as the launchers start it."""
    if "finish" in kernel:
        return constant("latents.cuh", "FINISH_WARPS")
    threads = {
        "policy_loss": constant("latents.cuh", "LOSS_THREADS"),
        "nft_loss": constant("latents.cuh", "LOSS_THREADS"),
        "gaussian_step": constant("gaussian_step.cuh", "THREADS"),
        "allocate": constant("allocate.cuh", "ALLOCATE_THREADS"),
    }
    return next(count for name, count in threads.items() if kernel.startswith(name)) // WARP


def kernels(library: Path) -> list[dict]:
    """Of each kernel and architecture: registers, stack, local and shared memory in bytes, accesses in vectors."""
    found: dict[tuple[str, str], dict] = {}
    architecture = ""
    for line in read("--dump-resource-usage", library=library).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function (\w+):", line):
            name = match[1]
        elif match := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            sizes = dict(zip(("registers", "stack", "shared", "local"), map(int, match.groups()), strict=True))
            found[architecture, name] = {"architecture": architecture, **sizes}
    code: dict[tuple[str, str], list[str]] = {}
    for line in read("-sass", library=library).splitlines():
        if match := re.search(r"arch = (sm_\w+)", line):
            architecture = match[1]
        elif match := re.search(r"Function : (\w+)", line):
            code[architecture, match[1]] = lines = []
        elif re.match(r"\s+/\*[0-9a-f]{4,}\*/", line):
            lines.append(line)
    names = {name: plain(name) for _, name in found}
    for (architecture, name), kernel in found.items():
        text = "\n".join(code[architecture, name])
        accesses = re.findall(r"\b(LDG|STG)((?:\.\w+)*)", text)
        kernel["kernel"] = names[name]
        kernel["spills"] = len(re.findall(r"\b(?:LDL|STL)\b", text))
        kernel["atomics"] = len(re.findall(r"\b(?:ATOM\w*|RED)\b", text))
        for name, wanted in (("vector_loads", "LDG"), ("vector_stores", "STG")):
            kernel[name] = sum(kind == wanted and re.search(r"\.(64|128)", how) is not None for kind, how in accesses)
        kernel["accesses_2"] = sum(".U16" in how or ".U8" in how for _, how in accesses)
        kernel["occupancy"] = occupancy(architecture, kernel["registers"], kernel["shared"], warps(kernel["kernel"]))
    return list(found.values())


def is_wide(kernel: dict) -> bool:
    """Whether it is the form for latents that can be read in vectors, of 16 bytes in the type of the arithmetic."""
    return re.search(r", (2|4)(, \w+)?>", kernel["kernel"]) is not None


def problems(kernel: dict) -> list[str]:
    """What is wrong with a kernel's machine code."""
    found = []
    if kernel["stack"] or kernel["local"] or kernel["spills"]:
        found.append("spills or has local memory")
    if kernel["atomics"]:
        found.append("has atomics")
    # What a block may have without asking for more.
    if kernel["shared"] > min(48 * 1024, PROCESSORS[kernel["architecture"]].block_shared):
        found.append("needs more shared memory than a block has")
    if not kernel["occupancy"]:
        found.append("does not fit a processor")
    # Every tensor of latents is read and written in vectors; only what there is one of per sample or location is not.
    if is_wide(kernel) and (kernel["accesses_2"] or kernel["vector_loads"] < 3):
        found.append("reads latents in small accesses")
    if is_wide(kernel) and "sums" not in kernel["kernel"] and kernel["vector_stores"] < 1:
        found.append("writes latents in small accesses")
    return found
