"""`star train | plan | eval | compare | maps | report | info`."""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

USAGE = """usage: star COMMAND [--help]

  train   post-train a model: --preset NAME, --config FILE.yaml, and any option
  plan    print what a run will take, before anything is loaded: --gpus N and the options of train
  eval    score a model, with or without an adapter, on a prompt file (GenEval's, OCR's, any) or the embedded world
  compare train arms with several seeds side by side, and report what tells them apart
  maps    picture a prompt's concept maps by layer and step; --world measures localization
  report  one HTML page of runs: curves, pictures, what differs; star report RUN [RUN...] [--out FILE]
  info    versions, what was built, and which implementation each operator uses
"""


@dataclass
class Eval:
    """Score a model on a prompt file by a reward, or on the held-out prompts of the embedded world."""

    model: str = "shapes"
    """A pipeline's folder or hub id; "shapes" is the embedded model."""
    lora: Path | None = None
    """An adapter's folder, as `star train` writes it."""
    prompts: Path | None = None
    """A text file with one prompt a line, or GenEval's .jsonl; none: the held-out prompts of the embedded world."""
    reward: str = "shapes"
    """As for `star train`: "geneval", "ocr", "ocr:1.0,pickscore:0.5", "module:function"."""
    models: dict[str, str] = field(default_factory=dict)
    """Where rewards find their weights, by name."""
    n: int | None = None
    """Only the first so many prompts; of the embedded world 512."""
    images_per_prompt: int = 4
    steps: int | None = None
    """40; for the embedded model 8."""
    guidance_scale: float | None = None
    """4.5; for the embedded model 1, none."""
    height: int | None = None
    """512; for the embedded model 36."""
    width: int | None = None
    max_sequence_length: int = 128
    """Tokens of the T5 part, if there is one."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: int = 8
    seed: int = 2026
    out: Path | None = None
    """A new folder for results.jsonl and summary.json."""
    save_images: bool = False
    """Keep the pictures in `out` too, in GenEval's layout."""
    timeout: float = 600.0
    """Seconds for a batch of pictures, after which their reward counts as failed."""


@dataclass
class Maps:
    """Picture the concept maps of a prompt, or measure localization on the embedded world."""

    prompt: str = "a red circle left of a blue square"
    model: str = "shapes"
    out: Path = Path("maps.png")
    steps: int = 8
    guidance_scale: float = 1.0
    max_sequence_length: int = 0
    """Tokens of the T5 part."""
    height: int = 36
    width: int = 36
    layers: tuple[int, ...] | None = None
    """Blocks to show; None: all."""
    seed: int = 0
    world: bool = False
    """Instead print localization by layer and noise level against the true masks of the embedded world."""


def quiet_third_parties() -> None:
    """Keep libraries' notices about themselves off the terminal; their errors stay."""
    # Read when transformers is imported, which already has something to say.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    # diffusers' own call of a deprecated argument of its own.
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


def read_config(arguments: list[str], prog: str):
    """A preset, then a file, then options; each over what came before."""
    import tyro

    from star import config as configuration
    from star.config import Config

    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--out")
    known, rest = parser.parse_known_args(arguments)
    base = configuration.preset(known.preset) if known.preset else Config()
    if known.config:
        base = configuration.load(known.config, base)
    for flag in ("resume", "overwrite"):
        rest = [f"--run.{flag}" if argument == f"--{flag}" else argument for argument in rest]
    if known.out:
        rest += ["--run.out", known.out]
    return tyro.cli(Config, default=base, args=rest, prog=prog)


def train(arguments: list[str]) -> None:
    config = read_config(arguments, "star train")

    from rich.console import Console
    from rich.table import Table

    from star.train import train as run

    summary = run(config)
    if int(os.environ.get("RANK", 0)):
        return  # the first process speaks for all
    if summary.get("stopped"):
        print(f"stopped after {summary['iterations']} iterations, as asked; --resume continues {config.run.out}")
        return
    table = Table("", "before", "after", title=f"{summary['iterations']} iterations in {summary['seconds']:.0f} s")
    if "soft_before" in summary:
        for name in ("soft", "strict"):
            table.add_row(f"held-out {name}", f"{summary[f'{name}_before']:.3f}", f"{summary[f'{name}_after']:.3f}")
        error = summary["soft_standard_error"]
        table.caption = f"soft: {summary['soft_after'] - summary['soft_before']:+.3f} (standard error {error:.3f})"
    console = Console()
    console.print(table)
    console.print(f"[bold]{config.run.out}[/bold]: " + ", ".join(sorted(p.name for p in config.run.out.iterdir())))


def plan(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    config = read_config(rest, "star plan [--gpus N] [--fsdp]")

    from rich.console import Console
    from rich.table import Table

    from star.training.plan import plan as predict

    if known.gpus < 1:
        raise ValueError(f"gpus: got {known.gpus}, expected at least 1")
    plan = predict(config, known.gpus, known.fsdp)
    table = Table("", "", title=f"{config.model.path}: one iteration on {known.gpus} GPUs, predicted")
    table.add_row("pictures", f"{plan.pictures:,} ({plan.pictures_per_gpu:,} per GPU)")
    table.add_row("trained steps", f"{plan.trained_steps} of {config.sampling.steps}")
    table.add_row("forward rows per GPU", f"{plan.rollout_rows:,} rollout, {plan.reference_rows:,} reference")
    table.add_row("forward and backward rows", f"{plan.update_rows:,} per GPU", end_section=True)
    table.add_row("a row", f"{plan.forward_flops / 1e12:.3g} TFLOP forward, {plan.backward_flops / 1e12:.3g} backward")
    table.add_row("transformer, per GPU", f"{plan.flops_per_gpu / 1e15:.3g} PFLOP", end_section=True)
    table.add_row("parameters", f"{plan.parameters / 1e6:,.1f} M, {plan.trained_parameters / 1e6:,.1f} M trained")
    for name, size in plan.memory.items():
        table.add_row(name, f"{size / 2**30:,.2f} GiB")
    table.add_row("[bold]peak per GPU", f"[bold]{plan.peak / 2**30:,.1f} GiB")
    Console().print(table)


def evaluate(arguments: list[str]) -> None:
    import torch
    import tyro

    from star.training.pipeline import load_pipeline

    options = tyro.cli(Eval, args=arguments, prog="star eval")
    if options.prompts is None and options.reward != "shapes":
        raise ValueError(f"prompts: needed for the reward {options.reward!r}")
    if options.save_images and options.out is None:
        raise ValueError("save_images: needs a folder, --out")
    if options.lora and not options.lora.is_dir():
        raise FileNotFoundError(f"lora: {options.lora} is no folder")
    device = "cuda" if torch.cuda.is_available() and options.prompts else "cpu"
    evaluate_with = evaluate_world if options.prompts is None else evaluate_prompts
    evaluate_with(options, lambda: _adapted(load_pipeline(options.model, device), options))


def _adapted(pipeline, options: Eval):
    import torch

    if options.lora:
        pipeline.load_lora_weights(str(options.lora))
    return pipeline.to(dtype=getattr(torch, options.dtype))


def evaluate_prompts(options: Eval, load) -> None:
    import torch
    from rich.console import Console

    from star import rewards
    from star.rewards.worker import RewardWorker
    from star.training import scoring as evaluation
    from star.training.prompts import read_prompts

    prompts = read_prompts(options.prompts)[: options.n]
    if not prompts:
        raise ValueError(f"prompts: {options.prompts} has none")
    reward = rewards.load(options.reward, options.models, "cuda" if torch.cuda.is_available() else "cpu")
    if options.out is not None and options.out.exists() and any(options.out.iterdir()):
        raise ValueError(f"out: {options.out} is not empty")
    steps, guidance, side = (8, 1.0, 36) if options.model == "shapes" else (40, 4.5, 512)
    sampling = evaluation.Sampling(
        steps=options.steps or steps,
        guidance_scale=guidance if options.guidance_scale is None else options.guidance_scale,
        height=options.height or side,
        width=options.width or options.height or side,
        max_sequence_length=options.max_sequence_length,
        images_per_prompt=options.images_per_prompt,
        batch=options.batch,
        seed=options.seed,
    )
    pipeline = load()
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
    with RewardWorker(reward, options.timeout) as worker:
        results = evaluation.evaluate(pipeline, prompts, worker, sampling, options.out, options.save_images)
    title = f"{len(prompts)} prompts of {options.prompts.name}, {sampling.images_per_prompt} pictures each"
    Console().print(results.table(title))


def evaluate_world(options: Eval, load) -> None:
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from star.shapes import measure, scenes

    n, steps = options.n or 512, options.steps or measure.STEPS
    texts = scenes.prompts(n, options.seed, "heldout", distinct=True)
    scores = measure.score(measure.sample(load(), texts, options.seed, steps), texts)
    table = Table("category", "prompts", "strict", "soft", title=f"{n} held-out prompts, {steps} steps")
    for category in (*scenes.CATEGORIES, None):
        chosen = np.array([category in (None, c) for c in scores.categories])
        if not chosen.any():
            continue
        cells = [
            f"{v[chosen].mean():.3f} ± {v[chosen].std() / chosen.sum() ** 0.5:.3f}"
            for v in (scores.strict, scores.soft)
        ]
        table.add_row(category or "all", str(chosen.sum()), *cells, end_section=category == scenes.CATEGORIES[-1])
    table.caption = "± one standard error"
    Console().print(table)


def compare(arguments: list[str]) -> None:
    import tyro

    from star.study import command as study

    options = tyro.cli(study.Compare, args=arguments, prog="star compare")
    if options.jobs is not None and options.jobs < 1:
        raise ValueError(f"jobs: got {options.jobs}, expected at least 1")
    text = study.compare(options)
    if text is None:
        print(f"stopped, as asked; the same command continues {options.out}")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(text))
    console.print(f"[bold]{options.out}[/bold]: " + ", ".join(sorted(p.name for p in options.out.iterdir())))


def maps(arguments: list[str]) -> None:
    import tyro

    from star.concepts import parse
    from star.objective import Allocation
    from star.reports import figures as report
    from star.shapes import measure
    from star.training.pipeline import load_pipeline

    options = tyro.cli(Maps, args=arguments, prog="star maps")
    pipeline = load_pipeline(options.model)
    if options.world:
        measure.print_localization(pipeline)
        return
    names = [concept.text for concept in parse(options.prompt)]
    if not names:
        raise ValueError(f"prompt: no concept found in {options.prompt!r}")
    layers = options.layers or range(len(pipeline.transformer.transformer_blocks))
    by_layer = {
        layer: report.trace(
            *(pipeline, [options.prompt], options.max_sequence_length, options.steps, options.guidance_scale),
            *((options.height, options.width), options.seed, (layer,)),
        )
        for layer in layers
    }
    report.maps_picture(pipeline, by_layer, Allocation(), names, options.out)
    print(f"{options.out}: {', '.join(names)}; {len(by_layer)} blocks, {options.steps} steps")


def report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("star report", description="Write one self-contained HTML page of runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, finished or going")
    parser.add_argument("--out", type=Path, help="the page; report.html in the folder of a single run")
    options = parser.parse_args(arguments)

    from star.reports import page

    if options.out is None and len(options.runs) > 1:
        raise ValueError("out: needed for several runs")
    out = options.out or options.runs[0] / "report.html"
    page.write(options.runs, out)
    print(f"{out}: {len(options.runs)} run{'s'[: len(options.runs) > 1]}, {out.stat().st_size / 2**20:.1f} MiB")


def info(arguments: list[str]) -> None:
    import torch

    import star_kernels
    from star_kernels import native
    from star_kernels.ops import OPERATORS

    if arguments:
        raise ValueError(f"info: takes no arguments, got {arguments}")
    for package in ("star-kernels", "torch", "diffusers", "transformers", "peft", "accelerate", "triton"):
        try:
            print(f"{package:14} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{package:14} not installed")
    print(f"{'cpu threads':14} {torch.get_num_threads()}")
    print(f"{'gpu':14} {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}")
    for name, value in native.build_info().items():
        print(f"{name.replace('_', ' '):14} {value}")
    for operator in OPERATORS:
        for device in ("cpu", "cuda"):
            reasons = star_kernels.implementations(operator, device)
            chosen = next(name for name, reason in reasons.items() if reason is None)
            others = "; ".join(f"not {name}: {reason}" for name, reason in reasons.items() if reason)
            print(f"{operator:14} {chosen} on {device}" + (f" ({others})" if others else ""))


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 1 after printing one line about what was wrong."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {"train": train, "plan": plan, "eval": evaluate, "compare": compare, "maps": maps}
    commands |= {"report": report, "info": info}
    if not arguments or arguments[0] not in commands:
        print(USAGE, file=sys.stdout if arguments in ([], ["--help"], ["-h"]) else sys.stderr)
        return 0 if arguments in ([], ["--help"], ["-h"]) else 2
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        quiet_third_parties()
        commands[arguments[0]](arguments[1:])
    except ModuleNotFoundError as error:
        print(f"star: {error.name} is missing; pip install 'star-kernels[train]'", file=sys.stderr)
        return 1
    except (ValueError, OSError, RuntimeError) as error:
        # What a user can cause is raised as one of these with one clear line; STAR_DEBUG shows where.
        if os.environ.get("STAR_DEBUG"):
            raise
        print(f"star: {str(error).splitlines()[0] if str(error) else type(error).__name__}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
