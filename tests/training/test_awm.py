"""Advantage Weighted Matching in the loop: the published loss, who samples, how the noise levels are drawn."""

import random
from contextlib import nullcontext

import pytest
import torch

from builders import small_run
from star.config import ConfigError
from star.presets import preset
from star.reports.metrics import meaning
from star.train import Trainer
from star.training import plan as planning
from star.training.awm import levels
from star.training.rollout import predict_velocity

AWM = {
    "sampling": {"trained_steps": [0, 1, 2, 3], "shared_noise": False},
    "loss": {"objective": "awm", "noise_levels": 2, "global_std": True, "old_decay_rate": 0.3},
    "optimization": {"updates_per_iteration": 1},
}
PROMPTS = ["red circle", "two blue squares", "green ring"]


def awm_run(out, **changes):
    merged = {name: AWM.get(name, {}) | changes.get(name, {}) for name in {*AWM, *changes}}
    return small_run(out, **merged)


def parameters(trainer):
    return [p.detach().clone() for p in trainer.policy.parameters.values()]


def moved(trainer):
    """The trainer, with an old policy that differs from the policy."""
    with torch.no_grad():
        for p in trainer.policy.parameters.values():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    return trainer


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": {"strategy": "uniform"}, "loss": {"kl_coef": 0.3}},
        {"allocation": {"strategy": "uniform"}, "loss": {"off_policy": True, "clip_range": 1.0, "old_kl_coef": 0.0}},
        {"loss": {"off_policy": True, "clip_range": 1.0, "advantage": "location"}},
    ],
    ids=["on-policy", "off-policy", "locations"],
)
def test_the_loss_is_the_published_one(tmp_path, changes):
    """Written again here from scripts/train_sd3_awm.py, in float64 where it adds up."""
    trainer = moved(Trainer(awm_run(tmp_path, **changes)))
    rollout = trainer.rollout(PROMPTS, torch.Generator().manual_seed(0))
    shape = (6, 18, 18) if trainer.config.loss.advantage == "location" else (6,)
    advantages = 8 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    objective, rows, config = trainer.objective, torch.arange(3), trainer.config.loss
    got = objective.loss(rollout, 1, rows, objective.credit(rollout, advantages, None, torch.Generator(), 5))

    steps, noise = objective.draw(1, rows, rollout.latents[rows])
    x0, t = rollout.latents[rows], rollout.steps.sigmas[steps].float()
    xt = (1 - t.view(-1, 1, 1, 1)) * x0 + t.view(-1, 1, 1, 1) * noise
    conditions = rollout.conditions.rows(rollout.groups[rows])

    def forward():
        return predict_velocity(trainer.policy.bare, xt, rollout.steps.timesteps[steps], conditions, 1.0)

    def log_prob(prediction):
        error = ((prediction.double() - (noise.double() - x0.double())) ** 2).mean((1, 2, 3))
        return -(torch.pow(error + 1e-10, 0.25) - 1e-10**0.25) * t.double() / 0.25

    prediction = forward()
    with trainer.policy.old(), torch.no_grad():
        old = forward()
    assert not torch.equal(old, prediction)
    log_ratio = log_prob(prediction) - log_prob(old if config.off_policy else prediction.detach())
    a = advantages[rows].double().clamp(-5, 5) / 5
    if got.weights is None:
        r = torch.exp(log_ratio)
        expected = torch.maximum(-a * r, -a * r.clamp(0, 2)).mean()
    else:  # the sample's ratio, with the gradient of each location's part of its error, both times the weight
        r = torch.exp(log_ratio.detach()).view(-1, 1, 1)
        error = (prediction.double() - (noise.double() - x0.double())) ** 2
        slope = t.double() * (error.detach().mean((1, 2, 3)) + 1e-10) ** -0.75
        wa, each = got.weights.double() * a, error.mean(1) * slope.view(-1, 1, 1)
        expected = (-wa * r).mean() + (wa * r * (each - each.detach())).mean()
        assert got.weights.max() > 1
    if config.kl_coef:
        with trainer.policy.reference():
            reference = forward()
        expected = expected + config.kl_coef * ((prediction - reference).double() ** 2).mean()
    expected = expected + config.old_kl_coef * ((prediction - old).double() ** 2).mean()
    assert (got.statistics["ratio_max"] == 1) == (not config.off_policy)
    torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=1e-6)
    own = list(trainer.policy.parameters.values())
    gradients = torch.autograd.grad(got.loss, own, retain_graph=True)
    for found, correct in zip(gradients, torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(found, correct, rtol=1e-3, atol=1e-5)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    options = {"loss": {"old_decay": 0.5, "kl_coef": 0.1}, "optimization": {"ema_decay": 0.9, "ema_every": 1}}
    options["optimization"] |= AWM["optimization"]
    whole = Trainer(awm_run(tmp_path / "a", **options))
    losses = []
    for _ in range(3):
        metrics = whole.step()
        losses.append(metrics["loss"])
        assert metrics["ratio_min"] == metrics["ratio_max"] == 1 and metrics["grad_norm"] > 0
        assert all(meaning(name) for name in metrics), metrics
    assert metrics["old_deviation"] > 0 and metrics["kl"] > 0 and metrics["matching_error"] > metrics["old_deviation"]
    stopped = Trainer(awm_run(tmp_path / "b", **options))
    assert stopped.step()["loss"] == losses[0]
    stopped.save()
    resumed = Trainer(awm_run(tmp_path / "b", **options, run={"resume": True}))
    assert [resumed.step()["loss"] for _ in range(2)] == losses[1:]
    for name in ("parameters", "old"):
        got, expected = (t.policy.state_dict()[name] for t in (resumed, whole))
        pairs = zip(*(x.values() if isinstance(x, dict) else x for x in (got, expected)), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("off_policy", [False, True])
def test_who_samples(tmp_path, monkeypatch, off_policy):
    trainer = moved(Trainer(awm_run(tmp_path, loss={"off_policy": off_policy})))
    sampled = trainer.rollout(PROMPTS, torch.Generator().manual_seed(0)).latents
    monkeypatch.setattr(trainer.policy, "old", nullcontext)
    own = trainer.rollout(PROMPTS, torch.Generator().manual_seed(0)).latents
    assert torch.equal(sampled, own) == (not off_policy)


def test_several_updates_compare_with_the_policy_as_it_began_the_iteration(tmp_path):
    updates = {"updates_per_iteration": 2}
    options = {"off_policy": True, "old_decay": 0.0, "clip_range": 1.0, "ratio": "location"}
    trainer = Trainer(awm_run(tmp_path, loss=options, optimization=updates))
    for _ in range(2):
        metrics = trainer.step()
        assert metrics["ratio_first"] == 1 < metrics["ratio_max"] and metrics["nonfinite"] == 0
    for old, own in zip(trainer.policy.old_parameters, parameters(trainer), strict=True):
        assert torch.equal(old, own)


def test_without_an_old_policy_the_maps_are_the_policys_own(tmp_path):
    config = awm_run(tmp_path, loss={"old_kl_coef": 0.0})
    plan, trainer = planning.plan(config), Trainer(config)
    assert trainer.policy.old_parameters is None and plan.memory["old policy"] == 0
    with planning.flop_counter() as flops:
        rollout = trainer.rollout(PROMPTS, torch.Generator().manual_seed(0))
        credit = trainer.objective.credit(rollout, torch.ones(6), None, torch.Generator(), 0)
        metrics, weights = trainer.update(rollout, credit)
    assert flops.get_total_flops() == pytest.approx(plan.flops_per_gpu, rel=0.05)
    assert (plan.rollout_rows, plan.update_rows, plan.old_rows) == (24, 12, 12)
    assert weights.max() > 1 and "old_deviation" not in metrics
    flat = awm_run(tmp_path, loss={"old_kl_coef": 0.0}, allocation={"strategy": "uniform"})
    assert planning.plan(flat).old_rows == 0


def test_full_fine_tuning_and_checkpointing_train(tmp_path):
    rate = {"learning_rate": 1e-4, "updates_per_iteration": 1}
    plain = Trainer(awm_run(tmp_path / "a", model={"lora_rank": 0}, optimization=rate)).step()
    changes = {"lora_rank": 0, "gradient_checkpointing": True}
    saved = Trainer(awm_run(tmp_path / "b", model=changes, optimization=rate)).step()
    assert saved["loss"] == plain["loss"] and saved["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_noise_levels_are_drawn_from_equal_parts_of_the_trained_steps():
    """The parts of time_type "discrete_wo_init" and "discrete", written down by hand; whole steps in random order."""
    parts = {
        range(1, 12): [{1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}],
        range(12): [{0, 1}, {2, 3}, {4, 5}, {6, 7}, {8, 9}, {10, 11}],
    }
    for trained, expected in parts.items():
        drawn = [levels(random.Random(seed), trained, 6) for seed in range(50)]
        assert [set(column) for column in zip(*map(sorted, drawn), strict=True)] == expected
        assert len({tuple(order) for order in drawn}) > 40
    assert sorted(levels(random.Random(0), (3, 0, 2), 3)) == [0, 2, 3]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": {"guidance_scale": 2.0}}, "sampling.guidance_scale: got 2, expected 1: loss.objective awm"),
        ({"sampling": {"trained_steps": [4]}}, r"sampling.trained_steps: got \(4,\), expected some of 0..3"),
        ({"loss": {"beta": 0.5}}, "loss.beta: got 0.5, expected 1.0: loss.objective awm"),
        ({"loss": {"guard": True}}, "loss.guard: got True"),
        ({"loss": {"error_power": 1.5}}, "loss.error_power: got 1.5, expected a number above 0 and at most 1"),
        ({"loss": {"objective": "nft", "off_policy": True}}, "loss.off_policy: got True, expected False"),
        ({"optimization": {"updates_per_iteration": 2}}, "optimization.updates_per_iteration: got 2, expected 1"),
        ({"allocation": {"strategy": "final_step"}}, "allocation.strategy: got 'final_step'"),
    ],
)
def test_what_it_has_no_use_for_is_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Trainer(awm_run(tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_the_presets_are_the_published_settings():
    """By hand from config/dgx_awm.py, not from our table."""
    found = {task: preset(f"{task}-sd35m-awm") for task in ("geneval", "ocr", "pickscore")}
    for config in found.values():
        config.check()
        loss, sampling, optimization = config.loss, config.sampling, config.optimization
        assert (loss.old_kl_coef, loss.old_decay, loss.old_decay_rate, loss.old_decay_start) == (1, 0.3, 0.001, 0)
        assert (loss.sigma_power, loss.error_power, loss.clip_range, loss.adv_clip) == (1, 0.25, 1, 5)
        assert loss.global_std and not loss.off_policy and loss.noise_levels == 6
        assert (sampling.steps, sampling.guidance_scale, sampling.images_per_prompt) == (14, 1.0, 24)
        assert (optimization.updates_per_iteration, optimization.ema_decay, optimization.ema_every) == (1, 0.99, 1)
        assert (optimization.learning_rate, config.model.lora_rank, config.model.lora_alpha) == (3e-4, 32, 64)
    assert [config.loss.kl_coef for config in found.values()] == [1e-3, 3e-3, 1e-4]
    assert [config.sampling.prompts_per_iteration for config in found.values()] == [72, 72, 24]
    assert [config.sampling.trained_steps[0] for config in found.values()] == [1, 1, 0]
