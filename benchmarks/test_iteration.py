"""The overhead of allocation in a whole GRPO iteration: rollout with maps, weights and update against scalar GRPO."""

import dataclasses

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from eager_loop import EagerLoop
from medium import medium_transformer
from pairs import alternate
from peaks import in_a_process, linux
from star import config as configuration
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
    out, strategy: str = "attention", blocks: int = 2, pictures: int = 2, dtype: str = "float32"
) -> Trainer:
    """A whole iteration at 512 px: half of its steps are captured and none is guided, the worst case for allocation."""
    # Drawing the weights of a whole model takes a CPU long.
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        pipeline = medium_pipeline(blocks)
    pipeline.to(getattr(torch, dtype)).save_pretrained(out / "model")
    config = configuration.update(
        configuration.Config(),
        {
            "model": {"path": str(out / "model"), "gradient_checkpointing": True, "frozen_dtype": dtype},
            "sampling": {
                "steps": 2,
                "trained_steps": [0],
                "guidance_scale": 1.0,
                "prompts_per_iteration": 1,
                "images_per_prompt": pictures,
            },
            "allocation": {"strategy": strategy},
            "optimization": {
                "updates_per_iteration": 1,
                "mixed_precision": {"float32": "no", "bfloat16": "bf16"}[dtype],
            },
            "run": {"out": str(out / "run"), "reward": "test_iteration:brightness", "figures": False},
        },
    )
    return Trainer(config)


def arms(trainer: Trainer):
    """(scalar, STAR): an iteration each of the same trainer, from the iteration that comes next."""

    def step(strategy):
        allocation = dataclasses.replace(trainer.config.allocation, strategy=strategy)
        trainer.config = dataclasses.replace(trainer.config, allocation=allocation)
        return trainer.step()

    return (lambda: step("uniform")), (lambda: step("attention"))


@pytest.mark.parametrize(
    ("name", "make", "rounds", "limit"),
    [("iteration_wall", medium_trainer, 15, 1.0), ("shapes_iteration_wall", shapes_trainer, 21, 3.0)],
)
def test_overhead_in_time(name, make, rounds, limit, tmp_path, benchmark, row):
    trainer = make(tmp_path)
    scalar, star = arms(trainer)
    first, second = scalar(), star()
    assert first["ratio_first"] == second["ratio_first"] == 1.0
    assert "weights_max" not in first and second["weights_max"] > 1
    pair = alternate(scalar, star, rounds=rounds)
    benchmark.pedantic(star, rounds=1)
    note = f"percent; scalar {pair.first:.2f} s, with allocation {pair.second:.2f} s an iteration"
    row(name, 100 * (pair.ratio - 1), at_most=limit, note=note)


def iteration_peak(peak, out: str, strategy: str) -> tuple[int]:
    from pathlib import Path

    trainer = medium_trainer(Path(out), strategy)
    trainer.step()  # the optimizer's state is made in the first
    return (peak(trainer.step),)


@linux
def test_overhead_in_memory(tmp_path, benchmark, row):
    peaks = []

    def measure():
        for strategy in ("uniform", "attention"):
            peaks.extend(in_a_process("test_iteration", "iteration_peak", str(tmp_path / strategy), strategy))

    benchmark.pedantic(measure, rounds=1)
    scalar, star = peaks
    note = (
        f"percent; an iteration peaks {scalar >> 20} MiB above what the trainer holds, with allocation {star >> 20} MiB"
    )
    row("iteration_memory", 100 * (star / scalar - 1), at_most=1.0, note=note)


def test_against_the_public_way(tmp_path, benchmark, row):
    """Our iteration with allocation against a scalar one in Flow-GRPO's manner."""
    ours, eager = shapes_trainer(tmp_path / "ours", "uniform"), EagerLoop(shapes_trainer(tmp_path / "eager", "uniform"))
    latents = {}
    plain = ours.rollout
    ours.rollout = lambda *args, **options: latents.setdefault("rollout", plain(*args, **options))
    metrics = ours.step()
    ours.rollout = plain
    expected, rewards, norm = eager.step()
    torch.testing.assert_close(latents["rollout"].latents, expected, rtol=1e-3, atol=1e-3)
    assert metrics["reward"] == pytest.approx(rewards.mean().item(), abs=1e-3)
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-2)
    _, star = arms(ours)
    pair = alternate(star, eager.step, rounds=11)
    benchmark.pedantic(star, rounds=1)
    note = f"times faster; an iteration {pair.first:.2f} s with allocation against {pair.second:.2f} s scalar"
    row("shapes_vs_eager_loop", pair.ratio, at_least=1.5, note=note)
