"""Flow-GRPO: its loop in small with the lines of the diff. Ones are its loss, attention changes the gradient only.

What the host holds at its commit 9745241: latents (B, T+1, C, H, W) cut in two, log_probs and advantages (B, T),
timesteps (B, T), guidance with the unconditional rows first, all samples shuffled and cut again on dimension 0.
"""

from pathlib import Path

import pytest
import torch

from builders import EPS, random_weights, scheduler, step_by_formula
from dropin import EXAMPLES, check_diff, load_example
from star.shapes.model import load_pipeline

loop = load_example("flow_grpo/loop.py")
CONFIG = loop.CONFIG


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


@pytest.fixture(scope="module")
def epoch(pipeline):
    """(samples, negative embeddings): an epoch whose policy has drifted a little since."""
    negative = loop.embed(pipeline, [""])
    samples, _ = loop.epoch_samples(pipeline, 0, negative, CONFIG)
    with torch.no_grad():
        pipeline.transformer.proj_out.weight.mul_(1.002)
    return samples, negative


def host_loss(pipeline, sample, j, negative):
    """Its loss at step j from its formulas, in float32: the velocity with guidance, the density's mean, the clip."""
    batch = len(sample["latents"])
    with torch.enable_grad():
        both = pipeline.transformer(
            hidden_states=torch.cat([sample["latents"][:, j]] * 2),
            encoder_hidden_states=torch.cat([negative[0].expand(batch, -1, -1), sample["prompt_embeds"]]),
            pooled_projections=torch.cat([negative[1].expand(batch, -1), sample["pooled_prompt_embeds"]]),
            timestep=torch.cat([sample["timesteps"][:, j]] * 2),
            return_dict=False,
        )[0]
    v = both[:batch] + CONFIG.sample.guidance_scale * (both[batch:] - both[:batch])
    sigmas = pipeline.scheduler.sigmas
    at = (sigmas[j].expand(batch), sigmas[j + 1].expand(batch), sigmas[1].item())
    x, prev = sample["latents"][:, j], sample["next_latents"][:, j]
    log_prob, _, _ = step_by_formula(*at, v, x, CONFIG.sample.noise_level, "sde", prev)
    r = (log_prob - sample["log_probs"][:, j]).exp()
    a = sample["advantages"][:, j].clamp(-5, 5)
    return -torch.minimum(a * r, a * r.clamp(1 - CONFIG.train.clip_range, 1 + CONFIG.train.clip_range)).mean(), v


def gradients(loss, pipeline):
    return torch.autograd.grad(loss, list(pipeline.transformer.parameters()), allow_unused=True)


def test_the_diff_is_short_and_runs_in_the_example():
    added = check_diff("flow_grpo/sd3.diff", "flow_grpo/loop.py")
    assert 'weights=sample["weights"][:, j],' in added


@pytest.mark.parametrize(
    ("page", "source"),
    [
        ("flow_grpo.md", "flow_grpo/sd3.diff"),
        ("dance_and_mix_grpo.md", "dance_grpo/star.diff"),
        ("dance_and_mix_grpo.md", "mix_grpo/star.diff"),
        ("flow_factory.md", "flow_factory/star_adapter.py"),
        ("verl_omni.md", "verl_omni/verl_star.py"),
        ("unirl.md", "unirl/star.diff"),
    ],
)
def test_the_pages_show_what_the_examples_run(page, source):
    text = (EXAMPLES.parent / "docs" / page).read_text()
    shown = [block.split("```")[0].splitlines() for block in text.split("```diff\n")[1:]]
    lines = (EXAMPLES / source).read_text().splitlines()
    if source.endswith(".py"):
        expected = [f"+++ {Path(source).name}", *(f"+{line}" for line in lines)]
    else:
        expected = [line for line in lines if not line.startswith(("diff --git", "index "))]
    assert expected in shown
    assert text.index("pip install") < text.index("```diff") < 400  # the page's first lines


def test_what_is_stored(pipeline, epoch):
    samples, _ = epoch
    size = CONFIG.resolution // 2
    assert samples["weights"].shape == (8, 6, size, size) and samples["weights"].dtype == torch.float32
    assert samples["latents"].shape == samples["next_latents"].shape == (8, 6, 4, size, size)
    assert samples["log_probs"].shape == samples["advantages"].shape == samples["timesteps"].shape == (8, 6)
    torch.testing.assert_close(samples["weights"].mean((2, 3)), torch.ones(8, 6), rtol=1e-5, atol=0)
    assert (samples["weights"][:, 0] != samples["weights"][:, 3]).any()


@pytest.mark.parametrize("weights", [None, "ones"])
def test_uniform_weights_are_the_hosts_loss(pipeline, epoch, weights):
    samples, negative = epoch
    sample = {k: v[:4] for k, v in samples.items()}
    shape = sample["weights"].shape
    # None: every entry of the dict is indexed, so the host's dict without the diff has no such key.
    sample["weights"] = torch.ones(shape) if weights == "ones" else Nothing()
    for j in (0, 2):
        loss, ratio = loop.loss_of(pipeline, sample, j, negative, CONFIG)
        expected, _ = host_loss(pipeline, sample, j, negative)
        assert (ratio != 1).any()
        # Log-probs of order one in float32, times an advantage of order one.
        torch.testing.assert_close(loss, expected, rtol=0, atol=64 * EPS)
        peak = 0.0
        for got, want in zip(gradients(loss, pipeline), gradients(expected, pipeline), strict=True):
            if want is not None:
                peak = max(peak, want.abs().max().item())
                torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4 * max(want.abs().max().item(), 1e-6))
        assert peak > 0


class Nothing:
    """Indexed like a tensor, gives None: the weights of a trainer that has none."""

    def __getitem__(self, index):
        return None


def test_attention_weights_change_the_gradient_and_nothing_else(pipeline, epoch):
    samples, negative = epoch
    sample = {k: v[:4] for k, v in samples.items()}
    off = sample | {"weights": Nothing()}
    on_loss, on_ratio = loop.loss_of(pipeline, sample, 1, negative, CONFIG)
    off_loss, off_ratio = loop.loss_of(pipeline, off, 1, negative, CONFIG)
    assert torch.equal(on_loss, off_loss) and torch.equal(on_ratio, off_ratio)
    on, plain = gradients(on_loss, pipeline), gradients(off_loss, pipeline)
    assert any(a is not None and not torch.allclose(a, b, rtol=1e-2) for a, b in zip(on, plain, strict=True))


def test_recording_changes_no_bit_of_the_rollout(pipeline):
    negative = loop.embed(pipeline, [""])
    prompts = ["a red circle", "two green rings"]
    run = lambda: loop.rollout(pipeline, prompts, negative, CONFIG, torch.Generator().manual_seed(7))[0]
    with_maps = run()
    args = (*loop.embed(pipeline, prompts), *(e.expand(2, *e.shape[1:]) for e in negative), CONFIG)
    with torch.no_grad():
        _, latents, log_probs = loop.pipeline_with_logprob(pipeline, *args, torch.Generator().manual_seed(7))
    assert torch.equal(with_maps["next_latents"], torch.stack(latents[1:], 1))
    assert torch.equal(with_maps["log_probs"], torch.stack(log_probs, 1))


def test_the_ratio_is_exactly_one_before_the_first_update(pipeline):
    negative = loop.embed(pipeline, [""])
    samples, _ = loop.epoch_samples(pipeline, 1, negative, CONFIG)
    # The same rows in the same batch as in the rollout: another order or size may change the last bit of a product.
    _, ratio = loop.loss_of(pipeline, {k: v[:4] for k, v in samples.items()}, 0, negative, CONFIG)
    torch.testing.assert_close(ratio, torch.ones(4), rtol=0, atol=64 * EPS)


@pytest.mark.parametrize("sde_type", ["sde", "cps"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_hosts_own_function_has_the_same_bits(sde_type, dtype):
    host = pytest.importorskip(
        "flow_grpo.diffusers_patch.sd3_sde_with_logprob", reason="flow_grpo is not installed (it is in no registry)"
    ).sde_step_with_logprob
    plan, options = scheduler(), dict(sde_type=sde_type, return_sqrt_dt=True)
    for shape in ((2, 16, 64, 64), (3, 4, 6, 8)):
        for i in range(10):
            v, x, t = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), plan.timesteps[i : i + 1]
            results = [f(plan, v, t, x, generator=torch.Generator().manual_seed(i), **options)
                       for f in (host, loop.sde_step_with_logprob)]  # fmt: skip
            assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(*results, strict=True))
            new = (v.float() + 0.01 * torch.randn(shape)).requires_grad_()
            ones = random_weights((shape[0], *shape[2:])).fill_(1)
            steps = [
                host(plan, new, t.expand(shape[0]), x, prev_sample=results[0][0], **options),
                loop.sde_step_with_logprob(
                    plan, new, t.expand(shape[0]), x, prev_sample=results[0][0], weights=ones, **options
                ),
            ]
            assert torch.equal(steps[0][1], steps[1][1])
            assert torch.equal(*(torch.autograd.grad(step[1].sum(), new)[0] for step in steps))
