"""Flow-Factory: its update through an adapter of fourteen lines, over the host's adapter where it is importable.

What the host holds at its commit a0b2bc5: latents in the storage type at the trained steps with an index map,
log_probs of the stored values, (lower, upper) clip ranges, the whole batch (prompts too) handed to `adapter.forward`.
"""

import pytest
import torch

from builders import EPS, step_by_formula
from dropin import EXAMPLES, MOST_LINES, gradient, load_example
from star.capture import capture
from star.concepts import concept_tokens
from star.shapes.model import GRID
from star_kernels import allocate

loop = load_example("flow_factory/loop.py")


@pytest.fixture(scope="module")
def rolled():
    """The adapter, drifted a little since the rollout, and the batch in bfloat16 storage."""
    torch.manual_seed(0)
    adapter = loop.make_adapter()
    batch = loop.rollout(adapter, torch.Generator().manual_seed(0), torch.bfloat16)
    on_policy = [loop.loss_of(adapter, batch, i)[1].detach() for i in loop.TRAINED]
    with torch.no_grad():
        adapter.transformer.proj_out.weight.mul_(1.002)
    return adapter, batch, on_policy


def host_loss(adapter, batch, i):
    """The trainer's loss from its formulas, without weights; and the guided velocity's pass."""
    index, count = batch["latent_index_map"], len(batch["prompt"])
    x, prev = (batch["all_latents"][:, index[k]].float() for k in (i, i + 1))
    both = adapter.pipeline.transformer(
        hidden_states=torch.cat([x, x]),
        encoder_hidden_states=torch.cat([batch["negative_prompt_embeds"], batch["prompt_embeds"]]),
        pooled_projections=torch.cat([batch["negative_pooled_prompt_embeds"], batch["pooled_prompt_embeds"]]),
        timestep=batch["timesteps"][:, i].repeat(2),
        return_dict=False,
    )[0]
    v = both[:count] + loop.GUIDANCE * (both[count:] - both[:count])
    sigmas = adapter.scheduler.sigmas
    at = (sigmas[i].expand(count), sigmas[i + 1].expand(count), sigmas[1].item())
    log_prob, _, _ = step_by_formula(*at, v, x, 0.7, "sde", prev)
    r = (log_prob - batch["log_probs"][:, batch["log_prob_index_map"][i]]).exp()
    a = batch["advantage"].clamp(-5, 5)
    return torch.maximum(-a * r, -a * r.clamp(1 - 1e-4, 1 + 1e-4)).mean(), r, v


def test_the_adapter_is_short():
    lines = (EXAMPLES / "flow_factory/star_adapter.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= MOST_LINES


def test_it_is_on_policy_before_the_update(rolled):
    _, batch, on_policy = rolled
    assert batch["all_latents"].dtype == torch.bfloat16 and batch["all_latents"].shape[1] == 3
    for ratio in on_policy:
        torch.testing.assert_close(ratio, torch.ones(6), rtol=0, atol=8 * EPS)


def test_values_are_the_hosts_and_the_gradient_is_the_weighted_one(rolled):
    adapter, batch, _ = rolled
    changed = False
    for i in loop.TRAINED:
        loss, ratio = loop.loss_of(adapter, batch, i)
        plain, r, v = host_loss(adapter, batch, i)
        assert (r != 1).any()
        torch.testing.assert_close(ratio, r, rtol=0, atol=128 * EPS)
        torch.testing.assert_close(loss, plain, rtol=0, atol=256 * EPS)
        tokens = concept_tokens(adapter.pipeline, batch["prompt"])
        x = batch["all_latents"][:, batch["latent_index_map"][i]].float()
        with torch.no_grad(), capture(adapter.pipeline.transformer, tokens, grid=GRID, rows=slice(6, 12)) as maps:
            adapter.pipeline.transformer(
                hidden_states=torch.cat([x, x]),
                encoder_hidden_states=torch.cat([batch["negative_prompt_embeds"], batch["prompt_embeds"]]),
                pooled_projections=torch.cat([batch["negative_pooled_prompt_embeds"], batch["pooled_prompt_embeds"]]),
                timestep=batch["timesteps"][:, i].repeat(2),
            )
        (of_velocity,) = torch.autograd.grad(plain, v, retain_graph=True)
        expected = gradient(
            (v * (of_velocity * allocate(maps.read(), GRID)[:, None]).detach()).sum(), adapter.transformer
        )
        unweighted = gradient(host_loss(adapter, batch, i)[0], adapter.transformer)
        got = gradient(loss, adapter.transformer)
        peak = unweighted.abs().max().item()
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * peak)
        changed |= not torch.allclose(got, unweighted, rtol=0, atol=0.02 * peak)
    assert changed


def test_prompts_without_concepts_give_the_hosts_gradient(rolled):
    adapter, batch, _ = rolled
    loss = loop.loss_of(adapter, batch | {"prompt": ["of and"] * 6}, loop.TRAINED[0])[0]
    plain = host_loss(adapter, batch, loop.TRAINED[0])[0]
    got, expected = gradient(loss, adapter.transformer), gradient(plain, adapter.transformer)
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
