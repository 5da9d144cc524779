"""The sweep of block sizes, without a GPU: values are checked in Triton's interpreter, times are made up."""

import pytest
import torch

pytest.importorskip("triton")
import triton_bfloat16  # noqa: F401
import tune_triton
from star_kernels.triton.attention_maps import Blocks
from tune_triton import Candidate, Shape

SMALL = Shape("small", 2, 3, 70, 80, 16, 2, 4)
CPU = torch.device("cpu")


def test_every_candidate_is_right_and_timed():
    tried = [tune_triton.usual(SMALL, CPU), *tune_triton.candidates(3)]
    found = dict(tune_triton.sweep(SMALL, tried, CPU, lambda sets, candidate: float(candidate.groups)))
    assert list(found) == list(dict.fromkeys(tried)) and len(found) >= 16
    assert found[Candidate(Blocks(128, 8, 3), 4)] == 4.0


def test_wrong_values_stop_the_sweep(monkeypatch):
    launch = tune_triton.kernels.launch
    monkeypatch.setattr(tune_triton.kernels, "launch", lambda *a, **k: launch(*a, **k) * 1.001)
    with pytest.raises(RuntimeError, match="small, 64 queries, 4 warps, 3 stages, 1 groups of heads: values are off"):
        list(tune_triton.sweep(SMALL, tune_triton.candidates(3), CPU, lambda *_: 1.0))


def test_the_best_blocks_are_those_of_all_shapes():
    narrow, wide, other = Blocks(64, 4, 3), Blocks(128, 4, 3), Blocks(128, 8, 3)
    first = {Candidate(narrow, 1): 2.0, Candidate(narrow, 2): 1.0, Candidate(wide, 1): 1.5}
    second = {Candidate(narrow, 1): 4.0, Candidate(wide, 1): 2.0, Candidate(other, 1): 1.0}
    (one, blocks), (two, _) = tune_triton.best_blocks([first, second])
    assert blocks == wide and one == pytest.approx(3**0.5) and two == pytest.approx(2)


def test_the_other_operators_are_compared(monkeypatch, capsys):
    small = tune_triton.model.Model("small", 2, 8, 1, 16, 5, 1, 3, 2)
    monkeypatch.setattr(tune_triton.model, "MODELS", (small,))
    monkeypatch.setattr(tune_triton.model, "BATCHES", (2,))
    monkeypatch.setattr(tune_triton, "seconds_of", lambda call: call().numel() * 1e-6)
    rows = tune_triton.compare(CPU)
    assert [row["operator"].split()[0] for row in rows] == ["allocate", "gaussian_step", "policy_loss"]
    for row in rows:
        assert set(row["us"]) == set(row["relative_error"]) >= {"triton"} and max(row["relative_error"].values()) < 1e-5
    assert rows[1]["relative_error"]["triton"] == 0 and rows[1]["us"]["triton"] == 2 * 3 * 64
