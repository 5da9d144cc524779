"""`star probe`: whether knowing the locations will help a run, from a few hundred images before it begins.

Four questions, each with its uncertainty: do the maps find what the reward looks at, how concentrated are they, do
images whose rewards differ also differ there, and do weights make the gradients of different images agree more.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from tqdm import tqdm

from star import config as configuration
from star.config import Config, ConfigError
from star.options import Probe
from star.rewards import Scores
from star.study.gradient_signal import compare_with_scalar, draw_coordinates, jackknife_error
from star.study.tables import Table, format_number
from star.train import Trainer
from star.training.advantage import compute_advantages, compute_concept_advantages
from star.training.credit import token_masks
from star.training.objectives import make_objective
from star.training.rollout import Rollout
from star.training.task import draw_prompts
from star_kernels import allocate

SCALAR = "uniform"
CONFIDENCE = 0.95  # an arm is recommended if it is ahead with this


@dataclass(frozen=True)
class Found:
    """What a probe measured. A number that cannot be known is None.

    images, batches: how many were sampled. failed: images without a reward. equal: whether the images of every prompt
    had equal rewards. sigmas: noise levels of the S sampling steps. concentration: (S,) mean square of the relative
    maps, 1 if they are flat. localization: (S,) probability that a location inside the reward's masks has a larger map
    than one outside, 0.5 if the maps know nothing; None without masks. inside, outside: correlation, over the pairs of
    a prompt's images, between the difference of their rewards and that of their latents, with its standard error; in
    the half of the locations that the maps favor, and in the other half. gradients: by arm, see `compare_with_scalar`.
    recommended: an arm.
    """

    images: int
    failed: int
    equal: bool
    sigmas: list[float]
    concentration: list[float | None]
    localization: list[float | None] | None
    inside: tuple[float | None, float | None]
    outside: tuple[float | None, float | None]
    gradients: dict[str, dict[str, float | None]]
    recommended: str
    batches: int


def probe(config: Config, options: Probe) -> Found:
    """Measure a configuration's pipeline, prompts and reward. Nothing is trained, and nothing is left on the disk."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_probed(config, options, Path(folder) / "run"))
        try:
            return _measure(trainer, options)
        finally:
            trainer.worker.close()
            trainer.judge.close()


def compare_arms(configs: Mapping[str, Config], options: Probe) -> dict[str, dict[str, float | None]]:
    """What `compare_with_scalar` says of the first updates of several arms, on the same images, whose configurations
    differ in allocation and loss alone. The first one is the scalar arm."""
    scalar = next(iter(configs))
    own = configs[scalar]
    if any(config.loss.advantage == "concept" for config in configs.values()):  # so that the credits are matched
        own = configuration.update(own, {"loss": {"advantage": "concept"}})
    gradients: dict[str, list[np.ndarray]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_probed(own, options, Path(folder) / "run"))
        coordinates = draw_coordinates(trainer.policy.parameters.values())
        try:
            for batch in tqdm(range(options.batches), desc="probe", dynamic_ncols=True):
                rollout, scores = _sample(trainer, batch, range(trainer.config.sampling.steps))
                for arm, config in configs.items():
                    # As after the warm-up.
                    allocation = dataclasses.replace(config.allocation, warmup=0)
                    config = dataclasses.replace(trainer.config, allocation=allocation, loss=config.loss)
                    gradients[arm].append(_gradient(trainer, config, rollout, scores, coordinates, batch))
        finally:
            trainer.worker.close()
            trainer.judge.close()
    return compare_with_scalar({arm: np.stack(values) for arm, values in gradients.items()}, scalar)


def _probed(config: Config, options: Probe, out: Path) -> Config:
    """The configuration of a probe's batches. Raises ConfigError under a launcher of several processes: each would have
    a part of the images."""
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        raise ConfigError(f"accelerate: got {processes} processes, expected 1; start a probe without accelerate launch")
    images, most = options.prompts * options.images, config.optimization.micro_batch
    # A pass must fit in memory, as those of the run do.
    micro_batch = max(n for n in range(1, min(most, images) + 1) if images % n == 0) if most else 0
    return dataclasses.replace(
        config,
        sampling=dataclasses.replace(
            config.sampling,
            prompts_per_iteration=options.prompts,
            images_per_prompt=options.images,
        ),
        allocation=dataclasses.replace(config.allocation, warmup=0),
        optimization=dataclasses.replace(config.optimization, updates_per_iteration=1, micro_batch=micro_batch),
        scoring=dataclasses.replace(config.scoring, count=0),
        run=dataclasses.replace(
            config.run, out=out, resume=False, overwrite=False, trackers=(), figures=False, grid_every=0
        ),
    )


def _measure(trainer: Trainer, options: Probe) -> Found:
    steps, coordinates = trainer.config.sampling.steps, draw_coordinates(trainer.policy.parameters.values())
    gradients: dict[str, list[np.ndarray]] = defaultdict(list)
    concentration, localization = [], []
    pairs: list[np.ndarray] = []
    failed, equal = 0, True
    for batch in tqdm(range(options.batches), desc="probe", dynamic_ncols=True):
        rollout, scores = _sample(trainer, batch, range(steps))
        trainer.worker.count_failures()  # raises if every reward failed
        failed += int(scores.reward.isnan().sum())
        _check_reward(trainer, scores)
        fields = torch.stack([relative_map(maps, rollout.grid) for maps in rollout.captured_maps()])
        concentration.append(fields.square().mean((1, 2)).cpu().numpy())
        if scores.masks is not None:
            masks = token_masks(scores.masks, rollout.grid, fields.device)
            assert masks is not None
            localization.append([area_under_curve(field, masks) for field in fields])
        pairs.append(pair_differences(rollout, scores.reward, fields.mean(0)))
        equal = equal and not pairs[-1][:, 0].any()
        for arm, config in arms(trainer.config, scores):
            gradients[arm].append(_gradient(trainer, config, rollout, scores, coordinates, batch))
    stacked = {arm: np.stack(values) for arm, values in gradients.items() if len(values) == options.batches}
    compared = compare_with_scalar(stacked, SCALAR)
    (inside, outside), errors = correlations(pairs)
    return Found(
        images=options.batches * options.prompts * options.images,
        failed=failed,
        equal=equal,
        sigmas=rollout.steps.sigmas[:steps].tolist(),
        concentration=[_known(x) for x in np.mean(concentration, 0)],
        localization=[_known_mean(column) for column in zip(*localization, strict=True)] if localization else None,
        inside=(_known(inside), _known(errors[0])),
        outside=(_known(outside), _known(errors[1])),
        gradients=compared,
        recommended=recommend(compared, options.batches),
        batches=options.batches,
    )


def _known(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _known_mean(values: Sequence[float]) -> float | None:
    known = [value for value in values if math.isfinite(value)]
    return float(np.mean(known)) if known else None


def _check_reward(trainer: Trainer, scores: Scores) -> None:
    """Raise ConfigError for a reward without what the run's own advantages and weights need, as the run would."""
    loss, weights = trainer.config.loss, trainer.reward.weights
    trainer.masks(scores)
    compute_advantages(scores, trainer.groups, loss, weights, trainer.size)
    compute_concept_advantages(scores, trainer.groups, loss, weights)


def _sample(trainer: Trainer, batch: int, captured: range) -> tuple[Rollout, Scores]:
    """The images of a batch with the maps of every step, and what the reward says."""
    trainer.iteration = batch
    prompts = draw_prompts(trainer.task, trainer.config, batch)
    return trainer.scored_rollout(prompts, torch.Generator().manual_seed(batch), defaultdict(float), captured)


def arms(config: Config, scores: Scores) -> Iterator[tuple[str, Config]]:
    """What is compared: no weights; the run's own strategy; the reward's masks and its map, where it gives them; its
    credits of concepts, where the run uses them."""

    def arm(strategy: str, advantage: str) -> Config:
        allocation = {"strategy": strategy, **({"temporal": "none"} if strategy in ("uniform", "oracle") else {})}
        return configuration.update(config, {"allocation": allocation, "loss": {"advantage": advantage}})

    own = config.allocation.strategy
    yield SCALAR, arm("uniform", "image")
    name = "attention" if own in ("uniform", "oracle") else own
    yield name, arm(name, "image")
    if scores.masks is not None:
        yield "oracle", arm("oracle", "image")
    # An arm that a run would refuse is left out.
    takes_locations = config.loss.ratio != "sample" and not config.loss.normalize_rewards
    if scores.reward_map is not None and takes_locations:
        yield "location", arm("uniform", "location")
    if config.loss.advantage == "concept" and scores.credits is not None:
        yield "concept", arm("uniform", "concept")


def _gradient(
    trainer: Trainer, config: Config, rollout: Rollout, scores: Scores, coordinates: Tensor, batch: int
) -> np.ndarray:
    """The chosen coordinates of the gradient of an arm's first update."""
    parameters = list(trainer.policy.parameters.values())
    objective = make_objective(config, trainer.policy, trainer.share, trainer.groups, trainer.objective.patch)
    loss, weights, device = config.loss, trainer.reward.weights, rollout.latents.device
    advantages = compute_advantages(scores, trainer.groups, loss, weights, trainer.size).to(device)
    concepts = compute_concept_advantages(scores, trainer.groups, loss, weights)
    concepts = None if concepts is None else concepts.to(device)
    generator = torch.Generator().manual_seed(batch)
    credit = objective.credit(rollout, advantages, scores.masks, generator, batch, concepts)
    total = torch.zeros(len(coordinates))
    chunks, passes = torch.arange(len(rollout.groups)).split(trainer.chunk), objective.passes(rollout)
    for rows in chunks:
        for k in range(passes):
            value = objective.loss(rollout, k, rows, credit).loss / (passes * len(chunks))
            found = torch.autograd.grad(value, parameters, allow_unused=True, materialize_grads=True)
            total += torch.cat([g.flatten() for g in found])[coordinates.to(device)].float().cpu()
    return total.numpy()


def relative_map(maps: Tensor, grid: tuple[int, int]) -> Tensor:
    """(B, G, N) concept maps -> (B, N) of mean 1: what the whole map would weigh, neither mixed nor capped."""
    return allocate(maps, grid, mix=1.0, cap=1e30, patch=1).flatten(1)


def area_under_curve(field: Tensor, masks: Tensor) -> float:
    """Mean over images of the probability that a token inside (a mask of more than half) has a larger value than one
    outside, ties counted half; NaN if no image has both. field, masks: (B, N)."""
    found = []
    for values, mask in zip(field, masks > 0.5, strict=True):
        inside, outside = values[mask], values[~mask]
        if len(inside) and len(outside):
            above = (inside[:, None] > outside).float() + 0.5 * (inside[:, None] == outside)
            found.append(above.mean().item())
    return float(np.mean(found)) if found else float("nan")


def pair_differences(rollout: Rollout, reward: Tensor, field: Tensor) -> np.ndarray:
    """(pairs, 3) of the images of each prompt: difference of the rewards, root mean square difference of the latents in
    the half of the tokens with the larger mean field, and in the other. field: (B, N)."""
    found = []
    for group in rollout.groups.unique().tolist():
        rows = (rollout.groups == group).nonzero()[:, 0].tolist()
        favored = field[rows].mean(0).argsort(descending=True)
        half = len(favored) // 2
        for place, i in enumerate(rows):
            for j in rows[place + 1 :]:
                gap = (rollout.latents[i] - rollout.latents[j]).float().square()[None]
                tokens = F.adaptive_avg_pool2d(gap, rollout.grid).flatten(2).mean((0, 1))  # (N,)
                parts = [tokens[favored[:half]].mean().sqrt(), tokens[favored[half:]].mean().sqrt()]
                found.append([abs(float(reward[i] - reward[j])), *map(float, parts)])
    pairs = np.array(found).reshape(-1, 3)
    return pairs[np.isfinite(pairs).all(1)]


def correlations(batches: list[np.ndarray]) -> tuple[tuple[float, float], tuple[float, float]]:
    """Of `pair_differences` of n batches: correlation of the rewards' difference with that inside and outside, and
    their jackknife standard errors over the batches."""

    def measure(chosen: list[np.ndarray]) -> list[float]:
        pairs = np.concatenate(chosen)
        if len(pairs) < 3 or not pairs.std(0).all():
            return [float("nan")] * 2
        return [float(np.corrcoef(pairs[:, 0], pairs[:, column])[0, 1]) for column in (1, 2)]

    inside, outside = measure(batches)
    if len(batches) < 3:
        return (inside, outside), (float("nan"), float("nan"))
    left_out = np.array([measure(batches[:i] + batches[i + 1 :]) for i in range(len(batches))])
    return (inside, outside), (jackknife_error(left_out[:, 0]), jackknife_error(left_out[:, 1]))


def is_positive(value: float | None, error: float | None, batches: int) -> bool:
    """Whether a jackknife estimate over batches is above 0 with CONFIDENCE, by Student's t on both sides."""
    if value is None or error is None:
        return False
    return value > float(stats.t.ppf((1 + CONFIDENCE) / 2, batches - 1)) * error


def recommend(gradients: dict[str, dict[str, float | None]], batches: int) -> str:
    """The arm whose steps agree most with the scalar gradient of other images, if they agree more than without weights.
    Never "oracle": its masks show what a perfect map would give, and a run has no such map."""
    ahead = {
        arm: numbers["adamw_agreement_gain"] or 0.0
        for arm, numbers in gradients.items()
        if arm not in (SCALAR, "oracle")
        and is_positive(numbers["adamw_agreement_gain"], numbers["adamw_agreement_gain_error"], batches)
    }
    return max(ahead, key=lambda arm: ahead[arm], default=SCALAR)


def tables(found: Found) -> list[Table]:
    """The maps by step, then the arms."""
    rows = [["concentration of the maps (1: flat)", *(format_number(x, 2) for x in found.concentration)]]
    if found.localization is not None:
        rows.append(["inside the reward's masks above outside (0.5: blind)", *map(format_number, found.localization)])
    maps = Table(
        f"maps by sampling step, {found.images} images",
        ["noise level", *(f"{sigma:.2f}" for sigma in found.sigmas)],
        rows,
    )

    gradients = Table(
        "agreement of an update with the scalar gradient of other images (cosine ± standard error)",
        ["arm", "signal / noise", "gradient", "AdamW's step", "difference to uniform"],
        [
            [
                arm,
                f"{format_number(numbers['snr'])} ± {format_number(numbers['standard_error'])}",
                f"{format_number(numbers['agreement'])} ± {format_number(numbers['agreement_error'])}",
                f"{format_number(numbers['adamw_agreement'])} ± {format_number(numbers['adamw_agreement_error'])}",
                "" if arm == SCALAR else _signed(numbers, "adamw_agreement_gain"),
            ]
            for arm, numbers in found.gradients.items()
        ],
    )
    return [maps, gradients]


def verdict(found: Found) -> str:
    """One recommendation in a few sentences, and how sure it is."""
    scalar, arms = found.gradients[SCALAR], found.gradients
    lost = [f"{found.failed} of {found.images} images have no reward."] if found.failed else []
    if found.equal:
        why = "the images of each prompt have the same reward, so there is no scalar gradient to compare with"
        return " ".join([*lost, f"Nothing can be said: {why}. Raise --images, or choose another reward."])
    sentences = [*lost, f"Recommended: {found.recommended}."]
    if found.recommended != SCALAR:
        gain = _signed(arms[found.recommended], "adamw_agreement_gain")
        sentences.append(f"Its steps agree more with what raises the reward of other images: {gain}.")
    else:
        sentences.append(f"No arm is ahead of it with {CONFIDENCE:.0%}.")
    if not is_positive(scalar["agreement"], scalar["agreement_error"], found.batches):
        sentences.append(
            f"Too few images to see even the scalar gradient ({_signed(scalar, 'agreement')}): raise --batches."
        )
    elif "oracle" in arms:
        sentences.append(f"The reward's own masks would give {_signed(arms['oracle'], 'adamw_agreement_gain')}.")
    sentences.append(
        "Correlation between how much the rewards of a prompt's images differ and how much the images do: "
        f"{_correlation(found.inside)} in the half that the maps favor, {_correlation(found.outside)} in the other."
    )
    return " ".join(sentences)


def _correlation(estimate: tuple[float | None, float | None]) -> str:
    return f"{format_number(estimate[0], 2, sign=True)} ± {format_number(estimate[1], 2)}"


def _signed(numbers: dict[str, float | None], name: str) -> str:
    return f"{format_number(numbers[name], sign=True)} ± {format_number(numbers[f'{name}_error'])}"
