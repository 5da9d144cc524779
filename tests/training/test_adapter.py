"""Adapters from files: applied whole or refused, and what training starts from."""

import shutil
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from builders import plain_images, small_run
from star.cli import main
from star.config import ConfigError
from star.reports.evaluations import read_evaluations
from star.shapes.model import load_pipeline
from star.train import Trainer, train
from star.training import checkpoint
from star.training.adapter import load_adapter

TEXTS = ["a red circle", "two blue rings"]
FEW = {"lora_rank": 4, "lora_alpha": 8, "lora_targets": ["attn.to_q", "attn.to_v"]}


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    """One adapter in PEFT's format and in diffusers', and the images it draws."""
    folder = tmp_path_factory.mktemp("adapters")
    torch.manual_seed(0)
    pipeline = load_pipeline()
    model = get_peft_model(
        pipeline.transformer,
        LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.to_v"], init_lora_weights=False),
    )
    model.save_pretrained(folder / "peft")
    images = plain_images(pipeline, TEXTS, 1)
    again = load_pipeline()
    load_adapter(again, str(folder / "peft"))
    again.transformer.save_lora_adapter(folder / "diffusers", weight_name="pytorch_lora_weights.safetensors")
    # diffusers writes a transformer's adapter without the prefix that it reads from a pipeline's.
    path = folder / "diffusers/pytorch_lora_weights.safetensors"
    save_file({f"transformer.{key}": value for key, value in load_file(path).items()}, path)
    return folder, images


@pytest.mark.parametrize("name", ["peft", "diffusers"])
def test_both_formats_are_applied(adapters, name):
    folder, images = adapters
    pipeline = load_pipeline()
    base = plain_images(pipeline, TEXTS, 1)
    load_adapter(pipeline, str(folder / name))
    found = plain_images(pipeline, TEXTS, 1)
    # The second format keeps no alpha of its own here: its images differ from the base's all the same.
    if name == "peft":
        torch.testing.assert_close(found, images, rtol=0, atol=1e-4)
    assert (found - base).abs().max() > 1e-3


def test_eval_takes_pefts_format(adapters, tmp_path, capsys):
    folder, _ = adapters
    for name, lora in (("base", ()), ("adapted", ("--lora", str(folder / "peft")))):
        assert main(["eval", "--n", "8", "--out", str(tmp_path / name), *lora]) == 0
    (base,), (adapted,) = read_evaluations(tmp_path / "base"), read_evaluations(tmp_path / "adapted")
    assert base.mean("reward").mean != adapted.mean("reward").mean


def in_hub_cache(folder, repository, cache):
    """Put an adapter where the hub's client keeps what it has fetched."""
    place = cache / f"models--{repository.replace('/', '--')}"
    shutil.copytree(folder, place / "snapshots" / ("0" * 40))
    (place / "refs").mkdir()
    (place / "refs/main").write_text("0" * 40)


@pytest.mark.parametrize("name", ["peft", "diffusers"])
def test_a_hub_id_of_either_format_is_the_folder_that_was_fetched(adapters, name, tmp_path, monkeypatch, capsys):
    folder, _ = adapters
    in_hub_cache(folder / name, "owner/adapter", tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    found = {}
    for lora in ("owner/adapter", str(folder / name)):
        out = tmp_path / str(len(found))
        assert main(["eval", "--n", "4", "--out", str(out), "--lora", lora]) == 0
        found[lora] = (out / "evaluations.jsonl").read_text()
    assert len(set(found.values())) == 1
    capsys.readouterr()
    assert main(["eval", "--n", "4", "--lora", "owner/other"]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("star: adapter: 'owner/other' cannot be loaded (") and "unset it, or name a folder" in line


@pytest.mark.parametrize("damage", ["renamed", "cut", "foreign", "none", "nowhere"])
def test_what_does_not_fit_is_refused(adapters, tmp_path, damage):
    folder, _ = adapters
    state = load_file(folder / "peft/adapter_model.safetensors")
    first = min(state)
    if damage == "renamed":
        state[first.replace("to_q", "to_x").replace("to_v", "to_x")] = state.pop(first)
        words = "does not fit the transformer: .*to_x.* is not in the model"
    elif damage == "cut":
        del state[first]
        words = "does not fit the transformer: .* is missing in the file"
    elif damage == "foreign":
        state = {key: torch.zeros(3, 5) for key in state}
        words = "cannot be loaded"
    elif damage == "none":
        state = {}
        words = "does not fit|has no weights"
    target = tmp_path / "adapter"
    if damage != "nowhere":
        target.mkdir()
        (target / "adapter_config.json").write_bytes((folder / "peft/adapter_config.json").read_bytes())
        save_file(state, target / "adapter_model.safetensors")
    else:
        words = "is no adapter"
    with pytest.raises(ConfigError, match=f"adapter: .*{words}") as caught:
        load_adapter(load_pipeline(), str(target))
    assert "\n" not in str(caught.value)


def test_training_starts_from_an_adapter_and_is_held_to_it(adapters, tmp_path):
    folder, images = adapters
    path = str(folder / "peft")
    config = small_run(tmp_path / "run", model={**FEW, "adapter": path}, loss={"kl_coef": 0.1})
    trainer = Trainer(config)
    torch.testing.assert_close(plain_images(trainer.pipeline, TEXTS, 1), images, rtol=0, atol=1e-4)
    assert all(".default." in name for name in trainer.policy.parameters)
    kept = {n: p.clone() for n, p in trainer.policy.bare.named_parameters() if ".reference." in n}
    first, second = trainer.step(), trainer.step()
    assert first["ratio_first"] == second["ratio_first"] == 1.0
    # Two updates an iteration: the KL term is exactly 0 until the first of all.
    assert 0 < first["kl"] < second["kl"] and second["grad_norm"] > 0
    own = dict(trainer.policy.bare.named_parameters())
    assert kept and all(torch.equal(own[name], value) for name, value in kept.items())
    one = small_run(
        tmp_path / "one",
        model={**FEW, "adapter": path},
        loss={"kl_coef": 0.1},
        optimization={"updates_per_iteration": 1},
    )
    assert Trainer(one).step()["kl"] == 0


def test_a_run_from_an_adapter_goes_on_bit_for_bit_and_exports_what_it_trained(adapters, tmp_path):
    path = str(adapters[0] / "peft")
    model = {**FEW, "adapter": path}
    whole, half = (small_run(tmp_path / n, model=model, optimization={"iterations": 2}) for n in ("a", "b"))
    train(whole)
    half.optimization.iterations = 1
    train(half)
    half.optimization.iterations, half.run.resume = 2, True
    train(half)
    first, second = (load_file(tmp_path / n / "lora/pytorch_lora_weights.safetensors") for n in ("a", "b"))
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert len(first) == len(load_file(adapters[0] / "peft/adapter_model.safetensors"))


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ({"lora_rank": 8}, "model.lora_rank: got 8, .* has 4; use that"),
        ({"lora_alpha": 4}, "model.lora_alpha: got 4, .* has 8; use that"),
        ({"lora_targets": ["attn.to_q"]}, "model.lora_targets: .* has .*to_v, which no target matches"),
        ({"lora_rank": 0}, "model.lora_rank: got 0, expected the rank of model.adapter"),
    ],
)
def test_settings_that_the_adapter_has_not_are_refused(adapters, tmp_path, model, words):
    with pytest.raises(ConfigError, match=words):
        Trainer(small_run(tmp_path, model={**FEW, "adapter": str(adapters[0] / "peft"), **model}))


def test_an_export_that_cannot_be_written_is_one_line(tmp_path, monkeypatch):
    """The error of safetensors for a full disk is neither an OSError nor a RuntimeError."""

    def full(*args, **options):
        raise SafetensorError("Error while serializing: I/O error:\nNo space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "adapter_names", lambda transformer: ["trained"])
    monkeypatch.setattr(checkpoint, "get_peft_model_state_dict", lambda transformer: {})
    transformer = SimpleNamespace(peft_config={checkpoint.TRAINED: LoraConfig()})
    pipeline = SimpleNamespace(transformer=transformer, save_lora_weights=full)
    with pytest.raises(
        checkpoint.CheckpointError, match=r"export: .*lora cannot be written \(.*No space left"
    ) as error:
        checkpoint.export(pipeline, tmp_path, main=True)
    assert "\n" not in str(error.value)
