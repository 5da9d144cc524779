"""`star app`: a page in the browser. An image of a prompt as it forms, each concept's map and the weights over it.

    from star import app
    app.serve(only=True)  # the embedded model alone: a Space of Hugging Face needs no more

A visitor's image is kept in the visitor's session and nowhere else.
"""

from __future__ import annotations

import html
import inspect
import io
import logging
import math
import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr
import numpy as np
import torch
from PIL import Image

from star.config import EMBEDDED
from star.messages import WHOLE, one_line
from star.reports.figures import overlay_png, relative_map
from star.reports.gallery import data_url
from star.trace import ONE_IMAGE, Progress, Trace, check_kind, trace
from star.training.pipeline import load_any
from star.training.task import find_task

log = logging.getLogger("star")
MOST_STEPS = 50
MOST_CHARACTERS = 4000  # of a prompt; every text encoder has long cut it
MOST_BYTES = 2**27  # of an image's maps, which are kept as long as its session
LARGEST_SIDE = 1024  # pixels; `--largest` sets another limit
WAITING = 64  # events that wait for their turn; whoever comes then is told that the page is busy
LARGEST, SMALLEST = 512, 96  # longer side of an image that is shown, and of one in the row of steps; pixels
PLAYED = 2.0  # seconds in which an image forms
SESSIONS = 16  # whose images and maps are kept; of more the oldest are dropped
MEAN = "mean of all"
EXAMPLES = ("a red circle left of a blue square", "two green rings", "a yellow cross above a purple triangle")
INTRODUCTION = """# Where the reward goes
STAR gives the update of a text-to-image model to the locations that its own text-image attention names. Draw an image,
then look at each concept's map and at the weights, step by step."""
STYLE = """<style>
.star-tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(200px, 45%), 1fr)); gap: .8rem; }
.star-tiles figure, .star-film figure { margin: 0; }
.star-tiles img { width: 100%; }
.star-film { display: flex; flex-wrap: wrap; gap: .3rem; margin-top: .8rem; }
.star-film [role=listitem] { text-align: center; }
.star-film img { width: 56px; border: 2px solid transparent; }
.star-film [aria-current] img { border-color: var(--color-accent, #e8590c); }
.star-page img { display: block; border-radius: 4px; }
.star-page .few { image-rendering: pixelated; }
.star-page, .star-page figcaption { color: var(--body-text-color); }
.star-page figcaption { font-size: .85rem; line-height: 1.3; margin-top: .25rem; overflow-wrap: anywhere; }
.star-wrong { border-left: 4px solid #e03131; padding-left: .6rem; overflow-wrap: anywhere; }
</style>"""


@dataclass(frozen=True)
class Limits:
    """What visitors may ask for. models: names; None: any. side: pixels of an image, at most."""

    models: tuple[str, ...] | None = None
    side: int = LARGEST_SIDE


class Pipelines:
    """The pipeline that was used last. Visitors share its weights and nothing else: one run follows the other, and each
    leaves it as it was."""

    def __init__(self, dtype: str) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.dtype = getattr(torch, dtype)
        self.name: str | None = None
        self.pipeline: Any = None

    def load(self, name: str) -> Any:
        if name != self.name:
            self.name = self.pipeline = None  # not two at once
            if name == EMBEDDED:
                self.pipeline = find_task(EMBEDDED).pipeline(self.device, self.dtype)
            else:
                self.pipeline = load_any(name, self.device, self.dtype)
            self.name = name
        return self.pipeline


def chosen_call(pipeline: Any, name: str, steps: int, guidance: float | None, size: int | None) -> dict[str, Any]:
    """What a pipeline is called with. Raises ValueError for what it does not take."""
    call: dict[str, Any] = {"num_inference_steps": steps}
    if name == EMBEDDED:
        images = find_task(EMBEDDED).images
        call |= dict(height=images.height, width=images.width, guidance_scale=images.guidance_scale)
        call["max_sequence_length"] = images.max_sequence_length
    if guidance is not None:
        call["guidance_scale"] = guidance
    if size is not None:
        call |= dict(height=size, width=size)
    takes = inspect.signature(type(pipeline).__call__).parameters
    if unknown := [name for name in call if name not in takes]:
        raise ValueError(f"{unknown[0]}: {type(pipeline).__name__} takes none; leave the field empty")
    return call


def embedded_prompt(tokenizer: Any, prompt: str) -> str:
    """The prompt in the words of the embedded model. Raises ValueError for another word."""
    vocabulary, prompt = tokenizer.get_vocab(), prompt.lower()
    known = sorted(set(vocabulary) - set(tokenizer.all_special_tokens), key=vocabulary.get)
    unknown = [word for word in re.findall(r"\w+|[^\w\s[\]]", prompt) if word not in known]
    if unknown:
        raise ValueError(f"prompt: {unknown[0]!r} is no word of the embedded model; it knows {', '.join(known)}")
    return prompt


def number(name: str, text: str) -> float | None:
    """What a field holds; None: it is empty. Raises ValueError for what is no number."""
    try:
        value = float(text) if text.strip() else None
    except ValueError:
        value = math.nan
    if value is not None and not math.isfinite(value):
        raise ValueError(f"{name}: got {text!r}, expected a number, or nothing for the model's own")
    return value


def told(error: Exception) -> str:
    """An error on one line."""
    if not isinstance(error, ValueError | OSError | RuntimeError | ImportError | TypeError):
        return f"model: the pipeline failed ({type(error).__name__}: {one_line(error)})"
    return one_line(error, WHOLE)


# --- what is shown ----------------------------------------------------------------------------------------------------


def at_most(image: np.ndarray, side: int) -> np.ndarray:
    """(H, W, 3) uint8, made smaller where its longer side has more pixels."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image
    height, width = (max(1, round(scale * size)) for size in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height)))


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def tile(data: bytes, alt: str, caption: str, few: bool) -> str:
    """An image with words below. few: of so few pixels that they are shown as squares."""
    alt, caption, kind = html.escape(one_line(alt)), html.escape(one_line(caption)), ' class="few"' if few else ""
    return f'<figure><img{kind} src="{data_url(data, "png")}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def draw(shown: Trace | None, step: float, layer: str, strategy: str) -> str:
    """The page's lower half, as HTML. step: counted from 1. layer: MEAN or a block's number."""
    if shown is None:
        return ""
    number = min(max(int(step), 1), len(shown.images))
    block = None if layer == MEAN else int(layer)
    image = at_most(shown.images[number - 1], LARGEST)
    few, when = max(image.shape) < LARGEST / 2, f"after step {number} of {len(shown.images)}"
    tiles = [tile(png(image), f"{shown.prompt}, {when}", f"image {when}", few)]
    base = image / 255.0

    def over(field: np.ndarray, largest: float, name: str, words: str) -> None:
        tiles.append(tile(overlay_png(base, field, largest), f"{name} over the image {when}", words, few=False))

    weights = shown.weights_at(number - 1, block, strategy).numpy()
    over(weights, max(2.0, float(weights.max())), "weights", f"weights, {weights.min():.2f} to {weights.max():.2f}")
    maps = shown.maps_at(number - 1, block).view(-1, *shown.grid).numpy()
    for name, field in zip(shown.concepts, maps, strict=False):  # without a concept there is one empty map
        relative, largest = relative_map(field)
        over(relative, largest, f"map of {name}", f"{name}: up to {relative.max():.1f} times the mean")
    return f'{STYLE}<div class="star-page"><div class="star-tiles">{"".join(tiles)}</div>{film(shown, number)}</div>'


def film(shown: Trace, number: int) -> str:
    """The images after all steps, small."""
    frames = []
    for step, image in enumerate(shown.images, 1):
        current = ' aria-current="step"' if step == number else ""
        few = max(image.shape) < SMALLEST
        frame = tile(png(at_most(image, SMALLEST)), f"after step {step}", str(step), few)
        frames.append(f'<div role="listitem"{current}>{frame}</div>')
    return f'<div class="star-film" role="list" aria-label="steps">{"".join(frames)}</div>'


def summary(shown: Trace) -> str:
    found = f"Concepts: {', '.join(shown.concepts)}." if shown.concepts else ""
    note = f'<span class="star-wrong">{html.escape(shown.note)}</span>' if shown.note else ""
    return f'{STYLE}<div class="star-page" role="status">{html.escape(found)} {note}</div>'


def failure(error: Exception) -> str:
    return f'{STYLE}<div class="star-page"><div class="star-wrong" role="alert">{html.escape(told(error))}</div></div>'


# --- the page ---------------------------------------------------------------------------------------------------------


def make_image(
    pipelines: Pipelines,
    prompt: str,
    model: str | None,
    steps: float,
    seed: float | None,
    guidance: str,
    size: str,
    tell: Progress,
    limits: Limits,
) -> Trace:
    """The trace of what a visitor typed, with images of at most LARGEST pixels. Raises what `trace` raises, and
    ValueError for a field: whoever calls the page's functions without the page is bound by none of its widgets."""
    if not model or not model.strip():
        raise ValueError(f"model: empty, expected {EMBEDDED!r}, a pipeline's folder or a hub id")
    name = model.strip()
    if limits.models is not None and name not in limits.models:
        raise ValueError(f"model: got {one_line(name)!r}, expected one of {', '.join(limits.models)}")
    if len(prompt) > MOST_CHARACTERS:
        raise ValueError(f"prompt: {len(prompt)} characters, expected at most {MOST_CHARACTERS}")
    if not 2 <= steps <= MOST_STEPS:
        raise ValueError(f"steps: got {steps}, expected 2 to {MOST_STEPS}")
    pixels = number("size", size)
    if pixels is not None and (pixels < 1 or pixels % 1):
        raise ValueError(f"size: got {size!r}, expected a whole number of pixels, or nothing for the model's own")
    if pixels is not None and pixels > limits.side:
        raise ValueError(f"size: got {size!r}, expected at most {limits.side} pixels, which star app --largest sets")
    if seed is None or not 0 <= seed < 2**63:
        raise ValueError(f"seed: got {seed}, expected a whole number from 0 on")
    tell(0.0, "loading the model")
    pipeline = pipelines.load(name)
    check_kind(pipeline)
    text = embedded_prompt(pipeline.tokenizer, prompt) if name == EMBEDDED else prompt
    call = chosen_call(
        pipeline, name, int(steps), number("guidance", guidance), None if pixels is None else int(pixels)
    )
    made = trace(pipeline, text, call, int(seed), tell, MOST_BYTES)
    return replace(made, images=tuple(at_most(image, LARGEST) for image in made.images))


def page(
    models: Sequence[str] = (), only: bool = False, dtype: str = "float32", largest: int = LARGEST_SIDE
) -> gr.Blocks:
    """The page.

    Args:
        models: folders or hub ids to choose from beside the embedded model.
        only: visitors choose from these alone; else they may name any folder of this machine and any hub id.
        dtype: of the weights.
        largest: pixels of an image's side that visitors may ask for, at most.
    """
    pipelines, limits = Pipelines(dtype), Limits((EMBEDDED, *models) if only else None, largest)

    def generate(prompt, model, steps, seed, guidance, size, progress=gr.Progress()):  # noqa: B008  gradio's way
        try:
            tell = lambda share, doing: progress(share, doing)
            made = make_image(pipelines, prompt, model, steps, seed, guidance, size, tell, limits)
        except Exception as error:  # a visitor's mistake must not become a traceback, whatever a pipeline raises
            log.warning("app: %s", told(error), exc_info=bool(os.environ.get("STAR_DEBUG")))
            return None, failure(error), gr.skip(), gr.skip()
        last = len(made.images)
        layers = gr.Dropdown([MEAN, *map(str, made.blocks)], value=MEAN, interactive=True)
        return made, summary(made), gr.Slider(1, last, value=1, interactive=True), layers

    def play(shown: Trace | None, layer: str, strategy: str) -> Iterator[tuple[Any, str]]:
        if shown is None:
            yield gr.skip(), ""
            return
        for step in range(1, len(shown.images) + 1):
            yield step, draw(shown, step, layer, strategy)
            time.sleep(PLAYED / len(shown.images))

    with gr.Blocks(title="star app", analytics_enabled=False) as blocks:
        shown = gr.State()
        gr.Markdown(INTRODUCTION)
        with gr.Row():
            prompt = gr.Textbox(
                EXAMPLES[0],
                label="Prompt",
                info="[Brackets] mark concepts; without any they are found.",
                scale=4,
                min_width=260,
            )
            button = gr.Button("Draw", variant="primary", scale=1, min_width=120)
        gr.Examples([[example] for example in EXAMPLES], [prompt], label="For the embedded model")
        with gr.Accordion("Model and sampling", open=False):
            with gr.Row():
                model = gr.Dropdown(
                    [EMBEDDED, *models],
                    value=EMBEDDED,
                    label="Model",
                    info=f"{EMBEDDED}: the embedded one{'' if only else '; or a pipeline: its folder or hub id'}",
                    allow_custom_value=not only,
                )
                steps = gr.Slider(2, MOST_STEPS, value=8, step=1, label="Steps")
            with gr.Row():
                seed = gr.Number(1, label="Seed", precision=0)
                # An empty gr.Number is 0 once it has been seen.
                guidance = gr.Textbox("", label="Guidance", placeholder="the model's own")
                size = gr.Textbox("", label="Size", placeholder="the model's own", info="pixels of a side")
        message = gr.HTML()
        with gr.Row():
            step = gr.Slider(1, 8, value=1, step=1, label="Step", interactive=False)
            layer = gr.Dropdown([MEAN], value=MEAN, label="Layer", interactive=False)
            strategy = gr.Dropdown(list(ONE_IMAGE), value=ONE_IMAGE[0], label="Strategy of the weights")
        picture = gr.HTML()

        asked = [prompt, model, steps, seed, guidance, size]
        for event in (button.click, prompt.submit):
            event(generate, asked, [shown, message, step, layer], concurrency_id="pipeline", concurrency_limit=1).then(
                play, [shown, layer, strategy], [step, picture], show_progress="hidden"
            )
        for event in (step.input, layer.input, strategy.input):
            event(draw, [shown, step, layer, strategy], picture, show_progress="hidden", trigger_mode="always_last")
    return blocks


def serve(
    models: Sequence[str] = (),
    only: bool = False,
    dtype: str = "float32",
    host: str | None = None,
    port: int | None = None,
    wait: bool = True,
    largest: int = LARGEST_SIDE,
) -> gr.Blocks:
    """Serve the page. models, only, dtype, largest: of `page`. host, port: where; None: as gradio's environment
    variables say, else this machine alone and the first free port from 7860 on. wait: until the process is
    interrupted."""
    blocks = page(models, only, dtype, largest).queue(max_size=WAITING)
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    theme.set(block_info_text_color="*neutral_500")  # gradio's own is too pale to read on white
    blocks.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not wait,
        state_session_capacity=SESSIONS,
        max_file_size=1,  # byte: the page takes no file, but gradio's address for them is open
        theme=theme,
        footer_links=["gradio"],
    )
    return blocks
