"""Builds star_kernels._C (the CPU kernels, each once per instruction set) and star_kernels._cuda (the GPU kernels).

The build takes the torch of the environment that it installs into, also where pip isolates it, and never fetches one.
star_kernels/_build.py tells the package what was built, and why the rest was left out.

STAR_BUILD=auto (default) builds the CPU kernels on Linux where there are a torch and a C++ compiler, cpu demands them,
none leaves them out (plain PyTorch remains). CXX and CXXFLAGS say how to compile, MAX_JOBS limits parallel compilers.
STAR_CUDA=auto (default) builds the GPU kernels where torch is a CUDA build and nvcc is found, 1 demands them (torch may
be a CPU build: the libtorch stable ABI makes them the same), 0 leaves them out. CUDA_HOME says where the toolkit is,
TORCH_CUDA_ARCH_LIST for which GPUs to compile.
STAR_SANITIZE=1 builds the CPU kernels with AddressSanitizer and UndefinedBehaviorSanitizer; see `make sanitize`.
"""

import importlib.util
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
import tomllib
from importlib.machinery import PathFinder
from pathlib import Path

import setuptools
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
OLDEST = runpy.run_path(str(ROOT / "star_kernels" / "requirements.py"))["OLDEST_TORCH"]
NEWEST = (2, 13)  # torch: all that the sources ask for
BUILD = os.environ.get("STAR_BUILD", "auto")
if BUILD not in ("auto", "cpu", "none"):
    sys.exit(f"STAR_BUILD: got {BUILD!r}, expected 'auto', 'cpu' or 'none'")
CUDA = os.environ.get("STAR_CUDA", "auto")
if CUDA not in ("auto", "1", "0"):
    sys.exit(f"STAR_CUDA: got {CUDA!r}, expected 'auto', '1' or '0'")


def torch_folder():
    """Where torch is, or None. It is not imported: an isolated build sees nothing that torch itself needs."""
    places = site.getsitepackages()
    if sys.prefix == sys.base_prefix:  # else not those of the user, which a virtual environment does not see
        places.append(site.getusersitepackages())
    spec = importlib.util.find_spec("torch") or PathFinder.find_spec("torch", places)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


TORCH_FOLDER = torch_folder()
TORCH_VERSION = runpy.run_path(str(TORCH_FOLDER / "version.py")) if TORCH_FOLDER else {}
INSTALLED = tuple(map(int, TORCH_VERSION["__version__"].split(".")[:2])) if TORCH_FOLDER else NEWEST
# The build runs beside this torch and every later one.
TORCH = min(INSTALLED, NEWEST)
# What is asked of libtorch's stable ABI.
TARGET = f"-DTORCH_TARGET_VERSION=0x{TORCH[0]:02x}{TORCH[1]:02x}000000000000"


def compiler():
    """The words of the C++ compiler's command, or None if there is none."""
    if os.environ.get("CXX"):
        words = shlex.split(os.environ["CXX"])
        return words if shutil.which(words[0]) else None
    return next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


CXX = compiler()
CXXFLAGS = shlex.split(os.environ.get("CXXFLAGS", ""))
# No contraction into fused multiply-adds: the mean of a step must have the bits that gaussian_step stored, or the
# on-policy ratio would not be exactly 1. It costs nothing in loops that wait for memory.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-DNDEBUG",
    "-fPIC",
    "-fopenmp-simd",  # the threads are torch's
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    TARGET,
    *CXXFLAGS,
]
SANITIZE = ["-fsanitize=address,undefined"] if os.environ.get("STAR_SANITIZE") == "1" else []
if SANITIZE:  # every report ends the process
    FLAGS += [*SANITIZE, "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-O1", "-g"]
INSTRUCTION_SETS = {"baseline": []}
if platform.machine() in ("x86_64", "AMD64"):
    INSTRUCTION_SETS["avx2"] = ["-mavx2", "-mfma", "-mf16c"]
    INSTRUCTION_SETS["avx512"] = [
        *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mprefer-vector-width=512")
    ]

# What makes a wheel of any build run on every glibc from 2.28 on.
PORTABLE, PORTABLE_MATH = ROOT / "csrc" / "portable.cpp", ["-include", str(ROOT / "csrc" / "portable.h")]

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


def numbers(version):
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def missing_requirements():
    """Those of [build-system] in pyproject.toml that are not here; without isolation nobody else looks."""
    found = {"setuptools": setuptools.__version__}
    if importlib.util.find_spec("pybind11"):
        import pybind11

        found["pybind11"] = pybind11.__version__
    if shutil.which("ninja"):
        found["ninja"] = "1"
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
    return [
        requirement
        for requirement in wanted
        for name, _, least in [requirement.partition(">=")]
        if name not in found or numbers(found[name]) < numbers(least)
    ]


def demand(requirements):
    """End with the one line that installs what is missing, if anything is."""
    if requirements:
        names = ", ".join(requirements)
        sys.exit(
            f"star-kernels: to build it here needs {names}: pip install {shlex.join(requirements)} "
            "(STAR_BUILD=none installs it without compiled operators)"
        )


def demand_setuptools():
    """An older one would end in riddles about pyproject.toml. Nothing is isolated then: all is named at once."""
    missing = missing_requirements()
    if old := [requirement for requirement in missing if requirement.startswith("setuptools")]:
        demand(old if BUILD == "none" else [*missing, *([] if TORCH_FOLDER else ["torch"])])


def too_old():
    """Why this torch has no compiled operators, or None."""
    if TORCH_FOLDER is not None and INSTALLED < OLDEST:
        return f"built beside torch {TORCH_VERSION['__version__']}, the compiled operators need {OLDEST[0]}.{OLDEST[1]}"
    return None


def reason_without_cpu():
    """None if the CPU kernels are to be built, else why they are not."""
    if BUILD == "none":
        return "left out by STAR_BUILD=none"
    reason = None
    if sys.platform != "linux":
        reason = f"the compiled operators are for Linux, not for {platform.system()}"
    elif TORCH_FOLDER is None:
        # Only an isolated environment has no pip: there it is nobody's fault.
        if BUILD == "cpu" or importlib.util.find_spec("pip"):
            demand([*missing_requirements(), "torch"])
        reason = "torch was not installed when it was built"
    elif too_old():
        reason = too_old()
    elif CXX is None:
        reason = f"no C++ compiler was found when it was built ({os.environ.get('CXX') or 'g++, c++, clang++'})"
    if reason and BUILD == "cpu":
        sys.exit(f"STAR_BUILD=cpu: {reason}")
    return reason


def reason_without_cuda(home):
    """None if the GPU kernels are to be built, else why they are not."""
    if CUDA == "0":
        return "left out by STAR_CUDA=0"
    if CUDA == "1":
        if home is None:
            sys.exit("STAR_CUDA=1: found no nvcc; install the CUDA toolkit or set CUDA_HOME")
        if TORCH_FOLDER is None or CXX is None:
            sys.exit(f"STAR_CUDA=1: found no {'torch' if CXX else 'C++ compiler'}; install one")
        if too_old():
            sys.exit(f"STAR_CUDA=1: {too_old()}")
        return None
    if BUILD == "none":
        return "left out by STAR_BUILD=none"
    if TORCH_FOLDER is None:
        return "torch was not installed when it was built"
    if too_old():
        return too_old()
    if TORCH_VERSION["cuda"] is None:
        return "built beside a torch without CUDA"
    if home is None:
        return "no nvcc was found when it was built"
    return None if CXX else "no C++ compiler was found when it was built"


def escaped(path):
    """A path in a ninja file."""
    return re.sub(r"([$ :])", r"$\1", str(path))


def run_ninja(folder, name, builds):
    """Run the builds (target, source or sources, command) that something has changed for."""
    rules = ["rule run", "  command = $do -MMD -MF $out.d", "  depfile = $out.d", "  deps = gcc"]
    rules += ["rule link", "  command = $do"]
    for target, source, command in builds:
        rule, inputs = ("link", source) if isinstance(source, list) else ("run", [source])
        rules += [f"build {escaped(target)}: {rule} {' '.join(map(escaped, inputs))}"]
        rules += [f"  do = {shlex.join(map(str, command)).replace('$', '$$')}"]
    (folder / name).write_text("\n".join(rules) + "\n")
    jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
    if subprocess.run(["ninja", "-f", folder / name, *jobs], cwd=folder).returncode:
        sys.exit("star-kernels: a compiler failed; what it said is above")


def cpu_builds(folder, library):
    import pybind11

    python = [sysconfig.get_path("include"), pybind11.get_include()]
    includes = [f"-I{path}" for path in (TORCH_FOLDER / "include", ROOT / "csrc")]
    macros = [f"-DSTAR_HAS_{name.upper()}" for name in INSTRUCTION_SETS]
    builds = []
    for source in sorted((ROOT / "csrc" / "cpu").glob("*_kernel.cpp")):
        for name, flags in INSTRUCTION_SETS.items():
            command = [*CXX, *FLAGS, *flags, f"-DSTAR_ISA={name}", *macros, *includes, *PORTABLE_MATH]
            builds.append((folder / f"{source.stem}.{name}.o", source, command))
    for source in [ROOT / "csrc" / "bindings.cpp", PORTABLE, *sorted((ROOT / "csrc" / "cpu").glob("*_op.cpp"))]:
        # pybind11's own headers first: those in torch 2.11 refuse what asks for the stable ABI.
        command = [*CXX, *FLAGS, *macros, *(f"-I{path}" for path in python), *includes, *PORTABLE_MATH]
        builds.append((folder / f"{source.stem}.o", source, command))
    builds = [(target, source, [*command, "-c", source, "-o", target]) for target, source, command in builds]
    objects = [target for target, _, _ in builds]
    link = [*CXX, "-shared", *SANITIZE, *objects, "-o", library, f"-L{TORCH_FOLDER / 'lib'}", "-ltorch_cpu"]
    return [*builds, (library, objects, [*link, *shlex.split(os.environ.get("LDFLAGS", ""))])]


def host_compiler(folder):
    """The C++ compiler as one file: nvcc takes no command of several words."""
    if len(CXX) == 1:
        return CXX[0]
    script = folder / "host-compiler"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(CXX)} "$@"\n')
    script.chmod(0o755)
    return script


def cuda_builds(folder, library, home):
    wanted = architectures()
    includes = [f"-I{path}" for path in (TORCH_FOLDER / "include", sysconfig.get_path("include"), ROOT / "csrc")]
    codes = [f"-gencode=arch=compute_{name.split('_')[1]},code={name}" for name in wanted]
    threads = os.environ.get("MAX_JOBS", "0")
    nvcc = [
        home / "bin" / "nvcc",
        *NVCC_FLAGS,
        f"-ccbin={host_compiler(folder)}",
        f"--threads={threads}",
        *codes,
        TARGET,
    ]
    builds = []
    for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")):
        target = folder / f"{source.stem}.cuda.o"
        builds.append((target, source, [*nvcc, "-DUSE_CUDA", *includes, "-c", source, "-o", target]))
    module, source = folder / "cuda_module.o", ROOT / "csrc" / "cuda" / "module.cpp"
    tell = [f'-DSTAR_CUDA_ARCHITECTURES="{" ".join(wanted)}"', f"-I{home}/include"]
    plain = [*CXX, "-std=c++20", "-O1", "-fPIC", "-fvisibility=hidden", *CXXFLAGS]
    builds.append((module, source, [*plain, *tell, *includes, "-c", source, "-o", module]))
    portable = folder / "cuda_portable.o"
    builds.append((portable, PORTABLE, [*plain, "-c", PORTABLE, "-o", portable]))
    # Before 2.13 the current stream is known to libtorch_cuda alone.
    torch_libraries = ["-ltorch_cpu"] if TORCH >= (2, 13) else ["-ltorch_cpu", "-ltorch_cuda"]
    libraries = [f"-L{TORCH_FOLDER / 'lib'}", *torch_libraries, f"-L{home}/lib64", "-lcudart_static"]
    objects = [target for target, _, _ in builds]
    link = [*CXX, "-shared", *objects, "-o", library, *libraries, "-lrt", "-ldl", "-lpthread"]
    return [*builds, (library, objects, link)]


def commands(home, reasons):
    """The setuptools commands that compile, and that tell the package what was compiled."""

    def write_record(folder):
        values = {"TORCH": ".".join(map(str, TORCH)), **reasons}
        lines = ["# By setup.py: the oldest torch that the compiled modules run beside, and why one was left out."]
        lines += [f"{name}: str | None = {value!r}" for name, value in values.items()]
        (folder / "star_kernels" / "_build.py").write_text("\n".join(lines) + "\n")

    class BuildKernels(build_ext):
        def run(self):
            names = {ext.name for ext in self.extensions}
            for module in Path(self.build_lib).glob("star_kernels/*.so"):  # of an earlier build in the same folder
                if f"star_kernels.{module.name.split('.')[0]}" not in names:
                    module.unlink()
            inplace = self.inplace  # which setuptools changes on its way
            super().run()
            if inplace:
                write_record(ROOT)

        def build_extension(self, ext):
            folder = Path(self.build_temp).absolute()
            library = Path(self.get_ext_fullpath(ext.name)).absolute()
            folder.mkdir(parents=True, exist_ok=True)
            library.parent.mkdir(parents=True, exist_ok=True)
            if ext.name == "star_kernels._cuda":
                run_ninja(folder, "cuda.ninja", cuda_builds(folder, library, home))
            else:
                run_ninja(folder, "cpu.ninja", cpu_builds(folder, library))

    class BuildPython(build_py):
        def run(self):
            super().run()
            write_record(ROOT if self.editable_mode else Path(self.build_lib))

    return {"build_ext": BuildKernels, "build_py": BuildPython}


def main():
    # Build tools that are installed beside this Python need not be on the path.
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    demand_setuptools()
    home = cuda_home()
    reasons = {"CPU": reason_without_cpu(), "CUDA": reason_without_cuda(home)}
    modules = [name for name, key in (("star_kernels._C", "CPU"), ("star_kernels._cuda", "CUDA")) if not reasons[key]]
    if modules:
        demand(missing_requirements())
    for key, reason in reasons.items():
        if reason:
            print(f"star-kernels: no compiled operators for {key}: {reason}")
    # Depends, so that a changed source is compiled again.
    depends = [str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").rglob("*")) if path.is_file()]
    setup(
        ext_modules=[Extension(name, [], depends=depends) for name in modules],
        cmdclass=commands(home, reasons),
    )


main()
