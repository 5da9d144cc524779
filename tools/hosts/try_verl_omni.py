"""verl-omni's actor update on the CPU, without and with its adapter: `try_verl_omni.py CHECKOUT [CASE ...]`.

The v1 trainer hands its batch to `PPODiffusersFSDPEngine.forward_backward_batch`. That, the host's loss of the case,
its adapter and its scheduler run as they are, in one process; the rollout is the adapter's own forward pass and the
scheduler's step, in vLLM-Omni's place. Stubs stand for verl, Ray, TensorDict and vLLM-Omni.
"""

from __future__ import annotations

import functools
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from trial import ROOT, Trace, exact, main, stub, stub_missing

PROMPTS = ["a red bench left of two green cats", "a dog under a blue umbrella"] * 2
UPDATES, STEPS = 3, 5
CASES = {  # pipeline, the adapter's package, loss
    "flow_grpo": ("StableDiffusion3Pipeline", "sd3_flow_grpo", "flow_grpo"),
    "grpo_guard": ("StableDiffusion3Pipeline", "sd3_flow_grpo", "grpo_guard"),
    "flow_dppo": ("StableDiffusion3Pipeline", "sd3_flow_grpo", "flow_dppo"),
    "qwen_image": ("QwenImagePipeline", "qwen_image_flow_grpo", "flow_grpo"),
}
PACKAGES = (
    *("", ".pipelines", ".pipelines.sd3_flow_grpo", ".pipelines.qwen_image_flow_grpo", ".models", ".models.diffusers"),
    *(
        ".trainer",
        ".trainer.diffusion",
        ".workers",
        ".workers.utils",
        ".workers.engine",
        ".workers.engine.fsdp",
        ".utils",
    ),
)
UNUSED = (
    *("verl", "tensordict", "ray", "vllm_omni", "verl_omni.workers.config", "verl_omni.utils.fsdp_utils"),
    *("verl_omni.trainer.omni", "verl_omni.workers.engine.lora_adapter_mixin"),
)


class Rows(dict):
    """A TensorDict, as far as the engine and the loss use it: tensors by name, and values that are none."""

    def to(self, device: Any) -> Rows:
        return self


class Metrics:
    """verl's Metric: metrics as they are."""

    def __new__(cls, value: Any, aggregation: Any) -> Any:
        return value.detach() if hasattr(value, "detach") else value

    @staticmethod
    def from_dict(metrics: dict, aggregation: Any) -> dict:
        return dict(metrics)


def adapter_module(package: str) -> Any:
    return importlib.import_module(f"verl_omni.pipelines.{package}.diffusers_training_adapter")


def encoded(pipeline: Any) -> Rows:
    """What a rollout keeps of the prompts: their ids, their embeddings and those of the negative one."""
    import torch

    with torch.no_grad():
        if not hasattr(pipeline, "prompt_template_encode"):
            embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, None, None)
            ids = pipeline.tokenizer(PROMPTS, padding="max_length", return_tensors="pt").input_ids
            pools = dict(pooled_prompt_embeds=pooled, negative_pooled_prompt_embeds=negative_pooled)
            return Rows(prompts=ids, prompt_embeds=embeds, negative_prompt_embeds=negative, **pools)
        # As the dataset and the agent loop make them: the chat template around each prompt.
        texts = [pipeline.prompt_template_encode.format(prompt) for prompt in PROMPTS]
        ids = pipeline.tokenizer(texts, padding="max_length", max_length=320, return_tensors="pt").input_ids
        embeds, mask = pipeline.encode_prompt(PROMPTS)
        negative, negative_mask = pipeline.encode_prompt([" "] * len(PROMPTS))
    masks = dict(prompt_embeds_mask=mask, negative_prompt_embeds_mask=negative_mask)
    return Rows(prompts=ids, prompt_embeds=embeds, negative_prompt_embeds=negative, **masks)


def run(checkout: Path, case: str, trace: Trace) -> None:
    """UPDATES updates on one rollout."""
    import tiny
    import torch

    for name in PACKAGES:  # without running what they import for other models, and for vLLM
        stub(f"verl_omni{name}").__path__ = [str(checkout / f"verl_omni{name}".replace(".", "/"))]
    stub_missing(UNUSED)
    importlib.import_module("verl.utils").tensordict_utils = stub(
        "verl.utils.tensordict_utils",
        get_tensordict=Rows,
        assign_non_tensor=lambda rows, **values: rows.update(values),
        get_non_tensor_data=lambda data, key, default: data.get(key, default),
    )
    stub("tensordict", TensorDict=Rows)
    stub("verl.utils.device", get_device_id=lambda: "cpu", get_device_name=lambda: "cpu")
    stub("verl.utils.metric", Metric=Metrics, AggregationType=SimpleNamespace(MEAN=None))
    stub("verl.utils.import_utils", import_external_libs=importlib.import_module)
    halves = lambda data, **_: (
        [Rows({k: v[rows] if hasattr(v, "shape") else v for k, v in data.items()}) for rows in (slice(2), slice(2, 4))],
        None,
    )
    stub("verl.workers.engine.utils", enable_full_determinism=None, prepare_micro_batches=halves)
    engines = importlib.import_module("verl_omni.workers.engine.fsdp.diffusers_impl")
    base = importlib.import_module("verl_omni.pipelines.model_base").DiffusionModelBase
    kind, package, loss = CASES[case]
    adapter_module(package)
    schedulers = importlib.import_module("verl_omni.pipelines.schedulers.flow_match_sde")
    losses = importlib.import_module("verl_omni.workers.utils.losses")

    qwen = kind == "QwenImagePipeline"
    pipeline = tiny.qwen_image(PROMPTS) if qwen else tiny.sd35(PROMPTS)
    transformer, rows = pipeline.transformer, len(PROMPTS)
    scheduler = schedulers.FlowMatchSDEDiscreteScheduler.from_config(pipeline.scheduler.config)
    scheduler.set_timesteps(STEPS, **({"mu": 0.8} if qwen else {}))
    sys.path.insert(0, str(checkout))
    config = SimpleNamespace(
        architecture=kind,
        algorithm="flow_grpo",
        external_lib=next((path.stem for path in checkout.glob("verl_star*.py")), None),
        tokenizer=pipeline.tokenizer,
        pipeline=SimpleNamespace(guidance_scale=4.5, true_cfg_scale=4.0),
        algo=SimpleNamespace(noise_level=0.7, sde_type="sde"),
    )
    batch = encoded(pipeline) | dict(height=64, width=96, vae_scale_factor=8)
    texts = [
        batch.get(f"{which}{part}") for which in ("prompt_embeds", "negative_prompt_embeds") for part in ("", "_mask")
    ]
    latents, log_probs, means = [torch.randn(*((rows, 24, 64) if qwen else (rows, 16, 8, 12)))], [], []
    adapter = base.get_class_by_name(config.architecture, config.algorithm)
    with torch.no_grad():
        for t in scheduler.timesteps[:-1]:
            at = t.expand(rows)[:, None]
            both = adapter.prepare_model_inputs(transformer, config, latents[-1][:, None], at, *texts, batch, 0)
            text, none = (adapter.forward(transformer, config, each) for each in both)
            if qwen:
                velocity = adapter_module(package).apply_true_cfg(text, none, config.pipeline.true_cfg_scale)
            else:
                velocity = none + config.pipeline.guidance_scale * (text - none)
            step = scheduler.sample_previous_step(
                sample=latents[-1],
                model_output=velocity,
                timestep=at[:, 0],
                noise_level=config.algo.noise_level,
                sde_type=config.algo.sde_type,
                return_logprobs=True,
                return_sqrt_dt=True,
            )
            for kept, new in zip((latents, log_probs, means), step, strict=False):
                kept.append(new)
    batch |= Rows(
        all_latents=torch.stack(latents, 1),
        all_timesteps=scheduler.timesteps[:-1].repeat(rows, 1),
        old_log_probs=torch.stack(log_probs, 1),
        old_prev_sample_mean=torch.stack(means, 1),
        advantages=torch.tensor([1.0, -0.5, -1.0, 0.5])[:, None].repeat(1, STEPS - 1),
    )
    trace.lines.append(json.dumps(exact([log_probs, means[-1].flatten()[:8]])))

    engine = object.__new__(engines.PPODiffusersFSDPEngine)
    vars(engine).update(module=transformer, scheduler=scheduler, model_config=config, use_ulysses_sp=False)
    engine.ulysses_sequence_parallel_size = 1
    engine.get_data_parallel_group = lambda: None
    engine.postprocess_batch_func = lambda output_lst, indices, data: output_lst
    actor = SimpleNamespace(
        global_batch_info={},
        loss_scale_factor=None,
        diffusion_loss=type("Loss", (dict,), {"__getattr__": dict.__getitem__})(
            loss_mode=loss, adv_clip_max=5.0, clip_ratio=1e-3, kl_mask_threshold=1e-5, add_kl_coefficient=True
        ),
        rollout_correction=SimpleNamespace(bypass_mode=False),
        use_kl_loss=False,
        use_distill_loss=False,
    )
    optimizer = torch.optim.AdamW(transformer.parameters(), 1e-4)
    for _ in range(UPDATES):
        optimizer.zero_grad()
        outputs = engine.forward_backward_batch(batch, functools.partial(losses.diffusion_loss, actor))
        for output in outputs:
            logged = [{name: each[name] for name in ("log_probs",)} for each in output["model_output"]]
            trace.lines.append(json.dumps(exact([output["loss"], output["metrics"], logged])))
        optimizer.step()


if __name__ == "__main__":
    folder = ROOT / "examples" / "verl_omni"
    names = {case: "verl_star_qwen_image.py" if case == "qwen_image" else "verl_star.py" for case in CASES}
    main(run, ["verl_omni"], {case: folder / name for case, name in names.items()}, __doc__)
