"""What a run shows: metrics with a meaning, grids and trackers. Its page: test_page.py."""

import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from builders import small_run
from star import train as training
from star.config import ConfigError
from star.reports import tracking
from star.reports.metrics import MEANING, category_means, gradient_share, meaning, weight_metrics
from star_kernels.reference import NFT_STATISTICS


def test_every_metric_is_documented_once(runs):
    documented = Path(__file__).parents[2].joinpath("docs/metrics.md").read_text()
    assert re.findall(r"^\| `([^`]+)` \| (.+) \|$", documented.split("The metrics:")[1], re.M) == list(MEANING.items())
    logged = set(tracking.read(runs / "star")[0]) - {"iteration"}
    assert not [name for name in logged if not meaning(name)]
    # Nothing is documented that no run logs. This run's reward has one term, and details.
    missing = {name for name in MEANING if not name.endswith("*") and name not in logged}
    assert missing == set(NFT_STATISTICS) - {"kl", "nonfinite"} | {
        "matching_error"
    }  # those of the other objectives: test_nft.py, test_awm.py
    assert any(name.startswith("reward/") for name in logged)


def test_rewards_by_category_leave_out_what_failed():
    rewards = torch.tensor([1.0, math.nan, 3.0, 5.0, math.nan])
    found = category_means(rewards, ["a", "a", "b", "b", "c"])
    assert found["reward/a"] == 1 and found["reward/b"] == 4 and math.isnan(found["reward/c"])
    assert category_means(rewards, [None] * 5) == {}


def test_what_weights_look_like():
    weights = torch.zeros(1, 2, 4, 4)
    weights[:, :, :2, :2] = 4  # all on a quarter
    masks = torch.zeros(2, 8, 8)
    masks[0, :4, :4] = 1  # just there
    masks[1, 4:, 4:] = 1  # somewhere else
    found = weight_metrics(weights, masks)
    assert found.pop("gradient_share") == pytest.approx(0.4)
    assert found == {"weights_max": 4, "weights_concentration": 4, "weights_uniform": 0, "weights_on_object": 2}
    flat = weight_metrics(torch.ones(3, 2, 4, 4), masks)
    assert flat.pop("gradient_share") == pytest.approx(0.1)
    assert flat == {"weights_max": 1, "weights_concentration": 1, "weights_uniform": 6, "weights_on_object": 1}
    assert "weights_on_object" not in weight_metrics(weights, torch.zeros(2, 8, 8))


def test_gradient_share_is_that_of_the_tenth_which_weighs_most():
    weights = torch.ones(2, 3, 5, 5)  # a tenth: two locations and a half
    weights[1, 2, 0] = torch.tensor([5.0, 9.0, 7.0, 1.0, 1.0])
    share = gradient_share(weights)
    torch.testing.assert_close(share[0], torch.full((3,), 0.1))
    torch.testing.assert_close(share[1, 2], torch.tensor((9 + 7 + 2.5) / 43))
    weights[0, 0] = 0
    weights[0, 0, 3, :2] = 2.0
    assert gradient_share(weights)[0, 0] == 1
    weights[0, 0] = 0
    assert gradient_share(weights)[0, 0].isnan()


def test_grids_show_pictures_and_weights(runs):
    star, uniform = (Image.open(runs / name / "grids/000002.png") for name in ("star", "uniform"))
    # Two trained steps: two more rows.
    assert star.width == uniform.width and star.height > 2 * uniform.height
    assert np.asarray(star.convert("RGB")).std() > 30


def test_tensorboard_has_every_metric(runs):
    events = EventAccumulator(str(runs / "star/tensorboard"))
    events.Reload()
    lines = tracking.read(runs / "star")
    assert set(events.Tags()["scalars"]) == set().union(*lines) - {"iteration"}
    assert [e.value for e in events.Scalars("reward")] == pytest.approx([line["reward"] for line in lines])


def test_a_tracker_whose_package_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=r"run\.trackers: 'wandb' needs wandb"):
        training.train(small_run(tmp_path / "run", run={"trackers": ["wandb"]}))


def test_wandb_gets_the_configuration_and_the_metrics(tmp_path, monkeypatch):
    """Against a stand-in with wandb's calls."""

    class Wandb:
        def __init__(self):
            self.config, self.logged = {}, []

        def init(self, **options):
            self.options = options
            return self

        def log(self, values, step=None, **options):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    wandb = Wandb()
    wandb.config = type("Config", (dict,), {"update": lambda self, values, **o: dict.update(self, values)})()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    training.train(small_run(tmp_path / "run", run={"trackers": ["wandb"]}))
    assert (
        wandb.options["project"] == "star"
        and wandb.options["id"] == (tmp_path / "run/run_id").read_text()
        and wandb.finished
    )
    assert wandb.config["optimization"]["iterations"] == 2
    assert [step for step, _ in wandb.logged] == [0, 1] and "reward" in wandb.logged[0][1]
