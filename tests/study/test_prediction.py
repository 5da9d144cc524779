"""Whether a probe foresees a study: the rank correlation on numbers whose answer is known, and one study asked."""

import json
import math

import numpy as np
import pytest

from star import files
from star.study import prediction, probe, spec
from star.study.prediction import describe, rank_correlation
from star.study.results import METRIC, Results


def test_ranks_count_and_not_distances():
    x = np.arange(8.0)
    up, down = rank_correlation(x, x**5), rank_correlation(x, -np.exp(x))
    assert up.rho == pytest.approx(1) and down.rho == pytest.approx(-1)
    assert 0 < up.low < 0.99 and up.high <= 1 and down.low == pytest.approx(-up.high)
    swapped = x.copy()
    swapped[[3, 4]] = swapped[[4, 3]]
    assert rank_correlation(x, swapped).rho == pytest.approx(1 - 12 / (8 * 63))


def test_the_interval_has_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.7):
        truth = 6 / np.pi * np.arcsin(rho / 2)  # Spearman's of a normal pair with this correlation
        inside = 0
        for _ in range(300):
            x, noise = rng.standard_normal((2, 9))
            found = rank_correlation(x, rho * x + (1 - rho**2) ** 0.5 * noise)
            inside += found.low <= truth <= found.high
        assert inside >= 0.9 * 300


def test_few_or_equal_numbers_have_no_rank_correlation():
    assert np.isnan(rank_correlation(np.arange(4.0), np.arange(4.0)).rho)
    assert np.isnan(rank_correlation(np.arange(6.0), np.ones(6)).rho)
    assert rank_correlation(np.array([]), np.array([])).pairs == 0


def measured(gains):
    """Results of three seeds in which each arm ends this much above the baseline."""
    iterations, names = np.array([0, 10, 20, 30]), np.array(["x", "y"])
    scores = {
        arm: {seed: np.full((4, 2), 0.5 + gain + 0.001 * seed) for seed in range(3)}
        for arm, gain in {"uniform": 0.0, **gains}.items()
    }
    return Results(iterations, names, names, {METRIC: scores}, {}, dict.fromkeys(scores, 96))


def test_the_sentence_says_what_was_ranked():
    gains = {name: 0.01 * i for i, name in enumerate("abcdef", 1)}
    predicted = {
        "uniform": 0.0,
        **{name: 1e-4 * gain for name, gain in gains.items()},
        "unmeasured": 9.0,
        "unknown": None,
    }
    text = describe(predicted, measured(gains), "uniform")
    assert "gains over uniform of 6 arms (a, b, c, d, e, f) with Spearman's rho +1.00 [+0." in text
    opposite = {name: -gain for name, gain in gains.items()}
    assert "rho -1.00" in describe(opposite, measured(gains), "uniform")
    few = describe({"a": 0.1, "b": 0.2}, measured(gains), "uniform")
    assert "were trained, and has 2." in few


def test_arms_of_a_study_are_probed_once_on_the_same_images(tmp_path, monkeypatch):
    changes = {
        "model": {"lora_rank": 4, "lora_alpha": 8},
        "sampling": {"prompts_per_iteration": 2, "images_per_prompt": 2, "steps": 3},
        "optimization": {"iterations": 2},
        "scoring": {"every": 1, "count": 8},
    }
    arms = {
        "uniform": {"allocation": {"strategy": "uniform"}},
        "attention": {},
        "concept": {"allocation": {"strategy": "uniform"}, "loss": {"advantage": "concept"}},
        "masks": {"allocation": {"strategy": "oracle"}},
        "other_images": {"sampling": {"images_per_prompt": 4}},
        "other_rate": {"optimization": {"learning_rate": 1.0}},
    }
    study = spec.Study(seeds=(0,), baselines=("uniform",), changes=changes, arms=arms)
    assert list(prediction.comparable_arms(study, tmp_path)) == ["uniform", "attention", "concept", "masks"]
    prediction.measure(study, tmp_path, probe.Probe(3, 2, 2))
    found = json.loads((tmp_path / prediction.FILE).read_text())["arms"]
    assert set(found) == {"uniform", "attention", "concept", "masks"} and found["uniform"][prediction.GAIN] == 0
    norms = [numbers["norm"] for numbers in found.values()]
    assert len(set(norms)) == 4 and min(norms) > 0
    monkeypatch.setattr(probe, "compare_arms", None)
    prediction.measure(study, tmp_path, probe.Probe(3, 2, 2))  # nothing is left to do
    (text,) = prediction.notes(study, measured({"attention": 0.1}), tmp_path)
    assert "were trained, and has 1." in text
    assert prediction.notes(study, measured({}), tmp_path / "elsewhere") == []


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"arms": 3}',
        '{"arms": {"a": 3}}',
        *(json.dumps({"arms": {"a": {prediction.GAIN: value}}}) for value in ("0.1", True, [1], math.nan)),
        json.dumps({"arms": {"a": {prediction.GAIN: 0}}}).replace("0}", "1e999}"),
    ],
)
def test_a_damaged_probe_is_one_line_that_names_the_file(tmp_path, text):
    (tmp_path / prediction.FILE).write_text(text)
    with pytest.raises(files.Unreadable, match=r"probe\.json") as caught:
        prediction.notes(spec.Study(baselines=("uniform",)), measured({"a": 0.1}), tmp_path)
    assert "\n" not in str(caught.value)
