"""Serve a reward over HTTP: `python -m star.rewards.serve geneval --port 18085`. remote.py documents the messages.

For rewards that need a machine or an environment of their own. Without a token it answers anyone who can reach it, so
by default it listens on this machine only; nothing it is sent is executed.

One request is unpacked and scored at a time. Until then requests wait as they came, and `Limits` bounds what they take:
no more than `memory` for all that is received and waits, four times `request` for the one that is unpacked, and twelve
bytes for each of its `pixels`.
"""

from __future__ import annotations

import asyncio
import base64
import errno
import hmac
import io
import json
import logging
import os
import queue
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, fields
from typing import Annotated, Any

import numpy as np
import torch
import tyro
import uvicorn
from PIL import ExifTags, Image
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from torch import Tensor
from uvicorn.protocols.http.h11_impl import H11Protocol

from star import rewards
from star.messages import one_line
from star.rewards import Reward, RewardError
from star.rewards.remote import TOKEN, check_token, is_loopback, pack_answer, read_json
from star.rewards.worker import score

log = logging.getLogger("star")
SIDE = 4096  # pixels of an image
BACKLOG = 1024  # connections that the system keeps until they are accepted
GRACE = 5  # seconds for requests in work when the server ends


@dataclass(frozen=True)
class Limits:
    """What clients may ask of a server.

    request: bytes of a request. memory: bytes of all requests that are received or wait; those beyond wait unread for
    half of `receive` and are then told to ask again. images, pixels: of a request. connections: those beyond are closed
    at once. receive: seconds from connecting to the last byte of a request. total: seconds from there to the answer's
    last byte.
    """

    request: int = 256 << 20
    memory: int = 1 << 30
    images: int = 256
    pixels: int = 1 << 26
    connections: int = 512
    receive: float = 60.0
    total: float = 300.0

    def __post_init__(self) -> None:
        for item in fields(self):
            if not getattr(self, item.name) > 0:
                raise ValueError(f"{item.name}: got {getattr(self, item.name)}, expected a number above 0")
        if self.memory < self.request:
            raise ValueError(f"memory: got {self.memory} bytes, expected at least the {self.request} of one request")


class Refused(Exception):
    """A request that is not answered with scores: its status and why."""

    def __init__(self, status: int, why: str) -> None:
        super().__init__(why)
        self.status = status


# --- requests ---------------------------------------------------------------------------------------------------------


def unpack_request(body: bytes, limits: Limits) -> tuple[Tensor, list[str], list[dict]]:
    """Images (B, 3, H, W) in 0..1, prompts and metadata. Raises Refused."""
    try:
        request = read_json(body)
        images, prompts = request["images"], request["prompts"]
        metadata = request.get("metadata") or [{}] * len(prompts)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Refused(400, f"expected JSON with 'images' and 'prompts' ({one_line(error, 100)})") from error
    lists = all(isinstance(value, list) for value in (images, prompts, metadata))
    if not lists or not len(images) == len(prompts) == len(metadata) > 0:
        raise Refused(400, "expected as many 'images' as 'prompts' and 'metadata', at least one")
    if not all(isinstance(p, str) for p in prompts) or not all(isinstance(m, dict) for m in metadata):
        raise Refused(400, "expected texts under 'prompts' and objects under 'metadata'")
    if len(images) > limits.images:
        raise Refused(413, f"expected at most {limits.images} images, got {len(images)}")
    files = [_decoded(data) for data in images]
    width, height = _size(files[0])  # known before anything is unpacked
    if len(images) * width * height > limits.pixels:
        raise Refused(413, f"expected at most {limits.pixels} pixels, got {len(images)} images of {width} x {height}")
    if any(_size(file) != (width, height) for file in files[1:]):
        raise Refused(400, "expected 'images' of one size")
    batch = torch.empty(len(files), 3, height, width)
    for row, file in zip(batch, files, strict=True):
        row.copy_(torch.from_numpy(_pixels(file)).permute(2, 0, 1))
    return batch, prompts, metadata


def _decoded(data: Any) -> bytes:
    try:
        return base64.b64decode(data, validate=True)
    except Exception as error:
        raise Refused(400, "expected base64 of PNG files under 'images'") from error


def _open(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file), formats=["PNG"])


def _size(file: bytes) -> tuple[int, int]:
    """(width, height) as the file says."""
    try:
        with _open(file) as image:
            size = image.size
    except Exception as error:  # Pillow raises many kinds for what is no PNG
        raise Refused(400, "expected base64 of PNG files under 'images'") from error
    if max(size) > SIDE:
        raise Refused(413, f"expected 'images' of at most {SIDE} pixels on a side, got {size[0]} x {size[1]}")
    return size


TRANSPARENT = "expected opaque 'images', got one that is transparent in part"


def _pixels(file: bytes) -> np.ndarray:
    """(H, W, 3) float32 in 0..1. Gray is red, green and blue alike; 16 bits of gray keep their precision, of colors
    Pillow reads the upper 8; a channel of opacity says nothing if it is opaque, and is refused if it is not. So is a
    note that the image is to be turned: whether a reader heeds it is the reader's choice."""
    try:
        with _open(file) as image:
            if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
                raise Refused(400, "expected upright 'images', got one whose EXIF data turn it")
            if image.mode.startswith("I"):  # 16 bits
                if (np.asarray(image) == image.info.get("transparency", -1)).any():
                    raise Refused(400, TRANSPARENT)
                gray = np.asarray(image, np.float32) / 65535
                return np.repeat(gray[..., None], 3, 2)
            if image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255:
                raise Refused(400, TRANSPARENT)
            return np.asarray(image.convert("RGB"), np.float32) / 255
    except Refused:
        raise
    except Exception as error:  # Pillow raises many kinds for what is damaged
        raise Refused(400, "expected base64 of PNG files under 'images'") from error


# --- one at a time ----------------------------------------------------------------------------------------------------


class Lane:
    """A thread that does one thing after another. What takes longer than its caller waits is given up, and another
    thread goes on: a thread cannot be stopped from outside."""

    def __init__(self) -> None:
        self.waiting: queue.SimpleQueue[tuple[Future, Callable[[], Any]]] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self._start()

    def submit(self, work: Callable[[], Any]) -> Future:
        """A future of what `work` returns. It is not begun if the future is canceled before its turn."""
        future: Future = Future()
        self.waiting.put((future, work))
        if self.thread is not None and not self.thread.is_alive():
            self._start()
        return future

    def give_up(self) -> None:
        """Go on with the next thing beside the one in work."""
        self._start()

    def close(self) -> None:
        """Let the thread end after what it does now."""
        self.thread = None
        self.waiting.put((Future(), lambda: None))

    def _start(self) -> None:
        self.thread = threading.Thread(target=self._run, name="star-reward", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        while self.thread is threading.current_thread():
            future, work = self.waiting.get()
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(work())
                except BaseException as error:
                    future.set_exception(error)


class Room:
    """Bytes that requests may take, in the order in which they ask."""

    def __init__(self, size: int) -> None:
        self.free = size
        self.changed = asyncio.Condition()

    @asynccontextmanager
    async def taken(self, size: int, patience: float) -> AsyncIterator[None]:
        """Take so many bytes for a while. Raises Refused if they are not free within `patience` seconds."""
        try:
            async with asyncio.timeout(patience), self.changed:
                await self.changed.wait_for(lambda: self.free >= size)
                self.free -= size
        except TimeoutError as error:
            raise Refused(503, "busy with other requests; ask again") from error
        try:
            yield
        finally:
            async with self.changed:
                self.free += size
                self.changed.notify_all()


# --- the server -------------------------------------------------------------------------------------------------------


class Scoring:
    """The answers of a server of one reward."""

    def __init__(self, reward: Reward, name: str, limits: Limits, token: str | None) -> None:
        self.reward, self.name, self.limits, self.token = reward, name, limits, token
        self.lane = Lane()
        self.room = Room(limits.memory)

    def app(self) -> Starlette:
        routes = [Route("/", self.describe), Route("/score", self.answer, methods=["POST"])]
        return Starlette(routes=routes, exception_handlers={HTTPException: self.refuse, Refused: self.refuse})

    async def describe(self, request: Request) -> Response:
        self.check_token(request)
        return _json(200, {"reward": self.name})

    async def refuse(self, request: Request, error: Exception) -> Response:
        status, why = (error.status, str(error)) if isinstance(error, Refused) else (500, one_line(error))
        if isinstance(error, HTTPException):
            status, why = error.status_code, error.detail
        if status == 404:
            why = "expected POST /score"
        log.warning("%s %s: %d %s", request.method, one_line(request.url.path, 100), status, one_line(why))
        again = {"Retry-After": "1"} if status == 503 else {}
        return _json(status, {"error": why}, again)

    def check_token(self, request: Request) -> None:
        given = request.headers.get("Authorization", "").removeprefix("Bearer ").encode()
        if self.token is not None and not hmac.compare_digest(given, self.token.encode()):
            raise Refused(401, "expected this server's token as Authorization: Bearer TOKEN")

    async def answer(self, request: Request) -> Response:
        self.check_token(request)
        length = request.headers.get("Content-Length", "")
        if "Transfer-Encoding" in request.headers or not (length.isascii() and length.isdecimal()):
            raise Refused(411, "expected a Content-Length")
        if len(length) > 18 or int(length) > self.limits.request:
            raise Refused(413, f"expected at most {self.limits.request} bytes, got {length[:20]}")
        try:
            async with self.room.taken(int(length), self.limits.receive / 2):
                return _json(200, await self.scored(request, await request.body()))
        except ClientDisconnect:
            return Response(status_code=400)  # nobody reads it

    async def scored(self, request: Request, body: bytes) -> bytes:
        """The answer to a request. Raises ClientDisconnect when the client leaves, Refused when it takes too long."""
        scoring = self.lane.submit(lambda: self.score(body))
        left = asyncio.ensure_future(request.receive())  # after the body there is nothing but the client's leave
        done = asyncio.wrap_future(scoring)
        try:
            await asyncio.wait((left, done), timeout=self.limits.total, return_when=asyncio.FIRST_COMPLETED)
            if done.done():
                return done.result()
            if left.done():
                raise ClientDisconnect
            if scoring.running():
                log.warning("reward: a request took longer than %g s; others are scored beside it", self.limits.total)
                self.lane.give_up()
            raise Refused(504, f"took longer than {self.limits.total:g} s")
        finally:
            left.cancel()
            done.cancel()

    def score(self, body: bytes) -> bytes:
        images, prompts, metadata = unpack_request(body, self.limits)
        scores, lines = score(self.reward, images, prompts, metadata)
        return pack_answer(scores, lines)


def _json(status: int, content: dict | bytes, headers: dict[str, str] | None = None) -> Response:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Response(body, status, headers, "application/json")


def bounded(limits: Limits) -> type[H11Protocol]:
    """A connection that is closed when there are too many, or when a request takes too long, whatever the client does:
    each connection holds memory, and so does an answer that is not read."""

    class Bounded(H11Protocol):
        deadline: asyncio.TimerHandle | None = None
        refused = False

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > limits.connections:
                transport.abort()
            else:
                self.deadline = self.loop.call_later(limits.receive, self.end_of_receiving)

        def connection_lost(self, exc: Exception | None) -> None:
            self.forget()
            super().connection_lost(exc)

        def on_response_complete(self) -> None:
            if not self.cycle.more_body:  # the next request has its own time
                self.forget()
                self.deadline = self.loop.call_later(limits.receive, self.end_of_receiving)
            super().on_response_complete()

        def send_400_response(self, msg: str) -> None:
            """For what is not HTTP. The rest of it is read and dropped for a while, so that the client sees why."""
            self.refused = True
            body = json.dumps({"error": msg}).encode()
            head = "HTTP/1.1 400 Bad Request\r\nContent-Type: application/json\r\nConnection: close\r\n"
            self.transport.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
            self.transport.write_eof()
            self.forget()
            self.deadline = self.loop.call_later(GRACE, self.transport.abort)

        def data_received(self, data: bytes) -> None:
            if not self.refused:
                super().data_received(data)

        def end_of_receiving(self) -> None:
            if self.cycle is None or self.cycle.more_body or self.cycle.response_complete:
                self.transport.abort()
            else:  # it is being scored or answered
                self.deadline = self.loop.call_later(limits.total, self.transport.abort)

        def forget(self) -> None:
            if self.deadline is not None:
                self.deadline.cancel()

    return Bounded


class RewardServer:
    """A server that listens, to be run with `serve_forever`, and ended from another thread with `shutdown`."""

    def __init__(self, scoring: Scoring, listener: socket.socket) -> None:
        self.scoring, self.listener = scoring, listener
        self.host, self.server_port = listener.getsockname()[:2]
        config = uvicorn.Config(
            scoring.app(),
            http=bounded(scoring.limits),
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            log_level=logging.CRITICAL,  # what is refused is told by us, without the client's bytes
            access_log=False,
            server_header=False,
            proxy_headers=False,
            backlog=BACKLOG,
            timeout_graceful_shutdown=GRACE,
        )
        self.server = uvicorn.Server(config)
        self.ended = threading.Event()
        self.ended.set()

    @property
    def address(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{host}:{self.server_port}"

    def serve_forever(self) -> None:
        """Answer until `shutdown`, or in the main thread until SIGINT or SIGTERM, which are raised again afterwards."""
        self.ended.clear()
        try:
            if not self.server.should_exit:
                self.server.run([self.listener])
        finally:
            self.scoring.lane.close()
            self.ended.set()

    def shutdown(self) -> None:
        """End `serve_forever` and wait until it has ended."""
        self.server.should_exit = True
        self.ended.wait()

    def server_close(self) -> None:
        self.listener.close()


def make_server(
    reward: Reward,
    name: str,
    host: str,
    port: int,
    limits: Limits | int = Limits(),
    token: str | None = None,
) -> RewardServer:
    """A server of one reward. limits: or the bytes of a request alone. Port 0: any that is free.

    Raises:
        ValueError: an address that cannot be had, or a token that a header cannot hold.
    """
    if isinstance(limits, int):
        limits = Limits(request=limits, memory=max(limits, Limits.memory))
    check_token(token)
    return RewardServer(Scoring(reward, name, limits, token), listen(host, port))


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens at a name or at an IPv4 or IPv6 address of this machine. Raises ValueError."""
    host = host.removeprefix("[").removesuffix("]")
    if not 0 <= port < 1 << 16:
        raise ValueError(f"port: got {port}, expected 0 to 65535")
    listener = None
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = found[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        return listener
    except (OSError, UnicodeError) as error:  # a name that is too long is a UnicodeError
        if listener is not None:
            listener.close()
        match getattr(error, "errno", None):
            case errno.EADDRINUSE:
                why = f"port: {port} of {host} is in use; take another one, or 0 for any that is free"
            case errno.EACCES:
                why = f"port: {port} is only for administrators; take one above 1023"
            case _:
                why = f"host: got {host!r}, which is no address of this machine; 127.0.0.1 is"
        raise ValueError(why) from error


# --- the command ------------------------------------------------------------------------------------------------------


@dataclass
class Serve:
    """Serve a reward over HTTP."""

    reward: Annotated[str, tyro.conf.Positional]
    """A reward as for `star train --run.reward`: a name, several with weights, or "module:function"."""
    models: dict[str, str] = field(default_factory=dict)
    """Where rewards find their weights, by name: a folder, a file or a hub id."""
    host: str = "127.0.0.1"
    """Name or address to listen at, IPv4 or IPv6. 0.0.0.0 and ::: every address of this machine."""
    port: int = 18085
    """Port to listen at. 0: any free one."""
    token: str | None = None
    """Token that clients must send. Other users can see this option; the variable STAR_REWARD_TOKEN hides it."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Device of the rewards' models."""
    limit: int = 256
    """Largest request, in MiB."""
    memory: int = 1024
    """Largest sum of all requests that are received or wait, in MiB."""
    images: int = 256
    """Largest number of images in a request."""
    megapixels: int = 64
    """Largest number of pixels in a request, in units of 2**20."""
    connections: int = 512
    """Largest number of connections at the same time."""
    timeout: float = 300.0
    """Most seconds from a request's last byte to the end of its answer."""


def main(arguments: list[str] | None = None) -> int:
    options = tyro.cli(Serve, args=arguments, prog="python -m star.rewards.serve")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    token = options.token or os.environ.get(TOKEN)
    try:
        limits = _limits(options)
        listener = listen(options.host, options.port)  # before anything is loaded
        with listener:
            check_token(token)
            reward = rewards.load(options.reward, options.models, options.device)
            server = RewardServer(Scoring(reward, options.reward, limits, token), listener)
            if token is None and not is_loopback(server.host):
                log.warning("%s answers anyone who can reach it; set %s", server.address, TOKEN)
            print(f"{options.reward} on {server.address}", flush=True)
            _serve(server)
    except (ValueError, RewardError, OSError) as error:
        print(f"star: {one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        pass
    return 0


def _limits(options: Serve) -> Limits:
    for name in ("limit", "memory", "images", "megapixels", "connections", "timeout"):
        if not getattr(options, name) > 0:
            raise ValueError(f"{name}: got {getattr(options, name)}, expected a number above 0")
    return Limits(
        request=options.limit << 20,
        memory=options.memory << 20,
        images=options.images,
        pixels=options.megapixels << 20,
        connections=options.connections,
        total=options.timeout,
    )


def _serve(server: RewardServer) -> None:
    """Until Ctrl-C or SIGTERM."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)  # raised again by the server when it has ended
    server.serve_forever()


if __name__ == "__main__":
    sys.exit(main())
