"""Reward servers and requests for the tests of both sides."""

import http.client
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

from star.rewards import Scores, serve
from star.rewards.remote import Remote


@contextmanager
def running(server):
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Script(BaseHTTPRequestHandler):
    """Answers what its server's `script` says, one entry a request; the last one again and again."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        script, self.server.asked = self.server.script, self.server.asked + 1
        status, body, delay = script[min(self.server.asked, len(script)) - 1]
        self.send_response(status)
        self.end_headers()
        for byte in body if delay == "trickle" else [body]:
            try:
                self.wfile.write(bytes([byte]) if delay == "trickle" else byte)
                self.wfile.flush()
            except OSError:
                return
            time.sleep(0.05 if delay == "trickle" else delay)

    def log_message(self, *_):
        pass


def local(reward, limits=1 << 20, token=None):
    return running(serve.make_server(reward, "test", "127.0.0.1", 0, limits, token))


def rich(images, prompts, metadata):
    if "raise" in prompts:
        raise RuntimeError("no")
    offset = torch.tensor([float(m.get("offset", 0)) for m in metadata])
    values = images.mean((1, 2, 3)) + offset
    values[[p == "nan" for p in prompts]] = torch.nan
    return Scores(values, {"length": torch.tensor([float(len(p)) for p in prompts])}, images[:, 0], images[:, 1])


@contextmanager
def scripted(*script):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Script)
    server.script, server.asked = script, 0
    with running(server) as url:
        yield server, url


GOOD = json.dumps({"reward": [0.25, None]}).encode()


ASK = (torch.rand(2, 3, 2, 2), ["a", "b"], [{}, {}])


def quick(url, **options):
    return Remote(url, "far", backoff=0.01, timeout=options.pop("timeout", 60.0), **options)


def post(url, body, path="/score", headers=None):
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", path, body, headers or {})
    response = connection.getresponse()
    return response.status, json.loads(response.read())
