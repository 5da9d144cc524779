"""Charts: what is drawn, what is said, and numbers that cannot be drawn."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from star.reports import chart
from star.reports.chart import Curve, format_number

NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


def coordinates(path):
    return [float(number) for number in re.findall(r"-?\d+\.?\d*", path)]


@given(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=40), st.booleans())
def test_whatever_the_numbers_are_the_drawing_stays_within_its_edges(points, banded):
    y, errors = np.array(points).T
    drawn = chart.draw("score", [Curve(0, "run", np.arange(len(y)), y, abs(errors) if banded else None)])
    drawable = y[abs(y) < chart.LIMIT]
    assert (drawn is None) == (not len(drawable))
    if drawn is None:
        return
    (curve,) = drawn.curves
    for path in (curve.line, curve.smooth, curve.band):
        numbers = coordinates(path)
        assert all(0 <= x <= chart.WIDTH for x in numbers[::2]) and all(0 <= at <= chart.HEIGHT for at in numbers[1::2])
        assert not re.search("[a-z]", path)  # no nan, no exponent
    ticks = [tick.at for tick in drawn.y_ticks]
    assert ticks == sorted(ticks, reverse=True) and all(chart.TOP <= at <= chart.BOTTOM for at in ticks)
    longest = max((len(tick.label) for tick in drawn.y_ticks), default=0)
    assert chart.GAP + chart.DIGIT * longest <= drawn.left < chart.RIGHT / 2  # no label is cut; curves have room
    assert min(coordinates(curve.line)[::2]) >= drawn.left


def test_ticks_are_round_and_name_their_numbers():
    scale = chart.Scale.over(np.array([0.71, 0.83]), (0, 100), padding=0.0)
    assert [tick.label for tick in scale.ticks()] == ["0.75", "0.80"]
    scale = chart.Scale.over(np.array([-1.0, 1.0]), (0, 100), padding=0.0)
    assert [(tick.label, tick.at) for tick in scale.ticks()] == [
        ("-1.0", 0), ("-0.5", 25), ("0.0", 50), ("0.5", 75), ("1.0", 100)
    ]  # fmt: skip
    scale = chart.Scale.over(np.array([0.0, 2.0]), (0, 100), padding=0.02)
    assert [tick.label for tick in scale.ticks(whole=True)] == ["0", "1", "2"]


@pytest.mark.parametrize(
    ("ends", "labels"),
    [
        ((0.9999, 1.0001), ["0.99990", "0.99995", "1.00000", "1.00005", "1.00010"]),  # a ratio within its clip range
        ((1.01e7, 1.06e7), ["1.01e+07", "1.02e+07", "1.03e+07", "1.04e+07", "1.05e+07", "1.06e+07"]),
        ((0.0, 9e-5), ["0", "2e-05", "4e-05", "6e-05", "8e-05"]),
    ],
)
def test_ticks_that_differ_are_named_differently(ends, labels):
    assert [tick.label for tick in chart.Scale.over(np.array(ends), (0, 100), padding=0.0).ticks()] == labels


def test_numbers_next_to_zero_are_drawn():
    drawn = chart.draw("loss", [Curve(0, "run", np.arange(2), np.array([0.0, 5e-324]))])
    assert "0.0" in [tick.label for tick in drawn.y_ticks]


def test_a_chart_says_what_it_shows():
    x, y = np.array([0, 5, 10]), np.array([0.5, np.nan, 0.75])
    errors = np.array([0.1, 0.1, np.nan])
    drawn = chart.draw("held-out reward", [Curve(3, "run", x, y, errors)])
    assert drawn.description == "run: from 0.5000 at iteration 0 to 0.7500 at iteration 10, between 0.5000 and 0.7500"
    assert drawn.columns == ["iteration", "run"]
    assert drawn.rows == [["0", "0.5000 ± 0.1000"], ["10", "0.7500"]]  # the failed one is none
    assert [point.text for point in drawn.curves[0].points] == [
        "run, iteration 0: 0.5000 ± 0.1000",
        "run, iteration 10: 0.7500",
    ]
    ends = coordinates(drawn.curves[0].band)
    assert len(ends) == 8 and ends[2:4] == ends[4:6] and ends[1] < ends[7]


def test_a_single_point_is_drawn_with_its_band():
    drawn = chart.draw("reward", [Curve(0, "run", np.array([0]), np.array([0.5]), np.array([0.1]))])
    low, high = sorted(set(coordinates(drawn.curves[0].band)[1::2]))
    assert low < drawn.curves[0].points[0].y < high
    assert drawn.description == "run: 0.5000 ± 0.1000 at iteration 0"


def test_long_curves_are_means_of_neighbors_and_have_tenths_as_rows():
    x, y = np.arange(1, 1201), np.arange(1200.0)
    drawn = chart.draw("reward", [Curve(0, "run", x, y)])
    line = coordinates(drawn.curves[0].line)
    assert len(line) == 2 * chart.POINTS and line[1::2] == sorted(line[1::2], reverse=True)
    assert len(drawn.rows) == 10 and drawn.rows[0] == ["1 to 120", "59.5000"] and drawn.rows[-1][0] == "1081 to 1200"


def test_runs_of_different_lengths_share_a_table():
    short = Curve(0, "short", np.array([1, 2]), np.array([1.0, 2.0]))
    long = Curve(1, "long", np.array([1, 2, 3]), np.array([3.0, 4.0, 5.0]))
    rows = chart.draw("reward", [short, long]).rows
    assert rows == [["1", "1.0000", "3.0000"], ["2", "2.0000", "4.0000"], ["3", "—", "5.0000"]]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.5, "0.5000"), (0, "0.0000"), (4.7e-7, "4.7e-07"), (1.5e6, "1.5e+06"), (float("nan"), "—"), (-3, "-3.0000")],
)
def test_numbers_keep_digits_that_say_something(value, text):
    assert format_number(value) == text
