"""The table of operators and the files that each of its lines needs: a new operator fails here until all are there."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import star_kernels
from star_kernels import api
from star_kernels.checks import check_reach
from star_kernels.ops import OPERATORS

ROOT = Path(__file__).resolve().parents[2]
each_operator = pytest.mark.parametrize("operator", OPERATORS.values(), ids=list(OPERATORS))


def names(folder: str, ending: str) -> set[str]:
    """Of the files in a folder with an ending, without it."""
    return {path.name.removesuffix(ending) for path in (ROOT / folder).glob(f"*{ending}")}


@pytest.mark.parametrize(("device", "endings"), [("cpu", ("_op.cpp", "_kernel.cpp")), ("cuda", (".cu", ".cuh"))])
def test_the_table_names_the_compiled_kernels(device, endings):
    expected = {name for name, operator in OPERATORS.items() if device in operator.native}
    # cuda/device.cuh is what the kernels share, cuda/latents.cuh what the losses do.
    assert [names(f"csrc/{device}", ending) - {"device", "latents"} for ending in endings] == [expected] * 2
    registered = [
        name
        for path in (ROOT / "csrc" / device).glob(f"*{endings[0]}")
        for name in re.findall(r"^STAR_REGISTER\((\w+),", path.read_text(), re.MULTILINE)
    ]
    companions = {one.name for name in expected for one in OPERATORS[name].companions if device in one.native}
    assert sorted(registered) == sorted(expected | companions)


def test_the_table_names_the_triton_kernels():
    expected = {name for name, operator in OPERATORS.items() if operator.triton is not None}
    assert names("star_kernels/triton", ".py") - {"__init__", "device"} == expected  # device: what they share


@each_operator
def test_an_operator_has_a_door_and_tests(operator):
    assert getattr(star_kernels, operator.name) is getattr(api, operator.name)
    assert operator.name in star_kernels.__all__
    assert (ROOT / "tests" / "kernels" / f"test_{operator.name}.py").exists()


@each_operator
def test_schema_and_reference_have_the_same_arguments(operator):
    arguments = lambda one: [argument.name for argument in one.run("reference").default._schema.arguments]
    for one in filter(None, (operator, operator.gradient, operator.write)):
        assert arguments(one) == list(inspect.signature(one.reference).parameters)
    if operator.with_gradient is not None:
        assert arguments(operator.with_gradient) == arguments(operator)
    if operator.write is not None:
        assert arguments(operator.write)[: len(arguments(operator))] == arguments(operator)


def test_triton_refuses_what_it_cannot_count():
    check_reach("query", (65535, 24, 4096, 64), (24 * 4096 * 64, 64, 24 * 64, 1))
    with pytest.raises(ValueError, match=r"sample: got a batch of 65536, expected at most 65535 for impl='triton'"):
        check_reach("sample", (65536,), (1,))
    with pytest.raises(ValueError, match=r"query: a sample of \(24, 2000000, 64\) spans more than 2\*\*31 elements"):
        check_reach("query", (1, 24, 2000000, 64), (0, 64, 24 * 64, 1))
    if api.HAS_TRITON:
        many = torch.zeros(1).expand(70000, 1, 2, 2)
        step = star_kernels.Transition(*torch.ones(6, 70000).unbind())
        with pytest.raises(ValueError, match="velocity: got a batch of 70000"):
            star_kernels.policy_loss(many, many, many, step, many[:, 0, 0, 0], old_mean=many, impl="triton")
        with pytest.raises(ValueError, match="sample: got a batch of 70000"):
            star_kernels.gaussian_step(many, many, many, step, impl="triton")
        with pytest.raises(ValueError, match="query: got a batch of 70000"):
            star_kernels.attention_maps(many, many, torch.zeros(70000, 1, 1, dtype=torch.int64), impl="triton")


def test_changes_of_the_environment_are_seen(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.delenv("STAR_IMPL", raising=False)
    best = next(name for name, reason in star_kernels.implementations("allocate").items() if reason is None)
    assert api.resolve("allocate", "auto", cpu) == best
    monkeypatch.setenv("STAR_IMPL", "reference")
    assert api.resolve("allocate", "auto", cpu) == "reference"
    monkeypatch.setenv("STAR_IMPL", "nonsense")
    with pytest.raises(ValueError, match="impl: got 'nonsense'"):
        api.resolve("allocate", "auto", cpu)
    if api.HAS_TRITON:
        for value in ("1", "0", "1"):
            monkeypatch.setenv("TRITON_INTERPRET", value)
            if value == "1":
                assert api.resolve("attention_maps", "triton", cpu) == "triton"
            else:
                with pytest.raises(RuntimeError, match="impl='triton': Triton runs on the CPU only in its interpreter"):
                    api.resolve("attention_maps", "triton", cpu)
