"""verl-omni: its actor update through an adapter of thirteen lines, guidance in two passes, its loss untouched.

What the host holds at its commit a1139ba: a window of the trajectory (B, S+1, C, H, W), timesteps and advantages
(B, S), old_log_probs of a pass of its own, padded prompt ids, the negative prompt in a second forward pass.
"""

import pytest
import torch

from builders import EPS, step_by_formula
from dropin import EXAMPLES, MOST_LINES, gradient, load_example
from star.capture import capture
from star.concepts import locate
from star.shapes.model import GRID, load_pipeline
from star_kernels import allocate

loop = load_example("verl_omni/loop.py")


@pytest.fixture(scope="module", params=[("sde", 2.0), ("cps", 1.0)], ids=["sde guided", "cps"])
def rolled(request):
    sde_type, guidance_scale = request.param
    pipeline = load_pipeline()
    scheduler = loop.Scheduler.from_config(pipeline.scheduler.config)
    config = loop.make_config(pipeline, guidance_scale, sde_type)
    data = loop.rollout(pipeline, scheduler, config, torch.Generator().manual_seed(0))
    adapter = loop.load_adapter()
    with torch.no_grad():
        old = [loop.log_probs(adapter, pipeline, scheduler, config, data, step) for step in range(2)]
        pipeline.transformer.proj_out.weight.mul_(1.002)
    data["old_log_probs"] = torch.stack(old, 1)
    return adapter, pipeline, scheduler, config, data


def test_the_adapter_is_short():
    lines = (EXAMPLES / "verl_omni/verl_star.py").read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= MOST_LINES


def test_the_log_probs_are_the_hosts_and_the_gradient_is_the_weighted_one(rolled):
    adapter, pipeline, scheduler, config, data = rolled
    step, index, transformer = 1, loop.WINDOW[1], pipeline.transformer
    x, prev = data["all_latents"][:, step], data["all_latents"][:, step + 1]
    text = [p for p in loop.PROMPTS for _ in range(loop.GROUP)]
    tokens = locate(text, pipeline.tokenizer)
    positive, negative = loop.model_inputs(data, step)
    with capture(transformer, tokens, grid=GRID) as maps:
        v = transformer(**positive)[0]
    if config.pipeline.guidance_scale > 1:
        uncond = transformer(**negative)[0]
        v = uncond + config.pipeline.guidance_scale * (v - uncond)
    sigmas = (scheduler.sigmas[index].expand(6), scheduler.sigmas[index + 1].expand(6), scheduler.sigmas[1].item())
    expected, mean, _ = step_by_formula(*sigmas, v, x, 0.7, config.algo.sde_type, prev)
    result = adapter.forward_and_sample_previous_step(transformer, scheduler, config, positive, negative, data, step)
    torch.testing.assert_close(result[0], expected, rtol=0, atol=128 * EPS)
    torch.testing.assert_close(result[1], mean, rtol=0, atol=32 * EPS)
    loss, ratio = loop.loss_of(result[0], data, step, config)
    plain, r = loop.loss_of(expected, data, step, config)
    assert (r != 1).any()
    torch.testing.assert_close(ratio, r, rtol=0, atol=256 * EPS)
    torch.testing.assert_close(loss, plain, rtol=0, atol=512 * EPS)
    (of_velocity,) = torch.autograd.grad(plain, v, retain_graph=True)
    weighted = (v * (of_velocity * allocate(maps.read(), GRID)[:, None]).detach()).sum()
    got, want, unweighted = (gradient(value, transformer) for value in (loss, weighted, plain))
    peak = unweighted.abs().max().item()
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3 * peak)
    assert not torch.allclose(got, unweighted, rtol=0, atol=0.02 * peak)


def test_prompts_without_concepts_give_the_hosts_gradient(rolled):
    adapter, pipeline, scheduler, config, data = rolled
    silent = pipeline.tokenizer(["of and"] * 6, padding="max_length", max_length=16, return_tensors="pt").input_ids
    gradients = []
    for chosen, prompts in ((adapter, silent), (loop.StandIn, data["prompts"])):
        log_prob = loop.log_probs(chosen, pipeline, scheduler, config, data | {"prompts": prompts}, 0)
        gradients.append(gradient(loop.loss_of(log_prob, data, 0, config)[0], pipeline.transformer))
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4 * gradients[1].abs().max().item())
