"""`star eval` on prompt files, and the model card of what a run exports."""

import importlib.metadata
import json
import math
import re

import numpy as np
import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from PIL import Image

from builders import small_run
from star import config as configuration
from star import rewards
from star.cli import main
from star.config import ConfigError
from star.reports import card
from star.rewards import RewardError, Scores
from star.rewards.worker import RewardWorker
from star.shapes.model import load_pipeline
from star.train import train
from star.training import scoring as evaluation
from star.training.prompts import Prompt, draw_prompts, read_prompts
from star.training.scoring import Results

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


def tag_reward(images, prompts, metadata):
    assert all(m["prompt"] == p for p, m in zip(prompts, metadata, strict=True))
    return [float(m["tag"] == "colors") for m in metadata]


def test_metadata_reaches_the_reward_of_a_run(tmp_path):
    rows = [{"prompt": f"{a} {b} circle", "tag": b} for a in ("a", "one", "the") for b in ("red", "blue")]
    path = lines(tmp_path / "p.jsonl", rows)
    config = small_run(tmp_path / "run", sampling={"prompts": str(path)}, optimization={"iterations": 1},
                   run={"reward": "test_evaluation:red_reward"})  # fmt: skip
    train(config)
    (line,) = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    drawn = draw_prompts(config, 0)
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


def row(index, tag, **scores):
    return {"index": index, "tag": tag, "scores": scores, "reward": scores.get("reward")}


def test_means_and_errors_are_over_prompts():
    results = Results([row(0, "a", reward=1.0), row(0, "a", reward=0.0), row(1, "a", reward=1.0), row(2, "b"),
                       row(3, "b", reward=0.2, correct_b=1.0)])  # fmt: skip
    assert results.mean("reward", "a") == (0.75, pytest.approx(0.25), 2)
    assert results.mean("reward", "b")[::2] == (0.2, 1) and math.isnan(results.mean("reward", "b")[1])
    assert results.mean("reward")[0] == pytest.approx((0.5 + 1 + 0.2) / 3)
    assert results.failed == 1 and results.categories() == ["a", "b"] and results.columns() == ["reward"]
    summary = results.summary()
    assert summary["failed"] == 1 and summary["categories"]["a"] == {"reward": 0.75}


def run(capsys, *arguments):
    code = main(["eval", *map(str, arguments)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err.strip().splitlines()[-1:]


def test_a_prompt_file_is_scored_by_category_and_kept_in_genevals_layout(tmp_path, capsys):
    path, out = lines(tmp_path / "p.jsonl", GENEVAL[:2]), tmp_path / "out"
    arguments = ("--prompts", path, "--reward", "test_evaluation:tag_reward", "--images-per-prompt", 3)
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
    assert json.loads((out / "summary.json").read_text())["categories"]["all"] == {"reward": 0.5}
    assert json.loads((out / "images/00001/metadata.jsonl").read_text()) == GENEVAL[1]
    images = {r["filename"]: np.asarray(Image.open(out / r["filename"])) for r in rows}
    assert len({image.tobytes() for image in images.values()}) == 6 and images[rows[0]["filename"]].shape == (36, 36, 3)
    # The same pictures in batches of another size, up to the rounding of another matrix product.
    assert run(capsys, *arguments, "--batch", 5, "--out", tmp_path / "other", "--save-images")[0] == 0
    for name, image in images.items():
        other = np.asarray(Image.open(tmp_path / "other" / name)).astype(int)
        assert abs(other - image).max() <= 2
    code, _, error = run(capsys, *arguments, "--out", out)
    assert code == 1 and error == [f"star: out: {out} is not empty"]


def test_an_adapter_changes_the_scores_and_text_files_have_one_category(tmp_path, capsys):
    train(small_run(tmp_path / "run", optimization={"iterations": 2, "learning_rate": 3e-2}))
    path = lines(tmp_path / "p.txt", ["a red circle", "two blue rings"])
    arguments = ("--prompts", path, "--reward", "jpeg_compressibility", "--images-per-prompt", 2)
    for name, lora in (("plain", ()), ("trained", ("--lora", tmp_path / "run/lora"))):
        assert run(capsys, *arguments, *lora, "--out", tmp_path / name)[0] == 0
    plain, trained = (
        json.loads((tmp_path / n / "summary.json").read_text())["categories"] for n in ("plain", "trained")
    )
    assert plain.keys() == {"all"} and plain["all"]["reward"] != trained["all"]["reward"]


def test_the_real_reader_scores_a_prompt_file(tmp_path, capsys):
    pytest.importorskip("rapidocr")
    path = lines(tmp_path / "ocr.txt", ['a red circle "Open"'])
    code, output, _ = run(capsys, "--prompts", path, "--reward", "ocr", "--images-per-prompt", 1, "--steps", 2)
    assert code == 0 and "exact" in output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--reward", "ocr"], "star: prompts: needed for the reward 'ocr'"),
        (["--prompts", "/nowhere.txt"], "star: sampling.prompts: /nowhere.txt cannot be read"),
        (["--prompts", __file__, "--reward", "beauty"], "star: reward: unknown 'beauty'"),
        (["--prompts", __file__, "--save-images"], "star: save_images: needs a folder, --out"),
        (["--prompts", __file__, "--lora", "/nowhere"], "star: lora: /nowhere is no folder"),
        (["--prompts", __file__, "--n", "0"], "star: prompts: .* has none"),
    ],
)
def test_what_is_wrong_is_one_line(capsys, arguments, words):
    code, _, error = run(capsys, *arguments)
    assert code == 1 and re.match(words, error[0])


def failing(images, prompts, metadata):
    raise RuntimeError("no color")


def test_pictures_without_a_reward_are_counted_and_none_at_all_is_an_error(tmp_path):
    pipeline, sampling = load_pipeline(), evaluation.Sampling(2, 1.0, 36, 36, 0, images_per_prompt=2, batch=2)
    prompts = [Prompt("a red circle"), Prompt("a blue ring")]
    some = lambda images, texts, metadata: Scores(
        torch.where(torch.tensor([t == "a blue ring" for t in texts]), 1.0, torch.nan)
    )
    with RewardWorker(some) as worker:
        results = evaluation.evaluate(pipeline, prompts, worker, sampling, tmp_path)
    assert results.failed == 2 and results.mean("reward")[::2] == (1.0, 1)
    assert "2 of 4 pictures have no reward" in results.table("").caption
    assert json.loads((tmp_path / "results.jsonl").read_text().splitlines()[0])["reward"] is None
    with RewardWorker(failing) as worker, pytest.raises(RewardError, match=r"no color.*for every picture"):
        evaluation.evaluate(pipeline, prompts, worker, sampling)


# --- the card -----------------------------------------------------------------------------------------------------


def test_an_exported_adapter_has_a_card_whose_code_runs(tmp_path):
    summary = train(small_run(tmp_path / "run", run={"held_out": 8}))
    text = (tmp_path / "run/lora/README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert data["library_name"] == "diffusers" and "lora" in data["tags"] and "base_model" not in data
    assert f"| soft | {summary['soft_before']:.4f} | {summary['soft_after']:.4f} |" in text
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
    text = card.write(tmp_path, config, {"iterations": 3}).read_text()
    assert ModelCard(text).data.base_model == "stabilityai/stable-diffusion-3.5-medium"
    assert "| Reward | 1 `ocr`, 0.5 `pickscore` |" in text and "Nothing was measured" in text
    assert "STAR" not in text.split("## Scores")[0]  # nothing was allocated
    code = re.search(r"```python\n(.*?)```", text, re.S)[1]
    compile(code, "card", "exec")
    assert "from_pretrained('stabilityai/stable-diffusion-3.5-medium')" in code and "guidance_scale=4.5" in code
    assert rewards.parse(config.run.reward) == {"ocr": 1.0, "pickscore": 0.5}


def test_a_checkout_that_is_not_installed_writes_its_card_too(tmp_path, monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    assert "learning by star-kernels: " in card.write(tmp_path, configuration.Config(), {"iterations": 3}).read_text()
