"""The benchmarks' verdicts from synthetic times, what they count, and that every file of them still runs."""

import dataclasses
import functools
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from diffusers import SD3Transformer2DModel

import captures
import counts
import losses
import page
import results
from rows import ROWS
from runner import Counted, Machine, Row, Sides, measure, run
from verdicts import FEWEST, UNITS, interval, limit_of, slower

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ADDED, TIMES = UNITS["%"], UNITS["x"]


class Synthetic:
    """Two sides on a clock of their own: ours takes `ratio` times the other's 50 ms, and both are disturbed."""

    def __init__(self, ratio: float, noise: float = 0.01, seed: int = 0, sets: int = 1) -> None:
        self.random, self.noise, self.now, self.order = random.Random(seed), noise, 0.0, []
        self.sets = [
            Sides(functools.partial(self.call, "ours", ratio, i), functools.partial(self.call, "other", 1.0, i))
            for i in range(sets)
        ]

    def call(self, side: str, ratio: float, number: int) -> None:
        self.order.append((side, number))
        self.now += 0.05 * ratio * self.random.lognormvariate(0, self.noise)

    def measure(self, limit, seconds=60.0, unit=ADDED):
        return measure(self.sets, unit, limit, seconds, clock=lambda: self.now)


@pytest.mark.parametrize(("ratio", "expected"), [(1.001, "met"), (1.05, "not met")])
def test_a_row_ends_when_it_is_decided(ratio, expected):
    world = Synthetic(ratio)
    measured = world.measure(limit=1.0)
    assert measured.verdict == expected
    assert FEWEST <= len(measured.ours.seconds) == len(measured.other.seconds)
    assert world.now < 10  # of 60 seconds
    assert measured.estimate.low < 100 * (ratio - 1) < measured.estimate.high


def test_a_row_is_undecided_when_its_time_is_up():
    world = Synthetic(1.01)  # exactly at the limit
    measured = world.measure(limit=1.0, seconds=20)
    assert measured.verdict == "undecided"
    assert measured.estimate.low < 1.0 < measured.estimate.high
    assert 20 < world.now < 20.5


def test_few_pairs_decide_nothing():
    measured = Synthetic(1.5).measure(limit=1.0, seconds=0.5)
    assert 0 < len(measured.ours.seconds) < FEWEST and measured.verdict == "undecided"


def test_more_is_better_where_the_unit_says_so():
    assert Synthetic(1 / 3).measure(limit=2.0, unit=TIMES).verdict == "met"
    assert Synthetic(1 / 3).measure(limit=4.0, unit=TIMES).verdict == "not met"


def test_what_ours_adds_has_a_scale_and_a_ratio_has_none():
    world = Synthetic(1.5, noise=0)
    world.sets = [dataclasses.replace(sides, scale=1 / 24) for sides in world.sets]
    assert world.measure(None, seconds=5).estimate.mean == pytest.approx(50 / 24)
    assert world.measure(None, seconds=5, unit=TIMES).estimate.mean == pytest.approx(2 / 3)


def test_verdicts_are_seldom_wrong():
    """Rows that lie exactly at their limit, of 20 to 320 pairs: both verdicts are wrong."""
    wrong = [Synthetic(1.01, 0.03, seed).measure(1.0, seconds=32).verdict != "undecided" for seed in range(30)]
    assert sum(wrong) <= 4  # one in twenty is expected at most; five are less probable than 2 %


def test_disturbed_pairs_do_not_move_the_value():
    quiet = [1.0 + 0.01 * (i % 5) for i in range(40)]
    disturbed = [*quiet[:36], 30.0, 40.0, -20.0, 50.0]
    assert interval(disturbed).mean == pytest.approx(interval(quiet).mean, abs=0.01)


def test_pairs_change_their_order_and_buffers_go_round():
    world = Synthetic(1.0, sets=3)
    world.measure(limit=None, seconds=4)  # without a limit a quarter of it
    assert 1.0 < world.now < 1.5
    pairs = [world.order[i : i + 2] for i in range(2, len(world.order), 2)]  # after one call of each
    assert [pair[0][0] for pair in pairs[:4]] == ["other", "ours", "other", "ours"]
    assert [{number for _, number in pair} for pair in pairs[:4]] == [{0}, {1}, {2}, {0}]


def test_a_row_whose_sides_differ_is_an_error():
    def both(difference):
        return Sides(lambda: torch.ones(3), lambda: torch.ones(3) + difference)

    with pytest.raises(AssertionError, match=r"name: both sides must compute the same.*not close"):
        run(Row("name", "x", lambda: both(1e-3)), None, None, 1.0)
    assert "counts" in run(Row("name", "x", lambda: both(0.0)), None, None, 1.0)


def test_a_result_has_all_that_the_page_shows():
    row = next(row for row in ROWS if row.name == "allocate_vs_reference_512")
    result = run(row, None, Machine(copy=1e10, product=1e11), 0.5)
    assert result["limit"] == row.goal and result["ours"] > 0 and result["pairs"] > 0
    assert result["counts"]["ours"]["operators"] == 1 and result["counts"]["ours"]["faults"] >= 0
    moved = 9 * (3 * 32 * 32 + 64 * 64) * 4  # maps and weights
    assert result["counts"]["ours"]["bytes"] == moved and result["fastest"] == moved / 1e10
    assert json.loads(json.dumps(result)) == result
    assert results.last_value(result) == (None if result["low"] is None else result["value"])
    peaks = run(Row("peak", "MiB", lambda: Counted(3 << 20, 1 << 20), goal=1), None, None, 1.0)
    assert (peaks["value"], peaks["low"], peaks["verdict"]) == (2.0, 2.0, "not met")


@pytest.mark.parametrize(
    ("unit", "goal", "last", "expected"),
    [
        ("x", 6, 13.0, 10.0),  # no looser than what was there
        ("x", 6, 5.0, 6),
        ("x", None, 2.6, 2.0),
        ("x", 6, None, 6),
        ("%", 1, 0.1, 1),
        ("%", None, 10.0, 13.0),
        ("%", None, -0.3, None),
        ("us", 40, 10.0, 40),
        ("%", None, None, None),
    ],
)
def test_limits(unit, goal, last, expected):
    assert limit_of(UNITS[unit], goal, last) == pytest.approx(expected)


def result_of(name, low, high, unit="x", operators=3, **more):
    counted = {"ours": {"operators": operators, "allocations": 1, "bytes": None}, "other": {}}
    return dict(name=name, unit=unit, value=(low + high) / 2, low=low, high=high, counts=counted, **more)


def test_what_got_slower(tmp_path):
    past = tmp_path / "results.jsonl"
    before = [result_of("a", 9, 11), result_of("b", 9, 11), result_of("c", 0.1, 0.3, "%"), result_of("d", 1, 2)]
    old = dict(name="median", unit="x", value=5.0, of="median")
    for name, rows in (
        ("here", [result_of("a", 90, 110)]),
        ("here", [*before, old]),
        ("there", [result_of("a", 1, 2)]),
    ):
        results.record(dict(machine=name, date="2026-01-01", commit="abc", torch="2", rows=rows), past)
    known = results.last_results(results.read_runs(past), "here")
    assert known["a"]["value"] == 10 and known["a"]["commit"] == "abc"
    now = [
        result_of("a", 5, 8.9),
        result_of("b", 8, 10),  # the intervals overlap
        result_of("c", 0.31, 0.5, "%"),
        result_of("d", 3, 4, operators=4),
        result_of("median", 1, 2),
        result_of("new", 1, 2),
    ]
    assert slower(now, known) == ["a 9 -> 5 x", "c 0.3 -> 0.5 %", "d 3 -> 4 operators"]
    assert slower(before, known) == []
    memory = [result_of("a", 12, 12)]
    assert slower(memory, {"a": result_of("a", 16, 16)}) == []  # the pages of a peak come and go: its limit judges it


def test_a_row_that_was_counted_later_keeps_its_value():
    runs = [
        dict(machine="m", date="1", commit="a", rows=[result_of("a", 1, 2, operators=5)]),
        dict(machine="m", date="2", commit="b", rows=[dict(name="a", unit="x", counts={"ours": {"operators": 4}})]),
    ]
    found = results.last_results(runs, "m")["a"]
    assert (found["value"], found["date"], found["counts"]["ours"]["operators"]) == (1.5, "1", 4)


def test_a_row_that_was_measured_again_keeps_nothing_of_the_older_one():
    old = dict(name="a", unit="x", value=5.0, of="quartiles", quartiles=[4.0, 6.0], ours=1.0, other=5.0)
    new = result_of("a", 1, 2)
    runs = [dict(machine="m", date=date, commit="c", rows=[row]) for date, row in (("1", old), ("2", new))]
    found = results.last_results(runs, "m")["a"]
    assert found == new | dict(date="2", commit="c") and page.interval(found) == "1 to 2"


def test_counts_of_a_product_and_of_attention():
    a, b, q = torch.randn(4, 8), torch.randn(8, 16), torch.randn(1, 2, 32, 8)
    found = counts.counts(lambda: (a @ b).view(64))
    assert (found.operators, found.bytes, found.flops) == (1, 4 * (32 + 128 + 64), 2 * 4 * 8 * 16)
    assert found.allocations >= 1 and found.allocated >= 4 * 64
    attention = counts.counts(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert attention.flops == 2 * 2 * (2 * 32 * 32 * 8)


@pytest.mark.parametrize(
    ("call", "reads", "writes"),
    [
        (lambda a, b: a.add_(b), 2, 1),
        (lambda a, b: a.mul_(2.0), 1, 1),
        (lambda a, b: a.copy_(b), 1, 1),
        (lambda a, b: a.fill_(0.0), 0, 1),
        (lambda a, b: torch.neg(a, out=b), 1, 1),
        (lambda a, b: torch.add(a, b, out=b), 2, 1),
        (lambda a, b: torch._foreach_add_([a], [b]), 2, 1),
        (lambda a, b: a + b, 2, 1),
    ],
)
def test_a_target_is_counted_as_often_as_it_is_read_and_written(call, reads, writes):
    found = counts.counts(lambda: call(torch.ones(64), torch.ones(64)))
    making = counts.counts(lambda: (torch.ones(64), torch.ones(64)))
    assert found.bytes - making.bytes == 4 * 64 * (reads + writes)


def test_what_is_compiled_stays_compiled():
    """Under a dispatch mode torch.compile gives up a function for good, and its row would time eager PyTorch."""
    ran = []
    backend = lambda graph, _: lambda *args: (ran.append(1), graph(*args))[1]
    double = torch.compile(lambda x: 2 * x + 1, backend=backend)
    double(torch.ones(3))
    assert counts.counts(lambda: double(torch.ones(3)), compiled=True).operators is None
    before = len(ran)
    double(torch.ones(3))
    assert len(ran) == before + 1


@pytest.mark.skipif(sys.platform != "linux", reason="counters of Linux")
def test_the_counter_of_the_kernel():
    software, page_faults = 1, 2  # which a virtual machine has too
    counter = counts.PerfCounter(software, page_faults)
    before = counter.read()
    if before is None:
        pytest.skip("the kernel does not let it be read")
    held = torch.empty(64 << 20, dtype=torch.uint8).fill_(1)
    assert counter.read() > before and len(held)
    assert counts.PerfCounter(99, 99).read() is None


@pytest.fixture
def tiny(monkeypatch):
    """Every row's shapes, a thousandth of the work."""
    for name, shape in captures.SHAPES.items():
        grid = (4, 6) if shape.joint else (shape.share, 2, 3)
        monkeypatch.setitem(captures.SHAPES, name, dataclasses.replace(shape, grid=grid, text=30))
    for pixels in losses.SHAPES:
        monkeypatch.setitem(losses.SHAPES, pixels, (2, 4, 8, 8))

    def stack():
        sizes = dict(num_layers=3, attention_head_dim=16, num_attention_heads=2, sample_size=16, in_channels=4)
        text = dict(joint_attention_dim=24, caption_projection_dim=32, pooled_projection_dim=20, pos_embed_max_size=16)
        model = SD3Transformer2DModel(**sizes, **text, patch_size=2, qk_norm="rms_norm", dual_attention_layers=(0,))
        inputs = dict(hidden_states=torch.randn(1, 4, 8, 12), encoder_hidden_states=torch.randn(1, 205, 24))
        return model, inputs | dict(pooled_projections=torch.randn(1, 20), timestep=torch.tensor([500.0]))

    monkeypatch.setattr(captures, "stack", stack)


LONG = ("compiled", "iteration", "eager_loop", "memory")


@pytest.mark.parametrize(
    "row", [row for row in ROWS if not any(part in row.name for part in LONG)], ids=lambda r: r.name
)
def test_both_sides_of_a_row_compute_the_same(row, tiny):
    """With their real code, checks and counts, but for the sizes."""
    counted = run(row, None, None, 1.0)["counts"]
    assert counted["ours"]["operators"] > 0 and counted["other"]["operators"] > 0


def test_five_lines_that_are_wrong_are_seen(tiny, monkeypatch):
    right = captures.maps_by_torch
    monkeypatch.setattr(captures, "maps_by_torch", lambda *args: 1.001 * right(*args))
    rows = [
        row for row in ROWS if row.name in ("capture_k16_512", "capture_k16_512_vs_torch", "stack_capture_all_vs_torch")
    ]
    for row in rows:
        with pytest.raises(AssertionError, match=row.name):
            run(row, None, None, 1.0)


def test_the_table_of_rows():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)
    assert all(row.unit in UNITS and (row.goal is None or row.goal > 0) for row in ROWS)
    known = set(names)
    captures = [name for name in names if name.startswith(("capture_", "stack_")) and not name.endswith("memory_1024")]
    baseless = [name for name in captures if "_vs_" not in name and f"{name}_vs_torch" not in known]
    assert captures and baseless == []
    recorded = {row["name"] for run in results.read_runs() for row in run["rows"]}
    assert recorded <= known


def test_the_pages_hold_the_results():
    from test_documents import marked

    runs = results.read_runs()
    for name, text in page.texts(runs).items():
        assert marked(page.DOCUMENT, name) == text.strip(), "run python benchmarks/page.py"


def test_a_page_says_what_its_numbers_are():
    judged = result_of("allocate_vs_reference_512", 7, 9, limit=1, verdict="met", ours=1e-3, other=8e-3, fastest=5e-4)
    old = dict(name="capture_k16_512", unit="%", value=1.7, of="median")
    run = dict(machine="two cores", date="2026-01-01", commit="abc", torch="2.13", rows=[judged, old])
    values, counted = page.texts([run | dict(copy=1e10, product=1e11)]).values()
    assert "| `allocate_vs_reference_512` | 8 x | 7 to 9 | >= 1 | met | 1 ms / 8 ms | 50% | 2026-01-01 |" in values
    assert "| `capture_k16_512` | 1.7 % | a median | <= 0.8 | not judged |" in values
    assert "**two cores**, torch 2.13. It copies 10.0 GB/s" in values
    assert "| `allocate_vs_reference_512` | 3 |" in counted


@pytest.mark.parametrize("name", sorted(path.stem for path in BENCHMARKS.glob("*.py")))
def test_every_file_is_imported(name):
    __import__(name)


def test_an_iteration_is_compared_with_one_that_has_no_weights():
    from iterations import overhead, shapes_trainer

    sides = overhead(shapes_trainer)
    for _ in range(2):  # they alternate
        sides.equal(sides.ours(), sides.other())


def test_the_public_way_is_our_iteration_without_weights(tmp_path):
    """The loop in Flow-GRPO's manner that ours is timed against."""
    from eager_loop import EagerLoop
    from iterations import shapes_trainer

    ours, eager = (shapes_trainer(tmp_path / name, "uniform") for name in ("ours", "eager"))
    metrics = ours.step()
    _, rewards, norm = EagerLoop(eager).step()
    assert metrics["reward"] == pytest.approx(rewards.mean().item(), abs=1e-3)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-2)
