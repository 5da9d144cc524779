"""A reward that says where: the left half is wrong, the right half is fine, and only the left half is held against."""

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from builders import small_run
from star.config import ConfigError, Loss
from star.rewards import Scores, Weighted
from star.shapes.model import LATENT_SIZE, load_pipeline
from star.shapes.reward import shapes_reward
from star.shapes.scenes import Scene, Things, parse_scene, render
from star.train import Trainer
from star.training.advantage import compute_advantages, group_advantages, location_advantages
from star.training.conditions import encode
from star.training.pipeline import make_trainable
from star.training.rollout import make_steps, predict_velocity
from star_kernels import gaussian_step, policy_loss

PROMPT = "a red circle left of a blue square"
BATCH, STEP = 8, 2


# Seed 65 puts the first object into the left column and the second into the right one.
def drawn(*things, relation="left of", seed=65):
    return render(Scene(things, relation), random.Random(seed))


def scored(*images, prompt=PROMPT):
    pictures = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    return pictures, shapes_reward(pictures, [prompt] * len(images), [{}] * len(images))


def test_places_earn_what_the_nearest_object_earns():
    right, _ = drawn(Things("red", "circle"), Things("blue", "square"))
    wrong, masks = drawn(Things("green", "circle"), Things("blue", "square"))
    _, scores = scored(right, wrong)
    assert scores.details["strict"].tolist() == [1, 0] and (scores.reward_map[0] == 1).all()
    assert (scores.reward_map[1, :, :12] == 0).all() and (scores.reward_map[1, :, 24:] == 1).all()
    assert set(scores.reward_map[1][torch.from_numpy(masks[0]) > 0.9].tolist()) == {0.0}


def test_objects_of_one_group_earn_what_each_of_them_is_worth():
    mixed, masks = drawn(Things("red", "circle", 2), Things("red", "square"), relation=None)
    surplus, more = drawn(Things("red", "circle", 3), Things("red", "circle"), relation=None)
    _, scores = scored(mixed, surplus, prompt="three red circles")
    inside = [set(scores.reward_map[0][torch.from_numpy(mask) > 0.9].tolist()) for mask in masks]
    assert inside[0] == inside[1] == {1.0} and len(inside[2]) == 1 and 0 < min(inside[2]) < scores.reward[0] < 1
    objects = torch.from_numpy(more.max(0)) > 0.9
    assert sorted(set(scores.reward_map[1][objects].tolist())) == [0.0, 1.0]  # one of four is one too many


def test_nobody_is_to_blame_for_what_is_missing_and_all_are_for_a_wrong_relation():
    alone, masks = drawn(Things("blue", "square"), relation=None)
    _, scores = scored(alone)
    there = torch.from_numpy(masks[0]) > 0.9
    assert (scores.reward_map[0][there] == 1).all()
    assert (scores.reward_map[0, :2] == scores.reward[0]).all() and scores.reward[0] < 1
    swapped, _ = drawn(Things("blue", "square"), Things("red", "circle"))
    _, scores = scored(swapped)
    torch.testing.assert_close(scores.reward_map[0], scores.reward[0].expand(36, 36))
    empty = np.full_like(alone, 0.45)
    assert (scored(empty)[1].reward_map == scored(empty)[1].reward[0]).all()


@pytest.fixture(scope="module")
def case():
    """Four right and four wrong pictures of one prompt as latents, with their rewards."""
    assert parse_scene(PROMPT).things == (Things("red", "circle"), Things("blue", "square"))
    right, _ = drawn(Things("red", "circle"), Things("blue", "square"))
    wrong, _ = drawn(Things("green", "circle"), Things("blue", "square"))
    pictures, scores = scored(*[wrong, right] * (BATCH // 2))
    vae = load_pipeline().vae
    with torch.no_grad():
        encoded = vae.encode(pictures * 2 - 1).latent_dist.mean
    return (encoded - vae.config.shift_factor) * vae.config.scaling_factor, scores


def advantages(scores, size, local):
    groups = torch.zeros(BATCH, dtype=torch.int64)
    if not local:
        return group_advantages(scores.reward, groups)
    return location_advantages(F.adaptive_avg_pool2d(scores.reward_map[:, None], size)[:, 0], groups)


def test_the_wrong_half_is_disadvantaged_and_the_other_is_not(case):
    latents, scores = case
    got = advantages(scores, latents.shape[-2:], local=True)
    half = latents.shape[-1] // 2
    assert (got[::2, :, :half] < 0).all() and (got[1::2, :, :half] > 0).all()
    assert (got[:, :, half:] == 0).all()
    assert (advantages(scores, None, local=False)[::2] < 0).all()  # one number blames both halves


def halves(case, tmp_path, local):
    """Of the wrong pictures, left and right: |gradient| by the velocity, and how one small step of gradient descent on
    all weights changes the log-probability of what was sampled."""
    latents, scores = case
    pipeline = load_pipeline()
    parameters = make_trainable(pipeline, small_run(tmp_path, model={"lora_rank": 0}))
    conditions = encode(pipeline, [PROMPT], 0, 1.0).rows(torch.zeros(BATCH, dtype=torch.int64))
    steps = make_steps(pipeline, (LATENT_SIZE, LATENT_SIZE), 8, (STEP,), "flow_sde", 0.7)
    transition = steps.transitions.rows(slice(STEP, STEP + 1)).expand(BATCH)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, *latents.shape, generator=generator)
    x = torch.lerp(latents, noise[0], float(steps.sigmas[STEP]))

    def velocity():
        return predict_velocity(pipeline.transformer, x, steps.timesteps[STEP], conditions, 1.0)

    before = velocity()
    before.retain_grad()
    after, mean = gaussian_step(x, before.detach(), noise[1], transition)
    loss, _ = policy_loss(
        before, x, after, transition, advantages(scores, latents.shape[-2:], local), old_mean=mean, clip_range=2e-3
    )
    loss.backward()
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / norm
        b, s = (value.view(-1, 1, 1, 1) for value in (transition.b, transition.s))
        change = ((after - mean) * b * (velocity() - before) / s**2).mean(1)  # (B, H, W), to first order
    wrong = [before.grad[::2].abs().mean(1), change[::2]]
    half = latents.shape[-1] // 2
    return [(value[..., :half].mean().item(), value[..., half:].mean().item()) for value in wrong]


def test_an_update_unlearns_the_wrong_half_alone(case, tmp_path):
    gradient, change = halves(case, tmp_path / "a", local=True)
    assert gradient[0] > 0 == gradient[1]
    # All places share the weights, yet what was sampled gets less likely on the left and stays as it was on the right.
    assert change[0] < 0 and abs(change[1]) < 0.1 * abs(change[0])
    gradient, change = halves(case, tmp_path / "b", local=False)
    assert gradient[1] > 0.5 * gradient[0] and change[1] < 0.5 * change[0] < 0  # one number for both halves


WORLD = "star.shapes.reward:shapes_reward"


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


def test_where_a_map_says_nothing_a_location_earned_what_the_image_earned():
    """NaN anywhere used to leave the whole image without an advantage, and nobody was told."""
    groups, config = torch.arange(4) % 2, Loss(advantage="location")
    known = torch.rand(4, 6, 6, generator=torch.Generator().manual_seed(0))
    reward = torch.tensor([0.1, 0.7, 0.4, math.nan])
    silent = known.clone()
    silent[:, :, :2], silent[0, 5, 5] = math.nan, math.inf
    known[:, :, :2], known[0, 5, 5] = reward.view(-1, 1, 1), reward[0]
    expected, found = (
        compute_advantages(Scores(reward, reward_map=field), groups, config, {}, (3, 3)) for field in (known, silent)
    )
    assert torch.equal(found, expected) and (found[:3:2] != 0).any()
    assert (found[3] == 0).all()  # its reward failed
    images = torch.rand(4, 3, 6, 6)
    both = Weighted(
        {"where": lambda *_: Scores(reward, reward_map=silent), "what": lambda *_: reward},
        {"where": 2.0, "what": 1.0},
    )
    torch.testing.assert_close(both(images, [""] * 4).reward_map[:3], 2 * known[:3] + reward[:3].view(-1, 1, 1))


def test_runs_with_advantages_of_places_and_with_normalized_rewards(tmp_path):
    metrics = Trainer(small_run(tmp_path / "a", loss={"advantage": "location"})).step()
    assert metrics["grad_norm"] > 0 and metrics["nonfinite"] == 0
    several = {"reward": {WORLD: 1.0, "test_location_rewards:bright": 0.5}}
    metrics = Trainer(small_run(tmp_path / "b", loss={"normalize_rewards": True}, run=several)).step()
    assert metrics["grad_norm"] > 0
    weighted = metrics[f"reward_{WORLD}"] + 0.5 * metrics["reward_test_location_rewards:bright"]
    assert metrics["reward"] == pytest.approx(weighted, rel=1e-5)
    blind = {"reward": "test_location_rewards:bright"}
    with pytest.raises(ConfigError, match=r"loss.advantage: 'location' needs a reward that localizes, not"):
        Trainer(small_run(tmp_path / "c", loss={"advantage": "location"}, run=blind)).step()
    with pytest.raises(
        ConfigError, match=r"loss.normalize_rewards: got True, expected False with loss.advantage 'location'"
    ):
        Trainer(small_run(tmp_path / "d", loss={"advantage": "location", "normalize_rewards": True}))
