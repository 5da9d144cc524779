"""Trains the embedded model from nothing: `python -m star.shapes.pretrain --out runs/pretrain`.

Three stages, each skipped when its result is there already: the autoencoder, the latents of a fixed set of scenes,
the transformer with its text encoders (rectified flow). The last one saves its state every few hundred steps and
goes on from there. At the end the pipeline is written in half precision and what it reached is printed.
"""

from __future__ import annotations

import copy
import functools
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from diffusers import AutoencoderKL, StableDiffusion3Pipeline
from rich.console import Console
from tqdm import tqdm
from transformers import CLIPTextModelWithProjection, PreTrainedTokenizerFast

from star import files
from star.config import AboveZero, Count, Decay, NotNegative, Positive, Range, check_ranges
from star.reports.tables import evaluation_table
from star.rewards.worker import RewardWorker
from star.shapes import measure
from star.shapes.model import TEXT_LENGTH, load_pipeline, make_pipeline, make_vae
from star.shapes.reward import shapes_reward
from star.shapes.scenes import parse_scene, prompts, render
from star.shapes.task import TASK
from star.training.scoring import evaluate

Share = Annotated[float, Range(least=0, most=1)]


@dataclass
class Config:
    """How the embedded model is trained."""

    out: Path = Path("runs/pretrain")
    """Where states, the pipeline and the report go."""
    seed: Count = 0
    vae_steps: Positive = 1800
    vae_batch: Positive = 32
    vae_learning_rate: AboveZero = 3e-3
    kl_weight: NotNegative = 1e-4
    scenes: Positive = 100_000
    """Training scenes; all from the training split of the prompts."""
    steps: Positive = 4000
    batch: Positive = 64
    learning_rate: NotNegative = 2e-3
    """For AdamW and, matched in update size, for Muon."""
    warmup: Count = 100
    decay_share: Share = 0.3
    """The last share of the steps lowers the learning rate linearly to zero. Raising `steps` and running again
    continues from the saved state, before or in the middle of the decay."""
    drop_prompt: Share = 0.1
    """Share of empty prompts, for classifier-free guidance."""
    timestep_mean: float = 0.3
    """Mean of the logit-normal distribution of t (Esser et al. 2024); above 0 trains noisier steps more."""
    ema_decay: Decay = 0.999
    save_every: Positive = 250
    threads: Positive = 2


def draw(prompt_list: list[str], seed: int) -> torch.Tensor:
    """Images of the prompts' scenes. Returns (B, 3, S, S) float32 in -1..1."""
    images = [render(parse_scene(p), random.Random(f"{seed}/{i}"))[0] for i, p in enumerate(prompt_list)]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) * 2 - 1


def train_vae(config: Config) -> AutoencoderKL:
    path = config.out / "vae"
    if path.exists():
        return AutoencoderKL.from_pretrained(path).eval()
    torch.manual_seed(config.seed)
    vae = make_vae().to(memory_format=torch.channels_last)
    images = draw(prompts(8000, config.seed), config.seed)
    optimizer = torch.optim.AdamW(vae.parameters(), config.vae_learning_rate, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.vae_learning_rate, config.vae_steps, pct_start=0.1)
    bar = tqdm(range(config.vae_steps), desc="autoencoder")
    for _ in bar:
        x = images[torch.randint(len(images), (config.vae_batch,))].contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        error = vae.decode(posterior.sample()).sample - x
        divergence = posterior.kl().mean() / (3 * x[0, 0].numel())
        loss = error.square().mean() + 0.3 * error.abs().mean() + config.kl_weight * divergence
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(psnr=f"{-10 * math.log10(error.square().mean().item() / 4):.1f}")
    vae.eval()
    with torch.no_grad():
        latents = torch.cat([vae.encode(x).latent_dist.mean for x in images[:2000].split(100)])
    # The transformer sees latents of mean 0 and standard deviation 1.
    vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1 / latents.std().item())
    vae.to(memory_format=torch.contiguous_format).save_pretrained(path)
    return vae


@torch.no_grad()
def make_latents(
    config: Config, vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (scenes, C, H, W) float16 and token ids (scenes, TEXT_LENGTH) of the training scenes."""
    path = config.out / "latents.pt"
    if path.exists():
        return torch.load(path)
    texts = prompts(config.scenes, config.seed + 1)
    latents = []
    for i in tqdm(range(0, len(texts), 500), desc="latents"):
        images = draw(texts[i : i + 500], config.seed + 2 + i)
        codes = torch.cat([vae.encode(x).latent_dist.mean for x in images.split(50)])
        latents.append(((codes - vae.config.shift_factor) * vae.config.scaling_factor).half())
    ids = tokenize(tokenizer, texts)
    files.replace(path, lambda file: torch.save((torch.cat(latents), ids), file))
    return torch.cat(latents), ids


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    return tokenizer(texts, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids


def encode(encoders: list[CLIPTextModelWithProjection], ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What StableDiffusion3Pipeline.encode_prompt makes of two CLIP encoders: features and pooled features."""
    outputs = [encoder(ids, output_hidden_states=True) for encoder in encoders]
    return torch.cat([o.hidden_states[-2] for o in outputs], -1), torch.cat([o.text_embeds for o in outputs], -1)


def learning_rate(step: int, config: Config) -> float:
    """The learning rate of a step: it rises over `warmup` steps and falls over the last share of all."""
    falling = config.decay_share * config.steps
    decay = min(1.0, (config.steps - step) / falling) if falling else 1.0
    rise = min(1.0, (step + 1) / config.warmup) if config.warmup else 1.0
    return config.learning_rate * rise * decay


def train_transformer(config: Config, pipeline: StableDiffusion3Pipeline) -> None:
    """Rectified flow (Liu et al. 2022): velocity = noise - data at x_t = (1 - t) data + t noise."""
    latents, ids = make_latents(config, pipeline.vae, pipeline.tokenizer)
    empty = tokenize(pipeline.tokenizer, [""])
    models = torch.nn.ModuleList([pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2])
    models.train()
    parameters = [p for p in models.parameters() if p.requires_grad]
    # Muon is for the matrices inside; what meets words, pixels or time goes to AdamW.
    inner = [p for p in pipeline.transformer.transformer_blocks.parameters() if p.ndim == 2]
    outer = [p for p in parameters if not any(p is q for q in inner)]
    optimizers = [
        torch.optim.Muon(inner, config.learning_rate, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outer, config.learning_rate, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    average = copy.deepcopy(models).eval()
    state_path, step = config.out / "state.pt", 0
    generator = torch.Generator().manual_seed(config.seed)
    if state_path.exists():
        state = torch.load(state_path)
        models.load_state_dict(state["models"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        generator.set_state(state["generator"])
        step = state["step"]
    bar = tqdm(range(step, config.steps), desc="transformer", initial=step, total=config.steps, mininterval=5)
    losses: list[float] = []
    for step in bar:
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config)
        pick = torch.randint(len(latents), (config.batch,), generator=generator)
        data = latents[pick].float()
        drop = torch.rand(config.batch, 1, generator=generator) < config.drop_prompt
        embeds, pooled = encode(list(models[1:]), torch.where(drop, empty, ids[pick]))
        t = torch.sigmoid(torch.randn(config.batch, generator=generator) + config.timestep_mean)
        noise = torch.randn(data.shape, generator=generator)
        mixed = torch.lerp(data, noise, t[:, None, None, None])
        velocity = models[0](mixed, embeds, pooled, t * 1000, return_dict=False)[0]
        loss = F.mse_loss(velocity, noise - data)
        models.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        keep = min(config.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.parameters()), list(models.parameters()), 1 - keep)
        losses.append(loss.item())
        if (step + 1) % config.save_every == 0 or step + 1 == config.steps:
            bar.write(f"step {step + 1} loss {np.mean(losses[-config.save_every :]):.4f} {time.strftime('%H:%M:%S')}")
            state = dict(
                models=models.state_dict(),
                average=average.state_dict(),
                optimizers=[optimizer.state_dict() for optimizer in optimizers],
                generator=generator.get_state(),
                step=step + 1,
            )
            files.replace(state_path, functools.partial(torch.save, state))
    models.load_state_dict(average.state_dict())
    models.eval()


def report(pipeline: StableDiffusion3Pipeline) -> None:
    """Print held-out scores by category, and localization by layer and noise level."""
    with RewardWorker(shapes_reward) as worker:
        evaluation = evaluate(pipeline, TASK.prompts("held_out", 512, "0"), worker, TASK.images)
    Console().print(evaluation_table(evaluation, f"held-out prompts, {TASK.images.steps} steps, no guidance"))
    measure.print_localization(pipeline)


def main(config: Config) -> None:
    check_ranges(config, "")
    torch.set_num_threads(config.threads)
    config.out.mkdir(parents=True, exist_ok=True)
    vae = train_vae(config)
    torch.manual_seed(config.seed)
    pipeline = make_pipeline()
    pipeline.register_modules(vae=vae)
    train_transformer(config, pipeline)
    pipeline.vae.register_to_config(_name_or_path=None)  # a path of this machine
    pipeline.to(torch.float16).save_pretrained(config.out / "pipeline")
    # What ships is half precision, so that is what is measured.
    report(load_pipeline(config.out / "pipeline"))


if __name__ == "__main__":
    main(tyro.cli(Config))
