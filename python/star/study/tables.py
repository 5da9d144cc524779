"""The tables of a study's report, as text. Arms with one seed have tables of their own, for they prove nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from star.study import intervals
from star.study.intervals import SUMMARIES, Difference, Estimate
from star.study.results import Results
from star.study.spec import Study

METRIC = "reward"  # of the curves; the tables have all scores
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
        return f"**{self.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


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


def report_tables(study: Study, results: Results) -> list[Table]:
    """All tables; the first one is the answer. Those of arms with one seed come last."""
    tables = _tables_of(study, results, results.replicated())
    pilots = _tables_of(study, results, [arm for arm in results.arms if arm not in results.replicated()])
    return tables + [Table(f"{PILOTS}; {table.title}", table.columns, table.rows) for table in pilots]


def _tables_of(study: Study, results: Results, arms: Sequence[str]) -> list[Table]:
    baselines = [name for name in study.baselines if name in results.arms]
    tables = [difference_table(results, arms, baseline) for baseline in baselines]
    tables += [category_differences(results, arms, baseline) for baseline in baselines[:1]]
    tables += score_tables(results, arms)
    tables += [logged_table(results, arms)]
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
    columns = ["arm", "seeds", *((name or "all").replace("_", " ") for name in categories)]
    return Table(f"{metric} {LABELS[summary]}", columns, rows)


def difference_table(results: Results, arms: Sequence[str], baseline: str) -> Table:
    """Every metric's difference to a baseline. No rows if there is no other arm."""
    columns = ["arm", f"{METRIC}, final", "p", "seeds ahead"]
    others = [(metric, summary) for metric in results.metrics for summary in SUMMARIES]
    others.remove((METRIC, "final"))
    columns += [f"{metric}, {summary}" for metric, summary in others]
    columns += [f"iterations to {baseline}'s final score"]
    rows = []
    for arm in arms:
        if arm == baseline:
            cells = ["-"] * (len(columns) - 2)
        else:
            cells = format_difference(intervals.difference(results, arm, baseline, METRIC, "final"))
            for metric, summary in others:
                cells += format_difference(intervals.difference(results, arm, baseline, metric, summary))[:1]
        iterations = intervals.iterations_to_reach(results, arm, baseline)
        rows.append([arm, *cells, "never" if iterations is None else format_number(iterations, 0)])
    title = f"difference to {baseline}, paired by seed and prompt"
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


def logged_table(results: Results, arms: Sequence[str]) -> Table:
    rows = [
        [arm, *(format_small(results.logged[arm].get(name), digits) for name, digits in LOGGED_DIGITS.items())]
        for arm in arms
    ]
    columns = ["arm", "concentration of the weights", *(name.replace("_", " ") for name in list(LOGGED_DIGITS)[1:])]
    return Table("means over the iterations", columns, rows)
