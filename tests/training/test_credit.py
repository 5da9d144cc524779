"""Runs whose maps count at some noise levels, after a warm-up, or for the advantages of concepts."""

import math

import pytest
import torch

from builders import small_run
from star.config import ConfigError
from star.objective import route_advantages
from star.rewards import Scores
from star.train import Trainer
from star.training.advantage import compute_advantages, compute_concept_advantages
from star.training.credit import Credit, steps_with_maps
from star.training.plan import plan

NFT = {"objective": "nft", "noise_levels": 2}
NO_NOISE = {"shared_noise": False}


def first(metrics):
    return {name: metrics[name] for name in ("loss", "grad_norm", "reward")}


def words(images, prompts, metadata):
    """A reward whose concepts are words that no prompt has."""
    bright = images.mean((1, 2, 3))
    return Scores(bright, credits=bright[:, None], concepts=(("unicorn",),) * len(prompts))


def same(images, prompts, metadata):
    """Every concept of a prompt earns what the image does, each as much as the others; nothing is named."""
    bright = images.mean((1, 2, 3))
    return Scores(bright, credits=bright[:, None])


def blind(images, prompts, metadata):
    return images.mean((1, 2, 3))


def test_outside_the_noise_window_a_run_has_the_bits_of_the_scalar_one(tmp_path):
    scalar = Trainer(small_run(tmp_path / "a", allocation={"strategy": "uniform"}))
    windowed = Trainer(small_run(tmp_path / "b", allocation={"noise_window": [0.0, 0.01]}))
    for _ in range(2):
        assert first(windowed.step()) == first(scalar.step())
    # Of the two trained steps this window has the later one alone.
    metrics = Trainer(small_run(tmp_path / "c", allocation={"noise_window": [0.0, 0.6]})).step()
    assert metrics["weights_max"] > 1 and metrics["weights_uniform"] == 6


def test_a_warm_up_begins_with_the_scalar_run(tmp_path):
    scalar = Trainer(small_run(tmp_path / "a", allocation={"strategy": "uniform"}))
    warming = Trainer(small_run(tmp_path / "b", allocation={"strategy": "topk", "warmup": 2}))
    whole = Trainer(small_run(tmp_path / "c", allocation={"strategy": "topk"}))
    assert first(warming.step()) == first(scalar.step())
    largest = whole.step()["weights_max"]
    half = warming.step()["weights_max"]
    assert largest == pytest.approx(1.5 / (1 + 0.5 * 32 / 81), rel=1e-3)
    assert half - 1 == pytest.approx((largest - 1) / 2, rel=1e-3)
    assert warming.step()["weights_max"] == pytest.approx(largest, rel=1e-3)


RUNS = {
    "grpo": {},
    "nft": {"loss": NFT, "sampling": NO_NOISE},
    "awm": {
        "loss": {"objective": "awm", "noise_levels": 2},
        "sampling": NO_NOISE,
        "optimization": {"updates_per_iteration": 1},
    },
}


@pytest.mark.parametrize("objective", RUNS)
def test_concepts_train_in_each_objective_and_resume_with_the_same_bits(tmp_path, objective):
    def config(folder, advantage="concept", strength=1.0, **run):
        changes = {section: dict(values) for section, values in RUNS[objective].items()}
        changes.setdefault("loss", {}).update(advantage=advantage, concept_strength=strength)
        changes["allocation"] = {"strategy": "uniform"}
        changes.setdefault("sampling", {}).update(images_per_prompt=4)
        return small_run(tmp_path / folder, run=run, **changes)

    whole = Trainer(config("a"))
    metrics = [whole.step() for _ in range(2)]
    assert metrics[0]["concept_shift"] > 0 and metrics[0]["concepts_credited"] > 1 and metrics[0]["grad_norm"] > 0
    begun = Trainer(config("b"))
    assert first(begun.step()) == first(metrics[0])
    begun.save()
    assert first(Trainer(config("b", resume=True)).step()) == first(metrics[1])
    # Without strength, it is the run of one advantage for each image.
    image, none = Trainer(config("c", "image")).step(), Trainer(config("d", strength=0.0)).step()
    assert first(none) == pytest.approx(first(image), rel=1e-6) and none["concept_shift"] == 0
    assert first(metrics[0])["grad_norm"] != image["grad_norm"]
    assert "concept_shift" not in image and "concepts_credited" not in image


def test_prompts_of_one_concept_keep_the_scalar_runs_bits(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("a red circle\nthree blue rings\na green cross\n")
    runs = [
        Trainer(small_run(tmp_path / name, loss={"advantage": name}, sampling={"prompts": str(path)})).step()
        for name in ("image", "concept")
    ]
    assert first(runs[0]) == first(runs[1]) and runs[1]["concepts_credited"] == 1 and runs[1]["concept_shift"] == 0


def test_the_advantages_of_the_loss_are_the_formulas(tmp_path):
    """From the scores to the locations of a step, by the parts that other tests hold to their formulas."""
    config = small_run(tmp_path, loss={"advantage": "concept", "concept_strength": 0.5})
    groups = torch.tensor([0, 1, 0, 1])
    scores = Scores(torch.tensor([1.0, 0.0, 0.0, 1.0]), credits=torch.tensor([[1.0, 0], [0, math.nan], [0, 1], [1, 1]]))
    image = compute_advantages(scores, groups, config.loss, {}, (4, 4))
    concepts = compute_concept_advantages(scores, groups, config.loss, {})
    maps, strength = torch.rand(4, 2, 4), torch.tensor(0.5)
    rows = torch.tensor([2, 0])
    got = Credit(image, None, None, concepts).at(0, rows).located(maps[rows], (2, 2), 2, strength)
    expected = route_advantages(image, concepts * 2, maps, (2, 2), strength=0.25)[rows]
    torch.testing.assert_close(got, expected)
    assert Credit(image, None, None).located(None, (2, 2), 2, strength) is image
    failed = Scores(torch.full((4,), math.nan))
    assert compute_concept_advantages(failed, groups, config.loss, {}) is None  # every reward of an iteration failed


def test_a_share_of_the_advantages_of_locations_is_the_images(tmp_path):
    groups, maps = torch.tensor([0, 0, 1, 1]), torch.rand(4, 8, 8)
    scores = Scores(torch.tensor([1.0, 0.0, 0.3, 0.5]), reward_map=maps)

    def advantages(**loss):
        config = small_run(tmp_path, loss={"global_std": True} | loss)
        return compute_advantages(scores, groups, config.loss, {}, (4, 4))

    image, local = advantages(), advantages(advantage="location")
    got = advantages(advantage="location", location_share=0.25)
    torch.testing.assert_close(got, 0.25 * local + 0.75 * image[:, None, None])
    assert torch.equal(advantages(advantage="location", location_share=0.0), image[:, None, None].expand_as(local))


def test_the_steps_whose_maps_are_read(tmp_path):
    def steps(strategy, advantage="image", explore="everywhere"):
        changes = {"allocation": {"strategy": strategy}, "loss": {"advantage": advantage}}
        return steps_with_maps(small_run(tmp_path, sampling={"explore": explore}, **changes), (1, 2))

    assert steps("attention") == steps("topk") == (1, 2) and steps("uniform") == steps("oracle") == ()
    assert steps("uniform", "concept") == steps("oracle", explore="maps") == (1, 2)
    assert steps("final_step", "concept") == (1, 2, 3)
    metrics = Trainer(
        small_run(tmp_path / "run", allocation={"strategy": "final_step"}, loss={"advantage": "concept"})
    ).step()
    assert metrics["ratio_first"] == 1 and metrics["concept_shift"] >= 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"loss": {"advantage": "concept"}, "run": {"reward": "test_credit:blind"}}, "needs a reward with credits"),
        (
            {"loss": {"advantage": "concept"}, "run": {"reward": "test_credit:words"}},
            "phrase 'unicorn' has no concept of its own",
        ),
        (
            {"loss": {"advantage": "concept", "normalize_rewards": True}},
            "normalize_rewards: got True, expected False with loss.advantage 'c",
        ),
        (
            {"loss": {"advantage": "concept", "ratio": "sample"}},
            "loss.ratio: got 'sample', which needs loss.advantage 'image'",
        ),
        (
            {"loss": {"advantage": "location", "ratio": "sample"}},
            "loss.ratio: got 'sample', which needs loss.advantage 'image'",
        ),
        (
            {"loss": NFT, "sampling": {**NO_NOISE, "explore": "maps"}},
            "sampling.explore: got 'maps', expected 'everywhere'",
        ),
        (
            {"sampling": {"explore_share": 0.0}},
            "sampling.explore_share: got 0.0, expected a number above 0 and at most",
        ),
        ({"allocation": {"share": 1.5}}, "allocation.share: got 1.5, expected"),
        ({"allocation": {"factor": 0.0}}, "allocation.factor: got 0.0, expected"),
        ({"allocation": {"noise_window": [0.6, 0.4]}}, "allocation.noise_window: got .*, expected"),
        ({"allocation": {"warmup": -1}}, "allocation.warmup: got -1, expected"),
    ],
)
def test_what_does_not_go_together_is_one_clear_line(tmp_path, changes, words):
    with pytest.raises(ConfigError, match=words):
        Trainer(small_run(tmp_path, **changes)).step()


def test_unnamed_credits_are_of_the_concepts_in_their_order(tmp_path):
    changes = {"loss": {"advantage": "concept"}, "run": {"reward": "test_credit:same"}}
    metrics = Trainer(small_run(tmp_path, **changes)).step()
    assert metrics["concepts_credited"] == 1 and metrics["concept_shift"] == 0


def test_the_plan_counts_the_images_that_are_sampled_first(tmp_path):
    everywhere, masks = (plan(small_run(tmp_path, sampling={"explore": name})) for name in ("everywhere", "masks"))
    assert masks.rollout_rows - everywhere.rollout_rows == 4 * 3  # steps, and one image for each prompt
