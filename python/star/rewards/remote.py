"""A reward over HTTP, and the messages it exchanges with its server (serve.py is one; any language can be another).

Request, POST /score, JSON: {"images": [base64 of a PNG, ...], "prompts": [...], "metadata": [{...}, ...]}, with the
header "Authorization: Bearer TOKEN" where there is a token. Answer, JSON: {"reward": [number or null, ...]} with,
optionally, "details": {name: [number or null, ...]}, "arrays": base64 of a safetensors file with "masks" and
"reward_map" (B, H, W) and "credits" (B, G) as in Scores, "concepts": [[phrase, ...], ...] with the phrases of each
image's credits, and "errors": [line, ...]. null is a reward that failed. An answer with another
status than 200 may say why under "error". A request changes nothing at the server, so that it may be sent again.
"""

from __future__ import annotations

import asyncio
import base64
import io
import ipaddress
import json
import logging
import math
import os
import threading
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar
from urllib.request import getproxies, proxy_bypass

import httpx2
import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from star.messages import one_line
from star.rewards import Metadata, RewardError, Scores, as_scores, concatenate, pixels

log = logging.getLogger("star")
TOKEN = "STAR_REWARD_TOKEN"  # environment variable
AGAIN = (429, 502, 503, 504)  # statuses after which asking again may help
LOGGED = 5  # errors of an answer that are logged one by one
VALUES = 1 << 18  # commas and brackets of a message: each may become an object of many bytes
ARRAYS = ("masks", "reward_map", "credits")  # of Scores, that an answer may have
T = TypeVar("T")

# --- messages ---------------------------------------------------------------------------------------------------------


def pack_request(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> bytes:
    encoded = []
    for image in pixels(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="PNG", compress_level=1)
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return json.dumps({"images": encoded, "prompts": list(prompts), "metadata": [dict(m) for m in metadata]}).encode()


def pack_answer(scores: Scores, errors: Sequence[str]) -> bytes:
    answer: dict[str, Any] = {
        "reward": _numbers(scores.reward),
        "details": {name: _numbers(value) for name, value in scores.details.items()},
        "errors": list(errors),
    }
    arrays = {name: getattr(scores, name) for name in ARRAYS if getattr(scores, name) is not None}
    if scores.concepts:
        answer["concepts"] = [list(row) for row in scores.concepts]
    if arrays:
        answer["arrays"] = base64.b64encode(save({k: v.contiguous() for k, v in arrays.items()})).decode()
    return json.dumps(answer).encode()


def _numbers(values: Tensor) -> list[float | None]:
    return [
        value if finite else None for value, finite in zip(values.tolist(), values.isfinite().tolist(), strict=True)
    ]


def read_json(body: bytes) -> Any:
    """What a message says. Raises ValueError for what is no JSON, or JSON of so many values that it would not fit."""
    if sum(body.count(sign) for sign in (b",", b"[", b"{")) > VALUES:
        raise ValueError(f"more than {VALUES} values")
    try:
        return json.loads(body)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def unpack_answer(body: bytes, count: int, size: Sequence[int]) -> tuple[Scores, list[str]]:
    """Scores of an answer and the errors it tells. size: (H, W) of the images. Raises ValueError or RewardError for
    anything else."""
    answer = read_json(body)
    if not isinstance(answer, dict) or not isinstance(answer.get("reward"), list):
        raise ValueError("it has no list 'reward'")

    def column(name: str, values: object) -> Tensor:
        numbers = values if isinstance(values, list) else []
        if len(numbers) != count or any(v is not None and type(v) not in (int, float) for v in numbers):
            raise ValueError(f"{name!r} is no list of {count} numbers")
        return torch.tensor([torch.nan if value is None else float(value) for value in numbers])

    details, errors = answer.get("details") or {}, answer.get("errors") or []
    if not isinstance(details, dict) or not all(0 < len(name) <= 100 and name.isprintable() for name in details):
        raise ValueError("'details' is no object of names and numbers")
    if not isinstance(errors, list):
        raise ValueError("'errors' is no list of lines")
    arrays = load(base64.b64decode(answer["arrays"], validate=True)) if answer.get("arrays") else {}
    scores = Scores(
        column("reward", answer["reward"]),
        {name: column(name, values) for name, values in details.items()},
        **{name: arrays[name] for name in ARRAYS if name in arrays},
        concepts=answer.get("concepts") or (),
    )
    return as_scores(scores, count, size), [one_line(line) for line in errors]


# --- the client -------------------------------------------------------------------------------------------------------


class TryAgain(Exception):
    """A request failed in a way that may pass; its message says how."""


@dataclass(frozen=True)
class Remote:
    """Asks a server.

    url: where the server is; "/score" is added. name: for messages. batch: images per request. timeout: seconds for a
    request, from looking up the address to the last byte, whatever the server does. attempts: how often a request is
    tried in all, when the server cannot be reached, breaks off, takes too long or answers one of AGAIN; backoff:
    seconds before the second attempt, doubled each time. limit: bytes of an answer. token: what the server wants to be
    told; by default the environment variable STAR_REWARD_TOKEN. The number of further attempts is the detail `retries`.

    Redirects are not followed. The environment's proxies are used, except for addresses of this machine.

    Raises:
        ValueError: an address that is none, or a number out of its range. RewardError: the last attempt failed, another
            status, an answer that is none, or a reward that failed for every image.
    """

    url: str
    name: str = "remote"
    batch: int = 16
    timeout: float = 120.0
    attempts: int = 3
    backoff: float = 1.0
    limit: int = 256 << 20
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        parse_address(self.url)
        for name, least in (("batch", 1), ("timeout", 0), ("attempts", 1), ("backoff", 0), ("limit", 1)):
            value = getattr(self, name)
            if not math.isfinite(value) or value < least or (name == "timeout" and value == 0):
                raise ValueError(
                    f"{name}: got {value}, expected {'above' if name == 'timeout' else 'at least'} {least}"
                )
        check_token(self.token or os.environ.get(TOKEN))

    @property
    def shown(self) -> str:
        """The address as messages tell it."""
        return without_user(self.url).rstrip("/")

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        return run_beside(self._ask_all(images, prompts, metadata))

    async def _ask_all(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        parts, lines = [], []
        async with self._client() as client:
            for start in range(0, len(prompts), self.batch):
                rows = slice(start, start + self.batch)
                body = pack_request(images[rows], prompts[rows], metadata[rows])
                scores, errors = await self._ask(client, body, len(prompts[rows]), images.shape[-2:])
                parts.append(scores)
                lines += errors
        for line in lines[:LOGGED]:
            log.warning("%s said: %s", self.shown, line)
        if len(lines) > LOGGED:
            log.warning("%s said %d more lines", self.shown, len(lines) - LOGGED)
        joined = concatenate(parts)
        if lines and joined.reward.isnan().all():
            raise self._error(f"failed for every image of a batch ({lines[0]})")
        return joined

    async def _ask(self, client: httpx2.AsyncClient, body: bytes, count: int, size: Sequence[int]) -> tuple:
        for attempt in range(self.attempts):
            try:
                answer = await self._post(client, body)
            except TryAgain as error:
                if attempt + 1 == self.attempts:
                    raise self._error(
                        f"failed {attempt + 1} times ({error})" if attempt else f"failed ({error})"
                    ) from error
                log.warning(
                    "reward: %r at %s failed (%s); attempt %d follows", self.name, self.shown, error, attempt + 2
                )
                await asyncio.sleep(self.backoff * 2**attempt)
                continue
            try:
                scores, errors = unpack_answer(answer, count, size)
            except Exception as error:  # JSON's, base64's, safetensors': what it said is no answer
                raise self._error(f"answered with something else ({one_line(error)})") from error
            retries = torch.full((count,), float(attempt))
            return replace(scores, details=scores.details | {"retries": retries}), errors
        raise AssertionError("attempts is at least 1")

    async def _post(self, client: httpx2.AsyncClient, body: bytes) -> bytes:
        """The body of the answer. Raises TryAgain or RewardError."""
        try:
            async with asyncio.timeout(self.timeout), client.stream("POST", "/score", content=body) as response:
                answer = await self._read(response)
        except TimeoutError as error:
            raise TryAgain("timed out") from error
        except httpx2.TransportError as error:  # refused, reset, broken off
            raise TryAgain(self._through(_reason(error))) from error
        if response.status_code == 200:
            return answer
        try:
            why = read_json(answer)["error"]
        except Exception:
            why = response.reason_phrase
        reason = self._through(f"{response.status_code}: {one_line(why, 200)}")
        if response.is_redirect:
            reason += "; redirects are not followed, give the address it leads to"
        if response.status_code == 401:
            reason += f"; set the environment variable {TOKEN}"
        if response.status_code in AGAIN:
            raise TryAgain(reason)
        raise self._error(f"failed ({reason})")

    async def _read(self, response: httpx2.Response) -> bytes:
        parts, size = [], 0
        async for part in response.aiter_raw():  # as it came: nothing is unpacked
            parts.append(part)
            size += len(part)
            if size > self.limit:
                raise self._error(f"answered with something else (more than {self.limit} bytes)")
        return b"".join(parts)

    def _client(self) -> httpx2.AsyncClient:
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if token := self.token or os.environ.get(TOKEN):
            headers["Authorization"] = f"Bearer {token}"
        try:
            # No settings from the environment but those that are read here.
            return httpx2.AsyncClient(
                base_url=self.url, headers=headers, proxy=proxy_for(self.url), trust_env=False, timeout=None
            )
        except Exception as error:  # a proxy's address, or certificates that cannot be read
            raise self._error(f"cannot be asked ({self._through(one_line(error))})") from error

    def _through(self, reason: str) -> str:
        proxy = proxy_for(self.url)
        return f"{reason}; through the proxy {without_user(proxy)} of the environment" if proxy else reason

    def _error(self, what: str) -> RewardError:
        return RewardError(f"reward: {self.name!r} at {self.shown} {what}")


def parse_address(url: str) -> httpx2.URL:
    """The address of a server. Raises ValueError."""
    try:
        address, reason = httpx2.URL(url), ""
    except httpx2.InvalidURL as error:
        address, reason = httpx2.URL(""), f" ({one_line(error)})"
    port = address.port is None or 0 < address.port < 1 << 16
    known = address.scheme in ("http", "https") and address.host and port and not (address.query or address.fragment)
    if not known or not url.isprintable() or " " in url:
        raise ValueError(
            f"reward_models: got {without_user(url)!r}, expected an address such as http://127.0.0.1:18085{reason}"
        )
    return address


def check_token(token: str | None) -> None:
    """Raise ValueError for a token that a header cannot hold."""
    if token is not None and not (token.isascii() and token.isprintable() and token.strip() == token):
        raise ValueError(f"token: expected printable ASCII characters without spaces around them; see {TOKEN}")


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address; none for addresses of this machine."""
    address = httpx2.URL(url)
    if is_loopback(address.host) or proxy_bypass(address.host):
        return None
    proxies = getproxies()
    proxy = proxies.get(address.scheme) or proxies.get("all")
    return f"http://{proxy}" if proxy and "://" not in proxy else proxy


def is_loopback(host: str) -> bool:
    """Whether a name or address is of this machine itself."""
    name = host.rstrip(".").lower()
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return name == "localhost" or name.endswith(".localhost")


def without_user(url: str) -> str:
    """An address without the user and password that it may have."""
    scheme, separator, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{scheme}{separator}{host.rpartition('@')[2]}{slash}{path}"


def _reason(error: BaseException) -> str:
    """What the operating system said, below the library's own words."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno:
            return os.strerror(found.errno) if found.errno > 0 else one_line(found.strerror)  # below 0: names
        found = found.exceptions[0] if isinstance(found, BaseExceptionGroup) else found.__cause__ or found.__context__
    return one_line(error)


def run_beside(work: Coroutine[Any, Any, T]) -> T:
    """The result of a coroutine, which runs in a thread of its own: here a loop may be running, as in a notebook."""
    outcome: dict[str, Any] = {}

    def run() -> None:
        loop = asyncio.new_event_loop()
        try:
            outcome["result"] = loop.run_until_complete(work)
        except BaseException as error:
            outcome["error"] = error
        finally:
            loop.close()  # without waiting for a name that is still being looked up

    thread = threading.Thread(target=run, name="star-reward-request", daemon=True)
    thread.start()
    thread.join()
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]
