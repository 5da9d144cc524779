"""star_kernels needs torch alone, and importing it has no side effects that others would notice."""

import subprocess
import sys

import pytest


def run(code: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)


@pytest.mark.parametrize("module", ["star_kernels", "star.objective"])
def test_imports_with_torch_alone(module):
    heavy = ("diffusers", "transformers", "peft", "accelerate", "triton", "scipy", "matplotlib")
    code = f"import sys, {module}; print([m for m in {heavy!r} if m in sys.modules])"
    result = run(f"import torch, sys; before = set(sys.modules); {code}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_missing_extension_leaves_the_reference_and_says_why():
    code = (
        "import sys; sys.modules['star_kernels._C'] = None\n"
        "import star_kernels\n"
        "print(star_kernels.implementations('policy_loss'))"
    )
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "could not be imported" in result.stdout and "'reference': None" in result.stdout


def test_missing_extra_is_one_clear_line():
    code = "import sys; sys.modules['diffusers'] = None\nfrom star.cli import main; sys.exit(main(['info']))"
    result = run(code)
    assert result.returncode != 0
    assert "pip install 'star-kernels[train]'" in result.stderr
    assert "Traceback" not in result.stderr
