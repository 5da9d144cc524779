"""Noise at chosen locations alone: the samples, their density, and a loss that counts nothing else."""

import pytest
import torch

from builders import random_weights, small_run
from star.config import ConfigError, Loss
from star.objective import Allocation, top_locations
from star.objective.allocation import repeat_tokens
from star.rewards import Scores
from star.shapes.model import GRID, LATENT_SIZE, load_pipeline
from star.train import Trainer
from star.training.conditions import encode
from star.training.exploration import StepTensors, explore_maps, explore_masks, explored_loss, step_loss
from star.training.rollout import SamplerOptions, make_steps, sample
from star_kernels import Transition

PROMPTS = ["a red circle left of a blue square", "three green rings"]
TRAINED = (1, 2)


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def rollout(pipeline, explore=None, **options):
    groups = torch.arange(4) % 2
    return sample(
        pipeline.transformer,
        encode(pipeline, PROMPTS, 0, 1.0),
        groups,
        make_steps(pipeline, (LATENT_SIZE, LATENT_SIZE), 4, TRAINED, "flow_sde", 0.7),
        SamplerOptions((LATENT_SIZE, LATENT_SIZE), **options),
        torch.Generator().manual_seed(0),
        explore=explore,
    )


def halves(step, rows, maps):
    """The left columns of even samples, the upper rows of odd ones: of other sizes."""
    chosen = torch.zeros(len(rows), *GRID, dtype=torch.bool)
    chosen[rows % 2 == 0, :, : GRID[1] // 2] = True
    chosen[rows % 2 == 1, : GRID[0] // 3] = True
    return chosen


# --- the samples ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [None, 2])
def test_the_noise_reaches_the_chosen_tokens_and_the_others_take_the_deterministic_step(pipeline, chunk):
    everywhere, some = rollout(pipeline, chunk=chunk), rollout(pipeline, halves, chunk=chunk)
    chosen = halves(0, torch.arange(4), None)
    assert torch.equal(some.explored, chosen.expand(2, -1, -1, -1))
    noised = repeat_tokens(chosen, 2)[:, None].expand_as(some.latents)
    # Up to the first trained step the two have the same latents.
    assert torch.equal(some.samples[0], everywhere.samples[0])
    for field in ("prev_samples", "old_means"):
        assert torch.equal(getattr(some, field)[0][noised], getattr(everywhere, field)[0][noised])
    velocity = torch.cat([some.velocity(pipeline.transformer, 0, rows) for rows in torch.arange(4).split(chunk or 4)])
    size = (some.steps.sigmas[2] - some.steps.sigmas[1]).item()
    deterministic = (some.samples[0] + size * velocity.detach())[~noised]
    torch.testing.assert_close(some.prev_samples[0][~noised], deterministic)
    assert torch.equal(some.old_means[0][~noised], some.prev_samples[0][~noised])
    # The samples of a group differ at the chosen tokens alone.
    first, second = some.prev_samples[0][0], some.prev_samples[0][2]
    assert torch.equal(first[~noised[0]], second[~noised[0]]) and (first != second)[noised[0]].all()


@pytest.mark.parametrize("explore", [lambda *_: None, lambda step, rows, maps: torch.ones(len(rows), *GRID) > 0])
def test_everywhere_has_the_same_bits_whoever_says_so(pipeline, explore):
    plain, said = rollout(pipeline), rollout(pipeline, explore)
    assert torch.equal(said.latents, plain.latents) and torch.equal(said.old_means, plain.old_means)
    assert plain.explored is None and (said.explored is None or said.explored.all())


def test_the_largest_maps_are_read_before_the_noise(pipeline):
    steps = make_steps(pipeline, (LATENT_SIZE, LATENT_SIZE), 4, TRAINED, "flow_sde", 0.7)
    got = rollout(pipeline, explore_maps(Allocation(), 0.25, steps.sigmas, GRID))
    for k, step in enumerate(TRAINED):
        expected = top_locations(Allocation(), got.maps_at(step), GRID, 0.25)
        assert torch.equal(got.explored[k], expected) and expected.sum((1, 2)).tolist() == [20] * 4  # of 81
    # At noise levels outside the window the noise is everywhere.
    late = Allocation(noise_window=(0.0, float(steps.sigmas[2]) + 1e-6))
    windowed = rollout(pipeline, explore_maps(late, 0.25, steps.sigmas, GRID))
    assert windowed.explored[0].all() and not windowed.explored[1].all()
    with pytest.raises(ValueError, match="captured: the maps of step 1 were not read"):
        rollout(pipeline, explore_maps(Allocation(), 0.25, steps.sigmas, GRID), captured=())


def test_a_sample_of_which_nothing_is_said_is_noised_everywhere(pipeline):
    maps = torch.rand(3, 1, GRID[0] * GRID[1])
    maps[1] = 0.0
    sigmas = torch.linspace(1, 0, 5)
    chosen = explore_maps(Allocation(), 0.4, sigmas, GRID)(1, torch.arange(3), maps)
    assert chosen[1].all() and chosen[[0, 2]].sum((1, 2)).tolist() == [32, 32]
    masks = torch.zeros(3, 36, 36)
    masks[0, :4, :8] = 1.0
    masks[2, 17, 17] = 0.1  # one pixel is enough for its token
    chosen = explore_masks(masks, GRID)(0, torch.tensor([0, 1, 2]), None)
    assert chosen[0].nonzero().tolist() == [[0, 0], [0, 1]] and chosen[1].all() and chosen[2].sum() == 1


# --- the density and the loss -----------------------------------------------------------------------------------------


def tensors(advantages, weights, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    shape = (4, 3, 2 * GRID[0], 2 * GRID[1])
    velocity, old, x, noise = torch.randn(4, *shape, generator=generator, dtype=dtype)
    a, b, s = torch.rand(3, 4, generator=generator, dtype=dtype) + 0.2
    old = velocity + 0.02 * old
    mean = a.view(-1, 1, 1, 1) * x + b.view(-1, 1, 1, 1) * old
    after = mean + s.view(-1, 1, 1, 1) * noise
    transition = Transition.gaussian(a, b, s)
    return StepTensors(velocity.requires_grad_(), x, after, transition, advantages, weights, mean, None, None)


def by_formula(config, step, noised, old_velocity_mean):
    """Sample after sample, from the densities of the noised locations."""
    total = 0.0
    for i in range(len(noised)):
        a, b, s = (field[i] for field in step.transition[:3])
        where = noised[i]  # (H, W)
        mean = a * step.sample[i] + b * step.velocity[i]
        new, old = (
            torch.distributions.Normal(m[:, where], s).log_prob(step.prev_sample[i][:, where]).mean(0)
            for m in (mean, old_velocity_mean[i])
        )  # (L,) each
        d = new - old
        w = torch.ones_like(d) if step.weights is None else step.weights[i][where]
        w = w / w.mean()
        adv = step.advantages[i] if step.advantages.ndim == 1 else step.advantages[i][where]
        if config.ratio == "location":
            r = d.exp()
        elif config.ratio == "sample":
            r, w = (w * d).mean().exp(), torch.ones(1, dtype=d.dtype)
        else:  # the sample's ratio, with the gradient of each location
            r = d.mean().exp().detach() * (d - d.detach()).exp()
        clipped = r.clamp(1 - config.clip_range, 1 + config.clip_range)
        total = total + (w * torch.maximum(-adv * r, -adv * clipped)).mean() / len(noised)
    return total


@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
@pytest.mark.parametrize("weighted", [False, True])
def test_only_the_noised_locations_count(ratio, weighted):
    where = (4, 2 * GRID[0], 2 * GRID[1])
    advantages = torch.tensor([1.0, -0.5, 2.0, -2.0], dtype=torch.float64)
    if ratio == "location" and weighted:
        advantages = torch.randn(where, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    step = tensors(advantages, random_weights(where, torch.float64) if weighted else None)
    chosen = halves(0, torch.arange(4), None)
    chosen[3] = True  # one of them everywhere
    config = Loss(ratio=ratio, clip_range=0.01, adv_clip=5.0)
    loss, statistics = explored_loss(config, step, chosen)
    loss.backward()
    gradient, step.velocity.grad = step.velocity.grad, None
    noised = repeat_tokens(chosen, 2)
    expected = by_formula(config, step, noised, step.old_mean)
    expected.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, step.velocity.grad, rtol=1e-8, atol=1e-14)
    outside = ~noised[:, None].expand_as(gradient)
    assert (gradient[outside] == 0).all() and (gradient[~outside] != 0).any()
    # Nothing is asked of the others: not even that they are numbers.
    broken = step._replace(prev_sample=step.prev_sample.masked_fill(outside, torch.nan))
    again, seen = explored_loss(config, broken, chosen)
    assert torch.equal(again, loss) and seen.nonfinite == 0
    assert torch.equal(seen.values, statistics.values)


def test_statistics_are_those_of_the_samples_noised_locations():
    step = tensors(torch.tensor([1.0, -0.5, 2.0, -2.0], dtype=torch.float64), None)
    chosen, config = halves(0, torch.arange(4), None), Loss(clip_range=0.01)
    seen = explored_loss(config, step, chosen).statistics
    alone = []
    for i in range(4):
        rows = slice(i, i + 1)
        own = StepTensors(
            *(None if x is None else x.rows(rows) if isinstance(x, Transition) else x[rows] for x in step)
        )
        alone.append(explored_loss(config, own, chosen[rows]).statistics)
    for name in seen._fields:
        values = torch.stack([getattr(one, name) for one in alone])
        expected = {"ratio_min": values.amin(), "ratio_max": values.amax(), "nonfinite": values.sum()}
        torch.testing.assert_close(getattr(seen, name), expected.get(name, values.mean()), msg=name)
    assert seen.ratio_min < 1 < seen.ratio_max


def test_all_of_the_tokens_are_the_plain_loss_bit_for_bit():
    step = tensors(torch.tensor([1.0, -0.5, 2.0, -2.0]), random_weights((4, 18, 18)), torch.float32)
    plain, seen = step_loss(Loss(clip_range=0.01), step)
    for explored in (None, torch.ones(4, *GRID, dtype=torch.bool)):
        loss, statistics = explored_loss(Loss(clip_range=0.01), step, explored)
        assert torch.equal(loss, plain) and torch.equal(statistics.values, seen.values)


# --- runs -------------------------------------------------------------------------------------------------------------


def hidden(images, prompts, metadata):
    """The masks say nothing."""
    return Scores(images.mean((1, 2, 3)), masks=torch.zeros(len(images), *images.shape[2:]))


def blind(images, prompts, metadata):
    return Scores(images.mean((1, 2, 3)))


OPTIONS = {
    "maps": {"sampling": {"explore": "maps"}, "loss": {"kl_coef": 0.01, "advantage": "concept"}},
    "masks": {"sampling": {"explore": "masks"}, "loss": {"advantage": "location"}},
    "own starts": {"sampling": {"explore": "masks", "shared_noise": False}, "loss": {"guard": True}},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_runs_explore_on_policy_and_are_resumed_with_the_same_bits(tmp_path, name):
    def config(folder, **run):
        changes = {**OPTIONS[name], "run": run}
        changes["sampling"] = {**changes["sampling"], "images_per_prompt": 4}
        return small_run(tmp_path / folder, **changes)

    whole = Trainer(config("a"))
    first, second = whole.step(), whole.step()
    assert first["ratio_first"] == second["ratio_first"] == 1.0 and first["nonfinite"] == 0
    assert 0 < first["explored_share"] < 1
    assert max(first["grad_norm"], second["grad_norm"]) > 0  # a group may have earned the same
    if name == "maps":
        assert first["explored_share"] == pytest.approx(32 / 81)
    begun = Trainer(config("b"))
    assert begun.step()["loss"] == first["loss"]
    begun.save()
    assert Trainer(config("b", resume=True)).step()["loss"] == second["loss"]


def half_known(images, prompts, metadata):
    """It fails for every other image of a batch."""
    reward = images.mean((1, 2, 3))
    reward[::2] = torch.nan
    return Scores(reward, masks=torch.ones(len(images), *images.shape[2:]))


def test_only_the_images_that_are_trained_on_count_as_failed(tmp_path):
    """Images that are sampled first, for their masks, are no images of the iteration."""
    run = {"reward": "test_exploration:half_known"}
    metrics = Trainer(small_run(tmp_path, run=run, sampling={"explore": "masks"})).step()
    assert metrics["reward_failed"] == 4  # of two batches of 3; the first images are one more batch


def test_the_first_images_have_the_starts_of_the_others_and_cost_them_nothing(tmp_path):
    reward = {"reward": "test_exploration:hidden"}
    trainers = [
        Trainer(small_run(tmp_path / name, run=reward, sampling={"explore": name, "shared_noise": shared}))
        for name, shared in (("everywhere", True), ("masks", True))
    ]
    plain, explored = (trainer.step() for trainer in trainers)
    # Masks that say nothing: the noise is everywhere, and it is the very same noise.
    assert explored["explored_share"] == 1 and explored["loss"] == plain["loss"]
    assert explored["reward"] == plain["reward"] and explored["grad_norm"] == plain["grad_norm"]

    trainer, found = trainers[1], {}
    texts = [prompt.text for prompt in trainer.task.prompts("train", 3, "0")]

    def find(rows, latents):
        found["rows"], found["latents"] = rows, latents
        return torch.zeros(len(rows), 36, 36)

    trainer.rollout(texts, torch.Generator().manual_seed(7), find=find)
    assert len(found["rows"]) == 3  # one for each prompt
    steps = make_steps(trainer.pipeline, trainer.size, 4, (), "ode", 0.0)
    expected = sample(
        trainer.policy.transformer,
        trainer.encode(texts, 1.0),
        trainer.groups,
        steps,
        SamplerOptions(trainer.size, captured=()),
        torch.Generator().manual_seed(7),
    )
    torch.testing.assert_close(found["latents"], expected.latents[found["rows"]], rtol=1e-4, atol=1e-5)


NEEDS_MASKS = {
    "sampling.explore: got 'masks'": {"sampling": {"explore": "masks"}},
    "allocation.strategy: got 'oracle'": {"allocation": {"strategy": "oracle", "warmup": 3}},
}


@pytest.mark.parametrize("setting", NEEDS_MASKS)
def test_masks_need_a_reward_that_has_some(tmp_path, setting):
    run = {"reward": "test_exploration:blind"}
    trainer = Trainer(small_run(tmp_path, run=run, **NEEDS_MASKS[setting]))
    with pytest.raises(ConfigError, match=f"{setting}, which needs a reward with masks, not test_exploration:blind"):
        trainer.step()
