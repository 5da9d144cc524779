"""The overhead of allocation in a whole GRPO iteration: rollout with maps, weights and update against scalar GRPO."""

import pytest
import torch

from eager_loop import EagerLoop
from iterations import arms, medium_trainer, shapes_trainer
from pairs import alternate
from peaks import in_a_process, linux


@pytest.mark.parametrize(
    ("name", "make", "rounds", "limit"),
    [("iteration_wall", medium_trainer, 15, 1.0), ("shapes_iteration_wall", shapes_trainer, 21, 3.0)],
)
def test_overhead_in_time(name, make, rounds, limit, tmp_path, benchmark, row):
    trainer = make(tmp_path)
    scalar, star = arms(trainer)
    first, second = scalar(), star()
    assert first["ratio_first"] == second["ratio_first"] == 1.0
    assert "weights_max" not in first and second["weights_max"] > 1
    pair = alternate(scalar, star, rounds=rounds)
    benchmark.pedantic(star, rounds=1)
    note = f"percent; scalar {pair.first:.2f} s, with allocation {pair.second:.2f} s an iteration"
    row(name, 100 * (pair.ratio - 1), at_most=limit, note=note)


@linux
def test_overhead_in_memory(tmp_path, benchmark, row):
    peaks = []

    def measure():
        for strategy in ("uniform", "attention"):
            peaks.extend(in_a_process("iterations", "iteration_peak", str(tmp_path / strategy), strategy))

    benchmark.pedantic(measure, rounds=1)
    scalar, star = peaks
    note = (
        f"percent; an iteration peaks {scalar >> 20} MiB above what the trainer holds, with allocation {star >> 20} MiB"
    )
    row("iteration_memory", 100 * (star / scalar - 1), at_most=1.0, note=note)


def test_against_the_public_way(tmp_path, benchmark, row):
    """Our iteration with allocation against a scalar one in Flow-GRPO's manner."""
    ours, eager = shapes_trainer(tmp_path / "ours", "uniform"), EagerLoop(shapes_trainer(tmp_path / "eager", "uniform"))
    latents = {}
    plain = ours.rollout
    ours.rollout = lambda *args, **options: latents.setdefault("rollout", plain(*args, **options))
    metrics = ours.step()
    ours.rollout = plain
    expected, rewards, norm = eager.step()
    torch.testing.assert_close(latents["rollout"].latents, expected, rtol=1e-3, atol=1e-3)
    assert metrics["reward"] == pytest.approx(rewards.mean().item(), abs=1e-3)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-2)
    _, star = arms(ours)
    pair = alternate(star, eager.step, rounds=11)
    benchmark.pedantic(star, rounds=1)
    note = f"times faster; an iteration {pair.first:.2f} s with allocation against {pair.second:.2f} s scalar"
    row("shapes_vs_eager_loop", pair.ratio, at_least=1.5, note=note)
