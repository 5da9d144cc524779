"""The tables of a study's report, as text. Arms with one seed have tables of their own, for they prove nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from star.study import drift as drifting
from star.study import intervals
from star.study.drift import Drift
from star.study.intervals import SUMMARIES, Difference, Estimate
from star.study.results import METRIC, Results
from star.study.spec import Study

PILOTS = "pilots, one seed: no evidence"
LABELS = {
    "final": f"at the end (mean of the last {intervals.LAST} scorings)",
    "area": "mean over the run (area under the curve)",
}
LOGGED_DIGITS = {
    "weights_concentration": 3,
    "reward": 4,
    "grad_norm": 4,
    "update_norm": 5,
    "clip_fraction": 3,
    "seconds": 2,
}


@dataclass(frozen=True)
class Table:
    """A heading, the columns' names and rows of cells, all text."""

    title: str
    columns: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]  # it would end its column
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def format_number(value: float | None, digits: int = 3, sign: bool = False) -> str:
    """A number with its digits after the point; "-" for one that is unknown or not finite."""
    if value is None or not math.isfinite(value):
        return "-"
    return f"{value:{'+' if sign else ''}.{digits}f}"


def format_small(value: float | None, digits: int) -> str:
    """As `format_number`, but a number that would be all zeros keeps two significant digits."""
    if value and math.isfinite(value) and abs(value) < 0.5 * 10**-digits:
        return f"{value:.1e}"
    return format_number(value, digits)


def format_estimate(estimate: Estimate, sign: bool = False) -> str:
    low, high = (format_number(end, sign=sign) for end in (estimate.low, estimate.high))
    return f"{format_number(estimate.mean, sign=sign)} [{low}, {high}]"


def format_images(estimate: Estimate | None) -> str:
    """How many images, "never" where they are infinitely many."""
    if estimate is None:
        return "-"
    ends = (estimate.mean, estimate.low, estimate.high)
    mean, low, high = ("never" if math.isinf(end) else "-" if math.isnan(end) else f"{end:,.0f}" for end in ends)
    return mean if mean == low == high == "never" else f"{mean} [{low}, {high}]"


def format_difference(difference: Difference | None) -> list[str]:
    """Its estimate, its p and the seeds ahead."""
    if difference is None:
        return ["-", "-", "-"]
    text = format_estimate(difference.estimate, sign=True)
    return [
        f"{text} *" if difference.significant else text,
        format_number(difference.p),
        f"{difference.better}/{difference.seeds}",
    ]


def report_tables(study: Study, results: Results, drift: Drift) -> list[Table]:
    """All tables; the first one is the answer. Those of arms with one seed come last."""
    tables = _tables_of(study, results, drift, results.replicated())
    pilots = _tables_of(study, results, drift, [arm for arm in results.arms if arm not in results.replicated()])
    return tables + [Table(f"{PILOTS}; {table.title}", table.columns, table.rows) for table in pilots]


def _tables_of(study: Study, results: Results, drift: Drift, arms: Sequence[str]) -> list[Table]:
    baselines = [name for name in study.baselines if name in results.arms]
    tables = [difference_table(results, arms, baseline) for baseline in baselines]
    tables += [category_differences(results, arms, baseline) for baseline in baselines[:1]]
    tables += [drift_differences(results, drift, arms, baseline) for baseline in baselines[:1]]
    tables += [drift_table(results, drift, arms)]
    tables += score_tables(results, arms)
    tables += [run_table(results, arms), logged_table(results, arms)]
    return [table for table in tables if table.rows]


def score_tables(results: Results, arms: Sequence[str]) -> list[Table]:
    """Scores by category, for each metric at the end and over the run."""
    return [score_table(results, arms, metric, summary) for metric in results.metrics for summary in SUMMARIES]


def score_table(results: Results, arms: Sequence[str], metric: str, summary: str) -> Table:
    categories = results.category_names()
    rows = []
    for arm in arms:
        cells = []
        for category in categories:
            values = intervals.summarize(results.curves(metric, arm, category), results.iterations, summary)
            if category is None:
                cells.append(format_estimate(intervals.interval(values, results.prompts)))
            else:
                cells.append(format_number(values.mean()))
        rows.append([arm, str(results.seed_count(arm)), *cells])
    columns = ["arm", "seeds", *_spaced(name or "all" for name in categories)]
    return Table(f"{metric} {LABELS[summary]}", columns, rows)


def run_table(results: Results, arms: Sequence[str]) -> Table:
    """What each run scored at the end, for tests of the reader's own."""
    seeds = sorted({seed for arm in arms for seed in results.scores[METRIC][arm]})
    rows = [[arm, *(_run_cell(results, arm, seed) for seed in seeds)] for arm in arms]
    title = f"each run at the end: {' / '.join(results.metrics)}"
    return Table(title, ["arm", *(f"seed {seed}" for seed in seeds)], rows)


def _run_cell(results: Results, arm: str, seed: int) -> str:
    if seed not in results.scores[METRIC][arm]:
        return "-"
    curves = [results.curves(metric, arm, None, [seed]) for metric in results.metrics]
    return " / ".join(
        format_number(intervals.summarize(curve, results.iterations, "final").mean(), digits=4) for curve in curves
    )


def difference_table(results: Results, arms: Sequence[str], baseline: str) -> Table:
    """Every metric's difference to a baseline. No rows if there is no other arm."""
    columns = ["arm", f"{METRIC}, final", "p", "seeds ahead"]
    others = [(metric, summary) for metric in results.metrics for summary in SUMMARIES]
    others.remove((METRIC, "final"))
    columns += [f"{metric}, {summary}" for metric, summary in others]
    columns += [f"images to {baseline}'s final score"]
    rows = []
    for arm in arms:
        if arm == baseline:
            cells = ["-"] * (len(columns) - 2)
        else:
            cells = format_difference(intervals.difference(results, arm, baseline, METRIC, "final"))
            for metric, summary in others:
                cells += format_difference(intervals.difference(results, arm, baseline, metric, summary))[:1]
        rows.append([arm, *cells, format_images(intervals.images_to_reach(results, arm, baseline))])
    title = f"difference to {baseline} at equal images, paired by seed and prompt"
    return Table(title, columns, rows if set(arms) - {baseline} else [])


def category_differences(results: Results, arms: Sequence[str], baseline: str) -> Table:
    """The final reward's difference to a baseline by category. No rows if there are no categories or no other arm."""
    names = [name for name in results.category_names() if name]
    rows = [
        [
            arm,
            *(
                format_difference(intervals.difference(results, arm, baseline, METRIC, "final", name))[0]
                for name in names
            ),
        ]
        for arm in arms
        if arm != baseline
    ]
    return Table(f"{METRIC} at the end: difference to {baseline}, by category", ["arm", *names], rows if names else [])


def drift_differences(results: Results, drift: Drift, arms: Sequence[str], baseline: str) -> Table:
    """What arms changed that no prompt names, against a baseline at the same score. No rows if nothing was measured or
    there is no other arm."""
    rows = [
        [
            arm,
            *(
                format_difference(drifting.at_equal_score(results, drift, name, arm, baseline))[0]
                for name in drift.values
            ),
        ]
        for arm in arms
        if arm != baseline and arm in drift.iterations
    ]
    return Table(f"drift at equal score: difference to {baseline}", ["arm", *_spaced(drift.values)], rows)


def drift_table(results: Results, drift: Drift, arms: Sequence[str]) -> Table:
    """What arms changed in the end that no prompt names. No rows if nothing was measured."""
    rows = [
        [
            arm,
            str(results.seed_count(arm)),
            *(
                format_estimate(drifting.at_the_end(drift, name, arm), sign=name == "diversity")
                for name in drift.values
            ),
        ]
        for arm in arms
        if arm in drift.iterations
    ]
    title = "drift at the end, from the untrained model's images of the same prompts and noise"
    return Table(title, ["arm", "seeds", *_spaced(drift.values)], rows)


def _spaced(names: Iterable[str]) -> list[str]:
    return [name.replace("_", " ") for name in names]


def logged_table(results: Results, arms: Sequence[str]) -> Table:
    rows = [
        [arm, *(format_small(results.logged[arm].get(name), digits) for name, digits in LOGGED_DIGITS.items())]
        for arm in arms
    ]
    columns = ["arm", "concentration of the weights", *_spaced(list(LOGGED_DIGITS)[1:])]
    return Table("means over the iterations", columns, rows)
