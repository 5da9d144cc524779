"""Builds star_kernels._C: every kernel file under csrc/cpu once per instruction set, and one pybind11 module.

STAR_BUILD=none leaves the extension out (plain PyTorch implementations remain). MAX_JOBS limits parallel compilers.
STAR_SANITIZE=1 builds with AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize`.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
BUILD = os.environ.get("STAR_BUILD", "cpu")
if BUILD not in ("cpu", "none"):
    sys.exit(f"STAR_BUILD: got {BUILD!r}, expected 'cpu' or 'none'")

# No contraction into fused multiply-adds: the mean of a step must have the bits that gaussian_step stored, or the
# on-policy ratio would not be exactly 1. It costs nothing in loops that wait for memory.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fopenmp",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
SANITIZE = ["-fsanitize=address,undefined"] if os.environ.get("STAR_SANITIZE") == "1" else []
if SANITIZE:
    # Python's own flags define signed overflow; here it is to be reported. Every report ends the process.
    FLAGS += [*SANITIZE, "-fno-sanitize-recover=all", "-fno-wrapv", "-fno-omit-frame-pointer", "-O1", "-g"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512")
    ]


def extension_arguments():
    """Extension modules and build command; torch is imported only when there is something to build."""
    if BUILD == "none":
        return {}
    import pybind11
    from torch.utils import cpp_extension

    class BuildKernels(cpp_extension.BuildExtension):
        """Compiles the kernels per instruction set with ninja, then lets torch compile the operators and link."""

        def build_extension(self, ext):
            folder = Path(self.build_temp).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            macros = [f"-DSTAR_HAS_{name.upper()}" for name in INSTRUCTION_SETS]
            includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), ROOT / "csrc")]
            rules = ["rule cc", "  command = $compile -MMD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
            objects = []
            for source in sorted((ROOT / "csrc" / "cpu").glob("*_kernel.cpp")):
                for name, flags in INSTRUCTION_SETS.items():
                    target = folder / f"{source.stem}.{name}.o"
                    compiler = [os.environ.get("CXX", "g++"), *FLAGS, *flags, f"-DSTAR_ISA={name}", *macros, *includes]
                    rules.append(f"build {target}: cc {source}")
                    rules.append(f"  compile = {' '.join(map(str, [*compiler, '-c', source, '-o', target]))}")
                    objects.append(str(target))
            (folder / "kernels.ninja").write_text("\n".join(rules) + "\n")
            jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
            ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
            subprocess.run([ninja, "-f", folder / "kernels.ninja", *jobs], check=True, cwd=folder)
            ext.extra_objects = ext.depends = objects  # as depends, so that a changed kernel is linked again
            super().build_extension(ext)

    sources = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("**/*_op.cpp"))]
    macros = [(f"STAR_HAS_{name.upper()}", None) for name in INSTRUCTION_SETS]
    module = cpp_extension.CppExtension(
        "star_kernels._C",
        ["csrc/bindings.cpp", *sources],
        include_dirs=[str(ROOT / "csrc"), pybind11.get_include()],
        define_macros=macros,
        extra_compile_args=FLAGS,
        extra_link_args=SANITIZE,
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildKernels}}


setup(**extension_arguments())
