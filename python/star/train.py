"""The training loop: prompts, rollout with maps, reward, advantage, allocation, loss, update."""

from __future__ import annotations

import dataclasses
import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from accelerate.utils import gather_object, set_seed
from torch import Tensor
from tqdm import tqdm

from star import files, rewards
from star.config import Config, ConfigError
from star.messages import one_line
from star.reports import card, commands, evaluations, shown
from star.reports.metrics import UpdateMetrics, iteration_metrics, peak_memory, weight_metrics
from star.reports.tracking import Tracker, timed
from star.rewards import Scores
from star.rewards.worker import RewardWorker, Ticket
from star.training import checkpoint, preview
from star.training.advantage import compute_advantages, compute_concept_advantages
from star.training.concept_credit import matched_credits
from star.training.conditions import Conditions, PromptEncoder
from star.training.credit import Credit, masks_or_nothing
from star.training.distributed import LostProcess, Share, Termination, is_lost_process, make_accelerator, on_main
from star.training.exploration import explore_maps, explore_masks
from star.training.families import family_of
from star.training.folder import compare_with_saved, held_folder, prepare_folder, save_config
from star.training.objectives import make_objective
from star.training.pipeline import check_model, check_size, latent_size, model_shape
from star.training.policy import Policy
from star.training.prompts import concepts_of
from star.training.rollout import (
    Explore,
    Rollout,
    SamplerOptions,
    check_steps,
    decode,
    group_members,
    make_steps,
    sample,
)
from star.training.scoring import HeldOut
from star.training.task import configured_task, draw_prompts, load_task_reward

if TYPE_CHECKING:
    from star.concepts import Marks
    from star.training.prompts import Prompt

log = logging.getLogger("star")


class Trainer:
    """A run: the policy, its optimizer and the iteration it has reached."""

    def __init__(self, config: Config) -> None:
        self.begin, self.seconds_before = time.perf_counter(), 0.0
        config.check()
        self.config = config
        self.task = configured_task(config)
        rewards.check_models(config.run.reward_models, self.task.reward, config.scoring.reward)
        draw_prompts(self.task, config, 0)
        self.held_out = HeldOut.of_run(self.task, config)
        self.accelerator = make_accelerator(config)
        config.check(self.accelerator.num_processes)
        device, sampling, updates = self.accelerator.device, config.sampling, config.optimization.updates_per_iteration
        self.reward = load_task_reward(self.task, config.run.reward_models, device)
        self.worker = RewardWorker(self.reward, config.run.reward_timeout, config.run.reward_strict)
        self.judge = self.worker  # of the held-out images
        if config.scoring.reward:
            judged = dataclasses.replace(self.task, reward=config.scoring.reward)
            reward = load_task_reward(judged, config.run.reward_models, device)
            self.judge = RewardWorker(reward, config.run.reward_timeout, config.run.reward_strict)
        self.pipeline = self.task.pipeline(device, getattr(torch, config.model.frozen_dtype))
        check_size(self.pipeline, config.model.height, config.model.width, "model.")
        check_model(family_of(self.pipeline), self.pipeline.transformer, config)
        self.size = latent_size(self.pipeline, config.model.height, config.model.width)
        check_steps(self.pipeline, self.size, config.sampling.steps, "sampling.steps")
        if self.held_out.prompts:
            check_steps(self.pipeline, self.size, self.held_out.options.steps, "scoring.steps")
        self.encode = PromptEncoder(
            self.pipeline,
            config.model.max_sequence_length,
            sampling.text_cache,
            config.model.offload_encoders,
            sampling.concepts,
        )
        set_seed(config.run.seed)
        self.policy = Policy(self.pipeline, config, self.accelerator)
        on_main(self.accelerator, lambda: prepare_folder(config))  # when nothing that was given can be wrong any more
        images = sampling.prompts_per_iteration * sampling.images_per_prompt
        # Neighbors are of different prompts, so that every chunk sees every prompt.
        self.groups = torch.arange(images) % sampling.prompts_per_iteration
        self.share = Share(self.accelerator, images, updates)
        patch = model_shape(self.pipeline).patch_size
        self.grid = (self.size[0] // patch, self.size[1] // patch)
        self.objective = make_objective(config, self.policy, self.share, self.groups, patch)
        self.chunk = config.optimization.micro_batch or len(self.share.rows) // updates
        self.iteration, self.saved = 0, -1
        self.preview: preview.Preview | None = None
        self.warned_uniform = False
        self.held_out_score: float | None = None
        if config.run.resume:
            self.resume()

    # --- one iteration, straight down -----------------------------------------------------------------------------

    def step(self) -> dict[str, float]:
        """One iteration: rollout, reward, advantage, allocation, update. Returns its metrics."""
        config = self.config
        seconds: dict[str, float] = defaultdict(float)
        generator = torch.Generator().manual_seed(config.run.seed * 1_000_003 + self.iteration)
        prompts = draw_prompts(self.task, config, self.iteration)
        rollout, own = self.scored_rollout(prompts, generator, seconds)
        scores = self.share.gather_scores(own)
        self.worker.count_failures(bool(scores.reward.isfinite().any()))  # raises in all processes, or in none
        advantages = compute_advantages(scores, self.groups, config.loss, self.reward.weights, self.size)
        concepts = compute_concept_advantages(scores, self.groups, config.loss, self.reward.weights)
        device = rollout.latents.device
        own_advantages = advantages[self.share.rows].to(device)
        own_concepts = None if concepts is None else concepts[self.share.rows].to(device)
        masks = self.masks(own)
        credit = self.objective.credit(rollout, own_advantages, masks, generator, self.iteration, own_concepts)
        with timed(seconds, "update"):
            metrics, weights = self.update(rollout, credit)
            self.policy.follow()
        self.iteration += 1

        categories = [prompts[i].category for i in self.groups.tolist()]
        metrics |= iteration_metrics(scores, categories, advantages)
        metrics["reward_failed"] = float(own.reward.isnan().sum())
        if concepts is not None:
            metrics["concepts_credited"] = concepts.isfinite().sum(1).float().mean().item()
        if rollout.explored is not None:
            metrics["explored_share"] = rollout.explored.float().mean().item()
        metrics["memory_gib"] = peak_memory(self.accelerator.device)
        if weights is not None:
            metrics |= weight_metrics(weights, own.masks)
            unexpected = config.allocation.mix > 0 and not config.allocation.is_limited()
            if metrics["weights_uniform"] and unexpected and not self.warned_uniform:
                log.warning("%d samples had no usable map; their weights are 1", metrics["weights_uniform"])
                self.warned_uniform = True  # the count is in the metrics of every iteration
        if config.run.grid_every and self.iteration % config.run.grid_every == 0:
            self.preview = preview.of_rollout(self.pipeline, rollout, weights, own.reward)
        return self.share.reduce(metrics | dict(seconds))

    def scored_rollout(
        self,
        prompts: list[Prompt],
        generator: torch.Generator,
        seconds: dict[str, float],
        captured: Sequence[int] | None = None,
    ) -> tuple[Rollout, Scores]:
        """This process' images of an iteration, and what the reward says of them. seconds: gets the time of both.
        captured: see `rollout`."""
        tickets: list[Ticket] = []
        with timed(seconds, "rollout"):
            rollout = self.rollout(
                [prompt.text for prompt in prompts],
                generator,
                [prompt.concepts for prompt in prompts],
                captured,
                # Scored while the next chunk is sampled.
                finished=lambda rows, latents: tickets.append(self.submit(prompts, rows, latents)),
                find=lambda rows, latents: self.found_masks(prompts, rows, latents),
            )
        with timed(seconds, "reward"):
            scores = rewards.concatenate([ticket.result() for ticket in tickets])
        return rollout, self.with_matched_credits(scores, prompts, rollout)

    def rollout(
        self,
        prompts: list[str],
        generator: torch.Generator,
        concepts: Sequence[Marks | None] | None = None,
        captured: Sequence[int] | None = None,
        finished: Callable[[Tensor, Tensor], None] | None = None,
        find: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> Rollout:
        """Sample the images of an iteration. concepts: of each prompt, None for one whose concepts are to be found.
        captured: steps whose maps are read; None means those that the run needs. finished: see `sample`. find: the
        masks (n, height, width) of some of this process' images, from their rows and latents, for sampling.explore
        "masks"."""
        config, sampling = self.config, self.config.sampling
        stochastic = self.objective.stochastic_steps(self.iteration)
        if captured is None:
            captured = self.objective.captured_steps(stochastic)
        options = SamplerOptions(
            size=self.size,
            guidance_scale=sampling.guidance_scale,
            shared_noise=sampling.shared_noise,
            chunk=self.chunk,
            captured=captured,
            layers=sampling.layers,
            normalize=sampling.normalize,
            stored_on_cpu=sampling.rollout_device == "cpu",
            noise_on_cpu=sampling.noise_device == "cpu",
        )
        steps = make_steps(self.pipeline, self.size, sampling.steps, stochastic, sampling.sampler, sampling.noise_level)
        conditions = self.encode(prompts, sampling.guidance_scale, concepts)
        explore: Explore | None = None
        if sampling.explore == "maps":
            explore = explore_maps(config.allocation, sampling.explore_share, steps.sigmas, self.grid)
        elif sampling.explore == "masks":
            assert find is not None  # whoever trains gives it
            explore = explore_masks(self.first_masks(conditions, options, generator, find), self.grid)
        with self.policy.sampler():
            return sample(
                self.policy.transformer,
                conditions,
                self.groups,
                steps,
                options,
                generator,
                rows=self.share.rows,
                merged=self.policy.merged if sampling.merge_adapter else nullcontext,
                finished=finished,
                explore=explore,
            )

    def first_masks(
        self,
        conditions: Conditions,
        options: SamplerOptions,
        generator: torch.Generator,
        find: Callable[[Tensor, Tensor], Tensor],
    ) -> Tensor:
        """(b, height, width) for this process' images: what `find` finds in images that are sampled from the same
        starts without noise in the steps. generator: stays as it is."""
        start, everyone = torch.Generator(), torch.arange(len(self.share.rows))
        start.set_state(generator.get_state())
        rows, member = everyone, everyone
        if options.shared_noise:
            _, rows, member = group_members(self.groups[self.share.rows])
        first = sample(
            self.policy.transformer,
            conditions,
            self.groups,
            make_steps(self.pipeline, self.size, self.config.sampling.steps, (), "ode", 0.0),
            dataclasses.replace(options, captured=()),
            start,
            rows=self.share.rows[rows],
        )
        # As many at a time as a reward scores elsewhere.
        found = [find(rows[part], first.latents[part]) for part in torch.arange(len(rows)).split(self.chunk)]
        return torch.cat(found)[member]

    def found_masks(self, prompts: list[Prompt], rows: Tensor, latents: Tensor) -> Tensor:
        """What the reward finds in some of this process' images, (n, height, width); nothing where it failed."""
        masks = self.masks(self.submit(prompts, rows, latents).result())
        assert masks is not None  # a run that explores masks has some
        return masks

    def masks(self, scores: Scores) -> Tensor | None:
        """The reward's masks of some of this process' images, (n, height, width). Raises ConfigError if the run needs
        them and the reward has none."""
        masks = masks_or_nothing(scores, self.grid)
        if masks is None:
            strategy, explore = self.config.allocation.strategy, self.config.sampling.explore
            needed = {"allocation.strategy": (strategy, "oracle"), "sampling.explore": (explore, "masks")}
            for setting, (value, needs) in needed.items():
                if value == needs:
                    names = ", ".join(self.reward.weights)
                    raise ConfigError(f"{setting}: got {value!r}, which needs a reward with masks, not {names}")
        return masks

    def with_matched_credits(self, scores: Scores, prompts: list[Prompt], rollout: Rollout) -> Scores:
        """This process' scores with credits in the order of the concepts whose maps the run reads, or without."""
        if self.config.loss.advantage != "concept" or scores.credits is None:
            return dataclasses.replace(scores, credits=None, concepts=())
        groups = self.groups[self.share.rows].tolist()
        found = concepts_of(prompts, self.config.sampling.concepts)
        columns = rollout.conditions.tokens.index.shape[1]
        return matched_credits(scores, [prompts[i].text for i in groups], [found[i] for i in groups], columns)

    def submit(self, prompts: list[Prompt], rows: Tensor, latents: Tensor) -> Ticket:
        """Have some of this process' images scored beside what comes next."""
        chosen = [prompts[i] for i in self.groups[self.share.rows[rows]].tolist()]
        images = decode(self.pipeline, latents)
        return self.worker.submit(images, [p.text for p in chosen], [p.metadata for p in chosen])

    def update(self, rollout: Rollout, credit: Credit) -> tuple[dict[str, float], Tensor | None]:
        """Optimizer steps over the rollout; each sees its own images in every pass. Returns the metrics, and the
        weights (S, B, H, W) of the S passes or None."""
        chunks, passes = torch.arange(len(rollout.groups)).split(self.chunk), self.objective.passes(rollout)
        per_update = len(chunks) // self.config.optimization.updates_per_iteration
        seen = UpdateMetrics()
        for number, rows in enumerate(chunks):
            ends_update = (number + 1) % per_update == 0
            for k in range(passes):
                # Gradients add up locally; processes exchange them once per update.
                exchanged = ends_update and k == passes - 1
                with nullcontext() if exchanged else self.accelerator.no_sync(self.policy.transformer):
                    loss, statistics, weights = self.objective.loss(rollout, k, rows, credit)
                    self.accelerator.backward(loss / (passes * per_update))
                seen.add_pass(k, loss, statistics, weights)
            if ends_update:
                seen.add_step(*self.policy.step())
        return seen.metrics(), seen.weights()

    # --- scoring, stopping and going on ---------------------------------------------------------------------------

    def score(self) -> None:
        """Score the averaged policy on the held-out prompts, if that is due."""
        last = self.config.optimization.iterations
        if self.held_out.is_due(self.iteration, last):
            # Every process takes part, because the weights may be sharded over them.
            with self.policy.averaged(), self.encode.on_device():
                self.held_out_score = self.held_out.score(self.pipeline, self.judge, self.iteration, self.accelerator)
                if self.config.run.figures and self.iteration in (0, last):
                    self.keep_maps()

    def keep_maps(self) -> None:
        """Keep the maps of the held-out images that are kept."""
        fields = preview.held_out_maps(self.pipeline, self.config, self.held_out)
        if self.accelerator.is_main_process:
            stage: shown.Stage = "before" if self.iteration == 0 else "after"
            shown.write_maps(self.config.run.out, stage, shown.Maps(self.iteration, fields))

    def progress(self, metrics: dict[str, float]) -> dict[str, str]:
        """What the progress bar says beside the iterations."""
        shown = {"reward": f"{metrics['reward']:.3f}"}
        if "ratio_max" in metrics:
            shown["ratio"] = f"{metrics['ratio_max']:.4f}"
        if self.held_out_score is not None:
            shown["held out"] = f"{self.held_out_score:.3f}"
        return shown

    def save(self) -> None:
        """Write everything that the next iteration depends on; its noise and prompts follow from seed and iteration."""
        run = self.config.run
        state = {"iteration": self.iteration, "random": gather_object([checkpoint.random_state()])}
        state |= self.policy.state_dict()
        seconds = self.seconds()
        on_main(
            self.accelerator, lambda: checkpoint.save(run.out, self.iteration, state, run.keep_checkpoints, seconds)
        )
        self.saved = self.iteration

    def seconds(self) -> float:
        """Of the run so far, with what it took before it was resumed."""
        return self.seconds_before + time.perf_counter() - self.begin

    def resume(self) -> None:
        """Go on from the run's last checkpoint, or from its beginning if it was stopped before the first one."""
        run = self.config.run
        found = checkpoint.checkpoints(run.out)
        if found:
            self.held_out.check_resumed()
            compare_with_saved(self.config)
            state = checkpoint.load(found[-1])
            try:
                if not self.policy.fits(state):
                    raise checkpoint.CheckpointError(f"checkpoint: {found[-1]} is of another model or adapter")
                self.policy.load_state_dict(state)
                if self.accelerator.process_index < len(state["random"]):
                    checkpoint.set_random_state(state["random"][self.accelerator.process_index])
                self.iteration = self.saved = int(state["iteration"])
            except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
                raise checkpoint.CheckpointError(
                    f"checkpoint: {found[-1]} holds no state of a run ({type(error).__name__}: {one_line(error)}); "
                    f"{checkpoint.EARLIER}"
                ) from error
            if self.iteration > self.config.optimization.iterations:
                raise ConfigError(
                    f"optimization.iterations: got {self.config.optimization.iterations}, the run has had "
                    f"{self.iteration}; set at least as many"
                )
            self.seconds_before = checkpoint.elapsed(found[-1])
        on_main(self.accelerator, lambda: save_config(self.config))


def train(config: Config, command: Sequence[str] = ()) -> dict:
    """Run a configuration to its end. Returns (and writes to summary.json) what it reached; after a signal to
    end it returns early, with the signal's name as `stopped` and a checkpoint to continue from. command: what was typed
    for it, if anything; the run keeps it."""
    trainer = None
    try:
        with Termination() as termination, held_folder(config):
            trainer = Trainer(config)
            if command and trainer.accelerator.is_main_process:
                commands.note(config.run.out, command, trainer.iteration, trainer.accelerator.num_processes)
            return run(trainer, termination)
    except RuntimeError as error:
        if trainer is None or trainer.accelerator.num_processes == 1 or not is_lost_process(error):
            raise
        raise LostProcess(
            f"accelerate: another process of the run was lost ({one_line(error)}); "
            "--resume continues from the last checkpoint"
        ) from error


def run(trainer: Trainer, termination: Termination) -> dict:
    """Iterate, score and save until the end, then export and show what was reached."""
    config, accelerator = trainer.config, trainer.accelerator
    main, out, total = accelerator.is_main_process, config.run.out, config.optimization.iterations
    tracker = Tracker(config, trainer.iteration) if main else None
    if trainer.iteration == 0:
        trainer.score()
    with tqdm(total=total, initial=trainer.iteration, desc="training", dynamic_ncols=True, disable=not main) as bar:
        while trainer.iteration < total:
            if termination.agreed(accelerator):
                if trainer.saved != trainer.iteration:  # to replace a checkpoint by itself could lose it
                    trainer.save()
                if tracker is not None:
                    tracker.close()
                return {"iterations": trainer.iteration, "stopped": termination.received or "another process"}
            metrics = trainer.step()
            if tracker is not None:
                tracker.log(trainer.iteration - 1, metrics)
            # Before the checkpoint: a run that is killed in between repeats it, and none is left out.
            trainer.score()
            if trainer.iteration % config.run.save_every == 0 or trainer.iteration == total:
                trainer.save()
            if main and trainer.preview is not None:
                preview.draw_rollout(trainer.preview, out / "grids" / f"{trainer.iteration:06d}.png")
            trainer.preview = None
            bar.update()
            bar.set_postfix(trainer.progress(metrics))
    if tracker is not None:
        tracker.close()
    trainer.worker.close()
    trainer.judge.close()
    prompts = trainer.held_out.prompts or draw_prompts(trainer.task, config, 0)
    with trainer.policy.averaged(), trainer.encode.on_device():
        checkpoint.export(trainer.pipeline, out, main)
        if config.run.figures:
            preview.draw_run(trainer.pipeline, config, prompts, write=main)
    summary = {"iterations": trainer.iteration, "held_out": evaluations.compare_run(out, trainer.iteration)}
    summary["seconds"] = round(trainer.seconds(), 1)
    if main:
        files.replace_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
        scale, length = config.sampling.guidance_scale, config.model.max_sequence_length
        call = family_of(trainer.pipeline).settings(trainer.pipeline, scale, length, 1)
        card.write(out / ("lora" if config.model.lora_rank else "model"), config, summary, prompts[0].text, call)
    return summary
