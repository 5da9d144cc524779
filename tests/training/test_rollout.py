"""Rollouts of the embedded model: what is stored, what is shared, and that a seed says everything."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch

from builders import plain_images
from star.shapes.measure import STEPS
from star.shapes.model import GRID, LATENT_SIZE, load_pipeline
from star.training.conditions import encode
from star.training.rollout import SamplerOptions, decode, make_steps, predict_velocity, sample
from star_kernels import gaussian_step

PROMPTS = ["a red circle left of a blue square", "three green rings", "of and"]


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def rollout(
    pipeline,
    guidance_scale=1.0,
    seed=0,
    trained=(1, 2),
    steps=4,
    repeats=2,
    rows=None,
    merged=nullcontext,
    finished=None,
    **options,
):
    conditions = encode(pipeline, PROMPTS, 0, guidance_scale)
    groups = torch.arange(repeats * len(PROMPTS)) % len(PROMPTS)
    return sample(
        pipeline.transformer,
        conditions,
        groups,
        make_steps(pipeline, (LATENT_SIZE, LATENT_SIZE), steps, trained, "flow_sde" if trained else "ode", 0.7),
        SamplerOptions((LATENT_SIZE, LATENT_SIZE), guidance_scale, **options),
        torch.Generator().manual_seed(seed),
        rows=rows,
        merged=merged,
        finished=finished,
    )


def test_shapes_and_seeds(pipeline):
    first, again, other = rollout(pipeline), rollout(pipeline), rollout(pipeline, seed=1)
    assert (
        first.samples.shape == first.prev_samples.shape == first.old_means.shape == (2, 6, 4, LATENT_SIZE, LATENT_SIZE)
    )
    assert first.maps.shape == (2, 6, 2, GRID[0] * GRID[1]) and first.grid == GRID
    assert torch.equal(first.latents, again.latents) and torch.equal(first.maps, again.maps)
    assert not torch.equal(first.latents, other.latents)
    assert torch.equal(first.prev_samples[0], first.samples[1])
    images = decode(pipeline, first.latents, 4)
    assert images.shape == (6, 3, 36, 36) and images.min() >= 0 and images.max() <= 1


@pytest.mark.parametrize("shared_noise", [True, False])
def test_noise_drawn_on_the_device(pipeline, shared_noise):
    options = dict(shared_noise=shared_noise, noise_on_cpu=False, steps=6, trained=(1, 2, 3, 4))
    whole, again, other = (rollout(pipeline, seed=seed, **options) for seed in (3, 3, 4))
    assert torch.equal(whole.latents, again.latents) and not torch.equal(whole.latents, other.latents)
    assert not torch.equal(whole.latents, rollout(pipeline, seed=3, **options | {"noise_on_cpu": True}).latents)
    rows = torch.tensor([1, 4])  # as one process of several makes them
    part = rollout(pipeline, seed=3, rows=rows, **options)
    drawn = [x.prev_samples - x.old_means for x in (part, whole)]
    torch.testing.assert_close(drawn[0], drawn[1][:, rows], rtol=0, atol=1e-5)
    torch.testing.assert_close(part.latents, whole.latents[rows], rtol=1e-3, atol=1e-3)
    s = whole.steps.transitions.rows(torch.tensor(whole.steps.trained)).s.view(-1, 1, 1, 1, 1)
    noise = (whole.prev_samples - whole.old_means) / s  # some thousand of them
    assert abs(noise.mean()) < 0.06 and abs(noise.std() - 1) < 0.06


def test_a_group_shares_its_latents_until_the_first_trained_step(pipeline):
    shared = rollout(pipeline)
    assert torch.equal(shared.samples[0, :3], shared.samples[0, 3:])
    assert not torch.equal(shared.samples[1, :3], shared.samples[1, 3:])
    own = rollout(pipeline, shared_noise=False)
    assert not torch.equal(own.samples[0, :3], own.samples[0, 3:])


def rows_per_pass(pipeline, run):
    """Batch sizes of the transformer's forward passes during run()."""
    seen = []
    handle = pipeline.transformer.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        return run(), seen
    finally:
        handle.remove()


def test_one_pass_per_prompt_serves_the_group_until_its_samples_part(pipeline):
    result, seen = rows_per_pass(pipeline, lambda: rollout(pipeline, chunk=3, captured=()))
    assert result.shared == 2
    assert seen == [3, 3, 3, 3, 3, 3, 3]  # step 0 once for all, then two chunks of three prompts
    _, seen = rows_per_pass(pipeline, lambda: rollout(pipeline, repeats=4, captured=()))
    assert seen == [3, 3, 12, 12]
    _, seen = rows_per_pass(pipeline, lambda: rollout(pipeline, repeats=4, captured=(), shared_noise=False))
    assert seen == [12] * 4
    _, seen = rows_per_pass(pipeline, lambda: rollout(pipeline, repeats=4, trained=(), captured=()))
    assert seen == [3] * 4


@pytest.mark.parametrize("chunk", [None, 3, 4])
@pytest.mark.parametrize("shared_noise", [True, False])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_update_meets_the_very_bits_of_the_rollout(pipeline, chunk, shared_noise, guidance_scale):
    options = dict(chunk=chunk, shared_noise=shared_noise, repeats=4, guidance_scale=guidance_scale)
    result = rollout(pipeline, **options)
    for rows in torch.arange(12).split(chunk or 12):
        for k, step in enumerate(result.steps.trained):
            with torch.no_grad():
                velocity = result.velocity(pipeline.transformer, k, rows)
            transition = result.steps.transitions.rows(slice(step, step + 1)).expand(len(rows))
            _, mean = gaussian_step(result.samples[k, rows], velocity, torch.zeros_like(velocity), transition)
            assert torch.equal(mean, result.old_means[k, rows])


def test_a_shared_pass_has_the_gradient_of_separate_ones(pipeline):
    result = rollout(pipeline, repeats=3)
    parameter = pipeline.transformer.transformer_blocks[1].attn.to_q.weight
    direction = torch.randn(result.latents.shape, generator=torch.Generator().manual_seed(1))
    gradients = []
    for shared in (result.shared, 0):
        one = dataclasses.replace(result, shared=shared)
        velocity = one.velocity(pipeline.transformer, 0, torch.arange(9))
        gradients.append(torch.autograd.grad((velocity * direction).sum(), parameter)[0])
    size = gradients[1].abs().max().item()  # sums over some thousand float32 terms
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=1e-4 * size)


def test_without_noise_it_is_the_plain_pipeline(pipeline):
    generator = torch.Generator().manual_seed(5)
    own = rollout(pipeline, seed=5, trained=(), steps=STEPS, repeats=1, shared_noise=False)
    expected = plain_images(pipeline, PROMPTS, 5)
    assert generator.initial_seed() == 5
    torch.testing.assert_close(decode(pipeline, own.latents), expected, rtol=0, atol=1e-4)


def test_guidance(pipeline):
    guided = rollout(pipeline, guidance_scale=3.0)
    conditions = guided.conditions.rows(guided.groups)
    latents, timestep = guided.samples[0], guided.steps.timesteps[1]

    def plain(embeds, pooled):
        return pipeline.transformer(latents, embeds, pooled, timestep.expand(6), return_dict=False)[0]

    with torch.no_grad():
        got = predict_velocity(pipeline.transformer, latents, timestep, conditions, 3.0)
        yes = plain(conditions.text.embeds, conditions.text.pooled)
        no = plain(conditions.negative.embeds.expand(6, -1, -1), conditions.negative.pooled.expand(6, -1))
    torch.testing.assert_close(got, no + 3 * (yes - no), rtol=1e-4, atol=1e-4)
    # Maps are of the conditional half: the same as without guidance at the same latents.
    unguided = rollout(pipeline, guidance_scale=1.0)
    assert guided.maps.shape == unguided.maps.shape
    torch.testing.assert_close(guided.maps[0, :3], guided.maps[0, 3:], rtol=1e-3, atol=1e-6)


def test_a_prompt_without_concepts_has_empty_maps(pipeline):
    maps = rollout(pipeline).maps
    assert (maps[:, 2::3] == 0).all() and (maps[:, 0::3] > 0).all()


def test_chunks_do_not_change_what_is_sampled(pipeline):
    whole, cut = rollout(pipeline), rollout(pipeline, chunk=3)
    torch.testing.assert_close(whole.latents, cut.latents, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(whole.maps, cut.maps, rtol=1e-3, atol=1e-5)


def test_what_is_finished_is_told_chunk_by_chunk(pipeline):
    told = []
    result = rollout(pipeline, chunk=4, finished=lambda rows, latents: told.append((rows, latents.clone())))
    assert [len(rows) for rows, _ in told] == [4, 2]
    for rows, latents in told:
        assert torch.equal(result.latents[rows], latents)


def test_captured_steps_can_be_all_or_none(pipeline):
    assert rollout(pipeline, captured=()).maps is None
    assert rollout(pipeline, captured=range(4)).maps.shape[0] == 4
