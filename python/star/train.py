"""The training loop: prompts, rollout with maps, reward, advantage, allocation, loss, update."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections import defaultdict
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor
from tqdm import tqdm

from star import card, checkpoint, rewards
from star import config as configuration
from star.advantage import group_advantages, location_advantages, weighted_advantages
from star.config import Config, ConfigError
from star.objective import allocation_weights, uniform_rows
from star.pipeline import load_pipeline, make_trainable
from star.prompts import Prompt, draw_prompts
from star.rewards.worker import RewardWorker
from star.rollout import Rollout, decode, encode, make_steps, sample
from star.tracking import Tracker
from star_kernels import policy_loss

log = logging.getLogger("star")


def prepare_folder(config: Config) -> None:
    """Make the run's folder; never touch what is in it unless told to."""
    out = config.run.out
    if config.run.overwrite and out.exists() and any(out.iterdir()):
        # A slip in --out must not cost anyone a folder that is no run.
        if not (out / "config.yaml").is_file():
            raise ConfigError(f"run.overwrite: {out} is no run of star (it has no config.yaml); delete it yourself")
        shutil.rmtree(out)
    if not config.run.resume and out.exists() and any(out.iterdir()):
        raise ConfigError(f"run.out: {out} is not empty; --run.resume continues it, --run.overwrite deletes it")
    out.mkdir(parents=True, exist_ok=True)


@contextmanager
def timed(seconds: dict[str, float], phase: str):
    begin = time.perf_counter()
    yield
    seconds[f"seconds/{phase}"] += time.perf_counter() - begin


class Trainer:
    """A run: the policy, its optimiser and where it stands."""

    def __init__(self, config: Config) -> None:
        config.check()
        self.config = config
        draw_prompts(config, 0)
        self.accelerator = Accelerator(mixed_precision=config.optimisation.mixed_precision)
        if self.accelerator.num_processes > 1:
            raise ConfigError(f"accelerate: got {self.accelerator.num_processes} processes, one is supported so far")
        device = self.accelerator.device
        self.reward = rewards.load(config.run.reward, config.run.reward_models, device)
        self.worker = RewardWorker(self.reward, config.run.reward_timeout, config.run.reward_strict)
        self.pipeline = load_pipeline(config.model.path, device)
        prepare_folder(config)
        set_seed(config.run.seed)
        parameters = make_trainable(self.pipeline, config)
        optimisation, sampling = config.optimisation, config.sampling
        optimizer = torch.optim.AdamW(
            parameters,
            optimisation.learning_rate,
            betas=tuple(optimisation.betas),
            weight_decay=optimisation.weight_decay,
        )
        self.transformer, self.optimizer = self.accelerator.prepare(self.pipeline.transformer, optimizer)
        self.steps = make_steps(
            self.pipeline.scheduler, sampling.steps, sampling.trained_steps, sampling.sampler, sampling.noise_level
        )
        factor = self.pipeline.vae_scale_factor
        self.size = (config.model.height // factor, config.model.width // factor)
        images = sampling.prompts_per_iteration * sampling.images_per_prompt
        self.chunk = optimisation.micro_batch or images // optimisation.updates_per_iteration
        # Neighbours are of different prompts, so that every chunk sees every prompt.
        self.groups = torch.arange(images) % sampling.prompts_per_iteration
        self.iteration = 0
        self.told = False
        if config.run.resume:
            self.resume()
        configuration.save(config, config.run.out / "config.yaml")

    # --- one iteration, straight down -----------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One iteration: rollout, reward, advantage, allocation, update. Returns its metrics."""
        config, seconds = self.config, defaultdict(float)
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + self.iteration)
        prompts = draw_prompts(config, self.iteration)
        with timed(seconds, "rollout"):
            rollout = self.rollout([prompt.text for prompt in prompts], generator)
        with timed(seconds, "reward"):
            scores = self.score(rollout, prompts)
            failures = self.worker.count_failures()
        advantages = self.advantages(scores)
        weights = self.weights(rollout, scores.masks, generator)
        with timed(seconds, "update"):
            metrics = self.update(rollout, advantages.to(rollout.latents.device), weights)
        self.iteration += 1
        metrics |= rewards.means(scores) | {"reward_failed": float(failures)}
        metrics["advantage_zero"] = (advantages == 0).float().mean().item()
        if weights is not None:
            metrics["weights_max"] = weights.amax((2, 3)).mean().item()
            metrics["weights_uniform"] = float(sum(uniform_rows(w) for w in weights))
            if metrics["weights_uniform"] and config.allocation.mix > 0 and not self.told:
                log.warning("%d samples had no usable map; their weights are 1", metrics["weights_uniform"])
                self.told = True  # the count is in the metrics of every iteration
        return metrics | seconds

    def rollout(self, prompts: list[str], generator: torch.Generator) -> Rollout:
        config = self.config
        conditions = encode(self.pipeline, prompts, config.model.max_sequence_length, config.sampling.guidance_scale)
        return sample(
            self.transformer,
            conditions,
            self.groups,
            self.steps,
            size=self.size,
            generator=generator,
            guidance_scale=config.sampling.guidance_scale,
            shared_noise=config.sampling.shared_noise,
            chunk=self.chunk,
            captured=() if config.allocation.strategy in ("uniform", "oracle") else None,
            layers=config.sampling.layers,
            normalise=config.sampling.normalise,
        )

    def score(self, rollout: Rollout, prompts: list[Prompt]) -> rewards.Scores:
        """Scores of the pictures: while one chunk is scored, the next one is decoded."""
        tickets = []
        for rows in torch.arange(len(self.groups)).split(self.chunk):
            chosen = [prompts[i] for i in self.groups[rows].tolist()]
            images = decode(self.pipeline, rollout.latents[rows])
            tickets.append(self.worker.submit(images, [p.text for p in chosen], [p.metadata for p in chosen]))
        return rewards.concatenate([ticket.result() for ticket in tickets])

    def advantages(self, scores: rewards.Scores) -> Tensor:
        """(B,), or (B, H, W) with loss.advantage 'location'."""
        loss = self.config.loss
        options = {"global_std": loss.global_std, "eps": loss.advantage_eps}
        if scores.reward.isnan().all():  # every reward of this iteration failed: nothing is better than anything
            return group_advantages(scores.reward, self.groups)
        if loss.advantage == "location":
            if scores.reward_map is None:
                raise ConfigError(
                    f"loss.advantage: 'location' needs a reward that localises, not {self.config.run.reward!r}"
                )
            maps = F.adaptive_avg_pool2d(scores.reward_map[:, None], self.size)[:, 0]
            return location_advantages(maps, self.groups, **options)
        if loss.normalise_rewards:
            return weighted_advantages(scores.terms, self.reward.weights, self.groups, **options)
        return group_advantages(scores.reward, self.groups, **options)

    def weights(self, rollout: Rollout, masks: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """(S, B, H, W) weights of the trained steps, or None for uniform ones."""
        if masks is not None:
            masks = F.adaptive_avg_pool2d(masks[:, None], rollout.grid).flatten(1).to(rollout.latents.device)
        # Every step starts from the same state: who gets whose weights does not change from step to step.
        seed = int(torch.randint(2**62, (), generator=generator))
        per_step = [
            allocation_weights(
                self.config.allocation,
                None if rollout.maps is None else rollout.maps[k],
                rollout.grid,
                patch=self.pipeline.transformer.config.patch_size,
                groups=self.groups,
                masks=masks,
                generator=torch.Generator().manual_seed(seed),
            )
            for k in range(len(self.steps.trained))
        ]
        return None if per_step[0] is None else torch.stack(per_step)

    def update(self, rollout: Rollout, advantages: Tensor, weights: Tensor | None) -> dict[str, float]:
        """Optimiser steps over the rollout; each sees its own pictures at every trained step."""
        loss_config, optimisation = self.config.loss, self.config.optimisation
        chunks = torch.arange(len(self.groups)).split(self.chunk)
        per_update = len(chunks) // optimisation.updates_per_iteration
        seen, skipped, norms = defaultdict(list), 0, []
        for number, rows in enumerate(chunks):
            for k, step in enumerate(self.steps.trained):
                transition = self.steps.transitions.rows(slice(step, step + 1)).to(advantages.device).expand(len(rows))
                velocity = rollout.velocity(self.transformer, k, rows)
                reference = self.reference_velocity(rollout, k, rows) if loss_config.kl_coef else None
                loss, statistics = policy_loss(
                    velocity,
                    rollout.samples[k, rows],
                    rollout.prev_samples[k, rows],
                    transition,
                    advantages[rows],
                    None if weights is None else weights[k, rows],
                    old_mean=rollout.old_means[k, rows],
                    reference_velocity=reference,
                    ratio=loss_config.ratio,
                    clip_range=loss_config.clip_range,
                    adv_clip=loss_config.adv_clip,
                    kl_coef=loss_config.kl_coef,
                    guard=loss_config.guard,
                )
                self.accelerator.backward(loss / (len(self.steps.trained) * per_update))
                seen["loss"].append(loss.detach())
                for name, value in statistics._asdict().items():
                    seen[name].append(value)
            if (number + 1) % per_update == 0:
                norm = self.accelerator.clip_grad_norm_(self.transformer.parameters(), optimisation.max_grad_norm)
                norms.append(float(norm))
                if torch.isfinite(norm):
                    self.optimizer.step()
                else:
                    skipped += 1
                self.optimizer.zero_grad()
        metrics = {name: torch.stack(values).float().mean().item() for name, values in seen.items()}
        metrics["ratio_min"] = torch.stack(seen["ratio_min"]).min().item()
        metrics["ratio_max"] = torch.stack(seen["ratio_max"]).max().item()
        # What the rollout's own policy gives: exactly 1 before the first update.
        metrics["ratio_first"] = seen["ratio_mean"][0].item()
        return metrics | {"grad_norm": sum(norms) / len(norms), "updates_skipped": float(skipped)}

    def reference_velocity(self, rollout: Rollout, k: int, rows: Tensor) -> Tensor:
        """Velocity of the model without its adapter."""
        transformer = self.accelerator.unwrap_model(self.transformer)
        transformer.disable_adapters()
        try:
            with torch.no_grad():
                return rollout.velocity(transformer, k, rows)
        finally:
            transformer.enable_adapters()

    # --- stopping and going on --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write everything that the next iteration depends on; its noise and prompts follow from seed and iteration."""
        parameters = {n: p.detach() for n, p in self.pipeline.transformer.named_parameters() if p.requires_grad}
        state = {"iteration": self.iteration, "parameters": parameters, "optimizer": self.optimizer.state_dict()}
        checkpoint.save(self.config.run.out, self.iteration, state, self.config.run.keep_checkpoints)

    def resume(self) -> None:
        found = checkpoint.checkpoints(self.config.run.out)
        if not found:
            raise ConfigError(f"run.resume: {self.config.run.out} has no checkpoint")
        state = checkpoint.load(found[-1])
        own = {n: p for n, p in self.pipeline.transformer.named_parameters() if p.requires_grad}
        saved = state["parameters"]
        if saved.keys() != own.keys() or any(saved[n].shape != own[n].shape for n in own):
            raise checkpoint.CheckpointError(f"checkpoint: {found[-1]} is of another model or adapter")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(saved[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.iteration = state["iteration"]


def train(config: Config) -> dict[str, float]:
    """Run a configuration to its end. Returns (and writes to summary.json) what it reached."""
    from star import report  # matplotlib is slow to import and only needed for pictures

    trainer = Trainer(config)
    out, begin = config.run.out, time.perf_counter()
    tracker = Tracker(out, trainer.iteration)
    before = report.held_out(trainer.pipeline, config, "before")
    total = config.optimisation.iterations
    with tqdm(total=total, initial=trainer.iteration, desc="training", dynamic_ncols=True) as bar:
        while trainer.iteration < total:
            metrics = trainer.step()
            tracker.log(trainer.iteration - 1, metrics)
            bar.update()
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", ratio=f"{metrics['ratio_max']:.4f}")
            if trainer.iteration % config.run.save_every == 0 or trainer.iteration == total:
                trainer.save()
    tracker.close()
    trainer.worker.close()
    if config.model.lora_rank:
        checkpoint.export_lora(trainer.pipeline.transformer, out / "lora")
    else:
        trainer.pipeline.save_pretrained(out / "model")
    after = report.held_out(trainer.pipeline, config, "after")
    summary = {"iterations": trainer.iteration, **report.compare(before, after)}
    if config.run.pictures:
        report.pictures(trainer.pipeline, config, before, after)
    summary["seconds"] = round(time.perf_counter() - begin, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    card.write(out / ("lora" if config.model.lora_rank else "model"), config, summary)
    return summary
