"""What the GPU kernels need, from their machine code; with the cost model's predictions it fills docs/gpu.md and more.

python tools/gpu/gpu_static.py            # fills these pages; without nvcc it leaves the CUDA kernels out
python tools/gpu/gpu_static.py --check    # writes nothing and fails where a kernel breaks a rule
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import triton_offline  # before any other kernel: it fixes that Triton compiles

ROOT = Path(__file__).resolve().parents[2]


def fill(builds: list[dict], compiled: list[dict]) -> None:
    """Write the tables of the pages."""
    import cuda_offline
    import gpu_page

    cuda = gpu_page.cuda_table(compiled, cuda_offline.is_wide) if compiled else "Not built: there is no nvcc."
    texts = {"Triton kernels": gpu_page.triton_table(builds, triton_offline.triton.__version__), "CUDA kernels": cuda}
    gpu_page.fill(texts | gpu_page.predictions())


def main() -> int:
    builds, compiled = list(triton_offline.builds()), []
    wrong = [(build, what) for build in builds if (what := triton_offline.problems(build))]
    if shutil.which("nvcc") is not None:
        import cuda_offline

        compiled = cuda_offline.kernels(cuda_offline.build(ROOT / "build" / "cuda_offline"))
        wrong += [(kernel, what) for kernel in compiled if (what := cuda_offline.problems(kernel))]
    for build, what in wrong:
        print(f"{build}: {'; '.join(what)}", file=sys.stderr)
    if "--check" in sys.argv:
        print(f"static: {len(builds)} Triton builds, {len(compiled)} CUDA kernels, {len(wrong)} with problems")
    else:
        fill(builds, compiled)
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
