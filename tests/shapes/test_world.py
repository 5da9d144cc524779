"""The embedded world: scenes, verifier, and the shipped model."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from star.concepts import locate, parse
from star.presets import preset
from star.rewards.worker import RewardWorker
from star.shapes import measure
from star.shapes.model import TEXT_LENGTH, WEIGHTS, load_pipeline
from star.shapes.scenes import (
    CATEGORIES,
    RELATIONS,
    Scene,
    Things,
    all_scenes,
    parse_scene,
    prompts,
    render,
    split_scenes,
)
from star.shapes.task import TASK
from star.shapes.verifier import verify
from star.training.scoring import HeldOut, evaluate

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def pipeline():
    return load_pipeline()


def test_prompts_and_scenes_are_inverse():
    for category, scenes in all_scenes().items():
        for scene in scenes:
            assert scene.category == category and parse_scene(scene.prompt) == scene
    with pytest.raises(ValueError, match="prompt: 'a dog' is not a prompt of the shapes world"):
        parse_scene("a dog")


def test_held_out_prompts_are_never_trained_on():
    for category in CATEGORIES:
        train, held = (set(split_scenes(split)[category]) for split in ("train", "heldout"))
        assert train and held and not train & held and train | held == set(all_scenes()[category])
    drawn = prompts(300, 1, "heldout", distinct=True)
    assert drawn == prompts(300, 1, "heldout", distinct=True) != prompts(300, 2, "heldout", distinct=True)
    position = [p for p in drawn if parse_scene(p).category == "position"]
    assert len(set(position)) == len(position) > 40


def test_every_concept_of_every_scene_is_found(pipeline):
    for scenes in all_scenes().values():
        for scene in scenes[:40]:
            concepts = parse(scene.prompt)
            assert len(concepts) == len(scene.things) + bool(scene.background)
            index = locate([scene.prompt], pipeline.tokenizer, concepts=[concepts]).index
            assert (index >= 0).any(-1).all() and index.max() < TEXT_LENGTH


def test_the_verifier_accepts_what_was_asked_for_and_finds_where():
    texts = prompts(400, 3)
    for i, text in enumerate(texts):
        scene = parse_scene(text)
        image, masks = render(scene, random.Random(i))
        verdict = verify(image, scene)
        assert verdict.strict and verdict.soft == 1.0, text
        if len(masks):
            drawn, found = masks.max(0) > 0.5, verdict.masks.any(0)
            assert (drawn & found).sum() / (drawn | found).sum() > 0.8, text


@pytest.mark.parametrize(
    ("drawn", "asked", "soft"),
    [
        ("a blue circle", "a red circle", 0.0 * 0.8),
        ("two red circles", "a red circle", 0.8),
        ("a red circle", "two red circles", 0.5),
        ("a red circle left of a blue square", "a red circle right of a blue square", 2 / 3),
        ("a red circle on a black background", "a red circle on a white background", 1 / 2),
        ("a red circle and a blue square", "a blue circle and a red square", None),
    ],
)
def test_the_verifier_rejects_what_was_not(drawn, asked, soft):
    image, _ = render(parse_scene(drawn), random.Random(0))
    verdict = verify(image, parse_scene(asked))
    assert not verdict.strict
    assert verdict.soft == pytest.approx(soft) if soft is not None else verdict.soft < 0.9


def test_relations_hold_in_what_is_drawn():
    for relation, (dx, dy) in RELATIONS.items():
        scene = Scene((Things("red", "circle"), Things("blue", "square")), relation)
        for seed in range(20):
            _, masks = render(scene, random.Random(seed))
            centers = [np.argwhere(mask > 0.5).mean(0) for mask in masks]
            (ay, ax), (by, bx) = centers
            assert (bx - ax) * dx + (by - ay) * dy > 8


def test_noise_and_an_empty_image_are_judged_without_error():
    scene = parse_scene("a red circle left of a blue square")
    assert verify(np.zeros((36, 36, 3)), scene).soft == 0
    verify(np.random.default_rng(0).random((36, 36, 3)), scene)
    with pytest.raises(ValueError, match=r"image: got shape \(3, 36, 36\)"):
        verify(np.zeros((3, 36, 36)), scene)


def test_shipped_weights_are_small():
    size = sum(path.stat().st_size for path in Path(WEIGHTS).rglob("*.safetensors"))
    assert 0 < size <= 8 * MEGABYTE


def test_shipped_base_leaves_room_for_reinforcement(pipeline):
    """The numbers of the study and the demo: another noise scheme or other held-out prompts would change them."""
    held_out = HeldOut.of_run(TASK, preset("shapes"))
    with RewardWorker(TASK.reward) as worker:
        evaluation = evaluate(pipeline, held_out.prompts, worker, held_out.options)
    assert round(evaluation.mean("reward").mean, 3) == 0.733
    assert round(evaluation.mean("strict").mean, 3) == 0.371


def test_shipped_attention_localizes_in_the_default_layers(pipeline):
    layers = preset("shapes").sampling.layers
    measured = measure.measure_localization(pipeline, (0.5,), n=64)
    for entry in measured:
        if entry.layer in layers:
            assert entry.auc >= 0.9 and entry.auc_any >= 0.9 and entry.mass_ratio > 2


def test_the_autoencoder_keeps_scenes_right(pipeline):
    texts = prompts(100, 5, "heldout")
    images = np.stack([render(parse_scene(text), random.Random(i))[0] for i, text in enumerate(texts)])
    with torch.no_grad():
        codes = pipeline.vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1).latent_dist.mean
        decoded = (pipeline.vae.decode(codes).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
    assert -10 * np.log10(((decoded - images) ** 2).mean()) > 30
    verdicts = [verify(image, parse_scene(text)) for image, text in zip(decoded, texts, strict=True)]
    assert np.mean([verdict.strict for verdict in verdicts]) > 0.95


def test_auc():
    inside = np.array([True, False, True, False])
    assert measure.auc(np.array([3.0, 1.0, 4.0, 2.0]), inside) == 1
    assert measure.auc(np.array([1.0, 1.0, 1.0, 1.0]), inside) == 0.5
