"""Rewards: each against its formula written anew, and what happens when one fails."""

import io
import math
import re
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from star import rewards
from star.rewards import RewardError, Scores, as_scores, ocr
from star.rewards.worker import RewardWorker, score
from star.training.advantage import group_advantages, location_advantages, weighted_advantages

TEXTS = st.text("abc d", min_size=0, max_size=8)


def pictures(*arrays):
    """(H, W, 3) uint8 arrays -> (B, 3, H, W) in 0..1."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255


def written(text, size=160, place=(8, 60)):
    image = Image.new("RGB", (size, size), (235, 235, 225))
    ImageDraw.Draw(image).text(place, text, fill=(10, 10, 10), font=ImageFont.load_default(26))
    return np.asarray(image)


# --- names, weights, sums -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("specification", "weights"),
    [
        ("ocr", {"ocr": 1.0}),
        ("ocr:1.0, pickscore:0.5", {"ocr": 1.0, "pickscore": 0.5}),
        ("package.module:function", {"package.module:function": 1.0}),
        ("module:function:-2,ocr", {"module:function": -2.0, "ocr": 1.0}),
        ({"ocr": 1, "clipscore": 0.25}, {"ocr": 1.0, "clipscore": 0.25}),
    ],
)
def test_rewards_are_named_with_their_weights(specification, weights):
    assert rewards.parse(specification) == weights


@pytest.mark.parametrize(
    ("specification", "words"),
    [
        ("", "reward: got '', expected one of"),
        ("ocr,ocr:2", "reward: 'ocr' is named twice"),
        ("ocr:nan", "reward: got weight nan for 'ocr'"),
        ({"ocr": "much"}, "reward: got weight 'much' for 'ocr'"),
        ({"ocr": 0}, "reward: got weight 0 for 'ocr'"),
        ("beauty", "reward: unknown 'beauty', expected one of"),
        ("nowhere.at_all:function", "reward: 'nowhere.at_all:function' could not be loaded"),
        ("test_rewards:absent", "reward: 'test_rewards:absent' could not be loaded"),
    ],
)
def test_a_wrong_reward_is_one_clear_line(specification, words):
    with pytest.raises(ValueError, match=words) as caught:
        rewards.load(specification)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("library", ["rapidocr", "rapidfuzz"])
def test_a_missing_extra_is_one_clear_line(library, monkeypatch):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RewardError, match=rf"'ocr' needs {library}; pip install '?{library}\b"):
        rewards.load("ocr")


def redness(images, prompts, metadata):
    return Scores(images[:, 0].mean((1, 2)), {"bare": images[:, 0].amax((1, 2))}, reward_map=images[:, 0])


def blueness(images, prompts, metadata):
    return images[:, 2].mean((1, 2)).tolist()  # bare numbers are a reward too


def test_a_sum_has_its_terms_details_and_map():
    images = torch.rand(3, 3, 4, 5)
    reward = rewards.load("test_rewards:redness:2,test_rewards:blueness:-0.5")
    scores = reward(images, ["a", "b", "c"], [{}] * 3)
    red, blue = images[:, 0].mean((1, 2)), images[:, 2].mean((1, 2))
    torch.testing.assert_close(scores.reward, 2 * red - 0.5 * blue)
    torch.testing.assert_close(scores.reward_map, 2 * images[:, 0] - 0.5 * blue.view(3, 1, 1))
    assert scores.details.keys() == {"test_rewards:redness_bare"}
    logged = rewards.means(scores)
    assert logged["reward_test_rewards:redness"] == pytest.approx(red.mean().item())
    assert logged["reward_test_rewards:blueness"] == pytest.approx(blue.mean().item())
    alone = rewards.load("test_rewards:redness")(images, ["a", "b", "c"], [{}] * 3)
    assert torch.equal(alone.reward, red) and rewards.means(alone).keys() == {"reward", "reward_std", "reward_bare"}


@given(seed=st.integers(0, 99), scale=st.floats(0.01, 100), shift=st.floats(-10, 10))
def test_normalized_rewards_have_the_say_of_their_weights_whatever_their_scale(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    one, two = torch.randn(2, 12, generator=generator, dtype=torch.float64)
    groups, weights = torch.arange(12) % 3, {"one": 1.0, "two": 0.5}
    plain = weighted_advantages({"one": one, "two": two}, weights, groups, eps=0.0)
    scaled = weighted_advantages({"one": one, "two": two * scale + shift}, weights, groups, eps=0.0)
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-6)
    expected = (group_advantages(one, groups, eps=0.0) + 0.5 * group_advantages(two, groups, eps=0.0)) / 1.5
    torch.testing.assert_close(plain, expected)


def test_batches_that_say_different_things_are_joined():
    a = Scores(torch.ones(2), {"x": torch.ones(2)}, torch.ones(2, 3, 3))
    b = Scores(torch.zeros(1), {"y": torch.zeros(1)}, None, torch.ones(1, 3, 3))
    joined = rewards.concatenate([a, b])
    assert joined.reward.tolist() == [1, 1, 0]
    assert joined.details["x"].isnan().tolist() == [False, False, True]
    assert joined.details["y"].isnan().tolist() == [True, True, False]
    assert joined.masks.amax((1, 2)).tolist() == [1, 1, 0]
    assert joined.reward_map.isnan().all((1, 2)).tolist() == [True, True, False]
    expected = {"reward": 2 / 3, "reward_std": 3**-0.5, "reward_x": 1, "reward_y": 0}
    assert rewards.means(joined) == pytest.approx(expected)


# --- advantages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("global_std", [False, True])
def test_a_failed_reward_is_left_out_of_its_group(global_std):
    values = torch.tensor([1.0, 3.0, torch.nan, 4.0, 4.0, torch.nan])
    groups = torch.tensor([0, 0, 0, 1, 1, 2])
    got = group_advantages(values, groups, global_std=global_std)
    valid = ~values.isnan()
    expected = torch.zeros(6)
    expected[valid] = group_advantages(values[valid], groups[valid], global_std=global_std)
    torch.testing.assert_close(got, expected)
    assert got[2] == got[5] == 0 and got[0] < 0 < got[1]


@given(seed=st.integers(0, 99), global_std=st.booleans())
def test_a_map_that_is_constant_gives_the_advantage_of_the_picture(seed, global_std):
    values = torch.randn(8, generator=torch.Generator().manual_seed(seed))
    groups = torch.arange(8) % 3
    got = location_advantages(values.view(8, 1, 1).expand(8, 4, 5), groups, global_std=global_std)
    expected = group_advantages(values, groups, global_std=global_std)
    torch.testing.assert_close(got, expected.view(8, 1, 1).expand(8, 4, 5), rtol=1e-6, atol=1e-6)


def test_advantages_of_places_by_hand():
    maps = torch.tensor([[[0.0, 1.0]], [[1.0, 1.0]], [[torch.nan, 1.0]]])
    got = location_advantages(maps, torch.zeros(3, dtype=torch.int64), eps=0.0)
    # At the first place -1/2 and 1/2, at the second 0; the deviation over both is sqrt((1/4 + 0)/2).
    torch.testing.assert_close(got, torch.tensor([[[-(2**0.5), 0.0]], [[2**0.5, 0.0]], [[0.0, 0.0]]]))
    with pytest.raises(ValueError, match=r"groups: got shape \(2,\) for reward_maps \(3, 1, 2\)"):
        location_advantages(maps, torch.zeros(2, dtype=torch.int64))


# --- jpeg ---------------------------------------------------------------------------------------------------------


def test_jpeg_size_in_kilobytes():
    images = torch.rand(2, 3, 48, 40)
    images[1] = 0.5
    expected = []
    for image in images:
        buffer = io.BytesIO()
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(buffer, "JPEG", quality=95)
        expected.append(len(buffer.getvalue()) / 1000)
    size = rewards.load("jpeg_incompressibility")(images, ["", ""], [{}, {}]).reward
    assert size.tolist() == pytest.approx(expected) and size[0] > 2 * size[1]
    small = rewards.load("jpeg_compressibility")(images, ["", ""], [{}, {}]).reward
    torch.testing.assert_close(small, -size / 500)


# --- ocr ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader():
    pytest.importorskip("rapidocr")
    return ocr.OCR(threads=1)


def test_text_is_read_scored_and_found(reader):
    images = pictures(written("Hello World"), written("Hello Wurld"), written(""), written("HELLO", place=(8, 110)))
    prompts = ['a sign that says "Hello World"'] * 3 + ['"hello", in neon']
    scores = reader(images, prompts, [{}] * 4)
    assert scores.reward.tolist() == pytest.approx([1.0, 0.9, 0.0, 1.0])
    assert scores.details["exact"].tolist() == [1, 0, 0, 1]
    assert scores.masks.shape == (4, 160, 160) and scores.masks[2].sum() == 0
    rows = [scores.masks[i].amax(1).nonzero().flatten() for i in (0, 3)]
    assert 50 < rows[0].min() < 75 < rows[0].max() < 100 and rows[1].min() > 100
    ink = images[0].amin(0) < 0.5
    assert scores.masks[0][ink].mean() > 0.95  # the box covers the letters


def test_other_text_is_no_part_of_the_map(reader):
    image = Image.fromarray(written("OPEN").copy())
    ImageDraw.Draw(image).text((8, 120), "xyzzy", fill=(10, 10, 10), font=ImageFont.load_default(26))
    scores = reader(pictures(np.asarray(image)), ['a shop with "open" on its door'], [{}])
    assert scores.reward.item() == 1  # anywhere in what was read
    assert scores.masks[0, :100].sum() > 0 == scores.masks[0, 110:].sum()


def test_each_line_earns_its_own_edit_distance_inside_its_box_and_missing_text_none(reader):
    image = Image.fromarray(written("OPEN", place=(8, 20)).copy())
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(26)
    draw.text((8, 70), "DAYLY", fill=(10, 10, 10), font=font)
    draw.text((8, 120), "xyzzy", fill=(10, 10, 10), font=font)
    images = pictures(np.asarray(image), written(""), written("OPEN"))
    prompts = ['a shop with "open daily" on its door'] * 2 + ['a door with "open" and "closed"']
    scores = reader(images, prompts, [{}] * 3)
    field, ink = scores.reward_map, images[:, 0] < 0.5
    first, second, third = (field[0][top : top + 40][ink[0][top : top + 40]] for top in (15, 65, 115))
    assert first.median() == 1  # a part of the text
    assert second.median() == pytest.approx(0.8) == pytest.approx(1 - edit_distance("dayly", "daily") / 5)
    assert third.median() <= 0.2  # of no text
    around = field[0, :10]
    assert (around == scores.reward[0]).all() and 0 < scores.reward[0] < 1
    assert (field[1] == 0).all() and scores.reward[1] == 0  # nothing was written: nowhere in particular
    assert scores.reward[2] == 1 and (field[2] == 1).all()
    assert scores.concepts == (("open daily",), ("open daily",), ("open", "closed"))
    assert scores.credits[2].tolist() == pytest.approx([1.0, ocr.edit_reward("open", "closed")])
    assert scores.credits[1].isnan().tolist() == [False, True]


def part_distance(short, long):
    """The smallest edit distance to any part of the longer one."""
    parts = {long[i:j] for i in range(len(long) + 1) for j in range(i, len(long) + 1)}
    return min(edit_distance(short, part) for part in parts)


@given(line=TEXTS, wanted=TEXTS.filter(lambda text: text.strip()))
def test_a_line_is_worth_its_distance_to_the_best_part(line, wanted):
    line, wanted = ocr.normalize(line), ocr.normalize(wanted)
    short, long = sorted((line, wanted), key=len)
    expected = 1 - part_distance(short, long) / len(short) if short else 0.0
    assert ocr.line_reward(line, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [
        ('a sign "Open Late" and "no"', "openlate"),
        ("a sign “Open Late”", "openlate"),
        ('an unclosed "Quote here', "quotehere"),
        ('a 24" monitor showing "HELLO"', "hello"),
        ('"24" on a door', "24"),
        ('first "" then "second"', "second"),
        ("ein Schild „Hallo Welt“ und mehr", "hallowelt"),
        ("un panneau « Bonjour »", "bonjour"),
        ("ett tecken ”Hej”", "hej"),
        ("看板に「営業中」", "営業中"),
        ("牌子上写着“你好”", "你好"),
    ],
)
def test_the_first_quoted_text_is_wanted(prompt, wanted):
    assert ocr.target(prompt) == wanted


@pytest.mark.parametrize("prompt", ["no quotes", 'empty ""', 'blank "  "', 'a 5" pipe', "l'heure d'été"])
def test_a_prompt_that_quotes_nothing_is_one_clear_line(prompt):
    with pytest.raises(ValueError, match="reward: 'ocr' found no text in double quotes in the prompt"):
        ocr.target(prompt)


def edit_distance(a, b):
    """Wagner and Fischer's table."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        left, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            left, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, left + (x != y))
    return row[-1]


@given(read=TEXTS, wanted=TEXTS.filter(lambda text: text.strip()))
def test_the_reward_is_the_clipped_normalized_edit_distance(read, wanted):
    pytest.importorskip("rapidfuzz")
    read, wanted = ocr.normalize(read), ocr.normalize(wanted)
    distance = 0 if wanted in read else edit_distance(read, wanted)
    assert ocr.edit_reward(read, wanted) == pytest.approx(1 - min(distance, len(wanted)) / len(wanted))


# --- the worker: beside the rollout, and failures ------------------------------------------------------------------


def mean_and_bad_prompts(images, prompts, metadata):
    if "raise" in prompts:
        raise RuntimeError("out of paint\nand more")
    values = images.mean((1, 2, 3))
    values[[i for i, prompt in enumerate(prompts) if prompt == "nan"]] = torch.nan
    return Scores(values, reward_map=images[:, 0])


def test_one_bad_prompt_costs_one_picture_and_is_named():
    images = torch.rand(4, 3, 2, 2)
    scores, lines = score(mean_and_bad_prompts, images, ["a", "raise", "nan", "b"], [{}] * 4)
    assert scores.reward.isnan().tolist() == [False, True, True, False]
    torch.testing.assert_close(scores.reward[[0, 3]], images[[0, 3]].mean((1, 2, 3)))
    assert scores.reward_map.isnan().all((1, 2)).tolist() == [False, True, True, False]
    assert lines == [
        "reward: RuntimeError (out of paint and more) for the prompt 'raise'",
        "reward: got nan for the prompt 'nan'; the image does not count, return a number if it should",
    ]


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (torch.ones(3), r"got shape \(3,\) of 'reward', expected \(2,\)"),
        (None, "got NoneType, expected Scores or 2 numbers"),
        (Scores(torch.ones(2), {"x": torch.ones(1)}), r"got shape \(1,\) of 'x', expected \(2,\)"),
        (Scores(torch.ones(2), masks=torch.ones(2, 4)), r"got shape \(2, 4\) of 'masks', expected \(2, H, W\)"),
    ],
)
def test_a_reward_that_returns_something_else_is_one_clear_line(result, words):
    with pytest.raises(RewardError, match=words):
        rewards.as_scores(result, 2)
    scores, lines = score(lambda *_: result, torch.ones(2, 3, 2, 2), ["a", "b"], [{}, {}])
    assert scores.reward.isnan().all() and len(lines) == 2


@pytest.mark.parametrize(
    "wrong", [[None, 1.0], [math.nan, 1.0], torch.tensor([math.inf, 1.0]), Scores(torch.tensor([math.nan, 1.0]))]
)
def test_an_image_without_a_number_is_named_with_its_reward(wrong):
    """Of several rewards the one that gave none, and what to do."""
    both = rewards.Weighted({"good": lambda *_: [0.0, 1.0], "picky": lambda *_: wrong}, {"good": 1.0, "picky": 0.5})
    scores, (line,) = score(both, torch.ones(2, 3, 2, 2), ["a", "b"], [{}, {}])
    assert scores.reward[0].isnan() and scores.reward[1] == 1.5
    assert re.match(r"reward: got (nan|inf) from 'picky' for the prompt 'a' \(image 1 of 2\); .* return a number", line)
    nothing = rewards.Weighted({"good": lambda *_: [0.0, 1.0], "none": lambda *_: None}, {"good": 1.0, "none": 0.5})
    _, lines = score(nothing, torch.ones(2, 3, 2, 2), ["a", "b"], [{}, {}])
    assert lines[0].startswith("reward: 'none': got NoneType, expected Scores or 2 numbers")


def test_scores_come_in_order_from_one_other_thread_while_work_goes_on():
    threads, running = set(), threading.Event()

    def slow(images, prompts, metadata):
        running.set()
        threads.add(threading.get_ident())
        time.sleep(0.05)
        assert not torch.is_grad_enabled()
        return images.mean((1, 2, 3)) + metadata[0]["offset"]

    images = torch.rand(6, 3, 4, 4)
    with RewardWorker(slow, timeout=120) as worker:
        tickets = [worker.submit(images[i : i + 2], ["p"] * 2, [{"offset": i}] * 2) for i in (0, 2, 4)]
        assert running.wait(60)  # before anyone asked for a result
        scores = rewards.concatenate([ticket.result() for ticket in tickets])
        assert worker.count_failures() == 0
    torch.testing.assert_close(scores.reward, images.mean((1, 2, 3)) + torch.tensor([0.0, 0, 2, 2, 4, 4]))
    assert len(threads) == 1 and threading.get_ident() not in threads


def test_a_batch_that_hangs_is_given_up_and_the_next_ones_are_scored(caplog):
    release = threading.Event()

    def hanging(images, prompts, metadata):
        if prompts[0] == "hang":
            release.wait(120)
        return images.mean((1, 2, 3))

    images = torch.rand(2, 3, 4, 4)
    with RewardWorker(hanging, timeout=1.0) as worker:
        tickets = [worker.submit(images, [name, "q"]) for name in ("hang", "go", "hang", "go")]
        # Asked for out of order: a batch that waits behind a hanging one is not held up for ever.
        assert tickets[3].result().reward.isfinite().all()
        first = tickets[0].result()
        assert first.reward.isnan().all() and tickets[1].result().reward.isfinite().all()
        assert worker.count_failures() == 2
        assert tickets[2].result().reward.isnan().all()
        assert worker.count_failures() == 2 and worker.count_failures() == 0
        assert "took longer than 1 s for the batch of the prompt 'hang'" in caplog.text
        last = worker.submit(images, ["hang", "q"])
        with pytest.raises(RewardError, match=r"took longer than 1 s .*, like 2 batches before it"):
            last.result()
    release.set()


def test_a_reward_that_never_worked_ends_the_run_and_strict_ends_it_at_once():
    images = torch.rand(2, 3, 2, 2)
    with RewardWorker(mean_and_bad_prompts) as worker:
        assert worker.submit(images, ["raise", "raise"]).result().reward.isnan().all()
        with pytest.raises(
            RewardError, match=r"out of paint and more\) for the prompt 'raise'; it failed for every image"
        ):
            worker.count_failures()
        worker.submit(images, ["a", "b"]).result()
        worker.count_failures()
        worker.submit(images, ["raise", "raise"]).result()
        assert worker.count_failures() == 2  # it has worked before: the run goes on
    with RewardWorker(mean_and_bad_prompts, strict=True) as worker:
        ticket = worker.submit(images, ["a", "nan"])
        with pytest.raises(RewardError, match="reward: got nan for the prompt 'nan'"):
            ticket.result()
    with pytest.raises(ValueError, match="prompts: got 1 prompts and 1 metadata for 2 images"):
        RewardWorker(mean_and_bad_prompts).submit(images, ["a"])
    with pytest.raises(RewardError, match="its worker is closed"):
        worker.submit(images, ["a", "b"])


def test_what_a_reward_does_to_its_arguments_is_not_seen_by_the_next():
    seen = []

    def careless(images, prompts, metadata):
        seen.append((images.mean().item(), list(prompts), metadata[0]["of"]["count"]))
        images.mul_(0)
        prompts.clear()
        metadata[0]["of"]["count"] = 9
        return torch.ones(len(images))

    images, metadata = torch.full((2, 3, 4, 4), 0.5), [{"of": {"count": 1}}, {}]
    both = rewards.Weighted({"a": careless, "b": careless}, {"a": 1.0, "b": 1.0})
    both(images, ["x", "y"], metadata)
    with RewardWorker(careless) as worker:
        worker.submit(images, ["x", "y"], metadata).result()
    assert seen == [(0.5, ["x", "y"], 1)] * 3
    assert images.mean() == 0.5 and metadata == [{"of": {"count": 1}}, {}]


@pytest.mark.parametrize("name", ["reward", "std", "failed"])
def test_a_detail_does_not_take_a_name_of_the_log(name):
    with pytest.raises(RewardError, match=rf"a detail '{name}', which the log has already; give it another name"):
        as_scores(Scores(torch.zeros(1), {name: torch.ones(1)}), 1)


def test_scores_may_hold_lists_and_arrays():
    found = as_scores(Scores([0.1, 0.2], {"x": [1, 2]}, masks=np.zeros((2, 4, 4))), 2, (4, 4))
    assert torch.equal(found.reward, torch.tensor([0.1, 0.2])) and found.details["x"].tolist() == [1.0, 2.0]
    assert found.masks.shape == (2, 4, 4)


def test_a_reward_that_scored_in_another_process_does_not_end_this_one():
    """All of them end, or none: those that wait for a lost one would wait for long."""

    def broken(images, prompts, metadata):
        raise ValueError("of this prompt")

    with RewardWorker(broken) as worker:
        worker.submit(torch.zeros(2, 3, 4, 4), ["x", "y"], [{}, {}]).result()
        with pytest.raises(RewardError, match="it failed for every image"):
            worker.count_failures()
        assert worker.count_failures(scored_elsewhere=True) == 2
