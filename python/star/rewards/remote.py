"""A reward over HTTP, and the messages it exchanges with its server (serve.py is one; any language can be another).

Request, POST /score, JSON: {"images": [base64 of a PNG, ...], "prompts": [...], "metadata": [{...}, ...]}.
Answer, JSON: {"reward": [number or null, ...]} with, optionally, "details": {name: [number or null, ...]}, "arrays":
base64 of a safetensors file with "masks" and "reward_map" (B, H, W) as in Scores, and "errors": [line, ...].
null is a reward that failed. An answer with another status than 200 may say why under "error".
"""

from __future__ import annotations

import base64
import io
import json
import logging
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException

import torch
from PIL import Image
from safetensors.torch import load, save
from torch import Tensor

from star.rewards import Metadata, RewardError, Scores, as_scores, concatenate, pixels

log = logging.getLogger("star")


def pack_request(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> bytes:
    encoded = []
    for picture in pixels(images):
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
        encoded.append(base64.b64encode(buffer.getvalue()).decode())
    return json.dumps({"images": encoded, "prompts": list(prompts), "metadata": [dict(m) for m in metadata]}).encode()


def pack_answer(scores: Scores, errors: Sequence[str]) -> bytes:
    answer = {
        "reward": _numbers(scores.reward),
        "details": {name: _numbers(value) for name, value in scores.details.items()},
        "errors": list(errors),
    }
    arrays = {name: getattr(scores, name) for name in ("masks", "reward_map") if getattr(scores, name) is not None}
    if arrays:
        answer["arrays"] = base64.b64encode(save({k: v.contiguous() for k, v in arrays.items()})).decode()
    return json.dumps(answer).encode()


def _numbers(values: Tensor) -> list[float | None]:
    return [
        value if finite else None for value, finite in zip(values.tolist(), values.isfinite().tolist(), strict=True)
    ]


def unpack_answer(body: bytes, count: int) -> tuple[Scores, list[str]]:
    """Scores of an answer and the errors it tells. Raises ValueError for anything else."""
    answer = json.loads(body)
    if not isinstance(answer, dict) or not isinstance(answer.get("reward"), list):
        raise ValueError("it has no list 'reward'")

    def column(name: str, values: object) -> Tensor:
        numbers = values if isinstance(values, list) else []
        if len(numbers) != count or any(v is not None and type(v) not in (int, float) for v in numbers):
            raise ValueError(f"{name!r} is no list of {count} numbers")
        return torch.tensor([torch.nan if value is None else float(value) for value in numbers])

    details = answer.get("details") or {}
    if not isinstance(details, dict):
        raise ValueError("'details' is no object")
    arrays = load(base64.b64decode(answer["arrays"], validate=True)) if answer.get("arrays") else {}
    scores = Scores(
        column("reward", answer["reward"]),
        {str(name): column(name, values) for name, values in details.items()},
        arrays.get("masks"),
        arrays.get("reward_map"),
    )
    return as_scores(scores, count), [str(line) for line in answer.get("errors") or ()]


@dataclass(frozen=True)
class Remote:
    """Asks a server.

    url: where the server is; "/score" is added. name: for messages. batch: pictures per request. timeout: seconds for a
    request, from connecting to the last byte. attempts: how often a request is tried in all, when the server cannot be
    reached, takes too long or answers 429 or 5xx; backoff: seconds before the second attempt, doubled each time.
    limit: bytes of an answer. The number of further attempts is the detail `retries`.

    Raises:
        RewardError: the last attempt failed, another status, or an answer that is none.
    """

    url: str
    name: str = "remote"
    batch: int = 16
    timeout: float = 120.0
    attempts: int = 3
    backoff: float = 1.0
    limit: int = 256 << 20

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        parts = []
        for start in range(0, len(prompts), self.batch):
            rows = slice(start, start + self.batch)
            parts.append(self._ask(pack_request(images[rows], prompts[rows], metadata[rows]), len(prompts[rows])))
        return concatenate(parts)

    def _ask(self, body: bytes, count: int) -> Scores:
        for attempt in range(self.attempts):
            reason, final = "", False
            try:
                scores, errors = unpack_answer(self._post(body), count)
            except urllib.error.HTTPError as error:
                reason, final = _status(error), error.code != 429 and error.code < 500
            except (OSError, HTTPException) as error:  # URLError and time-outs are OSErrors
                reason = f"{getattr(error, 'reason', None) or error or type(error).__name__}"
            except Exception as error:  # JSON's, base64's, safetensors': what it said is no answer
                raise self._error(f"answered with something else ({_line(error)})") from error
            else:
                for line in errors:
                    log.warning("%s said: %s", self.url, line)
                retries = torch.full((count,), float(attempt))
                return replace(scores, details=scores.details | {"retries": retries})
            if final or attempt + 1 == self.attempts:
                raise self._error(f"failed {attempt + 1} times ({reason})" if attempt else f"failed ({reason})")
            log.warning("reward: %r at %s failed (%s); attempt %d follows", self.name, self.url, reason, attempt + 2)
            time.sleep(self.backoff * 2**attempt)
        raise AssertionError("attempts is at least 1")

    def _post(self, body: bytes) -> bytes:
        deadline = time.monotonic() + self.timeout
        address = self.url.rstrip("/") + "/score"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=self.timeout) as response:
            parts, size = [], 0
            while part := response.read1(1 << 20):
                parts.append(part)
                size += len(part)
                if size > self.limit:
                    raise ValueError(f"more than {self.limit} bytes")
                if time.monotonic() > deadline:  # each read has a limit of its own: bytes may trickle for ever
                    raise TimeoutError("timed out")
        return b"".join(parts)

    def _error(self, what: str) -> RewardError:
        return RewardError(f"reward: {self.name!r} at {self.url} {what}")


def _status(error: urllib.error.HTTPError) -> str:
    """The status of an answer and, in one line, why."""
    try:
        why = str(json.loads(error.read(1 << 16))["error"])
    except Exception:
        why = error.reason
    return f"{error.code}: {' '.join(str(why).split())[:200]}"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
