"""Held-out scores in the course of a run: one line of evaluations.jsonl for each scoring, prompt by prompt."""

from __future__ import annotations

import json
from pathlib import Path

from diffusers import StableDiffusion3Pipeline

from star import files
from star.config import Config, ConfigError
from star.reports.figures import HELD_OUT_SEED
from star.shapes import measure, scenes
from star.training.prompts import read_prompts

DIGITS = 5


def held_out_prompts(config: Config) -> list[str]:
    """The `run.held_out` prompts that are scored, always with the same noise."""
    count = config.run.held_out
    if config.run.held_out_prompts == "shapes":
        return scenes.prompts(count, HELD_OUT_SEED, "heldout", distinct=True)
    texts = [prompt.text for prompt in read_prompts(config.run.held_out_prompts)]
    if not texts:
        raise ConfigError(f"run.held_out_prompts: {config.run.held_out_prompts} has none")
    return [texts[i % len(texts)] for i in range(count)]


def score(pipeline: StableDiffusion3Pipeline, config: Config, iteration: int, *, write: bool = True) -> None:
    """Score the policy as it is and write it down as of `iteration`. With several processes one may write.

    Lines of this and later iterations are replaced: they are of a run that was killed before its checkpoint.
    """
    texts = held_out_prompts(config)
    scores = measure.score(measure.sample(pipeline, texts, HELD_OUT_SEED, config.sampling.steps), texts)
    if not write:
        return
    categories = {}
    for category in (None, *dict.fromkeys(scores.categories)):
        strict, soft, number = scores.mean(category)
        categories[category or "all"] = {
            "strict": round(strict, DIGITS),
            "soft": round(soft, DIGITS),
            "prompts": number,
        }
    line = {
        "iteration": iteration,
        "scores": categories,
        # What paired intervals need. The order of the prompts is the same in every run.
        "categories": scores.categories,
        "strict": [int(x) for x in scores.strict],
        "soft": [round(float(x), DIGITS) for x in scores.soft],
    }
    kept = [earlier for earlier in read(config.run.out) if earlier["iteration"] < iteration]
    text = "".join(json.dumps(entry) + "\n" for entry in [*kept, line])
    files.replace_text(config.run.out / "evaluations.jsonl", text)


def read(run: Path) -> list[dict]:
    """The scorings of a run, in order; none if there are none yet."""
    path = run / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
