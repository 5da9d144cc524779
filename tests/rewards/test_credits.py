"""Credits of a prompt's concepts: what rewards say, how it is carried, and which concept each credit is of."""

import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from servers import local

from star import rewards
from star.concepts import parse
from star.config import ConfigError
from star.rewards import RewardError, Scores, as_scores, geneval
from star.rewards.remote import Remote
from star.rewards.worker import score
from star.shapes.reward import shapes_reward
from star.shapes.scenes import Scene, Things, prompts, render
from star.training.advantage import concept_advantages, group_advantages
from star.training.concept_credit import matched_credits

NAN = math.nan


def said(credits, concepts=()):
    return Scores(torch.zeros(len(credits)), credits=torch.tensor(credits), concepts=tuple(map(tuple, concepts)))


# --- the embedded world's ---------------------------------------------------------------------------------------------


def test_each_group_of_objects_earns_its_own_credit():
    asked = "a red circle left of a blue square"
    drawn = [
        (Things("red", "circle"), Things("blue", "square")),
        (Things("red", "circle"), Things("blue", "ring")),
        (Things("green", "circle"), Things("blue", "square")),
        (Things("red", "circle"),),
    ]
    images = np.stack([render(Scene(things), random.Random(65))[0] for things in drawn])
    scores = shapes_reward(torch.from_numpy(images).permute(0, 3, 1, 2), [asked] * 4, [{}] * 4)
    assert scores.concepts == (("red circle", "blue square"),) * 4
    credits = scores.credits
    assert credits[0].tolist() == [1, 1] and credits[2].tolist() == [0, 1] and credits[3].tolist() == [1, 0]
    assert credits[1, 0] == 1 and 0.4 <= credits[1, 1] < 1  # the right color alone


def test_every_prompt_of_the_embedded_world_has_its_concepts():
    texts = prompts(200, 3)
    blank = torch.full((len(texts), 3, 36, 36), 0.5)
    scores = shapes_reward(blank, texts, [{}] * len(texts))
    found = [parse(text) for text in texts]
    columns = max(map(len, found))
    matched = matched_credits(scores, texts, found, columns)
    assert matched.credits.shape == (200, columns) and matched.concepts == ()
    asked = [len(row) for row in scores.concepts]
    assert matched.credits.isfinite().sum(1).tolist() == asked and max(asked) == 2
    # A background is a concept, but no object's credit is its own.
    i = next(i for i, text in enumerate(texts) if "circle on a" in text)
    assert [concept.text for concept in found[i]][1].endswith("background")
    assert matched.credits[i].isfinite().tolist() == [True, False][:columns]


# --- how they are carried ---------------------------------------------------------------------------------------------


def by_phrase(images, prompts, metadata):
    """Each word of the prompt earns the brightness of the image, over its number."""
    bright = images.mean((1, 2, 3))
    words = tuple(tuple(prompt.split()) for prompt in prompts)
    credits = torch.full((len(prompts), max(map(len, words))), NAN)
    for i, row in enumerate(words):
        credits[i, : len(row)] = bright[i] / torch.arange(1, len(row) + 1)
    return Scores(
        torch.where(torch.tensor([p == "none" for p in prompts]), NAN, bright), credits=credits, concepts=words
    )


def last_word(images, prompts, metadata):
    words = tuple((prompt.split()[-1],) for prompt in prompts)
    return Scores(images[:, 0].mean((1, 2)), credits=images[:, :1].mean((2, 3)), concepts=words)


def unnamed(images, prompts, metadata):
    return Scores(images.mean((1, 2, 3)), credits=images.mean((2, 3)))


def bright(images, prompts, metadata):
    return images.mean((1, 2, 3))


def test_credits_go_over_the_network_in_batches_of_other_widths():
    images = (torch.rand(3, 3, 4, 5) * 255).round() / 255
    texts = ["one two three", "one", "vier fünf"]
    expected = by_phrase(images, texts, [{}] * 3)
    with local(by_phrase) as url:
        scores = Remote(url, batch=1)(images, texts, [{}] * 3)
    torch.testing.assert_close(scores.credits, expected.credits, equal_nan=True, rtol=1e-6, atol=1e-7)
    assert scores.concepts == expected.concepts


def test_an_image_whose_reward_failed_has_no_credits():
    images = torch.rand(2, 3, 4, 4)
    scores, lines = score(by_phrase, images, ["a b", "none"], [{}, {}])
    assert len(lines) == 1 and scores.credits.isnan().tolist() == [[False, False], [True, True]]

    def raising(images, prompts, metadata):
        if "bad" in prompts:
            raise RuntimeError("no")
        return by_phrase(images, prompts, metadata)

    scores, lines = score(raising, images, ["bad", "a b c"], [{}, {}])
    assert len(lines) == 1 and scores.credits.isnan().all(1).tolist() == [True, False]
    assert scores.concepts == ((), ("a", "b", "c"))


def test_batches_are_joined_and_must_agree_on_names():
    joined = rewards.concatenate([said([[1.0]], [["a"]]), Scores(torch.ones(2)), said([[2.0, 3.0]], [["b", "c"]])])
    torch.testing.assert_close(joined.credits, torch.tensor([[1, NAN], [NAN, NAN], [NAN, NAN], [2, 3]]), equal_nan=True)
    assert joined.concepts == (("a",), (), (), ("b", "c"))
    assert rewards.concatenate([Scores(torch.ones(1))]).credits is None
    with pytest.raises(RewardError, match="named the concepts of some batches' credits and not of others"):
        rewards.concatenate([said([[1.0]], [["a"]]), said([[1.0]])])


def test_a_weighted_sum_adds_the_credits_of_the_same_phrase():
    images, texts = torch.rand(2, 3, 4, 4), ["dog cat", "dog"]
    name = "test_credits"
    scores = rewards.load(f"{name}:by_phrase:2,{name}:last_word:0.5,{name}:bright")(images, texts, [{}, {}])
    whole, red = images.mean((1, 2, 3)), images[:, 0].mean((1, 2))
    assert scores.concepts == (("dog", "cat"), ("dog",))
    expected = torch.tensor([[2 * whole[0], whole[0] + 0.5 * red[0]], [2 * whole[1] + 0.5 * red[1], NAN]])
    torch.testing.assert_close(scores.credits, expected, equal_nan=True)
    torch.testing.assert_close(scores.reward, 2 * whole + 0.5 * red + whole)
    alone = rewards.load(f"{name}:unnamed:3,{name}:bright")(images, texts, [{}, {}])
    torch.testing.assert_close(alone.credits, 3 * images.mean((2, 3)))
    with pytest.raises(RewardError, match="'test_credits:unnamed' does not name the concepts of its credits"):
        rewards.load(f"{name}:by_phrase,{name}:unnamed")(images, texts, [{}, {}])
    # A reward may name a phrase twice: these are two credits.
    twice = rewards.load(f"{name}:by_phrase,{name}:last_word")(images, ["no no", "no"], [{}, {}])
    assert twice.concepts == (("no", "no"), ("no",))
    torch.testing.assert_close(twice.credits[0], torch.stack([whole[0] + red[0], whole[0] / 2]))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (
            replace(said([[1.0], [1.0]]), credits=torch.ones(3, 1)),
            r"got shape \(3, 1\) of 'credits', expected \(2, G\)",
        ),
        (replace(said([[1.0], [1.0]]), credits=torch.ones(2)), r"got shape \(2,\) of 'credits', expected \(2, G\)"),
        (said([[1.0], [1.0]], [["a"]]), "got concepts of 1 images, expected 2"),
        (said([[1.0], [1.0]], [["a"], ["a", "b"]]), r"got 2 concepts \('a', 'b'\) for the credits \[1.0\]"),
        (said([[1.0, 2.0], [1.0, 2.0]], [["a", "b"], ["a"]]), r"got 1 concepts \('a',\) for the credits \[1.0, 2.0\]"),
        (Scores(torch.ones(2), concepts=(("a",), ("b",))), "got concepts without credits"),
        (replace(said([[1.0], [1.0]]), concepts="ab"), "got Scores, expected Scores or 2 numbers"),
        (replace(said([[1.0], [1.0]]), concepts=("a", "b")), "got Scores, expected Scores or 2 numbers"),
        (replace(said([[1.0], [1.0]]), concepts=((1,), (2,))), "got Scores, expected Scores or 2 numbers"),
    ],
)
def test_credits_that_fit_nothing_are_refused(wrong, words):
    with pytest.raises(RewardError, match=words):
        as_scores(wrong, 2, (4, 4))


# --- which concept a credit is of -------------------------------------------------------------------------------------


def match(prompt, phrases, credits=None, columns=4):
    credits = [float(i + 1) for i in range(len(phrases))] if credits is None else credits
    found = parse(prompt)
    row = matched_credits(said([credits], [phrases]), [prompt], [found], columns).credits[0]
    return {found[g].text: value for g, value in enumerate(row.tolist()) if not math.isnan(value)}


def test_a_phrase_is_of_the_concept_that_has_it():
    assert match("a red car right of two blue dogs", ["blue dogs", "red car"]) == {"blue dogs": 1, "red car": 2}
    assert match("A Red Car and a dog", ["red car", "dog"]) == {"Red Car": 1, "dog": 2}  # its case is of no account
    assert match("a red car and a dog", ["a red car", "dog"]) == {"red car": 1, "dog": 2}  # its article neither
    assert match("a red car and a dog", ["car"]) == {"red car": 1}
    assert match("a hot dog left of a dog", ["dog", "hot dog"]) == {"dog": 1, "hot dog": 2}
    assert match('a sign "Open" on a door', ["Open"]) == {"Open": 1}
    assert match("a cat and a dog", ["cat", "unicorn"], [1.0, NAN]) == {"cat": 1}  # nothing is said of it
    prompt = "a dog and a dog"
    row = matched_credits(said([[1.0, 2.0]], [["dog", "dog"]]), [prompt], [parse(prompt)], 2).credits[0]
    assert row.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("prompt", "phrases"),
    [
        ("a cat and a dog", ["unicorn"]),
        ("a cat and a dog", ["cat", "cat"]),
        ("a red car and a dog", ["red", "car"]),  # one concept cannot have two credits
        ("a cat and a dog", ["cat and a dog"]),  # two concepts cannot share one
        ("a catapult", ["cat"]),
    ],
)
def test_a_phrase_that_is_of_no_concept_of_its_own_is_refused(prompt, phrases):
    with pytest.raises(ConfigError, match=rf"loss.advantage: the reward's phrase .* in the prompt {prompt!r}"):
        match(prompt, phrases)


def test_credits_without_names_are_in_the_order_of_the_prompts_concepts():
    texts = ["a cat and a dog", "a bird"]
    found = [parse(text) for text in texts]
    matched = matched_credits(said([[1.0, 2.0], [3.0, NAN]]), texts, found, 3)
    torch.testing.assert_close(matched.credits, torch.tensor([[1, 2, NAN], [3, NAN, NAN]]), equal_nan=True)
    with pytest.raises(ConfigError, match=r"got the credits \[3.0, 4.0\] for the prompt 'a bird', expected no more .*"):
        matched_credits(said([[1.0, 2.0], [3.0, 4.0]]), texts, found, 3)


@pytest.mark.parametrize(
    ("prompt", "include", "expected"),
    [
        ("a photo of a dog", [{"class": "dog"}], ["dog"]),
        ("a photo of four benchs", [{"class": "bench"}], ["benchs"]),
        ("a photo of a red dog and a cat", [{"class": "dog", "color": "red"}, {"class": "cat"}], ["red dog", "cat"]),
        ("a photo of a tv right of a tv remote", [{"class": "tv remote"}, {"class": "tv"}], ["tv remote", "tv"]),
        ("a photo of a tv remote right of a tv", [{"class": "tv"}, {"class": "tv remote"}], ["tv", "tv remote"]),
        (
            "an orange cup and a red orange",
            [{"class": "cup", "color": "orange"}, {"class": "orange", "color": "red"}],
            ["orange cup", "red orange"],
        ),
        ("a Red Dog", [{"class": "dog", "color": "red"}], ["Red Dog"]),
        ("two mice", [{"class": "mouse"}], [None]),
    ],
)
def test_the_words_of_genevals_entries(prompt, include, expected):
    assert geneval.phrases(prompt, include) == expected


# --- advantages -------------------------------------------------------------------------------------------------------


def test_advantages_of_concepts_by_hand():
    credits = torch.tensor([[0.0, 1.0, NAN], [1.0, 1.0, NAN], [NAN, 1.0, NAN], [5.0, 5.0, 5.0]])
    groups = torch.tensor([0, 0, 0, 1])
    got = concept_advantages(credits, groups, eps=0.0)
    # Of the first concept -1/2 and 1/2, of the second 0 three times: the deviation is sqrt(2 (1/4) / 5).
    d = 0.5 / (0.5 / 5) ** 0.5
    torch.testing.assert_close(got, torch.tensor([[-d, 0, NAN], [d, 0, NAN], [NAN, 0, NAN], [0, 0, 0]]), equal_nan=True)
    whole = concept_advantages(credits, groups, global_std=True, eps=0.0)
    known = credits[credits.isfinite()]
    torch.testing.assert_close(whole[1, 0], 0.5 / known.std(correction=0))
    with pytest.raises(ValueError, match=r"groups: got shape \(2,\) for credits \(4, 3\)"):
        concept_advantages(credits, groups[:2])


@given(seed=st.integers(0, 99), global_std=st.booleans())
def test_one_concept_whose_credit_is_the_reward_has_the_advantage_of_the_image(seed, global_std):
    values = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    values[seed % 8] = NAN
    groups = torch.arange(8) % 3
    got = concept_advantages(values[:, None], groups, global_std=global_std)[:, 0]
    expected = group_advantages(values, groups, global_std=global_std)
    torch.testing.assert_close(got.nan_to_num(), expected, rtol=1e-6, atol=1e-6)
