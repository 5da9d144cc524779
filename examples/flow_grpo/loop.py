"""Flow-GRPO's loop in small, on the embedded model: its tensors, its names, and the lines of sd3.diff.

`python examples/flow_grpo/loop.py` runs two epochs in some seconds and prints what the trainer would log.
"""

from types import SimpleNamespace as Config

import torch

from star import concept_tokens, record, sde_step_with_logprob
from star.rewards import load
from star.shapes.model import load_pipeline
from star.shapes.scenes import prompts as draw_prompts
from star.training.advantage import group_advantages
from star.training.rollout import decode

CONFIG = Config(
    resolution=36,
    sample=Config(num_steps=6, guidance_scale=2.0, noise_level=0.7, num_batches_per_epoch=2, group=4),
    train=Config(cfg=True, clip_range=1e-3, adv_clip_max=5.0, beta=0.0, learning_rate=1e-4, timestep_fraction=0.5),
)


def embed(pipeline, prompts):
    """Embeddings (B, T, D) and (B, D')."""
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
    return embeds, pooled


def guided(transformer, latents, timestep, embeds, pooled, guidance_scale):
    """Unconditional rows first; embeds and pooled are the negative ones, then the prompts'."""
    uncond, text = transformer(
        hidden_states=torch.cat([latents] * 2),
        timestep=torch.cat([timestep] * 2),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        return_dict=False,
    )[0].chunk(2)
    return uncond + guidance_scale * (text - uncond)


def pipeline_with_logprob(pipeline, prompt_embeds, pooled, negative_embeds, negative_pooled, config, generator=None):
    """Images, latents of all steps and log-probs of all steps, as lists."""
    pipeline.scheduler.set_timesteps(config.sample.num_steps)
    size = config.resolution // pipeline.vae_scale_factor
    shape = (len(prompt_embeds), pipeline.transformer.config.in_channels, size, size)
    latents = [torch.randn(shape, generator=generator)]
    log_probs, embeds = [], torch.cat([negative_embeds, prompt_embeds])
    for t in pipeline.scheduler.timesteps:
        noise_pred = guided(
            pipeline.transformer,
            latents[-1],
            t.expand(len(prompt_embeds)),
            embeds,
            torch.cat([negative_pooled, pooled]),
            config.sample.guidance_scale,
        )
        prev, log_prob, _, _ = sde_step_with_logprob(
            pipeline.scheduler,
            noise_pred.float(),
            t.unsqueeze(0),
            latents[-1].float(),
            noise_level=config.sample.noise_level,
            generator=generator,
        )
        latents.append(prev)
        log_probs.append(log_prob)
    return decode(pipeline, latents[-1]), latents, log_probs


def compute_log_prob(transformer, pipeline, sample, j, embeds, pooled_embeds, config):
    noise_pred = guided(
        transformer,
        sample["latents"][:, j],
        sample["timesteps"][:, j],
        embeds,
        pooled_embeds,
        config.sample.guidance_scale,
    )
    return sde_step_with_logprob(
        pipeline.scheduler,
        noise_pred.float(),
        sample["timesteps"][:, j],
        sample["latents"][:, j].float(),
        prev_sample=sample["next_latents"][:, j].float(),
        noise_level=config.sample.noise_level,
        weights=sample["weights"][:, j],
    )


def rollout(pipeline, prompts, negative, config, generator=None):
    """One batch of the epoch: what the trainer keeps of it, every entry (B, ...), and its rewards."""
    prompt_embeds, pooled_prompt_embeds = embed(pipeline, prompts)
    tokens = concept_tokens(pipeline, prompts, max_sequence_length=128)
    with torch.no_grad(), record(pipeline.transformer, tokens) as maps:
        images, latents, log_probs = pipeline_with_logprob(
            pipeline,
            prompt_embeds,
            pooled_prompt_embeds,
            *(e.expand(len(prompts), *e.shape[1:]) for e in negative),
            config,
            generator,
        )
    latents = torch.stack(latents, dim=1)
    return {
        "prompt_embeds": prompt_embeds,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "timesteps": pipeline.scheduler.timesteps.repeat(len(prompts), 1),
        "latents": latents[:, :-1],
        "next_latents": latents[:, 1:],
        "log_probs": torch.stack(log_probs, dim=1),
        "weights": maps.weights(),
    }, load("star.shapes.reward:shapes_reward")(images, prompts).reward


def loss_of(pipeline, sample, j, negative, config):
    """The loss of one timestep of one batch, and its ratio."""
    batch = len(sample["prompt_embeds"])
    embeds = torch.cat([negative[0].expand(batch, -1, -1), sample["prompt_embeds"]])
    pooled = torch.cat([negative[1].expand(batch, -1), sample["pooled_prompt_embeds"]])
    _, log_prob, _, _ = compute_log_prob(pipeline.transformer, pipeline, sample, j, embeds, pooled, config)
    advantages = sample["advantages"][:, j].clamp(-config.train.adv_clip_max, config.train.adv_clip_max)
    ratio = torch.exp(log_prob - sample["log_probs"][:, j])
    low, high = 1 - config.train.clip_range, 1 + config.train.clip_range
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(low, high)).mean(), ratio


def epoch_samples(pipeline, epoch, negative, config):
    """All batches of an epoch as one dict, advantages (B, T) by prompt, shuffled; and the mean reward."""
    generator = torch.Generator().manual_seed(epoch)
    prompts = [p for p in draw_prompts(config.sample.num_batches_per_epoch, epoch) for _ in range(config.sample.group)]
    batches = [prompts[b :: config.sample.num_batches_per_epoch] for b in range(config.sample.num_batches_per_epoch)]
    parts, rewards = zip(*(rollout(pipeline, batch, negative, config, generator) for batch in batches), strict=True)
    samples = {k: torch.cat([part[k] for part in parts]) for k in parts[0]}
    rewards, flat = torch.cat(rewards), [p for batch in batches for p in batch]
    groups = torch.tensor([sorted(set(flat)).index(p) for p in flat])
    samples["advantages"] = group_advantages(rewards, groups)[:, None].repeat(1, config.sample.num_steps)
    perm = torch.randperm(len(flat), generator=generator)
    return {k: v[perm] for k, v in samples.items()}, rewards.mean().item()


def train(epochs=2, config=CONFIG):
    torch.manual_seed(0)
    pipeline = load_pipeline()
    negative = embed(pipeline, [""])
    optimizer = torch.optim.AdamW(pipeline.transformer.parameters(), config.train.learning_rate)
    steps = int(config.sample.num_steps * config.train.timestep_fraction)
    for epoch in range(epochs):
        samples, reward = epoch_samples(pipeline, epoch, negative, config)
        batched = {k: v.unflatten(0, (config.sample.num_batches_per_epoch, -1)) for k, v in samples.items()}
        for i in range(config.sample.num_batches_per_epoch):
            sample = {k: v[i] for k, v in batched.items()}
            for j in range(steps):
                loss, ratio = loss_of(pipeline, sample, j, negative, config)
                (loss / steps).backward()
            norm = torch.nn.utils.clip_grad_norm_(pipeline.transformer.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            print(f"epoch {epoch} reward {reward:.3f} loss {loss:.5f} ratio {ratio.mean():.6f} grad norm {norm:.3f}")


if __name__ == "__main__":
    train()
