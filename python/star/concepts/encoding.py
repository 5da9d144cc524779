"""What a pipeline's text encoders read, and which row of its embeddings each token of that becomes.

The pipeline itself tells. A copy of it is called as a user calls it, up to the embeddings of its prompts, with encoders
that give numbers of tokens for hidden states. Whatever the pipeline does on the way (templates, tokens that it drops,
padding left or right, masks, texts that it joins) happens to the numbers too, so nothing of it is written down here.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from star.messages import one_line

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROBE = "qzjxvk"  # a prompt that no template has within
STRIDE = 1 << 20  # more than the tokens of a text
LAYERS = 128  # at least as many as a text encoder has


class Span(NamedTuple):
    """Characters [start, end) of a text."""

    start: int
    end: int


@dataclass(frozen=True)
class Part:
    """A prompt as one encoder reads it.

    text: with whatever the pipeline puts around the prompt. prompt: where the text has it.
    offsets: for each token its characters of the text; empty ones of special tokens and padding.
    rows: for each token its row of the embeddings, -1 for one that the pipeline drops.
    cut: whether the tokenizer left out the end of the text.
    """

    text: str
    prompt: Span
    offsets: tuple[Span, ...]
    rows: tuple[int, ...]
    cut: bool


class _Text(NamedTuple):
    """A row of a tokenizer's output. encoding: of the `tokenizers` library; None from a slow tokenizer."""

    text: Any
    ids: list[int]
    encoding: Any


class _Encoded(Exception):
    """Ends the pipeline's call when it has the embeddings."""

    def __init__(self, prompts: Any, results: Any) -> None:
        self.prompts, self.results = prompts, results


class _Output(SimpleNamespace):
    """Of a text encoder: its fields, or its first one by index."""

    def __getitem__(self, index: int) -> Tensor:
        return self.first if index == 0 else self.pooler_output


class _Numbering(torch.nn.Module):
    """Stands for a text encoder. Its hidden states have one channel: the number of each token of all texts so far."""

    def __init__(self, texts: list[_Text], read: list[_Text | None], pools: bool) -> None:
        super().__init__()
        self.texts, self.read, self.pools = texts, read, pools
        self.config = SimpleNamespace(d_model=1, hidden_size=1)
        self.dtype, self.device = torch.float64, torch.device("cpu")
        self.model = torch.nn.Module()  # Qwen-Image-2.1 hangs a hook on the encoder's last norm
        self.model.norm = torch.nn.Identity()

    def forward(self, input_ids: Tensor, *_: Any, **__: Any) -> _Output:
        first = len(self.read)
        self.read += self._texts_of(input_ids.tolist())
        rows, tokens = input_ids.shape
        number = (first + torch.arange(rows, dtype=torch.float64))[:, None] * STRIDE + torch.arange(1, tokens + 1)
        states, pooled = number[..., None], torch.zeros(rows, 1, dtype=torch.float64)
        return _Output(
            first=pooled if self.pools else states,
            hidden_states=(states,) * LAYERS,
            last_hidden_state=states,
            pooler_output=pooled,
            text_embeds=pooled,
        )

    def _texts_of(self, ids: list[list[int]]) -> list[_Text | None]:
        """The texts that were tokenized to these ids, one after the other; the last such ones."""
        for start in range(len(self.texts) - len(ids), -1, -1):
            run = self.texts[start : start + len(ids)]
            if all(text.ids == row for text, row in zip(run, ids, strict=True)):
                return list(run)
        return [None] * len(ids)


def _recording(tokenizer: Any, texts: list[_Text]) -> Any:
    """A tokenizer that also keeps what it is called with. A processor is one if its tokenizer is."""
    kind, copy = type(tokenizer), object.__new__(type(tokenizer))
    vars(copy).update(vars(tokenizer))
    if hasattr(tokenizer, "tokenizer"):
        copy.tokenizer = _recording(tokenizer.tokenizer, texts)
        return copy

    def call(self: Any, *args: Any, **options: Any) -> Any:
        found = kind.__call__(self, *args, **options)
        text = args[0] if args else options.get("text")
        batch = [text] if isinstance(text, str) else list(text or [])
        ids = found["input_ids"]
        ids = ids.tolist() if hasattr(ids, "tolist") else ids
        ids = ids if ids and isinstance(ids[0], list) else [ids]
        encodings = getattr(found, "encodings", None) or [None] * len(batch)
        if len(batch) == len(ids) == len(encodings):
            texts.extend(map(_Text, batch, ids, encodings))
        return found

    copy.__class__ = type(kind.__name__, (kind,), {"__call__": call, "__module__": kind.__module__})
    return copy


def _copy(pipeline: Any, texts: list[_Text], read: list[_Text | None]) -> Any:
    """The pipeline on the CPU with recording tokenizers and numbering encoders, whose call ends in _Encoded."""
    kind = type(pipeline)

    def encode_prompt(self: Any, *args: Any, **options: Any) -> None:
        prompts = options.get("prompt", args[0] if args else None)
        prompts = [prompts] if isinstance(prompts, str) else list(prompts or [])
        if "dtype" in options:
            options["dtype"] = torch.float64  # a narrower one rounds the numbers
        raise _Encoded(prompts, kind.encode_prompt(self, *args, **options))

    own = dict(encode_prompt=encode_prompt, check_inputs=lambda *_, **__: None, _execution_device=torch.device("cpu"))
    copy: Any = object.__new__(type(kind.__name__, (kind,), {**own, "__module__": kind.__module__}))
    parts = {name: part for name, part in vars(pipeline).items() if name not in own}
    parameters = inspect.signature(kind.__init__).parameters
    numbering: dict[str, Any] = {}
    for name in [
        name for name, part in parts.items() if name.startswith(("tokenizer", "processor")) and callable(part)
    ]:
        encoder = name.replace("tokenizer", "text_encoder").replace("processor", "text_encoder")
        known = f"{getattr(parameters.get(encoder), 'annotation', '')} {type(parts.get(encoder)).__name__}"
        numbering[encoder] = _Numbering(texts, read, pools="WithProjection" in known)
        parts[name] = _recording(parts[name], texts)
    for name, part in list(parts.items()):
        if name.startswith("text_encoder") and (part is None or isinstance(part, torch.nn.Module)):
            parts[name] = None
    if parts.get("transformer") is None:
        parts["transformer"] = SimpleNamespace(dtype=torch.float64)
    # Without a scheduler a call that goes on behind the embeddings ends before the model.
    vars(copy).update(parts, **numbering, scheduler=None)
    return copy


def _embeddings(pipeline: Any, result: Any, copy: Any) -> Sequence[Tensor]:
    """(T, channels) of each prompt as the transformer gets them, of the numbers that encode_prompt gave."""
    embeds, *others = result if isinstance(result, tuple) else (result,)
    connectors = getattr(pipeline, "connectors", None)
    if connectors is not None:
        embeds = _connected(connectors, embeds, others[0], getattr(copy.tokenizer, "padding_side", "left"))
    return embeds


def _connected(connectors: Any, embeds: Tensor, mask: Tensor, padding_side: str) -> Tensor:
    """What LTX-2's connectors make of the numbers: they mix tokens and leave each where its row is, but move padding
    behind them. Their own code runs, with projections, blocks and norms that do nothing."""

    def without(module: torch.nn.Module, **replaced: torch.nn.Module) -> Any:
        copy = object.__new__(type(module))
        vars(copy).update(vars(module), _parameters=dict(module._parameters))
        copy._modules = {name: replaced.get(name, child) for name, child in module._modules.items()}
        return copy

    numbers = embeds[..., :1]
    sequence = {}
    for name in ("video_connector", "audio_connector"):
        one = without(getattr(connectors, name), transformer_blocks=torch.nn.ModuleList(), norm_out=torch.nn.Identity())
        if one.learnable_registers is not None:
            one._parameters["learnable_registers"] = torch.zeros(len(one.learnable_registers), 1)
        sequence[name] = one
    projections = {name: _Constant(numbers) for name in connectors._modules if name.endswith("proj_in")}
    wide = numbers.expand(-1, -1, connectors.config.caption_channels)
    return without(connectors, **sequence, **projections)(wide, mask, padding_side=padding_side)[0]


class _Constant(torch.nn.Module):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, *_: Any) -> Tensor:
        return self.value


def _parts(pipeline: Any, prompts: Sequence[str], options: Mapping[str, Any]) -> list[list[tuple[_Text, list[int]]]]:
    """For each prompt the texts that its embeddings are of, with the row of each token or -1."""
    texts: list[_Text] = []
    read: list[_Text | None] = []
    kind = type(pipeline).__name__
    copy = _copy(pipeline, texts, read)
    try:
        copy(prompt=list(prompts), **options)
    except _Encoded as end:
        found, encoded = end.results, end.prompts
    except Exception as error:
        raise ValueError(
            f"pipeline: {kind} cannot encode these prompts ({one_line(error)}); give what else its call needs, such as "
            "image, in call="
        ) from error
    else:
        raise TypeError(f"pipeline: {kind} makes no embeddings with encode_prompt; use star.concepts.locate")
    embeds = _embeddings(pipeline, found, copy)
    if encoded != list(prompts) or len(embeds) != len(prompts):
        raise ValueError(
            f"pipeline: {kind} encodes {len(embeds)} texts of {len(prompts)} prompts, expected one text per prompt"
        )
    result = []
    for rows in embeds:
        if rows.dtype != torch.float64:
            raise ValueError(f"pipeline: {kind} rounds its embeddings to {rows.dtype}; use star.concepts.locate")
        parts: dict[int, list[int]] = {}
        for row, number in enumerate(rows[:, 0].tolist()):
            if number:
                which, token = divmod(int(number) - 1, STRIDE)
                text = read[which] if number == int(number) and 0 <= which < len(read) else None
                if text is None or token >= len(text.ids):
                    raise ValueError(
                        f"pipeline: {kind} encodes a text that its tokenizers did not make; use star.concepts.locate"
                    )
                parts.setdefault(which, [-1] * len(text.ids))[token] = row
        result.append([(read[which], where) for which, where in parts.items()])
    return result  # type: ignore[return-value]  # none of the texts is None


def read_prompts(
    pipeline: DiffusionPipeline, prompts: Sequence[str], options: Mapping[str, Any] | Sequence[Mapping[str, Any]]
) -> list[list[Part]]:
    """For each prompt its parts, one for each encoder whose tokens are rows of the embeddings, in their order.

    Args:
        pipeline: one of diffusers' with `encode_prompt`, which first returns the embeddings. Its encoders are not
            needed: they may be on any device, or None.
        prompts: B prompts, encoded in one batch.
        options: what else the pipeline is called with; or this for each prompt, which is then encoded alone.

    Raises:
        TypeError: another pipeline, a slow tokenizer.
        ValueError: what the pipeline says of its call, or embeddings of other texts than the prompts.
    """
    kind = type(pipeline).__name__
    if not callable(getattr(type(pipeline), "encode_prompt", None)):
        raise TypeError(f"pipeline: got {kind}, expected one of diffusers' with encode_prompt")
    if not isinstance(options, Mapping):
        if len(options) != len(prompts):
            raise ValueError(f"call: got {len(options)} mappings, expected one for each of {len(prompts)} prompts")
        return [read_prompts(pipeline, [text], one)[0] for text, one in zip(prompts, options, strict=True)]
    if not prompts:
        return []
    real, probed = (_parts(pipeline, texts, options) for texts in (prompts, [PROBE] * len(prompts)))
    result = []
    for prompt, parts, probes in zip(prompts, real, probed, strict=True):
        if len(parts) != len(probes):
            raise ValueError(
                f"prompts: {kind} reads {prompt!r} in {len(parts)} texts, expected {len(probes)} as of others"
            )
        result.append([_part(kind, *part, probe.text) for part, (probe, _) in zip(parts, probes, strict=True)])
    return result


def _part(kind: str, read: _Text, rows: list[int], probe: str) -> Part:
    """probe: the text that is read when the prompt is PROBE."""
    if read.encoding is None:
        raise TypeError(f"pipeline: a tokenizer of {kind} gives no offsets, expected a fast tokenizer")
    before, found, after = probe.partition(PROBE)
    text = read.text
    if not found or PROBE in after or not (text.startswith(before) and text.endswith(after)):
        raise ValueError(
            f"prompts: {kind} reads {one_line(text)!r}, where the prompt cannot be separated from the rest"
        )
    special = read.encoding.special_tokens_mask
    offsets = tuple(
        Span(0, 0) if special[i] else Span(start, end) for i, (start, end) in enumerate(read.encoding.offsets)
    )
    return Part(
        text, Span(len(before), len(text) - len(after)), offsets, tuple(rows), cut=bool(read.encoding.overflowing)
    )
