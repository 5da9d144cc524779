"""Rewards: images, their prompts and the prompts' metadata in, scores out. `load` finds rewards by name.

Each reward lives in a file of its own; `worker.py` runs them beside the rollout, `serve.py` and `remote.py` over HTTP.
"""

from __future__ import annotations

import copy
import difflib
import importlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from star.messages import one_line
from star_kernels.requirements import install_line

__all__ = ["NAMES", "WEIGHTS", "Metadata", "Reward", "RewardError", "Scores", "Weighted", "load", "parse"]

WEIGHTS = {
    "ocr": (),
    "geneval": ("geneval", "geneval_clip"),
    "pickscore": ("pickscore", "pickscore_tokenizer"),
    "clipscore": ("clipscore",),
    "hps": ("hps", "hps_clip"),
    "image_reward": ("image_reward", "image_reward_tokenizer"),
    "aesthetic": ("aesthetic", "aesthetic_clip"),
    "jpeg_compressibility": (),
    "jpeg_incompressibility": (),
}
"""By name of a reward the keys of `models` (of a run: `reward_models`) under which it finds its weights."""
NAMES = tuple(WEIGHTS)
"""Rewards that `load` knows by name."""
SERVERS = ("http://", "https://")
LOGGED = {"reward", "std", "failed"}  # as reward, reward_std and reward_failed
ROUNDING = 1e-3  # by which values may lie outside 0..1


@dataclass(frozen=True)
class Scores:
    """The scores of B images of H x W pixels. NaN: the reward has no value there.

    Attributes:
        reward: (B,) float32.
        details: further (B,) values to be logged by name.
        masks: (B, H, W) in 0..1, where the image shows the requested objects, if the reward knows.
        reward_map: (B, H, W), the reward of each pixel's location, on the scale of `reward`, if the reward localizes.
            NaN: the location earned what the image earned.
        terms: (B,) by name, the terms of a weighted sum.
        credits: (B, G), the reward of each of the prompt's concepts, NaN where it is unknown.
        concepts: for each image the phrases of its prompt, as they stand there, one for each column of `credits`.
            Empty: the columns are the concepts that `star.concepts.parse` finds, in its order.
    """

    reward: Tensor
    details: dict[str, Tensor] = field(default_factory=dict)
    masks: Tensor | None = None
    reward_map: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    credits: Tensor | None = None
    concepts: tuple[tuple[str, ...], ...] = ()

    def location_rewards(self) -> Tensor:
        """`reward_map` with the image's reward where it says nothing: (B, H, W), or (B, 1, 1) without a map."""
        image = self.reward.view(-1, 1, 1)
        return image if self.reward_map is None else torch.where(self.reward_map.isfinite(), self.reward_map, image)


Metadata = Sequence[Mapping[str, Any]]
"""What a prompt file says of each prompt: B dicts, empty where it has none."""
Reward = Callable[[Tensor, Sequence[str], Metadata], Scores | Tensor | Sequence[float | None]]
"""images (B, 3, H, W) float32 in 0..1, B prompts, B dicts (empty where a prompt file has none) -> Scores, or the bare
(B,) rewards; None or NaN: it failed for an image. It is called from one thread at a time, with gradients off."""


TERM = "in the reward"  # how the note of an error begins that one of several rewards raised


class RewardError(RuntimeError):
    """A reward failed for a whole batch, so that a retry image by image is of no use. One line for the user."""


def without_nulls(value: Any) -> Any:
    """JSON without its nulls: a table of records has them where an entry says nothing."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value if item is not None] if isinstance(value, list) else value


def check_images(images: Tensor, count: int) -> None:
    """Raise ValueError unless these are `count` images (count, 3, H, W) of floating-point values in 0..1."""
    if not isinstance(images, Tensor) or not images.is_floating_point():
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images: got {got}, expected a floating-point tensor with values in 0..1")
    if images.ndim != 4 or images.shape[:2] != (count, 3) or 0 in images.shape:
        raise ValueError(f"images: got shape {tuple(images.shape)}, expected ({count}, 3, H, W)")
    low, high = (float(value) for value in images.aminmax())
    if not (low >= -ROUNDING and high <= 1 + ROUNDING):  # NaN is neither
        raise ValueError(f"images: got values from {low:g} to {high:g}, expected 0..1")


def as_scores(result: object, count: int, size: Sequence[int] | None = None, name: str | None = None) -> Scores:
    """What a reward returned as Scores on the CPU. size: (H, W) of the images, if known. name: of the reward, for
    errors.

    Raises RewardError if it does not give one number per image, if its masks and maps have another size, or if its
    concepts do not fit its credits.
    """
    said = "reward: got" if name is None else f"reward: {name!r}: got"
    try:
        if not isinstance(result, Scores):
            result = Scores(_numbers(result))
        fields: dict[str, Any] = {
            "reward": _real(result.reward),
            "details": {name: _real(value) for name, value in result.details.items()},
            "terms": {name: _real(value) for name, value in result.terms.items()},
        }
        maps = {name: getattr(result, name) for name in ("masks", "reward_map")}
        arrays = {**maps, "credits": result.credits}
        fields |= {name: _real(value) for name, value in arrays.items() if value is not None}
        fields["concepts"] = _phrases(result.concepts)
    except (TypeError, ValueError, AttributeError, RuntimeError, OverflowError) as error:
        raise RewardError(f"{said} {type(result).__name__}, expected Scores or {count} numbers") from error
    for column, value in {"reward": fields["reward"], **fields["details"], **fields["terms"]}.items():
        if value.shape != (count,):
            raise RewardError(f"{said} shape {tuple(value.shape)} of {column!r}, expected ({count},)")
    for column in LOGGED & fields["details"].keys():
        raise RewardError(f"{said} a detail {column!r}, which the log has already; give it another name")
    height, width = size or ("H", "W")
    for column in maps.keys() & fields.keys():
        shape = tuple(fields[column].shape)
        if len(shape) != 3 or shape[0] != count or (size and shape[1:] != tuple(size)):
            raise RewardError(f"{said} shape {shape} of {column!r}, expected ({count}, {height}, {width})")
    if "masks" in fields and not ((fields["masks"] >= -ROUNDING) & (fields["masks"] <= 1 + ROUNDING)).all():
        raise RewardError(f"{said} values of 'masks' outside 0..1")
    _check_credits(fields.get("credits"), fields["concepts"], count, said)
    return Scores(**fields)


def _phrases(concepts: Any) -> tuple[tuple[str, ...], ...]:
    """A list of phrases for each image. Raises TypeError."""
    if isinstance(concepts, str) or any(isinstance(row, str) for row in concepts):
        raise TypeError("concepts that are one str")
    rows = tuple(tuple(row) for row in concepts)
    if not all(isinstance(phrase, str) for row in rows for phrase in row):
        raise TypeError("concepts that are no str")
    return rows


def _check_credits(credits: Tensor | None, concepts: tuple[tuple[str, ...], ...], count: int, said: str) -> None:
    if credits is None:
        if any(concepts):
            raise RewardError(f"{said} concepts without credits, expected 'credits' ({count}, G) beside them")
        return
    if credits.ndim != 2 or len(credits) != count:
        raise RewardError(f"{said} shape {tuple(credits.shape)} of 'credits', expected ({count}, G)")
    if not concepts:
        return
    if len(concepts) != count:
        raise RewardError(f"{said} concepts of {len(concepts)} images, expected {count}")
    for row, phrases in zip(credits, concepts, strict=True):
        if len(phrases) > len(row) or row[len(phrases) :].isfinite().any():
            raise RewardError(f"{said} {len(phrases)} concepts {phrases} for the credits {row.tolist()}")


def _numbers(result: Any) -> Tensor:
    """Bare rewards, with NaN for None."""
    if isinstance(result, Tensor):
        return result
    return torch.as_tensor([math.nan if value is None else value for value in result], dtype=torch.float32)


def _real(value: Any) -> Tensor:
    value = torch.as_tensor(value)
    if value.is_complex():
        raise TypeError("complex numbers")
    return value.detach().float().cpu()


def call(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> object:
    """What a reward returns. It gets copies: what it does to its arguments is seen by nobody else."""
    return reward(images.clone(), list(prompts), [copy.deepcopy(dict(item)) for item in metadata])


def failed(count: int) -> Scores:
    """Scores of images whose reward failed."""
    return Scores(torch.full((count,), torch.nan))


def concatenate(parts: Sequence[Scores]) -> Scores:
    """Scores of several batches in one. A field that only some of them have is NaN in the others, with empty masks.

    Raises RewardError if only some of them name the concepts of their credits.
    """
    counts = [len(part.reward) for part in parts]

    def column(name: str, key: str) -> Tensor:
        missing = [torch.full((count,), torch.nan) for count in counts]
        return torch.cat([getattr(p, name).get(key, m) for p, m in zip(parts, missing, strict=True)])

    def field_of(name: str, filling: float) -> Tensor | None:
        shape = next((getattr(p, name).shape[1:] for p in parts if getattr(p, name) is not None), None)
        if shape is None:
            return None
        missing = [torch.full((count, *shape), filling) for count in counts]
        return torch.cat(
            [m if getattr(p, name) is None else getattr(p, name) for p, m in zip(parts, missing, strict=True)]
        )

    return Scores(
        torch.cat([part.reward for part in parts]),
        {key: column("details", key) for key in dict.fromkeys(k for part in parts for k in part.details)},
        field_of("masks", 0.0),
        field_of("reward_map", torch.nan),
        {key: column("terms", key) for key in dict.fromkeys(k for part in parts for k in part.terms)},
        *_concatenated_credits(parts, counts),
    )


def _concatenated_credits(
    parts: Sequence[Scores], counts: Sequence[int]
) -> tuple[Tensor | None, tuple[tuple[str, ...], ...]]:
    """(credits, concepts) of several batches. Their prompts may have different numbers of concepts."""
    said = [part for part in parts if part.credits is not None]
    if not said:
        return None, ()
    named = any(part.concepts for part in said)
    if named and not all(part.concepts for part in said):
        raise RewardError("reward: named the concepts of some batches' credits and not of others")
    width = max(part.credits.shape[1] for part in said if part.credits is not None)
    rows = []
    for part, count in zip(parts, counts, strict=True):
        credits = torch.full((count, 0), torch.nan) if part.credits is None else part.credits
        rows.append(torch.nn.functional.pad(credits, (0, width - credits.shape[1]), value=torch.nan))
    phrases = [part.concepts or ((),) * count for part, count in zip(parts, counts, strict=True)]
    return torch.cat(rows), tuple(row for part in phrases for row in part) if named else ()


def means(scores: Scores) -> dict[str, float]:
    """What a run logs: mean and deviation of the reward, means of the terms of a weighted sum and of the details, all
    without the NaN."""
    columns = {"reward": scores.reward}
    if len(scores.terms) > 1:
        columns |= {f"reward_{name}": value for name, value in scores.terms.items()}
    columns |= {f"reward_{name}": value for name, value in scores.details.items()}
    found = {name: float(value.nanmean()) for name, value in columns.items() if value.isfinite().any()}
    known = scores.reward[scores.reward.isfinite()]
    return {"reward": math.nan, **found, "reward_std": float(known.std()) if len(known) > 1 else math.nan}


def pixels(images: Tensor) -> np.ndarray:
    """(B, 3, H, W) in 0..1 -> (B, H, W, 3) uint8, as a PNG would hold it."""
    return (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous().cpu().numpy()


def missing(name: str, error: ImportError) -> RewardError:
    """The line for a reward whose libraries are not installed."""
    library = error.name or one_line(error)
    extra = "train" if library.partition(".")[0] in ("transformers", "tokenizers", "huggingface_hub") else "rewards"
    line = install_line(extra, library)
    return RewardError(f"reward: {name!r} needs {library}{f'; {line}' if line else ''}")


@dataclass(frozen=True)
class Weighted:
    """The weighted sum of rewards; of one reward with weight 1, that reward. Images may be of any floating-point type.

    Raises:
        ValueError: something else than images, see `check_images`.
        RewardError: a reward returned something else.
        Exception: what a reward raises; of several, with a note that names it.
    """

    rewards: dict[str, Reward]
    weights: dict[str, float]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Scores:
        count = len(prompts)
        check_images(images, count)
        images, size = images.float(), images.shape[-2:]
        metadata = [{} for _ in prompts] if metadata is None else metadata
        found: dict[str, Scores] = {}
        for name, reward in self.rewards.items():
            try:
                found[name] = as_scores(call(reward, images, prompts, metadata), count, size, name)
            except Exception as error:
                if len(self.rewards) > 1 and not isinstance(error, RewardError):  # which names its reward itself
                    error.add_note(f"{TERM} {name!r}")
                raise
        terms = {name: scores.reward for name, scores in found.items()}
        if len(found) == 1 and all(weight == 1 for weight in self.weights.values()):
            return replace(next(iter(found.values())), terms=terms)
        # The sum is known only where every term is.
        total = sum((self.weights[name] * value for name, value in terms.items()), torch.zeros(()))
        masks = [scores.masks for scores in found.values() if scores.masks is not None]
        return Scores(
            total,
            {f"{name}_{key}": value for name, scores in found.items() for key, value in scores.details.items()},
            torch.stack(masks).amax(0) if masks else None,
            self._map(found),
            terms,
            *self._credits(found),
        )

    def _map(self, found: dict[str, Scores]) -> Tensor | None:
        """A reward that does not localize earned the same everywhere."""
        if all(scores.reward_map is None for scores in found.values()):
            return None
        return sum((self.weights[name] * scores.location_rewards() for name, scores in found.items()), torch.zeros(()))

    def _credits(self, found: dict[str, Scores]) -> tuple[Tensor | None, tuple[tuple[str, ...], ...]]:
        """The weighted credits of all phrases; those of the same phrase add up, and one that is NaN makes it NaN. A
        reward without credits says nothing of the concepts."""
        said = {name: scores for name, scores in found.items() if scores.credits is not None}
        if not said:
            return None, ()
        if len(said) == 1:
            (name, scores), *_ = said.items()
            assert scores.credits is not None  # said has those that have some
            return self.weights[name] * scores.credits, scores.concepts
        if unnamed := [name for name, scores in said.items() if not scores.concepts]:
            raise RewardError(
                f"reward: {unnamed[0]!r} does not name the concepts of its credits, so they cannot be added to those "
                f"of {', '.join(repr(name) for name in said if name != unnamed[0])}"
            )
        rows: list[dict[tuple[str, int], float]] = []  # a reward may have a phrase more than once: its first and so on
        for i in range(len(next(iter(said.values())).reward)):
            row: dict[tuple[str, int], float] = {}
            for name, scores in said.items():
                assert scores.credits is not None
                phrases = scores.concepts[i]
                for g, credit in enumerate(scores.credits[i, : len(phrases)].tolist()):
                    key = (phrases[g], phrases[:g].count(phrases[g]))
                    row[key] = row.get(key, 0.0) + self.weights[name] * credit
            rows.append(row)
        width = max(len(row) for row in rows)
        credits = [[*row.values(), *[math.nan] * (width - len(row))] for row in rows]
        return torch.tensor(credits), tuple(tuple(phrase for phrase, _ in row) for row in rows)


def parse(specification: str | Mapping[str, float]) -> dict[str, float]:
    """{name: weight} of "ocr", "ocr:1.0,pickscore:0.5", "module:function", "module:function:0.5" or such a dict."""
    if isinstance(specification, str):
        weights: dict[str, float] = {}
        for item in filter(None, (part.strip() for part in specification.split(","))):
            name, _, number = item.rpartition(":")
            try:
                value = (name, float(number)) if name else (item, 1.0)
            except ValueError:
                value = (item, 1.0)
            if value[0] in weights:
                raise ValueError(f"reward: {value[0]!r} is named twice in {specification!r}")
            weights[value[0]] = value[1]
    else:
        weights = {str(name): weight for name, weight in specification.items()}
    for name, weight in weights.items():
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight) or weight == 0:
            raise ValueError(f"reward: got weight {weight!r} for {name!r}, expected a number other than 0")
    if not weights:
        raise ValueError(f"reward: got {specification!r}, expected one of {list(NAMES)} or 'module:function'")
    return {name: float(weight) for name, weight in weights.items()}


def keys_of(specification: object, models: Mapping[str, str]) -> set[str]:
    """The keys of `models` that the rewards of a specification read; none if it is no specification, but a callable."""
    if not isinstance(specification, str | Mapping) or not specification:
        return set()
    asked = {name for name in parse(specification) if str(models.get(name, "")).startswith(SERVERS)}
    local = parse(specification).keys() - asked
    return models.keys() & (asked | {key for name in local for key in WEIGHTS.get(name, ())})


def check_models(models: Mapping[str, str], *specifications: object) -> None:
    """Raise ValueError unless each key of `models` belongs to a reward of one of the specifications, so that no
    misspelled name leaves a reward with its default weights."""
    used = set().union(*(keys_of(specification, models) for specification in specifications))
    if unused := sorted(models.keys() - used):
        names = [name for s in specifications if isinstance(s, str | Mapping) and s for name in parse(s)]
        keys = [key for name in names for key in WEIGHTS.get(name, ())]
        close = difflib.get_close_matches(unused[0], keys, 1)
        hint = f"did you mean {close[0]!r}?" if close else f"it reads {keys}" if keys else "leave it out"
        rewards = ", ".join(names) or "the task's own"
        raise ValueError(f"reward_models: got {unused[0]!r}, which no reward of this run ({rewards}) reads; {hint}")


def models_for(specification: object, models: Mapping[str, str]) -> dict[str, str]:
    """The part of `models` that the rewards of a specification read."""
    return {key: models[key] for key in keys_of(specification, models)}


def load(
    specification: str | Mapping[str, float],
    models: Mapping[str, str] | None = None,
    device: torch.device | str = "cpu",
) -> Weighted:
    """Rewards by name with their weights.

    Args:
        specification: see `parse`; names of NAMES, or any callable as "module:function".
        models: where a reward finds its weights, under the keys of WEIGHTS: a folder, a file or a hub id. A reward for
            which there is an http:// or https:// address is called over the network (see remote.py), whatever its name.
        device: for rewards that run a model.

    Raises:
        ValueError: an unknown name, or a key of `models` that none of the rewards reads.
        RewardError: libraries that are missing, and weights or tokenizers that are not whole.
    """
    weights, models = parse(specification), {name: str(path) for name, path in (models or {}).items()}
    check_models(models, specification)
    return Weighted({name: _load(name, models, device) for name in weights}, weights)


def _load(name: str, models: dict[str, str], device: torch.device | str) -> Reward:
    try:
        return _load_installed(name, models, device)
    except ImportError as error:
        raise missing(name, error) from error


def _load_installed(name: str, models: dict[str, str], device: torch.device | str) -> Reward:
    path = models.get(name)
    if path and path.startswith(SERVERS):
        from star.rewards.remote import Remote

        return Remote(path, name)
    match name:
        case "jpeg_compressibility" | "jpeg_incompressibility":
            from star.rewards import jpeg

            return getattr(jpeg, name)
        case "ocr":
            from star.rewards.ocr import OCR

            return OCR()
        case "geneval":
            from star.rewards import geneval

            return geneval.load(path, models.get("geneval_clip"), device)
        case "pickscore":
            from star.rewards import clip

            return clip.pickscore(path, models.get("pickscore_tokenizer"), device)
        case "clipscore":
            from star.rewards import clip

            return clip.clipscore(path, device)
        case "hps" | "aesthetic":
            from star.rewards import clip

            return getattr(clip, name)(path, models.get(f"{name}_clip"), device)
        case "image_reward":
            from star.rewards.image_reward import load_image_reward

            return load_image_reward(path, models.get("image_reward_tokenizer"), device)
    module, _, function = name.partition(":")
    if not function:
        raise ValueError(f"reward: unknown {name!r}, expected one of {list(NAMES)} or 'module:function'")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"reward: {name!r} could not be loaded ({one_line(error)})") from error
