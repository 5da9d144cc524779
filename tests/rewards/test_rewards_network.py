"""The reward server and its client against whatever the other side does: deadlines, limits, addresses, tokens, ends."""

import asyncio
import base64
import http.client
import io
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from contextlib import contextmanager, nullcontext, suppress

import numpy as np
import pytest
import torch
from PIL import Image
from servers import ASK, GOOD, local, post, quick, rich, running, scripted

from star import rewards
from star.rewards import RewardError, remote, serve
from star.rewards.remote import Remote, pack_request
from star.rewards.serve import Limits


@contextmanager
def raw_server(behave):
    """A server of sockets: behave(connection) for each, in a thread of its own. Yields its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept():
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=run, args=(connection,), daemon=True).start()

        def run(connection):
            with connection, suppress(OSError):
                behave(connection)

        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def read_request(connection):
    received = b""
    while b"\r\n\r\n" not in received:
        received += connection.recv(1 << 16)
    head, _, body = received.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += connection.recv(1 << 16)
    return head


def repeated(start, part, pause=0.02):
    """A server that reads a request, begins an answer and never ends it."""

    def behave(connection):
        read_request(connection)
        connection.sendall(start)
        while True:
            connection.sendall(part)
            time.sleep(pause)

    return behave


NEVER_DONE = {
    "header": repeated(b"HTTP/1.1 200 OK\r\nX-Long: ", b"a"),
    "continue": repeated(b"", b"HTTP/1.1 100 Continue\r\n\r\n", 0.0),
    "error's body": repeated(b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n", b" "),
    "body": repeated(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b" "),
    "chunks": repeated(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
    "nothing": lambda connection: time.sleep(20),
    "request unread": lambda connection: time.sleep(20),
}


@pytest.mark.parametrize("name", NEVER_DONE)
def test_a_deadline_holds_whatever_the_server_does(name):
    images = torch.rand(2, 3, 600, 600) if name == "request unread" else ASK[0]
    before, threads = time.monotonic(), threading.active_count()
    with raw_server(NEVER_DONE[name]) as url, pytest.raises(RewardError, match=r"failed 2 times \(timed out\)"):
        Remote(url, "far", timeout=0.4, attempts=2, backoff=0.01)(images, *ASK[1:])
    assert time.monotonic() - before < 10
    assert not [thread for thread in threading.enumerate() if thread.name == "star-reward-request"], threads


def test_an_answer_without_an_end_is_stopped_at_its_limit():
    endless = repeated(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536, 0.0)
    with raw_server(endless) as url, pytest.raises(RewardError, match="more than 1000000 bytes"):
        quick(url, limit=1_000_000)(*ASK)


@pytest.mark.parametrize("ending", ["cut", "reset", "closed", "junk"])
def test_an_answer_that_breaks_off_is_asked_for_again(ending):
    asked = []

    def behave(connection):
        asked.append(read_request(connection))
        whole = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(GOOD) + GOOD
        if len(asked) > 1:
            connection.sendall(whole)
        elif ending == "cut":
            connection.sendall(whole[:-5])
        elif ending == "junk":
            connection.sendall(b"\x00\x01\x02 what\r\n\r\n")
        elif ending == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with raw_server(behave) as url:
        scores = quick(url)(*ASK)
    assert len(asked) == 2 and scores.details["retries"].tolist() == [1, 1] and scores.reward[0] == 0.25


def test_redirects_are_not_followed():
    with scripted((200, GOOD, 0)) as (elsewhere, target):

        def behave(connection):
            read_request(connection)
            connection.sendall(f"HTTP/1.1 302 Found\r\nLocation: {target}/score\r\nContent-Length: 0\r\n\r\n".encode())

        with (
            raw_server(behave) as url,
            pytest.raises(RewardError, match=r"failed \(302: Found; redirects are not followed"),
        ):
            quick(url)(*ASK)
    assert elsewhere.asked == 0


def test_loopback_is_asked_directly_and_a_proxy_that_is_used_is_named(monkeypatch):
    for name in ("no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("http_proxy", "http://user:secret@127.0.0.1:9")
    with scripted((200, GOOD, 0)) as (_server, url):
        assert quick(url)(*ASK).reward[0] == 0.25
        assert quick(url.replace("127.0.0.1", "localhost"))(*ASK).reward[0] == 0.25
    with pytest.raises(RewardError, match=r"through the proxy http://127.0.0.1:9 of the environment") as caught:
        quick("http://reward.invalid", attempts=1)(*ASK)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("no_proxy", "reward.invalid")
    with pytest.raises(RewardError) as caught:
        quick("http://reward.invalid", attempts=1)(*ASK)
    assert "proxy" not in str(caught.value)
    assert all(map(remote.is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "LOCALHOST", "a.localhost.")))
    assert not any(map(remote.is_loopback, ("10.0.0.1", "localhost.com", "::2", "example.com")))


def test_what_a_server_says_is_told_on_few_lines_without_control_characters(caplog):
    errors = ["\x1b[31mred\nWARNING: forged"] * 1000
    with scripted((200, json.dumps({"reward": [0.5, None], "errors": errors}).encode(), 0)) as (_, url):
        quick(url)(*ASK)
    assert len(caplog.records) == 6 and all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize(
    "fields",
    [
        {"details": {"a\nb": [1, 2]}},
        {"details": {"x" * 101: [1, 2]}},
        {"details": {"": [1, 2]}},
        {"errors": "abc"},
        {"reward": [10**400, 1]},
        {"reward": [1, 2], "extra": [[]] * 300_000},
    ],
)
def test_odd_answers_are_one_clear_line(fields):
    body = json.dumps({"reward": [1, 2], **fields}).encode()
    with (
        scripted((200, body, 0)) as (_, url),
        pytest.raises(RewardError, match="answered with something else") as caught,
    ):
        quick(url)(*ASK)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 600


def test_maps_of_another_size_are_no_answer():
    with local(lambda images, prompts, metadata: rewards.Scores(images.mean((1, 2, 3)), masks=images[:, 0])) as url:
        assert Remote(url)(torch.rand(2, 3, 4, 6), *ASK[1:]).masks.shape == (2, 4, 6)
    body = remote.pack_answer(rewards.Scores(torch.ones(2), masks=torch.ones(2, 3, 3)), [])
    with scripted((200, body, 0)) as (_, url), pytest.raises(RewardError, match=r"expected \(2, 2, 2\)"):
        quick(url)(*ASK)


def test_a_reward_that_fails_for_a_whole_batch_says_why():
    images = torch.rand(3, 3, 4, 4)
    with local(rich) as url:
        with pytest.raises(RewardError, match=r"failed for every image of a batch \(reward: RuntimeError \(no\)"):
            Remote(url)(images, ["raise"] * 3, [{}] * 3)
        assert Remote(url, batch=1)(images, ["a", "raise", "b"], [{}] * 3).reward.isnan().tolist() == [
            False,
            True,
            False,
        ]


def test_a_reward_is_asked_where_a_loop_is_running():
    async def notebook(url):
        return Remote(url)(*ASK).reward

    with local(rich) as url:
        assert asyncio.run(notebook(url)).isfinite().all()


@pytest.mark.parametrize(
    "url",
    ["http://", "http://host:99999", "http://host:0", "http://ho st", "http://host/?a=b", "http://host/#x",
      "ftp://host", "http://[::1", "http://host\n"],
)  # fmt: skip
def test_an_address_that_is_none_is_one_clear_line(url):
    with pytest.raises(ValueError, match=r"reward_models: got .*, expected an address such as http://") as caught:
        Remote(url)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "batch: got 0"), ({"timeout": 0}, "timeout: got 0, expected above 0"),
        ({"attempts": 0}, "attempts"),
        ({"timeout": float("nan")}, "timeout: got nan"), ({"backoff": -1}, "backoff"), ({"limit": 0}, "limit"),
        ({"token": "a\nb"}, "token: expected printable"), ({"token": "ü"}, "token"),
    ],
)  # fmt: skip
def test_numbers_of_the_client_have_ranges(options, words):
    with pytest.raises(ValueError, match=words):
        Remote("http://127.0.0.1:1", **options)


# --- the server -------------------------------------------------------------------------------------------------------


def connect(url):
    host, _, port = url.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=30)


def send(connection, body):
    connection.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


def answer_of(connection):
    response = http.client.HTTPResponse(connection)
    response.begin()
    return response.status, json.loads(response.read())


def test_two_hundred_clients_at_once_are_answered():
    body, statuses = pack_request(*ASK), []
    with local(rich) as url:
        threads = [threading.Thread(target=lambda: statuses.append(post(url, body)[0])) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert statuses == [200] * 200


def test_a_request_that_is_too_large_is_told_so_whenever_the_client_listens():
    large = b" " * (20 << 20)
    head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(large)
    with local(rich, limits=1 << 20) as url:
        with connect(url) as connection:
            connection.sendall(head + large)  # all of it before it listens
            assert answer_of(connection) == (413, {"error": f"expected at most {1 << 20} bytes, got {len(large)}"})
        with connect(url) as connection:
            connection.sendall(b"NO HTTP\r\n\r\n" + large)
            assert answer_of(connection)[0] == 400
        with pytest.raises(RewardError, match=r"failed \(413: expected at most 1048576 bytes, got \d+\)"):
            quick(url)(torch.rand(4, 3, 512, 512), ["a"] * 4, [{}] * 4)


def png(array, mode=None, **options):
    buffer = io.BytesIO()
    Image.fromarray(array, mode).save(buffer, "PNG", **options)
    return base64.b64encode(buffer.getvalue()).decode()


def test_gray_palette_opaque_and_16_bit_images_are_what_they_show():
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    deep = gray.astype(np.uint16) * 257 + 3
    color = np.stack([gray, gray.T, 255 - gray], -1)
    opaque = np.concatenate([color, np.full((8, 8, 1), 255, np.uint8)], -1)
    palette = Image.fromarray(gray).convert("P")
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    cases = [
        (png(gray), np.stack([gray] * 3, -1) / 255),
        (png(deep), np.stack([deep] * 3, -1) / 65535),
        (png(color), color / 255),
        (png(opaque), color / 255),
        (png(np.stack([gray, np.full_like(gray, 255)], -1)), np.stack([gray] * 3, -1) / 255),
        (base64.b64encode(buffer.getvalue()).decode(), np.stack([gray] * 3, -1) / 255),
        (png(gray > 100), np.stack([(gray > 100) * 1.0] * 3, -1)),
    ]
    for data, expected in cases:
        body = json.dumps({"images": [data], "prompts": ["a"]}).encode()
        images, _, metadata = serve.unpack_request(body, Limits())
        assert images.shape == (1, 3, 8, 8) and images.dtype == torch.float32 and metadata == [{}]
        np.testing.assert_allclose(images[0].permute(1, 2, 0).numpy(), expected, atol=1e-6)


def test_transparent_images_are_refused():
    array = np.zeros((8, 8, 4), np.uint8)
    array[2:, :, 3] = 255
    clear = {"transparency": (0, 0, 0)}, {"transparency": 7}
    colors, deep = np.zeros((8, 8, 3), np.uint8), np.full((8, 8), 7, np.uint16)
    for data in (png(array), png(array[..., 2:]), png(colors, **clear[0]), png(deep, **clear[1])):
        with pytest.raises(serve.Refused, match="expected opaque 'images'"):
            serve.unpack_request(json.dumps({"images": [data], "prompts": ["a"]}).encode(), Limits())


def test_images_that_are_to_be_turned_are_refused():
    turned, upright = Image.Exif(), Image.Exif()
    turned[274], upright[274] = 6, 1
    for exif, refused in ((turned, True), (upright, False)):
        body = json.dumps({"images": [png(np.zeros((8, 8, 3), np.uint8), exif=exif)], "prompts": ["a"]}).encode()
        with pytest.raises(serve.Refused, match="upright") if refused else nullcontext():
            serve.unpack_request(body, Limits())


def test_limits_on_images_and_pixels():
    small, large = png(np.zeros((8, 8), np.uint8)), png(np.zeros((5000, 2), np.uint8))
    for images, limits, words in [
        ([small] * 4, Limits(images=3), "expected at most 3 images, got 4"),
        ([small] * 4, Limits(pixels=255), "expected at most 255 pixels, got 4 images of 8 x 8"),
        ([large], Limits(), "at most 4096 pixels on a side, got 2 x 5000"),
        ([small, large], Limits(), "at most 4096 pixels on a side"),
    ]:
        with pytest.raises(serve.Refused, match=words) as caught:
            serve.unpack_request(json.dumps({"images": images, "prompts": ["a"] * len(images)}).encode(), limits)
        assert caught.value.status == 413
    for wrong in ({"images": 0}, {"total": float("nan")}, {"memory": 10}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: got"):
            Limits(**wrong)


def test_requests_that_do_not_arrive_and_answers_that_are_not_read_are_ended():
    limits = Limits(receive=1.0, total=1.0)
    large = lambda images, prompts, metadata: rewards.Scores(torch.ones(len(prompts)), masks=images[:, 0])
    with local(large, limits) as url:
        started = [connect(url) for _ in range(4)]
        started[1].sendall(b"POST /score HTTP/1.1\r\nX: ")
        started[2].sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        images = torch.zeros(8, 3, 1024, 1024)
        send(started[3], pack_request(images, ["a"] * 8, [{}] * 8))
        before = time.monotonic()
        for connection in started[:3]:
            with pytest.raises(ConnectionError), connection:
                while connection.recv(1 << 16):
                    pass
                raise ConnectionError
        assert time.monotonic() - before < 15
        time.sleep(4)
        with started[3], pytest.raises((ConnectionError, http.client.IncompleteRead)):
            answer_of(started[3])
        assert post(url, pack_request(*ASK))[0] == 200


def test_memory_that_is_taken_by_others_is_waited_for_and_then_refused():
    limits = Limits(request=1 << 20, memory=1 << 20, receive=1.0)
    with local(rich, limits) as url:
        holding = connect(url)
        holding.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n{" % (1 << 20))
        time.sleep(0.1)
        with connect(url) as connection:
            send(connection, pack_request(*ASK))
            assert answer_of(connection) == (503, {"error": "busy with other requests; ask again"})
        with holding:
            scores = Remote(url, backoff=1.0)(*ASK)  # what holds the memory is ended meanwhile
    assert scores.reward.isfinite().all()


def test_too_many_connections_are_closed_and_the_others_answered():
    with local(rich, Limits(connections=5, receive=20.0)) as url:
        idle = [connect(url) for _ in range(5)]
        time.sleep(0.2)
        with pytest.raises(RewardError, match="failed 2 times"):
            quick(url, attempts=2)(*ASK)
        for connection in idle:
            connection.close()
        assert quick(url)(*ASK).reward.isfinite().all()


def test_a_reward_that_hangs_costs_its_request_and_the_next_ones_are_scored():
    release = threading.Event()

    def hanging(images, prompts, metadata):
        if prompts[0] == "hang":
            release.wait(60)
        return images.mean((1, 2, 3))

    with local(hanging, Limits(total=0.5)) as url:
        status, answer = post(url, pack_request(ASK[0], ["hang", "b"], ASK[2]))
        assert (status, answer["error"]) == (504, "took longer than 0.5 s")
        assert post(url, pack_request(*ASK))[0] == 200
    release.set()


def test_what_a_client_that_left_has_asked_for_is_not_scored():
    release, scored = threading.Event(), []

    def slow(images, prompts, metadata):
        scored.append(prompts[0])
        release.wait(60)
        return images.mean((1, 2, 3))

    with local(slow) as url:
        first, second, third = (connect(url) for _ in range(3))
        for connection, prompt in ((first, "first"), (second, "second"), (third, "third")):
            send(connection, pack_request(ASK[0], [prompt, "b"], ASK[2]))
            time.sleep(0.2)
        second.close()
        time.sleep(0.3)
        release.set()
        assert answer_of(first)[0] == answer_of(third)[0] == 200
        first.close()
        third.close()
    assert scored == ["first", "third"]


def test_a_token_is_needed_where_there_is_one(monkeypatch):
    monkeypatch.delenv(remote.TOKEN, raising=False)
    with local(rich, token="secret") as url:
        for wrong in (None, "other", "secret2"):
            with pytest.raises(RewardError, match=r"failed \(401: expected this server's token .*STAR_REWARD_TOKEN"):
                Remote(url, token=wrong)(*ASK)
        assert Remote(url, token="secret")(*ASK).reward.isfinite().all()
        monkeypatch.setenv(remote.TOKEN, "secret")
        assert Remote(url)(*ASK).reward.isfinite().all()
        connection = http.client.HTTPConnection(url.removeprefix("http://"))
        connection.request("GET", "/")
        assert connection.getresponse().status == 401
        assert "secret" not in repr(Remote(url, token="secret"))


def test_logs_have_no_control_characters(caplog):
    with local(rich) as url:
        assert post(url, b"", "/%1b%5b31mFAKE%0aWARNING: forged".replace(" ", "%20"))[0] == 404
        assert post(url, json.dumps({"images": ["\x1b"], "prompts": ["\x1b[31m\n"]}).encode())[0] == 400
    assert len(caplog.records) == 2 and all(record.getMessage().isprintable() for record in caplog.records)


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 70000, "port: got 70000, expected 0 to 65535"),
        ("127.0.0.1", -1, "port: got -1"),
        ("198.51.100.7", 0, "host: got '198.51.100.7', which is no address of this machine"),
        ("no such host", 0, "host: got 'no such host', which is no address"),
        ("x" * 300, 0, "which is no address"),
        ("2001:db8::1", 0, "host: got '2001:db8::1'"),
        ("[", 0, "host"),
    ],
)
def test_an_address_that_cannot_be_had_is_one_clear_line(host, port, words):
    with pytest.raises(ValueError, match=words) as caught:
        serve.listen(host, port)
    assert str(caught.value).isprintable()


def test_a_port_in_use_is_named():
    with serve.listen("127.0.0.1", 0) as taken, pytest.raises(ValueError, match="is in use; take another one"):
        serve.listen("127.0.0.1", taken.getsockname()[1])


@pytest.mark.parametrize("host", ["::1", "[::1]", "localhost"])
def test_other_addresses_of_this_machine(host):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = serve.make_server(rich, "test", host, 0)
    with running(server):
        url = server.address
        assert url == server.address and ("[" in url) == (":" in host)
        assert Remote(url)(*ASK).reward.isfinite().all()


@contextmanager
def command(*options, **environment):
    """The command: its process and its address."""
    process = subprocess.Popen(
        [sys.executable, "-m", "star.rewards.serve", *options, "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    try:
        yield process, process.stdout.readline().rpartition(" ")[2].strip()
    finally:
        process.kill()
        process.wait(60)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_command_ends_cleanly_with_a_request_in_work(number):
    with command("test_rewards_network:sleepy", PYTHONPATH=os.pathsep.join(sys.path)) as (process, url):
        with connect(url) as connection:
            send(connection, pack_request(*ASK))
            time.sleep(0.5)
            process.send_signal(number)
            assert process.wait(30) == 0
        assert process.stderr.read() == ""


def sleepy(images, prompts, metadata):
    print("scoring")
    time.sleep(600)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["jpeg_compressibility", "--limit", "0"], "star: limit: got 0, expected a number above 0"),
        (["jpeg_compressibility", "--timeout", "nan"], "star: timeout: got nan"),
        (["jpeg_compressibility", "--memory", "1"], "star: memory: got 1048576 bytes, expected at least the"),
        (["jpeg_compressibility", "--token", "a b\n"], "star: token: expected printable ASCII"),
        (["jpeg_compressibility", "--models", "jpeg_compressibility", "/x"], "star: reward_models: got"),
        (["beauty"], "star: reward: unknown 'beauty'"),
    ],
)
def test_options_of_the_command_that_are_wrong_are_one_line(options, words, capsys):
    assert serve.main([*options, "--port", "0"]) == 1
    printed = capsys.readouterr().err
    assert printed.startswith(words) and printed.count("\n") == 1


def test_missing_libraries_of_the_client_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "httpx2", None)
    monkeypatch.delitem(sys.modules, "star.rewards.remote")
    with pytest.raises(RewardError, match=r"reward: 'geneval' needs httpx2; pip install 'httpx2\b"):
        rewards.load("geneval", {"geneval": "http://127.0.0.1:1"})


# --- a short attack ---------------------------------------------------------------------------------------------------


REQUESTS = int(os.environ.get("STAR_ATTACK_REQUESTS", 400))


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def file_of(random_):
    """A PNG, or something that says it is one."""
    depth, kind = random_.choice([(8, 2), (8, 0), (16, 0), (16, 2), (8, 6), (8, 4), (1, 0), (8, 3), (3, 9)])
    size = random_.choice([(8, 8)] * 3 + [(0, 0), (2**31 - 1, 1), (5000, 5000), (4096, 4096)])
    interlaced = random_.choice([0, 0, 1, 7])
    parts = [
        chunk(b"IHDR", struct.pack(">IIBBBBB", *size, depth, kind, 0, 0, interlaced)),
        chunk(b"PLTE", bytes(12)),
        chunk(b"tRNS", bytes(random_.randrange(4))),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(1 << 22))),
        chunk(b"IDAT", zlib.compress(bytes(random_.choice([0, 100, 600, 4000])))),
        chunk(b"IEND", b""),
    ]
    if random_.random() < 0.3:
        parts = random_.sample(parts, random_.randrange(1, len(parts) + 1))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def body_of(random_):
    """A request's body: right, spoiled in one field, or no JSON."""
    count = random_.randrange(1, 4)
    good = {"images": [png(np.zeros((8, 8, 3), np.uint8))] * count, "prompts": ["a"] * count, "metadata": [{}] * count}
    odd = [None, True, 0, -1, 1e308, float("nan"), 10**30, "", "\ud800", "a\0b", [], [[]], {}, {"a": {}}, ["x"] * count]
    name = random_.choice([*good])
    match random_.randrange(6):
        case 0:
            return json.dumps(good).encode()
        case 1:
            return json.dumps({**good, name: random_.choice(odd)}).encode()
        case 2:
            return json.dumps({**good, name: [random_.choice(odd), *good[name][1:]]}).encode()
        case 3:
            files = [base64.b64encode(file_of(random_)).decode() for _ in range(count)]
            return json.dumps({**good, "images": files}).encode()
        case 4:
            whole = json.dumps(good).encode()
            return whole[: random_.randrange(len(whole))]
        case _:
            junk = [b"", b"[" * 10**5, b'{"a":' * 10**4, b"\xff\xfe", b"9" * 10**4, random_.randbytes(500)]
            return random_.choice(junk)


FIRST_LINES = [
    *[b"POST /score HTTP/1.1"] * 6, b"GET / HTTP/1.1", b"PUT /score HTTP/1.1", b"POST / HTTP/1.1",
    b"POST /%0a HTTP/1.1", b"GET /", b"POST /score HTTP/1.0", b"\x00", b"POST /" + b"a" * 70_000 + b" HTTP/1.1",
]  # fmt: skip
HEADERS = [
    b"Transfer-Encoding: chunked", b"Expect: 100-continue", b"Connection: close", b"Content-Length: 3", b"X: \x1b[2J",
    b"Upgrade: websocket\r\nConnection: Upgrade", b"A: b\r\n" * 300 + b"B: c", b"Authorization: " + b"\xff" * 9,
]  # fmt: skip


def request_of(random_):
    body = body_of(random_)
    length = random_.choice([str(len(body))] * 5 + ["-1", "9" * 30, "", "0x10", str(len(body) - 1), "1e3"])
    lines = [random_.choice(FIRST_LINES), b"Host: x", b"Content-Length: " + length.encode()]
    lines += random_.sample(HEADERS, random_.choice([0, 0, 0, 1, 2]))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


def test_an_attack_of_many_requests_leaves_a_server_that_answers(caplog):
    random_ = random.Random(18)
    statuses = {}
    with local(rich, Limits(request=1 << 20, receive=0.5, total=20.0)) as url:
        threads = threading.active_count()
        for _ in range(REQUESTS):
            with connect(url) as connection:
                connection.settimeout(10)
                try:
                    connection.sendall(request_of(random_))
                    if random_.random() < 0.1:
                        continue  # leaves
                    line = connection.recv(1 << 16).partition(b"\r\n")[0]
                except ConnectionError:
                    line = b""
            status = line.split(b" ")[1].decode() if line.startswith(b"HTTP/1.1 ") else line.decode("latin-1")
            statuses[status] = statuses.get(status, 0) + 1
        assert quick(url)(*ASK).reward.isfinite().all()
        assert threading.active_count() <= threads + 2
    # Answered, refused, or (requests that never end) closed: never an internal error, never silence until the timeout.
    assert set(statuses) <= {"", "100", "200", "400", "404", "405", "411", "413"}, statuses
    assert statuses["200"] > REQUESTS / 20 and statuses["400"] > REQUESTS / 8
    print(statuses)
    assert all(record.levelname == "WARNING" and record.getMessage().isprintable() for record in caplog.records)
