"""Rewards beside the rollout: one thread scores a batch of pictures while the next ones are made.

A thread, not a process: what rewards spend their time in (onnxruntime, torch, JPEG, the network) leaves the
interpreter's lock, pictures and the weights of a reward model stay where they are, and there is one CUDA context. On a
GPU the thread has a stream of its own. Scores do not depend on what runs beside them: one batch at a time, in order.

    with RewardWorker(reward, timeout=600) as worker:
        tickets = [worker.submit(decode(latents), prompts, metadata) for latents, prompts, metadata in chunks]
        scores = concatenate([ticket.result() for ticket in tickets])
        failures = worker.count_failures()

A reward that raises, returns NaN or takes too long does not end the run: it costs those pictures their reward (NaN,
and with it their advantage), is told with its prompt, and counted.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from star.rewards import Metadata, Reward, RewardError, Scores, as_scores, concatenate, failed

log = logging.getLogger("star")
HUNG = 3  # batches from which a reward does not return before the run ends
TOLD = 5  # failures of one batch that are told one by one


def score(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> tuple[Scores, list[str]]:
    """Scores of a batch, NaN where the reward failed, and one line for each failure, naming the prompt.

    If the batch raises, its pictures are scored one by one, so that one bad prompt costs one picture.
    """
    try:
        with torch.no_grad():
            scores = as_scores(reward(images, prompts, metadata), len(prompts))
    except RewardError as error:
        return failed(len(prompts)), [f"{error}; prompts from {prompts[0]!r} on"] * len(prompts)
    except (Exception, SystemExit) as error:
        if len(prompts) == 1:
            return failed(1), [f"reward: {type(error).__name__} ({_line(error)}) for the prompt {prompts[0]!r}"]
        rows = [slice(i, i + 1) for i in range(len(prompts))]
        parts = [score(reward, images[row], prompts[row], metadata[row]) for row in rows]
        return concatenate([part for part, _ in parts]), [line for _, lines in parts for line in lines]
    finite = torch.isfinite(scores.reward)
    bad = (~finite).nonzero().flatten().tolist()
    lines = [f"reward: got {scores.reward[i].item()} for the prompt {prompts[i]!r}" for i in bad]
    known = torch.where(finite, scores.reward, torch.nan)
    field = scores.reward_map
    if field is not None:
        field = torch.where(finite.view(-1, 1, 1), field, torch.nan)
    return replace(scores, reward=known, reward_map=field), lines


def _line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


class Ticket:
    """A batch on its way."""

    def __init__(self, worker: RewardWorker, batch: tuple) -> None:
        self.worker, self.batch = worker, batch
        self.done, self.started = threading.Event(), 0.0
        self.outcome: tuple[Scores, list[str]] | None = None

    def settle(self, outcome: tuple[Scores, list[str]]) -> None:
        """The first outcome counts: a batch that timed out stays failed when its reward returns after all."""
        if self.outcome is None:
            self.outcome, self.batch = outcome, ()
            self.done.set()

    def result(self) -> Scores:
        """Wait for the scores. Raises RewardError as RewardWorker says."""
        while not self.done.wait(0.05 if self.worker.timeout is None else min(0.05, self.worker.timeout / 4)):
            self.worker.look_after()
        assert self.outcome is not None  # it is done
        return self.worker.accept(*self.outcome)


class RewardWorker:
    """Scores batches in a thread.

    Args:
        reward: any Reward; called from one thread at a time (after a time-out its last call may still be running).
        timeout: seconds for a batch, from its beginning; None: no limit.
        strict: raise RewardError at the first picture whose reward fails instead of going on without it.

    Raises:
        RewardError: from `Ticket.result`, if strict, or if the reward did not return from several batches.
    """

    def __init__(self, reward: Reward, timeout: float | None = None, strict: bool = False) -> None:
        if timeout is not None and timeout <= 0:
            raise ValueError(f"timeout: got {timeout}, expected seconds above 0")
        self.reward, self.timeout, self.strict = reward, timeout, strict
        self.waiting: queue.SimpleQueue[Ticket | None] = queue.SimpleQueue()
        self.current: Ticket | None = None
        self.thread: threading.Thread | None = None
        self.lock = threading.Lock()
        self.hung, self.failures, self.closed = 0, 0, False
        self.scored, self.first_line = False, ""  # whether any picture has had a reward; the first failure

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Ticket:
        """Queue B pictures (B, 3, H, W) in 0..1. They must not be changed afterwards."""
        if self.closed:
            raise RewardError("reward: its worker is closed")
        metadata = [{} for _ in prompts] if metadata is None else list(metadata)
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"prompts: got {len(prompts)} prompts and {len(metadata)} metadata for {len(images)} images"
            )
        ready = torch.cuda.current_stream(images.device).record_event() if images.is_cuda else None
        ticket = Ticket(self, (images, list(prompts), metadata, ready))
        self.waiting.put(ticket)
        if self.thread is None:
            self._start()
        return ticket

    def accept(self, scores: Scores, lines: list[str]) -> Scores:
        """Tell and count what failed, or raise."""
        self.scored = self.scored or len(lines) < len(scores.reward)
        if lines and self.strict:
            raise RewardError(lines[0])
        self.failures += len(lines)
        for line in dict.fromkeys(lines[:TOLD]):
            self.first_line = self.first_line or line
            log.warning("%s", line)
        if len(lines) > TOLD:
            log.warning("reward: failed for %d more pictures of this batch", len(lines) - TOLD)
        return scores

    def count_failures(self) -> int:
        """Pictures whose reward failed since the last call, once an iteration. Raises RewardError if the reward has
        failed for every picture so far: nothing could be learned."""
        if self.failures and not self.scored:
            raise RewardError(f"{self.first_line}; it failed for every picture")
        count, self.failures = self.failures, 0
        return count

    def look_after(self) -> None:
        """Give up a batch that takes too long, and its thread with it: a thread cannot be stopped from outside."""
        with self.lock:
            ticket = self.current
            if ticket is None or self.timeout is None or time.monotonic() - ticket.started < self.timeout:
                return
            prompts = ticket.batch[1]
            line = f"reward: took longer than {self.timeout:g} s for the batch of the prompt {prompts[0]!r}"
            if self.hung + 1 == HUNG:
                raise RewardError(f"{line}, like {HUNG - 1} batches before it")
            self.hung += 1
            ticket.settle((failed(len(prompts)), [line] * len(prompts)))
            self._start()

    def _start(self) -> None:
        self.current = None
        self.thread = threading.Thread(target=self._run, name="star-reward", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        me, stream = threading.current_thread(), None
        while (ticket := self.waiting.get()) is not None:
            with self.lock:
                ticket.started, self.current = time.monotonic(), ticket
            images, prompts, metadata, ready = ticket.batch
            if ready is None:
                outcome = score(self.reward, images, prompts, metadata)
            else:
                stream = stream or torch.cuda.Stream(images.device)
                with torch.cuda.stream(stream):
                    stream.wait_event(ready)
                    images.record_stream(stream)
                    outcome = score(self.reward, images, prompts, metadata)
            with self.lock:
                ticket.settle(outcome)
                if self.thread is not me:  # given up: another thread goes on
                    return
                self.current = None

    def close(self) -> None:
        """Let the thread end after what is waiting."""
        self.closed = True
        self.waiting.put(None)

    def __enter__(self) -> RewardWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
