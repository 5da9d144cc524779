"""star_kernels needs torch alone, and importing it has no side effects that others would notice."""

import importlib
import inspect
import re
import subprocess
import sys

import pytest

import star


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


HEAVY = ("diffusers", "transformers", "peft", "accelerate", "triton", "scipy", "matplotlib")


@pytest.mark.parametrize(
    "statement",
    [
        "import star_kernels",
        "import star.objective",
        "import star; star.weighted_gradient; star.grpo_loss; star.sde_step_with_logprob; star.Allocation; dir(star)",
    ],
)
def test_imports_with_torch_alone(statement):
    missing = "".join(f"sys.modules[{name!r}] = None; " for name in HEAVY)
    result = run(f"import sys; {missing}{statement}")
    assert result.returncode == 0, result.stderr
    result = run(f"import sys; {statement}; print([m for m in {HEAVY!r} if m in sys.modules])")
    assert result.stdout.strip() == "[]", result.stderr


def test_the_front_door():
    names = set(star.__all__)
    assert {"allocated", "record", "concept_tokens", "weighted_gradient", "grpo_loss"} <= names <= set(dir(star))
    assert names == set(star._HOMES)
    for name in names:
        assert getattr(star, name) is getattr(importlib.import_module(star._HOMES[name]), name)
    with pytest.raises(AttributeError, match="module 'star' has no attribute 'allocate_all'"):
        _ = star.allocate_all
    assert inspect.ismodule(importlib.import_module("star.capture"))


def test_missing_extra_is_one_clear_line():
    code = "import sys; sys.modules['diffusers'] = None\nfrom star.cli import main; sys.exit(main(['train']))"
    result = run(code)
    assert result.returncode != 0
    assert re.fullmatch(
        r"star: diffusers is missing, of star-kernels\[train\]; pip install '?diffusers\b.*\n", result.stderr
    )
