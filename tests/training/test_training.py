"""The training loop: exact where it must be exact, and what it leaves on disk."""

import dataclasses
import json
import signal
import threading
import types
import typing

import numpy as np
import pytest
import torch
from huggingface_hub.errors import GatedRepoError

from builders import plain_images, small_run
from star import config as configuration
from star import train as training
from star.config import ConfigError
from star.files import FolderLock
from star.objective import STRATEGIES, allocation_weights, blend_weights
from star.presets import preset
from star.reports import figures, shown
from star.reports.evaluations import Evaluation, read_evaluations, write_evaluation
from star.reports.metrics import meaning
from star.rewards import RewardError, Scores
from star.shapes.model import load_pipeline
from star.train import Trainer
from star.training import checkpoint, credit, folder
from star.training.distributed import Termination
from star.training.pipeline import load_pipeline as load_from
from star.training.pipeline import reason
from star.training.prompts import _read_once
from star.training.scoring import HeldOut
from star.training.task import configured_task, draw_prompts


def losses(trainer, iterations):
    return [trainer.step()["loss"] for _ in range(iterations)]


def test_on_policy_ratio_is_exactly_one_and_the_policy_then_moves(tmp_path):
    trainer = Trainer(small_run(tmp_path / "a", optimization={"learning_rate": 1e-2, "updates_per_iteration": 2}))
    metrics = trainer.step()
    assert metrics["ratio_first"] == 1.0
    assert metrics["ratio_min"] < 1.0 or metrics["ratio_max"] > 1.0
    one = Trainer(small_run(tmp_path / "b", optimization={"updates_per_iteration": 1})).step()
    assert one["ratio_min"] == one["ratio_max"] == 1.0 and one["approx_kl"] == 0


def test_same_seed_same_losses_bit_for_bit_and_a_resumed_run_continues_with_them(tmp_path):
    whole = losses(Trainer(small_run(tmp_path / "a")), 3)
    assert losses(Trainer(small_run(tmp_path / "b")), 3) == whole
    other = Trainer(small_run(tmp_path / "c", run={"seed": 1}))
    assert losses(other, 1) != whole[:1]

    stopped = Trainer(small_run(tmp_path / "d"))
    assert losses(stopped, 1) == whole[:1]
    stopped.save()
    resumed = Trainer(small_run(tmp_path / "d", run={"resume": True}))
    assert resumed.iteration == 1
    assert losses(resumed, 2) == whole[1:]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains(tmp_path, strategy):
    metrics = Trainer(small_run(tmp_path, allocation={"strategy": strategy})).step()
    assert metrics["grad_norm"] > 0 and metrics["nonfinite"] == 0
    assert ("weights_max" in metrics) == (strategy != "uniform")


@pytest.mark.parametrize("temporal", ["noise_level", "concentration"])
def test_temporal_weights_reach_the_loss(tmp_path, temporal):
    """They change the gradient, not the policy that is sampled; one trained step leaves them nothing to share out."""
    plain = Trainer(small_run(tmp_path / "a")).step()
    weighted = Trainer(small_run(tmp_path / "b", allocation={"temporal": temporal})).step()
    assert weighted["reward"] == plain["reward"] and weighted["grad_norm"] != plain["grad_norm"]
    one = {"trained_steps": [1]}
    plain = Trainer(small_run(tmp_path / "c", sampling=one)).step()
    weighted = Trainer(small_run(tmp_path / "d", sampling=one, allocation={"temporal": temporal})).step()
    assert weighted["loss"] == plain["loss"] and weighted["grad_norm"] == plain["grad_norm"]


def test_steps_weigh_the_same_while_maps_do_not_count(tmp_path):
    """In a warm-up's first iteration, and where no trained step has a noise level of the window."""
    plain = Trainer(small_run(tmp_path / "a", allocation={"strategy": "uniform"})).step()
    for name, limit in (("b", {"warmup": 2}), ("c", {"noise_window": [0.0, 0.01]})):
        limited = Trainer(small_run(tmp_path / name, allocation={"temporal": "concentration"} | limit)).step()
        assert limited["loss"] == plain["loss"] and limited["grad_norm"] == plain["grad_norm"] > 0


@pytest.mark.parametrize("ratio", ["token", "location", "sample"])
def test_every_ratio_trains(tmp_path, ratio):
    metrics = Trainer(small_run(tmp_path, loss={"ratio": ratio, "guard": ratio == "token", "kl_coef": 0.01})).step()
    assert metrics["grad_norm"] > 0 and metrics["nonfinite"] == 0
    assert metrics["kl"] > 0


def test_strategies_differ_only_in_the_weights(tmp_path):
    """Mix 0 makes any strategy uniform: the same losses as the scalar one, to rounding."""
    scalar = losses(Trainer(small_run(tmp_path / "a", allocation={"strategy": "uniform"})), 1)
    mixed = losses(Trainer(small_run(tmp_path / "b", allocation={"strategy": "attention", "mix": 0.0})), 1)
    assert mixed == pytest.approx(scalar, rel=1e-5)


def test_gradient_checkpointing_gives_the_same_run(tmp_path):
    plain = losses(Trainer(small_run(tmp_path / "a")), 2)
    assert losses(Trainer(small_run(tmp_path / "b", model={"gradient_checkpointing": True})), 2) == plain


def test_micro_batches_add_up_to_the_update(tmp_path):
    whole = Trainer(small_run(tmp_path / "a", optimization={"updates_per_iteration": 1})).step()
    cut = Trainer(small_run(tmp_path / "b", optimization={"updates_per_iteration": 1, "micro_batch": 3})).step()
    assert cut["grad_norm"] == pytest.approx(whole["grad_norm"], rel=1e-3)
    assert cut["ratio_min"] == cut["ratio_max"] == 1.0


def test_a_merged_adapter_is_the_same_model_and_is_taken_out_again_without_a_trace(tmp_path):
    trainer = Trainer(small_run(tmp_path, sampling={"merge_adapter": False}))
    trainer.step()
    transformer = trainer.policy.bare
    inputs = torch.randn(2, 4, 18, 18), torch.randn(2, 12, 128), torch.randn(2, 128), torch.tensor([500.0, 100.0])
    weights = {name: p.clone() for name, p in transformer.named_parameters()}
    with torch.no_grad():
        expected = transformer(*inputs, return_dict=False)[0]
        with trainer.policy.reference():
            base = transformer(*inputs, return_dict=False)[0]
        with pytest.raises(KeyboardInterrupt), trainer.policy.merged():
            merged = transformer(*inputs, return_dict=False)[0]
            raise KeyboardInterrupt
        again = transformer(*inputs, return_dict=False)[0]
    torch.testing.assert_close(merged, expected)
    assert (base - expected).abs().max() > 100 * (merged - expected).abs().max()
    assert torch.equal(again, expected)
    assert all(torch.equal(p, weights[name]) for name, p in transformer.named_parameters())


def test_merging_the_adapter_changes_the_images_by_rounding_only(tmp_path):
    def after_two(out, merge):
        trainer = Trainer(small_run(out, sampling={"merge_adapter": merge}))
        trainer.step()
        generator = torch.Generator().manual_seed(0)
        return trainer.step(), trainer.rollout(["red circle", "two blue squares", "green ring"], generator).latents

    (merged, latents), (plain, expected) = (after_two(tmp_path / str(merge), merge) for merge in (True, False))
    assert merged["ratio_first"] == plain["ratio_first"] == 1.0
    torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)


def test_full_fine_tuning_leaves_a_pipeline(tmp_path):
    config = small_run(tmp_path / "run", model={"lora_rank": 0}, optimization={"learning_rate": 1e-4, "iterations": 1})
    assert training.train(config)["iterations"] == 1
    trained, base = load_from(str(tmp_path / "run/model")).transformer, load_pipeline().transformer
    assert not torch.equal(trained.proj_out.weight, base.proj_out.weight)


def darkness(images, prompts, metadata):
    return Scores(-images.mean((1, 2, 3)))


def test_what_is_easily_learned_is_learned(tmp_path):
    """Advantages, latents and gradients belong together, with the right sign: images get darker, prompt by prompt."""
    sampling = {"prompts_per_iteration": 2, "images_per_prompt": 8, "steps": 8}
    trainer = Trainer(
        small_run(
            tmp_path, sampling=sampling, optimization={"learning_rate": 1e-3}, run={"reward": "test_training:darkness"}
        )
    )
    rewards = []
    for _ in range(4):
        trainer.iteration = 0  # the same prompts and noise again: only the policy changes
        rewards.append(trainer.step()["reward"])
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.05


def test_a_control_keeps_its_source_over_the_steps(tmp_path):
    trainer = Trainer(small_run(tmp_path, allocation={"strategy": "shuffled"}, sampling={"images_per_prompt": 4}))
    rollout = trainer.rollout(
        [p.text for p in training.draw_prompts(trainer.task, trainer.config, 0)], torch.Generator().manual_seed(0)
    )
    shuffled = trainer.objective.weights(rollout, None, torch.Generator().manual_seed(0))
    trainer.config = small_run(tmp_path, sampling={"images_per_prompt": 4})
    own = trainer.objective.weights(rollout, None, torch.Generator().manual_seed(0))
    # At the second trained step the samples have parted, and each has weights of its own.
    source = [int((own[1] == w).flatten(1).all(1).nonzero()[0]) for w in shuffled[1]]
    assert torch.equal(shuffled[0], own[0][source])


@pytest.mark.parametrize("strategy", ["attention", "final_step", "oracle", "shuffled"])
def test_weights_of_a_rollout_are_one_allocation_and_those_of_its_steps(tmp_path, strategy, monkeypatch):
    limits = {"noise_window": (0.0, 0.7), "warmup": 4}
    trainer = Trainer(small_run(tmp_path, allocation={"strategy": strategy, **limits}))
    rollout = trainer.rollout(
        [p.text for p in training.draw_prompts(trainer.task, trainer.config, 0)], torch.Generator().manual_seed(0)
    )
    trainer.objective.iteration, masks = 3, torch.rand(len(rollout.groups), *rollout.grid)
    calls = []
    made = lambda *args, **options: calls.append(1) or allocation_weights(*args, **options)
    monkeypatch.setattr(credit, "allocation_weights", made)
    got = trainer.objective.weights(rollout, masks, torch.Generator().manual_seed(7))
    assert len(calls) == 1
    generator, expected = torch.Generator().manual_seed(7), []
    seed, options = int(torch.randint(2**62, (), generator=generator)), trainer.config.allocation
    for step in rollout.steps.trained:
        read = {"final_step": trainer.config.sampling.steps - 1, "oracle": None}.get(strategy, step)
        own = allocation_weights(
            options,
            None if read is None else rollout.maps_at(read),
            rollout.grid,
            groups=rollout.groups,
            masks=masks.flatten(1),
            generator=torch.Generator().manual_seed(seed),
        )
        expected.append(blend_weights(own, options.strength(rollout.steps.sigmas[step], 3)))
    assert torch.equal(got, torch.stack(expected))


def test_final_step_gives_every_trained_step_the_weights_of_the_last_one(tmp_path):
    trainer = Trainer(small_run(tmp_path, allocation={"strategy": "final_step"}))
    rollout = trainer.rollout(
        [p.text for p in training.draw_prompts(trainer.task, trainer.config, 0)], torch.Generator().manual_seed(0)
    )
    assert len(rollout.maps) == 1
    got = trainer.objective.weights(rollout, None, torch.Generator())
    assert torch.equal(got[0], got[1])
    # There the images of a prompt have parted: each has weights of its own.
    assert len(torch.unique(got[0], dim=0)) == len(rollout.groups)


def odd_prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("of and\na red circle\n\ntwo blue rings\n")
    return str(path)


def brightness(images, prompts, metadata):
    return Scores(images.mean((1, 2, 3)))


def test_prompts_from_a_file_a_reward_by_name_and_a_prompt_without_concept(tmp_path, caplog):
    config = small_run(
        tmp_path / "run", sampling={"prompts": odd_prompts(tmp_path)}, run={"reward": "test_training:brightness"}
    )
    trainer = Trainer(config)
    metrics = [trainer.step(), trainer.step()]
    # Two images of "of and" at two trained steps have weights of exactly 1; told once, counted always.
    assert [m["weights_uniform"] for m in metrics] == [4.0, 4.0]
    assert [r.message for r in caplog.records] == ["4 samples had no usable map; their weights are 1"]


def nan_reward(images, prompts, metadata):
    scores = images.mean((1, 2, 3))
    scores[1] = torch.nan
    return scores


def broken_reward(images, prompts, metadata):
    raise KeyError("color")


def test_a_chunk_is_scored_while_the_next_one_is_sampled(tmp_path, monkeypatch):
    trainer = Trainer(small_run(tmp_path, optimization={"updates_per_iteration": 2}, sampling={"shared_noise": False}))
    scoring, passes = threading.Event(), []
    reward = trainer.worker.reward

    def scored(*arguments):
        scoring.set()
        return reward(*arguments)

    def before(module, arguments):
        passes.append(scoring.wait(60) if len(passes) == trainer.config.sampling.steps else None)

    monkeypatch.setattr(trainer.worker, "reward", scored)
    handle = trainer.policy.bare.register_forward_pre_hook(before)
    trainer.step()
    handle.remove()
    # The first pass of the second chunk went on because the first chunk's scores had been begun.
    assert passes[trainer.config.sampling.steps] is True


def test_a_reward_that_fails_costs_its_image_and_not_the_run(tmp_path, caplog):
    run = {"reward": "test_training:nan_reward"}
    trainer = Trainer(small_run(tmp_path / "a", run=run))
    metrics = trainer.step()
    assert metrics["reward_failed"] == 2 and np.isfinite(metrics["reward"]) and metrics["updates_skipped"] == 0
    assert metrics["grad_norm"] > 0 and metrics["advantage_zero"] >= 2 / 6
    first = training.draw_prompts(trainer.task, trainer.config, 0)[1].text  # neighbors are of different prompts
    assert caplog.records[0].message.startswith(
        f"reward: got nan from 'test_training:nan_reward' for the prompt {first!r}"
    )
    with pytest.raises(RewardError, match=f"reward: got nan from .* for the prompt '{first}'"):
        Trainer(small_run(tmp_path / "b", run={**run, "reward_strict": True})).step()


def test_a_reward_that_always_fails_ends_the_run(tmp_path):
    trainer = Trainer(small_run(tmp_path, run={"reward": "test_training:broken_reward"}))
    with pytest.raises(
        RewardError, match=r"reward: KeyError \('color'\) for the prompt 'a.*; it failed for every image"
    ):
        trainer.step()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"loss": {"advantage": "location"}},
        {"loss": {"normalize_rewards": True}},
        {"allocation": {"strategy": "oracle"}},
    ],
    ids=["image", "location", "normalized", "oracle"],
)
def test_an_iteration_whose_rewards_all_fail_teaches_nothing(tmp_path, changes):
    trainer = Trainer(small_run(tmp_path, **changes))
    trainer.step()
    trainer.worker.reward = broken_reward
    metrics = trainer.step()
    assert metrics["reward_failed"] == 6 and np.isnan(metrics["reward"])
    assert metrics["advantage_zero"] == 1 and metrics["grad_norm"] == 0


def test_an_update_that_is_not_finite_is_skipped(tmp_path, monkeypatch):
    trainer = Trainer(small_run(tmp_path))
    before = [p.detach().clone() for p in trainer.policy.transformer.parameters()]
    monkeypatch.setattr(training, "compute_advantages", lambda scores, *_: torch.full_like(scores.reward, torch.nan))
    metrics = trainer.step()
    assert metrics["updates_skipped"] == 2
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.policy.transformer.parameters(), strict=True))


def test_a_run_leaves_everything_and_the_adapter_loads_in_plain_diffusers(tmp_path):
    out = tmp_path / "run"
    summary = training.train(small_run(out, scoring={"count": 12}, run={"figures": True}))
    assert summary == json.loads((out / "summary.json").read_text()) and summary["iterations"] == 2
    before, after = read_evaluations(out)
    assert summary["held_out"].keys() == {"reward", "strict"} and (before.iteration, after.iteration) == (0, 2)
    assert summary["held_out"]["reward"]["after"] == pytest.approx(after.values["reward"].mean(), abs=1e-5)
    assert len(list((out / "held_out/before").iterdir())) == len(list((out / "held_out/after").iterdir())) == 8
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1] and lines[0]["ratio_first"] == 1.0
    for name in ("reward_curve.png", "before_after.png", "allocation.png"):
        assert (out / name).stat().st_size > 5000
    assert list((out / "tensorboard").iterdir()) and (out / "config.yaml").exists()
    assert [name for name in lines[0] if name != "iteration" and not meaning(name)] == []

    texts = ["a red circle left of a blue square", "two green rings"]
    plain = load_pipeline()
    base = plain_images(plain, texts, 1)
    plain.load_lora_weights(str(out / "lora"))
    loaded = plain_images(plain, texts, 1)
    resumed = Trainer(dataclasses.replace(small_run(out, run={"resume": True})))
    trained = plain_images(resumed.pipeline, texts, 1)
    torch.testing.assert_close(loaded, trained, rtol=0, atol=1e-5)
    assert abs(loaded - base).max() > 1e-3


def test_checkpoints_are_kept_and_old_ones_go(tmp_path):
    for i in range(5):
        checkpoint.save(tmp_path, i, {"x": torch.tensor(i)}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["iteration-000003", "iteration-000004"]
    assert checkpoint.load(checkpoint.checkpoints(tmp_path)[-1])["x"] == 4


@pytest.mark.parametrize("damage", ["cut", "flipped", "no meta", "foreign"])
def test_a_damaged_checkpoint_is_refused_and_stays(tmp_path, damage):
    place = checkpoint.save(tmp_path, 1, {"x": torch.arange(1000)}, keep=2)
    state = place / "state.pt"
    data = state.read_bytes()
    if damage == "cut":
        state.write_bytes(data[:-100])
    elif damage == "flipped":
        state.write_bytes(data[:500] + bytes([data[500] ^ 1]) + data[501:])
    elif damage == "no meta":
        (place / "meta.json").unlink()
    else:
        (place / "meta.json").write_text('{"format": "something else"}')
    before = sorted((p.name, p.read_bytes()) for p in place.iterdir())
    with pytest.raises(
        checkpoint.CheckpointError, match=r"checkpoint: .* (damaged|cannot be read|is not a star-checkpoint)"
    ):
        checkpoint.load(place)
    assert sorted((p.name, p.read_bytes()) for p in place.iterdir()) == before


def test_a_checkpoint_of_another_adapter_is_refused(tmp_path):
    trainer = Trainer(small_run(tmp_path))
    trainer.save()
    with pytest.raises(ConfigError, match=r"model.lora_rank: got 4, the run was started with 16"):
        Trainer(small_run(tmp_path, model={"lora_rank": 4}, run={"resume": True}))
    (tmp_path / "config.yaml").write_text("model: {lora_rank: 4, lora_alpha: 32}\n")  # not what the checkpoint is of
    with pytest.raises(ConfigError, match="the run was started with"):
        Trainer(small_run(tmp_path, run={"resume": True}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"sampling": {"trained_steps": [3]}}, r"sampling.trained_steps: got \(3,\), expected some of 0..2"),
        (
            {"sampling": {"images_per_prompt": 1, "prompts_per_iteration": 2}},
            "sampling.images_per_prompt: got 1, expected a number at least 2",
        ),
        (
            {"optimization": {"updates_per_iteration": 4}},
            "updates_per_iteration: got 4, expected a divisor of an iteration's 6 images",
        ),
        ({"optimization": {"adam_epsilon": 0.0}}, "optimization.adam_epsilon: got 0.0, expected a number above 0"),
        (
            {"model": {"frozen_dtype": "bfloat16"}, "optimization": {"mixed_precision": "bfloat16"}},
            "sampling.merge_adapter: needs model.frozen_dtype 'float32', got 'bfloat16'",
        ),
        ({"run": {"resume": True}}, "run.resume: .* is no run of star"),
        ({"run": {"reward": "beauty"}}, "reward: unknown 'beauty'"),
        ({"model": {"path": "/nowhere"}}, "model.path: '/nowhere' is no pipeline"),
    ],
)
def test_what_cannot_run_is_one_clear_line(tmp_path, changes, words):
    with pytest.raises(ValueError, match=words):
        Trainer(small_run(tmp_path / "run", **changes))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("smapling: {}", "smapling: unknown key, expected one of"),
        ("sampling: {step: 3}", "sampling.step: unknown key"),
        ("sampling: {steps: many}", "sampling.steps: got 'many', expected int"),
        ("allocation: {strategy: best}", "allocation.strategy: got 'best', expected one of"),
        ("sampling: 3", "sampling: got 3, expected keys and values"),
        ("a: [", "is not YAML"),
        ("model: {lora_rank: 4}\nmodel: {lora_rank: 8}", "is not YAML .the key 'model' is there twice"),
        (
            "optimisation: 5\noptimization: {iterations: 3}",
            "optimization: got 5, expected keys and values .in .*config.yaml",
        ),
        # Short files that are trees without end, which a report would show.
        ("a: &a [*a]", "has more than 100,000 values, aliases followed"),
        ("a0: &a0 1\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9)), "aliases"),
    ],
)
def test_a_wrong_config_file_is_one_clear_line(tmp_path, text, words):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        configuration.load(path)
    assert "\n" not in str(caught.value)


def test_configurations_survive_yaml(tmp_path):
    config = preset("shapes")
    configuration.save(config, tmp_path / "config.yaml")
    assert configuration.load(tmp_path / "config.yaml") == config


def test_scores_before_are_never_measured_after(tmp_path):
    training.train(small_run(tmp_path, optimization={"iterations": 1}))
    with pytest.raises(ConfigError, match=r"scoring.count: the run was started without scoring"):
        training.train(small_run(tmp_path, scoring={"count": 4}, run={"resume": True}))
    write_evaluation(tmp_path, Evaluation(0, (None,) * 5, {"reward": np.zeros(5)}, 5, 0))
    with pytest.raises(ConfigError, match=r"scoring.count: got 4, the run was started with 5"):
        training.train(small_run(tmp_path, scoring={"count": 4}, run={"resume": True}))


@pytest.mark.parametrize("text", ["a red ring\ntwo green rings\n", "two green rings\na red circle\n"])
def test_held_out_prompts_that_changed_under_their_name_are_refused(tmp_path, text):
    """The file's name is the same, and so is the number of its prompts."""
    path = tmp_path / "held_out.txt"
    path.write_text("a red circle\ntwo green rings\n")
    changes = {"scoring": {"count": 2, "prompts": str(path)}, "optimization": {"iterations": 1}}
    run = tmp_path / "run"
    write_evaluation_of(run, small_run(run, **changes))
    held_out = HeldOut.of_run(configured_task(small_run(run, **changes)), small_run(run, **changes))
    held_out.check_resumed()
    path.write_text(text)
    _read_once.cache_clear()
    held_out = HeldOut.of_run(configured_task(small_run(run, **changes)), small_run(run, **changes))
    with pytest.raises(ConfigError, match=r"scoring.prompts: they are other prompts than the run was scored on"):
        held_out.check_resumed()


def write_evaluation_of(run, config):
    """What a run keeps of its scoring before training."""
    prompts = HeldOut.of_run(configured_task(config), config).prompts
    shown.write_prompts(run, [prompt.text for prompt in prompts])
    categories = tuple(prompt.category for prompt in prompts)
    write_evaluation(run, Evaluation(0, categories, {"reward": np.zeros(len(prompts))}, len(prompts), 0))


def test_overwrite_deletes_runs_only(tmp_path):
    precious = tmp_path / "precious.txt"
    precious.write_text("mine")
    with pytest.raises(ConfigError, match=r"run.overwrite: .* is no run of star"):
        Trainer(small_run(tmp_path, run={"overwrite": True}))
    assert precious.read_text() == "mine"
    (tmp_path / "config.yaml").write_text("site_name: mine\n")  # as of many programs
    with pytest.raises(
        ConfigError, match=r"run.overwrite: .*config.yaml is of no run of star \(site_name: unknown key"
    ):
        Trainer(small_run(tmp_path, run={"overwrite": True}))
    configuration.save(small_run(tmp_path), tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"run.overwrite: .*precious.txt was written by no run; move it away"):
        Trainer(small_run(tmp_path, run={"overwrite": True}))
    assert precious.read_text() == "mine"


def test_all_that_a_run_writes_may_be_overwritten(tmp_path):
    changes = {"optimization": {"iterations": 1}, "scoring": {"count": 2}}
    config = small_run(tmp_path, **changes, run={"figures": True, "grid_every": 1})
    training.train(config, ["star", "train"])
    assert not {path.name for path in tmp_path.iterdir()} - set(folder.WRITTEN)
    folder.check_deletable(tmp_path)


def test_a_prompt_file_without_enough_distinct_prompts_is_one_clear_line(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\na red circle\n")
    with pytest.raises(ConfigError, match=r"sampling.prompts: .* has 1 distinct prompts, an iteration needs 3"):
        Trainer(small_run(tmp_path / "run", sampling={"prompts": str(path)}))


# --- settings are checked before anything is loaded -------------------------------------------------------------------


def numbers(config):
    """(section, field, value) of every number in a configuration."""
    for field in dataclasses.fields(config):
        section = getattr(config, field.name)
        if dataclasses.is_dataclass(section) and field.name != "allocation":  # its operator checks those
            hints = typing.get_type_hints(type(section), include_extras=True)
            for name in hints:
                kinds = str(hints[name])
                if "int" in kinds.replace("hint", "") or "float" in kinds:
                    yield field.name, name, getattr(section, name)


NUMBERS = [(s, n) for s, n, v in numbers(preset("shapes")) if not isinstance(v, str | dict) and n != "reward"]


@pytest.mark.parametrize(("section", "name"), NUMBERS)
@pytest.mark.parametrize("wrong", [-1, -1.5, float("nan"), float("inf")])
def test_every_number_has_a_range(section, name, wrong):
    """A field of a number that declares no range fails here; guidance may be negative."""
    if name == "guidance_scale" and np.isfinite(wrong):
        return
    config = preset("shapes")
    old = getattr(getattr(config, section), name)
    if isinstance(old, bool):
        return
    value = tuple(wrong for _ in old) if isinstance(old, tuple) else wrong
    setattr(getattr(config, section), name, value)
    with pytest.raises(ConfigError, match=rf"{section}\.{name}: got .*, expected"):
        config.check()


def test_a_resumed_run_uses_what_it_records_and_names_it(tmp_path, caplog):
    average = {"ema_decay": 0.9, "ema_every": 1, "iterations": 1}
    training.train(small_run(tmp_path, optimization={**average, "learning_rate": 1e-3}))
    changed = {**average, "iterations": 2, "learning_rate": 1e-6, "weight_decay": 0.5, "ema_decay": 0.5}
    trainer = Trainer(small_run(tmp_path, optimization=changed, run={"resume": True}))
    (group,) = trainer.policy.optimizer.param_groups
    assert (group["lr"], group["weight_decay"], trainer.policy.ema.decay) == (1e-6, 0.5, 0.5)
    (message,) = (r.message for r in caplog.records if "run.resume" in r.message)
    for name in ("learning_rate 1e-06 (was 0.001)", "weight_decay", "ema_decay 0.5 (was 0.9)"):
        assert f"optimization.{name}" in message
    assert "iterations" not in message
    with pytest.raises(ConfigError, match=r"model.lora_alpha: got 5, the run was started"):
        training.train(small_run(tmp_path, model={"lora_alpha": 5}, run={"resume": True}))


def test_the_seconds_of_a_run_count_those_before_it_was_resumed(tmp_path, monkeypatch):
    training.train(small_run(tmp_path, optimization={"iterations": 1}))
    (place,) = checkpoint.checkpoints(tmp_path)
    meta = json.loads((place / "meta.json").read_text())
    assert 0 < meta["seconds"] < 600 and checkpoint.elapsed(place) == meta["seconds"]
    (place / "meta.json").write_text(json.dumps({**meta, "seconds": 1000.0}))
    summary = training.train(small_run(tmp_path, optimization={"iterations": 2}, run={"resume": True}))
    assert 1000 < summary["seconds"] < 1600
    del meta["seconds"]  # as version 0.1 wrote it
    (place / "meta.json").write_text(json.dumps(meta))
    assert checkpoint.elapsed(place) == 0 and checkpoint.load(place)["iteration"] == 1


def test_a_refused_model_is_told_in_the_hubs_words():
    """diffusers says that there is no such model; what the hub said stands behind it."""
    answer = types.SimpleNamespace(headers={}, request=None, status_code=401)
    gated = GatedRepoError("Access to this model is restricted.\nPlease log in.", response=answer)
    shown = OSError("owner/model is not a valid model identifier\nIf this is a private repository, ...")
    shown.__cause__ = gated
    text = reason(shown)
    assert text.startswith("Access to this model is restricted. Please log in.") and "hf auth login" in text
    assert reason(OSError()) == "OSError" and "disk is full" in reason(OSError(28, "No space left on device"))


def test_a_run_in_use_is_refused_and_touched_by_nobody(tmp_path):
    training.train(small_run(tmp_path / "run", optimization={"iterations": 1}))
    lock = FolderLock(tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for how in ("resume", "overwrite"):
        with pytest.raises(ConfigError, match="another process trains into"):
            training.train(small_run(tmp_path / "run", run={how: True}))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before
    lock.release()
    training.train(small_run(tmp_path / "run", optimization={"iterations": 1}, run={"overwrite": True}))


def test_a_run_whose_first_file_was_cut_short_starts(tmp_path):
    (tmp_path / ".config.yaml.writing").write_text("mod")
    assert training.train(small_run(tmp_path, optimization={"iterations": 1}, run={"resume": True}))["iterations"] == 1


@pytest.mark.parametrize(("height", "words"), [(37, "a multiple of 4"), (40, "at most 36")])
def test_sizes_that_the_model_cannot_draw(tmp_path, height, words):
    with pytest.raises(ConfigError, match=f"model.height: got {height}, expected .*{words}"):
        Trainer(small_run(tmp_path / "run", model={"height": height}))


def test_an_adapter_that_fits_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"model.lora_targets: 'attn.to_kk' matches no linear layer"):
        Trainer(small_run(tmp_path / "run", model={"lora_targets": ["attn.to_q", "attn.to_kk"]}))


def test_the_launchers_environment_changes_nothing(tmp_path, monkeypatch):
    plain = Trainer(small_run(tmp_path / "a")).step()["grad_norm"]
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert Trainer(small_run(tmp_path / "b")).step()["grad_norm"] == plain
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match="ACCELERATE_USE_DEEPSPEED is set"):
        Trainer(small_run(tmp_path / "c"))


def test_checkpoints_are_ordered_by_number(tmp_path):
    for i in (999_998, 999_999, 1_000_000, 1_000_001):
        checkpoint.save(tmp_path, i, {"x": torch.tensor(i)}, keep=2)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["iteration-1000000", "iteration-1000001"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"])
def test_signals_that_end_a_run_leave_a_checkpoint(tmp_path, monkeypatch, name):
    step = Trainer.step

    def interrupted(trainer):
        metrics = step(trainer)
        signal.raise_signal(getattr(signal, name))
        return metrics

    monkeypatch.setattr(Trainer, "step", interrupted)
    config = small_run(tmp_path, optimization={"iterations": 3}, run={"save_every": 50})
    assert training.train(config) == {"iterations": 1, "stopped": name}
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == ["iteration-000001"]


def test_a_second_ctrl_c_ends_at_once():
    with Termination() as termination:
        signal.raise_signal(signal.SIGINT)
        assert termination.received == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_figure_that_cannot_be_drawn_ends_no_run(tmp_path, monkeypatch, caplog):
    def fails(*arguments):
        raise OSError("no font")

    monkeypatch.setattr(figures, "rollout_grid", fails)
    monkeypatch.setattr(figures, "reward_curve", fails)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('costs $a_{ and $ red circle\na sign "$5 and $10"\ntwo blue rings\n')
    config = small_run(
        tmp_path / "run",
        sampling={"prompts": str(prompts)},
        run={"grid_every": 1, "figures": True, "reward": "test_training:brightness"},
    )
    assert training.train(config)["iterations"] == 2
    assert sum("could not be drawn (OSError: no font)" in r.message for r in caplog.records) == 3
    assert (tmp_path / "run/allocation.png").exists()


def test_prompts_mark_their_concepts_with_brackets(tmp_path):
    """Model and reward see the prompts without brackets; the maps follow what stood in them."""
    plain = ["a red circle above a blue square", "two green rings", "three yellow circles"]
    marked = ["a red [circle] above a blue square", "[two green] rings", "three yellow circles"]
    files = {}
    for name, lines in (("plain", plain), ("marked", marked)):
        files[name] = tmp_path / f"{name}.txt"
        files[name].write_text("\n".join(lines))
    run = {"prompts_per_iteration": 3, "images_per_prompt": 2}
    trainers = {
        name: Trainer(
            small_run(
                tmp_path / name,
                sampling={**run, "prompts": str(path), "brackets": name == "marked"},
                allocation={"strategy": "attention"},
            )
        )
        for name, path in files.items()
    }  # fmt: skip
    drawn = {name: draw_prompts(one.task, one.config, 0) for name, one in trainers.items()}
    assert [p.text for p in drawn["marked"]] == [p.text for p in drawn["plain"]]
    texts = {p.text: [c.text for c in p.concepts or ()] for p in drawn["marked"]}
    assert texts == {plain[0]: ["circle"], plain[1]: ["two green"], plain[2]: []}
    steps = {name: one.step() for name, one in trainers.items()}
    assert steps["marked"]["reward"] == steps["plain"]["reward"]
    assert steps["marked"]["weights_max"] != steps["plain"]["weights_max"]
    files["marked"] = tmp_path / "wrong.txt"
    files["marked"].write_text("red [circle")
    with pytest.raises(ConfigError, match=r"prompts: 'red \[circle' has a '\[' that nothing closes"):
        wrong = dict(prompts_per_iteration=1, prompts=str(files["marked"]), brackets=True)
        Trainer(small_run(tmp_path / "wrong", sampling=wrong))


def test_overwrite_spares_what_the_run_itself_needs(tmp_path):
    out = tmp_path / "run"
    training.train(small_run(out, optimization={"iterations": 1}))
    kept = sorted(path for path in out.rglob("*") if path.is_file())
    needs = [{"model": {"adapter": str(out / "lora")}}, {"sampling": {"prompts": str(out / "held_out/prompts.jsonl")}}]
    for changes in needs:
        config = small_run(out, run={"overwrite": True}, **changes)
        with pytest.raises(
            ConfigError, match=r"run.overwrite: .* holds (model.adapter|sampling.prompts) .*move it away"
        ):
            folder.prepare_folder(config)
    assert sorted(path for path in out.rglob("*") if path.is_file()) == kept


def test_a_runs_configuration_may_be_used_again(tmp_path):
    """With overwrite in it, the next run with that file would delete this one."""
    for how in ("overwrite", "resume"):
        training.train(
            small_run(tmp_path / "run", optimization={"iterations": 1}, run={how: (tmp_path / "run").exists()})
        )
    again = configuration.load(tmp_path / "run/config.yaml")
    assert (again.run.overwrite, again.run.resume) == (False, False)
    with pytest.raises(ConfigError, match="is not empty"):
        training.train(again)


def test_a_slip_leaves_no_folder_that_blocks_the_corrected_command(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(ConfigError, match="matches no linear layer"):
        training.train(small_run(out, model={"lora_targets": ["attn.to_kk"]}))
    assert not out.exists()
    assert training.train(small_run(out, optimization={"iterations": 1}))["iterations"] == 1


def test_a_resumed_run_cannot_end_before_it_is(tmp_path):
    training.train(small_run(tmp_path / "run", optimization={"iterations": 2}))
    before = (tmp_path / "run/config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"optimization.iterations: got 1, the run has had 2; set at least as many"):
        training.train(small_run(tmp_path / "run", optimization={"iterations": 1}, run={"resume": True}))
    assert (tmp_path / "run/config.yaml").read_text() == before


def test_a_run_that_ends_without_a_scoring_has_no_score_of_an_earlier_one(tmp_path):
    once = training.train(small_run(tmp_path / "run", optimization={"iterations": 1}, scoring={"count": 2}))
    assert once["held_out"]
    changes = {"optimization": {"iterations": 2}, "scoring": {"count": 0}, "run": {"resume": True}}
    assert training.train(small_run(tmp_path / "run", **changes))["held_out"] == {}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"run": {"seed": 2**32}}, r"run.seed: got 4294967296, expected a number at least 0 and at most 4294967295"),
        ({"run": {"seed": 10**400}}, r"run.seed: got 10+, expected a number"),
        ({"optimization": {"learning_rate": 10**400}}, r"optimization.learning_rate: got 10+, expected float"),
    ],
)
def test_numbers_that_nothing_takes(tmp_path, values, words):
    with pytest.raises(ConfigError, match=words):
        small_run(tmp_path, **values).check()
