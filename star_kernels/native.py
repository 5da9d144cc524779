"""The compiled extensions, or the reasons why there are none."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

import torch

from star_kernels.ops import OPERATORS
from star_kernels.requirements import OLDEST_TORCH, REBUILD, REBUILD_CUDA

HERE = Path(__file__).resolve().parent


def record() -> Any:
    """The module that setup.py writes: what it built, and why not the rest. None in a source folder."""
    try:
        return importlib.import_module("star_kernels._build")
    except ImportError:
        return None


RECORD = record()


def hidden_package() -> Path | None:
    """The folder of another star_kernels that has compiled operators, which this one without any hides."""
    specs = [finder.find_spec("star_kernels", None) for finder in sys.meta_path]  # those of editable installs too
    specs += [PathFinder.find_spec("star_kernels", [entry]) for entry in sys.path]
    folders = [Path(spec.origin).resolve().parent for spec in specs if spec is not None and spec.origin is not None]
    compiled = (folder for folder in folders if PathFinder.find_spec("star_kernels._C", [str(folder)]) is not None)
    return next((folder for folder in compiled if folder != HERE), None)


def numbers(version: str) -> tuple[int, ...]:
    """2.13.0+cpu as (2, 13)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def is_built(name: str) -> bool:
    return importlib.util.find_spec(f"star_kernels.{name}") is not None


def of_other_sources(module: Any, device: str) -> str | None:
    """The first operator whose kernel for the device is not there, or does not take and give what the schema says."""
    compiled = getattr(module, "SIGNATURES", {})
    entries = [one for operator in OPERATORS.values() for one in (operator, *operator.companions)]
    names = [one.name for one in entries if device in one.native]
    return next((name for name in names if compiled.get(name) != signature(name)), None)


def signature(name: str) -> str:
    """Types of the arguments and results of an operator, in the words of csrc/operators.h."""
    schema = getattr(torch.ops.star, f"{name}_native").default._schema
    takes, gives = (", ".join(str(one.type) for one in some) for some in (schema.arguments, schema.returns))
    return f"{takes} -> {gives}"


def load(name: str, device: str, left_out: str | None, remedy: str) -> tuple[Any, str | None]:
    """The extension of a device, or the reason why there is none and what to do.

    left_out: why setup.py did not build it, if it said so. remedy: how to build it.
    """
    version = str(torch.__version__)
    if not is_built(name):
        if sys.platform != "linux":
            return None, "the compiled operators are for Linux"
        if numbers(version) < OLDEST_TORCH:
            oldest = ".".join(map(str, OLDEST_TORCH))
            return None, f"the compiled operators need torch {oldest} or later, and this is torch {version}"
        return None, f"{left_out or f'nothing was built in {HERE}'}; {remedy}"
    if RECORD is not None and numbers(version) < numbers(RECORD.TORCH):
        return None, f"built for torch {RECORD.TORCH} and later, but this is torch {version}; {remedy}"
    try:
        module = importlib.import_module(f"star_kernels.{name}")
    except ImportError as error:
        text = " ".join(str(error).split())
        return None, f"star_kernels.{name} could not be imported beside torch {version} ({text}); {remedy}"
    if other := of_other_sources(module, device):
        return None, f"star_kernels.{name} was compiled from other sources than these, {other} differs; {remedy}"
    return module, None


_C, REASON = load("_C", "cpu", RECORD and RECORD.CPU, REBUILD)
_cuda, CUDA_REASON = load("_cuda", "cuda", RECORD and RECORD.CUDA, REBUILD_CUDA)
HIDDEN = None if is_built("_C") else hidden_package()
if HIDDEN is not None:
    REASON = (
        f"{HERE} has no compiled operators and hides {HIDDEN}, which has them; "
        "run from another folder, or with `python -P` or PYTHONSAFEPATH=1"
    )
    warnings.warn(f"star_kernels: {REASON}", RuntimeWarning, stacklevel=2)


class Architecture(NamedTuple):
    kind: str  # "sm", a GPU's code, or "compute", PTX that the driver compiles
    capability: tuple[int, int]
    special: str  # "a": this GPU alone, "f": its family alone


def architectures(names: str) -> list[Architecture]:
    """What "sm_80 sm_90a compute_120" stands for."""
    found = re.findall(r"(sm|compute)_(\d+)(\d)([af]?)", names)
    return [Architecture(kind, (int(major), int(minor)), special) for kind, major, minor, special in found]


def covers(built: list[Architecture], capability: tuple[int, int]) -> bool:
    """Whether one of them runs on a GPU: code of its generation, or PTX, and neither newer than the GPU."""
    for kind, least, special in built:
        same_generation = capability[0] == least[0]
        if special == "a":
            fits = capability == least
        else:
            fits = capability >= least and (same_generation or (kind == "compute" and not special))
        if fits:
            return True
    return False


# Read once: torch.compile follows `reason`, but not regular expressions.
BUILT = architectures(_cuda.ARCHITECTURES) if _cuda is not None else []


def reason(device: torch.device) -> str | None:
    """None if the kernels that are compiled for this type of device can run on it, else why not."""
    return REASON if device.type == "cpu" else cuda_reason(device)


def cuda_reason(device: torch.device) -> str | None:
    """None if the CUDA kernels can run on a GPU, else why not."""
    if CUDA_REASON is not None:
        return CUDA_REASON
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "this PyTorch sees no NVIDIA GPU"
    gpu = torch.cuda.get_device_properties(device)
    if not covers(BUILT, (gpu.major, gpu.minor)):
        number = f"{gpu.major}.{gpu.minor}"
        return f"built for {_cuda.ARCHITECTURES}, not for this GPU; reinstall with TORCH_CUDA_ARCH_LIST={number}"
    return None


def build_info() -> dict[str, str]:
    """How the extensions were built: instruction sets compiled and the one in use, GPUs."""
    info: dict[str, str] = {"extension": REASON} if REASON is not None else dict(_C.build_info())
    info["cuda"] = CUDA_REASON or f"{_cuda.ARCHITECTURES}, toolkit {_cuda.TOOLKIT // 1000}.{_cuda.TOOLKIT % 1000 // 10}"
    return info
