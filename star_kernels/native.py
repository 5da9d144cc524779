"""The compiled extensions, or the reasons why there are none."""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

try:
    from star_kernels import _C

    REASON: str | None = None
except ImportError as error:
    _C = None
    REASON = f"star_kernels._C could not be imported ({error}); reinstall with a C++ compiler"

try:
    import star_kernels._cuda as _cuda

    CUDA_REASON: str | None = None
except ModuleNotFoundError:
    _cuda = None
    CUDA_REASON = "built without GPU kernels; reinstall with nvcc and STAR_CUDA=1"
except ImportError as error:
    _cuda = None
    CUDA_REASON = f"star_kernels._cuda could not be imported ({error}); reinstall with nvcc and STAR_CUDA=1"


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
    info = dict(_C.build_info()) if _C is not None else {"extension": REASON}
    info["cuda"] = CUDA_REASON or f"{_cuda.ARCHITECTURES}, toolkit {_cuda.TOOLKIT // 1000}.{_cuda.TOOLKIT % 1000 // 10}"
    return info
