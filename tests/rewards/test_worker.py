"""The reward's thread survives whatever a reward does; images that are none are refused before a reward sees them."""

import asyncio
import ctypes
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from star import rewards
from star.messages import one_line
from star.rewards import RewardError, Scores
from star.rewards.worker import RewardWorker, score

PROMPTS = ["a", "bad", "b"]


def well(images, prompts, metadata):
    return images.mean((1, 2, 3)).tolist()


def raising(error):
    def reward(images, prompts, metadata):
        if "bad" in prompts:
            raise error
        return Scores(images.mean((1, 2, 3)), {"size": torch.ones(len(prompts))}, images[:, 0], images[:, 1])

    return reward


class Odd(BaseException):
    pass


ERRORS = [
    RuntimeError("no"), KeyboardInterrupt(), SystemExit(3), GeneratorExit(), Odd("odd"), asyncio.CancelledError(),
    MemoryError(), StopIteration(), RecursionError("deep"), OSError(28, "No space left on device"), BaseException(),
    ExceptionGroup("many", [ValueError("one")]), UnicodeDecodeError("utf-8", b"\xff", 0, 1, "odd"),
]  # fmt: skip


@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_whatever_is_raised_costs_the_image_its_reward(error):
    images = torch.rand(3, 3, 4, 5)
    with RewardWorker(raising(error), timeout=60) as worker:
        for _ in range(2):  # the thread lives on
            scores = worker.submit(images, PROMPTS).result()
            assert scores.reward.isnan().tolist() == [False, True, False]
            assert scores.masks.shape == scores.reward_map.shape == (3, 4, 5)
        assert worker.count_failures() == 2


def returning(result):
    return lambda images, prompts, metadata: result if "bad" in prompts else well(images, prompts, metadata)


def maps(height, width, **values):
    return Scores(torch.ones(3), **{name: torch.full((3, height, width), v) for name, v in values.items()})


RESULTS = {  # what a reward returns, and for which of three images it has then failed
    "none for one": ([0.5, None, 0.25], [1]),
    "none for all": ([None] * 3, [0, 1, 2]),
    "none": (None, [0, 1, 2]),
    "nan": ([0.5, float("nan"), 0.25], [1]),
    "infinite": (np.array([0.5, np.inf, -np.inf]), [1, 2]),
    "array with none": (np.array([None, 0.5, 1], dtype=object), [0]),
    "tensors with none": ([torch.tensor(0.5), None, torch.tensor(1.0)], [1]),
    "integers": (torch.tensor([1, 2, 3]), []),
    "tuple": ((1, 2, 3), []),
    "generator": ((value for value in (1, None, 3)), [1]),
    "a number": (0.5, [0, 1, 2]),
    "too few": ([0.5, 0.5], [0, 1, 2]),
    "two columns": (torch.ones(3, 2), [0, 1, 2]),
    "scalar": (torch.tensor(1.0), [0, 1, 2]),
    "text": ("abc", [0, 1, 2]),
    "texts": (["1", "x", "2"], [0, 1, 2]),
    "dictionary": ({"a": 1, "bad": 2, "b": 3}, [0, 1, 2]),
    "complex": (torch.ones(3, dtype=torch.complex64), [0, 1, 2]),
    "huge integer": ([1, 10**400, 2], [0, 1, 2]),
    "scores of a list": (Scores([1.0, 2.0, 3.0]), []),
    "details of a list": (Scores(torch.ones(3), {"x": [1, 2, 3]}), []),
    "details none": (Scores(torch.ones(3), None), [0, 1, 2]),
    "masks of another size": (maps(2, 2, masks=1.0), [0, 1, 2]),
    "masks without pixels": (maps(0, 0, masks=1.0), [0, 1, 2]),
    "map of another size": (maps(5, 4, reward_map=1.0), [0, 1, 2]),
    "masks that are none": (Scores(torch.ones(3), masks="x"), [0, 1, 2]),
    "masks of NaN": (maps(4, 5, masks=float("nan")), [0, 1, 2]),
    "masks of 255": (maps(4, 5, masks=255.0), [0, 1, 2]),
    "masks and map": (maps(4, 5, masks=1.0, reward_map=-2.0), []),
}


@pytest.mark.parametrize("name", RESULTS)
def test_whatever_is_returned_is_scores_or_fails(name):
    result, failed = RESULTS[name]
    images = torch.rand(3, 3, 4, 5)
    with RewardWorker(returning(result), timeout=60) as worker:
        first = worker.submit(images, ["a", "c", "b"]).result()
        scores = worker.submit(images, PROMPTS).result()
        assert scores.reward.isnan().nonzero().flatten().tolist() == failed
        assert worker.count_failures() == len(failed)
        joined = rewards.concatenate([first, scores, worker.submit(images, ["a", "c", "b"]).result()])
        assert joined.reward.isnan().sum() == len(failed)


def test_a_reward_may_do_with_its_arguments_what_it_wants(capfd):
    prompts, metadata = ["a", "b"], [{"tag": "x"}, {}]

    def greedy(images, prompts, metadata):
        print("scoring", len(prompts))
        metadata[0].clear()
        prompts.clear()
        metadata.clear()
        return [None, 1.0]

    scores, lines = score(greedy, torch.rand(2, 3, 4, 4), prompts, metadata)
    assert scores.reward.isnan().tolist() == [True, False] and len(lines) == 1
    assert lines[0].startswith("reward: got nan for the prompt 'a' (image 1 of 2); the image does not count")
    assert prompts == ["a", "b"] and metadata == [{"tag": "x"}, {}]
    assert capfd.readouterr().out == "scoring 2\n"


def test_a_reward_that_ends_its_thread_costs_its_batch():
    """An exception that reaches the thread from outside, outside of the reward's call."""
    images, ended = torch.rand(2, 3, 4, 4), threading.Event()
    with RewardWorker(well, timeout=60) as worker:
        assert worker.submit(images, ["a", "b"]).result().reward.isfinite().all()
        hook, threading.excepthook = threading.excepthook, lambda _: ended.set()
        try:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.thread.ident), ctypes.py_object(Odd))
            tickets = [worker.submit(images, ["a", "b"]) for _ in range(3)]
            found = [ticket.result().reward.isfinite().all().item() for ticket in tickets]
        finally:
            threading.excepthook = hook
        assert found.count(True) >= 2 and ended.wait(60)


def test_a_thread_that_ended_within_a_batch_is_replaced(monkeypatch):
    images = torch.rand(2, 3, 4, 4)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with RewardWorker(well) as worker:  # no timeout
        monkeypatch.setattr(rewards.worker, "_failed_prompt", lambda *_: sys.exit())
        monkeypatch.setattr(RewardWorker, "_score", lambda *_: sys.exit())
        assert worker.submit(images, ["a", "b"]).result().reward.isnan().all()
        monkeypatch.undo()
        assert worker.submit(images, ["a", "b"]).result().reward.isfinite().all()


IMAGES = {
    "bytes": (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), "got torch.uint8"),
    "an array": (np.zeros((2, 3, 4, 4), np.float32), "got ndarray"),
    "gray": (torch.rand(2, 1, 4, 4), r"got shape \(2, 1, 4, 4\), expected \(2, 3, H, W\)"),
    "alpha": (torch.rand(2, 4, 4, 4), r"got shape \(2, 4, 4, 4\)"),
    "one image": (torch.rand(3, 4, 4), r"got shape \(3, 4, 4\)"),
    "too few": (torch.rand(1, 3, 4, 4), r"got shape \(1, 3, 4, 4\)"),
    "without pixels": (torch.rand(2, 3, 0, 4), r"got shape \(2, 3, 0, 4\)"),
    "0..255": (torch.rand(2, 3, 4, 4) * 255, "got values from .* expected 0..1"),
    "-1..1": (torch.rand(2, 3, 4, 4) * 2 - 1.5, "got values from -"),
    "NaN": (torch.full((2, 3, 4, 4), torch.nan), "got values from nan to nan"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_that_are_none_are_refused(name):
    images, words = IMAGES[name]
    for reward in ("jpeg_compressibility", "jpeg_compressibility:0.5,test_worker:well"):
        with pytest.raises(ValueError, match=f"images: {words}"):
            rewards.load(reward)(images, ["a", "b"])


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64])
def test_images_of_every_floating_point_type_are_scored_in_float32(kind):
    images = (torch.rand(2, 3, 8, 8) * 255).round() / 255
    reward = rewards.load("jpeg_incompressibility")
    assert torch.equal(reward(images.to(kind), ["a", "b"]).reward, reward(images, ["a", "b"]).reward)


def test_one_image_that_is_none_costs_itself():
    images = torch.rand(3, 3, 8, 8)
    images[1, 0, 2, 2] = torch.nan
    scores, lines = score(rewards.load("jpeg_compressibility"), images, PROMPTS, [{}] * 3)
    assert scores.reward.isnan().tolist() == [False, True, False]
    assert lines == ["reward: ValueError (images: got values from nan to nan, expected 0..1) for the prompt 'bad'"]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("two\nlines\r\n\tof text", "two lines of text"),
        ("\x1b[31mred\x1b[0m\x07", "[31mred [0m"),
        (ValueError(), "ValueError"),
        (ValueError("\n\n why"), "why"),
        (KeyError("name"), "'name'"),
        ("x" * 400, "x" * 297 + "..."),
        ("", ""),
    ],
)
def test_a_message_is_one_line(text, line):
    assert one_line(text) == line


def test_failures_are_told_on_one_line_whatever_they_say():
    error = RuntimeError("out\n\x1b[2Jof" + "x" * 10_000)
    _, lines = score(raising(error), torch.rand(1, 3, 4, 5), ["bad"], [{}])
    _, others = score(returning(None), torch.rand(1, 3, 4, 5), ["bad\n" * 1000], [{}])
    for line in (*lines, *others):
        assert line.isprintable() and len(line) < 600


def test_of_several_rewards_the_one_that_raised_is_named():
    both = rewards.Weighted({"well": well, "mod:other": raising(KeyError("k"))}, {"well": 1.0, "mod:other": 2.0})
    scores, lines = score(both, torch.rand(3, 3, 4, 4), PROMPTS, [{}] * 3)
    assert lines == ["reward: KeyError in the reward 'mod:other' ('k') for the prompt 'bad'"]
    assert scores.reward.isnan().tolist() == [False, True, False]
    alone = rewards.Weighted({"other": raising(KeyError("k"))}, {"other": 1.0})
    assert score(alone, torch.rand(3, 3, 4, 4), PROMPTS, [{}] * 3)[1] == ["reward: KeyError ('k') for the prompt 'bad'"]


def test_a_reward_error_keeps_its_line():
    def away(images, prompts, metadata):
        raise RewardError("reward: 'far' is\naway")

    _, lines = score(away, torch.rand(2, 3, 4, 4), ["a", "b"], [{}, {}])
    assert lines == ["reward: 'far' is away; prompts from 'a' on"] * 2


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        ("star.rewards.worker", ["PIL", "safetensors", "httpx2", "uvicorn", "starlette", "tyro", "transformers"]),
        ("star.rewards.serve", ["transformers", "diffusers", "accelerate", "rapidocr"]),
    ],
)
def test_what_is_imported_needs_little(module, missing):
    """Rewards need torch and numpy, the server what the extra `rewards` installs."""
    code = f"import sys; sys.modules.update(dict.fromkeys({missing}))\nimport {module}"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stderr == ""
