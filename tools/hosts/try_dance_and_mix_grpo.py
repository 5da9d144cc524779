"""DanceGRPO's or MixGRPO's own `train_one_step` on the CPU, without and with its diff: `CHECKOUT` of one of the two.

The function runs as it is, with a tiny FLUX, one process, bfloat16 autocast of the CPU in CUDA's place, and a reward
that is the image's brightness. Stubs stand for what the script imports and the function does not use.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

from trial import ROOT, Trace, exact, main, stub_missing

CAPTIONS = ["a red bench left of two green cats", "a dog under a blue umbrella"]
DIFFS = {host: ROOT / "examples" / f"{host}_grpo" / "star.diff" for host in ("dance", "mix")}
STEPS = 2
UNUSED = (
    *("fastvideo.utils.parallel_states", "fastvideo.utils.communications_flux", "fastvideo.utils.validation"),
    *("fastvideo.utils.dataset_utils", "fastvideo.utils.fsdp_util", "fastvideo.utils.load", "fastvideo.dataset"),
    *("fastvideo.utils.checkpoint", "fastvideo.models.reward_model.image_reward", "wandb", "einops", "cv2"),
    *("fastvideo.models.reward_model.pick_score", "fastvideo.models.reward_model.unified_reward"),
    *("fastvideo.models.reward_model.hps_score", "fastvideo.models.reward_model.clip_score"),
)


def arguments(folder: Path) -> Namespace:
    """Both hosts' command lines, with the fewest images."""
    return Namespace(
        **dict(pretrained_model_name_or_path=str(folder), output_dir=str(folder), experiment_name="run"),
        **dict(h=64, w=96, t=1, sampling_steps=6, shift=3.0, eta=0.3, init_same_noise=False),
        **dict(use_hpsv2=True, use_pickscore=False),
        **dict(use_group=True, num_generations=3, clip_range=1e-4, adv_clip_max=5.0, timestep_fraction=0.6),
        **dict(gradient_accumulation_steps=3, training_strategy="part", flow_grpo_sampling=True, kl_coeff=0.01),
        **dict(dpm_algorithm_type="null", drop_last_sample=False, multi_reward_mix="reward_aggr", trimmed_ratio=0.0),
        **dict(reward_model="hpsv2", advantage_rerange_strategy="random", frozen_init_timesteps=-1),
    )  # fmt: skip


def run(checkout: Path, case: str, trace: Trace) -> None:
    """STEPS training steps: each a rollout of two prompts and its updates."""
    import tiny
    import torch
    import torch.distributed as dist

    folder = checkout / "run"
    (folder / "part_run").mkdir(parents=True)
    (folder / "images").mkdir()
    os.chdir(folder)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    dist.all_reduce = lambda *_, **__: None  # gloo has no average; of one process it is the tensor itself
    stub_missing(UNUSED)

    class Autocast(torch.autocast):
        def __init__(self, device: str, dtype: torch.dtype = torch.bfloat16, enabled: bool = True) -> None:
            super().__init__("cpu", dtype, enabled)

    torch.autocast = torch.amp.autocast = Autocast
    pipeline = tiny.flux(CAPTIONS)
    pipeline.tokenizer_2.save_pretrained(folder / "tokenizer_2")
    transformer, vae = pipeline.transformer, pipeline.vae
    transformer.clip_grad_norm_ = lambda norm: torch.nn.utils.clip_grad_norm_(transformer.parameters(), norm)
    with torch.no_grad():
        embeds, pooled, _ = pipeline.encode_prompt(CAPTIONS, None, max_sequence_length=512)
    optimizer = torch.optim.AdamW(transformer.parameters(), 1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
    args = arguments(folder)

    def log(*values: Any) -> None:
        if "time" not in str(values[0]):
            trace.lines.append(json.dumps(exact(values)))

    host = importlib.import_module("fastvideo.train_grpo_flux")
    host.print = log
    host.main_print = lambda content: None  # how long steps took

    class HPSClipRewardModel:
        """A reward by the name of one of the host's."""

        def __call__(self, images: list, prompts: list) -> list[float]:
            return [sum(image.convert("L").tobytes()) / image.width / image.height for image in images]

    reward = HPSClipRewardModel()

    def as_features(image: torch.Tensor, text: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"image_features": image[:, :1], "text_features": text[:, :1]}

    preprocess = lambda image: torch.tensor(reward([image], [""]))
    ones = lambda texts: torch.ones(len(texts), 1)
    random.seed(0)
    for step in range(STEPS):
        loader = iter([(embeds, pooled, torch.zeros(len(CAPTIONS), 3), CAPTIONS)])
        common = (args, torch.device("cpu"), transformer, vae)
        if case == "mix":
            rest = ([reward], optimizer, schedule, loader, None, 1.0, [1, 2], step, {"HPSClipRewardModel": 1.0})
        else:
            rest = (as_features, ones, optimizer, schedule, loader, None, 1.0, preprocess, None)
        trace.lines.append(json.dumps(exact(host.train_one_step(*common, *rest))))


if __name__ == "__main__":
    mixes = len(sys.argv) > 1 and (Path(sys.argv[1]) / "fastvideo" / "utils" / "sampling_utils.py").exists()
    case = "mix" if mixes else "dance"
    main(run, ["fastvideo"], {case: DIFFS[case]}, __doc__)
