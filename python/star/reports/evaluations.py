"""evaluations.jsonl: the scores of a policy on held-out prompts, one line for each scoring.

The first line of a run is the policy before training, the last one the policy after it.

    {"iteration": 30, "images": 512, "failed": 0,
     "scores": {"all": {"reward": {"mean": 0.74, "standard_error": 0.01, "prompts": 512}, ...}, "counting": ...},
     "categories": [...], "values": {"reward": [...], ...}}

`categories` and `values` have an entry for each prompt, in the order of the prompts: paired intervals need them. A
value is the mean over the prompt's images; null stands for a reward that failed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from star import files

FILE = "evaluations.jsonl"
DIGITS = 5
LARGEST = 1e100


class Mean(NamedTuple):
    """Over prompts. standard_error: NaN for a single prompt; mean too if no prompt has a value."""

    mean: float
    standard_error: float
    prompts: int


def format_error(standard_error: float | None, digits: int = 4) -> str:
    """ " ± 0.0123", to stand behind a mean; nothing where the error is unknown: None or NaN."""
    return "" if standard_error is None or math.isnan(standard_error) else f" ± {standard_error:.{digits}f}"


@dataclass(frozen=True)
class Evaluation:
    """One scoring of P prompts.

    iteration: of the run, None outside of one. categories: (P,) kinds of prompts, None where unknown. values: by column
    (P,) the mean over each prompt's images, NaN where it has none; "reward" is always there. images, failed: how many
    there are, and how many of them have no reward.
    """

    iteration: int | None
    categories: tuple[str | None, ...]
    values: dict[str, np.ndarray]
    images: int
    failed: int

    def category_names(self) -> list[str]:
        """The known categories, in the order of the prompts."""
        return list(dict.fromkeys(name for name in self.categories if name is not None))

    def is_of(self, category: str | None) -> np.ndarray:
        """(P,) whether a prompt is of a category; None stands for all prompts."""
        return np.array([category in (None, name) for name in self.categories], dtype=bool)

    def mean(self, column: str, category: str | None = None) -> Mean:
        """Mean of a column over the prompts of a category; None stands for all prompts.

        Images of a prompt are no independent draws: the mean is over the prompts' means, and so is its error.
        """
        values = self.values[column][self.is_of(category)]
        values = values[np.isfinite(values)]
        if not len(values):
            return Mean(math.nan, math.nan, 0)
        error = values.std(ddof=1) / len(values) ** 0.5 if len(values) > 1 else math.nan
        return Mean(float(values.mean()), float(error), len(values))

    def line(self) -> dict:
        """The line of evaluations.jsonl."""
        groups = {"all": None, **{name: name for name in self.category_names()}}
        return {
            "iteration": self.iteration,
            "images": self.images,
            "failed": self.failed,
            "scores": {
                label: {
                    column: {key: _rounded(value) for key, value in self.mean(column, category)._asdict().items()}
                    for column in self.values
                }
                for label, category in groups.items()
            },
            "categories": list(self.categories),
            "values": {column: [_rounded(value) for value in values] for column, values in self.values.items()},
        }


def _rounded(value: float) -> float | int | None:
    if isinstance(value, int):
        return value
    return round(float(value), DIGITS) if math.isfinite(value) else None


def parse_line(line: dict) -> Evaluation:
    """An Evaluation from its line, also from a line of version 0.1, whose columns were `soft` and `strict`. Raises
    KeyError, TypeError, ValueError or AttributeError for something else."""
    if "values" in line:
        columns = line["values"]
        images, failed = line["images"], line["failed"]
    else:
        columns = {"reward": line["soft"], "strict": line["strict"]}
        images, failed = len(line["soft"]), 0
    categories, iteration = line["categories"], line["iteration"]
    if not isinstance(categories, list) or not all(name is None or isinstance(name, str) for name in categories):
        raise TypeError("categories that are no names")
    values = {name: _column(column, len(categories)) for name, column in columns.items()}
    if "reward" not in values:
        raise ValueError("no reward")
    counts = (images, failed, 0 if iteration is None else iteration)
    if not all(map(files.is_count, counts)) or failed > images:
        raise TypeError("counts that are none")
    return Evaluation(iteration, tuple(categories), values, images, failed)


def _column(values: object, count: int) -> np.ndarray:
    """(count,) numbers, NaN for null."""
    if not isinstance(values, list) or len(values) != count:
        raise ValueError("not a value of each prompt")
    if not all(value is None or files.is_number(value) for value in values):
        raise TypeError("values that are no numbers")
    column = np.array([math.nan if value is None else value for value in values], dtype=float)
    if (abs(column) > LARGEST).any():
        raise ValueError("values whose squares no number holds")
    return column


def read_evaluations(run: Path) -> list[Evaluation]:
    """The scorings of a run, in order; none if there are none yet. Raises files.Unreadable for anything else."""
    found = []
    for place, line in files.numbered_json_lines(run / FILE):
        try:
            found.append(parse_line(line))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise files.Unreadable(f"{place} is no scoring; delete that line") from error
    return found


def write_evaluation(run: Path, evaluation: Evaluation) -> None:
    """Add a scoring to a run's file. Lines of this and later iterations go: they are of a run that was killed before
    its checkpoint."""
    kept = [] if evaluation.iteration is None else _lines_before(run, evaluation.iteration)
    files.replace_text(run / FILE, "".join(map(files.json_line, [*kept, evaluation.line()])))


def _lines_before(run: Path, iteration: int) -> list[dict]:
    kept = []
    for place, line in files.numbered_json_lines(run / FILE):
        if not files.is_count(line.get("iteration")):
            raise files.Unreadable(f"{place} is no scoring of an iteration; delete that line")
        if line["iteration"] < iteration:
            kept.append(line)
    return kept


def compare(before: Evaluation, after: Evaluation, category: str | None = None) -> dict[str, dict[str, float | None]]:
    """By column the means before and after, their difference and its standard error, paired by prompt; over the prompts
    of a category, None stands for all. All are over the prompts that have a value in both; left_out: how many have
    none in one of them."""
    chosen = before.is_of(category)
    found = {}
    for column in before.values:
        if column not in after.values:
            continue
        pairs = np.stack([before.values[column][chosen], after.values[column][chosen]])
        kept = pairs[:, np.isfinite(pairs).all(0)]
        count = kept.shape[1]
        if count:
            difference = kept[1] - kept[0]
            error = difference.std(ddof=1) / count**0.5 if count > 1 else math.nan
            found[column] = {
                "before": _rounded(float(kept[0].mean())),
                "after": _rounded(float(kept[1].mean())),
                "difference": _rounded(float(difference.mean())),
                "standard_error": _rounded(float(error)),
                "left_out": pairs.shape[1] - count,
            }
    return found


def format_left_out(found: Mapping[str, float | None]) -> str:
    """Of what `compare` says of a column: "; 3 prompts left out", nothing where all have a value."""
    count = found["left_out"]
    return f"; {count} prompt{'s'[: count != 1]} left out" if count else ""


def compare_run(run: Path, iterations: int) -> dict[str, dict[str, float | None]]:
    """`compare` of the first scoring of a run and the one after so many iterations; nothing if it lacks one of them."""
    found = read_evaluations(run)
    return compare(found[0], found[-1]) if len(found) > 1 and found[-1].iteration == iterations else {}
