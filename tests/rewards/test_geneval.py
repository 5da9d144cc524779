"""GenEval: its rules on detections made by hand, and its networks on small random models."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPConfig, CLIPModel

from builders import small_detector, word_tokenizer
from star import rewards
from star.rewards import geneval
from star.rewards.geneval import COLORS, Detection, GenEval, judge, relations, select

EMPTY = np.zeros((1, 1), bool)


def thing(name, left=0, top=0, right=10, bottom=10, score=0.95):
    return Detection(name, score, (left, top, right, bottom), EMPTY)


def verdict(detections, include, exclude=(), tag="", colors=()):
    """colors: of the detections, by identity."""
    colors = {id(d): color for d, color in zip(detections, colors, strict=False)}
    metadata = {"tag": tag, "include": list(include), "exclude": list(exclude)}
    return judge(select(detections, tag), metadata, lambda objects: [colors[id(d)] for d in objects])


def wanted(name, count=1, **more):
    return {"class": name, "count": count, **more}


# --- the rules ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "count", "correct", "strict", "soft"),
    [(0, 1, False, False, 0.0), (1, 1, True, True, 1.0), (2, 1, True, False, 0.0), (3, 1, True, False, -1.0),
     (2, 3, False, False, 2 / 3), (3, 3, True, True, 1.0), (5, 3, True, False, 1 / 3)],
)  # fmt: skip
def test_numbers(number, count, correct, strict, soft):
    got = verdict([thing("dog")] * number + [thing("cat")], [wanted("dog", count)])
    assert (got.correct, got.strict, got.soft) == (correct, strict, pytest.approx(soft))
    assert len(got.found) == min(number, count) and all(d.name == "dog" for d in got.found)


def test_two_objects_are_both_needed():
    include = [wanted("dog"), wanted("cat")]
    assert verdict([thing("cat"), thing("dog")], include).soft == 1
    one = verdict([thing("cat")], include)
    assert (one.correct, one.strict, one.soft) == (False, False, 0.5)
    assert one.reasons == ("expected 1 dog, found 0",)


def test_counting_needs_confidence_and_excludes_one_more():
    include, exclude = [wanted("dog", 2)], [wanted("dog", 3)]
    three = [thing("dog"), thing("dog"), thing("dog")]
    assert verdict(three[:2], include, exclude, "counting").correct
    too_many = verdict(three, include, exclude, "counting")
    assert not too_many.correct and too_many.reasons == ("expected fewer than 3 dog, found 3",)
    unsure = [*three[:2], thing("dog", score=0.6)]
    assert verdict(unsure, include, exclude, "counting").correct
    assert not verdict(unsure, include, exclude, "colors").correct


def test_colors_are_of_the_most_confident():
    dogs = [thing("dog", score=0.5), thing("dog", score=0.9)]
    got = verdict(dogs, [wanted("dog", color="red")], colors=["blue", "red"])
    # The benchmark takes the best one; Flow-GRPO's credit wants exactly one: a 0 for number, a 0 for color.
    assert (got.correct, got.strict, got.soft) == (True, False, 0.0)
    one = verdict(dogs[1:], [wanted("dog", color="red")], colors=["red"])
    assert (one.correct, one.strict, one.soft) == (True, True, 1.0)
    wrong = verdict(dogs[1:], [wanted("dog", color="red")], colors=["blue"])
    assert (wrong.correct, wrong.strict, wrong.soft) == (False, False, 0.5)
    assert wrong.reasons == ("expected 1 red dog, found blue",)
    half = verdict(dogs, [wanted("dog", 2, color="red")], colors=["blue", "red"])
    assert (half.correct, half.strict, half.soft) == (False, False, 0.75)


def test_attributes_belong_to_their_object():
    scene = [thing("dog"), thing("cat")]
    include = [wanted("dog", color="red"), wanted("cat", color="blue")]
    assert verdict(scene, include, colors=["red", "blue"]).strict
    swapped = verdict(scene, include, colors=["blue", "red"])
    assert (swapped.correct, swapped.soft) == (False, 0.5)


def test_places():
    include = [wanted("cat"), wanted("dog", position=["left of", 0])]
    cat = thing("cat", 50, 0, 60, 10)
    right = verdict([thing("dog"), cat], include)
    assert (right.correct, right.strict, right.soft) == (True, True, 1.0)
    wrong = verdict([thing("dog", 90, 0, 100, 10), cat], include)
    # Numbers 1 and 1; a wrong place counts as a 0 and a 1.
    assert (wrong.correct, wrong.strict, wrong.soft) == (False, False, 0.75)
    assert wrong.reasons == ("expected dog left of cat",)
    alone = verdict([thing("dog")], include)
    # The cat's number 0, the dog's 1, its place 0: there is nothing to be left of.
    assert (alone.correct, alone.strict, alone.soft) == (False, False, pytest.approx(1 / 3))
    none = verdict([cat], include)
    assert none.soft == pytest.approx(1 / 3)
    every = verdict(
        [thing("dog"), thing("dog", 90, 0, 100, 10), cat], [include[0], wanted("dog", 2, position=["left of", 0])]
    )
    assert not every.correct  # all of them must be there


def test_color_and_place_of_one_object():
    include = [wanted("cat"), wanted("dog", color="red", position=["above", 0])]
    scene = [thing("dog"), thing("cat", 0, 50, 10, 60)]
    assert verdict(scene, include, colors=["red"]).soft == 1
    assert verdict(scene, include, colors=["blue"]).soft == pytest.approx(2 / 3)  # the place is not looked at
    assert verdict(scene[1:], include).soft == pytest.approx(1 / 3)


BOX = st.tuples(*[st.integers(0, 60)] * 2, *[st.integers(1, 30)] * 2).map(
    lambda b: (b[0], b[1], b[0] + b[2], b[1] + b[3])
)
OPPOSITE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}


@given(a=BOX, b=BOX, dx=st.integers(-50, 50), dy=st.integers(-50, 50))
def test_relations_are_opposite_and_move_along(a, b, dx, dy):
    got = relations(a, b)
    assert relations(b, a) == {OPPOSITE[name] for name in got}
    moved = [(x0 + dx, y0 + dy, x1 + dx, y1 + dy) for x0, y0, x1, y1 in (a, b)]
    assert relations(*moved) == got
    assert not ({"left of", "right of"} <= got or {"above", "below"} <= got)
    # Mirrored along the diagonal.
    swap = {"left of": "above", "right of": "below", "above": "left of", "below": "right of"}
    assert relations(*[(y0, x0, y1, x1) for x0, y0, x1, y1 in (a, b)]) == {swap[name] for name in got}


def test_relations_by_hand():
    middle = (40, 40, 60, 60)
    assert relations((0, 40, 20, 60), middle) == {"left of"}
    assert relations((0, 0, 20, 20), middle) == {"left of", "above"}  # both at 0.707 of the distance, less 4 px
    assert relations((37, 40, 57, 60), middle) == set()  # within a tenth of both widths
    assert relations(middle, middle) == set()
    assert relations((40, 90, 60, 110), middle) == {"below"}


DETECTIONS = st.lists(
    st.builds(
        lambda name, box, score: Detection(name, score, box, EMPTY), st.sampled_from("abc"), BOX, st.floats(0, 1)
    ),
    max_size=40,
)


@given(detections=DETECTIONS, tag=st.sampled_from(geneval.TAGS))
def test_what_counts_as_seen(detections, tag):
    groups = select(detections, tag)
    threshold = 0.9 if tag == "counting" else 0.3
    for name, group in groups.items():
        confident = sorted((d.score for d in detections if d.name == name and d.score > threshold), reverse=True)[:16]
        assert [d.score for d in group] == confident
    assert set(groups) == {d.name for d in detections if d.score > threshold}


ENTRY = st.builds(
    lambda name, count, color: wanted(name, count, **({"color": color} if color else {})),
    st.sampled_from("abc"), st.integers(1, 3), st.sampled_from([None, *COLORS[:3]]),
)  # fmt: skip


@given(detections=DETECTIONS, include=st.lists(ENTRY, min_size=1, max_size=3), seed=st.integers(0, 9))
def test_exact_is_right_and_full_credit(detections, include, seed):
    def colors(objects):
        return [COLORS[(int(d.score * 100) + seed) % 3] for d in objects]

    groups = select(detections, "colors")
    got = judge(groups, {"include": include}, colors)
    assert got.soft <= 1 and got.strict == (got.soft == 1)
    assert got.correct or not got.strict  # nothing is excluded
    assert got.correct == (not got.reasons)
    # What no entry names changes nothing.
    other = judge({**groups, "zebra": [thing("zebra")]}, {"include": include}, colors)
    assert dataclasses.astuple(other)[:3] == dataclasses.astuple(got)[:3]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "with None under 'include'"),
        ({"include": [{"count": 1}]}, r"with the entry \{'count': 1\} without a class"),
        ({"include": [wanted("dog", 0)]}, "with count 0 of 'dog'"),
        ({"include": [wanted("dog", color="mauve")]}, "with color 'mauve'"),
        ({"include": [wanted("dog", position=["beside", 0])]}, r"with position \['beside', 0\] of 'dog'"),
        ({"include": [wanted("dog", position=["above", 0])]}, r"with position \['above', 0\] of 'dog'"),
    ],
)
def test_metadata_that_is_not_genevals_is_one_clear_line(metadata, words):
    with pytest.raises(ValueError, match=f"reward: 'geneval' got metadata {words}"):
        geneval.check(metadata)


def test_null_is_what_is_not_said():
    """As other tools write what an entry lacks."""
    entry = {"class": "bench", "count": 1, "color": None, "position": None}
    said = geneval.check({"tag": None, "include": [entry], "exclude": None, "prompt": "a bench"})
    assert said == {"include": [{"class": "bench", "count": 1}], "exclude": [], "prompt": "a bench"}
    assert judge(select([thing("bench")], ""), {"include": [entry], "exclude": None}, lambda objects: []).strict


@pytest.mark.parametrize(
    "entry", [3, "dog", {"class": None}, {"count": None}, {"count": True}, {"count": 1.5}, {"color": ["red"]},
              {"position": 3}, {"position": "ab"}, {"position": ["above", None]}, {"position": [None, 0]}],
)  # fmt: skip
@pytest.mark.parametrize("name", ["include", "exclude"])
def test_metadata_of_other_types_is_one_clear_line(name, entry):
    entry = {**wanted("dog"), **entry} if isinstance(entry, dict) else entry
    metadata = {"include": [wanted("cat")], "exclude": []}
    for value in ([*metadata[name], entry], entry):
        with pytest.raises(ValueError, match="reward: 'geneval' got metadata with"):
            geneval.check({**metadata, name: value})


# --- the networks -------------------------------------------------------------------------------------------------


def test_there_are_cocos_eighty_classes():
    assert len(set(geneval.OBJECTS)) == 80 and geneval.OBJECTS[0] == "person" and geneval.OBJECTS[79] == "toothbrush"


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return small_detector()


def test_pictures_are_resized_normalized_and_padded(detector):
    images = torch.rand(2, 3, 24, 36)
    prepared, size = detector.prepare(images)
    assert size == (48, 72) and prepared.shape == (2, 3, 64, 96)
    assert (prepared[..., 48:, :] == 0).all() and (prepared[..., 72:] == 0).all()
    constant, _ = detector.prepare(torch.full((1, 3, 24, 36), 0.6))
    expected = (0.6 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(constant[0, :, 10, 10], expected)
    assert detector.prepare(torch.rand(1, 3, 10, 40))[1] == (20, 80)  # the long side is the limit


def test_instances_by_hand(detector):
    mask = torch.full((2, 4, 6), -3.0)
    mask[0, 1:3, 2:5] = 2.0  # inside, sigmoid 0.881
    logits = torch.log(torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.2, 0.2, 0.5, 0.1]]))
    found = detector.instances(logits, mask)
    assert len(found) == 3  # the second query's mask is empty
    best = found[0]
    assert best.name == "dog" and best.box == (2, 1, 5, 3) and best.mask.sum() == 6
    assert best.score == pytest.approx(0.7 * torch.sigmoid(torch.tensor(2.0)).item(), rel=1e-5)


def test_detections_are_what_the_model_says(detector):
    images = torch.rand(2, 3, 24, 36)
    found = detector(images)
    with torch.no_grad():
        output = detector.model(detector.prepare(images)[0])
    for i in range(2):
        probability = output.class_queries_logits[i].softmax(-1)[:, :-1]
        large = F.interpolate(output.masks_queries_logits[i : i + 1], (64, 96), mode="bilinear")[..., :48, :72]
        fields = F.interpolate(large, (24, 36), mode="bilinear")[0]
        expected = {
            (name, round(float(probability[q, c] * fields[q].sigmoid()[fields[q] > 0].mean()), 4))
            for q in range(6) for c, name in enumerate(("dog", "cat", "cup")) if (fields[q] > 0).any()
        }  # fmt: skip
        assert {(d.name, round(d.score, 4)) for d in found[i]} == expected and expected
        for d in found[i]:
            rows, columns = np.nonzero(d.mask)
            assert d.box == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)


class Eye:
    """In the place of CLIP: an embedding is the mean color; of a sentence, its color's."""

    VALUES: ClassVar = {
        "red": (1, 0, 0),
        "green": (0, 1, 0),
        "blue": (0, 0, 1),
        "yellow": (1, 1, 0),
        "white": (1, 1, 1),
    }

    def __init__(self):
        self.seen = []

    def images(self, images):
        self.seen.append(images)
        return F.normalize(images.mean((2, 3)), dim=-1)

    def texts(self, texts):
        self.sentences = texts
        colors = [
            next((v for c, v in self.VALUES.items() if f" {c} " in t or f" {c}-" in t), (-1, -1, -1)) for t in texts
        ]
        return F.normalize(torch.tensor(colors, dtype=torch.float32), dim=-1)


def square(color, left):
    mask = np.zeros((40, 60), bool)
    mask[10:30, left : left + 20] = True
    return mask, torch.tensor(Eye.VALUES[color], dtype=torch.float32)


def test_colors_are_seen_on_the_object_cut_out_over_gray():
    image = torch.full((3, 40, 60), 0.2)
    objects = []
    for color, left in (("red", 4), ("blue", 34)):
        mask, value = square(color, left)
        mask[10:14, left : left + 5] = False  # a corner that is not the object's
        image[:, torch.from_numpy(mask)] = value[:, None]
        objects.append(Detection("cup", 0.9, (left, 10, left + 20, 30), mask))
    eye = Eye()
    classify = geneval.ColorClassifier(eye)
    assert classify(image, objects) == ["red", "blue"]
    blank = Image.new("RGB", (60, 40), "#999")
    picture = Image.fromarray((image.permute(1, 2, 0) * 255).round().byte().numpy())
    for item, seen in zip(objects, eye.seen, strict=True):
        expected = Image.composite(picture, blank, Image.fromarray(item.mask)).crop(item.box)
        np.testing.assert_allclose(seen[0].permute(1, 2, 0) * 255, np.asarray(expected), atol=0.5)
    assert eye.sentences[:3] == ["a photo of a red cup", "a photo of a red-colored cup", "a photo of a red object"]
    before = eye.sentences
    classify(image, objects)
    assert eye.sentences is before  # encoded once


class Drawn:
    """In the place of the detector: fixed detections."""

    names = ("cup", "dog")

    def __init__(self, detections):
        self.detections = detections

    def __call__(self, images):
        return self.detections


def test_scores_categories_and_masks():
    images = torch.full((3, 3, 40, 60), 0.2)
    detections = []
    for i, color in enumerate(("red", "blue", "red")):
        mask, value = square(color, 4)
        images[i][:, torch.from_numpy(mask)] = value[:, None]
        detections.append([Detection("cup", 0.9, (4, 10, 24, 30), mask)])
    reward = GenEval(Drawn(detections), geneval.ColorClassifier(Eye()))
    metadata = [
        {"tag": "colors", "include": [wanted("cup", color="red")]},
        {"tag": "colors", "include": [wanted("cup", color="red")]},
        {"tag": "two_object", "include": [wanted("cup"), wanted("dog")]},
    ]
    scores = reward(images, ["a"] * 3, metadata)
    assert scores.reward.tolist() == [1.0, 0.5, 0.5]
    assert scores.details["correct"].tolist() == scores.details["strict"].tolist() == [1, 0, 0]
    assert scores.details["correct_colors"].nansum() == 1 and scores.details["correct_colors"].isnan().tolist()[2]
    assert "correct_counting" not in scores.details
    assert torch.equal(scores.masks[0], torch.from_numpy(square("red", 4)[0]).float())
    with pytest.raises(ValueError, match="reward: 'geneval' got the class 'unicorn', which its detector does not know"):
        reward(images[:1], ["a"], [{"include": [wanted("unicorn")]}])


def test_small_models_from_a_folder_run_end_to_end(tmp_path, detector):
    end = word_tokenizer(tmp_path / "clip", "<s>", "<e>", "!").convert_tokens_to_ids("<e>")
    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": end + 1, "max_position_embeddings": 12, "eos_token_id": end, "bos_token_id": 1}
    CLIPModel(
        CLIPConfig(text_config=text, vision_config={**tower, "image_size": 16, "patch_size": 8}, projection_dim=8)
    ).save_pretrained(tmp_path / "clip")
    detector.model.save_pretrained(tmp_path / "detector")
    models = {"geneval": str(tmp_path / "detector"), "geneval_clip": str(tmp_path / "clip")}
    reward = rewards.load("geneval", models)
    metadata = [
        {"tag": "colors", "include": [wanted("dog", color="red")]},
        {"tag": "counting", "include": [wanted("cat", 2)]},
    ]
    scores = reward(torch.rand(2, 3, 24, 36), ["a red dog", "two cats"], metadata)
    assert scores.reward.isfinite().all() and scores.masks.shape == (2, 24, 36)
    with pytest.raises(rewards.RewardError, match="reward: 'geneval' could not load '/nowhere'"):
        rewards.load("geneval", {"geneval": "/nowhere"})


# --- where ------------------------------------------------------------------------------------------------------------


def drawn_scores(include, objects, prompt="a photo"):
    """objects: (name, color, left, score), squares of 20 pixels in an image of 40 x 60. Returns scores and masks."""
    image, detections, masks = torch.full((3, 40, 60), 0.2), [], []
    for name, color, left, confidence in objects:
        mask, value = square(color, left)
        image[:, torch.from_numpy(mask)] = value[:, None]
        detections.append(Detection(name, confidence, (left, 10, left + 20, 30), mask))
        masks.append(torch.from_numpy(mask))
    reward = GenEval(Drawn([detections]), geneval.ColorClassifier(Eye()))
    return reward(image[None], [prompt], [{"tag": "colors", "include": include}]), masks


def inside(scores, masks):
    """The one value of the map inside each mask, and that elsewhere."""
    field = scores.reward_map[0]
    elsewhere = ~torch.stack(masks).any(0) if masks else torch.ones_like(field, dtype=torch.bool)
    values = [field[mask].unique() for mask in [*masks, elsewhere]]
    assert all(len(value) == 1 for value in values)
    return [value.item() for value in values]


def test_each_object_earns_its_own_credit_inside_its_mask():
    both = [wanted("cup", color="red"), wanted("dog", color="blue")]
    right, masks = drawn_scores(both, [("cup", "red", 2, 0.9), ("dog", "blue", 32, 0.9)])
    assert right.reward.item() == 1 and inside(right, masks) == [1, 1, 1]
    # The cup's color is wrong: it is 1 for being there and 0 for its color; the dog is as it should be.
    wrong, masks = drawn_scores(both, [("cup", "blue", 2, 0.9), ("dog", "blue", 32, 0.9)])
    assert wrong.reward.item() == 0.75 and inside(wrong, masks) == [0.5, 1, 0.75]


def test_of_too_many_objects_the_worst_are_worth_nothing():
    # The most confident one has the wrong color: it is the one too many.
    scores, masks = drawn_scores([wanted("cup", color="red")], [("cup", "blue", 2, 0.95), ("cup", "red", 32, 0.6)])
    assert scores.reward.item() == 0 and inside(scores, masks) == [0, 1, 0]
    scores, masks = drawn_scores([wanted("cup")], [("cup", "blue", 2, 0.6), ("cup", "red", 32, 0.95)])
    assert inside(scores, masks) == [0, 1, 0]


def test_what_is_missing_is_nobodys_fault_but_that_of_whoever_should_be_beside_it():
    pair = [wanted("dog"), wanted("cup", position=["left of", 0])]
    # Nothing to be left of: the cup is there, its position is not.
    alone, masks = drawn_scores(pair, [("cup", "red", 2, 0.9)])
    assert inside(alone, masks) == [0.5, pytest.approx(alone.reward.item())]
    swapped, masks = drawn_scores(pair, [("cup", "red", 38, 0.9), ("dog", "red", 2, 0.9)])
    assert inside(swapped, masks) == [0.5, 1, 0.75]
    fewer, masks = drawn_scores([wanted("cup", 2)], [("cup", "red", 2, 0.9)])
    assert inside(fewer, masks) == [1, 0.5]
    nothing, masks = drawn_scores([wanted("cup")], [])
    assert inside(nothing, masks) == [0] == nothing.reward.tolist()


def test_what_nobody_asked_for_earns_what_the_image_does():
    scores, masks = drawn_scores([wanted("cup", 2)], [("cup", "red", 2, 0.9), ("dog", "red", 32, 0.9)])
    assert inside(scores, masks) == [1, 0.5, 0.5]


def test_objects_of_one_class_are_shared_out_among_its_entries():
    include = [wanted("cup", color="red"), wanted("cup", color="blue")]
    scores, masks = drawn_scores(include, [("cup", "blue", 2, 0.9), ("cup", "red", 32, 0.5)])
    assert inside(scores, masks)[:2] == [1, 1]  # though Flow-GRPO's credit counts two for each entry
    over, masks = drawn_scores([wanted("cup", color="red")], [("cup", "blue", 2, 0.9), ("cup", "red", 12, 0.8)])
    field = over.reward_map[0]
    assert set(field[masks[0]].tolist()) == {0.0} and set(field[masks[1] & ~masks[0]].tolist()) == {1.0}


def test_each_entry_has_its_credit_and_its_words():
    include = [wanted("dog", 2), wanted("cup", color="red")]
    scores, _ = drawn_scores(
        include, [("cup", "blue", 2, 0.9), ("dog", "red", 32, 0.9)], "a photo of two dogs and a red cup"
    )
    assert scores.concepts == (("dogs", "red cup"),) and scores.credits.tolist() == [[0.5, 0.5]]
    assert scores.reward.item() == 0.5
    unknown, _ = drawn_scores([wanted("dog")], [], "two puppies")
    assert unknown.credits.isnan().all() and unknown.reward.item() == 0


@given(detections=DETECTIONS, include=st.lists(ENTRY, min_size=1, max_size=3), seed=st.integers(0, 9))
def test_own_credits_are_those_of_the_image_where_all_is_right(detections, include, seed):
    def colors(objects):
        return [COLORS[(int(d.score * 100) + seed) % 3] for d in objects]

    groups = select(detections, "colors")
    got = judge(groups, {"include": include}, colors)
    assert len(got.earned) == sum(len(groups.get(name, [])) for name in {entry["class"] for entry in include})
    assert all(0 <= credit <= 1 for _, credit in got.earned) and len(got.credits) == len(include)
    if got.strict:
        assert {credit for _, credit in got.earned} == {1.0} == set(got.credits)
    surplus = sum(credit == 0 for _, credit in got.earned)
    assert surplus >= len(got.earned) - sum(entry["count"] for entry in include)
