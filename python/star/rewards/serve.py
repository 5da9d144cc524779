"""Serve a reward over HTTP: `python -m star.rewards.serve geneval --port 18085`. What is said is in remote.py.

For rewards that need a machine or an environment of their own. It answers anyone who can reach it, so by default it
listens on this machine only; nothing it is sent is executed.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Annotated, Any

import numpy as np
import torch
import tyro
from PIL import Image
from torch import Tensor

from star import rewards
from star.rewards import Reward, RewardError
from star.rewards.remote import pack_answer
from star.rewards.worker import score

log = logging.getLogger("star")
SIDE = 4096  # pixels of a picture


class BadRequest(ValueError):
    """A request that is not understood; its message goes back."""


def unpack_request(body: bytes) -> tuple[Tensor, list[str], list[dict]]:
    """Images (B, 3, H, W) in 0..1, prompts and metadata. Raises BadRequest."""
    try:
        request = json.loads(body)
        images, prompts = request["images"], request["prompts"]
        metadata = request.get("metadata") or [{}] * len(prompts)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BadRequest("expected JSON with 'images' and 'prompts'") from error
    lists = all(isinstance(value, list) for value in (images, prompts, metadata))
    if not lists or not len(images) == len(prompts) == len(metadata) > 0:
        raise BadRequest("expected as many 'images' as 'prompts' and 'metadata', at least one")
    if not all(isinstance(p, str) for p in prompts) or not all(isinstance(m, dict) for m in metadata):
        raise BadRequest("expected texts under 'prompts' and objects under 'metadata'")
    pictures = [_picture(data) for data in images]
    if len({picture.shape for picture in pictures}) > 1:
        raise BadRequest("expected 'images' of one size")
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255, prompts, metadata


def _picture(data: Any) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=["PNG"]) as image:
            if max(image.size) > SIDE:  # known before anything is unpacked
                raise BadRequest(f"expected 'images' of at most {SIDE} pixels on a side")
            return np.asarray(image.convert("RGB"))
    except BadRequest:
        raise
    except Exception as error:  # Pillow raises many kinds for what is no PNG
        raise BadRequest("expected base64 of PNG files under 'images'") from error


def make_server(reward: Reward, name: str, host: str, port: int, limit: int) -> ThreadingHTTPServer:
    """A server of one reward, to be run with `serve_forever`. limit: bytes of a request. Port 0: any that is free."""
    lock = threading.Lock()  # a reward is called from one thread at a time

    class Handler(BaseHTTPRequestHandler):
        timeout = 60  # seconds without a byte
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer(200, json.dumps({"reward": name}).encode())

        def do_POST(self) -> None:
            length = self.headers.get("Content-Length", "")
            if not length.isdecimal():
                return self.refuse(411, "expected a Content-Length")
            if int(length) > limit:
                return self.refuse(413, f"expected at most {limit} bytes")
            if self.path != "/score":
                return self.refuse(404, "expected POST /score")
            try:
                batch = unpack_request(self.rfile.read(int(length)))
            except BadRequest as error:
                return self.refuse(400, str(error))
            with lock:
                scores, lines = score(reward, *batch)
            if len(lines) == len(batch[1]):
                return self.refuse(500, lines[0])
            self.answer(200, pack_answer(scores, lines))

        def refuse(self, status: int, why: str) -> None:
            log.warning("%s %s: %d %s", self.command, self.path, status, why)
            self.close_connection = True  # what is left of the request is not read
            self.answer(status, json.dumps({"error": why}).encode())

        def answer(self, status: int, body: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Only what is refused is told."""

    return ThreadingHTTPServer((host, port), Handler)


@dataclass
class Serve:
    """Serve a reward over HTTP."""

    reward: Annotated[str, tyro.conf.Positional]
    """A name, several with weights, or "module:function", as for `star train --run.reward`."""
    models: dict[str, str] = field(default_factory=dict)
    """Where rewards find their weights, by name."""
    host: str = "127.0.0.1"
    port: int = 18085
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    limit: int = 256
    """MiB of a request."""


def main(arguments: list[str] | None = None) -> int:
    options = tyro.cli(Serve, args=arguments, prog="python -m star.rewards.serve")
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        reward = rewards.load(options.reward, options.models, options.device)
        server = make_server(reward, options.reward, options.host, options.port, options.limit << 20)
    except (ValueError, RewardError, OSError) as error:
        print(f"star: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    print(f"{options.reward} on http://{options.host}:{server.server_port}", flush=True)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
