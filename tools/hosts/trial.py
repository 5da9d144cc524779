"""Runs a host's training without and with its diff, on the CPU, and compares what it logs and how it updates.

Each run has an interpreter of its own. The host's files are copied before the diff is applied: a checkout stays as it
is. Three runs are compared: the host's own, the patched one with weights of 1, the patched one with its maps' weights.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import types
from abc import ABCMeta
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = ("none", "uniform", "attention")
MEAN_TOLERANCE = 1e-5  # of a float32 mean over the locations of a small image
LEAST_SPREAD = 0.01  # standard deviation of weights that are told from 1


@dataclass
class Trace:
    """What a run showed."""

    lines: list[str] = field(default_factory=list)
    """What it logged, numbers to the last bit."""
    gradients: list[str] = field(default_factory=list)
    """A hash of all gradients at each update."""
    means: list[float] = field(default_factory=list)
    """Mean over the locations of each sample's weights, one for each sample and pass."""
    spreads: list[float] = field(default_factory=list)
    """Their standard deviation."""


class Finished(BaseException):
    """Raised in a host's logger to end a run that would go on forever; no host catches it."""


def exact(value: Any) -> Any:
    """A value as JSON, floating-point numbers as hexadecimal ones; None for what has no bits to compare."""
    if isinstance(value, dict):
        return {str(key): exact(value[key]) for key in sorted(value, key=str)}
    if isinstance(value, list | tuple):
        return [exact(entry) for entry in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their numbers
        return exact(value.tolist())
    if isinstance(value, float):
        return value.hex()
    return value if isinstance(value, str | int | bool) else None


def stub(name: str, **contents: Any) -> types.ModuleType:
    """A module of that name, importable, in the place of one that a run does not need."""
    module = types.ModuleType(name)
    vars(module).update(contents)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


class _AnyClass(ABCMeta):
    """Of a class that stands for any name of a module that is not there."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Anything

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        if "stands_in" not in vars(cls):  # a class of the host's, derived from one
            return super().__call__(*args, **kwargs)
        # A decorator leaves what it decorates as it is.
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else Anything

    def register(cls, *_: Any, **__: Any) -> Any:
        return Anything

    def __getitem__(cls, item: Any) -> Any:
        return Anything

    def __or__(cls, other: Any) -> Any:
        return Anything


class Anything(metaclass=_AnyClass):
    """A class to derive from, a decorator, a function or a module's member, which does nothing."""

    stands_in = True


def _any_member(name: str) -> Any:
    """A class of its own for each name: a host may derive from two."""
    if name.startswith("__"):
        raise AttributeError(name)
    return _AnyClass(name, (Anything,), {"stands_in": True})


class _Unused(MetaPathFinder, Loader):
    """Finds modules in which every name is there and does nothing."""

    def __init__(self, names: Sequence[str]) -> None:
        self.names = tuple(names)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if not any(name == unused or name.startswith(f"{unused}.") for unused in self.names):
            return None
        return ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = _any_member
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def stub_missing(names: Sequence[str]) -> None:
    """Have modules of these names, and those inside them, be importable: what a host imports and a run does not use."""
    sys.meta_path.insert(0, _Unused(names))


def watch_updates(trace: Trace) -> None:
    """Have every optimizer add the hash of its gradients to the trace before it steps."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    def add(optimizer: Any, args: tuple, kwargs: dict) -> None:
        digest = hashlib.sha256()
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    digest.update(parameter.grad.detach().flatten().view(torch.uint8).numpy().tobytes())
        trace.gradients.append(digest.hexdigest())

    register_optimizer_step_pre_hook(add)


def watch_weights(trace: Trace, uniform: bool) -> None:
    """Add every weight that is made of maps to the trace; uniform: give 1 in its place."""
    import torch

    from star.objective import allocation

    allocate = allocation.allocate

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        weights = allocate(*args, **kwargs)
        weights = torch.ones_like(weights) if uniform else weights
        trace.means += weights.double().flatten(1).mean(1).tolist()
        trace.spreads += weights.double().flatten(1).std(1).tolist()
        return weights

    allocation.allocate = watched


Run = Callable[[Path, str, Trace], None]  # of a checkout, the case's name, and what the run shows


def _traced(run: Run, checkout: Path, case: str, weights: str) -> Trace:
    """A run in this interpreter, which is its own."""
    import torch

    sys.path[:0] = [str(ROOT / "tests"), str(checkout)]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    trace = Trace()
    watch_updates(trace)
    if weights != "none":
        watch_weights(trace, weights == "uniform")
    with contextlib.suppress(Finished):
        run(checkout, case, trace)
    return trace


def copied(checkout: Path, files: Sequence[str], folder: Path, diff: Path | None) -> Path:
    """The files and folders of a checkout in a folder, with a diff or a module applied to them."""
    for name in files:
        source, target = checkout / name, folder / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns(".git", "__pycache__"))
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, target)
    if diff is not None and diff.suffix == ".py":
        shutil.copy(diff, folder)
    elif diff is not None:
        subprocess.run(["git", "apply", "--check", str(diff)], cwd=folder, check=True)
        subprocess.run(["git", "apply", str(diff)], cwd=folder, check=True)
    return folder


def _in_an_interpreter_of_its_own(checkout: Path, case: str, weights: str) -> Trace:
    """A run by the same script. Raises RuntimeError with the end of what a run that failed said."""
    command = [sys.executable, sys.argv[0], str(checkout), case, "--trace", weights]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{case}, weights {weights}: {done.stderr[-3000:]}")
    return Trace(**json.loads(done.stdout.splitlines()[-1]))


def faults(own: Trace, uniform: Trace, attention: Trace) -> list[str]:
    """What is wrong with three runs: the host's own, the patched one with weights of 1, that with its maps' weights."""
    found = []
    if not own.gradients or not own.lines:
        found.append(f"the host made {len(own.gradients)} updates and logged {len(own.lines)} lines")
    if own.lines != uniform.lines:
        pairs = zip(own.lines, uniform.lines, strict=False)
        first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(own.lines), len(uniform.lines)))
        found.append(f"weights of 1: line {first} differs")
    if own.gradients != uniform.gradients:
        found.append("weights of 1: the gradients differ")
    if not uniform.means:
        found.append("weights of 1: none were made")
    if not any(spread > LEAST_SPREAD for spread in attention.spreads):
        found.append("the maps' weights are flat")
    off = max((abs(mean - 1) for mean in attention.means), default=0.0)
    if off > MEAN_TOLERANCE:
        found.append(f"the maps' weights have a mean that is off by {off:.1e}")
    pairs = list(zip(own.gradients, attention.gradients, strict=False))
    if len(own.gradients) != len(attention.gradients) or any(a == b for a, b in pairs):
        found.append("the maps' weights leave an update as it was")
    return found


def compare(checkout: Path, case: str) -> list[str]:
    """Make a case's three runs, say what they show, and return what is wrong with them."""
    traces = [_in_an_interpreter_of_its_own(checkout, case, weights) for weights in WEIGHTS]
    found, (own, _, attention) = faults(*traces), traces
    if not found:
        off = max(abs(mean - 1) for mean in attention.means)
        print(
            f"{case}: {len(own.lines)} logged lines and {len(own.gradients)} updates are the host's with weights of 1; "
            f"all updates differ with the maps' weights, {len(attention.means)} of mean 1 (off by {off:.0e} at most), "
            f"standard deviation up to {max(attention.spreads):.2f}",
            flush=True,
        )
    return found


def main(run: Run, files: Sequence[str], diffs: dict[str, Path], description: str) -> None:
    """The command line of a host: CHECKOUT and the names of cases. Ends with status 1 where a case has a fault."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("checkout", type=Path, help="a clone of the host, at the commit that its page names")
    parser.add_argument("cases", nargs="*", help=f"of {', '.join(diffs)}; default: all")
    parser.add_argument("--trace", choices=WEIGHTS, help="make one run alone and print what it shows")
    arguments = parser.parse_args()
    if unknown := set(arguments.cases) - set(diffs):
        parser.error(f"cases: got {', '.join(sorted(unknown))}, expected of {', '.join(diffs)}")
    cases = arguments.cases or list(diffs)
    if arguments.trace:
        for case in cases:
            with tempfile.TemporaryDirectory() as folder:
                diff = None if arguments.trace == "none" else diffs[case]
                host = copied(arguments.checkout.resolve(), files, Path(folder), diff)
                trace = _traced(run, host, case, arguments.trace)
            print(json.dumps(vars(trace)))
        return
    wrong = False
    for case in cases:
        for fault in compare(arguments.checkout.resolve(), case):
            print(f"{case}: {fault}", flush=True)
            wrong = True
    sys.exit(wrong)
