"""The fuzzer: a short run of it, and that it sees what it looks for. `make fuzz` runs it long."""

import pytest
import torch

import fuzz
import star_kernels as sk

CASES = {"native": 400, "cuda_forward": 12, "triton": 12}


@pytest.mark.parametrize("impl", CASES)
def test_a_short_run(impl):
    if impl == "triton":
        pytest.importorskip("triton")
        fuzz.prepare(impl)
    names = list(fuzz.CASES) if impl != "cuda_forward" else ["allocate", "gaussian_step", "policy_loss"]
    outcomes = [fuzz.try_case(names[seed % len(names)], seed, impl) for seed in range(CASES[impl])]
    assert [one for one in outcomes if one.faults] == []
    assert {one.raised for one in outcomes} == {True, False}


def test_a_case_follows_from_its_seed():
    first, second = (fuzz.draw_case("policy_loss", 7, "native") for _ in range(2))
    assert list(first) == list(second) and torch.equal(first["velocity"], second["velocity"])
    assert first["velocity"].stride() == second["velocity"].stride()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: x * 1.001, "output 0: off by"),
        (lambda x: x.double(), r"torch.float64, the reference .* torch.float32"),
        (lambda x: x[:, :1], "output 0: "),
        (lambda x: x.where(torch.arange(x.shape[-1]) > 0, torch.nan), "values are finite, of the reference"),
    ],
)
def test_other_values_are_faults(change, words):
    arguments = {"maps": torch.rand(2, 3, 12), "grid": (3, 4)}
    expected = fuzz.run("allocate", arguments, "reference")
    assert fuzz.value_faults("allocate", arguments, expected, expected) == []
    (fault,) = fuzz.value_faults("allocate", arguments, [change(expected[0])], expected)
    with pytest.raises(ValueError, match=words):
        raise ValueError(fault)


def test_other_errors_are_faults():
    value, line = [torch.ones(1)], ValueError("cap: got 0")
    assert fuzz.error_faults(line, ValueError("cap: got 0")) == []
    for got in (value, TypeError("cap: got 0"), ValueError("got 0"), RuntimeError("cap: got 0")):
        assert fuzz.error_faults(got, line)
    assert fuzz.error_faults(ValueError("two\nlines"), ValueError("two\nlines"))


def test_a_changed_input_is_a_fault(monkeypatch):
    def changing(maps, *_, **__):
        maps.detach().fill_(7)
        return maps

    monkeypatch.setattr(sk, "allocate", changing)
    seed = next(s for s in range(99) if "an input was changed" in fuzz.try_case("allocate", s, "native").faults)
    assert seed < 20
