"""A study: its runs are stopped and go on, its statistics find what is there, its report stands alone."""

import dataclasses
import fcntl
import json
import random
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.text import Text

from star import config as configuration
from star import document, rewards
from star.cli import main
from star.config import ConfigError
from star.objective import STRATEGIES
from star.reports import figures
from star.reports.evaluations import read_evaluations, write_evaluation
from star.rewards.worker import RewardWorker
from star.shapes import diagnosis, scenes
from star.shapes import reward as study_rewards
from star.shapes.reward import shapes_reward
from star.shapes.verifier import verify
from star.study import command, diagnose, gradient_signal, intervals, page, runs, spec
from star.study.diagnose import gradient
from star.study.results import Results
from star.train import Trainer
from star.training import checkpoint
from star.training.rollout import decode
from star.training.scoring import evaluate

ARMS = {"uniform": {"allocation": {"strategy": "uniform"}}, "attention": {}}
TINY = {
    "model": {"lora_rank": 4, "lora_alpha": 8},
    "sampling": {"prompts_per_iteration": 2, "images_per_prompt": 2, "steps": 3},
    "optimization": {"iterations": 2, "learning_rate": 1e-2, "update_norm": 0.0},
    "scoring": {"every": 1, "count": 8},
    "run": {"save_every": 1, "figures": False},
}


def study(**fields):
    return spec.Study(**{"seeds": (0, 1), "baselines": ("uniform",), "changes": TINY, "arms": ARMS} | fields)


# --- what is run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(spec.PRESETS))
def test_presets_are_whole_and_their_arms_are_scored_alike_on_as_many_images(name, tmp_path):
    preset = spec.preset(name)
    preset.check()
    configs = {arm: configuration.to_dict(preset.config(arm, 3, tmp_path)) for arm in preset.arms}
    for arm, config in configs.items():
        assert config["run"].pop("out") == str(tmp_path / "runs" / f"{arm}-3") and config["run"]["seed"] == 3
        del config["allocation"], config["loss"], config["optimization"]["learning_rate"], config["run"]["reward"]
        if "grpo" in arm:  # an objective with settings of its own, on the same images
            for setting in ("trained_steps", "shared_noise", "merge_adapter", "explore"):
                config["sampling"][setting] = configs["uniform"]["sampling"][setting]
            config["model"] = configs["uniform"]["model"]
            config["optimization"] |= {key: configs["uniform"]["optimization"][key] for key in ("schedule", "warmup")}
    assert all(config == configs["uniform"] for config in configs.values())
    assert len({str(changes) for changes in preset.arms.values()}) == len(preset.arms)


def test_the_shapes_study_has_star_and_every_control_with_five_seeds():
    preset = spec.preset("shapes")
    assert {changes["allocation"]["strategy"] for changes in preset.arms.values()} == set(STRATEGIES) - {"topk"}
    assert len(preset.seeds) == 5 and set(preset.baselines) <= set(preset.arms)
    assert {changes.get("loss", {}).get("ratio", "token") for changes in preset.arms.values()} == {
        "token",
        "location",
        "sample",
    }


def test_the_noise_reward_knows_nothing_of_the_image_but_its_masks():
    prompts, metadata = ["a red circle"] * 64, [{}] * 64
    images = torch.rand(64, 3, 36, 36)
    scores, plain = study_rewards.noise(images, prompts, metadata), shapes_reward(images, prompts, metadata)
    assert torch.equal(scores.masks, plain.masks)
    assert torch.equal(scores.reward, study_rewards.noise(images, prompts, metadata).reward)
    assert scores.reward.min() >= 0 and scores.reward.max() <= 1
    assert scores.reward.mean() == pytest.approx(0.5, abs=0.15) and scores.reward.std() == pytest.approx(0.29, abs=0.08)
    # Equally good images, one of them next to nothing brighter.
    assert (study_rewards.noise(images * (1 + 1e-6), prompts, metadata).reward - scores.reward).abs().max() > 0.2


def test_every_object_is_in_the_masks_and_the_reward_is_the_worlds():
    image, _ = scenes.render(scenes.parse_scene("a red circle left of a blue square"), random.Random(0))
    images = torch.from_numpy(image).permute(2, 0, 1)[None]
    prompts, metadata = ["a red circle"], [{}]
    scores, plain = study_rewards.every_object(images, prompts, metadata), shapes_reward(images, prompts, metadata)
    assert torch.equal(scores.reward, plain.reward) and plain.reward < 1  # the square costs something
    both = shapes_reward(images, ["a red circle left of a blue square"], metadata)
    assert torch.equal(scores.masks, both.masks) and both.masks.sum() > 1.5 * plain.masks.sum()


def test_global_prompts_name_a_background_and_nothing_else():
    assert all(not scenes.parse_scene(prompt).things for prompt in spec.preset("global").prompts)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"baselines": ("best",)}, r"baselines: got \('best',\), expected some of the arms \['uniform', 'attention'\]"),
        ({"seeds": (1, 1)}, r"seeds: got \(1, 1\), expected different ones"),
        ({"arms": {"uniform": {"alocation": {}}}}, "arms.uniform.alocation: unknown key"),
        ({"arms": {"uniform": {}, "../x": {}}}, r"arms: got the name '../x', expected letters"),
        ({"changes": {}}, "scoring.every, scoring.count: got"),
    ],
)
def test_a_study_that_cannot_be_run_is_one_clear_line(fields, words):
    with pytest.raises(ConfigError, match=words) as caught:
        study(**fields).check()
    assert "\n" not in str(caught.value)


def test_a_study_survives_yaml(tmp_path):
    spec.save_study(spec.preset("global"), tmp_path / "study.yaml")
    assert spec.load_study(tmp_path / "study.yaml") == spec.preset("global")


# --- running it -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stopped_and_continued(tmp_path_factory):
    """The same command three times: stopped by SIGTERM in its first run, then to the end, then with nothing to do."""
    folder = tmp_path_factory.mktemp("study")
    path, out = folder / "spec.yaml", folder / "out"
    path.write_text(yaml.safe_dump(configuration.to_dict(study())))
    document = folder / "evidence.md"
    document.write_text("# Evidence\n<!-- results of out -->\nnot run yet\n<!-- end of results of out -->\nend\n")
    command = ["compare", "--spec", str(path), "--out", str(out), "--document", str(document)]
    with (folder / "first.log").open("w") as log:
        first = subprocess.Popen([sys.executable, "-m", "star.cli", *command, "--jobs", "1"], stdout=log, stderr=log)
        while not checkpoint.checkpoints(out / "runs/uniform-0"):
            assert first.poll() is None, (folder / "first.log").read_text()
            time.sleep(0.02)
        first.send_signal(signal.SIGTERM)
        code = first.wait()
    last = (folder / "first.log").read_text().strip().splitlines()[-1]
    assert main(command) == 0
    return {"out": out, "document": document, "code": code, "last": last, "command": command}


def test_a_stopped_study_says_so_and_goes_on(stopped_and_continued):
    out = stopped_and_continued["out"]
    assert stopped_and_continued["code"] == 0
    assert stopped_and_continued["last"] == f"stopped by SIGTERM; the same command continues {out}"
    for arm in ARMS:
        for seed in (0, 1):
            lines = (out / f"runs/{arm}-{seed}/metrics.jsonl").read_text().splitlines()
            assert [json.loads(line)["iteration"] for line in lines] == [0, 1]
            assert [one.iteration for one in read_evaluations(out / f"runs/{arm}-{seed}")] == [0, 1, 2]


def test_the_signal_that_stopped_a_study_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs, "execute", lambda configs, parallel: "SIGHUP")
    assert main(["compare", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.strip() == f"stopped by SIGHUP; the same command continues {tmp_path / 'out'}"


def test_arms_of_a_seed_share_prompts_noise_and_budget(stopped_and_continued):
    out = stopped_and_continued["out"]
    scored = {
        run: [one.line() for one in read_evaluations(out / "runs" / run)]
        for run in ("uniform-0", "attention-0", "uniform-1")
    }
    assert scored["uniform-0"][0] == scored["attention-0"][0] == scored["uniform-1"][0]
    assert scored["uniform-0"][2] != scored["attention-0"][2]
    first = {}
    for run in scored:
        first[run] = json.loads((out / "runs" / run / "metrics.jsonl").read_text().splitlines()[0])
    # Before the first update they have drawn and scored the very same images.
    assert first["uniform-0"]["reward"] == first["attention-0"]["reward"] != first["uniform-1"]["reward"]
    assert first["uniform-0"]["update_norm"] > 0


def test_what_is_finished_is_not_run_again(stopped_and_continued):
    out = stopped_and_continued["out"]
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")}
    assert main(stopped_and_continued["command"]) == 0
    assert {path: path.stat().st_mtime_ns for path in (out / "runs").rglob("*")} == before


def test_results_are_json_lines_and_the_document_has_the_tables(stopped_and_continued):
    out = stopped_and_continued["out"]
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 2 * 3
    own = read_evaluations(out / "runs/attention-1")[2]
    (line,) = (entry for entry in lines if (entry["arm"], entry["seed"], entry["iteration"]) == ("attention", 1, 2))
    assert line["scores"]["all"]["reward"] == pytest.approx(own.mean("reward").mean, abs=1e-5)
    for category, scores in line["scores"].items():
        expected = own.mean("strict", None if category == "all" else category).mean
        assert scores["strict"] == pytest.approx(expected, abs=1e-5)
    text = stopped_and_continued["document"].read_text()
    assert "difference to uniform at equal images, paired by seed and prompt" in text and "not run yet" not in text
    assert text.startswith("# Evidence\n") and text.endswith("<!-- end of results of out -->\nend\n")
    # The answer is in sight, everything else below it, folded away.
    answer, folded = text.split("<details>")
    assert "**difference to uniform" in answer and answer.count("\n\n**") == 1
    whole = (out / "report.md").read_text()
    assert folded.count("\n\n**") + 1 == whole.count("\n\n**") > 3 and "</details>" in folded
    assert (out / "report.png").stat().st_size > 5000


def test_seeds_of_an_earlier_call_stay_and_a_document_is_looked_at_first(stopped_and_continued, capsys):
    """What would only be found out after hours of training is found out before."""
    out, command = stopped_and_continued["out"], stopped_and_continued["command"]
    assert main([*command, "--seeds", "1"]) == 0
    assert tuple(spec.load_study(out / "study.yaml").seeds) == (0, 1)
    assert "Seeds 0, 1; 2 iterations, scored 3 times on 8 held-out images of" in (out / "report.md").read_text()
    capsys.readouterr()
    assert main([*command, "--seeds", "0", "1", "2", "--diagnose"]) == 1
    assert "has no marks '<!-- diagnosis of out -->'" in capsys.readouterr().err
    assert not (out / "runs/uniform-2").exists()


def test_another_configuration_in_the_same_folder_is_refused(stopped_and_continued, tmp_path, capsys):
    out, command = stopped_and_continued["out"], stopped_and_continued["command"]
    assert main([*command, "--update-norm", "0.5"]) == 1
    assert "star: optimization.update_norm: got 0.5, " in capsys.readouterr().err
    assert main([*command, "--iterations", "1"]) == 1
    message = capsys.readouterr().err
    assert (
        message.startswith(f"star: iterations: got 1, {out}/runs/")
        and "was started with 2; they can only grow" in message
    )
    (tmp_path / "file").touch()
    assert main(["compare", "--out", str(tmp_path)]) == 1
    assert "is not empty and no study" in capsys.readouterr().err
    assert main([*command, "--arms", "best"]) == 1
    assert "star: arms: unknown 'best', expected some of ['attention', 'uniform']" in capsys.readouterr().err


def test_a_run_that_fails_is_told_after_the_others_have_ended(tmp_path):
    broken = study(seeds=(0,)).config("uniform", 0, tmp_path)
    broken.run.reward = "nowhere:nothing"
    with pytest.raises(RuntimeError, match=r"runs: 1 of 1 failed: uniform-0 \(star: reward: .*nowhere"):
        runs.execute([broken], 1)


def test_a_run_of_an_earlier_call_that_still_goes_on_is_left_alone(tmp_path):
    config = study().config("uniform", 0, tmp_path)
    config.run.out.parent.mkdir()
    with Path(f"{config.run.out}.log").open("ab") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert runs.start(config) is None
    assert not config.run.out.exists() and not runs.is_finished(config)


# --- scores in the course of a run, and the norm of updates -----------------------------------------------------------


def test_the_curve_is_of_the_averaged_policy_and_earlier_lines_stay(tmp_path):
    from star.train import train

    config = study(seeds=(0,)).config("attention", 0, tmp_path)
    config.optimization.ema_decay, config.optimization.ema_every = 0.9, 1
    train(config)
    first, second, last = scorings = read_evaluations(config.run.out)
    assert [one.iteration for one in scorings] == [0, 1, 2]
    resumed = dataclasses.replace(config, run=dataclasses.replace(config.run, resume=True))
    trainer = Trainer(resumed)
    with trainer.policy.averaged(), RewardWorker(trainer.reward) as worker:
        averaged = evaluate(trainer.pipeline, trainer.held_out.prompts, worker, trainer.held_out.options)
    assert last.values["reward"] == pytest.approx(averaged.values["reward"], abs=1e-5)
    assert not np.array_equal(last.values["reward"], first.values["reward"])
    assert sum(first.mean("reward", name).prompts for name in first.category_names()) == 8
    # What was scored after the point to which a killed run goes back is scored again.
    write_evaluation(config.run.out, dataclasses.replace(second, failed=3))
    again = read_evaluations(config.run.out)
    assert [one.iteration for one in again] == [0, 1] and again[1].failed == 3
    assert again[0].line() == first.line()


def test_updates_have_the_norm_that_is_asked_for(tmp_path):
    ways, logged = {}, {}
    for norm in (None, 0.0, 0.25):
        config = study().config("attention", 0, tmp_path / str(norm))
        config.optimization.update_norm, config.optimization.updates_per_iteration = norm, 1
        trainer = Trainer(config)
        before = torch.cat([p.detach().flatten().clone() for p in trainer.policy.parameters.values()])
        logged[norm] = trainer.step().get("update_norm")
        ways[norm] = torch.cat([p.detach().flatten() for p in trainer.policy.parameters.values()]) - before
    assert torch.equal(ways[None], ways[0.0]) and logged[None] is None
    assert logged[0.0] == logged[0.25] == pytest.approx(ways[0.0].norm().item(), rel=1e-5)
    assert ways[0.25].norm().item() == pytest.approx(0.25, rel=1e-4)
    torch.testing.assert_close(ways[0.25] / 0.25, ways[0.0] / logged[0.0], rtol=1e-3, atol=1e-6)


def test_with_a_large_epsilon_an_update_is_the_plain_gradient(tmp_path):
    config = study().config("attention", 0, tmp_path)
    optimization = config.optimization
    optimization.adam_epsilon, optimization.weight_decay, optimization.updates_per_iteration = 1.0, 0.0, 1
    trainer = Trainer(config)
    before = {name: p.detach().clone() for name, p in trainer.policy.parameters.items()}
    trainer.step()
    moved = 0
    for name, p in trainer.policy.parameters.items():
        gradient = trainer.policy.optimizer.state[p]["exp_avg"] / (1 - optimization.betas[0])
        moved += gradient.count_nonzero()
        # To the rounding of the weight; the gradients' own size is lost beside an epsilon of 1.
        torch.testing.assert_close(
            p.detach() - before[name], -optimization.learning_rate * gradient, rtol=0.05, atol=1e-7
        )
    assert moved


# --- statistics -------------------------------------------------------------------------------------------------------


def synthetic(shift, seeds=5, prompts=60, seed=0, missing=()):
    """Runs whose scores differ by seed, prompt and chance; the second arm is `shift` better at the end."""
    rng = np.random.default_rng(seed)
    iterations = np.array([0, 20, 40, 60])
    categories = np.array(["colors", "counting", "position"])[np.arange(prompts) % 3]
    texts = np.arange(prompts).astype(str)
    level = 0.5 + 0.1 * rng.standard_normal(prompts)
    scores = {metric: {"uniform": {}, "attention": {}} for metric in ("reward", "strict")}
    for s in range(seeds):
        shared = level + 0.02 * rng.standard_normal(prompts) + 0.03 * rng.standard_normal()
        for arm, gain in (("uniform", 0.0), ("attention", shift)):
            own = shared + 0.02 * rng.standard_normal(prompts) + 0.004 * rng.standard_normal()
            rise = (iterations[:, None] / 20).clip(max=1)
            for metric in ("reward", "strict"):
                scores[metric][arm][s] = own + rise * (0.06 + gain)
    images = {"uniform": 96, "attention": 96}
    return Results(iterations, categories, texts, scores, {"uniform": {}, "attention": {}}, images, tuple(missing))


def test_an_arm_that_is_better_is_found_with_its_amount():
    results = synthetic(0.05)
    final = intervals.difference(results, "attention", "uniform")
    assert final.significant and final.better == final.seeds == 5
    assert final.estimate.low < 0.05 < final.estimate.high and final.estimate.high - final.estimate.low < 0.02
    area = intervals.difference(results, "attention", "uniform", summary="area")
    assert area.estimate.mean == pytest.approx(0.05 * 50 / 60, abs=0.01) and area.significant
    part = intervals.difference(results, "attention", "uniform", category="counting")
    assert part.estimate.low < 0.05 < part.estimate.high
    other = intervals.difference(results, "uniform", "attention")
    assert other.estimate.mean == -final.estimate.mean and other.better == 0


def test_an_equal_arm_is_not_found_more_often_than_promised():
    differences = [intervals.difference(synthetic(0.0, prompts=30, seed=i), "attention", "uniform") for i in range(60)]
    # 5 % of 60, and what a binomial leaves with 99.9 %: at most 9.
    assert sum(one.significant for one in differences) <= 9
    assert abs(np.mean([one.estimate.mean for one in differences])) < 0.003


def test_differences_by_hand():
    """Two seeds, two prompts, four scorings: means, areas and the t-test on paper."""
    scores = {
        "a": {
            0: np.array([[0.0, 0.0], [0.0, 0.0], [0.2, 0.4], [0.4, 0.8]]),
            1: np.array([[0.0, 0.0], [0.0, 0.0], [0.4, 0.4], [0.8, 0.8]]),
        },
        "b": {0: np.array([[0.0, 0.0], [0.0, 0.0], [0.1, 0.1], [0.2, 0.2]]), 7: np.ones((4, 2))},
    }
    scores["b"][1] = scores["b"][0]
    names = np.array(["x", "y"])
    images = {"a": 4, "b": 4}
    results = Results(np.array([0, 10, 20, 30]), names, names, {m: scores for m in ("reward", "strict")}, {}, images)
    difference = intervals.difference(results, "a", "b")
    # Means of three scorings: 0.2 and 0.4 less 0.1; 0.4 and 0.4 less 0.1. Seed 7 has no partner. t = 0.25 / 0.05 with
    # one degree of freedom.
    assert difference.seeds == difference.better == 2 and difference.estimate.mean == pytest.approx(0.25)
    assert difference.p == pytest.approx(2 * (0.5 - np.arctan(5) / np.pi))
    assert intervals.difference(results, "a", "b", category="y").estimate.mean == pytest.approx(0.3)
    assert intervals.difference(results, "a", "b", summary="area").estimate.mean == pytest.approx(0.5 / 3)
    # a's mean curve is 0, 0, 0.35, 0.7; b's final score is 0.1.
    assert intervals.images_to_reach(results, "a", "b").mean == pytest.approx(4 * (10 + 10 * 0.1 / 0.35))
    assert intervals.first_crossing(np.array([0.1, 0.2]), np.array([0, 5]), 0.3) is None
    assert intervals.first_crossing(np.array([0.4, 0.2]), np.array([0, 5]), 0.3) == 0


def test_intervals_are_as_wide_as_their_two_sources_make_them():
    rng = np.random.default_rng(3)
    by_seed, by_prompt = rng.standard_normal(40), 2 * rng.standard_normal(80)
    estimate = intervals.interval(by_seed[:, None] + by_prompt, np.arange(80))
    expected = 2 * 1.96 * (by_seed.var() / 40 + by_prompt.var() / 80) ** 0.5
    # The ends of 2000 resamples are themselves uncertain by a few per cent.
    assert estimate.high - estimate.low == pytest.approx(expected, rel=0.1)
    assert estimate.mean == pytest.approx(by_seed.mean() + by_prompt.mean())
    alone = intervals.interval(by_prompt[None], np.arange(80))
    assert alone.high - alone.low == pytest.approx(2 * 1.96 * (by_prompt.var() / 80) ** 0.5, rel=0.1)
    assert np.isnan(intervals.interval(np.ones((1, 1)), np.zeros(1)).low)


@pytest.mark.parametrize("seeds", [1, 40])
def test_images_of_the_same_prompt_are_not_more_prompts(seeds):
    values = np.random.default_rng(4).standard_normal((seeds, 30))
    once = intervals.interval(values, np.arange(30))
    repeated = intervals.interval(np.tile(values, 5), np.tile(np.arange(30), 5))
    assert dataclasses.astuple(repeated) == pytest.approx(dataclasses.astuple(once))
    taken_apart = intervals.interval(np.tile(values, 5), np.arange(150))
    assert taken_apart.high - taken_apart.low < 0.8 * (once.high - once.low)
    # One that comes more often counts more.
    uneven = intervals.interval(values, np.arange(30) // 20)
    assert uneven.mean == pytest.approx(values.mean())


# --- the report -------------------------------------------------------------------------------------------------------


def test_the_page_stands_alone_and_says_what_is_missing(tmp_path):
    results = synthetic(0.05, seeds=2, prompts=12, missing=("attention-3", "random-0", "attention-4"))
    text = page.write(study(), results, tmp_path)
    html = (tmp_path / "report.html").read_text()
    assert "http:" not in html and "https:" not in html and "<script" not in html and "<link" not in html
    assert html.count("src=") == 1 and 'src="data:image/png;base64,' in html
    missing = ("left out, by seed: attention 3 4.", "Not finished with any seed: random.")
    for words in (*missing, "difference to uniform", "reward at the end", "position"):
        assert words in html and words in text
    mean = results.curves("reward", "attention")[:, -intervals.LAST :].mean()
    assert f"{mean:.3f} [" in html


def test_an_arm_with_one_seed_is_a_pilot_in_tables_of_its_own(tmp_path, monkeypatch):
    results = synthetic(0.05, seeds=3, prompts=12)
    for by_arm in results.scores.values():
        by_arm["random"] = {0: by_arm["attention"][0] - 0.1}
    results.logged["random"], results.images["random"] = {"update_norm": 4.7e-7}, 96
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: (drawn.append(figure), path.write_bytes(b"png")))
    text = page.write(study(arms={**ARMS, "random": {}}), results, tmp_path)
    evidence, pilots = (part.split("**\n\n", 1) for part in text.split("**pilots, one seed: no evidence; ", 1))
    assert "| random |" not in evidence[1] and "| attention | 3 |" in evidence[1]
    assert pilots[0] == "difference to uniform at equal images, paired by seed and prompt"
    assert "| random | 1 |" in pilots[1] and "| attention |" not in pilots[1] and "| 4.7e-07 |" in pilots[1]
    assert text.count("**pilots, one seed: no evidence; ") == text.count("\n\n**") / 2
    words = {one.get_text() for one in drawn[0].findobj(Text)}
    assert words >= {"attention (n=3)", "gray: uniform (n=3); bands: 95% over seeds and prompts"}
    assert not any("random" in one for one in words)


def test_an_archived_study_of_an_earlier_version_is_reported_as_it_was(tmp_path, capsys):
    archive = Path(__file__).parents[1] / "data/global-runs.tar.xz"
    with tarfile.open(archive) as runs_of_study:
        runs_of_study.extractall(tmp_path, filter="data")
    assert "optimisation:" in (tmp_path / "global/runs/uniform-0/config.yaml").read_text()
    assert main(["compare", "--no-train", "--out", str(tmp_path / "global")]) == 0
    lines = (tmp_path / "global/report.md").read_text().splitlines()
    assert lines[0] == "Seeds 0, 1, 2; 120 iterations, scored 5 times on 192 held-out images of 3 prompts."
    row = next(line for line in lines if line.startswith("| attention_mix_1 |"))
    assert row.startswith("| attention_mix_1 | +0.005 [-0.020, +0.033] | 0.288 | 3/3 | +0.004 [-0.013, +0.019] |")
    assert "| attention_mix_1 | 3 | 0.676 [0.234, 0.999] |" in lines


def test_a_diagnosis_of_another_objective_is_refused_before_the_runs(tmp_path):
    """It would say nothing: the forward process trains on no step of the rollout."""
    options = command.Compare(preset="credit", out=tmp_path / "study", diagnose=True)
    with pytest.raises(ConfigError, match=r"diagnose: loss.objective is 'nft', expected 'grpo'"):
        command.compare(options)
    assert not options.out.exists()


def test_a_document_without_marks_is_left_alone(tmp_path):
    path = tmp_path / "evidence.md"
    path.write_text("# Evidence\n")
    with pytest.raises(ConfigError, match=r"document: .* has no marks '<!-- results of shapes -->'"):
        document.insert(path, "results of shapes", "text")
    assert path.read_text() == "# Evidence\n"


def test_a_document_that_cannot_be_written_is_told_before_the_runs(tmp_path, monkeypatch):
    path = tmp_path / "evidence.md"
    path.write_text("<!-- results of study -->\n<!-- end of results of study -->\n")
    monkeypatch.setattr(command.os, "access", lambda folder, mode: folder != tmp_path)
    monkeypatch.setattr(runs, "execute", None)
    with pytest.raises(ConfigError, match=f"document: {tmp_path} takes no file \\(no permission\\)"):
        command.compare(command.Compare(out=tmp_path / "study", document=path))


def test_the_documentation_has_marks_for_the_results_of_every_preset():
    folder = Path(__file__).parents[2] / "docs/evidence"
    for name in spec.PRESETS:
        document.surroundings(folder / f"{name}.md", f"results of {name}")
    for name in ("shapes", "global"):
        document.surroundings(folder / f"{name}.md", f"diagnosis of {name}")


# --- diagnosis --------------------------------------------------------------------------------------------------------


def test_signal_to_noise_of_known_gradients():
    rng = np.random.default_rng(1)
    signal = rng.standard_normal(500) * 0.3
    noisy = signal + rng.standard_normal((40, 500))
    ratio, error, norm = gradient_signal.signal_to_noise(noisy)
    assert abs(ratio - (signal**2).sum() / 500) < 4 * error and 0 < error < 0.02
    assert norm == pytest.approx((signal @ signal + 500) ** 0.5, rel=0.02)
    nothing, error, _ = gradient_signal.signal_to_noise(rng.standard_normal((40, 500)))
    assert abs(nothing) < 4 * error
    # The scale of the weights does not matter.
    assert gradient_signal.signal_to_noise(noisy * 7)[0] == pytest.approx(ratio)


def compare(gradients, scalar):
    return gradient_signal.compare_with_scalar({"all": scalar, "own": gradients}, "all")["own"]


def test_agreement_of_known_gradients():
    rng = np.random.default_rng(2)
    signal, other = rng.standard_normal((2, 500)) * 0.5
    scalar = signal + rng.standard_normal((60, 500))
    # Noise that both share does not count: it is that of the same batch.
    helped, misled = scalar + signal, (scalar - signal) + other
    length = (signal @ signal + 500) ** 0.5
    for gradients, along in ((scalar, signal), (helped, 2 * signal), (misled, other)):
        found = compare(gradients, scalar)
        expected = (along @ signal) / length / (along @ along + 500) ** 0.5
        assert abs(found["agreement"] - expected) < 4 * found["agreement_error"]
        assert 0 < found["agreement_error"] < 0.03
        assert compare(3 * gradients, scalar)["agreement"] == pytest.approx(found["agreement"])
        # Every coordinate has about the same size here: AdamW changes little but the scale.
        assert found["adamw_agreement"] == pytest.approx(found["agreement"], rel=0.3, abs=0.03)
    nothing, helped, misled = (compare(g, scalar) for g in (scalar, helped, misled))
    assert nothing["agreement_gain"] == nothing["agreement_gain_error"] == nothing["adamw_agreement_gain"] == 0
    # A difference is known better than what it is of: both share their batches.
    assert 0 < helped["agreement_gain_error"] < helped["agreement_error"]
    assert helped["agreement_gain"] > 4 * helped["agreement_gain_error"] and misled["agreement_gain"] < 0
    assert compare(np.zeros((4, 5)), np.ones((4, 5)))["agreement"] is None


def test_adamw_divides_every_coordinate_by_its_own_size():
    rng = np.random.default_rng(3)
    gradients = rng.standard_normal((50, 6)) * [1e-6, 1e-3, 1, 10, 1e4, 0]
    steps = gradient_signal.adamw_steps(gradients)
    np.testing.assert_allclose(np.square(steps).mean(0), [1, 1, 1, 1, 1, 0])
    np.testing.assert_array_equal(np.sign(steps), np.sign(gradients))


def test_shares_of_variance_by_hand():
    # Two groups of two: object 1 differs by 0.4 in the first; the extras by 0.2 in the second; means do not count.
    images = [{"object 1": 0.1, "unasked objects": 0.0}, {"object 1": 0.5, "unasked objects": 0.0}]
    images += [{"object 1": 0.9, "unasked objects": -0.2}, {"object 1": 0.9, "unasked objects": 0.0}]
    shares = diagnosis.variance_shares(images, np.array([0, 0, 1, 1]))
    assert shares == pytest.approx({"object 1": 0.08 / 0.1, "unasked objects": 0.02 / 0.1})


def test_a_score_is_the_sum_of_its_components():
    for text in ("a red circle left of a blue square", "three green rings", "a red ring on a white background"):
        scene = scenes.parse_scene(text)
        other, _ = scenes.render(scenes.parse_scene("a red circle and a green cross"), random.Random(3))
        for image in (scenes.render(scene, random.Random(0))[0], other):
            verdict = verify(image, scene)
            assert sum(diagnosis.score_components(verdict, scene).values()) == pytest.approx(verdict.soft)


def test_localization_of_perfect_and_flat_maps():
    scene = scenes.parse_scene("a red circle left of a blue square")
    verdict = verify(scenes.render(scene, random.Random(0))[0], scene)
    masks = torch.from_numpy(verdict.masks).float()
    perfect = torch.nn.functional.adaptive_avg_pool2d(masks[None], (9, 9)).flatten(2)  # (1, 2, 81)
    sharp, flat = diagnosis.localization(torch.stack([perfect, torch.ones_like(perfect)]), [verdict], (9, 9))
    assert len(sharp) == len(flat) == 2
    assert all(auc == 1 and mass > 5 for auc, mass in sharp)
    assert all(auc == 0.5 and mass == pytest.approx(1) for auc, mass in flat)


def test_the_gradient_is_that_of_the_locations_inside_and_outside(tmp_path):
    config = study().config("attention", 0, tmp_path)
    config.optimization.updates_per_iteration = 1
    trainer = Trainer(config)
    prompts = [prompt.text for prompt in diagnose.draw_prompts(trainer.task, config, 0)]
    rollout = trainer.rollout(prompts, torch.Generator().manual_seed(0), captured=range(3))
    assert len(rollout.maps) == 3 and decode(trainer.pipeline, rollout.latents).shape == (4, 3, 36, 36)
    inside = (torch.rand(1, 4, 18, 18) > 0.7).float()
    chosen = torch.arange(sum(p.numel() for p in trainer.policy.parameters.values()))
    fields = {"all": None, "inside": inside, "outside": 1 - inside}
    gradients = gradient.batch_gradients(trainer, rollout, torch.tensor([1.0, -1.0, 0.5, 2.0]), fields, chosen)
    assert np.abs(gradients["inside"]).max() > 0
    np.testing.assert_allclose(
        gradients["inside"] + gradients["outside"],
        gradients["all"],
        atol=1e-5 * np.abs(gradients["all"]).max(),
        rtol=1e-4,
    )
    # An arm's weights there are those of its own trainer.
    last = trainer.rollout(prompts, torch.Generator().manual_seed(0), captured=(2,))
    config.allocation.strategy = "final_step"
    weights = gradient.arm_weights(trainer, config, rollout, None, 0)
    assert torch.equal(weights, trainer.objective.weights(last, None, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("name", ["shapes_reward", "noise", "every_object"])
def test_rewards_share_one_verification(name, monkeypatch):
    texts = ["a red circle left of a blue square", "a red ring on a white background"]
    images = np.stack([scenes.render(scenes.parse_scene(text), random.Random(0))[0] for text in reversed(texts)])
    images = torch.from_numpy(images).permute(0, 3, 1, 2)
    reward = rewards.load(f"star.shapes.reward:{name}")
    expected, verified = reward(images, texts), study_rewards.verify_images(images, texts)
    monkeypatch.setattr(study_rewards, "verify", None)
    scores = diagnosis.score_verified(reward, verified)
    for field in ("reward", "masks", "reward_map"):
        assert torch.equal(getattr(scores, field), getattr(expected, field))
    assert scores.masks.any() and torch.equal(scores.details["strict"], expected.details["strict"])


def test_a_diagnosis_from_beginning_to_end(stopped_and_continued, monkeypatch):
    out = stopped_and_continued["out"]
    monkeypatch.setattr(diagnose, "PROMPTS", 3)
    measured_fields, batch_gradients = [], gradient.batch_gradients
    monkeypatch.setattr(
        gradient,
        "batch_gradients",
        lambda trainer, rollout, advantages, fields, coordinates: (
            measured_fields.append(list(fields)),
            batch_gradients(trainer, rollout, advantages, fields, coordinates),
        )[1],
    )
    text = diagnose.diagnose(study(), out, batches=3)
    # The arm without weights has the gradient of all locations, which is computed once.
    assert measured_fields == 3 * [["all", "inside", "outside", "elsewhere", "attention"]]
    measured = json.loads((out / "diagnosis.json").read_text())
    assert set(measured["gradients"]) == {*gradient.REGIONS, "uniform", "attention"}
    assert measured["gradients"]["all"] == measured["gradients"]["uniform"]
    assert all(0 <= share["auc"] <= 1 for share in measured["localization"] if share)
    assert set(measured["concentration"]) == {"untrained", "uniform", "attention"}
    assert measured["concentration"]["untrained"] != measured["concentration"]["attention"]
    assert set(measured["composition"]) == set(measured["concentration"])
    runs_of_arm = [spec.run_folder(out, "attention", seed) for seed in study().seeds]
    scored = np.mean([read_evaluations(run)[-1].mean("reward").mean for run in runs_of_arm])
    parts = measured["composition"]["attention"]
    assert parts["requirements"] + parts["unasked"] == pytest.approx(scored, abs=1e-4)
    assert parts["unasked"] <= 0 <= min(parts["more"], parts["fewer"]) and measured["trained_seeds"]["attention"] == 2
    for shares in measured["variance"].values():
        assert not shares or sum(shares.values()) == pytest.approx(1)
    assert "background alone" in text and text == (out / "diagnosis.md").read_text()
