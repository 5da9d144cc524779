"""`star probe`: every number of it on inputs whose answer is known, and one run of the whole."""

import dataclasses
import json

import numpy as np
import pytest
import torch

from builders import small_run
from star.cli import main
from star.config import ConfigError
from star.rewards import Scores
from star.rewards.worker import RewardError
from star.study import probe as probing
from star.study.probe import Probe, area_under_curve, correlations, recommend, relative_map


def test_area_under_curve():
    masks = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    assert area_under_curve(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), masks) == 1
    assert area_under_curve(torch.tensor([[1.0, 2.0, 3.0, 4.0]]), masks) == 0
    assert area_under_curve(torch.ones(1, 4), masks) == 0.5
    assert area_under_curve(torch.tensor([[4.0, 1.0, 2.0, 0.0]]), masks) == pytest.approx(0.75)
    assert np.isnan(area_under_curve(torch.ones(1, 4), torch.ones(1, 4)))


def test_a_flat_map_is_flat():
    assert torch.allclose(relative_map(torch.full((2, 3, 6), 0.1), (2, 3)), torch.ones(2, 6))


def test_correlations_find_where_the_reward_looks():
    rng = np.random.default_rng(0)
    inside = rng.random((12, 20))
    pairs = [np.stack([x + 0.1 * rng.random(20), x, rng.random(20)], 1) for x in inside]
    (near, far), (near_error, far_error) = correlations(pairs)
    assert near > 0.9 and abs(far) < 4 * far_error and 0 < near_error < far_error
    assert np.isnan(correlations([np.ones((4, 3))])[0]).all()


def gains(**by_arm):
    numbers = {arm: {"adamw_agreement_gain": g, "adamw_agreement_gain_error": e} for arm, (g, e) in by_arm.items()}
    return numbers | {"uniform": {"adamw_agreement_gain": 0.0, "adamw_agreement_gain_error": 0.0}}


def test_the_recommendation_needs_more_than_luck():
    assert recommend(gains(attention=(0.02, 0.005), location=(0.05, 0.01)), 16) == "location"
    assert recommend(gains(attention=(0.02, 0.005), location=(0.05, 0.03)), 16) == "attention"
    assert recommend(gains(attention=(0.02, 0.005)), 3) == "uniform"  # 4 errors, but of three batches
    assert recommend(gains(attention=(-0.1, 0.01), oracle=(0.5, 0.01)), 16) == "uniform"
    assert recommend(gains(attention=(None, None)), 16) == "uniform"


def left(images, prompts, metadata):
    """Looks at the left half alone, and says so."""
    field = images.mean(1)
    masks = torch.zeros_like(field)
    masks[:, :, :18] = 1
    return Scores(field[:, :, :18].mean((1, 2)), masks=masks, reward_map=field * masks)


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_a_probe_measures_every_arm_and_changes_nothing(tmp_path, objective):
    changes = {"run": {"reward": "test_probe:left"}}
    if objective == "nft":
        changes |= {
            "loss": {"objective": "nft", "noise_levels": 1},
            "sampling": {"shared_noise": False},
        }
    found = probing.probe(small_run(tmp_path / "run", **changes), Probe(3, 2, 2))
    assert not (tmp_path / "run").exists()
    assert set(found.gradients) == {"uniform", "attention", "oracle", "location"}
    assert found.images == 12 and len(found.concentration) == len(found.localization) == 4
    assert all(x > 1 for x in found.concentration) and all(0 < x < 1 for x in found.localization)
    assert found.gradients["uniform"]["adamw_agreement_gain"] == 0
    assert all(numbers["norm"] > 0 for numbers in found.gradients.values())
    assert found.gradients["oracle"]["norm"] != found.gradients["uniform"]["norm"]
    text = probing.verdict(found)
    assert text.startswith(f"Recommended: {found.recommended}.")


def test_a_run_with_credits_of_concepts_has_an_arm_for_them(tmp_path):
    changes = {"loss": {"advantage": "concept"}, "sampling": {"explore": "masks"}, "allocation": {"warmup": 5}}
    changes["run"] = {"resume": True}  # the probe of a run that goes on is of its beginning
    found = probing.probe(small_run(tmp_path / "run", **changes), Probe(3, 2, 2))
    assert set(found.gradients) == {"uniform", "attention", "oracle", "location", "concept"}
    assert found.gradients["concept"]["norm"] != found.gradients["uniform"]["norm"]
    assert found.gradients["attention"]["norm"] != found.gradients["uniform"]["norm"]  # the warm-up is not waited for


def constant(images, prompts, metadata):
    return torch.ones(len(images))


def broken(images, prompts, metadata):
    raise RuntimeError("no server")


def broken_at_first(images, prompts, metadata):
    broken_at_first.calls += 1  # a batch, then its two images one by one
    return broken(images, prompts, metadata) if broken_at_first.calls <= 3 else left(images, prompts, metadata)


def probed(out, reward, **changes):
    return probing.probe(small_run(out, **changes, run={"reward": f"test_probe:{reward}"}), Probe(3, 2, 2))


def test_equal_rewards_are_told_and_the_file_is_json(tmp_path):
    found = probed(tmp_path, "constant")
    assert found.equal and found.inside == found.outside == (None, None)
    text = probing.verdict(found)
    assert "same reward" in text and "nan" not in text and "--batches" not in text
    json.dumps(dataclasses.asdict(found), allow_nan=False)


def test_a_reward_that_always_fails_ends_the_probe_as_it_ends_a_run(tmp_path):
    with pytest.raises(RewardError, match=r"no server.*it failed for every image"):
        probed(tmp_path, "broken")


def test_images_without_a_reward_are_counted(tmp_path):
    broken_at_first.calls = 0
    found = probed(tmp_path, "broken_at_first", optimization={"micro_batch": 3})  # of 4 images two fit into a pass
    assert (found.failed, found.images, found.equal) == (2, 12, False)
    text = probing.verdict(found)
    assert text.startswith("2 of 12 images have no reward. Recommended") and "nan" not in text
    json.dumps(dataclasses.asdict(found), allow_nan=False)


@pytest.mark.parametrize("loss", [{"ratio": "sample"}, {"normalize_rewards": True}])
def test_what_the_run_would_refuse_is_no_arm(tmp_path, loss):
    assert set(probed(tmp_path, "left", loss=loss).gradients) == {"uniform", "attention", "oracle"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"advantage": "location"}}, "loss.advantage: 'location' needs a reward"),
        ({"loss": {"advantage": "concept"}}, "loss.advantage: 'concept' needs a reward"),
        ({"allocation": {"strategy": "oracle"}}, "allocation.strategy: got 'oracle', which needs a reward"),
    ],
)
def test_a_reward_without_what_the_run_needs_is_refused_as_by_the_run(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        probed(tmp_path, "constant", **changes)


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="accelerate: got 2 processes, expected 1; start a probe without"):
        probed(tmp_path, "left")


def test_from_the_command_line(tmp_path, capsys):
    options = ["--batches", "3", "--prompts", "2", "--images", "2", "--sampling.steps", "3"]
    assert main(["probe", "--preset", "shapes", *options, "--json", str(tmp_path / "new" / "found.json")]) == 0
    printed = capsys.readouterr().out
    assert "Recommended:" in printed and "attention" in printed and "Too few images" in printed
    assert json.loads((tmp_path / "new" / "found.json").read_text())["images"] == 12
    assert main(["probe", "--preset", "shapes", "--batches", "2"]) == 1
    assert "batches: got 2, expected a number at least 3" in capsys.readouterr().err
    with pytest.raises(SystemExit):  # the start of a name is no name
        main(["probe", "--preset", "shapes", "--batch", "3"])
    assert "--batch" in capsys.readouterr().err
