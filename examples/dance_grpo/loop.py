"""DanceGRPO's and MixGRPO's loop in small, on a tiny FLUX: their tensors, their names, and the lines of star.diff.

`python examples/dance_grpo/loop.py` makes two training steps of each in some seconds. Packed latents (B, L, 64), one
sample at a time, steps permuted for each sample (DanceGRPO), or a window of stochastic steps and samples in another
order (MixGRPO).
"""

import math
import random
import tempfile
from argparse import Namespace

import torch
from diffusers import FluxTransformer2DModel
from transformers import AutoTokenizer

from star import ConceptTokens, allocated
from star.concepts import locate
from star.shapes.model import make_tokenizer
from star.transition import schedule
from star_kernels import log_prob as log_density

CAPTIONS = ["a red circle left of a blue square", "two green rings"]
TEXT_LENGTH = 512  # of FLUX's T5 part


def make_args(host: str, folder: str) -> Namespace:
    """The command line of the host, in small. folder: what stands in for FLUX's."""
    make_tokenizer().save_pretrained(f"{folder}/tokenizer_2")
    return Namespace(
        host=host,
        pretrained_model_name_or_path=folder,
        h=64,
        w=96,
        sampling_steps=6,
        shift=3.0,
        eta=0.3,
        num_generations=3,
        clip_range=1e-4,
        adv_clip_max=5.0,
        timestep_fraction=0.6,
        max_grad_norm=1.0,
        flow_grpo_sampling=host == "mix",
        timesteps_train=[1, 2],
        kl_coeff=0.01 if host == "mix" else 0.0,
    )


def make_transformer() -> FluxTransformer2DModel:
    torch.manual_seed(0)
    return FluxTransformer2DModel(
        in_channels=64, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=24, pooled_projection_dim=20, axes_dims_rope=(4, 6, 6), guidance_embeds=True,
    )  # fmt: skip


def embed(captions):
    """What the host reads from its prepared files: (B, 512, D) embeddings, (B, D') pooled, (B, 3) text ids."""
    ids = make_tokenizer()(captions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt").input_ids
    table = torch.randn(int(ids.max()) + 1, 24, generator=torch.Generator().manual_seed(0))
    embeds = table[ids]
    return embeds, embeds[:, 1, :20], torch.zeros(len(captions), 3)


def sigmas_and_steps(args, stochastic=None):
    sigmas = torch.linspace(1, 0, args.sampling_steps + 1)
    sigmas = args.shift * sigmas / (1 + (args.shift - 1) * sigmas)
    return sigmas, schedule(sigmas, "flow_sde" if args.flow_grpo_sampling else "dance_sde", args.eta, stochastic)


def predict(transformer, latents, encoder_hidden_states, pooled_prompt_embeds, text_ids, image_ids, timesteps):
    return transformer(
        hidden_states=latents,
        encoder_hidden_states=encoder_hidden_states,
        timestep=timesteps / 1000,
        guidance=torch.tensor([3.5]),
        txt_ids=text_ids.repeat(encoder_hidden_states.shape[1], 1),
        pooled_projections=pooled_prompt_embeds,
        img_ids=image_ids,
        return_dict=False,
    )[0]


def grpo_one_step(
    args, latents, pre_latents, encoder_hidden_states, pooled, text_ids, image_ids, transformer, timesteps, i, sigmas
):
    pred = predict(transformer, latents, encoder_hidden_states, pooled, text_ids, image_ids.squeeze(0), timesteps)
    step = sigmas_and_steps(args)[1].rows(slice(int(i), int(i) + 1))
    return log_density(pre_latents, step.a * latents + step.b * pred, step)


@torch.no_grad()
def sample_reference_model(args, transformer, encoder_hidden_states, pooled, text_ids, caption):
    """(rewards (B,), latents (B, T+1, L, 64), log_probs (B, T), sigmas (T+1,), image ids (B, L, 3))."""
    stochastic = args.timesteps_train if args.host == "mix" else None
    sigma_schedule, steps = sigmas_and_steps(args, stochastic)
    rows, columns = args.h // 16, args.w // 16
    y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    image_ids = torch.stack([torch.zeros_like(x), y, x], -1).flatten(0, 1).float()
    everything = []
    for b in range(len(caption)):
        z = torch.randn(1, rows * columns, 64)
        latents, log_probs = [z], []
        for i in range(args.sampling_steps):
            timesteps = torch.full([1], int(sigma_schedule[i] * 1000))
            pred = predict(transformer, z, *(e[b : b + 1] for e in (encoder_hidden_states, pooled, text_ids)),
                           image_ids, timesteps)  # fmt: skip
            step = steps.rows(slice(i, i + 1))
            mean = step.a * z + step.b * pred
            z = mean + step.s * torch.randn_like(z)
            latents.append(z)
            log_probs.append(log_density(z, mean, step) if step.s > 0 else torch.zeros(1))
        everything.append((z[0, :, 0].mean()[None], torch.stack(latents, 1), torch.stack(log_probs, 1)))
    rewards, latents, log_probs = (torch.cat(parts) for parts in zip(*everything, strict=True))
    return rewards, latents, log_probs, sigma_schedule, image_ids.expand(len(caption), -1, -1)


def prepare(args, transformer, captions):
    """A rollout as the host's list of samples, each (1, ...); the permutations of the steps; the sigmas."""
    caption = [c for c in captions for _ in range(args.num_generations)]
    encoder_hidden_states, pooled_prompt_embeds, text_ids = embed(caption)
    t5 = AutoTokenizer.from_pretrained(args.pretrained_model_name_or_path, subfolder="tokenizer_2")
    tokens = locate(caption, None, t5, max_sequence_length=512)
    reward, all_latents, all_log_probs, sigma_schedule, all_image_ids = sample_reference_model(
        args, transformer, encoder_hidden_states, pooled_prompt_embeds, text_ids, caption
    )
    batch_size = len(caption)
    timesteps = torch.tensor([[int(sigma * 1000) for sigma in sigma_schedule][: args.sampling_steps]] * batch_size)
    samples = {  # the last step is left out
        "timesteps": timesteps[:, :-1],
        "latents": all_latents[:, :-1][:, :-1],
        "next_latents": all_latents[:, 1:][:, :-1],
        "log_probs": all_log_probs[:, :-1],
        "image_ids": all_image_ids,
        "text_ids": text_ids,
        "encoder_hidden_states": encoder_hidden_states,
        "pooled_prompt_embeds": pooled_prompt_embeds,
        "token_index": tokens.index,
        "token_weight": tokens.weight,
    }
    groups = reward.view(-1, args.num_generations)
    samples["advantages"] = ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-8)).flatten()
    perms = torch.arange(args.sampling_steps - 1).repeat(batch_size, 1)
    if args.host == "dance":
        perms = torch.stack([torch.randperm(args.sampling_steps - 1) for _ in range(batch_size)])
        for key in ["timesteps", "latents", "next_latents", "log_probs"]:
            samples[key] = samples[key][torch.arange(batch_size)[:, None], perms]
    batched = {k: v.unsqueeze(1) for k, v in samples.items()}
    batched = [dict(zip(batched, values, strict=True)) for values in zip(*batched.values(), strict=True)]
    if args.host == "mix":  # another order: the index in the list no longer says which sample it is
        order = random.sample(range(batch_size), batch_size)
        batched, perms = [batched[b] for b in order], perms[order]
    return batched, perms, sigma_schedule


def loss_of(args, transformer, sample, k, index, sigma_schedule):
    """The loss of one sample at the k-th of its (permuted) steps, which is step `index` of the schedule."""
    tokens = ConceptTokens(sample["token_index"], sample["token_weight"])
    # fmt: off
    new_log_probs = allocated(transformer, tokens)(grpo_one_step)(
        args,
        sample["latents"][:, k],
        sample["next_latents"][:, k],
        sample["encoder_hidden_states"],
        sample["pooled_prompt_embeds"],
        sample["text_ids"],
        sample["image_ids"],
        transformer,
        sample["timesteps"][:, k],
        index,
        sigma_schedule,
    )
    # fmt: on
    advantages = sample["advantages"].clamp(-args.adv_clip_max, args.adv_clip_max)
    difference = new_log_probs - sample["log_probs"][:, k]
    ratio = torch.exp(difference)
    clipped = ratio.clamp(1 - args.clip_range, 1 + args.clip_range)
    policy_loss = torch.maximum(-advantages * ratio, -advantages * clipped).mean()
    return policy_loss + args.kl_coeff * 0.5 * difference.square().mean(), ratio


def train_one_step(args, transformer, optimizer, captions):
    batched, perms, sigma_schedule = prepare(args, transformer, captions)
    count = int((args.sampling_steps - 1) * args.timestep_fraction)
    steps = args.timesteps_train if args.host == "mix" else range(count)
    for sample, perm in zip(batched, perms, strict=True):
        for k in steps:
            loss, ratio = loss_of(args, transformer, sample, k, perm[k], sigma_schedule)
            (loss / (len(batched) * len(steps))).backward()
            assert math.isclose(ratio.item(), 1, abs_tol=1e-5), "not on policy"
    norm = torch.nn.utils.clip_grad_norm_(transformer.parameters(), args.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    return norm.item()


def train(host: str) -> None:
    torch.manual_seed(0)
    transformer = make_transformer()
    optimizer = torch.optim.AdamW(transformer.parameters(), 1e-5)
    with tempfile.TemporaryDirectory() as folder:
        args = make_args(host, folder)
        for step in range(2):
            print(f"{host} step {step} grad norm {train_one_step(args, transformer, optimizer, CAPTIONS):.4f}")


if __name__ == "__main__":
    train("dance")
    train("mix")
