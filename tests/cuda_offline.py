"""What the CUDA kernels need on GPUs that are not here, read from their machine code with the tools in Triton."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import triton

ROOT = Path(__file__).resolve().parents[1]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def build(folder: Path) -> Path:
    """star_kernels._cuda for every GPU of a release, as `STAR_CUDA=1 pip install .` builds it."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_CUDA_ARCH_LIST"}
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
    """policy_loss_ratios<float, float, float, 4> from a mangled name."""
    name = subprocess.run(["c++filt", name], capture_output=True, text=True, check=True).stdout.strip()
    return re.sub(r"\(.*|^void |\w+::", "", name)


def kernels(library: Path) -> list[dict]:
    """Of each kernel and architecture: registers, bytes of stack, local and shared memory, global accesses by width."""
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
        kernel["loads_16"] = sum(kind == "LDG" and ".128" in how for kind, how in accesses)
        kernel["stores_16"] = sum(kind == "STG" and ".128" in how for kind, how in accesses)
        kernel["accesses_2"] = sum(".U16" in how or ".U8" in how for _, how in accesses)
    return list(found.values())
