"""STAR with diffusers alone: rollout with maps, reward, weights, update. `python examples/diffusers_loop.py`, a minute.

Everything is what SD3.5 would be: another pipeline, its latent size, another reward. No guidance here.
"""

import torch
from peft import LoraConfig

from star import concept_tokens, record
from star.objective import fused_grpo_loss, sde_step_with_logprob
from star.reports.metrics import gradient_share
from star.rewards import load
from star.shapes.model import LATENT_SIZE, load_pipeline
from star.shapes.scenes import prompts
from star.training.advantage import group_advantages
from star.training.rollout import decode

GROUP, STEPS, TRAINED = 12, 8, (1, 2)  # images per prompt, steps of the sampler, the stochastic and trained ones


def encode(pipeline, texts):
    """Embeddings of each text GROUP times, and the text tokens of its concepts."""
    texts = [text for text in texts for _ in range(GROUP)]
    with torch.no_grad():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            texts, None, None, do_classifier_free_guidance=False, max_sequence_length=0
        )
    return texts, embeds, pooled, concept_tokens(pipeline, texts)


@torch.no_grad()
def rollout(pipeline, x, embeds, pooled, tokens, generator):
    """Latents of every step, the means of the trained ones, and the weights of every step."""
    scheduler, latents, means = pipeline.scheduler, [], {}
    scheduler.set_timesteps(STEPS)
    with record(pipeline.transformer, tokens, layers=(2, 3)) as maps:
        for i, t in enumerate(scheduler.timesteps):
            latents.append(x)
            velocity = pipeline.transformer(x, embeds, pooled, t.expand(len(x)), return_dict=False)[0]
            if i in TRAINED:
                x, _, means[i], _ = sde_step_with_logprob(scheduler, velocity, t, x, generator=generator)
            else:
                x = x + (scheduler.sigmas[i + 1] - scheduler.sigmas[i]) * velocity
    return [*latents, x], means, maps.weights()  # (B, STEPS, H, W)


def train(iterations=12, seed=0, weighted=True, learning_rate=1e-3):
    """Mean reward of each iteration's rollout."""
    torch.manual_seed(seed)  # the adapter's first values
    pipeline, reward, generator = (
        load_pipeline(),
        load("star.shapes.reward:shapes_reward"),
        torch.Generator().manual_seed(seed),
    )
    pipeline.transformer.requires_grad_(False)
    pipeline.transformer.add_adapter(
        LoraConfig(r=16, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0"])
    )
    parameters = [p for p in pipeline.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    texts, embeds, pooled, tokens = encode(pipeline, prompts(4, seed))
    groups, rewards = torch.arange(len(texts)) // GROUP, []
    # The images of a prompt start from one noise, so only the trained steps tell them apart; the same one in every
    # iteration, so that a short run's rewards can be compared.
    noise = torch.randn(len(texts) // GROUP, 4, LATENT_SIZE, LATENT_SIZE, generator=generator)[groups]
    for _ in range(iterations):
        latents, means, weights = rollout(pipeline, noise, embeds, pooled, tokens, generator)
        scores = reward(decode(pipeline, latents[-1]), texts).reward
        advantages = group_advantages(scores, groups)
        rewards.append(scores.mean().item())
        for i in TRAINED:
            t = pipeline.scheduler.timesteps[i]
            velocity = pipeline.transformer(latents[i], embeds, pooled, t.expand(len(texts)), return_dict=False)[0]
            loss, statistics = fused_grpo_loss(
                pipeline.scheduler,
                velocity,
                t,
                latents[i],
                latents[i + 1],
                advantages,
                weights[:, i] if weighted else None,
                prev_sample_mean=means[i],
            )
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        share = gradient_share(weights if weighted else torch.ones_like(weights)).mean()
        print(f"reward {rewards[-1]:.3f}  ratio {statistics.ratio_mean:.6f}  top tenth {share:.3f}")
    return rewards


if __name__ == "__main__":
    train()
