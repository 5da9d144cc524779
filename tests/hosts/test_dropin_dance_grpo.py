"""DanceGRPO and MixGRPO: packed latents, permuted steps, samples in another order, on a tiny FLUX.

What the hosts hold at their commits 15cc71d and e5cdd6a: latents (B, T+1, L, 64) cut in two and the last step left out,
log_probs (B, T-1), advantages (B,), a list of samples with a leading 1, timesteps truncated to integers.
"""

import math

import pytest
import torch

from builders import EPS
from dropin import check_diff, gradient, load_example
from star.capture import capture
from star.concepts import ConceptTokens, locate
from star_kernels import allocate

loop = load_example("dance_grpo/loop.py")
each_host = pytest.mark.parametrize("host", ["dance", "mix"])


@pytest.fixture(scope="module")
def rolled(tmp_path_factory):
    """For each host: args, the transformer, and a rollout; the policy has drifted a little since."""
    result = {}
    for host in ("dance", "mix"):
        torch.manual_seed(1)
        args = loop.make_args(host, str(tmp_path_factory.mktemp(host)))
        transformer = loop.make_transformer()
        with torch.no_grad():
            for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
                block.attn.norm_q.weight *= 3  # sharper attention than fresh weights have
        rollout = loop.prepare(args, transformer, loop.CAPTIONS)
        with torch.no_grad():
            transformer.proj_out.weight.mul_(1.01)
        result[host] = args, transformer, *rollout
    return result


def host_loss(args, transformer, sample, k, index, sigmas, weighted=False):
    """DanceGRPO's (and MixGRPO's Flow-GRPO) loss of one sample from its formulas; weighted: with maps read here."""
    tokens = ConceptTokens(sample["token_index"], sample["token_weight"])
    x, prev = sample["latents"][:, k], sample["next_latents"][:, k]
    with capture(transformer, tokens, grid=(4, 6)) as maps:
        v = transformer(
            hidden_states=x,
            encoder_hidden_states=sample["encoder_hidden_states"],
            pooled_projections=sample["pooled_prompt_embeds"],
            timestep=sample["timesteps"][:, k] / 1000,
            guidance=torch.tensor([3.5]),
            txt_ids=torch.zeros(512, 3),
            img_ids=sample["image_ids"][0],
            return_dict=False,
        )[0]
    s, dt = sigmas[index].item(), (sigmas[index + 1] - sigmas[index]).item()
    std = args.eta
    if args.host == "mix":
        std *= math.sqrt(s / (1 - (sigmas[1].item() if s == 1 else s)))
    score = -(x - (1 - s) * (x - s * v)) / s**2
    mean = x + dt * v - 0.5 * std**2 * score * dt
    spread = std * math.sqrt(-dt)
    density = -((prev - mean) ** 2) / (2 * spread**2) - math.log(spread) - 0.5 * math.log(2 * math.pi)
    if weighted:
        w = allocate(maps.read(), (4, 6), patch=1).flatten(1)[..., None]
        density = density.detach() + (density - density.detach()) * w
    log_prob = density.mean((1, 2))
    a, r = sample["advantages"], (log_prob - sample["log_probs"][:, k]).exp()
    loss = torch.maximum(-a * r, -a * r.clamp(1 - args.clip_range, 1 + args.clip_range)).mean()
    return loss + args.kl_coeff * 0.5 * (log_prob - sample["log_probs"][:, k]).square().mean(), r, maps.read()


def trained(args):
    return args.timesteps_train if args.host == "mix" else range(3)


@each_host
def test_the_diff_is_short_and_runs_in_the_example(host):
    check_diff(f"{host}_grpo/star.diff", "dance_grpo/loop.py")


@each_host
def test_what_is_stored(rolled, host):
    _, _, batched, perms, sigmas = rolled[host]
    assert len(batched) == 6 and perms.shape == (6, 5) and len(sigmas) == 7
    sample = batched[0]
    assert sample["latents"].shape == sample["next_latents"].shape == (1, 5, 24, 64)
    assert sample["log_probs"].shape == sample["timesteps"].shape == (1, 5) and sample["advantages"].shape == (1,)
    assert sample["token_index"].shape[0] == 1 and sample["token_index"].dtype == torch.int64
    assert (perms != torch.arange(5)).any() == (host == "dance")


@each_host
def test_values_are_the_hosts_and_the_gradient_is_the_weighted_one(rolled, host):
    args, transformer, batched, perms, sigmas = rolled[host]
    changed = unclipped = 0
    for sample, perm in list(zip(batched, perms, strict=True))[:3]:
        for k in trained(args):
            loss, ratio = loop.loss_of(args, transformer, sample, k, perm[k], sigmas)
            plain, r, _maps = host_loss(args, transformer, sample, k, perm[k], sigmas)
            assert r != 1
            # Log-probs of order one in float32; a step of small variance magnifies rounding in the mean.
            torch.testing.assert_close(ratio, r, rtol=0, atol=512 * EPS)
            torch.testing.assert_close(loss, plain, rtol=0, atol=1024 * EPS)
            got, unweighted = gradient(loss, transformer), gradient(plain, transformer)
            expected = gradient(host_loss(args, transformer, sample, k, perm[k], sigmas, True)[0], transformer)
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * unweighted.abs().max().item())
            changed += not torch.allclose(got, unweighted, rtol=0, atol=0.02 * unweighted.abs().max().item())
            unclipped += unweighted.abs().max().item() > 0
    assert 0 < changed <= unclipped


@each_host
def test_uniform_weights_are_the_hosts_gradient(rolled, host, monkeypatch):
    args, transformer, batched, perms, sigmas = rolled[host]
    sample, perm, k = batched[1], perms[1], 1
    silent = sample | {"token_index": torch.full_like(sample["token_index"], -1)}  # no concept: weights of exactly 1
    loss = loop.loss_of(args, transformer, silent, k, perm[k], sigmas)[0]
    got, plain = (gradient(x, transformer) for x in (loss, host_loss(args, transformer, sample, k, perm[k], sigmas)[0]))
    torch.testing.assert_close(got, plain, rtol=1e-3, atol=1e-3 * plain.abs().max().item())


@each_host
def test_maps_are_those_of_the_samples_own_prompt_and_step(rolled, host):
    """A permuted step runs at its own noise level, and a sample that was moved keeps the tokens of its own prompt."""
    args, _, batched, perms, sigmas = rolled[host]
    captions = [c for c in loop.CAPTIONS for _ in range(args.num_generations)]
    embeds = loop.embed(captions)[0]
    for sample, perm in zip(batched, perms, strict=True):
        at = int((embeds == sample["encoder_hidden_states"]).all(-1).all(-1).nonzero()[0])
        own = locate([captions[at]], None, loop.make_tokenizer(), max_sequence_length=512)
        used = sample["token_index"][sample["token_index"] >= 0]
        assert torch.equal(used, own.index[own.index >= 0])
        assert sample["timesteps"][0].tolist() == [int(sigmas[i] * 1000) for i in perm]


def test_the_transformer_is_left_as_it_was(rolled):
    args, transformer, batched, perms, sigmas = rolled["dance"]
    before = [block.attn.processor for block in transformer.transformer_blocks]
    loop.loss_of(args, transformer, batched[0], 0, perms[0][0], sigmas)
    assert before == [block.attn.processor for block in transformer.transformer_blocks]
    assert not transformer._forward_hooks


@pytest.mark.parametrize("step", ["flow_grpo_step", "dance_grpo_step"])
def test_mix_grpos_own_steps(step):
    """Its step functions, with the velocity's gradient weighted: the same values, the gradient times the weights."""
    host = pytest.importorskip("fastvideo.utils.sampling_utils", reason="MixGRPO is not installed (in no registry)")
    from star.objective import weighted_gradient

    sigmas, weights = torch.linspace(1, 0, 11), torch.rand(2, 24) + 0.5
    x, v = torch.randn(2, 24, 64), torch.randn(2, 24, 64, requires_grad=True)
    options = dict(determistic=False) if step == "flow_grpo_step" else dict(grpo=True, sde_solver=True)
    call = lambda v, prev: getattr(host, step)(v, x, 0.7, sigmas, 3, prev, **options)
    prev = call(v.detach(), None)[0]
    plain, weighted = call(v, prev)[2], call(weighted_gradient(v, weights), prev)[2]
    assert torch.equal(plain, weighted)
    (a,), (b,) = (torch.autograd.grad(out.sum(), v) for out in (plain, weighted))
    torch.testing.assert_close(b, a * weights[..., None])
