"""Runs every documented install line in an empty environment: `make install-check`, or with words of some lines.

Each line is run word by word in a shell: in a clone whose folder has a space in its name, with a new virtual
environment whose folder has one too. A line that presumes torch gets it first. Afterwards the operators must run,
`star info` must say what the line promises, and torch must still be the one that was there.

`pip install torch` takes the CPU build of the version in requirements-ci.txt where pip finds one, else what pip finds.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
WORDS = "pip install"
MESSAGES = "error messages"


def documented(text: str) -> list[str]:
    """Install lines of a page: lines of its blocks of code without their comments, and code within sentences."""
    lines, prose, fenced = [], [], False
    for line in text.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            lines.append(re.sub(r"\s+#\s.*", "", line).strip())
        else:
            prose.append(line)
    lines += [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", "\n".join(prose))]
    return [line for line in lines if WORDS in line]


def messages() -> list[str]:
    """Install lines of error messages that are always the same."""
    spec = importlib.util.spec_from_file_location("requirements", ROOT / "star_kernels" / "requirements.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return [text[text.index(": ") + 2 :] for text in (module.REBUILD, module.REBUILD_CUDA)]


def install_lines() -> dict[str, list[str]]:
    """Where each line is documented."""
    found: dict[str, list[str]] = {}
    for page in PAGES:
        for line in documented(page.read_text()):
            found.setdefault(line, []).append(page.name)
    for line in messages():
        found.setdefault(line, []).append(MESSAGES)
    return {line: list(dict.fromkeys(places)) for line, places in found.items()}


def trains(line: str) -> bool:
    """Whether a line asks for an extra that brings what `star train` needs."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {name for names in re.findall(r"\[([\w,]+)\]", line) for name in names.split(",")}
    return "train" in asked or any("star-kernels[train]" in extras[name] for name in asked)


def obstacle(line: str) -> str | None:
    """Why a line cannot be run on this machine, or None."""
    if "STAR_CUDA=1" in line and not (shutil.which("nvcc") or os.environ.get("CUDA_HOME")):
        return "no nvcc"
    return None


@dataclass
class Environment:
    """An empty virtual environment and a clone beside it."""

    folder: Path
    constraint: str | None  # of torch
    name: str = "an environment"

    def __post_init__(self) -> None:
        self.bin = self.folder / self.name / "bin"
        self.clone = self.folder / "a clone"
        subprocess.run([sys.executable, "-m", "venv", self.bin.parent], check=True)
        names = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, stdout=-1, check=True)
        for name in filter(None, names.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.clone / name)
        self.variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "STAR_"))}
        self.variables |= {"PATH": f"{self.bin}:{os.environ['PATH']}", "VIRTUAL_ENV": str(self.bin.parent)}
        self.variables |= {"TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", "9.0")}  # minutes, not hours
        if self.constraint:
            (self.folder / "constraints.txt").write_text(self.constraint + "\n")
            self.variables["PIP_CONSTRAINT"] = (self.folder / "constraints.txt").as_uri()

    def run(self, line: str, folder: Path | None = None) -> str:
        """What a line prints. Raises CalledProcessError, with all that was printed, if it fails."""
        return subprocess.run(
            ["bash", "-c", line], cwd=folder or self.clone, env=self.variables, text=True, check=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        ).stdout  # fmt: skip

    def torch(self) -> str:
        return self.run("python -c 'import torch; print(torch.__version__)'", self.folder).split()[-1]


USE = """
import torch, warnings
warnings.simplefilter("ignore")
import star_kernels
print(star_kernels.allocate(torch.rand(1, 2, 12), (3, 4)).shape)
"""


def check(line: str, environment: Environment) -> str:
    """Run a line; what `star info` says of it afterwards. Raises AssertionError or CalledProcessError."""
    before = None
    if "install torch" not in line:
        environment.run("pip install torch")
        before = environment.torch()
    environment.run(line)
    after = environment.torch()
    assert before in (None, after), f"torch {before} was replaced by {after}"
    (environment.folder / "use.py").write_text(USE)
    environment.run("python use.py", environment.folder)
    said = environment.run("star info", environment.folder)
    compiled = re.search(r"^allocate +native on cpu", said, re.M) is not None
    assert compiled == ("STAR_BUILD=none" not in line), said
    if "STAR_CUDA=1" in line:
        assert re.search(r"^cuda +sm_", said, re.M), said
    if trains(line):
        environment.run("star train --help", environment.folder)
    elif "--no-deps" not in line:
        follow_message(environment)
    return f"torch {after}, {'compiled' if compiled else 'not compiled'}"


def named_line(message: str) -> str:
    """The command that a message about a missing module names. Raises AssertionError where it names none."""
    said = re.search(r" is missing\b.*?; (pip install .*)", message)
    assert said, message
    return said[1]


def follow_message(environment: Environment) -> None:
    """Without an extra, a command names the line that installs it, and works after that line."""
    try:
        environment.run("star train --help", environment.folder)
    except subprocess.CalledProcessError as error:
        environment.run(named_line(error.stdout), environment.folder)
    environment.run("star train --help", environment.folder)


def cpu_torch(environment: Environment) -> str | None:
    """The pinned torch as a build for the CPU, where pip finds one."""
    pinned = re.search(r"^torch==(\S+)", (ROOT / "requirements-ci.txt").read_text(), re.M)[1]
    wanted = f"torch=={pinned}+cpu"
    try:
        environment.run(f"pip install --dry-run --no-deps {wanted}")
    except subprocess.CalledProcessError:
        return None
    return wanted


def main(words: list[str]) -> int:
    failed, constraint = 0, None
    with tempfile.TemporaryDirectory() as folder:
        constraint = cpu_torch(Environment(Path(folder), None))
    print(f"torch: {constraint or 'what pip finds'}\n\n| line | where | result |\n|---|---|---|", flush=True)
    for line, places in install_lines().items():
        if not all(word in line for word in words):
            continue
        result = f"cannot be run here: {obstacle(line)}"
        if obstacle(line) is None:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    result = f"ok: {check(line, Environment(Path(folder), constraint))}"
                except (AssertionError, subprocess.CalledProcessError) as error:
                    failed += 1
                    print(getattr(error, "output", None) or error, file=sys.stderr)
                    result = "**failed**, see above"
        print(f"| `{line}` | {', '.join(places)} | {result} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
