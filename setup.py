"""Builds star_kernels._C (the CPU kernels, each once per instruction set) and star_kernels._cuda (the GPU kernels).

STAR_BUILD=none leaves the CPU kernels out (plain PyTorch remains). MAX_JOBS limits parallel compilers.
STAR_CUDA=auto (default) builds the GPU kernels where torch is a CUDA build and nvcc is found, 1 demands them (torch may
be a CPU build: the libtorch stable ABI makes them the same), 0 leaves them out. CUDA_HOME says where the toolkit is,
TORCH_CUDA_ARCH_LIST for which GPUs to compile.
STAR_SANITIZE=1 builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize`.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
BUILD = os.environ.get("STAR_BUILD", "cpu")
if BUILD not in ("cpu", "none"):
    sys.exit(f"STAR_BUILD: got {BUILD!r}, expected 'cpu' or 'none'")


def oldest_torch():
    """The build runs beside this torch and every later one: 2.13, or what is installed if that is older."""
    try:
        installed = tuple(map(int, version("torch").split(".")[:2]))
    except PackageNotFoundError:
        return 2, 13
    return min(installed, (2, 13))


TORCH = oldest_torch()
# What is asked of libtorch's stable ABI.
TARGET = f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"
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
    "-g0",  # Python's own flags may ask for symbols, seven times the code
    TARGET,
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

CUDA = os.environ.get("STAR_CUDA", "auto")
if CUDA not in ("auto", "1", "0"):
    sys.exit(f"STAR_CUDA: got {CUDA!r}, expected 'auto', '1' or '0'")
# Every GPU since Ampere, and a form that the driver compiles for later ones.
ARCHITECTURES = os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0;8.6;8.9;9.0;10.0;12.0+PTX"
NVCC_FLAGS = ["-std=c++20", "-O3", "-fmad=false", "--expt-relaxed-constexpr", "-Xcompiler=-fPIC,-fvisibility=hidden"]


def cuda_home():
    """The CUDA toolkit's folder, or None."""
    nvcc = shutil.which("nvcc")
    places = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if not any(places):
        places = [nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    # An nvcc on the path may be a script that calls the one of a toolkit elsewhere.
    parts = ("bin/nvcc", "include/cuda_runtime_api.h")
    return next((Path(place) for place in places if place and all((Path(place) / p).exists() for p in parts)), None)


def architectures():
    """TORCH_CUDA_ARCH_LIST as what is compiled: sm_80 for a GPU's code, compute_80 for PTX."""
    out = []
    for name in re.split(r"[;, ]+", ARCHITECTURES.strip()):
        match = re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", name)
        if not match:
            sys.exit(f"TORCH_CUDA_ARCH_LIST: got {name!r}, expected numbers like 9.0 or 12.0+PTX")
        number = "".join(match.group(1, 2, 3))
        out += [f"sm_{number}", *([f"compute_{number}"] if match[4] else [])]
    return out


def wanted_cuda_home():
    """The toolkit to build the GPU kernels with, or None if they are not to be built."""
    if CUDA == "0":
        return None
    home = cuda_home()
    if CUDA == "1":
        return home or sys.exit("STAR_CUDA=1: found no nvcc; install the CUDA toolkit or set CUDA_HOME")
    import torch

    if torch.version.cuda is None:
        print("star_kernels: no GPU kernels, because this torch has no CUDA; STAR_CUDA=1 builds them all the same")
        return None
    if home is None:
        print("star_kernels: no GPU kernels, because there is no nvcc; set CUDA_HOME to the CUDA toolkit")
    return home


def extension_arguments():
    """Extension modules and build command; torch is imported only when there is something to build."""
    if BUILD == "none" and CUDA != "1":
        return {}
    import pybind11
    from setuptools import Extension
    from torch.utils import cpp_extension

    home = wanted_cuda_home()
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []

    def run_ninja(folder, name, builds):
        """Run the builds (target, source or sources, command) that something has changed for."""
        rules = ["rule run", "  command = $do -MMD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
        rules += ["rule link", "  command = $do"]
        for target, source, command in builds:
            rule, inputs = (
                ("run", str(source)) if not isinstance(source, list) else ("link", " ".join(map(str, source)))
            )
            rules += [f"build {target}: {rule} {inputs}", f"  do = {' '.join(map(str, command))}"]
        (folder / name).write_text("\n".join(rules) + "\n")
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
        subprocess.run([ninja, "-f", folder / name, *jobs], check=True, cwd=folder)

    class BuildKernels(cpp_extension.BuildExtension):
        """Compiles the kernels per instruction set with ninja, then lets torch compile the operators and link."""

        def build_extension(self, ext):
            folder = Path(self.build_temp).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            if ext.name == "star_kernels._cuda":
                self.build_cuda(ext, folder)
                return
            macros = [f"-DSTAR_HAS_{name.upper()}" for name in INSTRUCTION_SETS]
            includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), ROOT / "csrc")]
            builds = []
            for source in sorted((ROOT / "csrc" / "cpu").glob("*_kernel.cpp")):
                for name, flags in INSTRUCTION_SETS.items():
                    target = folder / f"{source.stem}.{name}.o"
                    compiler = [os.environ.get("CXX", "g++"), *FLAGS, *flags, f"-DSTAR_ISA={name}", *macros, *includes]
                    builds.append((target, source, [*compiler, "-c", source, "-o", target]))
            run_ninja(folder, "kernels.ninja", builds)
            # As depends too, so that a changed kernel is linked again.
            ext.extra_objects = ext.depends = [str(target) for target, _, _ in builds]
            super().build_extension(ext)

        def build_cuda(self, ext, folder):
            """Without torch's build rules, which want a CUDA torch and would link it."""
            wanted = architectures()
            library = Path(self.get_ext_fullpath(ext.name)).absolute()
            library.parent.mkdir(parents=True, exist_ok=True)
            compiler = os.environ.get("CXX", "g++")
            includes = [f"-I{path}" for path in (*cpp_extension.include_paths(), *self.include_dirs, ROOT / "csrc")]
            codes = [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in wanted]
            threads = os.environ.get("MAX_JOBS", "0")
            nvcc = [home / "bin" / "nvcc", *NVCC_FLAGS, f"-ccbin={compiler}", f"--threads={threads}", *codes, TARGET]
            builds = []
            for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
                target = folder / f"{source.stem}.cuda.o"
                builds.append((target, source, [*nvcc, "-DUSE_CUDA", *includes, "-c", source, "-o", target]))
            module, source = folder / "cuda_module.o", ROOT / "csrc" / "cuda" / "module.cpp"
            tell = [f"-DSTAR_CUDA_ARCHITECTURES='\"{' '.join(wanted)}\"'", f"-I{home}/include"]
            builds.append((module, source, [compiler, "-O1", "-fPIC", *tell, *includes, "-c", source, "-o", module]))
            # Before 2.13 the current stream is known to libtorch_cuda alone.
            torch_libraries = ["-ltorch_cpu"] if TORCH >= (2, 13) else ["-ltorch_cpu", "-ltorch_cuda"]
            libraries = [f"-L{cpp_extension.library_paths()[0]}", *torch_libraries]
            libraries += [f"-L{home}/lib64", "-lcudart_static"]
            objects = [target for target, _, _ in builds]
            link = [compiler, "-shared", *objects, "-o", library, *libraries, "-lrt", "-ldl", "-lpthread"]
            run_ninja(folder, "cuda.ninja", [*builds, (library, objects, link)])

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
    modules = [module] if BUILD == "cpu" else []
    if home is not None:
        modules.append(Extension("star_kernels._cuda", [], depends=[str(path) for path in ROOT.glob("csrc/cuda/*")]))
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildKernels}}


setup(**extension_arguments())
