"""setup.py: what is missing is named on one line, nothing is guessed, and names with spaces are names."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def clone(folder: Path) -> Path:
    """What is built, in another folder."""
    folder.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, folder)
    for name in ("csrc", "star_kernels"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "_build.py")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    (folder / "python").symlink_to(ROOT / "python")
    return folder


def build(folder: Path, before: str = "", command: tuple[str, ...] = ("--version",), **environment: str):
    """Run setup.py after some Python, without the tester's settings."""
    code = f"import os, runpy, sys; sys.argv = ['setup.py', *{command!r}]\n{before}\n"
    code += "runpy.run_path('setup.py', run_name='__main__')"
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("STAR_", "CXX", "CUDA", "TORCH_"))
    }
    return subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=kept | {"STAR_CUDA": "0"} | environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


NO_TORCH = "import site; site.getsitepackages = lambda: []; sys.modules['torch'] = None"
NO_NINJA = "sys.executable = '/nowhere/python'; os.environ['PATH'] = '/nowhere'"
MISSING = {
    "pybind11": ("sys.modules['pybind11'] = None", ["pybind11>=2.13"]),
    "ninja": (f"{NO_NINJA}; import shutil; w = shutil.which; shutil.which = lambda n: 'g++' if n == 'g++' else w(n)",
              ["ninja"]),
    "torch": (NO_TORCH, ["torch"]),
    "setuptools": ("import setuptools; setuptools.__version__ = '65.5.0'", ["setuptools>=77"]),
    "all": (f"import setuptools; setuptools.__version__ = '65.5.0'; sys.modules['pybind11'] = None; {NO_TORCH}",
            ["setuptools>=77", "pybind11>=2.13", "torch"]),
}  # fmt: skip


@pytest.mark.parametrize(("before", "names"), MISSING.values(), ids=MISSING)
def test_what_is_missing_is_named_on_one_line(before, names):
    result = build(ROOT, before)
    assert result.returncode == 1
    (line,) = result.stdout.strip().splitlines()
    assert re.search(r"pip install (.*) \(STAR_BUILD=none", line)[1].replace("'", "").split() == names


def test_without_compiled_operators_nothing_but_setuptools_is_needed():
    before = f"sys.modules['pybind11'] = None; {NO_TORCH}; {NO_NINJA}"
    assert build(ROOT, before, STAR_BUILD="none").returncode == 0
    result = build(ROOT, MISSING["all"][0], STAR_BUILD="none")
    assert result.returncode == 1 and "pip install 'setuptools>=77' (" in result.stdout


@pytest.mark.parametrize(
    ("before", "reason"),
    [
        (
            "import sysconfig, platform; sysconfig.get_config_vars(); sys.platform = 'freebsd14'; "
            "platform.system = lambda: 'FreeBSD'",
            "for Linux, not for FreeBSD",
        ),
        (f"{NO_TORCH}; sys.modules['pip'] = None", "torch was not installed when it was built"),  # isolated
        ("os.environ['CXX'] = 'no-such-compiler'", "no C++ compiler was found"),
    ],
    ids=["another system", "no torch", "no compiler"],
)
def test_where_operators_cannot_be_compiled_the_rest_is_installed_and_knows_why(before, reason, tmp_path):
    folder = clone(tmp_path / "clone")
    command = ("build", "--build-base", str(tmp_path / "built"))
    result = build(folder, before, command)
    assert result.returncode == 0 and reason in result.stdout
    record = runpy.run_path(str(tmp_path / "built" / "lib" / "star_kernels" / "_build.py"))
    assert reason in record["CPU"]
    demanded = build(folder, before, STAR_BUILD="cpu")
    assert demanded.returncode == 1 and len(demanded.stdout.strip().splitlines()) == 1


def test_an_isolated_build_finds_the_torch_of_the_environment(tmp_path):
    """pip hides the environment's packages, and installs what [build-system] names elsewhere."""
    before = (
        "import site, setuptools, pybind11\n"
        "hidden = {*site.getsitepackages()}; sys.path = [entry for entry in sys.path if entry not in hidden]\n"
        "import importlib.util; assert importlib.util.find_spec('torch') is None"
    )
    result = build(clone(tmp_path / "clone"), before, STAR_BUILD="cpu")
    assert result.returncode == 0, result.stdout


RECORDER = """#!{python}
import pathlib, sys
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(arguments, file=log)
output = pathlib.Path(arguments[arguments.index("-o") + 1])
output.touch()
if "-MF" in arguments:
    source = arguments[arguments.index("-c") + 1]
    assert pathlib.Path(source).exists(), source
    pathlib.Path(arguments[arguments.index("-MF") + 1]).write_text("x: " + source.replace(" ", "\\\\ "))
"""


def recorder(path: Path, log: Path) -> Path:
    """A program that takes a compiler's arguments and writes them down."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(RECORDER.format(python=sys.executable, log=str(log)))
    path.chmod(0o755)
    return path


@pytest.fixture
def commands(tmp_path):
    """The commands of a whole build in folders with odd names, with a compiler of two words."""
    log, tools = tmp_path / "log", tmp_path / "tools"
    recorder(tools / "compiler", log)
    toolkit = tmp_path / "the toolkit"
    recorder(toolkit / "bin" / "nvcc", log)
    (toolkit / "include").mkdir()
    (toolkit / "include" / "cuda_runtime_api.h").touch()
    folder = clone(tmp_path / "my $project: 1")
    environment = {"PATH": f"{tools}:{os.environ['PATH']}", "CXX": "env compiler", "CXXFLAGS": "-DWORDS='two words'"}
    environment |= {"STAR_CUDA": "1", "CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": "9.0"}
    result = build(folder, "", ("build_ext", "--inplace"), **environment)
    assert result.returncode == 0, result.stdout
    return folder, [eval(line) for line in log.read_text().splitlines()]


def of_the_compiler(calls: list[list[str]]) -> list[list[str]]:
    """The commands that compile a source, without those of nvcc."""
    compiled = [call for call in calls if "-c" in call and call[call.index("-c") + 1].endswith(".cpp")]
    return [call for call in compiled if not any(argument.startswith("-ccbin=") for argument in call)]


def test_folders_with_spaces_and_compilers_of_two_words(commands):
    folder, calls = commands
    sources = {Path(call[call.index("-c") + 1]).name for call in calls if "-c" in call}
    assert {"bindings.cpp", "allocate_kernel.cpp", "allocate_op.cpp", "allocate.cu", "module.cpp"} <= sources
    for call in calls:
        for argument in call:
            if argument.startswith("-ccbin="):  # one file that calls both words
                host = Path(argument.removeprefix("-ccbin="))
                assert os.access(host, os.X_OK) and "exec env compiler " in host.read_text()
    plain = of_the_compiler(calls)
    assert len(plain) > len(list((folder / "csrc/cpu").glob("*.cpp")))  # some once for each instruction set
    assert not [call for call in plain if "-DWORDS=two words" not in call]
    for name in ("_C", "_cuda"):
        assert len(list((folder / "star_kernels").glob(f"{name}*.so"))) == 1
    record = runpy.run_path(str(folder / "star_kernels" / "_build.py"))
    assert record["CPU"] is None and record["CUDA"] is None and re.fullmatch(r"2\.\d+", record["TORCH"])


def compile_again(compiler: str, call: list[str], folder: Path, optimization: str, but: tuple[str, ...] = ()) -> Path:
    """Another compiler runs a recorded command, without some of its arguments."""
    at = call.index("-c")
    kept = [argument for argument in call[:at] if argument not in but]
    target = folder / f"{Path(call[call.index('-o') + 1]).stem}.{compiler}.o"
    command = [compiler, *kept, optimization, "-w", *call[at : at + 2], "-o", target]
    result = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert result.returncode == 0, result.stdout
    return target


def needs(compiler: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(compiler) is None, reason=f"needs {compiler}")


COMPILERS = ("g++-11", "g++-13", "g++-14", "g++-15", "clang++")
ARM = "aarch64-linux-gnu-g++"


@pytest.mark.parametrize("compiler", [pytest.param(name, marks=needs(name)) for name in COMPILERS])
def test_the_operators_compile_with(compiler, commands, tmp_path):
    """Each source once, kernels for the widest instruction set."""
    widest = "avx512" if platform.machine() == "x86_64" else "baseline"
    others = {f"-DSTAR_ISA={name}" for name in ("baseline", "avx2", "avx512") if name != widest}
    calls = [call for call in of_the_compiler(commands[1]) if others.isdisjoint(call)]
    calls = [call for call in calls if not any("cuda" in part for part in call)]
    assert len(calls) > 10
    for call in calls:
        compile_again(compiler, call, tmp_path, "-O0")


@needs(ARM)
def test_arm_processors_round_a_fused_multiply_add_once(commands, tmp_path):
    source = "attention_maps_kernel.cpp"
    calls = [call for call in of_the_compiler(commands[1]) if "-DSTAR_ISA=baseline" in call]
    (call,) = (call for call in calls if Path(call[call.index("-c") + 1]).name == source)
    target = compile_again(ARM, call, tmp_path, "-O1", but=("-DSTAR_HAS_AVX2", "-DSTAR_HAS_AVX512"))
    code = subprocess.run(["aarch64-linux-gnu-objdump", "-d", target], text=True, stdout=subprocess.PIPE).stdout
    assert "fmla" in code


def test_a_module_of_an_earlier_build_does_not_come_along(tmp_path):
    folder = clone(tmp_path / "clone")
    recorder(tmp_path / "compiler", tmp_path / "log")
    library = tmp_path / "lib" / "star_kernels"
    library.mkdir(parents=True)
    (library / "_cuda.so").touch()
    command = ("build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    result = build(folder, "", command, CXX=str(tmp_path / "compiler"))
    assert result.returncode == 0, result.stdout
    assert [path.name.split(".")[0] for path in library.glob("*.so")] == ["_C"]


def test_a_new_environment_without_isolation_gets_a_line_not_a_riddle(tmp_path):
    """A real one, with whatever setuptools its Python brings."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "an environment"], check=True)
    python = tmp_path / "an environment" / "bin" / "python"
    if subprocess.run(
        [python, "-c", "import setuptools; assert int(setuptools.__version__.split('.')[0]) < 77"]
    ).returncode:
        pytest.skip("a new environment has no old setuptools")
    command = [
        python,
        "-m",
        "pip",
        "install",
        "--no-index",
        "--no-deps",
        "--no-build-isolation",
        clone(tmp_path / "clone"),
    ]
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("STAR_", "PYTHON", "PIP_"))
    }
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    text = result.stdout + result.stderr
    assert "star-kernels: to build it here needs setuptools>=77" in text and "pip install 'setuptools>=77' " in text
    assert "project.license" not in text and "torch (STAR_BUILD=none" in text


@pytest.mark.parametrize("variables", [{}, {"STAR_CUDA": "1"}, {"STAR_BUILD": "cpu"}], ids=["auto", "cuda", "cpu"])
def test_beside_an_older_torch_nothing_is_compiled_and_the_needed_one_is_named(variables, tmp_path):
    """Also where that torch is a CUDA build and nvcc is there."""
    torch = tmp_path / "site" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").touch()
    (torch / "version.py").write_text("__version__ = '2.6.0+cu124'\ncuda = '12.4'\n")
    recorder(tmp_path / "toolkit" / "bin" / "nvcc", tmp_path / "log")
    (tmp_path / "toolkit" / "include").mkdir()
    (tmp_path / "toolkit" / "include" / "cuda_runtime_api.h").touch()
    environment = {"STAR_CUDA": "auto", "CUDA_HOME": str(tmp_path / "toolkit")} | variables
    before = f"sys.path.insert(0, {str(tmp_path / 'site')!r})"
    result = build(clone(tmp_path / "clone"), before, ("build_ext", "--inplace"), **environment)
    assert "built beside torch 2.6.0+cu124, the compiled operators need 2.11" in result.stdout
    assert (result.returncode == 0) == (not variables) and not (tmp_path / "log").exists()
