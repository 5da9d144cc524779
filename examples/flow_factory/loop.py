"""Flow-Factory's GRPO update in small, on the embedded model, through star_adapter.py.

`python examples/flow_factory/loop.py` runs in some seconds. Where flow_factory is importable the adapter is the host's;
else a stand-in with its interface takes its place.
"""

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch

from star.objective import sde_step_with_logprob
from star.rewards import load
from star.shapes.model import LATENT_SIZE, load_pipeline
from star.training.advantage import group_advantages
from star.training.rollout import decode

PROMPTS = ["a red circle left of a blue square", "two green rings"]
STEPS, TRAINED, GROUP, GUIDANCE = 6, (1, 2), 3, 2.0
CLIP_RANGE, ADV_CLIP_RANGE = (-1e-4, 1e-4), (-5.0, 5.0)  # Flow-Factory's are lower and upper ends


class StandIn:
    """The interface of Flow-Factory's SD3_5Adapter as far as the GRPO trainer's update uses it."""

    def __init__(self, pipeline) -> None:
        self.pipeline, self._components = pipeline, {}

    @property
    def transformer(self) -> torch.nn.Module:
        return self._components.get("transformer") or self.pipeline.transformer

    @property
    def scheduler(self):
        return self.pipeline.scheduler

    def forward(
        self,
        t,
        latents,
        prompt_embeds,
        pooled_prompt_embeds,
        negative_prompt_embeds=None,
        negative_pooled_prompt_embeds=None,
        guidance_scale=7.5,
        t_next=None,
        next_latents=None,
        noise_level=None,
        compute_log_prob=True,
        return_kwargs=(),
    ):
        uncond, text = self.transformer(
            hidden_states=torch.cat([latents] * 2),
            timestep=t.expand(len(latents)).repeat(2),
            encoder_hidden_states=torch.cat([negative_prompt_embeds, prompt_embeds]),
            pooled_projections=torch.cat([negative_pooled_prompt_embeds, pooled_prompt_embeds]),
            return_dict=False,
        )[0].chunk(2)
        noise_pred = uncond + guidance_scale * (text - uncond)
        result = sde_step_with_logprob(self.scheduler, noise_pred, t, latents, noise_level, next_latents)
        names = ("next_latents", "log_prob", "next_latents_mean", "std_dev_t")
        return SimpleNamespace(**dict(zip(names, result, strict=True)))


def filter_kwargs(func, **kwargs):
    return {name: value for name, value in kwargs.items() if name in inspect.signature(func).parameters}


def is_installed() -> bool:
    module = sys.modules.get("flow_factory")
    return importlib.util.find_spec("flow_factory") is not None if module is None else hasattr(module, "__file__")


def load_adapter_class() -> type:
    """StarAdapter of star_adapter.py, over the host's adapter or the stand-in."""
    if not is_installed():
        for name, value in (
            ("flow_factory.models.stable_diffusion.sd3_5", dict(SD3_5Adapter=StandIn)),
            ("flow_factory.utils.base", dict(filter_kwargs=filter_kwargs)),
        ):
            sys.modules[name] = ModuleType(name)
            vars(sys.modules[name]).update(value)
            for parent in (name.rsplit(".", depth)[0] for depth in range(1, name.count(".") + 1)):
                sys.modules.setdefault(parent, ModuleType(parent))
    spec = importlib.util.spec_from_file_location("star_adapter", Path(__file__).parent / "star_adapter.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.StarAdapter


def encode(pipeline, prompts):
    """What a batch holds of the prompts."""
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
            prompts, None, None, negative_prompt=[""] * len(prompts), max_sequence_length=0
        )
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {"prompt": prompts, **dict(zip(names, (embeds, negative, pooled, negative_pooled), strict=True))}


@torch.no_grad()
def rollout(adapter, generator, dtype=torch.float32):
    """A batch as the trainer stacks it: latents in the storage type at the trained steps, log_probs, index maps."""
    batch = encode(adapter.pipeline, [p for p in PROMPTS for _ in range(GROUP)])
    count, plan = len(batch["prompt"]), adapter.scheduler
    plan.set_timesteps(STEPS)
    conditions = {k: v for k, v in batch.items() if k != "prompt"}
    latents = torch.randn(count, 4, LATENT_SIZE, LATENT_SIZE, generator=generator).to(dtype)
    kept, log_probs = {0: latents}, {}
    for i, t in enumerate(plan.timesteps):
        inputs = conditions | dict(t=t, latents=latents.float(), guidance_scale=GUIDANCE, noise_level=0.7)
        latents = adapter.forward(**inputs).next_latents.to(dtype)
        if i in TRAINED:  # log_prob of the value that was stored
            log_probs[i] = adapter.forward(next_latents=latents.float(), **inputs).log_prob
        kept[i + 1] = latents
    steps = sorted({step for i in TRAINED for step in (i, i + 1)})
    rewards = load("star.shapes.reward:shapes_reward")(
        decode(adapter.pipeline, latents.float()), batch["prompt"]
    ).reward
    return batch | {
        "timesteps": plan.timesteps.repeat(count, 1),
        "all_latents": torch.stack([kept[i] for i in steps], 1),
        "latent_index_map": {i: steps.index(i) for i in steps},
        "log_probs": torch.stack([log_probs[i] for i in TRAINED], 1),
        "log_prob_index_map": {i: TRAINED.index(i) for i in TRAINED},
        "advantage": group_advantages(rewards, torch.arange(count) // GROUP),
    }


def loss_of(adapter, batch, timestep_index):
    """The trainer's loss of one timestep, with the whole batch handed to forward, as it does."""
    at = batch["latent_index_map"]
    inputs = {
        "t": batch["timesteps"][:, timestep_index],
        "t_next": batch["timesteps"][:, timestep_index + 1],
        "latents": batch["all_latents"][:, at[timestep_index]].float(),
        "next_latents": batch["all_latents"][:, at[timestep_index + 1]].float(),
        "compute_log_prob": True,
        "noise_level": 0.7,
        "guidance_scale": GUIDANCE,
        "return_kwargs": ["log_prob", "dt"],
        **batch,
    }
    log_prob = adapter.forward(**inputs).log_prob
    adv = batch["advantage"].clamp(*ADV_CLIP_RANGE)
    ratio = torch.exp(log_prob - batch["log_probs"][:, batch["log_prob_index_map"][timestep_index]])
    clipped = ratio.clamp(1 + CLIP_RANGE[0], 1 + CLIP_RANGE[1])
    return torch.maximum(-adv * ratio, -adv * clipped).mean(), ratio


def make_adapter():
    """The adapter with the embedded pipeline, without the host's configuration files."""
    adapter = object.__new__(load_adapter_class())
    adapter.pipeline, adapter._components = load_pipeline(), {}
    if is_installed():
        from flow_factory.scheduler import FlowMatchEulerDiscreteSDEScheduler

        adapter.pipeline.scheduler = FlowMatchEulerDiscreteSDEScheduler.from_config(adapter.pipeline.scheduler.config)
    return adapter


def train(iterations=2):
    torch.manual_seed(0)
    adapter = make_adapter()
    optimizer = torch.optim.AdamW(adapter.transformer.parameters(), 1e-5)
    for iteration in range(iterations):
        batch = rollout(adapter, torch.Generator().manual_seed(iteration))
        for i in TRAINED:
            loss, ratio = loss_of(adapter, batch, i)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"iteration {iteration} loss {loss:.6f} ratio {ratio.mean():.6f}")


if __name__ == "__main__":
    train()
