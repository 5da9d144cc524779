"""What is read back of a study's runs, where rewards failed and where files are not those of the study."""

import copy
import dataclasses
import json
import logging

import numpy as np
import pytest

from star import config as configuration
from star.config import ConfigError
from star.reports.evaluations import Evaluation, write_evaluation
from star.study import command, intervals, page, results, spec, tables

CHANGES = {"optimization": {"iterations": 20}, "scoring": {"every": 10, "count": 4}}
STUDY = spec.Study(seeds=(0, 1), baselines=("slow",), changes=CHANGES, arms={"slow": {}, "quick": {}})


def finished(out, failed=(), prompts=4):
    """A study whose arm `quick` ends 0.1 higher. failed: (arm, seed, iteration, prompts without a reward)."""
    for arm in STUDY.arms:
        for seed in STUDY.seeds:
            config = STUDY.config(arm, seed, out)
            config.run.out.mkdir(parents=True)
            configuration.save(config, config.run.out / "config.yaml")
            (config.run.out / "summary.json").write_text(json.dumps({"iterations": 20, "seconds": 1.0}))
            for iteration in (0, 10, 20):
                score = np.array([0.1, 0.3, 0.5, 0.7])[:prompts] + 0.01 * seed + 0.005 * iteration * (arm == "quick")
                for where in failed:
                    if where[:3] == (arm, seed, iteration):
                        score[list(where[3])] = np.nan
                found = Evaluation(iteration, ("a", "b", "b", "b")[:prompts], {"reward": score}, prompts, 0)
                write_evaluation(config.run.out, found)
    return out


def test_a_prompt_whose_reward_failed_once_is_left_out_of_all_runs_and_told(tmp_path):
    """It would make every mean unknown, or arms would be compared on different prompts."""
    out = finished(tmp_path / "study", [("quick", 1, 10, [0]), ("slow", 0, 20, [2])])
    found = results.load(STUDY, out)
    assert found.left_out == 2 and found.categories.tolist() == ["b", "b"] and len(found.prompts) == 2
    np.testing.assert_allclose(found.curves("reward", "slow", None, [0]), [[[0.3, 0.7]] * 3], atol=1e-9)
    whole = results.load(STUDY, finished(tmp_path / "whole"))
    assert whole.left_out == 0 and whole.prompts[[1, 3]].tolist() == found.prompts.tolist()
    one = intervals.difference(found, "quick", "slow")
    assert one.estimate.mean == pytest.approx((0.05 + 0.1) / 2)
    assert "Left out everywhere: 2 of 4 held-out images, whose reward failed in some scoring of some run." in (
        page.reading_notes(found)
    )
    assert not any("Left out" in note for note in page.reading_notes(whole))


def test_each_run_is_in_a_table_so_that_others_can_be_compared_with_it(tmp_path):
    """The runs themselves are not in the repository."""
    out = finished(tmp_path / "study")
    (STUDY.config("quick", 1, out).run.out / "summary.json").write_text(json.dumps({"iterations": 10, "seconds": 1.0}))
    table = tables.run_table(results.load(STUDY, out), ["slow", "quick"])
    assert table.columns == ["arm", "seed 0", "seed 1"] and table.title == "each run at the end: reward"
    assert table.rows == [["slow", "0.4000", "0.4100"], ["quick", "0.4750", "-"]]
    assert f"**{table.title}**" in page.write(STUDY, results.load(STUDY, out), out)


def test_a_scoring_in_which_every_reward_failed_is_none(tmp_path, caplog):
    out = finished(tmp_path / "study", [("quick", 1, 10, range(4))])
    with caplog.at_level(logging.WARNING, "star"):
        found = results.load(STUDY, out)
    assert found.iterations.tolist() == [0, 20] and found.left_out == 0
    (told,) = caplog.messages
    assert "quick-1" in told and "after 10 iterations" in told


def test_without_a_prompt_that_has_all_rewards_nothing_compares(tmp_path):
    out = finished(tmp_path / "study", [("slow", 0, 0, [0, 1]), ("quick", 0, 20, [2, 3])])
    with pytest.raises(ConfigError, match=r"out: no held-out prompt of .* has a reward in every scoring of every run"):
        results.load(STUDY, out)


def test_scores_of_other_prompts_than_the_study_has_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"out: the runs of .* were scored on 3 prompts, the study has 4"):
        results.load(STUDY, finished(tmp_path / "study", prompts=3))


def test_a_study_keeps_its_prompts(tmp_path):
    """Runs name the file of the prompts alone: what is in it must not change under those that are finished."""
    study = copy.deepcopy(STUDY)
    study.prompts = ("a red circle", "a ring")
    command.prepare(study, tmp_path / "study")
    command.prepare(study, tmp_path / "study")
    study.prompts = ("a red circle", "two rings")
    with pytest.raises(ConfigError, match=r"prompts: .* was started with others; choose another --out"):
        command.prepare(study, tmp_path / "study")
    assert (tmp_path / "study/prompts.txt").read_text() == "a red circle\na ring\n"


def test_what_is_final_leaves_out_the_score_before_training():
    steps = np.arange(5.0)
    curves = steps[None, :, None]
    found = [intervals.final(curves[:, :count], steps[:count]).item() for count in (2, 3, 4, 5)]
    assert found == [1.0, 1.5, 2.0, 3.0]
    assert intervals.final(curves[:, 1:3], steps[1:3]) == 1.5  # of an arm that was not scored before training


def test_arms_that_are_scored_in_other_ways_are_refused_and_other_judges_told(tmp_path):
    scored = spec.Study(baselines=("a",), changes=CHANGES, arms={"a": {}, "b": {"scoring": {"seed": 1}}})
    with pytest.raises(ConfigError, match=r"arms.b.scoring.seed: got 1, expected 2026 as of a: scores are compared"):
        scored.check()
    judged = {"slow": {}, "quick": {"run": {"reward": "star.shapes.reward:every_object"}}}
    study, found = dataclasses.replace(STUDY, arms=judged), results.load(STUDY, finished(tmp_path / "study"))
    study.check()
    (note,) = page.judge_notes(study, found)
    assert "quick (star.shapes.reward:every_object)" in note and page.judge_notes(STUDY, found) == []


def test_a_bar_in_a_name_ends_no_column():
    table = tables.Table("one", ["arm", "a|b"], [["x", "1"]])
    assert table.markdown().splitlines()[2] == "| arm | a\\|b |"
