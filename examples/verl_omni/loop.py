"""verl-omni's actor update in small, on the embedded model, through verl_star.py.

`python examples/verl_omni/loop.py` runs in some seconds. The rollout runs in another engine, so the maps are those of
the update's own pass. Stand-ins with the host's interface take the place of its classes.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from star.objective import sde_step_with_logprob
from star.rewards import load
from star.shapes.model import LATENT_SIZE, load_pipeline
from star.training.advantage import group_advantages
from star.training.rollout import decode

PROMPTS = ["a red circle left of a blue square", "two green rings"]
STEPS, WINDOW, GROUP, GUIDANCE = 6, (1, 2), 3, 2.0
ADAPTER = "verl_omni.pipelines.sd3_flow_grpo.diffusers_training_adapter"


class Scheduler(FlowMatchEulerDiscreteScheduler):
    """The interface of the host's FlowMatchSDEDiscreteScheduler in the update."""

    def sample_previous_step(self, *, sample, model_output, timestep, noise_level, prev_sample, sde_type):
        step = sde_step_with_logprob(
            self, model_output, timestep, sample, noise_level, prev_sample, sde_type=sde_type, return_sqrt_dt=True
        )
        return *step[:4], step[4].flatten()


class ModelBase:
    """The interface of the host's DiffusionModelBase: a registry of adapters."""

    registry: dict = {}  # noqa: RUF012

    @classmethod
    def register(cls, architecture, algorithm):
        return lambda subclass: cls.registry.setdefault((architecture, algorithm), subclass) or subclass


class StandIn(ModelBase):
    """The interface of the host's StableDiffusion3FlowGRPO: guidance in two passes, the conditional one first."""

    @classmethod
    def forward(cls, module, config, inputs):
        return module(**inputs, return_dict=False)[0]

    @classmethod
    def forward_and_sample_previous_step(cls, module, scheduler, config, inputs, negative, data, step):
        noise_pred = cls.forward(module, config, inputs)
        if config.pipeline.guidance_scale > 1:
            uncond = cls.forward(module, config, negative)
            noise_pred = uncond + config.pipeline.guidance_scale * (noise_pred - uncond)
        return scheduler.sample_previous_step(
            sample=data["all_latents"][:, step].float(),
            model_output=noise_pred.float(),
            timestep=data["all_timesteps"][:, step],
            noise_level=config.algo.noise_level,
            prev_sample=data["all_latents"][:, step + 1].float(),
            sde_type=config.algo.sde_type,
        )[1:]


def load_adapter() -> type:
    """StarStableDiffusion3 of verl_star.py over the stand-ins."""
    for name, value in (
        ("verl_omni.pipelines.model_base", dict(DiffusionModelBase=ModelBase)),
        (ADAPTER, dict(StableDiffusion3FlowGRPO=StandIn)),
    ):
        sys.modules[name] = ModuleType(name)
        vars(sys.modules[name]).update(value)
        for depth in range(1, name.count(".") + 1):
            parent = name.rsplit(".", depth)[0]
            sys.modules.setdefault(parent, ModuleType(parent))
    spec = importlib.util.spec_from_file_location("verl_star", Path(__file__).parent / "verl_star.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.StarStableDiffusion3


def make_config(pipeline, guidance_scale=GUIDANCE, sde_type="sde"):
    return SimpleNamespace(
        tokenizer=pipeline.tokenizer,
        pipeline=SimpleNamespace(guidance_scale=guidance_scale),
        algo=SimpleNamespace(noise_level=0.7, sde_type=sde_type),
        diffusion_loss=SimpleNamespace(clip_ratio=1e-4, adv_clip_max=5.0),
    )


def model_inputs(data, step):
    """(conditional, negative) arguments of the transformer."""
    return tuple(
        dict(
            hidden_states=data["all_latents"][:, step],
            encoder_hidden_states=data[f"{kind}prompt_embeds"],
            pooled_projections=data[f"{kind}pooled_prompt_embeds"],
            timestep=data["all_timesteps"][:, step],
        )
        for kind in ("", "negative_")
    )


@torch.no_grad()
def rollout(pipeline, scheduler, config, generator):
    """What the other engine sends: a window of the trajectory (B, S+1, C, H, W), embeddings, prompt ids, rewards."""
    prompts = [p for p in PROMPTS for _ in range(GROUP)]
    embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(
        prompts, None, None, negative_prompt=[""] * len(prompts), max_sequence_length=0
    )
    data = dict(prompt_embeds=embeds, negative_prompt_embeds=negative, pooled_prompt_embeds=pooled,
                negative_pooled_prompt_embeds=negative_pooled)  # fmt: skip
    data["prompts"] = pipeline.tokenizer(prompts, padding="max_length", max_length=16, return_tensors="pt").input_ids
    scheduler.set_timesteps(STEPS)
    x = torch.randn(len(prompts), 4, LATENT_SIZE, LATENT_SIZE, generator=generator)
    latents = [x]
    for i, t in enumerate(scheduler.timesteps):
        now = data | dict(all_latents=x[:, None], all_timesteps=t.expand(len(prompts), 1))
        text, uncond = (pipeline.transformer(**inputs)[0] for inputs in model_inputs(now, 0))
        scale = config.pipeline.guidance_scale
        v = uncond + scale * (text - uncond) if scale > 1 else text
        if i in WINDOW:
            x = sde_step_with_logprob(
                scheduler, v, t, x, config.algo.noise_level, generator=generator, sde_type=config.algo.sde_type
            )[0]
        else:
            x = x + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * v
        latents.append(x)
    rewards = load("star.shapes.reward:shapes_reward")(decode(pipeline, x), prompts).reward
    advantages = group_advantages(rewards, torch.arange(len(prompts)) // GROUP)
    return data | {
        "all_latents": torch.stack([latents[i] for i in (*WINDOW, WINDOW[-1] + 1)], 1),
        "all_timesteps": scheduler.timesteps[list(WINDOW)].repeat(len(prompts), 1),
        "advantages": advantages[:, None].expand(-1, len(WINDOW)),
    }


def log_probs(adapter, pipeline, scheduler, config, data, step):
    return adapter.forward_and_sample_previous_step(
        pipeline.transformer, scheduler, config, *model_inputs(data, step), data, step
    )[0]


def loss_of(log_prob, data, step, config):
    """The host's loss `flow_grpo`."""
    loss = config.diffusion_loss
    advantages = data["advantages"][:, step].clamp(-loss.adv_clip_max, loss.adv_clip_max)
    ratio = torch.exp(log_prob - data["old_log_probs"][:, step])
    clipped = ratio.clamp(1 - loss.clip_ratio, 1 + loss.clip_ratio)
    return torch.maximum(-advantages * ratio, -advantages * clipped).mean(), ratio


def train(iterations=2):
    torch.manual_seed(0)
    adapter, pipeline = load_adapter(), load_pipeline()
    scheduler, config = Scheduler.from_config(pipeline.scheduler.config), make_config(pipeline)
    optimizer = torch.optim.AdamW(pipeline.transformer.parameters(), 1e-5)
    for iteration in range(iterations):
        data = rollout(pipeline, scheduler, config, torch.Generator().manual_seed(iteration))
        steps, arguments = range(len(WINDOW)), (adapter, pipeline, scheduler, config, data)
        with torch.no_grad():
            data["old_log_probs"] = torch.stack([log_probs(*arguments, step) for step in steps], 1)
        for step in steps:
            loss, ratio = loss_of(log_probs(*arguments, step), data, step, config)
            (loss / len(steps)).backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"iteration {iteration} loss {loss:.6f} ratio {ratio.mean():.6f}")


if __name__ == "__main__":
    train()
