"""The benchmarks still run: they are imported by nothing else, and take too long for the tests."""

import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def on_path(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py") if path.stem != "conftest"))
def test_every_file_is_imported(on_path, name):
    __import__(name)
    del sys.modules[name]


def test_the_public_way_is_our_iteration_without_weights(on_path, tmp_path):
    """The loop in Flow-GRPO's manner that ours is timed against."""
    from eager_loop import EagerLoop
    from iterations import shapes_trainer

    ours, eager = (shapes_trainer(tmp_path / name, "uniform") for name in ("ours", "eager"))
    metrics = ours.step()
    _, rewards, norm = EagerLoop(eager).step()
    assert metrics["reward"] == pytest.approx(rewards.mean().item(), abs=1e-3)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-2)
