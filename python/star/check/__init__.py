"""What holds for a pipeline before a run: bits, maps, words, the noise of the log-ratio, and what runs natively.

for verdict in check(pipeline, Question(prompts, dict(num_inference_steps=3))):
    print(verdict.level, verdict.name, verdict.words)
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from star.capture import capture
from star.capture.blocks import unwrapped
from star.check.noise import AUTOCAST, BATCH, Floor, evaluating, floors
from star.check.passes import Arguments, Passes, record
from star.concepts import ConceptTokens, Said, concept_tokens, said, unbracket
from star.messages import one_line
from star.tap import tapped
from star_kernels.api import implementations
from star_kernels.ops import OPERATORS

Level = Literal["ok", "warning", "wrong"]
QUERIES = 256  # image tokens whose softmax is materialized


@dataclass(frozen=True)
class Verdict:
    """On one question. lines: what is shown under the words."""

    name: str
    level: Level
    words: str
    lines: tuple[str, ...] = ()


@dataclass(frozen=True)
class Question:
    """What is asked of a pipeline.

    prompts: some; one for a pipeline that edits an image. call: what the pipeline is called with besides them, with
    num_inference_steps. source, brackets: of `star.concept_tokens`. clip_range, noise_level: those of the run. seed: of
    all noise.
    """

    prompts: Sequence[str]
    call: Mapping[str, Any]
    source: str = "rules"
    brackets: bool = False
    clip_range: float = 1e-4
    noise_level: float = 0.7
    seed: int = 0


def check(pipeline: Any, question: Question) -> list[Verdict]:
    """The verdicts on a pipeline of diffusers whose transformer has a row in `star.layouts.LAYOUTS`.

    The pipeline is called once, without decoding; its transformer then makes the same passes again.

    Raises ValueError for no prompt and fewer than two steps, and what `star.concept_tokens` and the pipeline's call
    raise."""
    steps = question.call.get("num_inference_steps")
    if not isinstance(steps, int) or steps < 2:
        raise ValueError(f"call: got num_inference_steps {steps}, expected at least 2")
    if not question.prompts:
        raise ValueError("prompts: got none, expected at least one")
    tokens, spoken = words(pipeline, question)
    texts = unbracket(question.prompts)[0] if question.brackets else list(question.prompts)
    generator = torch.Generator().manual_seed(question.seed)
    with torch.no_grad():
        passes = record(pipeline, texts, {**question.call, "generator": generator})
    return [
        _judged("bits", lambda: bits(passes, tokens)),
        _judged("maps", lambda: maps(passes, tokens)),
        spoken,
        _judged("noise", lambda: noise(passes, question)),
        _judged("native", lambda: native(passes)),
    ]


def _judged(name: str, verdict: Callable[[], Verdict]) -> Verdict:
    """A verdict, or why there is none."""
    try:
        return verdict()
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        return Verdict(name, "wrong", one_line(error))


# --- words ------------------------------------------------------------------------------------------------------------


def words(pipeline: Any, question: Question) -> tuple[ConceptTokens, Verdict]:
    """Which tokens say which concept. Wrong where none does."""
    how: dict[str, Any] = dict(source=question.source, brackets=question.brackets, call=question.call)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = said(pipeline, question.prompts, **how)
    with warnings.catch_warnings(record=True) as of_tokens:
        warnings.simplefilter("always")
        tokens = concept_tokens(pipeline, question.prompts, **how)
    told = [str(one.message) for one in caught if str(one.message).startswith("concepts:")]
    told += [str(one.message) for one in of_tokens if str(one.message).startswith("prompts:")]
    lost = [one for row in found for one in row if not one.tokens]
    lines: list[str] = []
    for prompt, row in zip(question.prompts, found, strict=True):
        lines.append(one_line(prompt, 100))
        width = max((len(one.concept.text) for one in row), default=0)
        lines += [f"  {one.concept.text:{width}}  {_spelled(one)}" for one in row] or ["  no concept: weights are 1"]
    if lost:
        names = ", ".join(repr(one.concept.text) for one in lost[:3])
        why = "the prompt is cut before it" if lost[0].cut else "the pipeline rewrites or drops it"
        return tokens, Verdict("words", "wrong", f"no token says {names}: {why}", (*told, *lines))
    if told or not all(found):
        return tokens, Verdict("words", "warning", told[0] if told else "a prompt has no concept", tuple(lines))
    prompts = "1 prompt" if len(found) == 1 else f"{len(found)} prompts"
    return tokens, Verdict("words", "ok", f"every concept of {prompts} has its text tokens", tuple(lines))


def _spelled(one: Said) -> str:
    """The rows of the embeddings and what they say, for each encoder."""
    parts = []
    for part in one.tokens:
        rows = [row for row, _ in part]
        runs = [[row for _, row in run] for _, run in groupby(enumerate(rows), lambda pair: pair[1] - pair[0])]
        where = ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
        parts.append(f"{where}: " + "|".join(text for _, text in part))
    return "   ".join(parts) if parts else f"no token{', cut' if one.cut else ''}"


# --- bits and maps ----------------------------------------------------------------------------------------------------


def _pass(passes: Passes) -> Arguments:
    """The one that is looked at: with the prompts, of the last step."""
    return passes.steps[-1][0]


def bits(passes: Passes, tokens: ConceptTokens) -> Verdict:
    """Whether a pass has the same bits with capture on."""
    one = _pass(passes)
    with evaluating(passes.transformer), torch.no_grad():
        plain, again = passes.output(one), passes.output(one)
        with capture(passes.transformer, tokens) as captured:
            during = passes.output(one)
        after = passes.output(one)
    if not _same(plain, again):
        return Verdict("bits", "wrong", f"two passes without capture differ by {_apart(plain, again):.1e}")
    for name, other in (("with capture on", during), ("after capture", after)):
        if not _same(plain, other):
            return Verdict("bits", "wrong", f"the output {name} differs by {_apart(plain, other):.1e}")
    return Verdict("bits", "ok", f"the output has the same bits with capture on, over {len(captured.blocks)} blocks")


def _same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num()) and torch.equal(a.isnan(), b.isnan())


def _apart(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).abs().max().item()


class _Keeper:
    """Keeps the attention call to the text of a block."""

    def __init__(self, keys: int | None) -> None:
        self.keys = keys
        self.seen: tuple[Tensor, Tensor, Tensor | None, float] | None = None
        self.lse = False

    def sees(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None) -> None:
        if self.keys is None or self.keys == key.shape[2]:
            self.seen = query, key, mask, query.shape[-1] ** -0.5 if scale is None else scale
            self.lse = lse is not None


def _kept(passes: Passes, blocks: Sequence[int]) -> dict[int, _Keeper]:
    """The attention calls of these blocks in the pass that is looked at."""
    one, keys = _pass(passes), passes.shown(_pass(passes)).keys
    attentions = passes.layout.attentions(unwrapped(passes.transformer))
    keepers = {block: _Keeper(keys) for block in blocks}
    before = {block: attentions[block].processor for block in blocks}
    try:
        for block, keeper in keepers.items():
            attentions[block].processor = tapped(before[block], keeper)
        with evaluating(passes.transformer), torch.no_grad():
            passes.output(one)
    finally:
        for block, processor in before.items():
            attentions[block].processor = processor
    return keepers


def maps(passes: Passes, tokens: ConceptTokens) -> Verdict:
    """Whether the maps of the block in the middle are the columns of a softmax that is materialized in float64."""
    one = _pass(passes)
    with evaluating(passes.transformer), torch.no_grad(), capture(passes.transformer, tokens) as captured:
        passes.output(one)
    number = len(captured.blocks) // 2
    block, found = captured.blocks[number], captured.layers()[number]
    seen = _kept(passes, [block])[block].seen
    if seen is None:
        return Verdict("maps", "wrong", f"block {block} makes no attention call to the text")
    chosen = torch.linspace(0, found.shape[-1] - 1, min(QUERIES, found.shape[-1])).long()
    columns = captured.columns[:, : tokens.index.shape[1], : tokens.index.shape[2]].cpu()
    expected = _softmax(passes, columns, tokens.weight.double().cpu(), seen, chosen)
    found = found[:, : expected.shape[1], chosen.to(found.device)].double().cpu()
    low = seen[0].dtype in (torch.bfloat16, torch.float16)
    allowed = 2e-2 if low else 1e-4
    error = ((found - expected).abs() / (expected + 1e-3 * expected.max()).clamp_min(1e-30)).max().item()
    words = f"block {block}: off the float64 softmax by {error:.1e} at most, allowed {allowed:.0e}"
    return Verdict("maps", "ok" if error <= allowed else "wrong", f"{words} ({len(chosen)} image tokens)")


def _softmax(
    passes: Passes,
    columns: Tensor,
    weight: Tensor,
    seen: tuple[Tensor, Tensor, Tensor | None, float],
    chosen: Tensor,
) -> Tensor:
    """(B, G, chosen) float64 on the CPU, for some image tokens: the mean over the heads of the weighted columns."""
    shown = passes.shown(_pass(passes))
    rows, (query, key, mask, scale) = passes.rows(shown), seen
    image = shown.image + chosen
    query = query[rows][:, :, image.to(query.device)].double().cpu()
    key = key[rows].double().cpu().repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.mT * scale
    if mask is not None:
        mask = (mask[rows] if len(mask) > 1 else mask).cpu()
        mask = mask if mask.shape[2] == 1 else mask[:, :, image]
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.double()
    probability = scores.softmax(-1).mean(1)
    said = [probability[b][:, columns[b].clamp_min(0)] * weight[b] * (columns[b] >= 0) for b in range(len(columns))]
    return torch.stack([one.sum(-1).T for one in said])


# --- noise ------------------------------------------------------------------------------------------------------------


def noise(passes: Passes, question: Question) -> Verdict:
    """How far the log-ratio of the policy to itself is from 0, against the clip range."""
    found = floors(passes, question.noise_level, question.seed)
    width = max(len(floor.way) for floor in found)
    lines = [f"{'|log-ratio| of the policy to itself':{width}}  exact    as two log-probs"]
    lines += [f"{floor.way:{width}}  {_numbers(floor)}" for floor in found]
    clip = f"clip_range {question.clip_range:g}"
    above = [floor for floor in found if floor.error is None and floor.largest > question.clip_range]
    same = [floor for floor in above if floor.way not in (BATCH, AUTOCAST)]
    if same:
        words = f"{clip} lies below the noise of {same[0].way!r}, {same[0].largest:.1e}: the first ratio is not 1"
        return Verdict("noise", "wrong", words, tuple(lines))
    if any(floor.way == BATCH for floor in above):
        words = f"{clip} lies below the noise of another batch size, {above[0].largest:.1e}: update in the rollout's"
        return Verdict("noise", "warning", words, tuple(lines))
    failed = [floor for floor in found if floor.error is not None]
    if failed:
        return Verdict("noise", "warning", f"{failed[0].way!r} cannot run", tuple(lines))
    guided = "" if passes.guidance is None else f", guidance {passes.guidance:g}"
    but = ", but below that of autocast in one pass alone" if above else ""
    return Verdict("noise", "ok", f"{clip} lies above it{guided}{but}", tuple(lines))


def _numbers(floor: Floor) -> str:
    return floor.error or f"{floor.difference:<8.1e} {floor.subtracted:.1e}"


# --- what runs --------------------------------------------------------------------------------------------------------


def native(passes: Passes) -> Verdict:
    """What runs in kernels, and what falls back."""
    model = unwrapped(passes.transformer)
    device = next(passes.transformer.parameters()).device
    used: dict[str, list[str]] = {}
    for operator in OPERATORS:
        found = implementations(operator, device)
        used.setdefault(next(name for name, reason in found.items() if reason is None), []).append(operator)
    slow = used.get("reference", [])
    attentions = passes.layout.attentions(model)
    default = len(attentions) if passes.layout.default is None else passes.layout.default(model)
    blocks = range(default)
    given = sum(keeper.lse for keeper in _kept(passes, blocks).values())
    parents = {id(child): module for module in model.modules() for child in module.children()}
    compiled = sum(_is_compiled(parents.get(id(attentions[block]), model)) for block in blocks)
    compiled = len(blocks) if _is_compiled(passes.transformer) else compiled
    backends = sorted({_backend(attentions[block].processor) for block in blocks})
    lines = (
        *(f"{name} on {device.type}: {', '.join(operators)}" for name, operators in used.items()),
        f"attention: {', '.join(backends)}; its log-sum-exp is used in {given} of {len(blocks)} blocks"
        + ("" if given == len(blocks) else ", in the others the operator makes its own"),
        f"compiled: {compiled} of {len(blocks)} blocks",
    )
    if slow:
        words = f"{', '.join(slow)} run as plain PyTorch on {device.type}; star info says why"
        return Verdict("native", "warning", words, lines)
    return Verdict("native", "ok", f"every operator runs in a kernel on {device.type}", lines)


def _is_compiled(module: Any) -> bool:
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def _backend(processor: Any) -> str:
    asked = getattr(processor, "_attention_backend", None)
    if asked is None:
        try:
            from diffusers.models.attention_dispatch import _AttentionBackendRegistry as registry
        except ImportError:  # older versions have one backend
            return "native"
        asked = registry.get_active_backend()[0]
    return str(getattr(asked, "value", asked))
