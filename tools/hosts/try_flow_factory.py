"""Flow-Factory's own training on the CPU, without and with its adapter: `try_flow_factory.py CHECKOUT [CASE ...]`.

`load_trainer(config)` and the trainer's `start()` run as they are, GRPO or GRPO-Guard by the case, with a tiny SD3.5
pipeline; a list of batches stands for the data set. Stubs stand for libraries of video, sound and tracking.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trial import ROOT, Finished, Trace, exact, main, stub, stub_missing

PROMPTS = ["a red bench left of two green cats", "a dog under a blue umbrella"]
UPDATES = 4
MISSING = [
    *("imageio", "wandb", "swanlab", "av", "decord", "bitsandbytes", "torchaudio", "torchvision", "datasets", "einops"),
    *("deepspeed", "openai", "httpx", "ftfy", "soundfile", "librosa"),
]
CONFIG = """
mixed_precision: "no"
data: {{dataset_dir: "{folder}", sampler_type: distributed_k_repeat}}
model: {{finetune_type: full, target_components: transformer, target_modules: all, model_name_or_path: tiny,
        model_type: {model}, master_weight_dtype: fp32}}
log: {{run_name: run, project: star, logging_backend: none, save_dir: "{folder}", save_freq: 0}}
train: {{trainer_type: {trainer}, clip_range: 1.0e-4, adv_clip_range: 5.0, kl_beta: {kl}, kl_type: x-based,
        ref_param_device: cpu, resolution: 64, num_inference_steps: 5, guidance_scale: 4.5, per_device_batch_size: 2,
        group_size: 2, unique_sample_num_per_epoch: 2, gradient_step_per_epoch: 2, learning_rate: 1.0e-4,
        ema_decay: 0, ema_device: cpu, seed: 42, max_grad_norm: 1.0, latent_storage_dtype: fp32}}
scheduler: {{dynamics_type: Flow-SDE, noise_level: 0.7, num_sde_steps: 2, sde_steps: [1, 2, 3], seed: 42}}
eval: {{resolution: 64, per_device_batch_size: 1, num_inference_steps: 2, eval_freq: 0}}
rewards: [{{name: brightness, reward_model: brightness.Brightness, weight: 1.0, batch_size: 2, device: cpu,
           dtype: float32}}]
"""


def run(checkout: Path, case: str, trace: Trace) -> None:
    """Until UPDATES updates are logged."""
    import diffusers
    import tiny
    import torch

    sys.path.insert(0, str(checkout / "src"))
    pipeline = tiny.sd35(PROMPTS)  # before the stubs: diffusers asks what is there when it is imported
    stub_missing(MISSING)
    diffusers.StableDiffusion3Pipeline.from_pretrained = staticmethod(lambda *_, **__: pipeline)
    from flow_factory.hparams import Arguments
    from flow_factory.rewards.abc import PointwiseRewardModel, RewardModelOutput
    from flow_factory.trainers import abc, load_trainer

    class Brightness(PointwiseRewardModel):
        """A reward that tells images apart."""

        def __call__(self, prompt: list[str], image: Any = None, **_: Any) -> Any:
            means = [sum(one.convert("L").tobytes()) / one.width / one.height for one in image]
            return RewardModelOutput(rewards=torch.tensor(means), extra_info={})

    stub("brightness", Brightness=Brightness)

    def batches(config: Any, accelerator: Any, preprocess_func: Any, **_: Any) -> tuple[list, None]:
        encode = preprocess_func.__self__.encode_prompt
        return [
            {"prompt": [prompt] * 2, "negative_prompt": [""] * 2, **encode([prompt] * 2, [""] * 2, 4.5)}
            for prompt in PROMPTS
        ], None

    abc.get_dataloader = batches

    def log(data: dict, step: int) -> None:
        trace.lines.append(json.dumps([step, exact(data)]))
        if len(trace.gradients) >= UPDATES:
            raise Finished

    patched = (checkout / "star_adapter.py").exists()
    model, guard = ("star_adapter.StarAdapter" if patched else "sd3-5"), case == "grpo-guard"
    path = checkout / "config.yaml"
    path.write_text(CONFIG.format(folder=checkout, model=model, trainer=case, kl=0.0 if guard else 0.01))
    with torch.no_grad():
        trainer = load_trainer(Arguments.load_from_yaml(str(path)))
    trainer.logger = SimpleNamespace(log_data=log)
    trainer.start()


if __name__ == "__main__":
    adapter = ROOT / "examples" / "flow_factory" / "star_adapter.py"
    main(run, ["src"], {"grpo": adapter, "grpo-guard": adapter}, __doc__)
