"""`star report`: one self-contained HTML page of one or several runs, with scores, images, curves and what differs."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import jinja2
import numpy as np

from star import files
from star.reports import chart, gallery, runs
from star.reports.chart import Chart, Curve
from star.reports.commands import installed_version
from star.reports.metrics import MEANING, meaning, patterns
from star.reports.runs import Run

HERE = Path(__file__).parent
GENERATOR = "star report"
DRAWN = 24  # categories that have a chart of their own


def render(folder: Path, template: str, values: Mapping[str, object]) -> str:
    """A page from a template in a folder, which may extend base.html."""
    loader = jinja2.FileSystemLoader([folder, HERE])
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.globals["drawing"] = chart  # its sizes stand there alone
    text = environment.get_template(template).render(values)
    return text.encode(errors="backslashreplace").decode()  # half a surrogate pair is no text


@dataclass(frozen=True)
class Score:
    """A held-out score: its chart over all prompts, those by category, and its table."""

    name: str
    whole: Chart | None
    parts: list[tuple[str, Chart]]
    rows: list[list[str]]


def order(name: str) -> tuple[int, str]:
    """A metric's rank: that of its documentation."""
    ranks = list(MEANING)
    pattern = name if name in MEANING else next(patterns(name), None)
    return (len(ranks) if pattern is None else ranks.index(pattern)), name


def metric_curve(name: str, run: Run) -> Curve:
    """A metric over the iterations."""
    points = [(line["iteration"] + 1, line[name]) for line in run.metrics if name in line]
    x, y = np.array(points, dtype=float).reshape(-1, 2).T
    return Curve(run.number, run.name, x, y)


def held_out_curve(column: str, category: str | None, run: Run) -> Curve:
    """A held-out score over the scorings, with its standard error."""
    scorings = [one for one in run.evaluations if one.iteration is not None and column in one.values]
    means = [one.mean(column, category) for one in scorings]
    points = [(one.iteration, mean.mean, mean.standard_error) for one, mean in zip(scorings, means, strict=True)]
    x, y, errors = np.array(points, dtype=float).reshape(-1, 3).T
    return Curve(run.number, run.name, x, y, errors)


def categories(found: Sequence[Run]) -> list[str]:
    """The known ones of all runs, in the order of the prompts."""
    return list(dict.fromkeys(name for run in found for one in run.evaluations for name in one.category_names()))


def counted(category: str, found: Sequence[Run]) -> str:
    """How many prompts a category has."""
    counts = sorted({int(run.evaluations[-1].is_of(category).sum()) for run in found if run.evaluations})
    return f"{' or '.join(map(str, counts))} prompt{'s'[: counts != [1]]}"


def score(column: str, found: Sequence[Run]) -> Score:
    names = categories(found)
    whole = chart.draw(f"held-out {column}", [held_out_curve(column, None, run) for run in found])
    parts = []
    for name in names[:DRAWN]:
        curves = [held_out_curve(column, name, run) for run in found]
        drawn = chart.draw(f"held-out {column}, {name}", curves)
        if drawn is not None:
            parts.append((f"{name}, {counted(name, found)}", drawn))
    rows = []
    for category in (None, *names):
        cells = [runs.held_out(run.evaluation("before"), run.evaluation("after"), column, category) for run in found]
        if any(cell != "—" for cell in cells):
            rows.append([column, category or "all prompts", *cells, *runs.to_first(found, column, category)])
    return Score(column, whole, parts, rows)


def metric_charts(found: Sequence[Run]) -> list[tuple[str, str, Chart]]:
    """Name, meaning and chart of every metric, in the order of the documentation."""
    logged = sorted({key for run in found for line in run.metrics for key in line} - {"iteration"}, key=order)
    drawn = [(name, chart.draw(name, [metric_curve(name, run) for run in found])) for name in logged]
    return [(name, meaning(name), one) for name, one in drawn if one is not None]


def distinct(paths: Sequence[Path]) -> list[Path]:
    """Without folders that come again."""
    first: dict[Path, Path] = {}
    for path in paths:
        first.setdefault(path.resolve(), path)
    return list(first.values())


class _Generator(HTMLParser):
    """What a page says in its head that it was made by; None: nothing. The words of its body do not count."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.name: str | None = None
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag == "meta" and self._open == ["html", "head"] and values.get("name") == "generator":
            self.name = values.get("content")
        elif tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            del self._open[self._open.index(tag) :]


def is_page(beginning: bytes) -> bool:
    """Whether a file that begins with these bytes is a page of this command."""
    return _Generator(beginning.decode(errors="replace")).name == GENERATOR


def write(paths: Sequence[Path], out: Path) -> None:
    """Write the page of the runs in `paths`, over nothing but an earlier page. Raises ValueError for a folder that is
    no run, and for an `out` that is something else."""
    paths = distinct(paths)
    found = [runs.read(path, name, i) for i, (path, name) in enumerate(zip(paths, runs.names(paths), strict=True))]
    files.claim(out, "out", "page of star report", is_page)  # which makes the folder: not for what is no run
    columns = list(dict.fromkeys(column for run in found for one in run.evaluations for column in one.values))
    facts = [runs.facts(run) for run in found]
    known = dict.fromkeys(key for own in facts for key in own)
    differing, lacking = runs.differences(found)
    galleries = gallery.galleries(found)
    values = {
        "generator": GENERATOR,
        "title": ", ".join(run.name for run in found),
        "version": installed_version(),
        "command": shlex.join(["star", "report", *map(str, paths), "--out", str(out)]),
        "runs": found,
        "facts": [[key, *(own.get(key, "—") for own in facts)] for key in known],
        "gaps": [(run, said) for run in found if (said := runs.gaps(run))],
        "scores": [score(column, found) for column in columns],
        "categories": categories(found),
        "drawn": DRAWN,
        "paired": runs.paired(found),
        "differing": [[key, *row] for key, row in differing.items()],
        "lacking": [[key, *row] for key, row in lacking.items()],
        "galleries": galleries,
        "most": max((len(one.choices) for own in galleries for one in own.examples), default=0),
        "figures": [(run, own) for run in found if (own := figures(run))],
        "curves": metric_charts(found),
        "provenance": [(run, runs.provenance(run)) for run in found],
    }
    text = render(HERE, "page.html", values)
    files.replace_text(out, text)


def figures(run: Run) -> list[tuple[str, str]]:
    """Caption and data of what a run drew itself; images before and after are in the gallery, if they are kept."""
    left_out = runs.BEFORE_AFTER if run.shown.images["after"] else None
    drawn = [(caption, data) for caption, data in [*run.figures, *run.grids] if caption != left_out]
    return [(caption, gallery.data_url(data, "png")) for caption, data in drawn]
