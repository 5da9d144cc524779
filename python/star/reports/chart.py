"""Line charts as geometry: numbers in, paths and labels of an SVG out, which `chart` of base.html draws.

A chart says in words what it shows, and has its numbers as rows, for those who do not see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

WIDTH, HEIGHT = 360, 190  # of the drawing, in its own units; a phone shows them about as pixels
LEFT, RIGHT, TOP, BOTTOM = 48, 352, 8, 164  # of the field that the curves are in; long labels move its left side
DIGIT, GAP = 7, 5  # widths of a digit of a label, and between a label and the field
TICKS = 5  # at most, about
LIMIT = 1e100  # numbers beyond it are as good as infinite
POINTS = 240  # of a curve without errors, at most
SMOOTHED = 15  # a curve's moving average is over a part of its points this small


@dataclass(frozen=True)
class Curve:
    """The points of one run, by x. run: its number, which decides color and dashes. errors: half the width of a band
    around the points, NaN where it is unknown. None: no band, but a moving average over the points."""

    run: int
    name: str
    x: np.ndarray
    y: np.ndarray
    errors: np.ndarray | None = None


@dataclass(frozen=True)
class Point:
    """A point with what it says."""

    x: float
    y: float
    text: str


@dataclass(frozen=True)
class Drawn:
    """One curve's geometry; paths as SVG has them, "" where there is nothing to draw."""

    run: int
    line: str
    smooth: str
    band: str
    points: list[Point]


@dataclass(frozen=True)
class Tick:
    at: float
    label: str


@dataclass(frozen=True)
class Chart:
    """A drawing with its words and its numbers. left: where the field of the curves begins. rows: x and, for each
    curve, what it is there."""

    left: float
    title: str
    description: str
    curves: list[Drawn]
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    columns: list[str]
    rows: list[list[str]]


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Means of `width` neighbors, len(values) - width + 1 of them."""
    return np.convolve(values, np.ones(width) / width, "valid")


def format_number(value: float) -> str:
    """Four digits after the point, or as many significant ones where those would say little; "—" for none."""
    if not math.isfinite(value):
        return "—"
    small = value != 0 and abs(value) < 0.01
    return f"{value:.4g}" if small or abs(value) >= 1e5 else f"{value:.4f}"


def draw(title: str, curves: Sequence[Curve]) -> Chart | None:
    """The chart of some curves over the iterations; None if they have no point."""
    curves = [shown for curve in curves if len((shown := finite(curve)).x)]
    if not curves:
        return None
    ends = [end for curve in curves for end in (lower(curve), upper(curve))]
    y_scale = Scale.over(np.concatenate(ends), (BOTTOM, TOP), padding=0.06)
    y_ticks = y_scale.ticks()
    left = max(LEFT, GAP + DIGIT * max((len(tick.label) for tick in y_ticks), default=0))
    x_scale = Scale.over(np.concatenate([curve.x for curve in curves]), (left, RIGHT), padding=0.02)
    columns, rows = table(curves)
    return Chart(
        left,
        title,
        ". ".join(describe(curve) for curve in curves),
        [draw_curve(thinned(curve), x_scale, y_scale) for curve in curves],
        x_scale.ticks(whole=True),
        y_ticks,
        columns,
        rows,
    )


def finite(curve: Curve) -> Curve:
    """Without the points that cannot be drawn, and with errors of 0 where they are unknown."""
    kept = (abs(curve.x) < LIMIT) & (abs(curve.y) < LIMIT)  # false for NaN
    errors = None if curve.errors is None else np.where(abs(curve.errors) < LIMIT, curve.errors, 0.0)[kept]
    return Curve(curve.run, curve.name, curve.x[kept], curve.y[kept], errors)


def thinned(curve: Curve) -> Curve:
    """A curve without errors with few enough points to draw: means of neighbors."""
    if len(curve.x) <= POINTS or curve.errors is not None:
        return curve
    parts = np.array_split(np.arange(len(curve.x)), POINTS)
    x, y = (np.array([values[part].mean() for part in parts]) for values in (curve.x, curve.y))
    return Curve(curve.run, curve.name, x, y)


def lower(curve: Curve) -> np.ndarray:
    return curve.y if curve.errors is None else curve.y - curve.errors


def upper(curve: Curve) -> np.ndarray:
    return curve.y if curve.errors is None else curve.y + curve.errors


@dataclass(frozen=True)
class Scale:
    """Numbers between least and most to coordinates between start and end."""

    least: float
    most: float
    start: float
    end: float

    @classmethod
    def over(cls, values: np.ndarray, ends: tuple[float, float], padding: float) -> Scale:
        """That has room for all values; padding: as a part of their range."""
        least, most = float(values.min()), float(values.max())
        size, spread = max(abs(least), abs(most)), most - least
        room = size * 0.1 if size > 1 / LIMIT else 0.5  # of one value there is no range
        if spread > max(1e-9 * size, 1 / LIMIT):
            room = spread * padding
        return cls(least - room, most + room, *ends)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return self.start + (values - self.least) / (self.most - self.least) * (self.end - self.start)

    def ticks(self, whole: bool = False) -> list[Tick]:
        """At round numbers: 1, 2 or 5 times a power of ten apart. whole: at whole numbers alone."""
        apart = (self.most - self.least) / TICKS
        power = 10.0 ** math.floor(math.log10(apart))
        step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= apart * 0.999)
        step = max(step, 1.0) if whole else step
        digits = max(0, -math.floor(math.log10(step)))
        values = np.arange(math.ceil(self.least / step), math.floor(self.most / step) + 1) * step
        values = values[values >= 0] if whole else values
        largest = max(abs(self.least), abs(self.most))
        significant = max(1, math.floor(math.log10(largest)) - math.floor(math.log10(step)) + 1)  # tell neighbors apart
        fixed = step < 1e5 and (step > 1e-4 or largest > 1000 * step)
        label = f"{{:.{digits}f}}" if fixed else f"{{:.{significant}g}}"
        return [
            Tick(round(float(at), 1), label.format(value + 0.0)) for value, at in zip(values, self(values), strict=True)
        ]  # + 0.0: no "-0"


def draw_curve(curve: Curve, x_scale: Scale, y_scale: Scale) -> Drawn:
    x, y = x_scale(curve.x), y_scale(curve.y)
    width = max(1, len(y) // SMOOTHED) if curve.errors is None else 1
    smooth = ""
    if width > 1:
        # An average stands in the middle of what it is over.
        smooth = path(moving_average(x, width), moving_average(y, width))
    band = ""
    if curve.errors is not None and curve.errors.any():
        low, high = y_scale(lower(curve)), y_scale(upper(curve))
        edge = 2.0 if len(x) == 1 else 0.0  # one point has a band too
        there, back = x.copy(), x.copy()
        if edge:
            there, low, high = np.array([x[0] - edge, x[0] + edge]), low.repeat(2), high.repeat(2)
            back = there
        band = path(np.concatenate([there, back[::-1]]), np.concatenate([high, low[::-1]])) + "Z"
    points = []
    if curve.errors is not None or len(x) == 1:
        texts = [f"{curve.name}, iteration {at:g}: {value}" for at, value in zip(curve.x, said(curve), strict=True)]
        places = zip(x.tolist(), y.tolist(), texts, strict=True)
        points = [Point(round(px, 1), round(py, 1), text) for px, py, text in places]
    return Drawn(curve.run, path(x, y), smooth, band, points)


def path(x: np.ndarray, y: np.ndarray) -> str:
    return "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in zip(x, y, strict=True))


def said(curve: Curve) -> list[str]:
    """What the points are, in digits."""
    if curve.errors is None:
        return [format_number(value) for value in curve.y]
    found = zip(curve.y, curve.errors, strict=True)
    return [format_number(value) + (f" ± {format_number(error)}" if error else "") for value, error in found]


def describe(curve: Curve) -> str:
    """A sentence that tells where a curve begins and ends, without its full stop."""
    if len(curve.x) == 1:
        return f"{curve.name}: {said(curve)[0]} at iteration {curve.x[0]:g}"
    first, last = (f"{format_number(curve.y[i])} at iteration {curve.x[i]:g}" for i in (0, -1))
    least, most = format_number(curve.y.min()), format_number(curve.y.max())
    return f"{curve.name}: from {first} to {last}, between {least} and {most}"


TENTHS = 10


def table(curves: Sequence[Curve]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the curves' numbers: all points of those with errors, means of tenths of the others."""
    columns = ["iteration", *(curve.name for curve in curves)]
    if all(curve.errors is not None for curve in curves):
        cells: dict[float, list[str]] = {at: ["—"] * len(curves) for at in sorted({x for c in curves for x in c.x})}
        for number, curve in enumerate(curves):
            for at, text in zip(curve.x, said(curve), strict=True):
                cells[at][number] = text
        return columns, [[f"{at:g}", *texts] for at, texts in cells.items()]
    return columns, list(tenths(curves))


def tenths(curves: Sequence[Curve]) -> Iterator[list[str]]:
    """A row for each tenth of the iterations that some curve has a point in."""
    everything = np.concatenate([curve.x for curve in curves])
    first, last = everything.min(), everything.max()
    edges = np.unique(np.round(np.linspace(first, last + 1, min(TENTHS, int(last - first) + 1) + 1)))
    for begin, end in pairwise(edges):
        inside = [curve.y[(begin <= curve.x) & (curve.x < end)] for curve in curves]
        if any(map(len, inside)):
            label = f"{begin:g}" if end - begin == 1 else f"{begin:g} to {end - 1:g}"
            yield [label, *(format_number(values.mean()) if len(values) else "—" for values in inside)]
