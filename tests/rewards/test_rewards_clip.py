"""CLIP's rewards and ImageReward on small random models, against the published formulas and networks written anew."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPModel, PreTrainedTokenizerFast

from builders import (
    DIM,
    LENGTH,
    PATCH,
    SIZE,
    WIDTH,
    WORDS,
    head_state,
    image_reward_state,
    open_clip_state,
    save_small_clip,
    word_tokenizer,
)
from star import rewards
from star.rewards import RewardError, clip

PROMPTS = ["a red circle", "a blue square and a red ring and a red circle and a blue ring", "ring"]
assert len(WORDS) + 4 == 11  # the vocabularies below


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip")
    save_small_clip(path)
    return path


@pytest.fixture
def images():
    return torch.rand(3, 3, 48, 40)


def cosines(folder, images, prompts):
    model, tokenizer = CLIPModel.from_pretrained(folder), PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = tokenizer(prompts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
    output = model(tokens.input_ids, clip.preprocess(images, SIZE), tokens.attention_mask)
    return (output.image_embeds * output.text_embeds).sum(-1).detach()


@pytest.mark.parametrize(("height", "width"), [(48, 40), (20, 64), (32, 32)])
def test_pictures_are_prepared_as_pillow_does(height, width):
    array = (np.random.default_rng(0).random((height // 4, width // 4, 3)) * 255).astype(np.uint8)
    picture = Image.fromarray(array).resize((width, height), Image.Resampling.BICUBIC)
    short = min(height, width)
    resized = picture.resize((int(SIZE * width / short), int(SIZE * height / short)), Image.Resampling.BICUBIC)
    left, top = (round((side - SIZE) / 2) for side in resized.size)
    expected = np.asarray(resized.crop((left, top, left + SIZE, top + SIZE)), np.float32) / 255
    expected = (expected - np.array(clip.MEAN)) / np.array(clip.STD)
    got = clip.preprocess(torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 255, SIZE)
    # Pillow rounds to 8 bits after each of the two directions.
    np.testing.assert_allclose(got[0].permute(1, 2, 0).numpy(), expected, rtol=0, atol=1.5 / 255 / min(clip.STD))


@pytest.mark.parametrize(("name", "scale"), [("pickscore", 90 / 26), ("clipscore", 90 / 30), ("hps", 1.0)])
def test_similarities(folder, images, name, scale):
    scores = rewards.load(name, {name: str(folder)})(images, PROMPTS, [{}] * 3)
    torch.testing.assert_close(scores.reward, scale * cosines(folder, images, PROMPTS), rtol=1e-5, atol=1e-6)
    assert scores.reward.std() > 1e-3  # the models tell the pictures apart


def block(state, prefix, x, heads, names, mask=None):
    """A transformer block that normalizes first; names: of its norms, attention and MLP."""

    def linear(name, value):
        return F.linear(value, state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"])

    def norm(name, value):
        return F.layer_norm(
            value, x.shape[-1:], state[f"{prefix}{name}.weight"], state[f"{prefix}{name}.bias"], names["eps"]
        )

    weight, bias = (state[f"{prefix}{names['qkv']}{kind}"] for kind in names["kinds"])
    q, k, v = (
        part.view(*x.shape[:2], heads, -1).transpose(1, 2)
        for part in F.linear(norm(names["first"], x), weight, bias).chunk(3, -1)
    )
    attended = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
    x = x + linear(names["out"], attended)
    return x + linear(names["down"], F.gelu(linear(names["up"], norm(names["second"], x))))


OPEN_CLIP = {"first": "ln_1", "second": "ln_2", "qkv": "attn.in_proj", "kinds": ("_weight", "_bias"), "eps": 1e-5,
             "out": "attn.out_proj", "up": "mlp.c_fc", "down": "mlp.c_proj"}  # fmt: skip


def test_published_hps_weights_are_the_same_network(tmp_path, folder, images):
    state = open_clip_state()
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "hps.pt")
    reward = rewards.load("hps", {"hps": str(tmp_path / "hps.pt"), "hps_clip": str(folder)})
    got = reward(images, PROMPTS, [{}] * 3).reward

    def norm(name, x):
        return F.layer_norm(x, (WIDTH,), state[f"{name}.weight"], state[f"{name}.bias"])

    x = F.conv2d(clip.preprocess(images, SIZE), state["visual.conv1.weight"], stride=PATCH).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(3, 1, -1), x], 1) + state["visual.positional_embedding"]
    x = norm("visual.ln_pre", x)
    for i in range(2):
        x = block(state, f"visual.transformer.resblocks.{i}.", x, 4, OPEN_CLIP)
    pictures = norm("visual.ln_post", x[:, 0]) @ state["visual.proj"]

    # open_clip fills up with 0 after the end of the text and reads there; nothing looks ahead.
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt").input_ids
    y = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    for i in range(2):
        y = block(state, f"transformer.resblocks.{i}.", y, 4, OPEN_CLIP, torch.ones(LENGTH, LENGTH).tril().bool())
    texts = norm("ln_final", y)[torch.arange(3), tokens.argmax(-1)] @ state["text_projection"]
    torch.testing.assert_close(got, F.cosine_similarity(pictures, texts), rtol=1e-4, atol=1e-5)


def test_aesthetic_head_on_unit_embeddings(tmp_path, folder, images):
    state = head_state(DIM)
    torch.save(state, tmp_path / "head.pth")
    reward = rewards.load("aesthetic", {"aesthetic": str(tmp_path / "head.pth"), "aesthetic_clip": str(folder)})
    got = reward(images, PROMPTS, [{}] * 3).reward
    model = CLIPModel.from_pretrained(folder)
    x = model.visual_projection(model.vision_model(clip.preprocess(images, SIZE)).pooler_output)
    x = x / x.norm(dim=-1, keepdim=True)
    for number in (0, 2, 4):
        x = x @ state[f"layers.{number}.weight"].T + state[f"layers.{number}.bias"]
    torch.testing.assert_close(got, x[:, 0].detach(), rtol=1e-4, atol=1e-4)


TIMM = {"first": "norm1", "second": "norm2", "qkv": "attn.qkv", "kinds": (".weight", ".bias"), "eps": 1e-6,
        "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2"}  # fmt: skip


def test_image_reward_is_the_same_network_with_the_published_names(tmp_path, images):
    state = image_reward_state()
    torch.save(state, tmp_path / "ImageReward.pt")
    tokenizer = word_tokenizer(tmp_path / "bert", "[CLS]", "[SEP]", "[PAD]")
    paths = {"image_reward": str(tmp_path / "ImageReward.pt"), "image_reward_tokenizer": str(tmp_path / "bert")}
    got = rewards.load("image_reward", paths)(images, PROMPTS, [{}] * 3).reward

    vision = {name.removeprefix("blip.visual_encoder."): value for name, value in state.items()}
    x = F.conv2d(
        clip.preprocess(images, SIZE), vision["patch_embed.proj.weight"], vision["patch_embed.proj.bias"], PATCH
    )
    x = torch.cat([vision["cls_token"].expand(3, -1, -1), x.flatten(2).transpose(1, 2)], 1) + vision["pos_embed"]
    for i in range(2):
        x = block(vision, f"blocks.{i}.", x, 2, TIMM)
    patches = F.layer_norm(x, (128,), vision["norm.weight"], vision["norm.bias"], 1e-6)

    bert = {name.removeprefix("blip.text_encoder."): value for name, value in state.items()}

    def linear(name, value):
        return F.linear(value, bert[f"{name}.weight"], bert[f"{name}.bias"])

    def norm(name, value):
        return F.layer_norm(value, (64,), bert[f"{name}.weight"], bert[f"{name}.bias"], 1e-12)

    tokens = tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    y = bert["embeddings.word_embeddings.weight"][tokens.input_ids] + bert["embeddings.position_embeddings.weight"]
    y = norm("embeddings.LayerNorm", y)
    seen = tokens.attention_mask.bool()[:, None, None]
    for i in range(2):
        for name, source, mask in (("attention", None, seen), ("crossattention", patches, None)):
            prefix = f"encoder.layer.{i}.{name}"
            source = y if source is None else source
            q = linear(f"{prefix}.self.query", y)[:, None]  # one head: 64 wide
            k, v = (linear(f"{prefix}.self.{part}", source)[:, None] for part in ("key", "value"))
            attended = F.scaled_dot_product_attention(q, k, v, mask)[:, 0]
            y = norm(f"{prefix}.output.LayerNorm", linear(f"{prefix}.output.dense", attended) + y)
        prefix = f"encoder.layer.{i}"
        up = F.gelu(linear(f"{prefix}.intermediate.dense", y))
        y = norm(f"{prefix}.output.LayerNorm", linear(f"{prefix}.output.dense", up) + y)
    raw = y[:, 0]
    for number in (0, 2, 4):
        raw = raw @ state[f"mlp.layers.{number}.weight"].T + state[f"mlp.layers.{number}.bias"]
    expected = (raw[:, 0] - 0.16717362830052426) / 1.0333394966054072
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_weights_that_are_not_there_or_not_weights_are_one_clear_line(tmp_path, folder):
    for name in ("pickscore", "clipscore", "hps", "aesthetic", "image_reward"):
        with pytest.raises(RewardError, match=f"reward: '{name}' could not load '/nowhere'") as caught:
            rewards.load(name, {name: "/nowhere"})
        assert "\n" not in str(caught.value) and "run.reward_models" in str(caught.value)
    torch.save({"state_dict": {"a": 1}}, tmp_path / "odd.pt")
    with pytest.raises(RewardError, match="reward: 'aesthetic' found no state dict in"):
        rewards.load("aesthetic", {"aesthetic": str(tmp_path / "odd.pt")})
    torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
    for name, words in (
        ("aesthetic", r"found no 'layers.N.weight'"),
        ("hps", "cannot use .* it lacks .* weights .* and it has 1 weight \\(a\\), of no use there"),
        ("image_reward", "could not load"),
    ):
        clip_folder = {key: str(folder) for key in (f"{name}_clip",) if key in rewards.WEIGHTS[name]}
        with pytest.raises(RewardError, match=f"reward: '{name}' {words}") as caught:
            rewards.load(name, {name: str(tmp_path / "other.pt"), **clip_folder})
        assert "\n" not in str(caught.value)
