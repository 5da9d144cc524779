"""`star train | plan | probe | check | eval | compare | maps | app | report | info`."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import io
import json
import logging
import os
import shlex
import shutil
import sys
import textwrap
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

from star.messages import WHOLE, one_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    from star.config import Config
    from star.options import Eval
    from star.training.task import Task

log = logging.getLogger("star")
PHOTOGRAPHED = ("a photo of a red bench left of two green cats", 'a blue door with a sign that says "OPEN"')
DRAWN = ("a red circle left of a blue square", "two green rings")  # by the embedded model
FAULT = "a fault of star itself"
Values = TypeVar("Values", bound="DataclassInstance")

TRAINING = "Post-train a text-to-image model with spatiotemporal reward allocation."
LAYERS = """
--preset NAME       begin with a preset; the defaults below are then its values
--config FILE.yaml  change them by a file; options change both
--out FOLDER        as --run.out"""

COMMANDS = {
    "train": "post-train a model: --preset NAME, --config FILE.yaml, and any option",
    "plan": "predict a run's FLOPs and memory without loading the model: --gpus N and the options of train",
    "probe": "predict from some batches whether knowing the locations will help: --batches N and the options of train",
    "check": "check a pipeline before a run: bits, maps, words, noise, implementations: star check MODEL",
    "eval": "score a model, with an adapter or without, on a task's held-out prompts or on a prompt file",
    "compare": "train arms with several seeds side by side, and report which differ",
    "maps": "draw a prompt's concept maps by layer and step",
    "app": "serve a page that shows an image as it forms, with its maps and weights: star app [MODEL...]",
    "report": "write one HTML page of runs: curves, images, what differs: star report RUN [RUN...] [--out FILE]",
    "info": "print versions, what was built, and which implementation each operator uses",
}


def usage(width: int) -> str:
    """The commands with what each does, in lines of at most `width` characters."""
    texts = [
        textwrap.fill(text, width, initial_indent=f"  {name:9}", subsequent_indent=" " * 11, break_on_hyphens=False)
        for name, text in COMMANDS.items()
    ]
    return "\n".join(["usage: star COMMAND [--help]", "", *texts])


def quiet_third_parties() -> None:
    """Keep libraries' notices about themselves off the terminal; their errors stay."""
    # Read when transformers is imported, which already has something to say.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").propagate = False  # it prints its lines itself, each would come twice
    # diffusers' own call of a deprecated argument of its own.
    warnings.filterwarnings("ignore", category=FutureWarning, module="diffusers")


def show_warnings_once() -> None:
    """Show each warning once in a command. Python forgets what it has shown whenever a library changes the filters."""
    show = warnings.showwarning
    shown: set[str] = set()

    def show_new(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if str(message) not in shown:
            shown.add(str(message))
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = show_new


def read_config(arguments: list[str], prog: str, about: str = TRAINING) -> Config:
    """A preset, then a file, then options; each over what came before. about: what the command does, for its help."""
    import tyro

    from star import config as configuration
    from star.config import Config, expand_paths
    from star.presets import preset

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset")
    parser.add_argument("--config")
    parser.add_argument("--out")
    known, rest = parser.parse_known_args(arguments)
    base = preset(known.preset) if known.preset else Config()
    if known.config:
        base = configuration.load(known.config, base)
    rest = renamed_options(rest)
    for flag in ("resume", "overwrite"):
        rest = [f"--run.{flag}" if argument == f"--{flag}" else argument for argument in rest]
    if known.out:
        rest += ["--run.out", known.out]
    for part in (base, *vars(base).values()):
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            help_in_one_line(type(part))
    return expand_paths(tyro.cli(Config, default=base, args=rest, prog=prog, description=f"{about}{LAYERS}"))


def help_in_one_line(kind: type[DataclassInstance]) -> None:
    """Give tyro the docstrings of a dataclass's fields without line breaks; it would keep those of the source."""
    import docstring_parser

    texts = {found.arg_name: found.description or "" for found in docstring_parser.parse_from_object(kind).params}
    for entry in dataclasses.fields(kind):
        if text := texts.get(entry.name):
            entry.metadata = MappingProxyType({**entry.metadata, "help": " ".join(text.split())})


def read_options(kind: type[Values], arguments: list[str], prog: str) -> Values:
    """The options of a command, with their numbers checked and their paths without a ~."""
    import tyro

    from star.config import check_ranges, expand_paths

    help_in_one_line(kind)
    options = expand_paths(tyro.cli(kind, args=arguments, prog=prog))
    check_ranges(options, "")
    return options


def renamed_options(arguments: list[str]) -> list[str]:
    """Options of version 0.1 under their names of now, and values as they are spelled now; one line tells which."""
    from star.config import OLD_KEYS, OLD_SECTIONS, OLD_VALUES

    def dashed(name: str) -> str:
        return name.replace("_", "-")

    names = {dashed(old): dashed(new) for old, new in OLD_KEYS.items()}
    names |= {f"{section}.no-{key}": f"{place}.no-{entry}" for section, key, place, entry in (
        (*old.split("."), *new.split(".")) for old, new in names.items())}  # fmt: skip
    spellings = {f"--{dashed(name)}": values for name, values in OLD_VALUES.items()}
    found: list[str] = []
    told = {}
    for argument in arguments:
        option, equals, value = argument.removeprefix("--").partition("=")
        if argument.startswith("--"):
            option = dashed(option)
            section, dot, key = option.partition(".")
            new = names.get(option) or f"{OLD_SECTIONS.get(section, section)}{dot}{key}"
            if new != option:
                told[f"--{option}"] = f"--{new}"
                argument = f"--{new}{equals}{value}"
        name, equals, value = argument.rpartition("=")
        values = spellings.get(name if equals else found[-1] if found else "", {})
        if value in values:
            told[value] = values[value]
            argument = f"{name}{equals}{values[value]}"
        found.append(argument)
    if told:
        log.warning("options: %s", ", ".join(f"{old} is now {new}" for old, new in told.items()))
    return found


def train(arguments: list[str]) -> None:
    config = read_config(arguments, "star train")

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from star.reports.evaluations import format_error, format_left_out
    from star.train import train as run

    summary = run(config, ["star", "train", *arguments])
    if int(os.environ.get("RANK", 0)):
        return  # the first process speaks for all
    if summary.get("stopped"):
        count, out = summary["iterations"], config.run.out
        print(f"stopped by {summary['stopped']} after {count} iterations; --resume continues {out}")
        return
    count = summary["iterations"]
    title = f"{count} iteration{'s' if count != 1 else ''} in {summary['seconds']:.0f} s"
    console = Console()
    if summary["held_out"]:
        table = Table("held-out", "before", "after", "difference", title=title, caption="± one standard error, paired")
        for column, found in summary["held_out"].items():
            difference = f"{found['difference']:+.3f}{format_error(found['standard_error'], 3)}{format_left_out(found)}"
            table.add_row(escape(column), f"{found['before']:.3f}", f"{found['after']:.3f}", difference)
        console.print(table)
    else:
        console.print(f"{title}; no held-out prompts were scored (scoring.count is 0)")
    console.print(
        f"[bold]{escape(str(config.run.out))}[/bold]: "
        + ", ".join(sorted(p.name for p in config.run.out.iterdir() if p.name[0] != "."))
    )
    print(f"one page of it: {shlex.join(['star', 'report', str(config.run.out)])}")


def plan(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--gpus", type=int, default=1)
    parser.add_argument("--fsdp", action="store_true")
    known, rest = parser.parse_known_args(arguments)
    about = """Predict an iteration's FLOPs and memory without loading the model, with the options of star train and:
--gpus N            number of GPUs (default 1)
--fsdp              shard weights, gradients and optimizer over them"""
    config = read_config(rest, "star plan [--gpus N] [--fsdp]", about)

    from rich.console import Console
    from rich.table import Table

    from star.training.plan import plan as predict

    if known.gpus < 1:
        raise ValueError(f"gpus: got {known.gpus}, expected at least 1")
    plan = predict(config, known.gpus, known.fsdp)
    gpus = f"{known.gpus} GPU{'s' * (known.gpus > 1)}"
    table = Table("", "", title=f"{config.model.path or config.task}: one iteration on {gpus}, predicted")
    table.add_row("images", f"{plan.images:,} ({plan.images_per_gpu:,} per GPU)")
    trained = "noise levels of an image" if config.loss.is_forward_process else "trained steps"
    table.add_row(trained, f"{plan.trained_steps} of {config.sampling.steps}")
    before = "old policy" if config.loss.keeps_old else "maps"
    forward = {"rollout": plan.rollout_rows, before: plan.old_rows, "reference": plan.reference_rows}
    forward = {name: rows for name, rows in forward.items() if rows or name != before}
    table.add_row("forward rows per GPU", ", ".join(f"{rows:,} {name}" for name, rows in forward.items()))
    table.add_row("forward and backward rows", f"{plan.update_rows:,} per GPU", end_section=True)
    table.add_row("a row", f"{plan.forward_flops / 1e12:.3g} TFLOP forward, {plan.backward_flops / 1e12:.3g} backward")
    table.add_row("transformer, per GPU", f"{plan.flops_per_gpu / 1e15:.3g} PFLOP", end_section=True)
    table.add_row("parameters", f"{plan.parameters / 1e6:,.1f} M, {plan.trained_parameters / 1e6:,.1f} M trained")
    for name, size in plan.memory.items():
        if size:
            table.add_row(name, f"{size / 2**30:,.2f} GiB")
    table.add_row("[bold]peak per GPU", f"[bold]{plan.peak / 2**30:,.1f} GiB")
    Console().print(table)


def probe(arguments: list[str]) -> None:
    from star.options import Probe

    parser = argparse.ArgumentParser("star probe", add_help=False, allow_abbrev=False)
    sizes = {field.name: field.default for field in dataclasses.fields(Probe)}
    for name, default in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--json", type=Path)
    known, rest = parser.parse_known_args(arguments)
    options = " ".join(f"[--{name} N]" for name in sizes)
    about = f"""Predict from some batches whether knowing the locations will help, with the options of star train and:
--batches N         number of batches (default {Probe.batches})
--prompts N         prompts of each batch (default {Probe.prompts})
--images N          images of each prompt (default {Probe.images})
--json FILE         also write the numbers there"""
    config = read_config(rest, f"star probe {options} [--json FILE]", about)

    from rich.console import Console
    from rich.markdown import Markdown

    from star import files
    from star.config import check_ranges
    from star.study import probe as probing

    chosen = Probe(known.batches, known.prompts, known.images)
    check_ranges(chosen, "")
    if known.json is not None:  # before hours of measuring
        known.json = known.json.expanduser()
        files.claim(known.json, "json", "JSON of star probe", files.is_json_of("gradients", "recommended"))
    found = probing.probe(config, chosen)
    if known.json is not None:
        files.replace_text(known.json, json.dumps(dataclasses.asdict(found), indent=2, allow_nan=False) + "\n")
    console = Console()
    for table in probing.tables(found):
        console.print(Markdown(table.markdown()))
    console.print(f"\n{probing.verdict(found)}", highlight=False)


def check(arguments: list[str]) -> int:
    import inspect

    import torch

    from star import files
    from star.check import Question
    from star.check import check as judge
    from star.options import Check
    from star.training.pipeline import load_any
    from star.training.prompts import read_prompts

    options = read_options(Check, arguments, "star check")
    if options.json is not None:
        files.claim(options.json, "json", "JSON of star check", files.is_json_of("level", "name", "words"))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, options.dtype)
    if options.model is None:
        pipeline, usual = chosen_task(None, None).pipeline(device, dtype), DRAWN
    else:
        pipeline, usual = load_any(options.model, device, dtype), PHOTOGRAPHED
    prompts = list(options.prompt) or list(usual)
    if options.prompts is not None:
        prompts = [prompt.text for prompt in read_prompts(options.prompts)[: options.n]]
        if not prompts:
            raise ValueError(f"prompts: {options.prompts} has no prompts, expected at least one")
    takes = inspect.signature(type(pipeline).__call__).parameters
    sizes = {"height": options.height, "width": options.width}
    call: dict[str, Any] = {name: size for name, size in sizes.items() if size is not None}
    call["num_inference_steps"] = options.steps
    if "num_frames" in takes:
        call["num_frames"] = options.frames
    if options.image is not None:
        from PIL import Image

        try:
            call["image"], prompts = Image.open(options.image).convert("RGB"), prompts[:1]
        except OSError as error:
            raise ValueError(f"image: {options.image} cannot be read ({one_line(error)})") from error
    question = Question(
        prompts,
        call,
        source=options.concepts,
        brackets=options.brackets,
        clip_range=options.clip_range,
        noise_level=options.noise_level,
        seed=options.seed,
    )
    verdicts = judge(pipeline, question)
    if options.json is not None:
        files.replace_text(options.json, json.dumps([dataclasses.asdict(one) for one in verdicts], indent=2) + "\n")
    model = pipeline.transformer
    print(f"{type(pipeline).__name__} on {model.device.type}, {str(model.dtype)[6:]}, {options.steps} steps")
    for verdict in verdicts:
        print(f"{verdict.level:8} {verdict.name:7} {verdict.words}")
        for line in verdict.lines:
            print(f"{'':17}{line}")
    return int(any(verdict.level == "wrong" for verdict in verdicts))


def evaluate(arguments: list[str]) -> None:
    from star import files
    from star.options import Eval

    options = read_options(Eval, arguments, "star eval")
    if options.save_images and options.out is None:
        raise ValueError("save_images: got no folder for the images; set --out")
    with nullcontext() if options.out is None else files.new_folder(options.out, "out"):
        score(options)


def score(options: Eval) -> None:
    """`star eval`, once its folder is its own."""
    import torch
    from rich.console import Console

    from star.options import HELD_OUT
    from star.reports import evaluations
    from star.reports.tables import evaluation_table
    from star.rewards import check_models
    from star.rewards.worker import RewardWorker
    from star.training import scoring
    from star.training.adapter import load_adapter
    from star.training.pipeline import check_size, latent_size
    from star.training.prompts import read_prompts, without_brackets
    from star.training.rollout import check_steps
    from star.training.task import load_task_reward

    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = chosen_task(options.task, options.model)
    if options.prompts is not None:
        prompts = read_prompts(options.prompts)[: options.n]
    else:
        prompts = task.prompts("held_out", HELD_OUT if options.n is None else options.n, str(options.seed))
    if not prompts:
        raise ValueError(f"prompts: {options.prompts or options.task} has no prompts, expected at least one")
    if options.brackets:
        prompts = without_brackets(prompts)
    if options.reward:
        task = dataclasses.replace(task, reward=options.reward)
    check_models(options.models, task.reward)
    reward = load_task_reward(task, options.models, device)
    images = given(task.images, options, "images_per_prompt", "steps", "guidance_scale", "height", "width", "batch",
                   "max_sequence_length", "seed")  # fmt: skip
    pipeline = task.pipeline(device, getattr(torch, options.dtype))
    check_size(pipeline, images.height, images.width)
    check_steps(pipeline, latent_size(pipeline, images.height, images.width), images.steps)
    if options.lora:
        load_adapter(pipeline, options.lora)
    observe = None if options.out is None else scoring.ResultsWriter(options.out, prompts, options.save_images)
    with RewardWorker(reward, options.timeout) as worker:
        evaluation = scoring.evaluate(pipeline, prompts, worker, images, observe=observe)
    if options.out is not None:
        evaluations.write_evaluation(options.out, evaluation)
    source = options.prompts.name if options.prompts else "the held-out split"
    noun = "image" if images.images_per_prompt == 1 else "images"
    title = f"{len(prompts)} prompts of {source}, {images.images_per_prompt} {noun} each, {images.steps} steps"
    Console().print(evaluation_table(evaluation, title))


def chosen_task(task: str | None, model: str | None) -> Task:
    """The task that a command's options name, with the model instead of its own; without a task, a model alone."""
    from star.config import EMBEDDED, Config, Model
    from star.training.task import configured_task

    name = task if task or model else EMBEDDED
    return configured_task(Config(task=name, model=Model(path=model)))


def given(defaults: Values, options: object, *names: str) -> Values:
    """A dataclass with those options that are set."""
    values = {name: getattr(options, name) for name in names if getattr(options, name) is not None}
    return dataclasses.replace(defaults, **values)


def compare(arguments: list[str]) -> None:
    from star.study import command as study

    options = read_options(study.Compare, arguments, "star compare")
    try:
        text = study.compare(options)
    except study.Stopped as signal:
        print(f"stopped by {signal}; the same command continues {options.out}")
        return
    from rich.console import Console
    from rich.markdown import Markdown

    console = Console()
    console.print(Markdown(text))
    print(f"{options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}")


def maps(arguments: list[str]) -> None:
    import torch

    from star import files
    from star.concepts import parse, unbracket
    from star.objective import Allocation
    from star.options import Maps
    from star.reports import figures
    from star.training import preview
    from star.training.conditions import encode
    from star.training.pipeline import check_size, latent_size
    from star.training.rollout import SamplerOptions, check_steps, decode, trace

    options = read_options(Maps, arguments, "star maps")
    (prompt,), (marked,) = unbracket([options.prompt]) if options.brackets else ([options.prompt], [None])
    concepts = parse(prompt, options.concepts) if marked is None else marked
    names = [concept.text for concept in concepts]
    if not names:
        raise ValueError(f"prompt: got {prompt!r}, which has no concept; mark one with [ ] and --brackets")
    if options.layers == ():
        raise ValueError("layers: got none, expected at least one block")
    files.claim(options.out, "out", "figure of star maps", figures.is_figure)
    task = chosen_task(options.task, options.model)
    images = given(task.images, options, "height", "width", "max_sequence_length")
    pipeline = task.pipeline("cpu", torch.float32)
    check_size(pipeline, images.height, images.width)
    size = latent_size(pipeline, images.height, images.width)
    check_steps(pipeline, size, options.steps)
    conditions = encode(pipeline, [prompt], images.max_sequence_length, options.guidance_scale, concepts=[concepts])
    layers = range(len(pipeline.transformer.transformer_blocks)) if options.layers is None else options.layers
    sampler = SamplerOptions(size, options.guidance_scale)
    rollouts = {
        layer: trace(pipeline, conditions, options.steps, dataclasses.replace(sampler, layers=(layer,)), options.seed)
        for layer in layers
    }
    first = rollouts[layers[0]]
    mean = torch.stack([rollout.captured_maps() for rollout in rollouts.values()]).mean(0)
    figures.concept_maps(
        prompt,
        decode(pipeline, first.latents)[0].permute(1, 2, 0).cpu().numpy(),
        {
            f"{name}\nblock {layer}": rollout.captured_maps()[:, 0, g].view(-1, *rollout.grid).cpu().numpy()
            for g, name in enumerate(names)
            for layer, rollout in rollouts.items()
        },
        preview.attention_weights(pipeline, dataclasses.replace(first, maps=mean), Allocation())[:, 0],
        first.steps.sigmas.tolist(),
        options.out,
    )
    print(f"{options.out}: {', '.join(names)}; {len(rollouts)} blocks, {options.steps} steps")


def app(arguments: list[str]) -> None:
    from star.options import App

    options = read_options(App, arguments, "star app")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a log or a container has the page's address at once
    from star.app import serve

    serve(options.models, options.only, options.dtype, options.host, options.port, largest=options.largest)


def report(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser("star report", description="Write one self-contained HTML page of runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, finished or going")
    parser.add_argument(
        "--out", type=Path, help="the page; without it report.html, in a single run's folder or else in this one"
    )
    options = parser.parse_args(arguments)
    options.runs = [path.expanduser() for path in options.runs]

    from star.reports import page

    folders = page.distinct(options.runs)
    folder = folders[0] if len(folders) == 1 else Path()
    out = folder / "report.html" if options.out is None else options.out.expanduser()
    page.write(folders, out)
    print(f"{out}: {len(folders)} run{'s'[: len(folders) > 1]}, {out.stat().st_size / 2**20:.1f} MiB")


def info(arguments: list[str]) -> None:
    argparse.ArgumentParser(
        "star info", description="Print versions, what was built, and which implementation each operator uses."
    ).parse_args(arguments)
    import torch

    import star_kernels
    from star_kernels import native, requirements
    from star_kernels.ops import OPERATORS

    def show(name: str, value: object) -> None:
        print(f"{name:14} {value}")

    for package in ("star-kernels", "torch", "diffusers", "transformers", "peft", "accelerate", "triton"):
        try:
            show(package, importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            show(package, "not installed")
    show("folder", native.HERE)
    show("cpu threads", torch.get_num_threads())
    show("gpu", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")
    for name, value in native.build_info().items():
        show(name.replace("_", " "), value)
    reasons: dict[str, list[str]] = {}
    for operator in OPERATORS:
        chosen = []
        for device in ("cpu", "cuda"):
            found = star_kernels.implementations(operator, device)
            chosen.append(f"{next(name for name, reason in found.items() if reason is None)} on {device}")
            for name, reason in found.items():
                if reason is not None:
                    reasons.setdefault(f"no {name} on {device}: {reason}", []).append(operator)
        show(operator, ", ".join(chosen))
    for reason, operators in reasons.items():
        print(f"{reason} ({', '.join(operators)})")
    for extra in ("train", "rewards", "app"):
        if line := requirements.install_line(extra, ""):
            print(f"to have all of the extra {extra}: {line}")


def main(arguments: list[str] | None = None) -> int:
    """Entry point. Returns 0, or 1 after printing what was wrong, which is one line but for `star check`."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands: dict[str, Callable[[list[str]], int | None]] = {
        **{"train": train, "plan": plan, "probe": probe, "check": check, "eval": evaluate},
        **{"compare": compare, "maps": maps, "app": app, "report": report, "info": info},
    }
    width = shutil.get_terminal_size().columns
    if arguments in ([], ["--help"], ["-h"]):
        print(usage(width))
        return 0
    if arguments[0] not in commands:
        print(f"{usage(width)}\n\nstar: got {arguments[0]!r}, expected a command from above", file=sys.stderr)
        return 2
    logging.basicConfig(format="%(levelname)s: %(message)s")
    # torch says so when it is loaded; a command that needs NumPy names the extra that has it.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy", UserWarning)
    try:
        if arguments[0] != "info":  # which needs torch alone
            quiet_third_parties()
        show_warnings_once()
        return commands[arguments[0]](arguments[1:]) or 0
    except ModuleNotFoundError as error:
        from star_kernels.requirements import install_line

        name = error.name or ""
        extra = "app" if name.partition(".")[0] == "gradio" else "train"
        line = install_line(extra, name)
        print(f"star: {name} is missing{f', of star-kernels[{extra}]; {line}' if line else ''}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("star: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if os.environ.get("STAR_DEBUG"):
            raise
        # What a user can cause is raised as one of these with one clear line; anything else is a fault of ours.
        if not isinstance(error, ValueError | OSError | RuntimeError | ImportError):
            error = RuntimeError(f"{FAULT} ({type(error).__name__}: {one_line(error)}); STAR_DEBUG=1 shows where")
        print(f"star: {one_line(error, WHOLE)}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
