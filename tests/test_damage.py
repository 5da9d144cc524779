"""Files that are damaged, and others in their place: every one that a command reads, in every way, is one line."""

import json
import os
import shutil
from contextlib import contextmanager

import numpy as np
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from builders import head_state, save_small_clip, small_run, small_sd35
from star import config as configuration
from star.cli import FAULT, main
from star.reports import shown
from star.shapes.model import load_pipeline
from star.study import spec
from star.train import train

PROMPTS = ["a red circle", "two blue rings", "a green square"]
NOTHING = ...
CONTENTS = {
    "truncated": lambda data: data[: len(data) // 2],
    "empty": lambda data: b"",
    "noise": lambda data: bytes(range(256)) * 3,
    "number": lambda data: b"7\n",
    "list": lambda data: b"[1, 2]\n",
    "object": lambda data: b"{}\n",
    "folder": lambda data: None,
    "gone": lambda data: NOTHING,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model, adapters, a run, a study, rewards' weights and prompts."""
    root = tmp_path_factory.mktemp("world")
    (root / "p.txt").write_text("\n".join(PROMPTS) + "\n")
    (root / "p.jsonl").write_text("".join(json.dumps({"prompt": p, "tag": "x"}) + "\n" for p in PROMPTS))
    (root / "p.json").write_text(json.dumps([{"prompt": p} for p in PROMPTS]))
    small_sd35(PROMPTS).save_pretrained(root / "model")
    adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q"], init_lora_weights=False)
    get_peft_model(load_pipeline().transformer, adapter).save_pretrained(root / "peft")
    save_small_clip(root / "clip")
    torch.save(head_state(16), root / "head.pt")
    config = small_run(root / "run", optimization={"iterations": 1}, scoring={"count": 4}, run={"figures": False})
    configuration.save(config, root / "c.yaml")
    train(config, ["star", "train"])
    fields = {0: [shown.Field("map", "x", np.ones((2, 2)))]}
    shown.write_maps(config.run.out, "after", shown.Maps(1, fields))
    out = root / "study"
    study = spec.Study(
        changes={"scoring": {"every": 1, "count": 4}, "optimization": {"iterations": 1}}, baselines=("uniform",),
        seeds=(0,), arms={"uniform": {"allocation": {"strategy": "uniform"}}},
    )  # fmt: skip
    (root / "spec.yaml").write_text(yaml.safe_dump(configuration.to_dict(study)))
    out.mkdir()
    spec.save_study(study, out / "study.yaml")
    (root / "evidence.md").write_text("<!-- results of study -->\n<!-- end of results of study -->\n")
    return root


def scored(*arguments):
    return ["eval", "--n", "1", "--images-per-prompt", "1", "--steps", "2", *arguments]


def from_model(root):
    where = ("--model", f"{root}/model", "--prompts", f"{root}/p.txt", "--height", "32", "--width", "32")
    return scored(*where, "--reward", "jpeg_compressibility")


def resumed(root):
    more = ("--resume", "--out", f"{root}/run", "--optimization.iterations", "2")
    return ["train", "--config", f"{root}/c.yaml", *more]


def compared(root):
    return ["compare", "--no-train", "--out", f"{root}/study", "--document", f"{root}/evidence.md"]


def report(root):
    return ["report", f"{root}/run", "--out", f"{root}/page.html"]


COMMANDS = {
    "p.txt": lambda root: scored("--prompts", f"{root}/p.txt", "--reward", "jpeg_compressibility"),
    "p.jsonl": lambda root: scored("--prompts", f"{root}/p.jsonl", "--reward", "jpeg_compressibility"),
    "p.json": lambda root: scored("--prompts", f"{root}/p.json", "--reward", "jpeg_compressibility"),
    "c.yaml": lambda root: ["plan", "--config", f"{root}/c.yaml"],
    **dict.fromkeys(
        (
            *("model/model_index.json", "model/scheduler/scheduler_config.json", "model/vae/config.json"),
            *("model/transformer/config.json", "model/transformer/diffusion_pytorch_model.safetensors"),
            *("model/vae/diffusion_pytorch_model.safetensors", "model/text_encoder/config.json"),
            *("model/text_encoder_3/model.safetensors", "model/tokenizer/tokenizer.json"),
            *("model/tokenizer/tokenizer_config.json", "model/tokenizer_3/tokenizer.json"),
        ),
        from_model,
    ),
    "peft/adapter_config.json": lambda root: scored("--lora", f"{root}/peft"),
    "peft/adapter_model.safetensors": lambda root: scored("--lora", f"{root}/peft"),
    "run/lora/pytorch_lora_weights.safetensors": lambda root: scored("--lora", f"{root}/run/lora"),
    **dict.fromkeys(("clip/config.json", "clip/model.safetensors", "clip/tokenizer.json"),
                    lambda root: scored("--reward", "clipscore", "--models", "clipscore", f"{root}/clip")),
    "head.pt": lambda root: scored(
        "--reward", "aesthetic", "--models", "aesthetic", f"{root}/head.pt", "aesthetic_clip", f"{root}/clip"
    ),
    **dict.fromkeys(
        (
            *("run/config.yaml", "run/metrics.jsonl", "run/evaluations.jsonl", "run/summary.json"),
            *("run/commands.jsonl", "run/held_out/prompts.jsonl", "run/held_out/maps_after.jsonl"),
        ),
        report,
    ),
    **dict.fromkeys(("run/checkpoints/iteration-000001/meta.json", "run/checkpoints/iteration-000001/state.pt"),
                    resumed),
    "spec.yaml": lambda root: ["compare", "--spec", f"{root}/spec.yaml", "--out", f"{root}/new", "--arms", "none"],
    "study/study.yaml": compared,
    "evidence.md": compared,
}  # fmt: skip
# What is a file as good as another there, or is as if it were not written yet.
TAKEN = {
    *((name, "truncated") for name in ("p.txt", "c.yaml", "spec.yaml", "run/metrics.jsonl", "run/config.yaml")),
    *(("p.txt", how) for how in ("number", "list", "object")),
    *(
        (f"run/{name}", how)
        for name in (
            *("metrics.jsonl", "evaluations.jsonl", "commands.jsonl"),
            *("held_out/prompts.jsonl", "held_out/maps_after.jsonl"),
        )
        for how in ("empty", "gone", "truncated")
    ),
    *(("run/config.yaml", how) for how in ("empty", "object")),
    ("run/summary.json", "gone"),
    ("model/scheduler/scheduler_config.json", "truncated"),
}


@contextmanager
def damaged(path, content):
    """A file with something else in its place for a while."""
    data = path.read_bytes()
    path.unlink()
    if content is None:
        path.mkdir()
    elif content is not NOTHING:
        path.write_bytes(content)
    try:
        yield
    finally:
        if path.is_dir():
            path.rmdir()
        path.write_bytes(data)


def outcome(capsys, command):
    """(exit code, last line of what was said)."""
    capsys.readouterr()
    code = main(command)
    said = [line for line in capsys.readouterr().err.strip().splitlines() if "%|" not in line]
    return code, said[-1] if said else ""


def is_one_line_about(line, path):
    """Whether a line names a file, or the folder or the setting that it is of, and is no fault of ours."""
    folder = path.parents[1] if "tokenizer" in path.parent.name else path.parent
    return line.startswith("star: ") and FAULT not in line and (path.name in line or str(folder) in line)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_damaged_file_is_one_line_that_names_it(world, name, capsys):
    path, command = world / name, COMMANDS[name](world)
    data = path.read_bytes()
    for how, content in CONTENTS.items():
        with damaged(path, content(data)):
            code, line = outcome(capsys, command)
        if (name, how) in TAKEN and code == 0:
            continue
        settings = ("star: model.path: not set", "star: baselines: got", "star: scoring.every", "star: arms: unknown")
        assert code == 1 and (is_one_line_about(line, path) or line.startswith(settings)), (how, code, line)


@contextmanager
def unprivileged(*folders):
    """As somebody who is not root, whom no permission stops, in folders that are open to everyone."""
    if os.geteuid():
        yield
        return
    for folder in folders:
        folder.chmod(0o777)
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "c.yaml", "run/config.yaml", "run/metrics.jsonl", "evidence.md"])
def test_a_file_without_permission_is_one_line_that_names_it(world, name, capsys):
    path, command = world / name, COMMANDS[name](world)
    parents = [folder for folder in path.parents if folder.stat().st_uid == os.geteuid() and len(folder.parts) > 2]
    outcome(capsys, command)  # what it imports is not for everyone to read
    before = {folder: folder.stat().st_mode for folder in (path, *parents)}
    path.chmod(0)
    try:
        with unprivileged(*parents):
            code, line = outcome(capsys, command)
    finally:
        for folder, mode in before.items():
            folder.chmod(mode)
    assert code == 1 and is_one_line_about(line, path) and "Permission denied" in line


@pytest.mark.parametrize("state", [{}, [1], 7, {"parameters": 3}, {"parameters": {}, "random": []}, "same names"])
def test_a_foreign_checkpoint_is_one_line(world, tmp_path, capsys, state):
    """Whole, of the right format, and of something else."""
    from star.training import checkpoint

    shutil.copytree(world / "run", tmp_path / "run")
    if state == "same names":
        loaded = checkpoint.load(checkpoint.checkpoints(tmp_path / "run")[-1])
        state = {"parameters": loaded["parameters"], "iteration": "seven"}
    checkpoint.save(tmp_path / "run", 9, state, keep=2)
    command = ["train", "--config", f"{world}/c.yaml", "--resume", "--out", f"{tmp_path}/run"]
    code, line = outcome(capsys, command)
    assert code == 1 and line.startswith("star: checkpoint: ") and "iteration-000009" in line and FAULT not in line


def test_a_line_within_the_metrics_is_never_dropped_in_silence(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    path = tmp_path / "run/metrics.jsonl"
    (whole,) = path.read_text().splitlines()
    path.write_text(f"{whole[:40]}\n{whole}\n")
    before = path.read_text()
    command = ["train", "--config", f"{world}/c.yaml", "--resume", "--out", f"{tmp_path}/run"]
    code, line = outcome(capsys, [*command, "--optimization.iterations", "2"])
    assert code == 1 and "metrics.jsonl:1 is not JSON" in line and path.read_text() == before
    path.write_text(f"{whole}\n{whole[:40]}")  # as a crash leaves it
    assert outcome(capsys, [*command, "--optimization.iterations", "2"])[0] == 0
    assert [json.loads(line)["iteration"] for line in path.read_text().splitlines()] == [0, 1]


def test_whatever_else_happens_is_one_line_too(monkeypatch, capsys):
    def broken(arguments):
        raise KeyError("x\ny")

    monkeypatch.setattr("star.cli.info", broken)
    assert outcome(capsys, ["info"]) == (1, f"star: {FAULT} (KeyError: 'x\\ny'); STAR_DEBUG=1 shows where")
    monkeypatch.setenv("STAR_DEBUG", "1")
    with pytest.raises(KeyError):
        main(["info"])
