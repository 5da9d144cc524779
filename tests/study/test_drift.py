"""What runs changed that no prompt names: a model that repaints the background has drifted, one that does not has not;
and arms are compared at the same score."""

import copy
import dataclasses
import json
import random

import numpy as np
import pytest
import torch

from star import config as configuration
from star import files
from star.cli import main
from star.reports.evaluations import Evaluation, write_evaluation
from star.shapes import scenes
from star.shapes.drift import MEASURES, unasked_changes
from star.study import drift, intervals, spec
from star.study.drift import Comparison, Drift, diversity
from star.study.results import METRIC, Results, images_per_iteration
from star.train import Trainer
from star.training import checkpoint, policy

# --- the embedded world -----------------------------------------------------------------------------------------------


def drawn(scene, seed=0):
    image, masks = scenes.render(scene, random.Random(seed))
    return torch.from_numpy(image), torch.from_numpy(masks)


def moved(text, change):
    """What changed between an image of a prompt and the same image after `change` of (image, masks)."""
    image, masks = drawn(scenes.parse_scene(text))
    images = torch.stack([image, change(image.clone(), masks)]).permute(0, 3, 1, 2)
    return unasked_changes(images[:1], images[1:], [text])


def repaint(image, masks, level=0.92):
    """Another background behind the same objects."""
    cover = masks.amax(0)[..., None]
    behind = image[0, 0]
    return image + (1 - cover) * (level - behind)


def test_a_repainted_background_has_changed_and_nothing_else():
    found = moved("a red circle", repaint)
    assert found["background"] > 0.3 and found["background_shares"] == 1
    assert found["size"] < 0.5 and found["location"] < 0.5 and np.isnan(found["color"])


def test_what_the_prompt_names_is_no_drift():
    named = moved("a red circle on a gray background", repaint)
    assert np.isnan(named["background"]) and np.isnan(named["background_shares"])
    assert np.isnan(moved("a red circle", repaint)["color"])
    assert np.isnan(moved("a red circle left of a blue square", repaint)["location"])


def test_an_object_of_another_color_has_changed_where_its_color_is_free():
    found = moved("a circle", lambda image, masks: image[..., [1, 2, 0]])
    assert found["color"] == found["color_shares"] == 1 and found["size"] < 0.5
    assert found["background"] == pytest.approx(0, abs=1e-6)


def red_circle(x, y, radius):
    cover = torch.from_numpy(scenes.coverage("circle", x, y, radius))
    return 1 - cover[None, None] * torch.tensor([0.0, 1.0, 1.0])[:, None, None]  # on white


def test_an_object_elsewhere_and_a_smaller_one():
    found = unasked_changes(red_circle(12, 12, 4.5), red_circle(15, 16, 4.5), ["a red circle"])
    assert found["location"] == pytest.approx(5, abs=0.1) and found["size"] == pytest.approx(0, abs=0.1)
    assert found["background"] == pytest.approx(0, abs=1e-6)
    found = unasked_changes(red_circle(18, 18, 4.8), red_circle(18, 18, 3.9), ["a red circle"])
    assert found["size"] == pytest.approx(0.9 * np.pi**0.5, abs=0.4) and found["location"] < 0.1


def test_no_change_is_zero_everywhere():
    texts = ["a circle", "three green rings", "a red ring and a blue cross", "a circle and a square"]
    images = torch.stack([drawn(scenes.parse_scene(text), i)[0] for i, text in enumerate(texts)]).permute(0, 3, 1, 2)
    assert unasked_changes(images, images, texts) == dict.fromkeys(MEASURES, 0.0)


def test_shares_are_of_all_images():
    """Two objects that swap their colors have other colors, but not more of any."""
    red, blue = (torch.tensor(scenes.COLORS[name]) for name in ("red", "blue"))
    cover = torch.from_numpy(scenes.coverage("circle", 18, 18, 4.5))[..., None]
    images = torch.stack([0.45 * (1 - cover) + cover * color for color in (red, blue)]).permute(0, 3, 1, 2)
    found = unasked_changes(images, images.flip(0), ["a circle"] * 2)
    assert found["color"] == 1 and found["color_shares"] == 0


def test_diversity_by_hand():
    images = torch.zeros(4, 3, 2, 2)
    images[1], images[3, :, 0] = 0.5, 1  # all pixels by a half; half of the pixels by 1
    assert diversity(images, 2) == pytest.approx((0.5 + 0.5**0.5) / 2)


# --- a study's checkpoints --------------------------------------------------------------------------------------------

CHANGES = {
    "model": {"lora_rank": 0},
    "sampling": {"prompts_per_iteration": 2, "images_per_prompt": 2, "steps": 3, "merge_adapter": False},
    "optimization": {"iterations": 2, "ema_decay": 0.9},
    "scoring": {"every": 1, "count": 8},
    "run": {"keep_checkpoints": 9, "figures": False},
}


def study():
    arms = {"still": {}, "repaints": {"allocation": {"strategy": "uniform"}}}
    return spec.Study(seeds=(0, 1), baselines=("still",), changes=CHANGES, arms=arms)


def finished(out, shift):
    """The folders of a study whose second arm ends with a model that adds `shift` to its velocity, and so to images."""
    own = study()
    start = own.config("still", 0, out / "start")
    untrained = {"iteration": 0, **Trainer(start).policy.state_dict()}
    place = list(untrained["parameters"]).index("proj_out.bias")
    for arm in own.arms:
        for seed in own.seeds:
            config, state = own.config(arm, seed, out), copy.deepcopy(untrained)
            run = config.run.out
            # What is scored is the average; the weights themselves are of no interest.
            state["parameters"]["proj_out.bias"] += 9.0
            if arm == "repaints":
                state["ema"]["shadow_params"][place] += shift
            checkpoint.save(run, 2, state, keep=9)
            configuration.save(config, run / "config.yaml")
            (run / "summary.json").write_text(json.dumps({"iterations": 2, "seconds": 1.0}))
            (run / "metrics.jsonl").write_text(json.dumps({"iteration": 0, "reward": 0.5, "seconds/rollout": 1}) + "\n")
            for iteration in range(3):
                score = np.full(8, 0.5 + 0.1 * iteration + 0.001 * seed)
                write_evaluation(run, Evaluation(iteration, (None,) * 8, {"reward": score}, 8, 0))
    spec.save_study(own, out / "study.yaml")


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A study that was measured by the command, and what the command had sampled: the first time, and the second."""
    out = tmp_path_factory.mktemp("study")
    finished(out, 0.4)
    patch = pytest.MonkeyPatch()
    patch.setattr(drift, "PROMPTS", 6)
    patch.setattr(drift, "IMAGES", 2)
    sampled, counts = [], []
    sample = Comparison._sample
    patch.setattr(Comparison, "_sample", lambda *given: (sampled.append(given), sample(*given))[1])
    assert main(["compare", "--no-train", "--drift", "--out", str(out)]) == 0
    counts.append(len(sampled))
    drift.measure(study(), out)
    counts.append(len(sampled))
    yield {"out": out, "counts": counts, "sampled": sampled}
    patch.undo()


def lines(out, run):
    return [json.loads(line) for line in (out / "runs" / run / drift.FILE).read_text().splitlines()]


def test_a_model_that_repaints_drifts_and_one_that_does_not_does_not(measured):
    for seed in (0, 1):
        (still,), (repaints,) = (lines(measured["out"], f"{arm}-{seed}") for arm in ("still", "repaints"))
        assert {value for value in still["values"].values() if value is not None} == {0.0}
        assert repaints["values"]["background"] > 0.02 and repaints["values"]["diversity"] != 0


def test_the_table_compares_arms_at_equal_score(measured):
    text = (measured["out"] / "report.md").read_text()
    assert "**drift at equal score: difference to still**" in text and "| repaints | +" in text
    assert "Drift at equal score says little of still, repaints: one checkpoint was measured" in text
    rows = [line for line in text.splitlines() if line.startswith("| still | 2 | ")]
    assert rows and "+0.000 [+0.000, +0.000]" in rows[0]


def test_what_is_measured_is_kept_and_what_changed_is_measured_again(measured):
    out, sampled = measured["out"], measured["sampled"]
    assert measured["counts"] == [5, 5]  # two arms and seeds, and the untrained model once
    run = study().config("still", 1, out).run.out
    state = checkpoint.load(run / "checkpoints/iteration-000002")
    state["ema"]["shadow_params"][0] += 0.01
    checkpoint.save(run, 3, state, keep=1)  # the earlier checkpoint goes, what was measured of it stays
    drift.measure(study(), out)
    assert len(sampled) == 5 + 2  # the untrained model's images are not kept
    first, second = lines(out, "still-1")
    assert set(first["values"].values()) <= {0.0, None} and second["values"]["diversity"]
    checkpoint.save(run, 3, checkpoint.load(run / "checkpoints/iteration-000003") | {"iteration": 9}, keep=1)
    drift.measure(study(), out)
    assert len(sampled) == 7 + 2 and lines(out, "still-1")[1] != second


def test_a_checkpoint_of_another_model_is_one_line(measured, tmp_path):
    config = study().config("still", 0, measured["out"])
    state = checkpoint.load(checkpoint.checkpoints(config.run.out)[-1])
    del state["parameters"]["proj_out.bias"]
    path = checkpoint.save(tmp_path, 2, state, keep=1)
    with pytest.raises(checkpoint.CheckpointError, match="is of another model or adapter"):
        policy.load_averaged(Comparison(config)._pipeline(), config, path)


@pytest.mark.parametrize(
    "line",
    [
        {"iteration": True, "values": {}},
        {"iteration": -1, "values": {}},
        {"iteration": 1, "values": [1]},
        *({"iteration": 1, "values": {"diversity": value}} for value in ("0.5", True, [1], {})),
    ],
)
def test_a_line_that_is_no_drift_is_named_with_its_number(tmp_path, line):
    out = tmp_path / "study"
    results, _ = two_arms(0.4, 0.6)
    own = dataclasses.replace(study(), arms={"slow": {}, "quick": {}}, baselines=("slow",))
    run = own.config("slow", 0, out).run.out
    run.mkdir(parents=True)
    (run / drift.FILE).write_text('\n{"iteration": 1, "values": {"diversity": null}}\n' + json.dumps(line) + "\n")
    with pytest.raises(files.Unreadable, match=r"drift.jsonl:3 has no drift of a checkpoint; delete that line"):
        drift.load(own, results, out)


def test_of_a_single_checkpoint_the_report_says_what_an_equal_score_means():
    _, found = two_arms(0.4, 0.6)
    assert drift.notes(found) == []
    found.iterations["slow"] = np.array([0, 40])
    (note,) = drift.notes(found)
    assert note.startswith("Drift at equal score says little of slow: one checkpoint was measured")


# --- comparing --------------------------------------------------------------------------------------------------------


def two_arms(slow, quick):
    """Four seeds of two arms that reach 0.4 and 0.8 after 40 iterations, and change this much meanwhile."""
    iterations, names = np.array([0, 10, 20, 30, 40]), np.array(["x", "y"])
    rise = iterations[:, None] / 40
    noise = np.random.default_rng(0).normal(0, 0.01, (4, 2))
    scores = {
        "slow": {s: 0.4 * rise + noise[s] for s in range(4)},
        "quick": {s: 0.8 * rise + 1.1 * noise[s] for s in range(4)},
    }
    results = Results(iterations, names, names, {METRIC: scores}, {}, {"slow": 96, "quick": 96})
    measured = {"slow": np.array([0, 20, 40]), "quick": iterations}
    values = {"slow": {s: slow * np.array([0, 0.5, 1]) + 0.01 * s for s in range(4)}}
    values["quick"] = {s: quick * iterations / 40 + 0.012 * s for s in range(4)}
    return results, Drift(measured, {"background": values})


def test_drift_is_compared_where_the_scores_are_equal():
    """The quick arm changes more by the end, and less by the time at which it is as good as the slow one."""
    results, found = two_arms(slow=0.4, quick=0.6)
    # The slow arm's final score is the mean of 0.2, 0.3 and 0.4, which it reaches after 30 iterations, the quick one
    # after 15.
    one = drift.at_equal_score(results, found, "background", "quick", "slow")
    assert one.estimate.mean == pytest.approx(0.6 * 15 / 40 - 0.4 * 30 / 40, abs=0.01)
    assert one.significant and one.better == 0 and one.seeds == 4 and one.estimate.high < 0
    assert drift.at_the_end(found, "background", "quick").mean == pytest.approx(0.6 + 0.018)
    other = drift.at_equal_score(results, found, "background", "slow", "quick")
    assert other.estimate.mean == pytest.approx(-one.estimate.mean)


def test_a_score_that_comes_after_the_last_measured_checkpoint_compares_nothing():
    results, found = two_arms(slow=0.4, quick=0.6)
    found.iterations["slow"] = np.array([0, 5, 10])
    assert drift.at_equal_score(results, found, "background", "quick", "slow") is None


def test_one_seed_has_no_interval():
    results, found = two_arms(slow=0.4, quick=0.6)
    for by_seed in results.scores[METRIC].values():
        del by_seed[1], by_seed[2], by_seed[3]
    one = drift.at_equal_score(results, found, "background", "quick", "slow")
    assert one.seeds == 1 and np.isnan([one.estimate.low, one.estimate.high, one.p]).all() and not one.significant


# --- images -----------------------------------------------------------------------------------------------------------


def test_an_arm_with_fewer_images_is_compared_at_equal_images():
    results, _ = two_arms(0.4, 0.6)
    results.images["quick"] = 64
    # The slow arm has two thirds of its images, where the quick one ends, after 26.7 iterations: it is compared at 10
    # and 20, when it is as far as the quick one is after 15 and 30.
    one = intervals.difference(results, "quick", "slow")
    assert one.estimate.mean == pytest.approx(0.8 * (15 + 30) / 2 / 40 - 0.4 * (10 + 20) / 2 / 40, abs=0.001)
    assert intervals.difference(results, "slow", "slow").estimate.mean == 0


@pytest.mark.parametrize(("quick", "shared"), [(64, [960, 1920]), (384, [3840])])
def test_arms_whose_first_scorings_are_at_other_numbers_of_images_are_compared_where_both_have_scores(quick, shared):
    """Without the scoring before training: an interpolation has no value before its first point."""
    results, _ = two_arms(0.4, 0.6)
    by_arm = {arm: {s: score[1:] for s, score in runs.items()} for arm, runs in results.scores[METRIC].items()}
    images = {"slow": 96, "quick": quick}
    results = dataclasses.replace(results, iterations=results.iterations[1:], scores={METRIC: by_arm}, images=images)
    curves = [results.curves(METRIC, arm) for arm in ("quick", "slow")]
    at, (ours, theirs) = intervals.at_equal_images(results, ("quick", "slow"), curves)
    assert at.tolist() == shared and ours.shape == theirs.shape == (4, len(shared), 2)
    gap = 0.8 * at / quick / 40 - 0.4 * at / 96 / 40
    np.testing.assert_allclose((ours - theirs).mean((0, 2)), gap, atol=0.005)
    one = intervals.difference(results, "quick", "slow")
    if len(shared) < 2:
        assert one is None
    else:
        assert one.estimate.mean == pytest.approx(gap.mean(), abs=0.005)


def test_images_to_a_score_have_an_interval():
    results, _ = two_arms(0.4, 0.6)
    slow, quick = (intervals.images_to_reach(results, arm, "slow") for arm in ("slow", "quick"))
    assert slow.mean == pytest.approx(96 * 30) and quick.mean == pytest.approx(96 * 15, rel=0.01)
    assert quick.low <= quick.mean <= quick.high < slow.low
    never = intervals.images_to_reach(results, "slow", "quick")  # 0.6, and it ends with 0.4
    assert never.mean == never.low == never.high == np.inf
    results.images["quick"] = 192
    assert intervals.images_to_reach(results, "quick", "slow").mean == pytest.approx(192 * 15, rel=0.01)


def test_images_that_find_the_masks_count():
    config = configuration.update(
        spec.preset("credit").config("uniform", 0, spec.Path()),
        {"sampling": {"prompts_per_iteration": 5, "images_per_prompt": 4, "shared_noise": False}},
    )
    assert images_per_iteration(config) == 20
    explored = configuration.update(config, {"sampling": {"explore": "masks"}})
    assert images_per_iteration(explored) == 40
    assert images_per_iteration(configuration.update(explored, {"sampling": {"shared_noise": True}})) == 25
