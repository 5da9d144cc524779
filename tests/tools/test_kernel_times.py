"""tools/gpu/kernel_times.py on a machine without a GPU: its checks of values, and what it would measure."""

import json

import pytest
import torch

pytest.importorskip("triton_bfloat16", reason="needs Triton")

import kernel_times


@pytest.fixture
def small(monkeypatch):
    """The CPU's implementations, a few sizes, and no GPU to take the time of."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(kernel_times, "MODELS", (("tiny", 2, 16, 4, 20),))
    monkeypatch.setattr(kernel_times, "BATCHES", (2,))
    monkeypatch.setattr(kernel_times, "left", lambda: 100.0)
    monkeypatch.setattr(kernel_times, "copy_rate", lambda: 1e12)

    def called(make, call, size):
        assert torch.is_tensor(call(*make())) or size > 0
        return 1e-6, 2e-6, 3e-6

    monkeypatch.setattr(kernel_times, "in_a_graph", called)


def test_every_operator_is_right(small):
    rows = list(kernel_times.correctness())
    assert len(rows) > 40 and [row for row in rows if not row.ok] == []


def test_a_wrong_value_is_seen():
    assert kernel_times.close("x", torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0]), 1e-6).ok
    assert not kernel_times.close("x", torch.tensor([1.0, 2.001]), torch.tensor([1.0, 2.0]), 1e-4).ok
    assert not kernel_times.close("x", torch.tensor([1.0, torch.nan]), torch.tensor([1.0, 2.0]), 1e-4).ok


def test_rows_are_written_and_an_error_is_one_of_them(small, tmp_path, monkeypatch):
    monkeypatch.setattr(kernel_times, "about", lambda: dict.fromkeys(("gpu", "driver", "torch", "triton"), "x"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    report = kernel_times.Report(tmp_path)
    report.take(kernel_times.kernels)

    def broken():
        yield kernel_times.Row("part", "first", ok=True)
        raise RuntimeError("one line\nand another")

    report.take(broken)
    rows = json.loads((tmp_path / "kernel_times.json").read_text())["rows"]
    assert rows[-1] == {**rows[-1], "part": "broken", "note": "RuntimeError: one line", "ok": False}
    losses = {
        row["name"].split(": ")[1]: row["bytes"]
        for row in rows
        if row["name"].startswith("policy_loss (2, 16, 64, 64), float32")
    }
    assert losses["loss and gradient"] == losses["loss"] + losses["gradient"]
    assert all(row["times"] == [1, 2, 3] for row in rows if row["share"])
    assert len((tmp_path / "kernel_times.md").read_text().splitlines()) == len(rows) + 4
