"""The model card beside what a run exports: what it is, how it was trained, what it reached, how to load it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from star.config import Config, to_dict
from star.reports.commands import installed_version
from star.reports.evaluations import format_error, format_left_out
from star.rewards import parse

OBJECTIVES = {
    "grpo": "Flow-GRPO's objective",
    "nft": "DiffusionNFT's objective (arXiv 2509.16117)",
    "awm": "Advantage Weighted Matching's objective, AWM (arXiv 2509.25050)",
}


def write(folder: Path, config: Config, summary: dict, prompt: str, call: Mapping[str, Any]) -> Path:
    """Write README.md into an exported adapter's or model's folder. summary: as in summary.json. prompt: an example.
    call: guidance and text length as arguments of the pipeline's call."""
    model, adapter = config.model, config.model.lora_rank > 0
    objective = config.loss.objective
    tags = ["text-to-image", "diffusers", "reinforcement-learning", objective, "star", *(["lora"] if adapter else [])]
    # Only what the hub knows belongs into its field; a folder's path means nothing to others.
    public = model.path is not None and model.path.count("/") == 1 and not Path(model.path).exists()
    data = ModelCardData(
        base_model=model.path if public else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    )
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(config, summary, _code(folder, config, prompt, call))}").save(path)
    return path


def _text(config: Config, summary: dict, code: str) -> str:
    model, sampling, adapter = config.model, config.sampling, config.model.lora_rank > 0
    name = model.path or f"task {config.task}"
    kind = f"LoRA adapter of rank {model.lora_rank}" if adapter else "Fine-tuned model"
    weights = parse(config.run.reward) if config.run.reward else {f"the reward of {name}": 1.0}
    rewards = ", ".join(f"`{reward}`" if len(weights) == 1 else f"{w:g} `{reward}`" for reward, w in weights.items())
    version = f" {installed}" if (installed := installed_version()) else ""
    rows = [
        ("Base model", f"`{name}`"),
        ("Reward", rewards),
        ("Prompts", f"`{Path(sampling.prompts).name if sampling.prompts else name}`"),
        ("Iterations", summary["iterations"]),
        ("Images per iteration", f"{sampling.prompts_per_iteration} prompts, {sampling.images_per_prompt} each"),
        ("Objective", f"`{config.loss.objective}`"),
        ("Allocation", f"`{config.allocation.strategy}`"),
        ("Learning rate", f"{config.optimization.learning_rate:g}"),
        ("Seed", config.run.seed),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    scores = [_score_row(column, found) for column, found in summary["held_out"].items()]
    reached = "Nothing was measured on held-out prompts; `star eval` does."
    if scores:
        reached = "\n".join(["| held-out score | before | after | difference |", "|---|---|---|---|", *scores])
    method = OBJECTIVES[config.loss.objective]
    if config.allocation.strategy != "uniform":
        method += ", its update\nallocated to latent locations (STAR, arXiv 2606.17979)"
    settings = yaml.safe_dump(to_dict(config), sort_keys=False).rstrip()
    return f"""# {kind} of {Path(model.path).name if model.path else name}

Post-trained with reinforcement learning by star-kernels{version}: {method}.

| | |
|---|---|
{table}

## Scores

{reached}

## Use

{_fenced("python", code)}

## Limits

A reward is not a person: look at the images before relying on a score. The license of the base model applies.

## Configuration

{_fenced("yaml", settings)}
"""


def _score_row(column: str, found: dict) -> str:
    difference = f"{found['difference']:+.4f}{format_error(found['standard_error'])}{format_left_out(found)}"
    return f"| {_cell(column)} | {found['before']:.4f} | {found['after']:.4f} | {difference} |"


def _cell(value: object) -> str:
    """A text in a table: a bar would end its column."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _fenced(language: str, text: str) -> str:
    """A block of code, whatever backticks are in it."""
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"


def _code(folder: Path, config: Config, prompt: str, call: Mapping[str, Any]) -> str:
    model, adapter = config.model, config.model.lora_rank > 0
    if model.path is None and adapter:
        lines = ["import torch", "from star.training.task import find_task", ""]
        lines.append(f'pipeline = find_task({config.task!r}).pipeline("cpu", torch.float32)')
    else:
        source = model.path if adapter else str(folder)
        lines = ["from diffusers import DiffusionPipeline", ""]
        lines.append(f"pipeline = DiffusionPipeline.from_pretrained({source!r})")
    if adapter:
        lines.append(f"pipeline.load_lora_weights({str(folder)!r})")
    return "\n".join(
        [
            *lines,
            "image = pipeline(",
            f"    {prompt!r},",
            f"    height={model.height}, width={model.width}, num_inference_steps={config.sampling.steps},",
            f"    {', '.join(f'{name}={value!r}' for name, value in call.items())},",
            ").images[0]",
        ]
    )
