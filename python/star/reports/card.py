"""The model card beside what a run exports: what it is, how it was trained, what it reached, how to load it."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData

from star.config import Config, to_dict
from star.rewards import parse

BEFORE_AFTER = ("soft", "strict")


def write(folder: Path, config: Config, summary: dict) -> Path:
    """Write README.md into an exported adapter's or model's folder. summary: as in summary.json."""
    model, adapter = config.model, config.model.lora_rank > 0
    tags = ["text-to-image", "diffusers", "reinforcement-learning", "grpo", "star", *(["lora"] if adapter else [])]
    # Only what the hub knows belongs into its field; a folder's path means nothing to others.
    public = model.path.count("/") == 1 and not Path(model.path).exists()
    data = ModelCardData(
        base_model=model.path if public else None,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=tags,
    )
    path = folder / "README.md"
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(folder, config, summary, adapter)}").save(path)
    return path


def _text(folder: Path, config: Config, summary: dict, adapter: bool) -> str:
    model, sampling = config.model, config.sampling
    kind = f"LoRA adapter of rank {model.lora_rank}" if adapter else "Fine-tuned model"
    weights = parse(config.run.reward)
    rewards = ", ".join(f"`{name}`" if len(weights) == 1 else f"{w:g} `{name}`" for name, w in weights.items())
    try:
        version = f" {importlib.metadata.version('star-kernels')}"
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, not installed
        version = ""
    rows = [
        ("Base model", f"`{model.path}`"),
        ("Reward", rewards),
        ("Prompts", f"`{Path(sampling.prompts).name}`"),
        ("Iterations", summary["iterations"]),
        ("Pictures per iteration", f"{sampling.prompts_per_iteration} prompts, {sampling.images_per_prompt} each"),
        ("Allocation", f"`{config.allocation.strategy}`"),
        ("Learning rate", f"{config.optimization.learning_rate:g}"),
        ("Seed", config.run.seed),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    scores = [
        f"| {name} | {summary[f'{name}_before']:.4f} | {summary[f'{name}_after']:.4f} |"
        for name in BEFORE_AFTER
        if f"{name}_before" in summary
    ]
    reached = "\n".join(["| held-out score | before | after |", "|---|---|---|", *scores]) if scores else (
        "Nothing was measured on held-out prompts; `star eval` does."
    )  # fmt: skip
    method = "Flow-GRPO's objective"
    if config.allocation.strategy != "uniform":
        method += ", its update\nallocated to latent positions (STAR, arXiv 2606.17979)"
    settings = yaml.safe_dump(to_dict(config), sort_keys=False).rstrip()
    return f"""# {kind} of {Path(model.path).name}

Post-trained with reinforcement learning by star-kernels{version}: {method}.

| | |
|---|---|
{table}

## Scores

{reached}

## Use

```python
{_code(folder, config, adapter)}
```

## Limits

A reward is not a person: look at the pictures before relying on a score. The license of the base model applies.

## Configuration

```yaml
{settings}
```
"""


def _code(folder: Path, config: Config, adapter: bool) -> str:
    model, sampling = config.model, config.sampling
    if model.path == "shapes" and adapter:
        lines = ["from star.shapes.model import load_pipeline", "", "pipeline = load_pipeline()"]
    else:
        source = model.path if adapter else str(folder)
        lines = [
            *("from diffusers import StableDiffusion3Pipeline", ""),
            f"pipeline = StableDiffusion3Pipeline.from_pretrained({source!r})",
        ]
    if adapter:
        lines.append(f"pipeline.load_lora_weights({str(folder)!r})")
    prompt = "a red circle left of a blue square" if sampling.prompts == "shapes" else "a photo of a dog"
    return "\n".join(
        [
            *lines,
            "image = pipeline(",
            f"    {prompt!r},",
            f"    height={model.height}, width={model.width}, num_inference_steps={sampling.steps},",
            f"    guidance_scale={sampling.guidance_scale:g}, max_sequence_length={model.max_sequence_length},",
            ").images[0]",
        ]
    )
