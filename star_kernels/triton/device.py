"""What the launchers ask about a GPU, each answered once."""

from __future__ import annotations

from functools import cache

import torch


@cache
def processors(device: torch.device) -> int:
    """Of a GPU; the interpreter is one."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@cache
def architecture(device: torch.device) -> str:
    """ "sm_90", "gfx942", or "cpu" for the interpreter."""
    if device.type != "cuda":
        return "cpu"
    gpu = torch.cuda.get_device_properties(device)
    return gpu.gcnArchName.split(":")[0] if torch.version.hip else f"sm_{gpu.major}{gpu.minor}"


def starts_early(architecture: str) -> bool:
    """Whether a launch can start before the one in front of it has ended and wait inside (NVIDIA's griddepcontrol)."""
    return architecture.startswith("sm_") and int(architecture[3:]) >= 90
