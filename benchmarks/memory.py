"""Peak memory of a call, measured in a process of its own. Linux: the peak is read from /proc."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CODE = """
import sys
sys.path.insert(0, {folder!r})
import torch
torch.set_num_threads({threads})
import memory, {module}
print(*{module}.{function}(memory.peak, *{arguments!r}))
"""


def peak(call: Callable[[], object]) -> int:
    """Bytes held at the worst moment of a call beyond what was held before it; what it returns is still held."""
    # The kernel's own count of the most pages ever held, reset before the call.
    Path("/proc/self/clear_refs").write_text("5")
    before = _held("VmRSS")
    result = call()  # noqa: F841
    return _held("VmHWM") - before


def _held(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def in_a_process(module: str, function: str, *arguments, threads: int = 1) -> list[int]:
    """function(peak, *arguments) of a benchmark module, in a process whose allocator returns freed blocks at once."""
    allocator = {"MALLOC_MMAP_THRESHOLD_": "16384", "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    folder = os.path.dirname(__file__)
    code = CODE.format(folder=folder, threads=threads, module=module, function=function, arguments=arguments)
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **allocator}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.splitlines()[-1].split()]
