"""Reads the examples and the diffs of other trainers."""

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
MOST_LINES = 15


def load_example(path: str) -> ModuleType:
    """The module of a file under examples/, freshly run."""
    spec = importlib.util.spec_from_file_location(path.replace("/", "_").removesuffix(".py"), EXAMPLES / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradient(loss: torch.Tensor, transformer: torch.nn.Module) -> torch.Tensor:
    """By the last layer and the queries' weights, in one vector."""
    parameters = [p for n, p in transformer.named_parameters() if n.endswith(("to_q.weight", "proj_out.weight"))]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, retain_graph=True)])


def added_lines(diff: str) -> list[str]:
    """The lines that a diff adds; it must change at most MOST_LINES lines, and its hunks have as many as they say."""
    lines = (EXAMPLES / diff).read_text().splitlines()
    changed = [line for line in lines if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    assert 0 < len(changed) <= MOST_LINES
    # A hunk's header counts its lines: a diff that was edited by hand and would not apply shows here.
    expected = found = (0, 0)
    for line in lines:
        if line.startswith(("@@", "diff ")):
            assert found == expected
        if line.startswith("@@"):
            old, new = line.split("@@")[1].split()
            size = lambda part: int(part.split(",")[1]) if "," in part else 1
            expected, found = (size(old), size(new)), (0, 0)
        elif line.startswith("diff "):
            expected = found = (0, 0)
        elif expected != (0, 0) and line[:1] in "+- ":
            found = (found[0] + (line[0] in "- "), found[1] + (line[0] in "+ "))
    assert found == expected != (0, 0)
    return [line[1:].strip() for line in changed if line[0] == "+"]


def check_diff(diff: str, example: str) -> list[str]:
    """Assert that a diff is short and the example holds every line it adds; returns those."""
    added = added_lines(diff)
    own = {line.strip() for line in (EXAMPLES / example).read_text().splitlines()}
    assert [line for line in added if line and line not in own] == []
    return added
