"""Tables for the terminal."""

from __future__ import annotations

import numpy as np
from rich.markup import escape
from rich.table import Table

from star.messages import one_line
from star.reports.evaluations import Evaluation, format_error


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    """Scores by category; the last row is the mean over the categories, as GenEval reports it."""

    def cells(category: str | None) -> list[str]:
        means = [evaluation.mean(column, category) for column in evaluation.values]
        return [str(means[0].prompts), *(f"{mean.mean:.4f}{format_error(mean.standard_error)}" for mean in means)]

    table = Table("category", "prompts", *map(_shown, evaluation.values), title=_shown(title))
    categories = evaluation.category_names()
    for category in categories:
        table.add_row(_shown(category), *cells(category))
    table.add_section()
    table.add_row("all prompts", *cells(None))
    if len(categories) > 1:
        over = [np.mean([evaluation.mean(column, c).mean for c in categories]) for column in evaluation.values]
        table.add_row("mean of categories", "", *(f"{value:.4f}" for value in over))
    table.caption = "± one standard error over prompts"
    if evaluation.failed:
        table.caption += f"; {evaluation.failed} of {evaluation.images} images have no reward"
    return table


def _shown(name: str) -> str:
    """A name from a prompt file or a reward, which must neither be markup nor steer the terminal."""
    return escape(one_line(name))
