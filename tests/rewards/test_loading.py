"""Models of rewards are whole or refused: a weight that is missing, of no use or of another shape, a tokenizer that
does not read, a key of reward_models that no reward reads."""

import random
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from builders import (
    DIM,
    SIZE,
    head_state,
    image_reward_state,
    open_clip_state,
    save_small_clip,
    small_detector,
    word_tokenizer,
)
from star import rewards
from star.rewards import RewardError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Every file of small models that are whole, in one folder."""
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    save_small_clip(folder / "clip")
    small_detector().model.save_pretrained(folder / "detector")
    torch.save({"state_dict": open_clip_state()}, folder / "hps.pt")
    torch.save(head_state(DIM), folder / "aesthetic.pt")
    torch.save(image_reward_state(), folder / "ImageReward.pt")
    word_tokenizer(folder / "bert", "[CLS]", "[SEP]", "[PAD]")
    return folder


# Of each reward the keys of reward_models, and the file whose weights are spoiled.
CASES = {
    "pickscore": ("pickscore", {"pickscore": "clip"}, "clip/model.safetensors"),
    "clipscore": ("clipscore", {"clipscore": "clip"}, "clip/model.safetensors"),
    "hps folder": ("hps", {"hps": "clip"}, "clip/model.safetensors"),
    "hps file": ("hps", {"hps": "hps.pt", "hps_clip": "clip"}, "hps.pt"),
    "aesthetic head": ("aesthetic", {"aesthetic": "aesthetic.pt", "aesthetic_clip": "clip"}, "aesthetic.pt"),
    "aesthetic clip": ("aesthetic", {"aesthetic": "aesthetic.pt", "aesthetic_clip": "clip"}, "clip/model.safetensors"),
    "geneval detector": ("geneval", {"geneval": "detector", "geneval_clip": "clip"}, "detector/model.safetensors"),
    "geneval clip": ("geneval", {"geneval": "detector", "geneval_clip": "clip"}, "clip/model.safetensors"),
    "image_reward": (
        "image_reward",
        {"image_reward": "ImageReward.pt", "image_reward_tokenizer": "bert"},
        "ImageReward.pt",
    ),
}


def copied(whole, tmp_path, case):
    """(name, reward_models, file) of a case, in a copy that may be spoiled."""
    name, paths, file = CASES[case]
    folder = tmp_path / "models"
    shutil.copytree(whole, folder)
    return name, {key: str(folder / path) for key, path in paths.items()}, folder / file


def change(file, spoil):
    """Spoil the state dict of a file."""
    if file.suffix == ".safetensors":
        state = load_file(file)
        spoil(state)
        save_file(state, file, {"format": "pt"})
    else:
        content = torch.load(file, weights_only=True)
        spoil(content.get("state_dict", content))
        torch.save(content, file)


def names(file):
    found = []
    change(file, lambda state: found.extend(sorted(state)))
    return [name for name in found if not name.endswith("position_ids")]


def refused(name, models, words=""):
    with pytest.raises(RewardError, match=f"reward: '{name}' .*{words}") as caught:
        rewards.load(name, models)
    assert "\n" not in str(caught.value) and "run.reward_models" in str(caught.value)


@pytest.mark.parametrize("case", CASES)
def test_a_file_that_lacks_any_weight_is_refused(whole, tmp_path, case):
    name, models, file = copied(whole, tmp_path, case)
    rewards.load(name, models)
    original = file.read_bytes()
    for weight in random.Random(case).sample(names(file), 4):
        change(file, lambda state, weight=weight: state.pop(weight))
        refused(name, models)
        file.write_bytes(original)


@pytest.mark.parametrize("case", CASES)
def test_a_file_with_a_weight_of_no_use_or_of_another_shape_is_refused(whole, tmp_path, case):
    name, models, file = copied(whole, tmp_path, case)
    original = file.read_bytes()
    change(file, lambda state: state.update({"another.weight": torch.ones(2)}))
    refused(name, models, "another.weight")
    for weight in random.Random(case).sample([n for n in names(file) if n.endswith(".weight")], 2):
        file.write_bytes(original)
        change(file, lambda state, weight=weight: state.update({weight: torch.ones(3, 3, 3)}))
        refused(name, models)


@pytest.mark.parametrize("case", ["clipscore", "geneval detector", "image_reward"])
def test_tables_that_are_not_learned_are_no_weights(whole, tmp_path, case):
    name, models, file = copied(whole, tmp_path, case)
    prefix = {"image_reward": "blip.text_encoder.", "geneval detector": "model.encoder."}.get(case, "text_model.")
    change(file, lambda state: state.update({f"{prefix}embeddings.position_ids": torch.arange(4)[None]}))
    if case == "image_reward":  # of its contrastive training
        change(file, lambda state: state.update({"blip.vision_proj.weight": torch.ones(2, 2)}))
    rewards.load(name, models)


TOKENIZERS = {  # of each key that names a tokenizer: the reward, where it is, the other keys
    "clipscore": ("clipscore", "clip", {}),
    "hps": ("hps", "clip", {}),
    "hps_clip": ("hps", "clip", {"hps": "hps.pt"}),
    "aesthetic_clip": ("aesthetic", "clip", {"aesthetic": "aesthetic.pt"}),
    "geneval_clip": ("geneval", "clip", {"geneval": "detector"}),
    "pickscore_tokenizer": ("pickscore", "tokenizer", {"pickscore": "clip"}),
    "image_reward_tokenizer": ("image_reward", "bert", {"image_reward": "ImageReward.pt"}),
}


@pytest.mark.parametrize("key", TOKENIZERS)
def test_a_tokenizer_that_does_not_read_the_prompt_is_refused(whole, tmp_path, key):
    name, where, others = TOKENIZERS[key]
    folder = tmp_path / "models"
    shutil.copytree(whole, folder)
    models = {k: str(folder / path) for k, path in ({key: where} | others).items()}
    if key == "pickscore_tokenizer":
        word_tokenizer(folder / where, "<s>", "<e>", "!")
    rewards.load(name, models)
    for file in (folder / where).glob("*token*"):
        file.unlink()
    refused(name, models, f"found no (vocabulary|tokenizer) in .*{key}")
    # Another model's: more words than the network has, and fewer than half of them.
    tokenizer = word_tokenizer(folder / where, "<s>", "<e>", "!")
    tokenizer.add_tokens([f"word{i}" for i in range(40)])
    tokenizer.save_pretrained(folder / where)
    refused(name, models, f"of {len(tokenizer)} words in .*, its text network has")


def test_a_tokenizer_that_does_not_end_a_text_is_refused(whole, tmp_path):
    """CLIP would read the output of the first token."""
    name, models, file = copied(whole, tmp_path, "clipscore")
    word_tokenizer(file.parent, "<s>", "<s>", "!")
    refused(name, models, "does not end a text with token")
    assert AutoTokenizer.from_pretrained(file.parent)("a").input_ids


def test_half_precision_files_are_scored_in_float32(whole, tmp_path):
    name, models, file = copied(whole, tmp_path, "clipscore")
    change(file, lambda state: state.update({k: v.half() for k, v in state.items()}))
    scores = rewards.load(name, models)(torch.rand(1, 3, SIZE, SIZE), ["a red circle"], [{}]).reward
    assert scores.dtype == torch.float32 and scores.isfinite().all()


@pytest.mark.parametrize(
    ("specification", "models", "words"),
    [
        ("pickscore", {"pickscroe": "/x"}, "got 'pickscroe', .*did you mean 'pickscore'"),
        ("pickscore", {"geneval": "/x"}, "got 'geneval'"),
        ("geneval", {"geneval": "http://127.0.0.1:9", "geneval_clip": "/x"}, "got 'geneval_clip'"),
        ("jpeg_compressibility", {"jpeg_compressibility": "/x"}, "got 'jpeg_compressibility'.* leave it out"),
        ("ocr", {"ocr": "/x"}, "got 'ocr'"),
        ("test_loading:constant", {"test_loading:constant": "/x"}, "got 'test_loading:constant'"),
    ],
)  # fmt: skip
def test_a_key_of_reward_models_that_nothing_reads_is_refused(specification, models, words):
    with pytest.raises(ValueError, match=f"reward_models: {words}"):
        rewards.load(specification, models)


def constant(images, prompts, metadata):
    return [0.0] * len(prompts)


def test_the_models_of_several_rewards_are_told_apart():
    models = {"pickscore": "/a", "hps_clip": "/b", "geneval": "http://localhost:1"}
    rewards.check_models(models, "pickscore:0.5,geneval", {"hps": 1.0})
    assert rewards.models_for("pickscore:0.5,geneval", models) == {"pickscore": "/a", "geneval": "http://localhost:1"}
    assert rewards.models_for(constant, models) == rewards.models_for(None, models) == {}
    with pytest.raises(ValueError, match=r"reward_models: got 'hps_clip', .* \(pickscore, geneval\)"):
        rewards.check_models(models, "pickscore,geneval", constant, None)
