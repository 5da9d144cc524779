"""Options of `star eval`, `star maps`, `star probe`, `star check` and `star app`. Their help tells the defaults that
stand in code."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from star.config import AboveZero, Count, Finite, NotNegative, Positive, Range, Seed
from star.training.task import NO_TASK

HELD_OUT = 512  # prompts of a task
TASK_HELP = (
    "`shapes`, the embedded world, or `module:attribute` of a star.training.task.Task. "
    "None: the embedded world, unless there is a model."
)


def _images(what: str, name: str) -> object:
    """The help of an option of the images."""
    return tyro.conf.arg(help=f"{what} None: the task's; {getattr(NO_TASK.images, name)} without a task.")


Height = Annotated[Positive | None, _images("Pixels.", "height")]
Width = Annotated[Positive | None, _images("Pixels.", "width")]
Length = Annotated[Count | None, _images("Tokens of the T5 part, if there is one.", "max_sequence_length")]


@dataclass
class Eval:
    """Score a model by a reward: on a task's held-out prompts or on a prompt file."""

    task: Annotated[str | None, tyro.conf.arg(help=TASK_HELP)] = None
    model: str | None = None
    """A pipeline's folder or hub id. None: the task's."""
    lora: str | None = None
    """An adapter: a folder or a hub id, in diffusers' or PEFT's format."""
    prompts: Path | None = None
    """A text file with one prompt a line, or GenEval's .jsonl. None: the task's held-out prompts."""
    brackets: bool = False
    """Prompts mark their concepts with brackets, which model and reward do not see."""
    reward: str | None = None
    """A reward as for `star train`: "geneval", "ocr", "ocr:1.0,pickscore:0.5", "module:function". None: the task's."""
    models: dict[str, str] = field(default_factory=dict)
    """Where rewards find their weights, by name: a folder, a file or a hub id."""
    n: Annotated[
        Positive | None,
        tyro.conf.arg(
            help="Number of prompts: the first n of a file, or n held-out ones of a task. "
            f"None: all of a file, {HELD_OUT} of a task."
        ),
    ] = None
    images_per_prompt: Annotated[Positive | None, _images("Images of each prompt.", "images_per_prompt")] = None
    steps: Annotated[Positive | None, _images("Denoising steps.", "steps")] = None
    guidance_scale: Annotated[
        Finite | None, _images("Scale of classifier-free guidance, 1 for none.", "guidance_scale")
    ] = None
    height: Height = None
    width: Width = None
    max_sequence_length: Length = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights; the autoencoder stays in float32."""
    batch: Annotated[Positive | None, _images("Images per forward pass.", "batch")] = None
    seed: Seed = NO_TASK.images.seed
    """Seed of noise and of a task's prompts."""
    out: Path | None = None
    """A new folder for evaluations.jsonl, as a run has it, and results.jsonl, a line for each image."""
    save_images: bool = False
    """Keep the images in `out` too, in GenEval's layout."""
    timeout: AboveZero = 600.0
    """Seconds after which the reward of a batch of images counts as failed."""


@dataclass
class Maps:
    """Draw the concept maps of a prompt."""

    prompt: str = "a red circle left of a blue square"
    """The prompt."""
    task: Annotated[str | None, tyro.conf.arg(help=TASK_HELP)] = None
    model: str | None = None
    """A pipeline's folder or hub id. None: the task's."""
    out: Path = Path("maps.png")
    """File of the figure."""
    concepts: str = "rules"
    """How concepts are found: rules (English), spacy (a model of the prompt's language) or spacy:MODEL."""
    brackets: bool = False
    """The prompt marks its concepts, "a [red circle] left of a [blue square]"; the model sees it without brackets."""
    steps: Positive = 8
    """Denoising steps."""
    guidance_scale: NotNegative = 1.0
    """Scale of classifier-free guidance; 1 or less for none."""
    max_sequence_length: Length = None
    height: Height = None
    width: Width = None
    layers: tuple[Count, ...] | None = None
    """Blocks to show. None: all."""
    seed: Seed = 1
    """Seed of the noise."""


@dataclass
class Probe:
    """How many images `star probe` samples. Batches are compared with each other: their number decides the
    uncertainty."""

    batches: Annotated[int, Range(least=3)] = 16
    """Number of batches; three are the least that have an error."""
    prompts: Positive = 4
    """Prompts of each batch."""
    images: Annotated[int, Range(least=2)] = 6
    """Images of each prompt."""


@dataclass
class Check:
    """Check a pipeline before a run: bits, maps, words, noise of the log-ratio, implementations."""

    model: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL]")] = None
    """A pipeline's folder or hub id. None: the embedded model."""
    prompt: tuple[str, ...] = ()
    """Prompts to check. Empty: two that suit the model."""
    prompts: Path | None = None
    """A file of prompts, instead of `prompt`."""
    n: Positive = 4
    """Number of prompts: the first n of the file."""
    image: Path | None = None
    """An image for the pipeline to edit, with the first prompt alone."""
    concepts: str = "rules"
    """How concepts are found: rules (English), spacy (a model of the prompt's language) or spacy:MODEL."""
    brackets: bool = False
    """The prompts mark their concepts: "a [red circle] left of a [blue square]"."""
    steps: Annotated[int, Range(least=2)] = 3
    """Denoising steps."""
    height: Positive | None = None
    """Pixels. None: the pipeline's own."""
    width: Positive | None = None
    """Pixels. None: the pipeline's own."""
    frames: Positive = 9
    """Frames of a video."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
    clip_range: NotNegative = 1e-4
    """Clip range of the run; the noise of the log-ratio should lie well below it."""
    noise_level: AboveZero = 0.7
    """Noise level of the run's stochastic steps."""
    seed: Seed = 0
    """Seed of all noise."""
    json: Path | None = None
    """File for the verdicts, as JSON."""


@dataclass
class App:
    """Serve a page that shows an image as it forms, with its maps and weights."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[MODEL ...]")] = ()
    """Pipelines to choose from beside the embedded model: folders or hub ids."""
    only: bool = False
    """Visitors choose from these alone. Without it they may name any folder of this machine and any hub id."""
    largest: Positive = 1024
    """Largest side of an image that visitors may ask for, in pixels."""
    host: str | None = None
    """Address to listen at. None: this machine alone, or GRADIO_SERVER_NAME."""
    port: Annotated[int, Range(least=1, most=65535)] | None = None
    """Port to listen at. None: the first free one from 7860 on, or GRADIO_SERVER_PORT."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Type of the weights."""
