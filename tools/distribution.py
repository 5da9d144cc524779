"""Checks what `make wheel` made: `python tools/distribution.py dist`.

The sdist has everything that is compiled, the wheel everything that runs and nothing else, and the compiled modules ask
libtorch for nothing but its stable ABI. In an empty environment with the pinned torch the wheel runs the operators.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# C++ names of ATen and c10: they change from one torch to the next. What is inline in their headers is not asked for.
UNSTABLE = r"\b_ZNK?(?:2at|3c10|5torch)\w*"


def check_tag(wheel: str, tag: str | None) -> None:
    """A release's tag is v and the version. tag: None where none started the build."""
    version = wheel.split("-")[1]
    assert tag in (None, f"v{version}"), f"tag: got {tag}, expected v{version}, the version in pyproject.toml"


def check_sdist(path: Path) -> None:
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    compiled = {str(file.relative_to(ROOT)) for file in (ROOT / "csrc").rglob("*") if file.is_file()}
    assert compiled | {"setup.py", "pyproject.toml", "LICENSE", "README.md"} <= names
    assert not [name for name in names if name.startswith(("tests", "benchmarks", "docs"))]


def check_wheel(path: Path, cuda: bool) -> None:
    with zipfile.ZipFile(path) as archive, tempfile.TemporaryDirectory() as folder:
        names = set(archive.namelist())
        modules = [name for name in names if name.endswith(".so")]
        for name in modules:
            library = archive.extract(name, folder)
            listing = subprocess.run(
                ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
            )
            assert not (unstable := re.findall(UNSTABLE, listing.stdout)), (name, unstable)
    built = {name.split(".")[0] for name in modules}
    assert built == {"star_kernels/_C", *(["star_kernels/_cuda"] if cuda else [])}, built
    packages = {"star": ROOT / "python" / "star", "star_kernels": ROOT / "star_kernels"}
    for package, source in packages.items():
        files = [file for file in source.rglob("*") if file.is_file() and file.suffix not in (".pyc", ".so")]
        assert {f"{package}/{file.relative_to(source)}" for file in files} <= names
    others = [name for name in names if not name.startswith(("star/", "star_kernels/")) and ".dist-info/" not in name]
    assert not others
    if not cuda:
        # An operator adds some 10 kB, in three instruction sets: what is larger by more than that holds something else.
        assert path.stat().st_size < 6.6e6, path.stat().st_size
    print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB, {', '.join(sorted(built))}")


USE = """
import torch, star_kernels
assert star_kernels.implementations("allocate")["native"] is None, star_kernels.implementations("allocate")
print(star_kernels.allocate(torch.rand(1, 2, 12), (3, 4), impl="native").mean().item())
"""


def check_installed(wheel: Path) -> None:
    """Install a wheel in an empty environment and call an operator."""
    torch = re.search(r"^torch==\S+", (ROOT / "requirements-ci.txt").read_text(), re.M)[0]
    with tempfile.TemporaryDirectory() as folder:
        python = Path(folder) / "environment" / "bin" / "python"
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--no-cache-dir", torch, wheel.absolute()]
        subprocess.run(install, check=True)
        said = subprocess.run([python, "-c", USE], cwd=folder, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        print(f"{wheel.name}: runs in an empty environment, mean of the weights {float(said.stdout):.6f}")


def main(folder: str) -> None:
    (sdist,), (wheel,) = Path(folder).glob("*.tar.gz"), Path(folder).glob("*.whl")
    check_tag(wheel.name, os.environ.get("GITHUB_REF_NAME") if os.environ.get("GITHUB_REF_TYPE") == "tag" else None)
    check_sdist(sdist)
    with zipfile.ZipFile(wheel) as archive:
        cuda = any("_cuda" in name for name in archive.namelist())
    check_wheel(wheel, cuda)
    assert re.search(r"-manylinux_2_28_\w+\.whl$", wheel.name), wheel.name
    check_installed(wheel)


if __name__ == "__main__":
    main(*sys.argv[1:])
