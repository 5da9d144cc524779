"""Ready configurations: the embedded world on two CPU cores, and SD3.5 Medium, FLUX.1 dev and Qwen-Image with
Flow-GRPO's published settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from star.config import EMBEDDED, Allocation, Config, ConfigError, Loss, Model, Optimization, Run, Sampling, Scoring


def shapes() -> Config:
    """The embedded world on two CPU cores, with Flow-GRPO.

    One stochastic step, early and with much noise: of what was tried it moves the reward most, and up to it one pass
    per prompt serves the whole group, in the update too. At this size adapters lose what lies outside their rank: they
    have the rank of the model's width, on every matrix of the blocks, and learn as full fine-tuning does. The moving
    average takes out most of the noise of the single updates.
    """
    stream = ("to_q", "to_k", "to_v", "to_out.0")
    return Config(
        task=EMBEDDED,
        model=Model(
            max_sequence_length=0,
            height=36,
            width=36,
            lora_rank=128,
            lora_alpha=1024,
            lora_targets=(
                *(f"{attention}.{matrix}" for attention in ("attn", "attn2") for matrix in stream),
                "attn.add_q_proj",
                "attn.add_k_proj",
                "attn.add_v_proj",
                "attn.to_add_out",
                *(f"{part}.net.{matrix}" for part in ("ff", "ff_context") for matrix in ("0.proj", "2")),
                "norm1.linear",
                "norm1_context.linear",
                "proj_out",
            ),
        ),
        sampling=Sampling(
            steps=4,
            guidance_scale=1.0,
            noise_level=1.2,
            trained_steps=(1,),
            shared_noise=True,
            prompts_per_iteration=16,
            images_per_prompt=6,
            layers=(2, 3),
            merge_adapter=True,
        ),
        loss=Loss(clip_range=2e-3, global_std=True),
        optimization=Optimization(iterations=240, learning_rate=7e-5, ema_decay=0.98, ema_every=1),
        scoring=Scoring(count=512),
        run=Run(out=Path("runs/shapes"), grid_every=60),
    )


def shapes_nft() -> Config:
    """The embedded world with DiffusionNFT, three quarters of the advantage for each location: `make demo`.

    All weights are trained, at the noise of the two early steps, where a prompt's objects are placed; the verifier
    knows what each location earned. In longer runs and at later noise levels the velocity's error grows, and the score
    falls again.
    """
    grpo = shapes()
    return dataclasses.replace(
        grpo,
        model=dataclasses.replace(grpo.model, lora_rank=0),
        sampling=dataclasses.replace(
            grpo.sampling,
            trained_steps=(0, 1),
            shared_noise=False,
            prompts_per_iteration=32,
            images_per_prompt=12,
            merge_adapter=False,
        ),
        allocation=Allocation(strategy="uniform"),
        loss=Loss(objective="nft", noise_levels=2, advantage="location", location_share=0.75, global_std=True),
        optimization=dataclasses.replace(
            grpo.optimization, iterations=40, learning_rate=1.5e-4, schedule="cosine", warmup=16, ema_decay=0.95
        ),
        scoring=dataclasses.replace(grpo.scoring, every=8),
        run=dataclasses.replace(grpo.run, out=Path("runs/shapes-nft"), grid_every=8),
    )


def sd35m_nft(task: str) -> Config:
    """Stable Diffusion 3.5 Medium with DiffusionNFT's published settings and STAR's allocation (the defaults).

    Sources: DiffusionNFT config/base.py and config/nft.py, `sd3_geneval`, `sd3_ocr` and `sd3_pickscore`; the decay of
    the average from scripts/train_nft_sd3.py. Its sampler is a second-order one, ours Euler's.
    """
    published = sd35m(task)
    ocr = task == "ocr"
    return dataclasses.replace(
        published,
        sampling=dataclasses.replace(published.sampling, guidance_scale=1.0, trained_steps=tuple(range(10))),
        loss=Loss(
            objective="nft",
            noise_levels=9,  # timestep_fraction 0.99 of 10
            beta=0.1 if ocr else 1.0,
            # decay_type 2 and 1.
            old_decay=0.999 if ocr else 0.5,
            old_decay_rate=0.0075 if ocr else 0.001,
            old_decay_start=75 if ocr else 0,
            kl_coef=1e-4,
            global_std=True,
        ),
        optimization=dataclasses.replace(
            published.optimization, updates_per_iteration=2 if ocr else 1, iterations=1000, ema_every=1
        ),
        scoring=dataclasses.replace(published.scoring, every=10, guidance_scale=1.0),
        run=dataclasses.replace(published.run, out=Path(f"runs/{task}-sd35m-nft"), save_every=30, grid_every=0),
    )


def sd35m_awm(task: str) -> Config:
    """Stable Diffusion 3.5 Medium with Advantage Weighted Matching's published settings and STAR's allocation (the
    defaults).

    Sources: advantage_weighted_matching config/dgx_awm.py, `geneval_sd3_no_cfg_1node`, `ocr_sd3_no_cfg_1node` and
    `pickscore_sd3_no_cfg_1node`, and scripts/train_sd3_awm.py. Its sampler is SA-Solver, ours Euler's.
    """
    published = sd35m(task)
    kl_coef = {"geneval": 1e-3, "ocr": 3e-3, "pickscore": 1e-4}
    every = 20 if task == "ocr" else 50
    return dataclasses.replace(
        published,
        sampling=dataclasses.replace(
            published.sampling,
            steps=14,
            guidance_scale=1.0,
            # timestep_fraction 0.9; time_type "discrete_wo_init", PickScore's "discrete".
            trained_steps=tuple(range(0 if task == "pickscore" else 1, 12)),
            # train_batch_size * gpu_numbers * num_batches_per_epoch images.
            prompts_per_iteration=24 if task == "pickscore" else 72,
        ),
        loss=Loss(
            objective="awm",
            noise_levels=6,
            clip_range=1.0,
            kl_coef=kl_coef[task],
            # weighting "ghuber", ghuber_power, ema_beta, kl_ema_decay; "linear" is the rate.
            sigma_power=1.0,
            error_power=0.25,
            old_kl_coef=1.0,
            old_decay=0.3,
            old_decay_rate=0.001,
            global_std=True,
        ),
        optimization=dataclasses.replace(published.optimization, updates_per_iteration=1, ema_decay=0.99, ema_every=1),
        scoring=dataclasses.replace(published.scoring, every=every, guidance_scale=1.0),
        run=dataclasses.replace(published.run, out=Path(f"runs/{task}-sd35m-awm"), save_every=every, grid_every=0),
    )


def sd35m(task: str, fast: bool = False) -> Config:
    """Stable Diffusion 3.5 Medium with Flow-GRPO's published settings and STAR's allocation (the defaults).

    Sources: flow_grpo config/base.py and config/grpo.py, `geneval_sd3`, `general_ocr_sd3` and `pickscore_sd3`; LoRA and
    the 128 tokens of T5 from scripts/train_sd3.py. fast: `geneval_sd3_fast_nocfg` and `pickscore_sd3_fast_nocfg`; there
    is no such configuration for OCR, so it takes GenEval's.
    """
    kind = "metadata.jsonl" if task == "geneval" else "txt"
    files = {split: f"dataset/{task}/{split}{'_' if task == 'geneval' else '.'}{kind}" for split in ("train", "test")}
    published = Config(
        # Flow-GRPO keeps the frozen transformer in float32; its products are in float16 there too.
        model=Model(path="stabilityai/stable-diffusion-3.5-medium", frozen_dtype="float16"),
        sampling=Sampling(
            prompts=files["train"],
            text_cache=1024,  # 205 x 4096 numbers each: 1.7 GB in half precision
        ),
        loss=Loss(kl_coef=0.01 if task == "pickscore" else 0.04, global_std=True),
        optimization=Optimization(
            # Flow-GRPO sets 100000 and is stopped by hand.
            iterations=5000,
            # train_batch_size; 48 x 24 images in 2 updates: up to 64 processes with whole micro batches.
            micro_batch=9,
            mixed_precision="float16",
            ema_decay=0.9,  # both in scripts/train_sd3.py
            ema_every=8,
        ),
        # eval_freq, eval_num_steps and test_batch_size. Off until --scoring.count says of how many prompts; the whole
        # test sets have 2212 (GenEval), 1018 (OCR) and 2048 (PickScore).
        scoring=Scoring(prompts=files["test"], every=60, steps=40, batch=16),
        run=Run(out=Path(f"runs/{task}-sd35m"), seed=42, reward=task, save_every=60, grid_every=60),
    )
    if not fast:
        return published
    prompts, images = (64, 18) if task == "pickscore" else (48, 24)
    return dataclasses.replace(
        published,
        sampling=dataclasses.replace(
            published.sampling,
            guidance_scale=1.0,
            sampler="cps",
            noise_level=0.8,
            # sde_window_size 3 in sde_window_range (0, 5).
            trained_steps=(0, 1, 2, 3, 4),
            window=3,
            prompts_per_iteration=prompts,
            images_per_prompt=images,
        ),
        loss=dataclasses.replace(published.loss, clip_range=1e-5, kl_coef=0.0),
        run=dataclasses.replace(published.run, out=Path(f"runs/{task}-sd35m-fast")),
    )


_ATTENTION = Model().lora_targets


def flux1_dev(fast: bool = False) -> Config:
    """FLUX.1 dev with Flow-GRPO's published settings and STAR's allocation (the defaults).

    Sources: flow_grpo config/grpo.py, `pickscore_flux`; adapters, the 128 tokens of T5 and the average from
    scripts/train_flux.py. fast: `pickscore_flux_fast`.
    """
    published = Config(
        model=Model(
            path="black-forest-labs/FLUX.1-dev",
            frozen_dtype="bfloat16",
            lora_rank=64,
            lora_alpha=128,
            lora_targets=(
                *_ATTENTION,
                *(f"{part}.net.{matrix}" for part in ("ff", "ff_context") for matrix in ("0.proj", "2")),
            ),
        ),
        sampling=Sampling(
            prompts="dataset/pickscore/train.txt",
            steps=6,
            guidance_scale=3.5,
            noise_level=0.9,
            trained_steps=(0, 1, 2, 3, 4),  # timestep_fraction 0.99 of 6
            text_cache=1024,  # 128 x 4096 numbers each: 1.1 GB in half precision
        ),
        loss=Loss(global_std=True),
        optimization=Optimization(
            iterations=5000, micro_batch=3, mixed_precision="bfloat16", ema_decay=0.9, ema_every=8
        ),
        scoring=Scoring(prompts="dataset/pickscore/test.txt", every=30, steps=28, batch=16),
        run=Run(out=Path("runs/pickscore-flux1-dev"), seed=42, reward="pickscore", save_every=30, grid_every=30),
    )
    if not fast:
        return published
    return dataclasses.replace(
        published,
        # sde_window_size 3 in sde_window_range (0, 3): one window.
        sampling=dataclasses.replace(published.sampling, sampler="cps", noise_level=0.8, trained_steps=(0, 1, 2)),
        loss=Loss(clip_range=1e-5),
        run=dataclasses.replace(published.run, out=Path("runs/pickscore-flux1-dev-fast")),
    )


def qwen_image() -> Config:
    """Qwen-Image with Flow-GRPO's published settings and STAR's allocation (the defaults).

    Sources: flow_grpo config/grpo.py, `pickscore_qwenimage`; adapters from scripts/train_qwenimage.py, the 512 tokens
    from its pipeline.
    """
    return Config(
        model=Model(
            path="Qwen/Qwen-Image",
            max_sequence_length=512,
            frozen_dtype="bfloat16",
            lora_rank=64,
            lora_alpha=128,
            lora_targets=(
                *_ATTENTION,
                *(f"{part}.net.{matrix}" for part in ("img_mlp", "txt_mlp") for matrix in ("0.proj", "2")),
            ),
            gradient_checkpointing=True,
        ),
        sampling=Sampling(
            prompts="dataset/pickscore/train.txt",
            guidance_scale=4.0,
            noise_level=1.2,
            # sde_window_size 2 in sde_window_range (0, 5).
            trained_steps=(0, 1, 2, 3, 4),
            window=2,
            prompts_per_iteration=32,
            images_per_prompt=16,
            text_cache=1024,
        ),
        loss=Loss(global_std=True),
        optimization=Optimization(iterations=5000, micro_batch=4, mixed_precision="bfloat16"),
        scoring=Scoring(prompts="dataset/pickscore/test.txt", every=30, steps=50, batch=4),
        run=Run(out=Path("runs/pickscore-qwen-image"), seed=42, reward="pickscore", save_every=30, grid_every=30),
    )


PRESETS = {
    EMBEDDED: shapes,
    "shapes-nft": shapes_nft,
    "geneval-sd35m": lambda: sd35m("geneval"),
    "geneval-sd35m-fast": lambda: sd35m("geneval", fast=True),
    "geneval-sd35m-nft": lambda: sd35m_nft("geneval"),
    "geneval-sd35m-awm": lambda: sd35m_awm("geneval"),
    "ocr-sd35m": lambda: sd35m("ocr"),
    "ocr-sd35m-fast": lambda: sd35m("ocr", fast=True),
    "ocr-sd35m-nft": lambda: sd35m_nft("ocr"),
    "ocr-sd35m-awm": lambda: sd35m_awm("ocr"),
    "pickscore-sd35m": lambda: sd35m("pickscore"),
    "pickscore-sd35m-fast": lambda: sd35m("pickscore", fast=True),
    "pickscore-sd35m-nft": lambda: sd35m_nft("pickscore"),
    "pickscore-sd35m-awm": lambda: sd35m_awm("pickscore"),
    "pickscore-flux1-dev": flux1_dev,
    "pickscore-flux1-dev-fast": lambda: flux1_dev(fast=True),
    "pickscore-qwen-image": qwen_image,
}


def preset(name: str) -> Config:
    """The configuration of that name. Raises ConfigError for a name that PRESETS does not have."""
    if name not in PRESETS:
        raise ConfigError(f"preset: unknown {name!r}, expected one of {sorted(PRESETS)}")
    return PRESETS[name]()
