"""The machine that measures: its name, and what it can do at best."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


def name() -> str:
    """The processor's model, its cores and the threads used: by this past results are told apart."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"


def cache_bytes() -> int:
    """Of the largest cache; 32 MiB where the machine does not say."""
    sizes = [path.read_text().strip() for path in CACHES.glob("index*/size")]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes), default=32 * 2**20)


def fastest(call: Callable[[], object], times: int = 7) -> float:
    """Seconds of the best of some calls."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return min(found)


def copy_rate() -> float:
    """Bytes a second, read and written, of copying four times what the caches hold."""
    source = torch.ones(4 * cache_bytes() // 4)
    target = torch.empty_like(source)
    return 2 * source.nbytes / fastest(lambda: target.copy_(source))


def product_rate(size: int = 2048) -> float:
    """FLOPs a second of a float32 product of square matrices."""
    matrix = torch.ones(size, size)
    return 2 * size**3 / fastest(lambda: matrix @ matrix)
