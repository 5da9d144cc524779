"""One image of any pipeline as it forms: the image after every step and the maps of every block before it.

The pipeline's own call makes both. Its scheduler shows where a step ends; an unfinished image is decoded by the same
call, cut to a single step whose result is replaced, so that no decoder needs code of its own here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from star.capture import Maps, capture
from star.capture.blocks import unwrapped
from star.check import Question, words
from star.check.passes import first_tensor
from star.concepts import ConceptTokens, said, unbracket
from star.layouts import layout_of
from star.objective import Allocation, allocation_weights, captured_steps

Progress = Callable[[float, str], object]
"""Called with the share that is done, 0..1, and with what is being done."""
ONE_IMAGE = ("attention", "topk", "uniform", "random", "inverted", "final_step")
"""Strategies of an image by itself: `shuffled` needs other images, `oracle` a reward."""


@dataclass(frozen=True)
class Trace:
    """An image of S steps.

    prompt: as the model saw it. concepts: G names. note: what is wrong with their tokens, or "". images: S of
    (H, W, 3) uint8, after each step. maps: (S, L, G, N) float32 of each block. means: (S, G, N) float32 over the
    blocks. blocks: their L numbers. grid: (rows, columns) of the N image tokens.
    """

    prompt: str
    concepts: tuple[str, ...]
    note: str
    images: tuple[np.ndarray, ...]
    maps: Tensor
    means: Tensor
    blocks: tuple[int, ...]
    grid: tuple[int, int]

    def maps_at(self, step: int, block: int | None) -> Tensor:
        """(G, N) of a step, counted from 0, and of a block by its number; None: the mean over the blocks."""
        return self.means[step] if block is None else self.maps[step, self.blocks.index(block)]

    def weights_at(self, step: int, block: int | None, strategy: str) -> Tensor:
        """(rows, columns) of mean 1 over the image tokens: what a strategy of ONE_IMAGE allocates at a step."""
        allocation = Allocation(strategy=strategy)  # type: ignore[arg-type]  # an unknown one raises below
        maps = [self.maps_at(at, block) for at in captured_steps(strategy, [step], len(self.images))]
        weights = allocation_weights(
            allocation, maps[0][None] if maps else None, self.grid, patch=1, generator=torch.Generator().manual_seed(0)
        )
        return torch.ones(self.grid) if weights is None else weights[0]


def check_kind(pipeline: Any) -> None:
    """Raise ValueError or TypeError for a pipeline whose maps cannot be captured, before anything runs."""
    name = type(pipeline).__name__
    if not isinstance(getattr(pipeline, "transformer", None), torch.nn.Module):
        raise ValueError(f"model: {name} has no transformer; maps are those of a transformer's attention")
    layout_of(unwrapped(pipeline.transformer))
    if not hasattr(getattr(pipeline, "scheduler", None), "step"):
        raise ValueError(f"model: {name} has no scheduler, which would show where a step ends")


@torch.no_grad()
def trace(
    pipeline: Any,
    prompt: str,
    call: Mapping[str, Any],
    seed: int = 0,
    tell: Progress = lambda share, doing: None,
    most: int | None = None,
) -> Trace:
    """An image of a prompt, step by step. It takes twice the time of the image alone, since every step is decoded.

    Args:
        pipeline: of diffusers, that makes images and whose transformer has a row in `star.layouts.LAYOUTS`. It is left
            as it was, whatever happens.
        prompt: square brackets in it mark its concepts, and are left out for the model.
        call: what the pipeline is called with besides the prompt and the generator.
        seed: of the noise.
        tell: of the progress.
        most: bytes of the maps of all steps and blocks, which are in memory together. None: no limit.

    Raises:
        TypeError: a class of transformers whose maps cannot be captured.
        ValueError: more maps than `most`, an empty prompt, a pipeline without a transformer or of videos, and what its
            call raises.
    """
    check_kind(pipeline)
    if not prompt.strip():
        raise ValueError("prompt: empty, expected what the image shows")
    brackets = "[" in prompt
    ((text,), _) = unbracket([prompt]) if brackets else ([prompt], None)
    tokens, verdict = words(pipeline, Question([prompt], call, brackets=brackets))
    (found,) = said(pipeline, [prompt], brackets=brackets, call=call)
    steps, last = _denoise(pipeline, text, _Steps(pipeline.transformer, tokens, most), call, seed, tell)
    images = []
    for number, latents in enumerate(steps.latents[:-1]):
        tell(0.5 + 0.5 * number / len(steps.latents), f"decoding step {number + 1}")
        images.append(decode(pipeline, text, call, latents))
    return Trace(
        prompt=text,
        concepts=tuple(one.concept.text for one in found),
        note="" if verdict.level == "ok" else verdict.words,
        images=(*images, last),
        maps=torch.stack(steps.maps),
        means=torch.stack(steps.means),
        blocks=steps.blocks,
        grid=steps.grid,
    )


class _Steps:
    """Keeps the maps of each step's first pass, which has the prompt in diffusers' order, and each step's latents."""

    def __init__(self, transformer: torch.nn.Module, tokens: ConceptTokens, most: int | None) -> None:
        self.transformer, self.tokens, self.most = transformer, tokens, most
        self.maps: list[Tensor] = []
        self.means: list[Tensor] = []
        self.latents: list[Tensor] = []
        self.blocks: tuple[int, ...] = ()
        self.grid: tuple[int, int] = (0, 0)
        self._capturing = ExitStack()
        self._maps: Maps | None = None

    def begin(self) -> None:
        self._maps = self._capturing.enter_context(capture(self.transformer, self.tokens))

    def end(self) -> None:
        self._maps = None
        self._capturing.close()

    def passed(self, module: torch.nn.Module, arguments: tuple, output: Any) -> None:
        """A pass was made: of a step's further passes, whose texts may be shorter, nothing is read."""
        if self._maps is None:
            return
        maps = self._maps
        assert maps.grid is not None  # the pass has shown it
        if len(maps.grid) != 2:
            raise ValueError("model: the pipeline makes videos, expected one of images")
        self.blocks, self.grid = maps.blocks, (maps.grid[0], maps.grid[1])
        self.maps.append(maps.layers()[:, 0].cpu())
        size = sum(one.numel() * one.element_size() for one in self.maps)
        if self.most is not None and size > self.most:
            raise ValueError(
                f"maps: more than {self.most / 2**20:.0f} MiB in {len(self.maps)} steps of {self.maps[0].shape[1]} "
                "concepts; ask for fewer steps, a smaller size or fewer concepts"
            )
        self.means.append(maps.read()[0].cpu())
        self.end()

    def stepped(self, result: Any) -> None:
        """The scheduler made a step."""
        self.latents.append(first_tensor(result).clone())
        self.end()
        self.begin()


@contextmanager
def _replaced(owner: Any, **methods: Callable[..., Any]) -> Iterator[None]:
    """Other methods of an object for a while; its own come back, also those that somebody had replaced."""
    own = {name: vars(owner)[name] for name in methods if name in vars(owner)}
    for name, method in methods.items():
        setattr(owner, name, functools.wraps(getattr(owner, name))(method))  # pipelines look at their parameters
    try:
        yield
    finally:
        for name in methods:
            delattr(owner, name)
        vars(owner).update(own)


def _denoise(
    pipeline: Any, text: str, steps: _Steps, call: Mapping[str, Any], seed: int, tell: Progress
) -> tuple[_Steps, np.ndarray]:
    """What the steps of one call of the pipeline show, and its image."""
    scheduler = pipeline.scheduler
    advance, count = scheduler.step, call.get("num_inference_steps")

    def step(*args: Any, **options: Any) -> Any:
        result = advance(*args, **options)
        steps.stepped(result)
        done = len(steps.latents)
        tell(0.5 * done / max(done, count or 2 * done), f"step {done}")
        return result

    handle = pipeline.transformer.register_forward_hook(steps.passed)
    try:
        with _replaced(scheduler, step=step):
            steps.begin()
            image = _called(pipeline, text, call, seed)
    finally:
        steps.end()
        handle.remove()
    if not steps.latents or len(steps.maps) != len(steps.latents):
        raise ValueError(f"model: made {len(steps.maps)} passes in {len(steps.latents)} steps, expected one in each")
    return steps, image


@torch.no_grad()
def decode(pipeline: Any, text: str, call: Mapping[str, Any], latents: Tensor) -> np.ndarray:
    """The image, (H, W, 3) uint8, of latents as the pipeline's scheduler returns them, by the pipeline's own call."""
    scheduler = pipeline.scheduler
    schedule, advance = scheduler.set_timesteps, scheduler.step

    def set_timesteps(*args: Any, **options: Any) -> None:
        schedule(*args, **options)
        scheduler.timesteps = scheduler.timesteps[:1]

    def step(*args: Any, **options: Any) -> Any:
        result = advance(*args, **options)
        if isinstance(result, tuple):
            return (latents.clone(), *result[1:])
        result.prev_sample = latents.clone()
        return result

    with _replaced(scheduler, set_timesteps=set_timesteps, step=step):
        return _called(pipeline, text, call, 0)


def _called(pipeline: Any, text: str, call: Mapping[str, Any], seed: int) -> np.ndarray:
    """The one image of a call."""
    output = pipeline(prompt=text, generator=torch.Generator().manual_seed(seed), output_type="pil", **call)
    images: Sequence[Any] | None = getattr(output, "images", None)
    if images is None:
        raise ValueError(f"model: {type(pipeline).__name__} makes no images")
    return np.asarray(images[0].convert("RGB"))
