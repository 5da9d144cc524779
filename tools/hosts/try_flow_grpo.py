"""Flow-GRPO's own training scripts on the CPU, without and with their diffs: `try_flow_grpo.py CHECKOUT [CASE ...]`.

A case is a script, scripts/train_CASE.py. It runs as it is, with a tiny pipeline of the right class; stubs stand for
wandb, the configuration's library, the command line and the reward models.
"""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trial import ROOT, Finished, Trace, exact, main, stub

PROMPTS = ["a red bench left of two green cats", "a dog under a blue umbrella", "a yellow cup on a table", "two birds"]
CASES = "sd3 sd3_fast sd3_GRPO_Guard flux flux_fast flux_kontext qwenimage qwenimage_edit".split()
DIFFS = {case: ROOT / "examples" / "flow_grpo" / f"{case}.diff" for case in CASES}
UPDATES = 4


class Settings(dict):
    """ml_collections.ConfigDict, as far as the host's configuration uses it."""

    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__

    def to_dict(self) -> dict:
        return self


def settings(case: str, folder: Path) -> Settings:
    """The host's default configuration, with the fewest images."""
    from config.base import get_config

    config = get_config()
    config.update(mixed_precision="no", resolution=64, dataset=str(folder), save_dir=str(folder), logdir=str(folder))
    config.update(prompt_fn="general_ocr", reward_fn={"jpeg_compressibility": 1}, run_project="", rationorm=True)
    config.update(allow_tf32=False)
    config.sample.update(num_steps=5, eval_num_steps=2, train_batch_size=4, num_image_per_prompt=2, sde_type="sde")
    config.sample.update(test_batch_size=2, num_batches_per_epoch=2, sde_window_size=2, sde_window_range=(1, 4))
    beta = 0 if case.startswith("qwenimage") else 0.04  # these scripts load the reference model by name
    config.train.update(batch_size=4, gradient_accumulation_steps=1, beta=beta, clip_range=1e-3, learning_rate=1e-3)
    return config


def write_prompts(folder: Path) -> None:
    """Prompts for training and evaluation in each of the host's formats, and an image to edit for each."""
    from PIL import Image

    for number in range(len(PROMPTS)):
        Image.linear_gradient("L").resize((64, 64)).rotate(90 * number).convert("RGB").save(folder / f"{number}.png")
    for split in ("train", "test"):
        (folder / f"{split}.txt").write_text("\n".join(PROMPTS))
        rows = [json.dumps({"prompt": prompt, "image": f"{i}.png"}) for i, prompt in enumerate(PROMPTS)]
        (folder / f"{split}_metadata.jsonl").write_text("\n".join(rows))


def pipeline_of(case: str) -> Any:
    """A tiny pipeline of the class that the script loads."""
    import tiny

    if case.startswith("sd3"):
        return tiny.sd35(PROMPTS)
    if case.startswith("qwenimage"):
        return tiny.qwen_image(PROMPTS, edits=case == "qwenimage_edit")
    return tiny.flux(PROMPTS, kontext=case == "flux_kontext")


def brightness(images: Any, prompts: Any, metadata: Any, *_: Any, **__: Any) -> tuple[dict, dict]:
    """A reward that tells images apart."""
    scores = images.float().mean((1, 2, 3)).tolist()
    return {"brightness": scores, "avg": scores}, {}


def run(checkout: Path, case: str, trace: Trace) -> None:
    """The script until UPDATES updates are logged."""
    import accelerate
    import diffusers
    import torch
    import torch.distributed as dist
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit

    def log(line: dict, step: int | None = None) -> None:
        trace.lines.append(json.dumps([step, exact(line)]))
        if len(trace.gradients) >= UPDATES and "policy_loss" in line:
            raise Finished

    folder = checkout / "data"
    folder.mkdir()
    write_prompts(folder)
    stub("wandb", init=lambda **_: None, log=log, Image=lambda path, caption: caption)
    stub("ml_collections", ConfigDict=Settings)
    stub("ml_collections.config_flags", DEFINE_config_file=lambda *_: None)
    stub("absl", app=SimpleNamespace(run=lambda main: main([])), flags=SimpleNamespace(FLAGS=SimpleNamespace()))
    stub("absl.app", run=lambda main: main([]))
    sys.modules["absl.flags"] = stub("absl.flags", FLAGS=SimpleNamespace(config=settings(case, folder)))
    sys.modules["absl"].flags = sys.modules["absl.flags"]
    import flow_grpo

    flow_grpo.prompts = stub("flow_grpo.prompts")
    flow_grpo.rewards = stub("flow_grpo.rewards", multi_score=lambda *_: brightness)

    pipeline = pipeline_of(case)
    for name in (
        "StableDiffusion3Pipeline",
        "FluxPipeline",
        "FluxKontextPipeline",
        "DiffusionPipeline",
        "QwenImageEditPipeline",
    ):
        getattr(diffusers, name).from_pretrained = staticmethod(lambda *_, **__: pipeline)

    decode = type(pipeline.tokenizer).batch_decode
    # Kontext's script decodes ids that it made floats; today's tokenizers refuse them.
    as_integers = lambda rows: torch.as_tensor(rows).long().tolist()
    type(pipeline.tokenizer).batch_decode = lambda self, ids, **options: decode(self, as_integers(ids), **options)

    class Wrapped(torch.nn.Module):
        """What the scripts take DistributedDataParallel for: the model inside is `module`."""

        def __init__(self, module: torch.nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return self.module(*args, **kwargs)

    prepare = accelerate.Accelerator.prepare

    def wrap(self: Any, model: Any, *others: Any) -> tuple:
        return (Wrapped(model), *prepare(self, *others))

    accelerate.Accelerator.prepare = wrap
    accelerate.Accelerator.unwrap_model = lambda self, model: model.module
    # GRPO-Guard's script logs through accelerate.
    accelerate.Accelerator.init_trackers = lambda *_, **__: None
    accelerate.Accelerator.log = lambda self, line, step=None: log(line, step)
    if case.startswith("qwenimage"):  # one process without FSDP, which needs GPUs
        import flow_grpo.fsdp_utils

        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        flow_grpo.fsdp_utils.fsdp_wrapper = lambda model, *_: model
        flow_grpo.fsdp_utils.save_fsdp_checkpoint = lambda *_: None
        # The scripts read images of 1024 x 1024 whatever they make.
        pipeline_qwenimage_edit.calculate_dimensions = lambda area, ratio: (64, 64, None)
    runpy.run_path(str(checkout / "scripts" / f"train_{case}.py"), run_name="__main__")


if __name__ == "__main__":
    main(run, ["config", "flow_grpo", "scripts"], DIFFS, __doc__)
