"""Trainers whose iterations are compared: the embedded world's, and one of SD3.5-medium's width."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from eager_loop import EagerLoop
from medium import medium_transformer
from memory import in_a_process
from runner import Counted, Sides
from star import config as configuration
from star.config import EMBEDDED
from star.presets import preset
from star.shapes.model import load_pipeline
from star.train import Trainer


def shapes_trainer(out, strategy: str = "attention") -> Trainer:
    """The embedded world at the demo's settings."""
    return Trainer(
        configuration.update(
            preset("shapes"),
            {
                "scoring": {"count": 0},
                "run": {"out": str(out), "figures": False},
                "allocation": {"strategy": strategy},
            },
        )
    )


def medium_pipeline(blocks: int) -> StableDiffusion3Pipeline:
    """Blocks of SD3.5-medium's width in a whole pipeline: 77 + 128 text tokens from three small encoders."""
    torch.manual_seed(0)
    words = load_pipeline().tokenizer
    words.model_max_length = 77
    clip = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=len(words),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=77,
                projection_dim=width,
                bos_token_id=words.bos_token_id,
                eos_token_id=words.eos_token_id,
            )
        )
        for width in (768, 1280)
    ]
    t5 = T5EncoderModel(T5Config(vocab_size=len(words), d_model=4096, d_kv=16, d_ff=64, num_layers=1, num_heads=2))
    transformer = medium_transformer(blocks)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=1.5305,
        shift_factor=0.0609,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return StableDiffusion3Pipeline(transformer, scheduler, vae, clip[0], words, clip[1], words, t5, words)


def brightness(images, prompts, metadata):
    """A reward that any model can get."""
    return images.mean((1, 2, 3))


def medium_trainer(
    out, strategy: str = "attention", blocks: int = 2, images: int = 2, dtype: str = "float32"
) -> Trainer:
    """A whole iteration at 512 px: half of its steps are captured and none is guided, the worst case for allocation."""
    # Drawing the weights of a whole model takes a CPU long.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = medium_pipeline(blocks)
    pipeline.to(getattr(torch, dtype)).save_pretrained(out / "model")
    config = configuration.update(
        configuration.Config(),
        {
            "task": EMBEDDED,  # for its prompts
            "model": {"path": str(out / "model"), "gradient_checkpointing": True, "frozen_dtype": dtype},
            "sampling": {
                "steps": 2,
                "trained_steps": [0],
                "guidance_scale": 1.0,
                "prompts_per_iteration": 1,
                "images_per_prompt": images,
            },
            "allocation": {"strategy": strategy},
            "optimization": {
                "updates_per_iteration": 1,
                "mixed_precision": {"float32": "no", "bfloat16": "bfloat16"}[dtype],
            },
            "run": {"out": str(out / "run"), "reward": "iterations:brightness", "figures": False},
        },
    )
    return Trainer(config)


def arms(trainer: Trainer):
    """(scalar, STAR): an iteration each of the same trainer, from the iteration that comes next."""

    def step(strategy):
        allocation = dataclasses.replace(trainer.config.allocation, strategy=strategy)
        trainer.config = trainer.objective.config = dataclasses.replace(trainer.config, allocation=allocation)
        return trainer.step()

    return (lambda: step("uniform")), (lambda: step("attention"))


def only_one_allocates(star: dict[str, float], scalar: dict[str, float]) -> None:
    """Of the metrics of both."""
    assert "weights_max" not in scalar and star["weights_max"] > 1


def overhead(make: Callable[[Path], Trainer]) -> Sides:
    """An iteration of STAR against a scalar one."""
    with tempfile.TemporaryDirectory() as out:
        scalar, star = arms(make(Path(out)))

    def equal(star, scalar):
        assert star["ratio_first"] == scalar["ratio_first"] == 1.0  # the policy has its bits with capture too
        only_one_allocates(star, scalar)

    return Sides(star, scalar, equal, "one iteration, against the same without allocation")


def memory() -> Counted:
    with tempfile.TemporaryDirectory() as out:
        scalar, star = (
            in_a_process("iterations", "iteration_peak", f"{out}/{strategy}", strategy)[0]
            for strategy in ("uniform", "attention")
        )
    return Counted(star, scalar, f"above what the trainer holds; a scalar iteration peaks {scalar >> 20} MiB above it")


def iteration_peak(peak: Callable, out: str, strategy: str) -> tuple[int]:
    trainer = medium_trainer(Path(out), strategy)
    trainer.step()  # the optimizer's state is made in the first
    return (peak(trainer.step),)


def against_eager_loop() -> Sides:
    """Our iteration with allocation against a scalar one in Flow-GRPO's manner."""
    with tempfile.TemporaryDirectory() as out:
        ours, eager = (shapes_trainer(f"{out}/{name}", "uniform") for name in ("ours", "eager"))
    loop, latents, plain = EagerLoop(eager), [], ours.rollout

    def rollout(*args, **options):
        found = plain(*args, **options)
        latents.append(found.latents)
        return found

    ours.rollout = rollout
    metrics, (expected, rewards, norm) = ours.step(), loop.step()  # the same task, before ours allocates
    ours.rollout = plain
    torch.testing.assert_close(latents[0], expected, rtol=1e-3, atol=1e-3)
    assert abs(metrics["reward"] - rewards.mean().item()) < 1e-3
    assert abs(metrics["grad_norm"] / norm - 1) < 1e-2
    _, star = arms(ours)
    return Sides(star, loop.step, lambda *_: None, "one iteration with allocation against a scalar one")
