"""Why the arms do what they do: where the gradient's signal is, what rewards differ in, where maps look.

Everything is measured on the policy before training, on the very rollouts, advantages and weights of the study, so that
the arms are compared on the same pictures; only the concentration of the maps is also measured after training.
"""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from star import files
from star.config import Config
from star.objective import another, captured_steps
from star.shapes import scenes
from star.shapes.measure import OBJECT_SHARE, auc
from star.shapes.reward import judged
from star.shapes.scenes import Scene, parse_scene
from star.shapes.verifier import Verdict, verify
from star.study.gradient_signal import compared
from star.study.page import Table, number
from star.study.spec import Study, folder
from star.train import Trainer
from star.training.advantage import group_advantages
from star.training.rollout import Rollout, SamplerOptions, decode, encode, trace
from star.training.scoring import HeldOut, sample_images
from star.training.task import configured_task, draw_prompts, load_task_reward
from star_kernels import allocate, policy_loss

BATCHES = 96
COORDINATES = 2**17  # of the gradient, drawn once: both signal and noise are sums over them
REGIONS = ("all", "inside", "outside", "elsewhere")
PICTURES = 32  # of each category, for the concentration of the maps


# --- gradients ------------------------------------------------------------------------------------------------------


def gradients(
    trainer: Trainer, rollout: Rollout, advantages: Tensor, fields: dict[str, Tensor | None], chosen: Tensor
) -> dict[str, np.ndarray]:
    """For each field of weights, (S, B, H, W) or None, the chosen coordinates of the first update's gradient."""
    parameters = list(trainer.policy.parameters.values())
    trained, loss = len(rollout.steps.trained), trainer.config.loss
    totals = dict.fromkeys(fields, 0.0)
    chunks = torch.arange(len(rollout.groups)).split(trainer.chunk)
    for rows in chunks:
        for k in range(trained):
            samples, prev_samples, old_means, transition = rollout.transition(k, rows)
            velocity = rollout.velocity(trainer.policy.transformer, k, rows)
            for name, weights in fields.items():
                value, _ = policy_loss(
                    *(velocity, samples, prev_samples, transition, advantages[rows]),
                    None if weights is None else weights[k, rows],
                    old_mean=old_means,
                    clip_range=loss.clip_range,
                    adv_clip=loss.adv_clip,
                )
                value = value / (trained * len(chunks))
                found = torch.autograd.grad(
                    value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                totals[name] = totals[name] + torch.cat([g.flatten() for g in found])[chosen]
    return {name: total.float().numpy() for name, total in totals.items()}


def arm_weights(trainer: Trainer, config: Config, rollout: Rollout, masks: Tensor, seed: int) -> Tensor | None:
    """The weights that an arm gives to a rollout whose maps are of all steps."""
    wanted = captured_steps(config.allocation.strategy, rollout.steps.trained, config.sampling.steps)
    chosen = dataclasses.replace(rollout, maps=rollout.maps[list(wanted)] if wanted else None)
    return trainer.weights(chosen, masks, torch.Generator().manual_seed(seed), config.allocation)


# --- what rewards and maps say --------------------------------------------------------------------------------------


def components(verdict: Verdict, scene: Scene) -> dict[str, float]:
    """What a soft score is the sum of: each requirement's share, and what unasked objects take off."""
    names = [f"object {i + 1}" for i in range(len(scene.things))]
    names += ["relation"] * bool(scene.relation) + ["background"] * bool(scene.background)
    parts = {name: part / len(names) for name, part in zip(names, verdict.parts, strict=True)}
    return parts | {"unasked objects": verdict.soft - sum(parts.values())}


def variance_shares(pictures: list[dict[str, float]], groups: np.ndarray) -> dict[str, float]:
    """The covariance of each component with the reward within the groups, over the reward's variance: they sum to 1.
    Empty if no rewards of a group differ."""
    names = list(dict.fromkeys(name for picture in pictures for name in picture))
    table = np.array([[picture.get(name, 0.0) for name in names] for picture in pictures])
    for group in np.unique(groups):
        table[groups == group] -= table[groups == group].mean(0)
    reward = table.sum(1)
    total = (reward**2).sum()
    return {name: float(table[:, i] @ reward / total) for i, name in enumerate(names)} if total else {}


def localization(maps: Tensor, verdicts: list[Verdict], grid: tuple[int, int]) -> list[list[tuple[float, float]]]:
    """For each step the (AUC, mass over area) of every concept's map against its object in the finished picture.

    maps: (T, B, G, N). An object that was not found, or fills the picture, is left out.
    """
    found = [[] for _ in maps]
    relative = (maps / maps.mean(-1, keepdim=True).clamp_min(1e-30)).numpy()
    for b, verdict in enumerate(verdicts):
        masks = torch.from_numpy(verdict.masks).float()
        inside = F.adaptive_avg_pool2d(masks[None], grid)[0].flatten(1).numpy() > OBJECT_SHARE
        for g, mask in enumerate(inside):
            if mask.any() and not mask.all():
                for t, values in enumerate(relative[:, b, g]):
                    found[t].append((auc(values, mask), float(values[mask].mean())))
    return found


def makeup(pipeline, config: Config) -> dict[str, float]:
    """What the held-out scores are made of: requirements that are met, what unasked objects take off, and the share of
    pictures with more and with fewer objects than were asked for."""
    held_out = HeldOut.of_run(configured_task(config), config)
    wanted = [parse_scene(prompt.text) for prompt in held_out.prompts]
    batches = [images for _, images in sample_images(pipeline, held_out.prompts, held_out.options)]
    pictures = torch.cat(batches).permute(0, 2, 3, 1).numpy()
    verdicts = [verify(picture, scene) for picture, scene in zip(pictures, wanted, strict=True)]
    parts = [components(verdict, scene) for verdict, scene in zip(verdicts, wanted, strict=True)]
    unasked = float(np.mean([part["unasked objects"] for part in parts]))
    surplus = np.array(
        [len(v.detections) - sum(t.count for t in s.things) for v, s in zip(verdicts, wanted, strict=True)]
    )
    return {
        "requirements": float(np.mean([v.soft for v in verdicts])) - unasked,
        "unasked": unasked,
        "more": float(np.mean(surplus > 0)),
        "fewer": float(np.mean(surplus < 0)),
    }


def pipelines(study: Study, arm: str, config: Config, out: Path) -> Iterator:
    """The untrained pipeline, or those with the adapters of an arm, of every seed whose run has one."""
    if arm == "untrained":
        yield load_untrained(config)
        return
    for seed in study.seeds:
        adapter = folder(out, arm, seed) / "lora"
        if adapter.is_dir():
            pipeline = load_untrained(config)
            pipeline.load_lora_weights(str(adapter))
            yield pipeline


def load_untrained(config: Config):
    return configured_task(config).pipeline("cpu", torch.float32)


def mean_over(found: list[dict]) -> dict:
    """The mean of dicts of numbers, or of lists of them, with the same keys."""
    return {key: np.mean([one[key] for one in found], 0).tolist() for key in found[0]}


@torch.no_grad()
def concentration(pipeline, config: Config) -> dict[str, list[float]]:
    """By category and for prompts of a background alone: mean square of the relative map at each step; 1: flat."""
    texts = {c: scenes.prompts(PICTURES, 0, "heldout", (c,)) for c in scenes.CATEGORIES}
    texts["background"] = [text for text in texts["background"] if parse_scene(text).things]
    texts["background alone"] = [f"a {name} background" for name in scenes.BACKGROUNDS] * (PICTURES // 3)
    size = (config.model.height // pipeline.vae_scale_factor, config.model.width // pipeline.vae_scale_factor)
    sampling = config.sampling
    options = SamplerOptions(size, sampling.guidance_scale, layers=sampling.layers, normalize=sampling.normalize)
    found = {}
    for category, chosen in texts.items():
        conditions = encode(pipeline, chosen, config.model.max_sequence_length, sampling.guidance_scale)
        rollout = trace(pipeline, conditions, sampling.steps, options, config.scoring.seed)
        fields = [allocate(maps, rollout.grid, mix=1.0, cap=1e30, patch=1) for maps in rollout.maps]
        found[category] = [float(field.square().mean()) for field in fields]
    return found


# --- all of it --------------------------------------------------------------------------------------------------------


def measure(study: Study, out: Path, batches: int) -> dict:
    """Everything as plain numbers."""
    arms = {arm: study.config(arm, study.seeds[0], out) for arm in study.arms}
    # The ratios differ by their clipping alone, which begins with the second update: the first has one gradient.
    distinct = {f"{config.allocation} {config.run.reward}": arm for arm, config in reversed(arms.items())}
    config = arms[study.baselines[0]]
    config = dataclasses.replace(
        config,
        optimization=dataclasses.replace(config.optimization, updates_per_iteration=1),
        run=dataclasses.replace(config.run, out=out / "diagnosis", overwrite=True),
    )
    trainer = Trainer(config)
    judges = {
        own.run.reward: load_task_reward(configured_task(own), own.run.reward_models, "cpu") for own in arms.values()
    }
    steps = config.sampling.steps
    size = sum(p.numel() for p in trainer.policy.parameters.values())
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(0))[:COORDINATES]
    found, pictures, groups = defaultdict(list), defaultdict(list), defaultdict(list)
    looks = [[] for _ in range(steps)]
    for i in tqdm(range(batches), desc="diagnosis", dynamic_ncols=True):
        trainer.iteration = i
        prompts = draw_prompts(trainer.task, config, i)
        generator = torch.Generator().manual_seed(i)
        rollout = trainer.rollout([prompt.text for prompt in prompts], generator, captured=range(steps))
        texts = [prompts[g].text for g in rollout.groups.tolist()]
        images = decode(trainer.pipeline, rollout.latents)
        masks = {name: judge(images, texts, [{}] * len(texts)).masks for name, judge in judges.items()}
        verdicts, wanted = judged(images, texts)
        rewards = torch.tensor([verdict.soft for verdict in verdicts])
        advantages = group_advantages(
            rewards, rollout.groups, global_std=config.loss.global_std, eps=config.loss.advantage_eps
        ).float()

        for look, more in zip(looks, localization(rollout.maps, verdicts, rollout.grid), strict=True):
            look += more
        for verdict, scene, group in zip(verdicts, wanted, rollout.groups.tolist(), strict=True):
            for category in (scene.category, "all"):
                pictures[category].append(components(verdict, scene))
                groups[category].append(i * len(prompts) + group)

        inside = F.adaptive_avg_pool2d(masks[config.run.reward][:, None], rollout.grid)[:, 0] > OBJECT_SHARE
        patch = trainer.pipeline.transformer.config.patch_size
        inside = inside.float().repeat_interleave(patch, 1).repeat_interleave(patch, 2)
        elsewhere = inside[another(rollout.groups, len(inside), generator)]
        count = len(rollout.steps.trained)
        fields = {
            "all": None,
            "inside": inside.expand(count, *inside.shape),
            "outside": (1 - inside).expand(count, *inside.shape),
            "elsewhere": elsewhere.expand(count, *inside.shape),
        }
        for arm in reversed(distinct.values()):
            fields[arm] = arm_weights(trainer, arms[arm], rollout, masks[arms[arm].run.reward], i)
        found["area"].append(float(inside.mean()))
        for name, gradient in gradients(trainer, rollout, advantages, fields, chosen).items():
            found[name].append(gradient)
    area = float(np.mean(found.pop("area")))
    names = ("auc", "mass_over_area")
    trainer.worker.close()
    maps, made = defaultdict(list), defaultdict(list)
    for arm in ("untrained", *arms):
        for pipeline in pipelines(study, arm, config, out):
            maps[arm].append(concentration(pipeline, config))
            made[arm].append(makeup(pipeline, config))
    return {
        "batches": batches,
        "pictures": len(pictures["all"]),
        "trained_steps": list(config.sampling.trained_steps),
        "sigmas": rollout.steps.sigmas.tolist()[:steps],
        "object_area": area,
        "gradients": compared({name: np.stack(g) for name, g in found.items()}, "all"),
        "variance": {c: variance_shares(pictures[c], np.array(groups[c])) for c in pictures},
        "localization": [dict(zip(names, np.mean(look, 0).tolist(), strict=True)) if look else {} for look in looks],
        "concentration": {arm: mean_over(found) for arm, found in maps.items()},
        "makeup": {arm: mean_over(found) for arm, found in made.items()},
        "trained_seeds": {arm: len(found) for arm, found in made.items() if arm != "untrained"},
    }


def tables(measured: dict) -> list[Table]:
    steps = [f"sigma {sigma:.2f}" for sigma in measured["sigmas"]]
    trained = measured["trained_steps"]
    norm = measured["gradients"]["all"]["norm"]

    def cell(found: dict, name: str, error: str) -> str:
        return f"{number(found[name], 4)} ± {number(found[error], 4)}"

    rows = [
        [
            name,
            cell(g, "snr", "standard_error"),
            *(
                cell(g, key, f"{key}_error")
                for kind in ("agreement", "adamw_agreement")
                for key in (kind, f"{kind}_gain")
            ),
            number(g["norm"] / norm if norm else None, 3),
        ]
        for name, g in measured["gradients"].items()
    ]
    signal = Table(
        "signal to noise of the first update's gradient: all positions, inside the objects, outside, inside another "
        "picture's objects; then of each arm's weights. Cosines are with the scalar gradient of other batches, ± is a "
        "standard error, of differences a paired one",
        [
            *("weights", "SNR", "cosine", "less that of all", "cosine of AdamW's step", "less that of all"),
            "norm over that of all",
        ],
        rows,
    )
    kinds = ["object 1", "object 2", "relation", "background", "unasked objects"]
    variance = Table(
        "share of the variance of the advantages by what differs between the pictures of a group",
        ["category", *kinds],
        [[c, *(number(shares.get(kind)) for kind in kinds)] for c, shares in measured["variance"].items()],
    )
    columns = [f"{step} (trained)" if i in trained else step for i, step in enumerate(steps)]
    looks = Table(
        "where each concept's map looks: its own object in the finished picture",
        ["", *columns],
        [
            [label, *(number(step.get(key), 2) for step in measured["localization"])]
            for label, key in (("AUC", "auc"), ("mass over area", "mass_over_area"))
        ],
    )
    before = measured["concentration"]["untrained"]
    steps_table = Table(
        "concentration of the maps before training (mean square of the relative map; 1: flat)",
        ["prompts", *columns],
        [[category, *(number(value, 2) for value in values)] for category, values in before.items()],
    )
    arms_table = Table(
        "concentration of the maps after training, at the trained steps",
        ["arm", *before],
        [
            [arm, *(number(np.mean([values[i] for i in trained]), 2) for values in by_category.values())]
            for arm, by_category in measured["concentration"].items()
        ],
    )
    made_of = Table(
        "what the held-out scores are made of after training: the prompts' own requirements, less what unasked objects "
        "take off; share of pictures with more and with fewer objects than were asked for",
        ["arm", "seeds", "requirements", "unasked objects", "more", "fewer"],
        [
            [arm, str(measured["trained_seeds"].get(arm, "-"))]
            + [number(of[key], 3) for key in ("requirements", "unasked", "more", "fewer")]
            for arm, of in measured["makeup"].items()
        ],
    )
    return [signal, variance, looks, steps_table, arms_table, made_of]


def diagnose(study: Study, out: Path, batches: int = BATCHES) -> str:
    """Measure, write diagnosis.json and diagnosis.md into `out`, and return the latter."""
    measured = measure(study, out, batches)
    text = (
        f"{measured['batches']} batches, {measured['pictures']} pictures; objects fill "
        f"{measured['object_area']:.0%} of a picture.\n\n"
    )
    text += "\n\n".join(table.markdown() for table in tables(measured)) + "\n"
    files.replace_text(out / "diagnosis.json", json.dumps(measured, indent=2) + "\n")
    files.replace_text(out / "diagnosis.md", text)
    return text
