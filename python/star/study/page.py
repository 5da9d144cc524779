"""The report of a study: one page with its figure and its tables, in HTML and, for a document, in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from star import config as configuration
from star import files
from star.reports import gallery, page
from star.study import drift, figure, prediction
from star.study.results import METRIC, Results
from star.study.spec import Study
from star.study.tables import Table, report_tables


def write(study: Study, results: Results, out: Path) -> str:
    """Write report.png, report.html and report.md into `out`. Returns the Markdown."""
    drifts = drift.load(study, results, out)
    tables = report_tables(study, results, drifts)
    notes = (
        reading_notes(results)
        + judge_notes(study, results)
        + drift.notes(drifts)
        + prediction.notes(study, results, out)
    )
    figure.draw(results, study.baselines[0], out / "report.png")
    text = markdown(tables, notes)
    values = {
        "generator": "star compare",
        "title": out.name,
        "notes": notes,
        "tables": tables,
        "figure": gallery.data_url((out / "report.png").read_bytes(), "png"),
        "arms": {arm: configuration.to_dict(study.arms[arm]) for arm in results.arms},
        "study": configuration.to_dict(study),
    }
    files.replace_text(out / "report.html", page.render(Path(__file__).parent, "page.html", values))
    files.replace_text(out / "report.md", text)
    return text


def markdown(tables: Sequence[Table], notes: Sequence[str]) -> str:
    return "\n\n".join([*notes, *(table.markdown() for table in tables)]) + "\n"


def judge_notes(study: Study, results: Results) -> list[str]:
    """That an arm is scored by another reward than those it is compared with."""
    own = [f"{arm} ({reward})" for arm, reward in study.own_judges().items() if arm in results.arms]
    return [f"Scored by a reward of its own, so that only equal rewards compare: {', '.join(own)}."] if own else []


def reading_notes(results: Results) -> list[str]:
    """What a reader of the tables must know."""
    images, distinct = len(results.prompts), len(np.unique(results.prompts))
    seeds = sorted(set().union(*results.scores[METRIC].values()))
    notes = [
        f"Seeds {', '.join(map(str, seeds))}; {results.iterations[-1]} iterations, scored {len(results.iterations)} "
        f"times on {images} held-out images of {distinct} prompts.",
        "Brackets: 95 % intervals, bootstrap over seeds and prompts at once (of one seed: over prompts alone). "
        "p: t-test over the seeds. *: both say that there is a difference. With few seeds the bootstrap alone is too "
        "sure of itself; no correction is made for the number of comparisons. Seconds are of runs side by side.",
    ]
    if results.left_out:
        total = images + results.left_out
        notes.append(
            f"Left out everywhere: {results.left_out} of {total} held-out images, whose reward failed in some scoring "
            "of some run."
        )
    absent = defaultdict(list)
    for run in results.missing:
        arm, _, seed = run.rpartition("-")
        absent[arm].append(seed)
    partly = [f"{arm} {' '.join(names)}" for arm, names in absent.items() if arm in results.arms]
    wholly = [arm for arm in absent if arm not in results.arms]
    if partly:
        notes.append(f"Not finished and left out, by seed: {', '.join(partly)}.")
    if wholly:
        notes.append(f"Not finished with any seed: {', '.join(wholly)}.")
    return notes
