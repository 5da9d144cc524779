"""The CUDA kernels and their launchers, compiled as plain C++ and registered as further implementations of operators.

`star::NAME_cuda_ORDER` for ORDER in ORDERS runs the threads of a block in that order. They are for tests alone.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from torch.utils import cpp_extension

from star_kernels import implementations
from star_kernels.ops import OPERATORS

ORDERS = ("forward", "reverse", "shuffled")
LAUNCHERS = tuple(name for name, operator in OPERATORS.items() if "cuda" in operator.native)

ROOT = Path(__file__).resolve().parents[2]
# The kernels see bytes as vectors of other types, as GPUs do; products are not contracted, as in every other build.
FLAGS = ["-std=c++20", "-O2", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
FLAGS += ["-Wno-unknown-pragmas", "-DCUDA_ON_HOST", "-DTORCH_TARGET_VERSION=0x020d000000000000"]


SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g")


def has_stable_abi() -> bool:
    """Whether torch's headers have all that the kernels' fronts include."""
    wanted = ("torch/csrc/stable/library.h", "torch/csrc/stable/device.h", "torch/headeronly/core/ScalarType.h")
    return all(any((Path(path) / name).exists() for path in cpp_extension.include_paths()) for name in wanted)


def build(folder: Path, flags: tuple[str, ...] = ()) -> Path:
    """The library of all launchers, in the folder; compiled again only where a source has changed."""
    folder.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{ROOT / 'csrc'}", f"-I{Path(__file__).parent}"]
    includes += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    compiler = " ".join(map(str, [os.environ.get("CXX", "g++"), *FLAGS, *flags]))
    library = folder / "cuda_on_host.so"
    objects = [folder / f"{name}.o" for name in LAUNCHERS]
    text = f"""
rule compile
  command = {compiler} {" ".join(includes)} -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {compiler} -shared $in -o $out -L{cpp_extension.library_paths()[0]} -ltorch_cpu
build {library}: link {" ".join(map(str, objects))}
"""
    for name, target in zip(LAUNCHERS, objects, strict=True):
        text += f"build {target}: compile {ROOT / 'csrc' / 'cuda' / name}.cu\n"
    ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pytest-xdist: every worker asks for it
        (folder / "build.ninja").write_text(text)
        result = subprocess.run([ninja, "-C", folder], capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"the CUDA kernels do not compile for the CPU:\n{result.stdout}{result.stderr}")
    return library


def load(library: Path) -> None:
    """Define the operators and load their kernels."""
    for name in LAUNCHERS:
        for order in ORDERS:
            for operator in (OPERATORS[name], OPERATORS[name].gradient):
                if operator is not None:
                    operator.define(f"cuda_{order}")
    torch.ops.load_library(library)


def and_runnable(operator: str) -> list[str]:
    """Names for `impl`: what can run here, and the CUDA kernels in every order, once loaded."""
    here = [name for name, reason in implementations(operator).items() if reason is None]
    return here + [f"cuda_{order}" for order in ORDERS if operator in LAUNCHERS]
