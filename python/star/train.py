"""The training loop: prompts, rollout with maps, reward, advantage, allocation, loss, update."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from star import config as configuration
from star import files, rewards
from star.config import Config
from star.objective import allocation_weights, captured_steps, temporal_weights, uniform_rows
from star.reports import card
from star.reports.metrics import by_category, of_weights, peak_memory
from star.reports.tracking import Tracker, timed
from star.rewards.worker import RewardWorker, Ticket
from star.training import checkpoint
from star.training.advantage import advantages_of
from star.training.distributed import LostProcess, Share, Termination, lost, make_accelerator, on_main
from star.training.pipeline import load_pipeline
from star.training.policy import Policy
from star.training.prompts import Prompt, draw_prompts
from star.training.rollout import PromptEncoder, Rollout, decode, draw_window, make_steps, sample
from star_kernels import policy_loss

log = logging.getLogger("star")


class Trainer:
    """A run: the policy, its optimizer and where it stands."""

    def __init__(self, config: Config) -> None:
        config.check()
        self.config = config
        draw_prompts(config, 0)
        self.accelerator = make_accelerator(config)
        config.check(self.accelerator.num_processes)
        device, sampling, updates = self.accelerator.device, config.sampling, config.optimization.updates_per_iteration
        self.reward = rewards.load(config.run.reward, config.run.reward_models, device)
        self.worker = RewardWorker(self.reward, config.run.reward_timeout, config.run.reward_strict)
        self.pipeline = load_pipeline(config.model.path, device, getattr(torch, config.model.frozen_dtype))
        self.encode = PromptEncoder(
            self.pipeline, config.model.max_sequence_length, sampling.text_cache, config.model.offload_encoders
        )
        on_main(self.accelerator, lambda: checkpoint.prepare_folder(config))
        set_seed(config.run.seed)
        self.policy = Policy(self.pipeline, config, self.accelerator)
        factor = self.pipeline.vae_scale_factor
        self.size = (config.model.height // factor, config.model.width // factor)
        images = sampling.prompts_per_iteration * sampling.images_per_prompt
        # Neighbors are of different prompts, so that every chunk sees every prompt.
        self.groups = torch.arange(images) % sampling.prompts_per_iteration
        self.share = Share(self.accelerator, images, updates)
        self.chunk = config.optimization.micro_batch or len(self.share.rows) // updates
        self.iteration = 0
        self.told = False
        if config.run.resume:
            self.resume()
            on_main(self.accelerator, lambda: configuration.save(config, config.run.out / "config.yaml"))

    # --- one iteration, straight down -----------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One iteration: rollout, reward, advantage, allocation, update. Returns its metrics."""
        config, seconds = self.config, defaultdict(float)
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + self.iteration)
        prompts = draw_prompts(config, self.iteration)
        tickets: list[Ticket] = []
        with timed(seconds, "rollout"):
            rollout = self.rollout(
                [prompt.text for prompt in prompts],
                generator,
                # Scored while the next chunk is sampled.
                finished=lambda rows, latents: tickets.append(self.submit(prompts, rows, latents)),
            )
        with timed(seconds, "reward"):
            own = rewards.concatenate([ticket.result() for ticket in tickets])
            failures = self.worker.count_failures()
        scores = self.share.gather_scores(own)
        advantages = advantages_of(scores, self.groups, config.loss, self.reward.weights, self.size)
        weights = self.weights(rollout, own.masks, generator)
        noise = rollout.steps.transitions.s[list(rollout.steps.trained), None].expand(-1, len(rollout.groups))
        step_weights = temporal_weights(config.allocation.temporal, noise.to(rollout.latents.device), weights)
        with timed(seconds, "update"):
            advantages_here = advantages[self.share.rows].to(rollout.latents.device)
            metrics = self.update(rollout, advantages_here, weights, step_weights)
        self.iteration += 1
        metrics |= rewards.means(scores) | {"reward_failed": float(failures)}
        metrics |= by_category(scores.reward, [prompts[i].category for i in self.groups.tolist()])
        metrics["advantage_abs"] = advantages.abs().mean().item()
        metrics["advantage_zero"] = (advantages == 0).float().mean().item()
        metrics["memory_gib"] = peak_memory(self.accelerator.device)
        if weights is not None:
            metrics |= of_weights(weights, own.masks)
            metrics["weights_uniform"] = float(sum(uniform_rows(w) for w in weights))
            if metrics["weights_uniform"] and config.allocation.mix > 0 and not self.told:
                log.warning("%d samples had no usable map; their weights are 1", metrics["weights_uniform"])
                self.told = True  # the count is in the metrics of every iteration
        if config.run.grid_every and self.iteration % config.run.grid_every == 0:
            from star.reports import figures as report  # matplotlib is slow to import and only needed for pictures

            path = config.run.out / "grids" / f"{self.iteration:06d}.png"
            on_main(self.accelerator, lambda: report.rollout_grid(self.pipeline, rollout, weights, own.reward, path))
        return self.share.reduce(metrics | dict(seconds))

    def rollout(
        self,
        prompts: list[str],
        generator: torch.Generator,
        captured: Sequence[int] | None = None,
        finished: Callable[[Tensor, Tensor], None] | None = None,
    ) -> Rollout:
        config, sampling = self.config, self.config.sampling
        trained = draw_window(sampling.trained_steps, sampling.window, f"{config.run.seed}/{self.iteration}")
        return sample(
            self.policy.transformer,
            self.encode(prompts, sampling.guidance_scale),
            self.groups,
            make_steps(self.pipeline.scheduler, sampling.steps, trained, sampling.sampler, sampling.noise_level),
            size=self.size,
            generator=generator,
            guidance_scale=sampling.guidance_scale,
            shared_noise=sampling.shared_noise,
            chunk=self.chunk,
            captured=captured_steps(config.allocation.strategy, trained, sampling.steps)
            if captured is None
            else captured,
            layers=sampling.layers,
            normalize=sampling.normalize,
            rows=self.share.rows,
            stored_on_cpu=sampling.rollout_device == "cpu",
            merged=self.policy.merged if sampling.merge_adapter else nullcontext,
            finished=finished,
        )

    def submit(self, prompts: list[Prompt], rows: Tensor, latents: Tensor) -> Ticket:
        """Have some of this process' pictures scored beside what comes next."""
        chosen = [prompts[i] for i in self.groups[self.share.rows[rows]].tolist()]
        images = decode(self.pipeline, latents)
        return self.worker.submit(images, [p.text for p in chosen], [p.metadata for p in chosen])

    def weights(self, rollout: Rollout, masks: Tensor | None, generator: torch.Generator) -> Tensor | None:
        """(S, B, H, W) weights of the trained steps, or None for uniform ones."""
        if masks is not None:
            masks = F.adaptive_avg_pool2d(masks[:, None], rollout.grid).flatten(1).to(rollout.latents.device)
        # Every step starts from the same state: who gets whose weights does not change from step to step.
        seed = int(torch.randint(2**62, (), generator=generator))
        # The controls look beyond a sample: they need those of every process.
        everyone = self.config.allocation.strategy in ("shuffled", "random")
        per_step = []
        for k in range(len(rollout.steps.trained)):
            maps = None if rollout.maps is None else rollout.maps[min(k, len(rollout.maps) - 1)]
            weights = allocation_weights(
                self.config.allocation,
                self.share.gather(maps) if everyone else maps,
                rollout.grid,
                patch=self.pipeline.transformer.config.patch_size,
                groups=self.groups if everyone else rollout.groups,
                masks=masks,
                generator=torch.Generator().manual_seed(seed),
            )
            per_step.append(weights[self.share.rows] if everyone else weights)
        return None if per_step[0] is None else torch.stack(per_step)

    def update(
        self, rollout: Rollout, advantages: Tensor, weights: Tensor | None, step_weights: Tensor | None
    ) -> dict[str, float]:
        """Optimizer steps over the rollout; each sees its own pictures at every trained step."""
        loss_config, transformer = self.config.loss, self.policy.transformer
        chunks, trained = torch.arange(len(rollout.groups)).split(self.chunk), len(rollout.steps.trained)
        per_update = len(chunks) // self.config.optimization.updates_per_iteration
        seen, skipped, norms, moves = defaultdict(list), 0, [], []
        for number, rows in enumerate(chunks):
            for k in range(trained):
                last = (number + 1) % per_update == 0 and k == trained - 1
                # Gradients add up locally; processes exchange them once per update.
                with nullcontext() if last else self.accelerator.no_sync(transformer):
                    samples, prev_samples, old_means, transition = rollout.transition(k, rows)
                    velocity = rollout.velocity(transformer, k, rows)
                    reference = self.reference_velocity(rollout, k, rows) if loss_config.kl_coef else None
                    loss, statistics = policy_loss(
                        velocity,
                        samples,
                        prev_samples,
                        transition,
                        advantages[rows],
                        None if weights is None else weights[k, rows],
                        old_mean=old_means,
                        reference_velocity=reference,
                        step_weights=None if step_weights is None else step_weights[k, rows],
                        ratio=loss_config.ratio,
                        clip_range=loss_config.clip_range,
                        adv_clip=loss_config.adv_clip,
                        kl_coef=loss_config.kl_coef,
                        guard=loss_config.guard,
                    )
                    self.accelerator.backward(loss / (trained * per_update))
                seen["loss"].append(loss.detach())
                for name, value in statistics._asdict().items():
                    seen[name].append(value)
            if last:
                norm, was_skipped, moved = self.policy.step()
                norms.append(norm)
                moves += [] if moved is None else [moved]
                skipped += was_skipped
        metrics = {name: torch.stack(values).float().mean().item() for name, values in seen.items()}
        metrics["ratio_min"] = torch.stack(seen["ratio_min"]).min().item()
        metrics["ratio_max"] = torch.stack(seen["ratio_max"]).max().item()
        # What the rollout's own policy gives: exactly 1 before the first update.
        metrics["ratio_first"] = seen["ratio_mean"][0].item()
        if moves:
            metrics["update_norm"] = sum(moves) / len(moves)
        return metrics | {"grad_norm": sum(norms) / len(norms), "updates_skipped": float(skipped)}

    def reference_velocity(self, rollout: Rollout, k: int, rows: Tensor) -> Tensor:
        """Velocity of the model without its adapter."""
        with self.policy.reference() as transformer:
            return rollout.velocity(transformer, k, rows)

    # --- stopping and going on --------------------------------------------------------------------------------------

    def save(self) -> None:
        """Write everything that the next iteration depends on; its noise and prompts follow from seed and iteration."""
        run = self.config.run
        state = {"iteration": self.iteration, "random": gather_object([checkpoint.random_state()])}
        state |= self.policy.state_dict()
        on_main(self.accelerator, lambda: checkpoint.save(run.out, self.iteration, state, run.keep_checkpoints))

    def resume(self) -> None:
        found = checkpoint.checkpoints(self.config.run.out)
        if not found:
            return  # it was stopped before the first one
        state = checkpoint.load(found[-1])
        if not self.policy.fits(state):
            raise checkpoint.CheckpointError(f"checkpoint: {found[-1]} is of another model or adapter")
        self.policy.load_state_dict(state)
        if self.accelerator.process_index < len(state["random"]):
            checkpoint.set_random_state(state["random"][self.accelerator.process_index])
        self.iteration = state["iteration"]


def train(config: Config) -> dict[str, float]:
    """Run a configuration to its end. Returns (and writes to summary.json) what it reached; after a SIGTERM it returns
    early, with `stopped` in what it returns and a checkpoint to continue from."""
    trainer = None
    try:
        with Termination() as termination:
            trainer = Trainer(config)
            return run(trainer, termination)
    except RuntimeError as error:
        if trainer is None or trainer.accelerator.num_processes == 1 or not lost(error):
            raise
        reason = str(error).splitlines()[0]
        raise LostProcess(
            f"accelerate: another process of the run was lost ({reason}); --resume continues from the last checkpoint"
        ) from error


def run(trainer: Trainer, termination: Termination) -> dict[str, float]:
    from star.reports import figures as report  # matplotlib is slow to import and only needed for pictures
    from star.training import curve

    config, accelerator, policy = trainer.config, trainer.accelerator, trainer.policy
    main, out, begin = accelerator.is_main_process, config.run.out, time.perf_counter()
    tracker = Tracker(config, trainer.iteration) if main else None
    # Every process takes part, because the weights may be sharded over them; the main one writes.
    with trainer.encode.on_device():
        before = report.held_out(trainer.pipeline, config, "before", known=trainer.iteration > 0, write=main)
    total, every = config.optimization.iterations, config.run.evaluate_every
    if every and trainer.iteration == 0:
        with trainer.encode.on_device():
            curve.score(trainer.pipeline, config, 0, write=main)
    with tqdm(total=total, initial=trainer.iteration, desc="training", dynamic_ncols=True, disable=not main) as bar:
        while trainer.iteration < total:
            if termination.agreed(accelerator):
                trainer.save()
                if main:
                    tracker.close()
                return {"iterations": trainer.iteration, "stopped": True}
            metrics = trainer.step()
            if main:
                tracker.log(trainer.iteration - 1, metrics)
            bar.update()
            bar.set_postfix(reward=f"{metrics['reward']:.3f}", ratio=f"{metrics['ratio_max']:.4f}")
            # Before the checkpoint: a run that is killed in between repeats it, and none is left out.
            if every and (trainer.iteration % every == 0 or trainer.iteration == total):
                with policy.averaged(), trainer.encode.on_device():
                    curve.score(trainer.pipeline, config, trainer.iteration, write=main)
            if trainer.iteration % config.run.save_every == 0 or trainer.iteration == total:
                trainer.save()
    if main:
        tracker.close()
    trainer.worker.close()
    with policy.averaged(), trainer.encode.on_device():
        checkpoint.export(trainer.pipeline, out, main)
        after = report.held_out(trainer.pipeline, config, "after", write=main)
        if config.run.pictures:
            report.pictures(trainer.pipeline, config, before, after, write=main)
    summary = {"iterations": trainer.iteration, **report.compare(before, after)}
    summary["seconds"] = round(time.perf_counter() - begin, 1)
    if main:
        files.replace_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        card.write(out / ("lora" if config.model.lora_rank else "model"), config, summary)
    return summary
