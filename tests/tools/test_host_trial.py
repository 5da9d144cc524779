"""tools/hosts/trial.py: what it compares, and that each kind of difference is found."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "hosts"))
import trial

OWN = trial.Trace(lines=["a", "b"], gradients=["1", "2"])
UNIFORM = replace(OWN, means=[1.0], spreads=[0.0])
ATTENTION = trial.Trace(lines=["a", "c"], gradients=["3", "4"], means=[1.0, 1 + 1e-7], spreads=[0.3, 0.2])


def test_three_runs_without_a_fault():
    assert trial.faults(OWN, UNIFORM, ATTENTION) == []


@pytest.mark.parametrize(
    ("runs", "fault"),
    [
        ((replace(OWN, gradients=[]), replace(UNIFORM, gradients=[]), ATTENTION), "the host made 0 updates"),
        ((OWN, replace(UNIFORM, lines=["a", "x"]), ATTENTION), "weights of 1: line 1 differs"),
        ((OWN, replace(UNIFORM, lines=["a"]), ATTENTION), "weights of 1: line 1 differs"),
        ((OWN, replace(UNIFORM, gradients=["1", "x"]), ATTENTION), "weights of 1: the gradients differ"),
        ((OWN, replace(UNIFORM, means=[]), ATTENTION), "weights of 1: none were made"),
        ((OWN, UNIFORM, replace(ATTENTION, spreads=[0.0, 0.0])), "the maps' weights are flat"),
        ((OWN, UNIFORM, replace(ATTENTION, means=[1.0, 1.01])), "a mean that is off by 1.0e-02"),
        ((OWN, UNIFORM, replace(ATTENTION, gradients=["3", "2"])), "leave an update as it was"),
        ((OWN, UNIFORM, replace(ATTENTION, gradients=["3"])), "leave an update as it was"),
    ],
)
def test_each_difference_is_found(runs, fault):
    assert any(fault in found for found in trial.faults(*runs))


def test_numbers_are_compared_to_the_last_bit():
    line = trial.exact({"b": torch.tensor(0.1), "a": [1, True, "text", object()], 3: torch.tensor([1.0, 2.0])})
    assert list(line) == ["3", "a", "b"] and line["a"] == [1, True, "text", None]
    assert float.fromhex(line["b"]) == torch.tensor(0.1).item() != 0.1
    assert trial.exact(1.0) != trial.exact(1.0 + 2**-52)


def test_the_hash_of_the_gradients_is_one_for_each_update():
    trace, parameter = trial.Trace(), torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    trial.watch_updates(trace)
    optimizer = torch.optim.SGD([parameter], 0.0)
    for scale in (1.0, 1.0, 2.0):
        optimizer.zero_grad()
        (parameter.sum() * scale).backward()
        optimizer.step()
    first, again, other = trace.gradients
    assert first == again != other


def test_weights_are_seen_and_made_ones(monkeypatch):
    from star.objective import Allocation, allocation, allocation_weights

    maps = torch.rand(2, 1, 12)
    for uniform in (False, True):
        trace = trial.Trace()
        with monkeypatch.context() as patch:
            patch.setattr(allocation, "allocate", allocation.allocate)  # puts it back behind the context
            trial.watch_weights(trace, uniform)
            weights = allocation_weights(Allocation(), maps, (3, 4), patch=1)
        assert (weights == 1).all() == uniform and len(trace.means) == 2
        assert trace.means == pytest.approx([1, 1], abs=1e-6) and (max(trace.spreads) > 0) != uniform


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "host" / "package" / "__pycache__").mkdir(parents=True)
    (tmp_path / "host" / "package" / "train.py").write_text("one\ntwo\n")
    (tmp_path / "host" / "unread.txt").write_text("")
    (tmp_path / "star.diff").write_text("--- a/package/train.py\n+++ b/package/train.py\n@@ -2 +2 @@\n-two\n+three\n")
    return tmp_path


def test_a_diff_is_applied_to_a_copy(checkout):
    copy = trial.copied(checkout / "host", ["package"], checkout / "copy", checkout / "star.diff")
    assert (copy / "package" / "train.py").read_text() == "one\nthree\n"
    assert (checkout / "host" / "package" / "train.py").read_text() == "one\ntwo\n"
    assert sorted(path.name for path in copy.rglob("*")) == ["package", "train.py"]


def test_a_diff_of_another_commit_does_not_apply(checkout):
    (checkout / "host" / "package" / "train.py").write_text("one\nfour\n")
    with pytest.raises(subprocess.CalledProcessError):
        trial.copied(checkout / "host", ["package"], checkout / "copy", checkout / "star.diff")


def test_a_library_that_is_not_there_is_importable(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", sys.meta_path.copy())
    for name in ("nowhere", "nowhere.inside", "nowhere.registry"):
        monkeypatch.setitem(sys.modules, name, None)
        monkeypatch.delitem(sys.modules, name)
    trial.stub_missing(["nowhere"])
    from nowhere.inside import Base, Other, decorated
    from nowhere.registry import Registry

    @Registry.register(name="one")
    @decorated
    class Own(Base, Other):
        value = 3

    assert Own().value == 3 and Base("an argument", key=1) is trial.Anything
    with pytest.raises(ModuleNotFoundError):
        import nowhere_else  # noqa: F401
