"""What benchmarks and GPU tools share are plain modules, and what they compare computes the same thing."""

import ast
from pathlib import Path

import pytest
import torch

import losses

ROOT = Path(__file__).resolve().parents[2]


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def test_no_module_is_imported_from_a_file_of_tests():
    files = [path for folder in ("benchmarks", "tools", "tests", "python", "star_kernels", "examples")
             for path in (ROOT / folder).rglob("*.py")]  # fmt: skip
    tests = {path.stem for path in files if path.name.startswith("test_")}
    assert "test_loss" in tests
    assert not [(path, name) for path in files for name in imported_modules(path) & tests]


@pytest.mark.parametrize("delta", [False, True])
def test_compared_losses(delta):
    """`compared` itself shows that both agree at weights of one; with weights only ours changes."""
    shape = (3, 4, 8, 8)
    weighted, flow_grpo = losses.compared(shape, delta=delta)
    scalar, _ = losses.compared(shape, delta=delta, weighted=False)
    expected = flow_grpo()[1]
    torch.testing.assert_close(scalar()[1], expected, rtol=1e-3, atol=1e-6 * expected.abs().max().item())
    assert not torch.allclose(weighted()[1], expected, rtol=0.05, atol=0)
