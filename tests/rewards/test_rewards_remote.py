"""A reward over HTTP, on this machine: what is sent and answered, and every way in which a server can fail."""

import base64
import json
import subprocess
import sys

import pytest
import torch
from servers import ASK, GOOD, local, post, quick, rich, scripted

from star import rewards
from star.rewards import RewardError
from star.rewards.remote import Remote, pack_request
from star.rewards.worker import RewardWorker


def test_scores_details_and_maps_are_those_of_the_reward_itself():
    images = (torch.rand(5, 3, 6, 7) * 255).round() / 255  # as a PNG holds them
    prompts = ["a", "ünï", 'q"uote', "", "e"]
    metadata = [{"offset": i, "include": [{"class": "dog"}]} for i in range(5)]
    expected = rich(images, prompts, metadata)
    with local(rich) as url:
        scores = Remote(url, batch=2)(images, prompts, metadata)
    torch.testing.assert_close(scores.reward, expected.reward, rtol=1e-6, atol=1e-6)
    assert torch.equal(scores.details["length"], expected.details["length"])
    assert scores.details["retries"].tolist() == [0] * 5
    assert torch.equal(scores.masks, expected.masks) and torch.equal(scores.reward_map, expected.reward_map)


def test_a_reward_is_remote_by_its_address_and_keeps_its_name():
    with local(rich) as url:
        reward = rewards.load("deqa:0.5,jpeg_compressibility", {"deqa": url})
        scores = reward(torch.rand(2, 3, 8, 8), ["a", "b"], [{}, {}])
    assert scores.terms.keys() == {"deqa", "jpeg_compressibility"}
    assert {"deqa_length", "deqa_retries"} <= scores.details.keys()


def test_one_failing_image_costs_one_image_and_is_told(caplog):
    with local(rich) as url:
        scores = Remote(url)(torch.rand(3, 3, 4, 4), ["a", "raise", "nan"], [{}] * 3)
    assert scores.reward.isnan().tolist() == [False, True, True]
    assert "RuntimeError (no) for the prompt 'raise'" in caplog.text


def test_a_server_that_recovers_is_asked_again_and_the_retries_are_counted(caplog):
    with scripted((429, b'{"error": "warming up"}', 0), (503, b"<html>", 0), (200, GOOD, 0)) as (server, url):
        scores = quick(url)(*ASK)
    assert server.asked == 3 and scores.details["retries"].tolist() == [2, 2]
    assert scores.reward[0] == 0.25 and scores.reward[1].isnan()
    assert "failed (429: warming up); attempt 2 follows" in caplog.text and "attempt 3 follows" in caplog.text


def test_retries_are_bounded_and_a_refusal_is_final():
    with scripted((503, b'{"error": "out\\nof memory"}', 0)) as (server, url):
        with pytest.raises(RewardError, match=r"reward: 'far' at http://.* failed 3 times \(503: out of memory\)"):
            quick(url)(*ASK)
        assert server.asked == 3
    for status in (400, 401, 404, 413, 500):
        with scripted((status, b'{"error": "no such thing"}', 0)) as (server, url):
            with pytest.raises(RewardError, match=rf"failed \({status}: no such thing"):
                quick(url)(*ASK)
            assert server.asked == 1


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"<html>welcome</html>", "answered with something else"),
        (b"\xff\xfe", "answered with something else"),
        (b"[1, 2]", "it has no list 'reward'"),
        (b'{"reward": [1.0]}', "'reward' is no list of 2 numbers"),
        (b'{"reward": [1.0, "2"]}', "'reward' is no list of 2 numbers"),
        (b'{"reward": [true, 1]}', "'reward' is no list of 2 numbers"),
        (b'{"reward": [1, 2], "details": {"x": [1]}}', "'x' is no list of 2 numbers"),
        (b'{"reward": [1, 2], "arrays": "%%%"}', "answered with something else"),
        (b'{"reward": [1, 2], "arrays": "AAAA"}', "answered with something else"),
        (b"x" * 3000, "more than 2000 bytes"),
    ],
)
def test_an_answer_that_is_none_is_one_clear_line(body, words):
    with scripted((200, body, 0)) as (server, url):
        with pytest.raises(RewardError, match=words) as caught:
            quick(url, limit=2000)(*ASK)
        assert server.asked == 1 and "\n" not in str(caught.value)


@pytest.mark.parametrize("script", [(200, b" " * 50 + GOOD, "trickle"), (200, b"", 2.0)])
def test_a_slow_server_times_out(script):
    with scripted(script) as (_, url), pytest.raises(RewardError, match=r"failed 2 times \(timed out\)"):
        quick(url, timeout=0.3, attempts=2)(*ASK)


def test_a_dead_server_costs_the_batch_and_is_not_asked_image_by_image(caplog):
    with scripted((200, GOOD, 0)) as (_, url):
        pass
    with RewardWorker(quick(url)) as worker:
        assert worker.submit(*ASK).result().reward.isnan().all()
        with pytest.raises(RewardError, match=r"reward: 'far' at .* failed 3 times \(.*refused.*\).*for every image"):
            worker.count_failures()
    assert caplog.text.count("attempt 2 follows") == caplog.text.count("attempt 3 follows") == 1


def changed(**fields):
    return json.dumps({**json.loads(pack_request(*ASK)), **fields}).encode()


def png_header(width):
    """A PNG that says it is very large."""
    return base64.b64encode(
        b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + width.to_bytes(4, "big") * 2 + b"\x08\x02\x00\x00\x00\x00\x00\x00\x00"
    ).decode()


def test_the_server_refuses_what_it_does_not_understand_and_goes_on():
    with local(rich, limits=100_000) as url:
        for body, status, words in [
            (b"not json", 400, "expected JSON"),
            (b"[" * 50_000, 400, "nested too deeply"),
            (b"{}", 400, "expected JSON with 'images'"),
            (changed(prompts=["a"]), 400, "expected as many 'images' as 'prompts'"),
            (changed(prompts=["a", 3]), 400, "expected texts"),
            (changed(images=["", "AAAA"]), 400, "expected base64 of PNG"),
            (changed(images=[png_header(70_000)] * 2), 400, "PNG|pixels"),
            (b"x" * 100_001, 413, "expected at most 100000 bytes"),
        ]:
            got = post(url, body)
            assert got[0] == status and any(w in got[1]["error"] for w in words.split("|")), got
        assert post(url, pack_request(*ASK), "/other")[0] == 404
        assert post(url, iter([b"x"]), headers={"Transfer-Encoding": "chunked"})[0] == 411
        status, answer = post(url, pack_request(ASK[0], ["raise", "raise"], ASK[2]))
        assert status == 200 and answer["reward"] == [None, None] and len(answer["errors"]) == 2
        assert post(url, pack_request(*ASK))[0] == 200


def test_the_server_as_a_command():
    command = [sys.executable, "-m", "star.rewards.serve"]
    process = subprocess.Popen([*command, "jpeg_compressibility", "--port", "0"], stdout=subprocess.PIPE, text=True)
    try:
        name, _, url = process.stdout.readline().split()
        images = torch.rand(2, 3, 16, 16)
        got = Remote(url, name)(images, ["a", "b"], [{}, {}])
        here = rewards.load(name)(images, ["a", "b"], [{}, {}])
        assert torch.equal(got.reward, here.reward)
    finally:
        process.terminate()
        process.wait(60)
    wrong = subprocess.run([*command, "beauty"], capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.strip().startswith("star: reward: unknown 'beauty'")
