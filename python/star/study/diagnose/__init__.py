"""Why the arms do what they do: where the gradient's signal is, what rewards differ in, where maps look.

Everything is measured on the policy before training, on the rollouts, advantages and weights of the study itself, so
that the arms are compared on the same images; the concentration of the maps and what scores are made of are also
measured after training. Reading order: gradient, maps, scores; `star.shapes.diagnosis` knows what the images show.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from star import files
from star.config import Config, ConfigError
from star.shapes import diagnosis
from star.study.diagnose import gradient, maps, scores
from star.study.spec import Study, run_folder
from star.train import Trainer
from star.training.adapter import load_adapter
from star.training.advantage import group_advantages
from star.training.rollout import decode
from star.training.task import configured_task, draw_prompts, load_task_reward

BATCHES = 96
PROMPTS = 32  # of each category, for the concentration of the maps


def diagnose(study: Study, out: Path, batches: int = BATCHES) -> str:
    """Measure, write diagnosis.json and diagnosis.md into `out`, and return the latter."""
    arms = {arm: study.config(arm, study.seeds[0], out) for arm in study.arms}
    config = arms[study.baselines[0]]
    measured = {"batches": batches, **measure_untrained(arms, config, out, batches), **measure_runs(study, config, out)}
    tables = [gradient.table(measured), scores.variance_table(measured), *maps.tables(measured)]
    tables.append(scores.composition_table(measured))
    text = (
        f"{batches} batches, {measured['images']} images; objects fill {measured['object_area']:.0%} of an image.\n\n"
    )
    text += "\n\n".join(table.markdown() for table in tables) + "\n"
    files.replace_text(out / "diagnosis.json", json.dumps(measured, indent=2) + "\n")
    files.replace_text(out / "diagnosis.md", text)
    return text


def measure_untrained(arms: dict[str, Config], config: Config, out: Path, batches: int) -> dict:
    """What gradients, rewards and maps say before training. config: of the arm whose rollouts are measured."""
    optimization = dataclasses.replace(config.optimization, updates_per_iteration=1)
    run = dataclasses.replace(config.run, out=out / "diagnosis", overwrite=True)
    trainer = Trainer(dataclasses.replace(config, optimization=optimization, run=run))
    judges = {
        reward: load_task_reward(configured_task(own), own.run.reward_models, "cpu")
        for reward, own in {own.run.reward: own for own in arms.values()}.items()
    }
    steps, signal, world = config.sampling.steps, gradient.Gradients(trainer, arms), diagnosis.Diagnosis()
    for i in tqdm(range(batches), desc="diagnosis", dynamic_ncols=True):
        trainer.iteration = i
        prompts = draw_prompts(trainer.task, config, i)
        generator = torch.Generator().manual_seed(i)
        texts, concepts = [prompt.text for prompt in prompts], [prompt.concepts for prompt in prompts]
        rollout = trainer.rollout(texts, generator, concepts, captured=range(steps))
        assert rollout.maps is not None  # captured
        verified = world.add(
            decode(trainer.pipeline, rollout.latents),
            [prompts[group].text for group in rollout.groups.tolist()],
            [i * len(prompts) + group for group in rollout.groups.tolist()],
            rollout.maps,
            rollout.grid,
        )
        masks = {name: diagnosis.score_verified(judge, verified).masks for name, judge in judges.items()}
        objects = masks[config.run.reward]
        if objects is None:
            raise ConfigError(f"run.reward: {config.run.reward!r} gives no masks, which a diagnosis needs")
        advantages = group_advantages(
            diagnosis.world_rewards(verified),
            rollout.groups,
            global_std=config.loss.global_std,
            eps=config.loss.advantage_eps,
        )
        signal.add(
            rollout,
            advantages.float(),
            diagnosis.object_tokens(objects, rollout.grid),
            {arm: masks[own.run.reward] for arm, own in arms.items()},
            generator,
            seed=i,
        )
    trainer.worker.close()
    trainer.judge.close()
    sigmas = rollout.steps.sigmas.tolist()[:steps]
    shared = {"trained_steps": list(config.sampling.trained_steps), "sigmas": sigmas}
    return shared | signal.result() | world.result()


def measure_runs(study: Study, config: Config, out: Path) -> dict:
    """What maps and held-out scores are like before training ("untrained") and after each arm's."""
    prompts = diagnosis.prompts_by_category(PROMPTS)
    concentration, composition, trained_seeds = {}, {}, {}
    for arm in ("untrained", *study.arms):
        pipelines = list(trained_pipelines(study, arm, config, out))
        if pipelines:
            concentration[arm] = _means([maps.concentration(pipeline, config, prompts) for pipeline in pipelines])
            composition[arm] = _means([diagnosis.score_composition(pipeline, config) for pipeline in pipelines])
            trained_seeds[arm] = len(pipelines)
    del trained_seeds["untrained"]
    return {"concentration": concentration, "composition": composition, "trained_seeds": trained_seeds}


def trained_pipelines(study: Study, arm: str, config: Config, out: Path) -> Iterator[Any]:
    """The pipelines with the adapters of an arm, of every seed whose run has one; the plain one for "untrained"."""
    task = configured_task(config)
    if arm == "untrained":
        yield task.pipeline("cpu", torch.float32)
        return
    for seed in study.seeds:
        adapter = run_folder(out, arm, seed) / "lora"
        if adapter.is_dir():
            pipeline = task.pipeline("cpu", torch.float32)
            load_adapter(pipeline, str(adapter))
            yield pipeline


def _means(dicts: list[dict]) -> dict:
    """The mean of dicts of numbers, or of lists of numbers, with the same keys."""
    return {key: np.mean([values[key] for values in dicts], 0).tolist() for key in dicts[0]}
