"""The report of a study: one picture, and one page with it, in HTML and for a document in Markdown."""

from __future__ import annotations

import base64
import math
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import jinja2
import matplotlib.pyplot as plt
import numpy as np

from star import config as configuration
from star import files
from star.study import intervals
from star.study.intervals import SUMMARIES, Difference, Estimate
from star.study.results import Results
from star.study.spec import Study

METRIC = "reward"  # of the curves; the tables have all scores
LABELS = {
    "final": f"at the end (mean of the last {intervals.LAST} scorings)",
    "area": "mean over the run (area under the curve)",
}


@dataclass(frozen=True)
class Table:
    """A heading, the columns' names and rows of cells, all text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def _interval(estimate: Estimate, sign: bool = False) -> str:
    ends = (number(x, sign=sign) for x in (estimate.low, estimate.high))
    return f"{number(estimate.mean, sign=sign)} [{', '.join(ends)}]"


def score_tables(results: Results) -> list[Table]:
    """Scores by category, for each metric at the end and over the run."""
    names = results.category_names()
    tables = []
    for metric in results.metrics:
        for summary in SUMMARIES:
            rows = []
            for arm in results.arms:
                cells = []
                for category in names:
                    values = intervals.summarize(results.of(metric, arm, category), results.iterations, summary)
                    whole = category is None
                    cells.append(
                        _interval(intervals.interval(values, results.prompts)) if whole else number(values.mean())
                    )
                rows.append([arm, str(len(values)), *cells])
            columns = ["arm", "seeds", *((name or "all").replace("_", " ") for name in names)]
            tables.append(Table(f"{metric} {LABELS[summary]}", columns, rows))
    return tables


def _difference(found: Difference | None) -> list[str]:
    if found is None:
        return ["-", "-", "-"]
    text = _interval(found.estimate, sign=True)
    return [f"{text} *" if found.shown else text, number(found.p), f"{found.better}/{found.seeds}"]


def difference_table(results: Results, other: str) -> Table:
    rows = []
    for arm in results.arms:
        steps = intervals.iterations_to_reach(results, arm, other)
        reached = "never" if steps is None else number(steps, 0)
        if arm == other:
            rows.append([arm, *["-"] * 6, reached])
            continue
        cells = [arm]
        for metric in results.metrics:
            for summary in SUMMARIES:
                found = _difference(intervals.difference(results, arm, other, metric, summary))
                cells += found if (metric, summary) == (METRIC, "final") else found[:1]
        rows.append([*cells, reached])
    heads = [f"{metric}, {summary}" for metric in results.metrics for summary in SUMMARIES]
    columns = ["arm", heads[0], "p", "seeds ahead", *heads[1:], f"iterations to {other}'s final score"]
    return Table(f"difference to {other}, paired by seed and prompt", columns, rows)


def category_differences(results: Results, other: str) -> Table | None:
    names = [name for name in results.category_names() if name]
    if not names:
        return None
    rows = []
    for arm in results.arms:
        if arm != other:
            found = [intervals.difference(results, arm, other, METRIC, "final", name) for name in names]
            rows.append([arm, *(_difference(one)[0] for one in found)])
    return Table(f"{METRIC} at the end: difference to {other}, by category", ["arm", *names], rows)


def logged_table(results: Results) -> Table:
    digits = {
        "weights_concentration": 3,
        "reward": 4,
        "grad_norm": 4,
        "update_norm": 5,
        "clip_fraction": 3,
        "seconds": 2,
    }
    rows = [
        [arm, *(number(results.logged[arm].get(name), places) for name, places in digits.items())]
        for arm in results.arms
    ]
    columns = ["arm", "concentration of the weights", *(name.replace("_", " ") for name in list(digits)[1:])]
    return Table("means over the iterations", columns, rows)


def tables(study: Study, results: Results) -> list[Table]:
    others = [name for name in study.baselines if name in results.arms and len(results.arms) > 1]
    found = [difference_table(results, other) for other in others]
    found += [category_differences(results, other) for other in others[:1]]
    return [table for table in [*found, *score_tables(results), logged_table(results)] if table is not None]


def curve_bands(results: Results, arm: str) -> np.ndarray:
    """(3, E): mean, lower and upper end at each iteration."""
    scores = results.of(METRIC, arm)
    found = [intervals.interval(scores[:, e], results.prompts) for e in range(len(results.iterations))]
    return np.array([(one.mean, one.low, one.high) for one in found]).T


def picture(study: Study, results: Results, path: Path) -> None:
    """Curves with bands, one panel for each arm beside the baseline, and the paired differences at the end."""
    baseline = study.baselines[0]
    arms = [arm for arm in results.arms if arm != baseline] or results.arms
    columns = min(4, len(arms))
    rows = math.ceil(len(arms) / columns)
    figure = plt.figure(figsize=(3.1 * columns + 0.6, 2.4 * rows + 0.6 + 0.3 * len(arms)), layout="constrained")
    upper, lower = figure.subfigures(2, 1, height_ratios=(2.4 * rows, 0.6 + 0.3 * len(arms)))
    panels = upper.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    bands = {name: curve_bands(results, name) for name in results.arms}
    for arm, axes in zip(arms, panels.flat, strict=False):
        for name, color in dict(((baseline, "0.45"), (arm, "tab:blue"))).items():
            if name not in results.arms:
                continue
            mean, low, high = bands[name]
            axes.plot(results.iterations, mean, color=color, linewidth=1.8)
            axes.fill_between(results.iterations, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_title(arm, fontsize=9, color="tab:blue")
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels.flat[len(arms) :]:
        axes.axis("off")
    upper.supylabel(f"held-out {METRIC}", fontsize=9)
    upper.suptitle(f"gray: {baseline}; bands: {intervals.CONFIDENCE:.0%} over seeds and prompts", fontsize=9)
    axes = lower.subplots()
    for y, arm in enumerate(arms):
        found = None if baseline not in results.arms else intervals.difference(results, arm, baseline)
        if found is not None:
            estimate = found.estimate
            axes.plot([estimate.low, estimate.high], [y, y], color="tab:blue", linewidth=2)
            face = "tab:blue" if found.shown else "white"
            axes.plot(estimate.mean, y, "o", color="tab:blue", markerfacecolor=face, markersize=5)
    axes.axvline(0, color="0.45", linewidth=1)
    axes.set_yticks(range(len(arms)), arms, fontsize=8)
    axes.set_ylim(len(arms) - 0.5, -0.5)
    axes.set_xlabel(f"{METRIC} at the end, difference to {baseline}; filled: shown by interval and t-test", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def notes(results: Results) -> list[str]:
    """What the tables must be read with."""
    rows, distinct = len(results.prompts), len(np.unique(results.prompts))
    seeds = sorted(set().union(*results.scores[METRIC].values()))
    texts = [
        f"Seeds {', '.join(map(str, seeds))}; {results.iterations[-1]} iterations, scored {len(results.iterations)} "
        f"times on {rows} held-out images of {distinct} prompts.",
        "Brackets: 95 % intervals, bootstrap over seeds and prompts at once (of one seed: over prompts alone). "
        "p: t-test over the seeds. *: both say that there is a difference. With few seeds the bootstrap alone is too "
        "sure of itself; no correction is made for the number of comparisons. Seconds are of runs side by side.",
    ]
    if results.missing:
        absent = {}
        for name in results.missing:
            arm, _, seed = name.rpartition("-")
            absent.setdefault(arm, []).append(seed)
        some = [f"{arm} {' '.join(found)}" for arm, found in absent.items() if arm in results.arms]
        whole = [arm for arm in absent if arm not in results.arms]
        if some:
            texts.append(f"Not finished and left out, by seed: {', '.join(some)}.")
        if whole:
            texts.append(f"Not finished with any seed: {', '.join(whole)}.")
    return texts


def markdown(found: list[Table], results: Results) -> str:
    return "\n\n".join([*notes(results), *(table.markdown() for table in found)]) + "\n"


def write(study: Study, results: Results, out: Path) -> str:
    """Write report.png, report.html and report.md into `out`. Returns the Markdown."""
    found = tables(study, results)
    picture(study, results, out / "report.png")
    text = markdown(found, results)
    environment = jinja2.Environment(loader=jinja2.PackageLoader("star.study", "."), autoescape=True)
    html = environment.get_template("page.html").render(
        title=out.name,
        notes=notes(results),
        tables=found,
        picture=base64.b64encode((out / "report.png").read_bytes()).decode(),
        arms={arm: configuration.to_dict(study.arms[arm]) for arm in results.arms},
        study=configuration.to_dict(study),
    )
    files.replace_text(out / "report.html", html)
    files.replace_text(out / "report.md", text)
    return text
