"""Runs the operator, capture and drop-in tests beside the versions that hosts pin: `make compat`, or with hosts' names.

For each host one new virtual environment gets the host's versions and then star-kernels from a clone, as a user of the
host would install it: nothing else may change. The tests that run there skip what a version lacks (tests/versions.py).
build/compat/HOST.log has all that was printed. A host that has a result for its present versions is not run again,
unless it is named. Results are kept in tools/compat.json, and docs/versions.md shows them.

`pip install torch==...` takes a build for the CPU where pip finds one, else what pip finds: several GB for a while.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from install_check import ROOT, Environment
from star import document

RESULTS = ROOT / "tools" / "compat.json"
ENVIRONMENTS = Path(tempfile.gettempdir()) / "star-compat"  # one that was interrupted goes on there
LOGS = ROOT / "build" / "compat"
DOCUMENT, MARKS = ROOT / "docs" / "versions.md", "versions that were run"
SHOWN = ("torch", "diffusers", "transformers", "accelerate", "peft")
LONGEST = 3600  # seconds of one host's tests


@dataclass(frozen=True)
class Host:
    """about: where the versions are from. pins: what the host asks for, as pip takes it; the rest is the newest."""

    about: str
    pins: tuple[str, ...] = ()


HOSTS = {
    "oldest": Host(
        "the oldest of each that the tests pass with",
        # An older packaging: torch before 2.9 cannot trace today's, which diffusers calls in a checkpointed block.
        ("torch==2.6.0", "diffusers==0.33.0", "transformers==4.40.0", "accelerate==1.4.0", "peft==0.10.0", "numpy<2",
         "packaging<25"),
    ),
    "flow_grpo": Host(
        "its setup.py",
        ("torch==2.6.0", "diffusers==0.33.1", "transformers==4.40.0", "accelerate==1.4.0", "peft==0.10.0",
         "numpy==1.26.4", "tokenizers==0.19.1", "huggingface-hub==0.29.1", "scipy==1.15.2", "pillow==10.4.0",
         "matplotlib==3.10.0", "pydantic==2.10.6", "tqdm==4.67.1", "packaging<25"),
    ),
    "Flow-Factory": Host(
        "its docker file's torch, its least diffusers and accelerate",
        # Triton 3.4 interprets kernels with an older numpy only.
        ("torch==2.8.0", "diffusers==0.40.0", "accelerate==1.11.0", "numpy<2.4", "packaging<25"),
    ),
    "verl-omni": Host(
        "of vllm-omni 0.30",
        ("torch==2.14.1", "diffusers==0.40.0", "transformers<5.15", "accelerate==1.12.0"),
    ),
    "UniRL": Host("its pyproject.toml", ("torch==2.13.0", "diffusers==0.38.0", "transformers>=5.6,<5.7", "peft>=0.20")),
    "newest": Host("the newest of each"),
}  # fmt: skip

# What the tests import beside the host's libraries, and what builds the compiled operators.
TOOLS = (
    "pytest pytest-xdist hypothesis scipy sentencepiece protobuf rich tyro tqdm pyyaml jinja2 matplotlib pillow "
    "rapidfuzz httpx2 uvicorn starlette setuptools>=77 ninja pybind11"
).split()
TESTS = [
    *(f"tests/kernels/test_{name}.py" for name in ("operators", "attention_maps", "allocate", "gaussian_step")),
    *("tests/kernels/test_policy_loss.py", "tests/kernels/test_fuzz.py", "tests/method", "tests/hosts"),
    *("tests/rewards/test_rewards_clip.py", "tests/rewards/test_loading.py", "tests/rewards/test_geneval.py"),
]
# GPU kernels on the CPU and gradients by differences: slow, and no library's version matters to them.
LEFT_OUT = "not cuda_ and not gradcheck"
LIST = """
import importlib.metadata, json
print(json.dumps({one.metadata["Name"].lower(): one.version for one in importlib.metadata.distributions()}))
"""
COUNTS = re.compile(r"(\d+) (passed|failed|errors?|skipped)\b")


def install(environment: Environment) -> dict[str, str]:
    """The host's libraries, then star-kernels; returns versions. Raises AssertionError if that changed a library."""
    libraries = [pin for pin in HOSTS[environment.folder.name].pins if pin.startswith(SHOWN)]
    others = [name for name in SHOWN if not any(re.match(rf"{name}\b", pin) for pin in libraries)]
    environment.run("pip install " + " ".join(f"'{word}'" for word in (*libraries, *others, *TOOLS)))
    before = versions(environment)
    environment.run("pip install --no-build-isolation --editable .")
    after = versions(environment)
    # It may be there already, in an environment that was interrupted.
    changed = {library for library, _ in {*after.items()} ^ {*before.items()}} - {"star-kernels"}
    assert not changed, f"star-kernels changed {sorted(changed)}"
    return before


def versions(environment: Environment) -> dict[str, str]:
    """Of every distribution that is installed."""
    (environment.folder / "versions.py").write_text(LIST)
    return json.loads(environment.run("python versions.py", environment.folder).splitlines()[-1])


def counts(printed: str) -> dict[str, int]:
    """Of the last line of pytest: {"passed": 12, "skipped": 3}."""
    lines = [line for line in printed.splitlines() if COUNTS.search(line) and " in " in line]
    return {name: int(number) for number, name in COUNTS.findall(lines[-1])} if lines else {}


def run(name: str, folder: Path) -> dict:
    """One host's result."""
    log = LOGS / f"{name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    result = {"pins": list(HOSTS[name].pins), "python": "{}.{}.{}".format(*sys.version_info), "versions": {}}
    result["result"] = "not installed"
    try:
        # Without a space: torch before 2.9 compiles with paths that it does not quote.
        environment = Environment(folder / name, "\n".join(HOSTS[name].pins) or "# nothing", "environment")
        # Most modules are never imported, and nothing runs on a GPU.
        environment.variables |= {"PIP_NO_COMPILE": "1", "STAR_CUDA": "0"}
        found = install(environment)
        result |= {"versions": {library: found[library] for library in SHOWN}, "result": "not finished"}
        options = "-n auto --dist loadfile --tb=short -p no:cacheprovider -rs"
        command = f"timeout {LONGEST} pytest {options} -k '{LEFT_OUT}' {' '.join(TESTS)}"
        printed = environment.run(command)
        result["result"] = "ok"
    except subprocess.CalledProcessError as error:
        printed = error.output
        if counts(printed):
            result["result"] = "failed"
    except AssertionError as error:
        printed = str(error)
    log.write_text(printed)
    return result | {"counts": counts(printed), "seconds": round(time.monotonic() - began), "date": f"{date.today()}"}


def row(name: str, result: dict) -> str:
    shown = [result["versions"].get(library, "") for library in SHOWN]
    numbers = ", ".join(f"{number} {what}" for what, number in result["counts"].items())
    said = f"{result['result']}: {numbers}" if numbers else result["result"]
    return f"| {name} | {HOSTS[name].about} | {' | '.join(shown)} | {said} | {result['date']} |"


def table(results: dict[str, dict]) -> str:
    """The rows of all hosts; one without a result for what it pins today was not run."""
    header = f"| | versions | {' | '.join(SHOWN)} | tests | run on |\n|{'---|' * (len(SHOWN) + 4)}"
    empty = {"versions": {}, "counts": {}, "result": "not run", "date": ""}
    return "\n".join([header, *(row(name, results[name] if is_done(name, results) else empty) for name in HOSTS)])


def is_done(name: str, results: dict[str, dict]) -> bool:
    """Whether there is a result for what a host pins today."""
    return name in results and results[name]["pins"] == list(HOSTS[name].pins)


def main(names: list[str]) -> int:
    unknown = [name for name in names if name not in HOSTS]
    if unknown:
        print(f"hosts: got {unknown[0]!r}, expected some of {', '.join(HOSTS)}", file=sys.stderr)
        return 2
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or [name for name in HOSTS if not is_done(name, results)]:
        results[name] = run(name, ENVIRONMENTS)
        shutil.rmtree(ENVIRONMENTS / name)
        RESULTS.write_text(json.dumps({one: results[one] for one in HOSTS if one in results}, indent=1) + "\n")
        document.fill(DOCUMENT, {MARKS: table(results)})
        print(row(name, results[name]), flush=True)
    return int(any(result["result"] != "ok" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
