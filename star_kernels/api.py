"""The public function of each operator: it checks the arguments, picks an implementation and calls it."""

from __future__ import annotations

import functools
import importlib.util
import math
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from star_kernels import autograd, native
from star_kernels.checks import (
    LEAST_POSITIVE,
    check_choice,
    check_elements,
    check_index,
    check_latents,
    check_tensor,
    checked_adv_clip,
    checked_clip_range,
    checked_grid,
    checked_number,
    checked_patch,
    is_dense,
)
from star_kernels.ops import ALLOCATE, ATTENTION_MAPS, GAUSSIAN_STEP, OPERATORS, has_values
from star_kernels.reference import NFT_STATISTICS, STATISTICS, compute_dtype
from star_kernels.requirements import install_line
from star_kernels.transition import Transition, channel_dim

Implementation = Literal["auto", "reference", "native", "triton"]
HAS_TRITON = importlib.util.find_spec("triton") is not None
NO_TRITON = f"Triton is not installed; {install_line('triton', 'triton')}"  # made once: torch.compile follows its use
# Beyond these float32 has no room for what is made of them.
SHARPEN, LEAST_CAP = (1e-6, 1e6), 1e-6
TRANSITION_FIELDS = tuple(f"transition.{name}" for name in Transition._fields)


class NamedValues:
    """What a loss saw, each a () float32 tensor.

    values: (number of fields,) float32, all of them in the order of `_fields`. A field is a view of it, made when the
    field is read. The object unpacks and has `_fields` and `_asdict()` like a named tuple.
    """

    _fields: tuple[str, ...] = ()

    def __init__(self, values: Tensor) -> None:
        self.values = values

    def __getattr__(self, name: str) -> Tensor:
        if name not in self._fields:
            raise AttributeError(f"{type(self).__name__} has no {name!r}, expected one of {list(self._fields)}")
        return self.values[self._fields.index(name)]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.values.unbind())

    def __len__(self) -> int:
        return len(self._fields)

    def _asdict(self) -> dict[str, Tensor]:
        return dict(zip(self._fields, self, strict=True))


class Statistics(NamedValues):
    """What a policy loss saw, each a () float32 tensor. "Units" are what the clip acts on: samples, or locations.

    A unit whose log-ratio is not finite makes approx_kl and the three ratios NaN; the shares count it as inside.

    Attributes:
        approx_kl: half the mean squared log-ratio.
        clip_fraction: share of units with a ratio outside the clip range.
        clip_fraction_low: share of units below it.
        clip_fraction_high: share of units above it.
        ratio_mean: mean ratio of the units.
        ratio_min: the smallest.
        ratio_max: the largest.
        kl: the KL term to the reference velocity before its coefficient, 0 without one.
        nonfinite: number of locations whose log-ratio is not finite; if it is not 0, skip the update.
        values: (9,) float32, all of them in this order.
    """

    approx_kl: Tensor
    clip_fraction: Tensor
    clip_fraction_low: Tensor
    clip_fraction_high: Tensor
    ratio_mean: Tensor
    ratio_min: Tensor
    ratio_max: Tensor
    kl: Tensor
    nonfinite: Tensor
    _fields = STATISTICS


class NFTStatistics(NamedValues):
    """What an NFT loss saw, each a () float32 tensor.

    The loss is adv_clip / beta times the sum of the two branches' terms, and the KL term.

    Attributes:
        positive_loss: the positive branch's term.
        negative_loss: the negative branch's term.
        positive_error: mean absolute error of the positive branch's prediction of the clean latents, without weights or
            reward_prob.
        negative_error: the same of the negative branch.
        old_deviation: mean of (velocity - old_velocity)^2.
        old_deviation_max: the largest.
        kl: mean of (velocity - reference_velocity)^2 before its coefficient, 0 without one.
        nonfinite: number of locations at which an error is not finite; if it is not 0, skip the update.
        values: (8,) float32, all of them in this order.
    """

    positive_loss: Tensor
    negative_loss: Tensor
    positive_error: Tensor
    negative_error: Tensor
    old_deviation: Tensor
    old_deviation_max: Tensor
    kl: Tensor
    nonfinite: Tensor
    _fields = NFT_STATISTICS


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns.

    Attributes:
        loss: () float32 (float64 for float64 inputs), with a gradient for the velocity alone.
        statistics: what the loss saw.
    """

    loss: Tensor
    statistics: Statistics


class NFTLoss(NamedTuple):
    """What `nft_loss` returns.

    Attributes:
        loss: () float32 (float64 for float64 inputs), with a gradient for the velocity alone.
        statistics: what the loss saw.
    """

    loss: Tensor
    statistics: NFTStatistics


def implementations(operator: str, device: str | torch.device = "cpu") -> dict[str, str | None]:
    """{implementation: None if it can run on the device, else the reason why not}, best first."""
    if operator not in OPERATORS:
        raise ValueError(f"operator: got {operator!r}, expected one of {sorted(OPERATORS)}")
    entry, device = OPERATORS[operator], torch.device(device)
    reasons: dict[str, str | None] = {}
    if entry.native:
        reasons["native"] = f"no compiled kernel of {operator} for {device.type} tensors"
        if device.type in entry.native:
            reasons["native"] = native.reason(device)
    if entry.triton is not None:
        reason = None
        if not HAS_TRITON:
            reason = NO_TRITON
        elif device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
            reason = "Triton runs on the CPU only in its interpreter, under TRITON_INTERPRET=1"
        elif device.type not in ("cpu", "cuda"):
            reason = f"the Triton kernels run on NVIDIA and AMD GPUs, not on {device.type} tensors"
        # In the interpreter it is for tests: never the automatic choice.
        if device.type == "cpu":
            return reasons | {"reference": None, "triton": reason}
        reasons["triton"] = reason
    return reasons | {"reference": None}


def resolve(operator: str, impl: str, device: torch.device) -> str:
    """The implementation to run. An explicit one, by argument or by STAR_IMPL, never falls back."""
    if not isinstance(impl, str):
        raise TypeError(f"impl: got {type(impl).__name__}, expected 'auto' or the name of an implementation")
    if impl == "auto":
        impl = os.environ.get("STAR_IMPL") or "auto"
    if torch.compiler.is_compiling():  # which looks once in any case, and would warn of a cache
        return choose.__wrapped__(operator, impl, device)
    return choose(operator, impl, device, os.environ.get("TRITON_INTERPRET"))


@functools.cache
def choose(operator: str, impl: str, device: torch.device, interpret: str | None = None) -> str:
    """`resolve` after the environment was read; interpret: TRITON_INTERPRET, which `implementations` reads.

    A cache: to ask CUDA for the device in every call takes longer than the checks of all arguments.
    """
    reasons = implementations(operator, device)
    if impl == "auto":
        chosen = next(name for name, reason in reasons.items() if reason is None)
        if chosen == "reference" and device.type != "meta" and not torch.compiler.is_compiling():
            tell_fallback(operator, device.type)
        return chosen
    if impl not in reasons:
        raise ValueError(f"impl: got {impl!r}, expected 'auto' or one of {list(reasons)} for {operator}")
    if reasons[impl] is not None:
        raise RuntimeError(f"impl={impl!r}: {reasons[impl]}")
    return impl


def tell_fallback(operator: str, device: str) -> None:
    """Say once that an operator runs as plain PyTorch where a kernel could, and what would change that."""
    reasons = implementations(operator, device)
    if device != "cpu":
        missing = "; ".join(reason for reason in reasons.values() if reason)
        warn_once(f"{operator} runs as plain PyTorch on {device} tensors: {missing}")
    elif native.HIDDEN is None:  # told at import
        warn_once(f"star_kernels runs as plain PyTorch on cpu tensors, which is slow: {reasons['native']}")


@functools.cache
def warn_once(text: str) -> None:
    warnings.warn(text, RuntimeWarning, stacklevel=6)


def autocasts(device: str) -> bool:
    """Whether autocast is on for tensors on this type of device."""
    # torch 2.6 cannot trace the second question, which is for devices that torch.compile does not know.
    known = device != "meta" and (torch.compiler.is_compiling() or torch.amp.is_autocast_available(device))
    return known and torch.is_autocast_enabled(device)


def _run(run: Callable, device: torch.device, *arguments: Any) -> Any:
    """run(*arguments) in the types that they have: autocast would choose others for the reference's products."""
    if autocasts(device.type):
        with torch.autocast(device.type, enabled=False):
            return run(*arguments)
    return run(*arguments)


def _run_checked(run: Callable, chosen: str, check: Callable[[], None], device: torch.device, *arguments: Any) -> Any:
    """`_run`, where the values of arguments have a range, for which check raises.

    The compiled CPU kernel looks itself, while it reads them. Which error comes of it depends on torch's version, so
    check says it again. To read values on a GPU, or of a traced tensor, would stop everything.
    """
    if device.type != "cpu" or torch.compiler.is_compiling():
        return _run(run, device, *arguments)
    if chosen != "native":
        if all(map(has_values, arguments)):
            check()
        return _run(run, device, *arguments)
    try:
        return run(*arguments)  # autocast does not know it
    except (RuntimeError, ValueError):
        if all(map(has_values, arguments)):
            check()
        raise


def _check_columns(concept_index: Tensor, keys: int) -> None:
    if concept_index.numel() == 0:
        return
    low, high = concept_index.min().item(), concept_index.max().item()
    if low < -1 or high >= keys:
        raise ValueError(f"concept_index: values in [{low}, {high}], expected -1 or columns in [0, {keys})")


def _check_s(s: Tensor, dtype: torch.dtype) -> None:
    if not s.to(dtype).min().item() > 0:
        raise ValueError("transition.s: has values <= 0; a deterministic step has no density to train on")


def _check_probability(name: str, value: Tensor, dtype: torch.dtype, hint: str) -> None:
    """Check that no value is outside 0..1; one that is not a number shows in the loss."""
    value = value.detach().to(dtype)
    if ((value < 0) | (value > 1)).any().item():
        raise ValueError(f"{name}: has values outside [0, 1]; {hint}")


def _check_locations(velocity: Tensor) -> tuple[int, ...]:
    """Check that velocity is latents with an element; the shape of one value per location of them."""
    check_latents("velocity", velocity)
    check_elements("velocity", velocity.shape)
    if velocity.numel() == 0:
        raise ValueError(f"velocity: got shape {tuple(velocity.shape)}, expected at least one element")
    shape, channel = tuple(velocity.shape), channel_dim(velocity)
    return shape[:channel] + shape[channel + 1 :]


def _checked_kl_coef(kl_coef: float, reference_velocity: Tensor | None, velocity: Tensor) -> float:
    """kl_coef, with the reference velocity that it needs if it is not 0."""
    kl_coef = checked_number("kl_coef", kl_coef)
    if reference_velocity is not None:
        check_tensor("reference_velocity", reference_velocity, tuple(velocity.shape), velocity.device)
    elif kl_coef != 0:
        raise ValueError(f"reference_velocity: got None, expected a tensor for kl_coef={kl_coef}")
    return kl_coef


def _check_transition(transition: Transition, batch: int, device: torch.device) -> None:
    if not isinstance(transition, Transition):
        raise TypeError(f"transition: got {type(transition).__name__}, expected a star_kernels.Transition")
    shape = (batch,)
    for name, field in zip(TRANSITION_FIELDS, transition, strict=True):
        check_tensor(name, field, shape, device)


def attention_maps(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None = None,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    head_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    out: Tensor | None = None,
    impl: Implementation = "auto",
) -> Tensor:
    """Attention mass that each image token puts on each concept, without the attention matrix.

    m[b,g,i] = sum_h head_weight[h] sum_k concept_weight[b,g,k] exp(scale q_i . k_j + key_bias[b,j] - lse_i), with
    j = concept_index[b,g,k].

    Args:
        query: (B, H, N, D) queries of the image tokens, any strides, any floating type.
        key: (B, H', S, D) all keys that the queries attend to, any strides. H' divides H; as in grouped-query attention
            H / H' neighboring heads share a key head.
        concept_index: (B, G, K) int64, columns of `key`; -1 marks an unused slot. Any other index outside [0, S)
            raises on the CPU. On a GPU, where the check would wait for the device, and in a compiled graph it makes the
            map of its concept NaN.
        concept_weight: (B, G, K), default 1 for every used slot.
        lse: (B, H, N) natural log-sum-exp over all S keys, scale and bias included, as attention kernels return it;
            also with N padded at the end or a trailing axis of 1. Without it the operator makes its own pass over the
            keys.
        scale: finite, default D ** -0.5.
        head_weight: (H,), default 1 / H.
        key_bias: (B, S), added to the scaled scores: -inf for a key that is masked. Default none.
        out: (B, G, N), filled and returned instead of a new tensor. Kernels write straight into it if it is contiguous,
            of the type of the maps and in memory of its own.
        impl: "auto" or one of `implementations("attention_maps")`.

    Returns:
        (B, G, N) float32 (float64 for float64 inputs). No gradient flows: a map is a constant of the objective.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or device.
        RuntimeError: `impl` cannot run here.
    """
    return checked_attention_maps(
        query, key, concept_index, concept_weight,
        lse=lse, scale=scale, head_weight=head_weight, key_bias=key_bias, out=out, impl=impl,
    )(query, key, lse, out)  # fmt: skip


class Part(NamedTuple):
    """Neighboring rows and queries of an attention call: those that are read."""

    first_row: int
    rows: int
    first_query: int
    queries: int

    def of(self, query: Tensor, key: Tensor, lse: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Views of the call's tensors, or themselves where all of them is read."""
        if self.rows != len(query):
            query, key = query.narrow(0, self.first_row, self.rows), key.narrow(0, self.first_row, self.rows)
            lse = None if lse is None else lse.narrow(0, self.first_row, self.rows)
        if self.queries != query.shape[2]:
            query = query.narrow(2, self.first_query, self.queries)
            lse = None if lse is None else lse.narrow(2, self.first_query, self.queries)
        return query, key, lse


def _check_maps_arguments(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None,
    lse: Tensor | None,
    head_weight: Tensor | None,
    key_bias: Tensor | None,
    out: Tensor | None,
) -> bool:
    """The tensors of `attention_maps`. Returns whether lse has a trailing axis of its own."""
    check_tensor("query", query, ("B", "H", "N", "D"))
    batch, heads, queries, width = query.shape
    if width == 0:
        raise ValueError(f"query: got shape {tuple(query.shape)}, expected D >= 1")
    device = query.device
    check_tensor("key", key, (batch, "H'", "S", width), device)
    if key.shape[1] == 0 or heads % key.shape[1]:
        raise ValueError(f"key: got {key.shape[1]} heads, expected a divisor of query's {heads}")
    check_index("concept_index", concept_index, (batch, "G", "K"), device)
    groups, slots = concept_index.shape[1:]
    check_elements("query, concept_index", (batch, groups, slots, queries))
    if concept_weight is not None:
        check_tensor("concept_weight", concept_weight, tuple(concept_index.shape), device)
    if head_weight is not None:
        check_tensor("head_weight", head_weight, (heads,), device)
    if key_bias is not None:
        check_tensor("key_bias", key_bias, (batch, key.shape[2]), device)
    trailing = False
    if lse is not None:
        trailing = isinstance(lse, Tensor) and is_dense(lse) and lse.ndim == 4 and lse.shape[-1] == 1
        rows = lse.squeeze(-1) if trailing else lse
        check_tensor("lse", rows, (batch, heads, "N"), device)
        if rows.shape[2] < queries:
            raise ValueError(f"lse: got shape {tuple(rows.shape)}, expected ({batch}, {heads}, {queries})")
    if out is not None:
        check_tensor("out", out, (batch, groups, queries), device)
    return trailing


def _without_common_part(key_bias: Tensor) -> Tensor:
    """A bias whose largest value is 0 in each row, unless it is infinite. Softmax does not see what all keys share, and
    beside a bias as large as -1e38 float32 has no room for the scores and their sum."""
    key_bias = key_bias.to(torch.promote_types(key_bias.dtype, torch.float32))
    largest = key_bias.amax(1, keepdim=True)
    return key_bias - torch.where(largest.isfinite(), largest, 0)


def shares_memory(out: Tensor, *others: Tensor | None) -> bool:
    """Whether another tensor lies in the storage of out."""
    storage = out.untyped_storage()._cdata
    return any(other is not None and other.untyped_storage()._cdata == storage for other in others)


def checked_attention_maps(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None = None,
    *,
    lse: Tensor | None = None,
    scale: float | None = None,
    head_weight: Tensor | None = None,
    key_bias: Tensor | None = None,
    out: Tensor | None = None,
    part: Part | None = None,
    impl: Implementation = "auto",
) -> Callable[[Tensor, Tensor, Tensor | None, Tensor | None], Tensor]:
    """`attention_maps` of its checked arguments, without making the maps: call it with (query, key, lse, out).

    It may be called again with others of the same shapes, types and devices: for the layers of a model, where the
    checks take longer than small maps. Arguments and what it raises: as `attention_maps`, with

    Args:
        part: what is read of query, key and lse; the other arguments are those of the part. None: all of them.
    """
    if part is not None:
        query, key, lse = part.of(query, key, lse)
    trailing = _check_maps_arguments(query, key, concept_index, concept_weight, lse, head_weight, key_bias, out)
    device = query.device
    scale = query.shape[-1] ** -0.5 if scale is None else checked_number("scale", scale)
    chosen = resolve("attention_maps", impl, device)
    if chosen == "triton" and compute_dtype(query, key) == torch.float64:
        if impl == "triton" or os.environ.get("STAR_IMPL") == "triton":
            raise TypeError("query: got torch.float64, which impl='triton' does not take")
        chosen = "reference"
        if not torch.compiler.is_compiling():
            warn_once(
                "attention_maps runs as plain PyTorch on torch.float64 tensors, which Triton does not take: capture in "
                "float32"
            )
    if key_bias is not None and lse is None and key_bias.shape[1]:
        key_bias = _without_common_part(key_bias.detach())
    dtype, eager = compute_dtype(query, key), not torch.compiler.is_compiling()
    direct = eager and out is not None and out.dtype == dtype and out.is_contiguous()
    arguments = (query, key, concept_index, concept_weight, lse, head_weight, key_bias)
    if direct and out is not None and shares_memory(out, *arguments):
        direct = False  # a kernel would read what it has written
    launch = ATTENTION_MAPS.triton if direct and chosen == "triton" else None
    writes = direct and launch is None
    operator = ATTENTION_MAPS.write if writes and ATTENTION_MAPS.write is not None else ATTENTION_MAPS
    run: Any = operator.run(chosen)
    if chosen == "native" and eager:
        run = run.default._op  # without the search among overloads, which takes as long as the checks
    first, keys = (0, 0) if part is None else (part.first_row, part.first_query), key.shape[2]
    check = lambda: _check_columns(concept_index, keys)

    def write(query: Tensor, key: Tensor, lse: Tensor | None, out: Tensor | None) -> Tensor:
        # One function, whose operator takes the part itself: right after an attention, which empties the caches, every
        # call of Python costs several microseconds and a view costs more.
        if torch.is_grad_enabled():
            with torch.no_grad():
                return write(query.detach(), key.detach(), lse, out)
        assert out is not None
        if lse is not None and trailing:
            lse = lse.squeeze(-1)
        options = (concept_index, concept_weight, lse, scale, head_weight, key_bias, *first, out)
        if chosen != "native":
            _run_checked(run, chosen, check, device, query, key, *options)
        else:
            try:
                run(query, key, *options)
            except (RuntimeError, ValueError):
                check()
                raise
        increment_version(out)
        return out

    def make(query: Tensor, key: Tensor, lse: Tensor | None, out: Tensor | None) -> Tensor:
        if lse is not None and trailing:
            lse = lse.squeeze(-1)
        if part is not None:
            query, key, lse = part.of(query, key, lse)
        arguments = (query, key, concept_index, concept_weight, lse, scale, head_weight, key_bias)
        if launch is not None and out is not None:
            launch(*arguments, out=out)
            increment_version(out)
            return out
        maps = _run_checked(run, chosen, check, device, *arguments)
        return maps if out is None else out.copy_(maps)

    def call(query: Tensor, key: Tensor, lse: Tensor | None, out: Tensor | None) -> Tensor:
        if not torch.is_grad_enabled():
            return make(query, key, lse, out)
        with torch.no_grad():
            return make(query.detach(), key.detach(), lse, out)

    return write if writes else call


def allocate(
    maps: Tensor,
    grid: tuple[int, ...],
    *,
    combine: Literal["mean", "max"] = "mean",
    smooth: float = 0.0,
    sharpen: float = 1.0,
    cap: float = 4.0,
    mix: float = 0.5,
    patch: int = 2,
    impl: Implementation = "auto",
) -> Tensor:
    """Turn concept maps into weights of mean 1 over the latent locations of an image or of a whole video.

    Each map is divided by its mean, concepts are combined, the field is smoothed, raised to a power, brought to mean 1
    and capped; then w = (1 - mix) + mix * field, brought to mean 1, and each token's weight repeated over its patch.

    Args:
        maps: (B, G, N) attention mass, not negative, or (S, B, G, N) of several steps. A map that is all zero (a
            missing concept) is left out.
        grid: (rows, columns) of the image tokens, N = rows * columns, row-major. Of a video (frames, rows, columns): a
            map is divided by its mean over all frames, so a frame that shows more of the concepts weighs more.
        combine: over concepts, "mean" or "max".
        smooth: standard deviation of a Gaussian in tokens, 0 for none, infinite for a flat field; renormalized at the
            borders. Of a video each frame is smoothed by itself.
        sharpen: exponent of the field, between 1e-6 and 1e6.
        cap: largest value of the field in units of its mean, at least 1e-6; infinite for none.
        mix: 0 (uniform) to 1 (the map alone).
        patch: latent locations per token and side of a frame; 1 for packed latents. A sample has at most 2**30
            locations.
        impl: "auto" or one of `implementations("allocate")`.

    Returns:
        (B, rows * patch, columns * patch) float32, of a video (B, frames, rows * patch, columns * patch), of several
        steps with their axis in front. A sample without concepts, with only zero maps or with a value that is negative
        or not finite gets weights of exactly 1.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape or range.
        RuntimeError: `impl` cannot run here.
    """
    check_tensor("maps", maps)
    if maps.ndim not in (3, 4):
        raise ValueError(f"maps: got shape {tuple(maps.shape)}, expected (B, G, N) or (S, B, G, N)")
    grid = checked_grid(grid, maps.shape[-1])
    *frames, rows, columns = grid
    check_choice("combine", combine, ("mean", "max"))
    options = (
        checked_number("smooth", smooth, 0.0, math.inf, "a number >= 0"),
        checked_number("sharpen", sharpen, *SHARPEN, "a number between 1e-6 and 1e6"),
        checked_number("cap", cap, LEAST_CAP, math.inf, "a number >= 1e-6"),
        checked_number("mix", mix, 0.0, 1.0, "a number between 0 and 1"),
    )
    patch = checked_patch(patch, grid)
    shape = (*maps.shape[:-2], *frames, rows * patch, columns * patch)
    check_elements("maps", shape)
    samples = maps.detach() if maps.ndim == 3 else maps.detach().flatten(0, 1)
    run = ALLOCATE.run(resolve("allocate", impl, maps.device))
    with torch.no_grad():
        return _run(run, maps.device, samples, rows, columns, combine, *options, patch).view(shape)


def gaussian_step(
    sample: Tensor,
    velocity: Tensor,
    noise: Tensor | None,
    transition: Transition,
    *,
    unconditional_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    seeds: Tensor | None = None,
    impl: Implementation = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of the sampler: mean = a x + b v, prev_sample = mean + s noise.

    With unconditional_velocity u the velocity v is guided first: u + guidance_scale (v - u), in float32 or better
    whatever the types are, with the bits that PyTorch's own operations give in float32.

    Args:
        sample, velocity: (B, ...) of one shape, any floating types.
        noise: the same shape, any floating type. None: prev_sample is the mean, unless there are seeds.
        transition: fields (B,).
        unconditional_velocity: like velocity, the model's output without the prompt. Both may be halves of one output,
            in either order.
        guidance_scale: of classifier-free guidance, finite; needs unconditional_velocity.
        seeds: (B,) int64, instead of noise: the operator draws standard normals. Those of a sample depend only on its
            seed and the elements' indices, with the same float32 bits in every implementation, on every device, in any
            batch.
        impl: "auto" or one of `implementations("gaussian_step")`.

    Returns:
        prev_sample in the type of `sample`, and mean in float32 (float64 for float64 inputs): the policy's old mean.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, range or device, or arguments that exclude each other.
        RuntimeError: `impl` cannot run here.

    Source of the drawn noise: Philox4x32-10 (Salmon et al. 2011) by the transform of Box and Muller (1958).
    """
    check_tensor("sample", sample)
    if sample.ndim < 2:
        raise ValueError(f"sample: got shape {tuple(sample.shape)}, expected (B, ...)")
    check_tensor("velocity", velocity, tuple(sample.shape), sample.device)
    if noise is not None:
        check_tensor("noise", noise, tuple(sample.shape), sample.device)
    _check_transition(transition, sample.shape[0], sample.device)
    check_elements("sample", sample.shape)
    guidance_scale = checked_number("guidance_scale", guidance_scale)
    if unconditional_velocity is not None:
        check_tensor("unconditional_velocity", unconditional_velocity, tuple(sample.shape), sample.device)
        unconditional_velocity = unconditional_velocity.detach()
    elif guidance_scale != 1:
        raise ValueError(f"unconditional_velocity: got None, expected a tensor for guidance_scale={guidance_scale}")
    if seeds is not None:
        check_index("seeds", seeds, (sample.shape[0],), sample.device)
        if noise is not None:
            raise ValueError("noise, seeds: got both, expected at most one of them")
    run = GAUSSIAN_STEP.run(resolve("gaussian_step", impl, sample.device))
    arguments = (sample.detach(), velocity.detach(), noise, transition.a, transition.b, transition.s,
                 unconditional_velocity, guidance_scale, seeds)  # fmt: skip
    with torch.no_grad():
        return _run(run, sample.device, *arguments)


def policy_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    transition: Transition,
    advantages: Tensor,
    weights: Tensor | None = None,
    *,
    old_mean: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    reference_velocity: Tensor | None = None,
    step_weights: Tensor | None = None,
    ratio: Literal["token", "location", "sample"] = "token",
    clip_range: float | tuple[float, float] = 1e-4,
    adv_clip: float = 5.0,
    kl_coef: float = 0.0,
    guard: bool = False,
    impl: Implementation = "auto",
) -> PolicyLoss:
    """Clipped policy loss of one denoising step, with a weight for each latent location.

    With d_p the log-ratio of new to old density at location p (mean over channels) and r = exp(mean_p d_p):
    "token" gives every location its sample's ratio r but its own gradient (GSPO-token form, Zheng et al. 2025);
    without weights that is Flow-GRPO's loss in value and gradient. "location" uses exp(d_p) and clips each location.
    "sample" uses exp(mean_p w_p d_p). The loss is the mean of step_weight * w * max(-A r, -A clip(r)).

    Args:
        velocity: model output, (B, C, H, W), (B, C, T, H, W) or packed (B, L, C). The only argument with a gradient,
            which the backward pass makes in float32, a gradient scaler's factor included, and rounds once to its type.
        sample, prev_sample: latents before and after the step, same shape.
        transition: fields (B,), with s > 0.
        advantages: (B,) or one per location.
        weights: (B, H, W), (B, T, H, W) or (B, L), not negative, mean 1 over each sample; None means 1 everywhere.
        old_mean: mean of the step under the policy that took it: the log-ratio in its exact (delta) form.
        old_log_prob: instead of old_mean, that policy's `log_prob`, (B,) or one per location.
        reference_velocity: for the KL term, kl_coef * mean (mu - mu_ref)^2 * kl_precision, never weighted.
        step_weights: (B,) weight of this step for each sample, not negative.
        clip_range: e for [1 - e, 1 + e], or (low, high) for [1 - low, 1 + high].
        adv_clip: advantages are clamped to +-adv_clip before anything else.
        kl_coef: coefficient of the KL term, finite.
        guard: GRPO-Guard's normalized log-ratio (Wang et al. 2025), which needs old_mean.
        impl: "auto" or one of `implementations("policy_loss")`.

    Returns:
        PolicyLoss(loss, statistics). A log-ratio is limited to +-30 before the exponential; one that is not finite
        makes the loss NaN and is counted in `statistics.nonfinite`.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, range or device, or arguments that exclude each other.
        RuntimeError: `impl` cannot run here; in the backward pass of a gradient, that there is no second derivative.

    Source: Flow-GRPO (Liu et al. 2025), scripts/train_sd3.py; the spatial form is this project's (docs/mathematics.md).
    """
    locations = _check_locations(velocity)
    shape, device, batch = tuple(velocity.shape), velocity.device, velocity.shape[0]
    check_tensor("sample", sample, shape, device)
    check_tensor("prev_sample", prev_sample, shape, device)
    _check_transition(transition, batch, device)
    check_tensor("advantages", advantages, None, device)
    if tuple(advantages.shape) not in ((batch,), locations):
        raise ValueError(f"advantages: got shape {tuple(advantages.shape)}, expected ({batch},) or {locations}")
    check_choice("ratio", ratio, ("token", "location", "sample"))
    if ratio == "sample" and advantages.ndim > 1:
        raise ValueError(f"advantages: ratio='sample' takes one per sample, ({batch},), got {tuple(advantages.shape)}")
    if weights is not None:
        check_tensor("weights", weights, locations, device)
    if (old_mean is None) == (old_log_prob is None):
        raise ValueError(
            f"old_mean, old_log_prob: got {'neither' if old_mean is None else 'both'}, expected exactly one of them"
        )
    if old_mean is not None:
        check_tensor("old_mean", old_mean, shape, device)
    elif old_log_prob is not None:
        check_tensor("old_log_prob", old_log_prob, None, device)
        if tuple(old_log_prob.shape) not in ((batch,), locations):
            raise ValueError(f"old_log_prob: got shape {tuple(old_log_prob.shape)}, expected ({batch},) or {locations}")
        if old_log_prob.ndim == 1 and (ratio == "location" or (ratio == "sample" and weights is not None)):
            raise ValueError(f"old_log_prob: got one per sample, expected {locations} for ratio={ratio!r}, or old_mean")
        if guard is True:
            raise ValueError("guard: needs old_mean, got old_log_prob")
    kl_coef = _checked_kl_coef(kl_coef, reference_velocity, velocity)
    if step_weights is not None:
        check_tensor("step_weights", step_weights, (batch,), device)
    low, high = checked_clip_range(clip_range)
    adv_clip = checked_adv_clip("adv_clip", adv_clip)
    if not isinstance(guard, bool):
        raise TypeError(f"guard: got {type(guard).__name__}, expected True or False")
    chosen = resolve("policy_loss", impl, device)
    rest = (sample, prev_sample, *transition, advantages, weights, old_mean, old_log_prob, reference_velocity,
            step_weights, ratio, low, high, adv_clip, kl_coef, guard)  # fmt: skip
    check = lambda: _check_s(transition.s, compute_dtype(velocity, sample, prev_sample))
    loss, statistics, *_ = _run_checked(autograd.run_loss, chosen, check, device, "policy_loss", chosen, velocity, rest)
    return PolicyLoss(loss, Statistics(statistics))


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    sample: Tensor,
    clean: Tensor,
    sigma: Tensor,
    reward_prob: Tensor,
    weights: Tensor | None = None,
    *,
    reference_velocity: Tensor | None = None,
    beta: float = 1.0,
    adaptive: bool = True,
    adaptive_min: float = 1e-5,
    adv_clip: float = 5.0,
    kl_coef: float = 0.0,
    impl: Implementation = "auto",
) -> NFTLoss:
    """DiffusionNFT's loss of the forward process, with a weight and a reward for each latent location.

    With e = sample - sigma old_velocity - clean, the old policy's error of the clean latents, and
    m = sigma beta (velocity - old_velocity), how far the policy has moved:
    loss = adv_clip / beta * mean of w (r (e - m)^2 / n+ + (1 - r) (e + m)^2 / n-), r the reward_prob.
    n+ and n-, the mean of |e - m| and of |e + m| over the sample, are constants of the objective and not weighted.

    Args:
        velocity: model output at (sample, sigma), (B, C, H, W), (B, C, T, H, W) or packed (B, L, C). The only argument
            with a gradient, which the backward pass makes in float32, a gradient scaler's factor included, and rounds
            once to its type.
        old_velocity: of the old policy, which sampled; same shape. Its pass also has the maps for the weights.
        sample, clean: the noised latents, (1 - sigma) clean + sigma noise, and the clean ones; same shape.
        sigma: (B,) noise level in 0..1.
        reward_prob: (B,) or one per location, in 0..1: DiffusionNFT's r, (A / adv_clip / 2 + 0.5) of the advantage A
            clamped to +-adv_clip.
        weights: (B, H, W), (B, T, H, W) or (B, L), not negative, mean 1 over each sample; None means 1 everywhere.
        reference_velocity: for the KL term, kl_coef * mean (velocity - reference_velocity)^2, never weighted.
        beta: strength of the guidance, > 0.
        adv_clip: the factor that undoes reward_prob's division, > 0.
        adaptive: False leaves n+ and n- out.
        adaptive_min: the smallest that they can be, > 0.
        kl_coef: coefficient of the KL term, finite.
        impl: "auto" or one of `implementations("nft_loss")`.

    Returns:
        NFTLoss(loss, statistics). An error that is not finite makes the loss NaN or infinite and is counted in
        `statistics.nonfinite`.

    Raises:
        TypeError, ValueError: an argument of wrong type, shape, range or device. Values outside 0..1 are found on the
            CPU only.
        RuntimeError: `impl` cannot run here; in the backward pass of a gradient, that there is no second derivative.

    Source: DiffusionNFT (Zheng et al. 2025), scripts/train_nft_sd3.py; weights and rewards per location are this
    project's (docs/mathematics.md).
    """
    locations = _check_locations(velocity)
    shape, device, batch = tuple(velocity.shape), velocity.device, velocity.shape[0]
    for name, latents in (("old_velocity", old_velocity), ("sample", sample), ("clean", clean)):
        check_tensor(name, latents, shape, device)
    check_tensor("sigma", sigma, (batch,), device)
    check_tensor("reward_prob", reward_prob, None, device)
    if tuple(reward_prob.shape) not in ((batch,), locations):
        raise ValueError(f"reward_prob: got shape {tuple(reward_prob.shape)}, expected ({batch},) or {locations}")
    if weights is not None:
        check_tensor("weights", weights, locations, device)
    kl_coef = _checked_kl_coef(kl_coef, reference_velocity, velocity)
    beta = checked_number("beta", beta, LEAST_POSITIVE, expected="a number > 0")
    adv_clip = checked_number("adv_clip", adv_clip, LEAST_POSITIVE, expected="a finite number > 0")
    if not isinstance(adaptive, bool):
        raise TypeError(f"adaptive: got {type(adaptive).__name__}, expected True or False")
    adaptive_min = checked_number("adaptive_min", adaptive_min, LEAST_POSITIVE, expected="a number > 0")
    chosen = resolve("nft_loss", impl, device)

    def check() -> None:
        dtype = compute_dtype(velocity, sample, clean)
        _check_probability("sigma", sigma, dtype, "it is the noise level, not the timestep")
        _check_probability("reward_prob", reward_prob, dtype, "it is made of advantages, not one of them")

    rest = (old_velocity, sample, clean, sigma, reward_prob, weights, reference_velocity, beta, adaptive, adaptive_min,
            adv_clip, kl_coef)  # fmt: skip
    loss, statistics, *_ = _run_checked(autograd.run_loss, chosen, check, device, "nft_loss", chosen, velocity, rest)
    return NFTLoss(loss, NFTStatistics(statistics))
