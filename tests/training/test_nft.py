"""DiffusionNFT in the loop: the published loss, an old policy that follows, draws that the image alone decides."""

import dataclasses
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from builders import small_run
from star import config as configuration
from star import train as training
from star.config import ConfigError, Loss, Optimization
from star.presets import PRESETS, preset
from star.reports.metrics import meaning
from star.train import Trainer
from star.training import plan as planning
from star.training import scoring
from star.training.policy import learning_rate, old_decay
from star.training.rollout import predict_velocity

NFT = {
    "sampling": {"trained_steps": [0, 1, 2, 3], "shared_noise": False},
    "loss": {"objective": "nft", "noise_levels": 2, "global_std": True},
}


def nft_run(out, **changes):
    merged = {name: NFT.get(name, {}) | changes.get(name, {}) for name in {*NFT, *changes}}
    return small_run(out, **merged)


def parameters(trainer):
    return [p.detach().clone() for p in trainer.policy.parameters.values()]


@pytest.mark.parametrize(
    "changes",
    [
        {"allocation": {"strategy": "uniform"}},
        {"allocation": {"strategy": "attention"}, "loss": {"kl_coef": 0.1, "beta": 0.3}},
        {"allocation": {"strategy": "oracle"}, "loss": {"advantage": "location"}},
    ],
    ids=["uniform", "attention", "location"],
)
def test_the_loss_is_the_published_one(tmp_path, changes):
    """Written again here from scripts/train_nft_sd3.py, in float64 where it adds up."""
    trainer = Trainer(nft_run(tmp_path, **changes))
    trainer.step()
    with torch.no_grad():  # an old policy that differs from the policy
        for p in trainer.policy.parameters.values():
            p.add_(0.01 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
    rollout = trainer.rollout(["red circle", "two blue squares", "green ring"], torch.Generator().manual_seed(0))
    shape = (6, 18, 18) if trainer.config.loss.advantage == "location" else (6,)
    advantages = 8 * torch.randn(shape, generator=torch.Generator().manual_seed(1))
    masks = torch.rand(6, 36, 36, generator=torch.Generator().manual_seed(2))
    objective, rows = trainer.objective, torch.arange(3)
    credit = objective.credit(rollout, advantages, masks, torch.Generator(), 5)
    got = objective.loss(rollout, 1, rows, credit)

    steps, noise = objective.draw(1, rows, rollout.latents[rows])
    x0, t = rollout.latents[rows], rollout.steps.sigmas[steps].float().view(-1, 1, 1, 1)
    xt = (1 - t) * x0 + t * noise
    conditions = rollout.conditions.rows(rollout.groups[rows])

    def forward():
        return predict_velocity(trainer.policy.bare, xt, rollout.steps.timesteps[steps], conditions, 1.0)

    prediction = forward()
    with trainer.policy.old(), torch.no_grad():
        old = forward()
    assert not torch.equal(old, prediction)
    beta, limit = trainer.config.loss.beta, trainer.config.loss.adv_clip
    r = (advantages[rows].clamp(-limit, limit) / limit / 2 + 0.5).view(3, 1, *shape[1:] or (1, 1))
    w = 1.0 if got.weights is None else got.weights[:, None]
    assert (got.weights is None) == (trainer.config.allocation.strategy == "uniform")

    def term(v):
        error = (xt - t * v - x0).double()
        return error**2 / error.detach().abs().mean((1, 2, 3), keepdim=True).clip(min=1e-5)

    positive, negative = term(beta * prediction + (1 - beta) * old), term((1 + beta) * old - beta * prediction)
    expected = (limit * w * (r * positive + (1 - r) * negative) / beta).mean()
    if trainer.config.loss.kl_coef:
        with trainer.policy.reference():
            reference = forward()
        expected = expected + trainer.config.loss.kl_coef * ((prediction - reference).double() ** 2).mean()
    torch.testing.assert_close(got.loss.double(), expected, rtol=1e-5, atol=1e-6)
    own = list(trainer.policy.parameters.values())
    gradients = torch.autograd.grad(got.loss, own, retain_graph=True)
    for found, correct in zip(gradients, torch.autograd.grad(expected, own), strict=True):
        torch.testing.assert_close(found, correct, rtol=1e-3, atol=1e-5)


def test_where_all_weights_are_trained_the_reference_is_the_model_before_the_run(tmp_path):
    options = {"model": {"lora_rank": 0}, "loss": {"kl_coef": 0.1}, "sampling": {"merge_adapter": False}}
    trainer = Trainer(nft_run(tmp_path / "a", **options))
    start = parameters(trainer)
    assert planning.plan(trainer.config).memory["reference"] == planning.count_bytes(start)
    assert [trainer.step()["kl"] > 0 for _ in range(2)] == [True, True]
    moved = parameters(trainer)
    trainer.save()
    resumed = Trainer(nft_run(tmp_path / "a", **options, run={"resume": True}))
    for policy in (trainer.policy, resumed.policy):
        with policy.reference() as model:
            assert all(torch.equal(p, old) for p, old in zip(model.parameters(), start, strict=True))
        assert all(torch.equal(p, new) for p, new in zip(policy.parameters.values(), moved, strict=True))
        assert not any(torch.equal(a, b) for a, b in zip(start, moved, strict=True))
    assert trainer.step()["loss"] == resumed.step()["loss"]


def test_a_resumed_run_has_the_same_bits(tmp_path):
    options = {"loss": {"old_decay": 0.5, "old_decay_rate": 0.2}, "optimization": {"schedule": "cosine"}}
    whole = Trainer(nft_run(tmp_path / "a", **options))
    losses = [whole.step()["loss"] for _ in range(3)]
    stopped = Trainer(nft_run(tmp_path / "b", **options))
    assert stopped.step()["loss"] == losses[0]
    stopped.save()
    resumed = Trainer(nft_run(tmp_path / "b", **options, run={"resume": True}))
    assert [resumed.step()["loss"] for _ in range(2)] == losses[1:]
    for got, expected in zip(parameters(resumed), parameters(whole), strict=True):
        assert torch.equal(got, expected)
    for got, expected in zip(resumed.policy.old_parameters, whole.policy.old_parameters, strict=True):
        assert torch.equal(got, expected)


def test_a_run_of_the_other_objective_goes_on_with_an_old_policy_of_its_own(tmp_path, monkeypatch):
    first = Trainer(small_run(tmp_path))
    first.step()
    first.save()
    trainer = Trainer(nft_run(tmp_path, run={"resume": True}))
    for old, own in zip(trainer.policy.old_parameters, parameters(first), strict=True):
        assert torch.equal(old, own)
    # Its decay grows from here on, as in a run of its own, and a checkpoint keeps where it began.
    assert trainer.policy.old_begin == trainer.policy.updates > 0
    seen = []
    monkeypatch.setattr("star.training.policy.old_decay", lambda loss, updates: seen.append(updates) or 0.0)
    assert trainer.step()["grad_norm"] > 0
    per_step = trainer.config.optimization.updates_per_iteration
    assert seen == [per_step]
    assert trainer.policy.state_dict()["old_begin"] == trainer.policy.updates - per_step


def test_the_old_policy_samples_and_follows(tmp_path, monkeypatch):
    options = {"old_decay": 0.6, "old_decay_rate": 0.2, "old_decay_start": 1}
    trainer = Trainer(nft_run(tmp_path, loss=options, optimization={"updates_per_iteration": 1}))
    old = parameters(trainer)
    for iteration, decay in enumerate((0.0, 0.2, 0.4)):
        metrics = trainer.step()
        # Without a decay every pass meets the policy that sampled.
        assert (metrics["old_deviation"] == 0) == (iteration < 2)
        old = [decay * a + (1 - decay) * b for a, b in zip(old, parameters(trainer), strict=True)]
        for got, expected in zip(trainer.policy.old_parameters, old, strict=True):
            torch.testing.assert_close(got, expected)
    prompts = ["red circle", "two blue squares", "green ring"]
    sampled = trainer.rollout(prompts, torch.Generator().manual_seed(0)).latents
    policy = parameters(trainer)
    with monkeypatch.context() as without:
        without.setattr(trainer.policy, "old", nullcontext)
        assert not torch.equal(trainer.rollout(prompts, torch.Generator().manual_seed(0)).latents, sampled)
    with trainer.policy.old(), monkeypatch.context() as without:
        without.setattr(trainer.policy, "old", nullcontext)
        assert torch.equal(trainer.rollout(prompts, torch.Generator().manual_seed(0)).latents, sampled)
    assert all(torch.equal(a, b) for a, b in zip(parameters(trainer), policy, strict=True))


def test_the_decay_is_the_published_one():
    """decay_type 1 and 2 of DiffusionNFT: flat for so many updates, then rising, then held."""
    plain, slow = (
        Loss(old_decay=0.5, old_decay_rate=0.001),
        Loss(old_decay=0.999, old_decay_rate=0.0075, old_decay_start=75),
    )
    assert [old_decay(plain, n) for n in (0, 100, 500, 900)] == pytest.approx([0, 0.1, 0.5, 0.5])
    assert [old_decay(slow, n) for n in (0, 75, 115, 500)] == pytest.approx([0, 0, 0.3, 0.999])


def test_an_image_has_the_same_draws_wherever_it_is(tmp_path):
    """In any chunk, and in any process: its own number decides. Its noise levels are all different ones."""
    trainer = Trainer(nft_run(tmp_path))
    objective, image = trainer.objective, torch.zeros(6, 4, 18, 18)
    whole = [objective.draw(k, torch.arange(6), image) for k in range(4)]
    steps = torch.stack([s for s, _ in whole])
    assert all(sorted(column) == [0, 1, 2, 3] for column in steps.T.tolist())
    noise = torch.stack([n for _, n in whole]).flatten(0, 1)
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)
    assert noise.mean().abs() < 0.02 and (noise.std() - 1).abs() < 0.02
    objective.share = SimpleNamespace(rows=torch.tensor([4, 1]))  # of another process
    got = objective.draw(2, torch.tensor([1, 0]), image[:2])
    assert torch.equal(got[0], whole[2][0][[1, 4]]) and torch.equal(got[1], whole[2][1][[1, 4]])
    objective.iteration = 1
    assert not torch.equal(objective.draw(2, torch.tensor([1, 0]), image[:2])[1], got[1])


@pytest.mark.parametrize("strategy", ["attention", "shuffled", "random", "inverted", "oracle", "uniform"])
def test_every_strategy_trains(tmp_path, strategy):
    metrics = Trainer(nft_run(tmp_path, allocation={"strategy": strategy})).step()
    assert metrics["grad_norm"] > 0 and metrics["nonfinite"] == 0 and "ratio_max" not in metrics
    assert ("weights_max" in metrics) == (strategy != "uniform")
    assert all(meaning(name) for name in metrics), metrics


def test_the_maps_are_of_the_old_policy(tmp_path, monkeypatch):
    """Weights must not depend on what the update has made of the policy."""
    trainer = Trainer(nft_run(tmp_path))
    rollout = trainer.rollout(["red circle", "two blue squares", "green ring"], torch.Generator().manual_seed(0))
    credit = trainer.objective.credit(rollout, torch.ones(6), None, torch.Generator(), 0)
    first = trainer.objective.loss(rollout, 0, torch.arange(6), credit).weights
    with torch.no_grad():
        for p in trainer.policy.parameters.values():
            p.add_(0.1)
    assert torch.equal(trainer.objective.loss(rollout, 0, torch.arange(6), credit).weights, first)


def test_full_fine_tuning_and_checkpointing_train(tmp_path):
    plain = Trainer(nft_run(tmp_path / "a", model={"lora_rank": 0}, optimization={"learning_rate": 1e-4})).step()
    changes = {"lora_rank": 0, "gradient_checkpointing": True}
    saved = Trainer(nft_run(tmp_path / "b", model=changes, optimization={"learning_rate": 1e-4})).step()
    assert saved["loss"] == plain["loss"] and saved["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


def test_a_run_is_written_scored_and_exported(tmp_path):
    config = nft_run(tmp_path, optimization={"ema_decay": 0.9, "ema_every": 1}, scoring={"count": 4})
    config = configuration.update(config, {"run": {"figures": True, "grid_every": 1}})
    summary = training.train(config)
    assert summary["iterations"] == 2 and summary["held_out"]
    assert (tmp_path / "lora").is_dir() and (tmp_path / "grids" / "000002.png").is_file()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": {"guidance_scale": 2.0}}, "sampling.guidance_scale: got 2"),
        ({"sampling": {"shared_noise": True}}, "sampling.shared_noise: got True"),
        ({"sampling": {"window": 1}}, "sampling.window: got 1"),
        ({"sampling": {"trained_steps": [4]}}, r"sampling.trained_steps: got \(4,\), expected some of 0..3"),
        ({"loss": {"noise_levels": 5}}, "loss.noise_levels: got 5, expected 0..4"),
        ({"loss": {"ratio": "location"}}, "loss.ratio: got 'location'"),
        ({"loss": {"guard": True}}, "loss.guard: got True"),
        ({"loss": {"sigma_power": 0.5}}, "loss.sigma_power: got 0.5, expected 1.0: loss.objective nft does not use it"),
        (
            {"loss": {"objective": "grpo"}, "sampling": {"trained_steps": [0, 1]}},
            "loss.noise_levels: got 2, expected 0: loss.objective grpo does not use it",
        ),
        ({"allocation": {"temporal": "noise_level"}}, "allocation.temporal: got 'noise_level'"),
        ({"allocation": {"strategy": "final_step"}}, "allocation.strategy: got 'final_step'"),
        (
            {"allocation": {"strategy": "shuffled"}, "optimization": {"micro_batch": 1}},
            "allocation.strategy: 'shuffled' needs",
        ),
    ],
)
def test_what_it_has_no_use_for_is_refused(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words) as caught:
        Trainer(nft_run(tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_the_plan_counts_its_passes(tmp_path):
    config = nft_run(tmp_path, allocation={"strategy": "uniform"})
    plan, trainer = planning.plan(config), Trainer(config)
    with planning.flop_counter() as flops:
        rollout = trainer.rollout(["red circle", "two blue squares", "green ring"], torch.Generator().manual_seed(0))
        trainer.update(rollout, trainer.objective.credit(rollout, torch.ones(6), None, torch.Generator(), 0))
    assert flops.get_total_flops() == pytest.approx(plan.flops_per_gpu, rel=0.05)
    assert (plan.rollout_rows, plan.update_rows, plan.old_rows) == (24, 12, 12)
    assert plan.memory["old policy"] == planning.count_bytes(trainer.policy.old_parameters)
    assert plan.memory["rollout"] == planning.count_bytes([rollout.samples])


FULL = {"model": {"lora_rank": 0}, "sampling": {"merge_adapter": False}}
RESIDENT = (
    *("transformer", "text encoders", "autoencoder", "gradients", "optimizer", "moving average", "old policy"),
    *("reference", "rollout", "maps and weights", "text"),
)
KEPT = {
    "average": (small_run, {"optimization": {"ema_decay": 0.9}, "scoring": {"count": 2, "every": 1}}),
    "reference": (small_run, {"loss": {"kl_coef": 0.1}}),
    "old policy and reference": (nft_run, {"loss": {"kl_coef": 0.1}}),
}


@pytest.mark.parametrize("name", KEPT)
def test_the_plan_counts_the_weights_that_wait_while_others_have_their_place(tmp_path, monkeypatch, name):
    make, changes = KEPT[name]
    trainer = Trainer(make(tmp_path, **FULL, **changes))
    plan, policy = planning.plan(trainer.config), trainer.policy
    waiting, needed, has_graph = [], {"pass": 0, "images": 0}, False
    overwrite, decode, forward = policy.overwrite, training.decode, policy.transformer.forward

    def overwritten(values):
        if waiting:  # by what waited
            waiting.clear()
        else:
            waiting.append(planning.count_bytes(policy.parameters.values()))
            needed["pass"] = max(needed["pass"], has_graph * sum(waiting))
        overwrite(values)

    def decoded(*args, **options):
        needed["images"] = max(needed["images"], sum(waiting))
        return decode(*args, **options)

    def passed(*args, **options):
        nonlocal has_graph
        has_graph = torch.is_grad_enabled() or has_graph
        return forward(*args, **options)

    def went_back(loss, backward=trainer.accelerator.backward):
        nonlocal has_graph
        backward(loss)
        has_graph = False

    monkeypatch.setattr(policy, "overwrite", overwritten)
    monkeypatch.setattr(policy.transformer, "forward", passed)
    monkeypatch.setattr(trainer.accelerator, "backward", went_back)
    for module in (training, scoring):
        monkeypatch.setattr(module, "decode", decoded)
    trainer.step()
    trainer.score()
    assert any(needed.values()) and not waiting
    assert needed == {phase: plan.memory[f"weights set aside, {phase}"] for phase in needed}
    passing = plan.memory["activations"] + needed["pass"], plan.memory["decoding"] + needed["images"]
    assert plan.peak == sum(plan.memory[name] for name in RESIDENT) + max(passing)


def test_the_plan_counts_what_an_adapter_is_merged_into_and_what_an_update_is_measured_with(tmp_path):
    trainer = Trainer(small_run(tmp_path, optimization={"update_norm": 0.1}))
    plan, policy = planning.plan(trainer.config), trainer.policy
    plain = {p.data_ptr() for p in policy.bare.parameters()}
    with policy.merged():
        merged = [p for p in policy.bare.parameters() if p.data_ptr() not in plain]
    assert merged and plan.memory["merged adapter"] == planning.count_bytes(merged)
    assert plan.memory["measured update"] == 2 * planning.count_bytes(policy.parameters.values())
    without = planning.plan(small_run(tmp_path, sampling={"merge_adapter": False})).memory
    assert not any(
        without[name] for phase in planning.PHASES for name in phase if name not in ("activations", "decoding")
    )


def test_the_presets_are_the_published_settings():
    names = [name for name in PRESETS if name.endswith("-nft")]
    assert len(names) == 4
    for name in names:
        preset(name).check()
    geneval, ocr = preset("geneval-sd35m-nft"), preset("ocr-sd35m-nft")
    assert (geneval.loss.beta, geneval.loss.kl_coef, geneval.loss.noise_levels) == (1.0, 1e-4, 9)
    assert (ocr.loss.beta, ocr.loss.old_decay, ocr.loss.old_decay_start) == (0.1, 0.999, 75)
    assert geneval.sampling.guidance_scale == 1.0 and geneval.optimization.updates_per_iteration == 1


def test_the_learning_rate_follows_its_schedule(tmp_path):
    shape = Optimization(iterations=5, updates_per_iteration=2, learning_rate=1.0, schedule="linear", warmup=3)
    rates = [learning_rate(shape, n) for n in range(10)]
    assert rates == pytest.approx([0.25 * 1, 0.5 * 0.9, 0.75 * 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    cosine = dataclasses.replace(shape, schedule="cosine", warmup=0)
    assert [learning_rate(cosine, n) for n in (0, 5)] == pytest.approx([1.0, 0.5])
    assert learning_rate(Optimization(learning_rate=0.3), 10**6) == 0.3
    changes = {"iterations": 2, "updates_per_iteration": 1, "learning_rate": 1e-3, "schedule": "linear"}
    trainer = Trainer(small_run(tmp_path, optimization=changes))
    found = []
    for _ in range(2):
        trainer.step()
        found.append(trainer.policy.optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([1e-3, 5e-4])
