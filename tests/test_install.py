"""What the package says when its compiled part is missing or does not fit, and what `star info` makes of it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import star_kernels
from star_kernels import requirements

PACKAGE = Path(star_kernels.__file__).parent
CALL = "import torch, star_kernels as s; q = torch.rand(1, 1, 4, 8); "
CALL += "maps = s.attention_maps(q, q, torch.zeros(1, 1, 1).long()); [s.allocate(maps, (2, 2)) for _ in range(3)]"
# The editable installation of the one who tests is not to be found.
ALONE = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f).lower()]\n"


def copy(folder: Path, record: dict[str, str | None] | None, binaries: bool = False) -> Path:
    """A folder with the package as setup.py leaves it, with that record of what was built."""
    ignored = ["__pycache__", "_build.py", *([] if binaries else ["*.so"])]
    shutil.copytree(PACKAGE, folder / "star_kernels", ignore=shutil.ignore_patterns(*ignored))
    if record is not None:
        lines = [f"{name} = {value!r}" for name, value in record.items()]
        (folder / "star_kernels" / "_build.py").write_text("\n".join(lines))
    return folder


def run(folder: Path, code: str, *path: Path) -> subprocess.CompletedProcess:
    code = f"{ALONE}sys.path[:0] = {[str(folder), *map(str, path)]!r}\n{code}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "STAR_"))}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd="/")


def warnings_of(result: subprocess.CompletedProcess) -> list[str]:
    assert result.returncode == 0, result.stderr
    return re.findall(r"RuntimeWarning: (.*)", result.stderr)


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"TORCH": "2.13", "CPU": "left out by STAR_BUILD=none", "CUDA": None}, "left out by STAR_BUILD=none"),
        (
            {"TORCH": "2.13", "CPU": "torch was not installed when it was built", "CUDA": None},
            "torch was not installed",
        ),
        (None, "nothing was built in FOLDER"),
    ],
    ids=["STAR_BUILD=none", "no torch", "source"],
)
def test_the_reference_on_the_cpu_is_told_once_with_its_reason(record, words, tmp_path):
    (told,) = warnings_of(run(copy(tmp_path, record), CALL))
    words = words.replace("FOLDER", str(tmp_path / "star_kernels"))
    assert told.startswith("star_kernels runs as plain PyTorch on cpu tensors, which is slow: ")
    assert words in told and told.endswith(requirements.REBUILD) and "circular" not in told


def test_binaries_for_a_newer_torch_are_named(tmp_path):
    folder = copy(tmp_path, {"TORCH": "99.1", "CPU": None, "CUDA": None}, binaries=True)
    result = run(folder, CALL + "; print(s.implementations('allocate')['native'])")
    (told,) = warnings_of(result)
    for text in (told, result.stdout):
        assert "built for torch 99.1 and later, but this is torch 2." in text and requirements.REBUILD in text


@pytest.mark.parametrize("before", ["(Tensor maps, int rows", "-> Tensor"], ids=["one argument less", "a result more"])
def test_binaries_of_other_sources_are_named_and_not_called(before, tmp_path):
    """As after a pull without a build."""
    folder = copy(tmp_path, {"TORCH": "2.13", "CPU": None, "CUDA": None}, binaries=True)
    source = folder / "star_kernels" / "ops.py"
    allocate = source.read_text().index("ALLOCATE = ")
    head, tail = source.read_text()[:allocate], source.read_text()[allocate:]
    after = {"(Tensor maps, int rows": "(Tensor maps, int more, int rows", "-> Tensor": "-> (Tensor, Tensor)"}[before]
    assert before in tail
    source.write_text(head + tail.replace(before, after, 1))
    (told,) = warnings_of(run(folder, CALL.split("; [")[0]))
    assert "star_kernels._C was compiled from other sources than these, allocate differs; " in told
    assert told.endswith(requirements.REBUILD)


def test_a_torch_without_the_stable_abi_is_named_with_the_one_that_is_needed(tmp_path):
    folder = copy(tmp_path, {"TORCH": "2.13", "CPU": "built beside torch 2.6.0", "CUDA": None})
    (told,) = warnings_of(run(folder, "import torch; torch.__version__ = '2.6.0+cu124'\n" + CALL))
    assert told.endswith("the compiled operators need torch 2.11 or later, and this is torch 2.6.0+cu124")


def test_binaries_that_do_not_load_are_named(tmp_path):
    folder = copy(tmp_path, {"TORCH": "2.13", "CPU": None, "CUDA": None}, binaries=True)
    (library,) = (folder / "star_kernels").glob("_C*.so")
    library.write_bytes(b"no library")
    (told,) = warnings_of(run(folder, CALL))
    assert "star_kernels._C could not be imported beside torch 2." in told and requirements.REBUILD in told


def test_a_source_folder_that_hides_the_installed_package_is_told_with_both_folders(tmp_path):
    source, installed = copy(tmp_path / "a clone", None), copy(tmp_path / "site", None, binaries=True)
    (told,) = warnings_of(run(source, CALL, installed))
    assert f"{source}/star_kernels has no compiled operators and hides {installed}/star_kernels, which has them" in told
    assert not warnings_of(run(installed, CALL, source))


def test_nothing_is_told_where_the_reference_was_asked_for(tmp_path):
    folder = copy(tmp_path, None)
    assert not warnings_of(run(folder, "import os; os.environ['STAR_IMPL'] = 'reference'; " + CALL))


OTHERS = ("diffusers", "transformers", "peft", "accelerate", "tyro", "rich", "yaml", "numpy", "safetensors", "tqdm")


def test_info_needs_torch_alone_and_says_why_nothing_is_compiled(tmp_path):
    folder = copy(tmp_path, {"TORCH": "2.13", "CPU": "left out by STAR_BUILD=none", "CUDA": None})
    hidden = "".join(f"sys.modules[{name!r}] = None; " for name in OTHERS)
    python = Path(__file__).resolve().parents[1] / "python"
    result = run(folder, f"{hidden}from star.cli import main; sys.exit(main(['info']))", python)
    assert result.returncode == 0, result.stderr
    assert re.search(rf"^folder +{re.escape(str(folder / 'star_kernels'))}$", result.stdout, re.M)
    assert re.search(r"^torch +2\.", result.stdout, re.M)
    assert re.search(r"^allocate +reference on cpu", result.stdout, re.M)
    (line,) = (line for line in result.stdout.splitlines() if line.startswith("no native on cpu"))
    assert f"left out by STAR_BUILD=none; {requirements.REBUILD}" in line and "policy_loss" in line


@pytest.fixture
def installed(monkeypatch):
    """An installation of star-kernels with some requirements, of which `there` is installed."""
    every = ["torch>=2.13", "there>=1; extra == 'train'", 'absent>=2,<3; extra == "train"', "other; extra == 'rewards'"]
    monkeypatch.setattr(requirements.importlib.metadata, "requires", lambda name: every)
    monkeypatch.setattr(requirements, "_is_installed", lambda name: name == "there")


def test_a_message_names_the_line_that_installs_what_an_extra_lacks(installed):
    assert requirements.install_line("train", "absent.module") == "pip install 'absent>=2,<3'"
    assert requirements.install_line("rewards", "other") == "pip install other"


def test_a_complete_extra_gives_no_line_for_another_module(installed, monkeypatch):
    monkeypatch.setattr(requirements, "_is_installed", lambda name: True)
    assert requirements.install_line("train", "my_own_task") is None
    assert requirements.install_line("train", "there") == "pip install 'there>=1'"  # it is broken


def test_where_nothing_is_installed_a_message_names_the_clone(monkeypatch):
    def requires(name):
        raise requirements.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(requirements.importlib.metadata, "requires", requires)
    assert requirements.install_line("train", "tyro") == "in a clone of star-kernels: pip install '.[train]'"
