"""`star eval` on prompt files, and the model card of what a run exports."""

import ast
import importlib.metadata
import io
import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image
from rich.console import Console

from builders import small_run, small_sd35
from star import config as configuration
from star import rewards
from star.cli import main
from star.config import ConfigError
from star.presets import preset
from star.reports import card
from star.reports.evaluations import Evaluation, compare, parse_line, read_evaluations
from star.reports.tables import evaluation_table
from star.rewards import RewardError, Scores
from star.rewards.worker import RewardWorker
from star.shapes.model import load_pipeline
from star.train import train
from star.training import scoring
from star.training.prompts import Prompt, pick_from_file, read_prompts
from star.training.scoring import ResultsWriter, Row, evaluate, summarize
from star.training.task import ImageOptions, Task, configured_task, draw_prompts, find_task

GENEVAL = [
    {"tag": "colors", "include": [{"class": "dog", "count": 1, "color": "red"}], "prompt": "a red circle"},
    {"tag": "counting", "include": [{"class": "dog", "count": 2}], "prompt": "two blue rings"},
    {"tag": "colors", "include": [], "prompt": "a green\u2028square"},
]


def lines(path, rows):
    path.write_text(
        "\n".join(row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    )
    return path


# --- prompt files -------------------------------------------------------------------------------------------------


def test_metadata_goes_with_its_prompt(tmp_path):
    path = lines(tmp_path / "evaluation_metadata.jsonl", [*GENEVAL, {**GENEVAL[0], "tag": "again"}])
    prompts = read_prompts(path)
    assert [p.text for p in prompts] == [row["prompt"] for row in GENEVAL]
    assert [p.metadata for p in prompts] == GENEVAL  # of equal prompts the first


def test_text_files_have_a_prompt_a_line(tmp_path):
    path = lines(tmp_path / "train.txt", ['A sign "Open"', "", ' A sign "Open" ', "ünï"])
    assert read_prompts(path) == [Prompt('A sign "Open"'), Prompt("ünï")]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([GENEVAL[0], "{"], "p.jsonl:2 is not JSON"),
        (["[]"], "p.jsonl:1 has no text under 'prompt'"),
        ([GENEVAL[0], {"tag": "x"}], "p.jsonl:2 has no text under 'prompt'"),
        ([{"prompt": " "}], "p.jsonl:1 has no text under 'prompt'"),
    ],
)
def test_a_line_that_is_no_prompt_is_named(tmp_path, rows, words):
    with pytest.raises(ConfigError, match=words) as caught:
        read_prompts(lines(tmp_path / "p.jsonl", rows))
    assert "\n" not in str(caught.value)


def test_prompt_files_in_other_forms(tmp_path):
    rows = [{"prompt": "a red circle", "tag": "colors"}, {"prompt": "two rings", "color": None, "tag": None}]
    text = "\n".join(map(json.dumps, rows))
    for name in ("p.jsonl", "p.JSONL", "p.json"):
        (tmp_path / name).write_text("\ufeff" + text, encoding="utf-8")
        assert [p.text for p in read_prompts(tmp_path / name)] == ["a red circle", "two rings"]
    (tmp_path / "array.json").write_text(json.dumps(rows))
    found = read_prompts(tmp_path / "array.json")
    assert found[0].category == "colors" and found[1].category is None and "color" not in found[1].metadata
    (tmp_path / "bom.txt").write_text("\ufeffa red circle\n", encoding="utf-8")
    assert read_prompts(tmp_path / "bom.txt") == [Prompt("a red circle")]
    joined = "\ufeffa red circle\n\ufeff a red circle\u200b\n\u200b\ufeff\n\u2060two rings \n"  # files in a row
    (tmp_path / "joined.txt").write_text(joined, encoding="utf-8")
    assert [p.text for p in read_prompts(tmp_path / "joined.txt")] == ["a red circle", "two rings"]
    (tmp_path / "joined.jsonl").write_text('{"prompt": "\ufeffa red circle"}\n\ufeff{"prompt": "two rings"}', "utf-8")
    assert [p.text for p in read_prompts(tmp_path / "joined.jsonl")] == ["a red circle", "two rings"]
    (tmp_path / "empty.jsonl").write_text('{"prompt": "\ufeff\u200b"}', "utf-8")
    with pytest.raises(ConfigError, match=r"empty.jsonl:1 has no text under 'prompt'"):
        read_prompts(tmp_path / "empty.jsonl")
    for name, content, words in (
        ("p.csv", "prompt\na red circle\n", "is a .csv file, expected .txt"),
        ("tags.jsonl", '{"prompt": "x", "tag": ["a"]}', r"tags.jsonl:1 has the tag \['a'\], expected text"),
        ("half.jsonl", '{"prompt": "\\ud83d"}', "half.jsonl:1 has half a surrogate pair"),
        ("cut.json", "[1, ", "cut.json is not JSON"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(ConfigError, match=words):
            read_prompts(tmp_path / name)


def tag_reward(images, prompts, metadata):
    assert all(m["prompt"] == p for p, m in zip(prompts, metadata, strict=True))
    return [float(m["tag"] == "colors") for m in metadata]


def test_metadata_reaches_the_reward_of_a_run(tmp_path):
    rows = [{"prompt": f"{a} {b} circle", "tag": b} for a in ("a", "one", "the") for b in ("red", "blue")]
    path = lines(tmp_path / "p.jsonl", rows)
    config = small_run(tmp_path / "run", sampling={"prompts": str(path)}, optimization={"iterations": 1},
                   run={"reward": "test_scoring:red_reward"})  # fmt: skip
    train(config)
    (line,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    drawn = draw_prompts(configured_task(config), config, 0)
    assert line["reward"] == pytest.approx(np.mean([p.metadata["tag"] == "red" for p in drawn]))


def red_reward(images, prompts, metadata):
    return [float(m["tag"] == "red") for m in metadata]


def test_a_run_with_the_real_reader(tmp_path):
    pytest.importorskip("rapidocr")
    texts = [f'{start} red circle "{word}"' for start in ("a", "one") for word in ("Open", "Late")]
    path = lines(tmp_path / "train.txt", texts)
    config = small_run(tmp_path / "run", sampling={"prompts": str(path)}, optimization={"iterations": 1},
                   run={"reward": "ocr:1.0,jpeg_compressibility:0.5"})  # fmt: skip
    train(config)
    metrics = json.loads((tmp_path / "run/metrics.jsonl").read_text())
    assert 0 <= metrics["reward_ocr"] <= 1 and metrics["reward_failed"] == 0 and metrics["grad_norm"] > 0
    total = metrics["reward_ocr"] + 0.5 * metrics["reward_jpeg_compressibility"]
    assert metrics["reward"] == pytest.approx(total, abs=1e-6)


# --- scoring ------------------------------------------------------------------------------------------------------


def test_means_and_errors_are_over_prompts():
    prompts = [Prompt(str(i), {"tag": tag}) for i, tag in enumerate("aabb")]
    rows = [Row(0, 0, {"reward": 1.0}), Row(0, 1, {"reward": 0.0}), Row(1, 0, {"reward": 1.0}),
            Row(2, 0, {"reward": math.nan}), Row(3, 0, {"reward": 0.2, "correct_b": 1.0})]  # fmt: skip
    found = summarize(prompts, rows, iteration=7)
    assert found.mean("reward", "a") == (0.75, pytest.approx(0.25), 2)
    assert found.mean("reward", "b")[::2] == (0.2, 1) and math.isnan(found.mean("reward", "b")[1])
    assert found.mean("reward").mean == pytest.approx((0.5 + 1 + 0.2) / 3)
    assert found.failed == 1 and found.category_names() == ["a", "b"] and list(found.values) == ["reward"]
    line = json.loads(json.dumps(found.line()))
    assert line["iteration"] == 7 and line["failed"] == 1 and line["values"]["reward"] == [0.5, 1.0, None, 0.2]
    assert line["scores"]["a"]["reward"] == {"mean": 0.75, "standard_error": 0.25, "prompts": 2}
    assert line["scores"]["b"]["reward"]["standard_error"] is None
    assert parse_line(line).line() == line


def test_differences_are_paired_by_prompt():
    before = Evaluation(0, ("a", "a", "b"), {"reward": np.array([0.0, 1.0, 0.5])}, 3, 0)
    after = Evaluation(9, ("a", "a", "b"), {"reward": np.array([0.25, 1.25, math.nan])}, 3, 1)
    found = compare(before, after)["reward"]
    assert found == {"before": 0.5, "after": 0.75, "difference": 0.25, "standard_error": 0.0, "left_out": 1}
    assert compare(before, after, "b") == {}


def test_lines_of_the_first_version_are_read():
    old = {"iteration": 30, "scores": {}, "categories": ["a", "b"], "strict": [1, 0], "soft": [1.0, 0.25]}
    found = parse_line(old)
    assert found.iteration == 30 and found.images == 2 and found.categories == ("a", "b")
    assert found.mean("reward").mean == 0.625 and found.mean("strict").mean == 0.5


def run(capsys, *arguments):
    code = main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip().splitlines()[-1:]


def test_a_prompt_file_is_scored_by_category_and_kept_in_genevals_layout(tmp_path, capsys):
    path, out = lines(tmp_path / "p.jsonl", GENEVAL[:2]), tmp_path / "out"
    arguments = ("--prompts", path, "--reward", "test_scoring:tag_reward", "--images-per-prompt", 3)
    code, output, _ = run(capsys, *arguments, "--batch", 4, "--out", out, "--save-images")
    assert code == 0
    cells = {line.split("│")[1].strip(): line.split("│")[2:-1] for line in output.splitlines() if line.startswith("│")}
    assert [float(cells[c][1]) for c in ("colors", "counting")] == [1, 0] and "mean of categories" in cells
    rows = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [(r["index"], r["number"], r["tag"], r["reward"]) for r in rows] == [
        *((0, k, "colors", 1.0) for k in range(3)),
        *((1, k, "counting", 0.0) for k in range(3)),
    ]
    assert json.loads(rows[0]["metadata"]) == GENEVAL[0]
    (evaluation,) = read_evaluations(out)
    assert evaluation.iteration is None and evaluation.mean("reward").mean == 0.5 and evaluation.images == 6
    assert json.loads((out / "images/00001/metadata.jsonl").read_text()) == GENEVAL[1]
    images = {r["filename"]: np.asarray(Image.open(out / r["filename"])) for r in rows}
    assert len({image.tobytes() for image in images.values()}) == 6 and images[rows[0]["filename"]].shape == (36, 36, 3)
    # The same images in batches of another size, up to the rounding of another matrix product.
    assert run(capsys, *arguments, "--batch", 5, "--out", tmp_path / "other", "--save-images")[0] == 0
    for name, image in images.items():
        other = np.asarray(Image.open(tmp_path / "other" / name)).astype(int)
        assert abs(other - image).max() <= 2
    code, _, error = run(capsys, *arguments, "--out", out)
    assert code == 1 and error == [f"star: out: {out} is not empty; choose a new folder"]


def test_an_adapter_changes_the_scores_and_text_files_have_one_category(tmp_path, capsys):
    train(small_run(tmp_path / "run", optimization={"iterations": 2, "learning_rate": 3e-2}))
    path = lines(tmp_path / "p.txt", ["a red circle", "two blue rings"])
    arguments = ("--prompts", path, "--reward", "jpeg_compressibility", "--images-per-prompt", 2)
    for name, lora in (("plain", ()), ("trained", ("--lora", tmp_path / "run/lora"))):
        assert run(capsys, *arguments, *lora, "--out", tmp_path / name)[0] == 0
    (plain,), (trained,) = (read_evaluations(tmp_path / name) for name in ("plain", "trained"))
    assert plain.category_names() == [] and plain.mean("reward").mean != trained.mean("reward").mean


def test_the_real_reader_scores_a_prompt_file(tmp_path, capsys):
    pytest.importorskip("rapidocr")
    path = lines(tmp_path / "ocr.txt", ['a red circle "Open"'])
    code, output, _ = run(capsys, "--prompts", path, "--reward", "ocr", "--images-per-prompt", 1, "--steps", 2)
    assert code == 0 and "exact" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/nowhere", "--reward", "ocr"], "star: scoring.prompts: not set, and there is no task"),
        (["--task", "triangles"], r"star: task: unknown 'triangles', expected one of .'shapes'. or"),
        (["--task", "json:dumps"], "star: task: 'json:dumps' is a function, expected a star.training.task.Task"),
        (["--prompts", "/nowhere.txt"], "star: prompts: /nowhere.txt cannot be read"),
        (["--prompts", __file__, "--reward", "beauty"], "star: reward: unknown 'beauty'"),
        (["--prompts", __file__, "--save-images"], "star: save_images: got no folder for the images; set --out"),
        (["--prompts", __file__, "--lora", "/nowhere"], "star: adapter: ./nowhere. is no adapter"),
        (["--prompts", __file__, "--n", "0"], "star: n: got 0, expected a number at least 1"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, words):
    code, _, error = run(capsys, *arguments)
    assert code == 1 and re.match(words, error[0])


def failing(images, prompts, metadata):
    raise RuntimeError("no color")


def test_images_without_a_reward_are_counted_and_none_at_all_is_an_error(tmp_path):
    pipeline, options = load_pipeline(), ImageOptions(2, 1.0, 36, 36, 0, images_per_prompt=2, batch=2)
    prompts = [Prompt("a red circle"), Prompt("a blue ring")]
    some = lambda images, texts, metadata: Scores(
        torch.where(torch.tensor([t == "a blue ring" for t in texts]), 1.0, torch.nan)
    )
    with RewardWorker(some) as worker:
        found = evaluate(pipeline, prompts, worker, options, observe=ResultsWriter(tmp_path, prompts, False))
    assert found.failed == 2 and found.mean("reward")[::2] == (1.0, 1)
    assert "2 of 4 images have no reward" in evaluation_table(found, "").caption
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["reward"] is None
    with RewardWorker(failing) as worker, pytest.raises(RewardError, match=r"no color.*for every image"):
        evaluate(pipeline, prompts, worker, options)


def test_names_of_a_prompt_file_neither_steer_the_terminal_nor_are_markup():
    values = {"reward": np.array([1.0]), "\x1b[31mdetail": np.array([1.0])}
    found = Evaluation(None, ("\x1b[2J[red]tag\r[/red]",), values, 1, 0)
    console = Console(file=io.StringIO(), width=200)
    console.print(evaluation_table(found, "prompts of \x1b]0;title\x07.jsonl"))
    text = console.file.getvalue()
    assert "[red]tag [/red]" in text and "[31mdetail" in text
    assert all(character.isprintable() for character in text.replace("\n", ""))


@pytest.mark.parametrize("in_order", [True, False])
def test_another_batch_or_number_of_processes_changes_no_image(in_order):
    prompts = [Prompt(text) for text in ("a red circle", "a blue ring", "two green rings")]

    def images(batch, processes=1):
        options = ImageOptions(2, 1.0, 36, 36, 0, images_per_prompt=2, batch=batch, noise_in_order=in_order)
        found = {}
        for process in range(processes):
            passes = []
            handle = pipeline.transformer.register_forward_pre_hook(lambda *_, seen=passes: seen.append(1))
            for jobs, made in scoring.sample_images(pipeline, prompts, options, process, processes):
                found |= dict(zip(jobs, made, strict=True))
            handle.remove()
            counts.append(len(passes))
        return torch.stack([found[job] for job in sorted(found)])

    pipeline, counts = load_pipeline(), []
    whole = images(6)
    torch.testing.assert_close(images(4), whole, rtol=0, atol=1e-4)
    counts.clear()
    torch.testing.assert_close(images(2, processes=2), images(2), rtol=0, atol=0)
    assert counts[0] == counts[1] == 2 * 2  # two rounds of two steps: a process without a batch runs along


def test_prompts_of_a_file_are_a_sample_in_its_order_or_repeat(tmp_path):
    path = str(lines(tmp_path / "p.txt", [str(i) for i in range(10)]))
    few = [prompt.text for prompt in pick_from_file(path, 4, "2026")]
    assert few == sorted(few) and len(set(few)) == 4 and few != ["0", "1", "2", "3"]
    assert few == [prompt.text for prompt in pick_from_file(path, 4, "2026")]
    assert [prompt.text for prompt in pick_from_file(path, 12, "0")] == [*map(str, range(10)), "0", "1"]


# --- tasks: a third one needs nothing of the package ------------------------------------------------------------------


def own_prompts(split, count, seed):
    words = ("circle", "square", "ring", "cross") if split == "train" else ("triangle",) * count
    return [Prompt(f"a red {word}", {"tag": word}) for word in words[:count]]


OWN = Task(
    pipeline=lambda device, dtype: load_pipeline().to(device, dtype),
    prompts=own_prompts,
    reward=lambda images, prompts, metadata: images.mean((1, 2, 3)),
    images=ImageOptions(2, 1.0, 36, 36, 0),
)


def test_a_task_of_the_users_own_trains_and_is_scored(tmp_path, capsys):
    config = small_run(tmp_path / "run", scoring={"count": 3, "every": 1, "images_per_prompt": 2})
    config.task = "test_scoring:OWN"
    summary = train(config)
    found = read_evaluations(tmp_path / "run")
    assert [one.iteration for one in found] == [0, 1, 2] and found[0].category_names() == ["triangle"]
    assert found[0].images == 6 and summary["held_out"]["reward"]["before"] == round(found[0].mean("reward").mean, 5)
    code, output, _ = run(capsys, "--task", "test_scoring:OWN", "--n", 2)
    assert code == 0 and "triangle" in output
    assert find_task("test_scoring:OWN").images.steps == 2


def test_a_small_sd3_run_with_prompt_files_is_scored_on_its_schedule_and_reported(tmp_path, capsys):
    """What an SD3.5 run does: a pipeline's folder, prompt files with categories, a reward by name."""
    texts = [f"a photo of {n} {c} dogs" for n in ("one", "two", "three") for c in ("red", "blue")]
    small_sd35(texts).save_pretrained(tmp_path / "pipeline")
    rows = [{"prompt": text, "tag": text.split()[4]} for text in texts]
    train_file, test_file = lines(tmp_path / "train.jsonl", rows), lines(tmp_path / "test.jsonl", rows[:4])
    config = configuration.update(
        preset("geneval-sd35m"),
        {
            "model": {"path": str(tmp_path / "pipeline"), "height": 64, "width": 64, "frozen_dtype": "float32"},
            "sampling": {"prompts": str(train_file), "prompts_per_iteration": 2, "images_per_prompt": 2, "steps": 3,
                         "trained_steps": [0, 1]},
            "optimization": {"iterations": 4, "micro_batch": 2, "mixed_precision": "no", "ema_every": 1},
            "scoring": {"count": 4, "prompts": str(test_file), "every": 2, "steps": 2, "batch": 3},
            "run": {"out": str(tmp_path / "run"), "reward": "test_scoring:dark_blue", "grid_every": 0},
        },
    )  # fmt: skip
    summary = train(config)
    found = read_evaluations(tmp_path / "run")
    assert [one.iteration for one in found] == [0, 2, 4]
    assert found[0].category_names() == ["red", "blue"] and found[0].images == 4
    assert found[0].mean("reward", "red").prompts == 2 and found[0].mean("reward", "red").standard_error > 0
    assert summary["held_out"]["reward"]["difference"] is not None
    assert main(["report", str(tmp_path / "run")]) == 0
    page = (tmp_path / "run/report.html").read_text()
    assert "<code>held-out reward</code>" in page and "<td>reward</td><td>blue</td>" in page
    assert {p.name for p in (tmp_path / "run").glob("*.png")} == {
        *("reward_curve.png", "before_after.png", "allocation.png")
    }


def dark_blue(images, prompts, metadata):
    return [float(-x.mean()) + (m["tag"] == "blue") for x, m in zip(images, metadata, strict=True)]


def test_the_held_out_images_may_have_a_reward_of_their_own(tmp_path):
    config = small_run(tmp_path / "run", scoring={"count": 3, "reward": "test_scoring:one"})
    train(config)
    assert [one.mean("reward").mean for one in read_evaluations(tmp_path / "run")] == [1.0, 1.0]
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["reward"] != 1.0


def one(images, prompts, metadata):
    return [1.0] * len(prompts)


CALL = {"guidance_scale": 4.5, "max_sequence_length": 128}


# --- the card -----------------------------------------------------------------------------------------------------


def test_an_exported_adapter_has_a_card_whose_code_runs(tmp_path):
    summary = train(small_run(tmp_path / "run", scoring={"count": 8}))
    text = (tmp_path / "run/lora/README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "diffusers" and "lora" in data["tags"] and "base_model" not in data
    found = summary["held_out"]["reward"]
    assert f"| reward | {found['before']:.4f} | {found['after']:.4f} | {found['difference']:+.4f} ± " in text
    settings = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert settings == yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    names = {}
    exec(re.search(r"```python\n(.*?)```", text, re.S)[1], names)
    assert names["image"].size == (36, 36)
    assert any("lora" in name for name, _ in names["pipeline"].transformer.named_parameters())


def test_a_card_names_the_hubs_base_model_and_every_reward(tmp_path):
    config = configuration.update(
        configuration.Config(),
        {
            "model": {"path": "stabilityai/stable-diffusion-3.5-medium"},
            "run": {"reward": {"ocr": 1, "pickscore": 0.5}, "out": str(tmp_path)},
            "allocation": {"strategy": "uniform"},
        },
    )
    text = card.write(tmp_path, config, {"iterations": 3, "held_out": {}}, "a photo of a dog", CALL).read_text()
    assert ModelCard(text).data.base_model == "stabilityai/stable-diffusion-3.5-medium"
    assert "| Reward | 1 `ocr`, 0.5 `pickscore` |" in text and "Nothing was measured" in text
    assert "STAR" not in text.split("## Scores")[0]  # nothing was allocated
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    compile(code, "card", "exec")
    assert "from_pretrained('stabilityai/stable-diffusion-3.5-medium')" in code and "guidance_scale=4.5" in code
    assert rewards.parse(config.run.reward) == {"ocr": 1.0, "pickscore": 0.5}


@pytest.mark.parametrize(("objective", "other"), [("grpo", "nft"), ("nft", "grpo"), ("awm", "grpo")])
def test_a_card_names_the_runs_own_objective(tmp_path, objective, other):
    config = configuration.update(configuration.Config(), {"loss": {"objective": objective}})
    text = card.write(tmp_path, config, {"iterations": 3, "held_out": {}}, "a photo of a dog", CALL).read_text()
    said = text.split("## Scores")[0].lower()
    assert objective in said and other not in said
    assert objective in ModelCard(text).data.tags


def test_a_card_shows_texts_of_others_as_they_are(tmp_path):
    prompt = 'a `sign` that says "```" and | $x$ \u05d7\u05ea\u05d5\u05dc'
    config = configuration.update(configuration.Config(), {"sampling": {"prompts": "a|b.txt"}})
    held_out = {"my|score": {"before": 0.1, "after": 0.2, "difference": 0.1, "standard_error": None, "left_out": 2}}
    text = card.write(tmp_path, config, {"iterations": 3, "held_out": held_out}, prompt, CALL).read_text()
    assert "+0.1000; 2 prompts left out" in text
    code = re.search(r"^(`{4,})python\n(.*?)\n\1$", text, re.S | re.M)[2]
    assert prompt in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]
    lines = [re.sub(r"\\\|", "", line) for line in text.splitlines()]
    assert [line.count("|") for line in lines if "ab.txt" in line or "myscore" in line] == [3, 5]
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)\n```", text, re.S)[1])["sampling"]["prompts"] == "a|b.txt"


def test_a_checkout_that_is_not_installed_writes_its_card_too(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    path = card.write(tmp_path, configuration.Config(), {"iterations": 3, "held_out": {}}, "a photo of a dog", CALL)
    assert "learning by star-kernels: " in path.read_text()
