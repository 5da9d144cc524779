"""Rewards beside the rollout: one thread scores a batch of images while the next ones are made.

A thread, not a process: what rewards spend their time in (onnxruntime, torch, JPEG, the network) leaves the
interpreter's lock, images and the weights of a reward model stay where they are, and there is one CUDA context. On a
GPU the thread has a stream of its own. Scores do not depend on what runs beside them: one batch at a time, in order.

    with RewardWorker(reward, timeout=600) as worker:
        tickets = [worker.submit(decode(latents), prompts, metadata) for latents, prompts, metadata in chunks]
        scores = concatenate([ticket.result() for ticket in tickets])
        failures = worker.count_failures()

A reward that raises, returns None or NaN, takes too long or ends its thread does not end the run: it costs those images
their reward (NaN) and so their advantage. It is logged with its prompt, and counted.
"""

from __future__ import annotations

import collections
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from star.messages import one_line
from star.rewards import TERM, Metadata, Reward, RewardError, Scores, as_scores, call, concatenate, failed

log = logging.getLogger("star")
HUNG = 3  # batches from which a reward does not return before the run ends
LOGGED = 5  # failures of one batch that are logged one by one


Outcome = tuple[Scores, list[str]]
"""Scores of a batch, NaN where the reward failed, and one line for each failure, naming the prompt."""


def score(reward: Reward, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Outcome:
    """Score a batch, whatever the reward does.

    If the batch raises, its images are scored one by one, so that one bad prompt costs one image. An interrupt from the
    keyboard passes in the main thread, where it is the user's.
    """
    count = len(prompts)
    try:
        with torch.no_grad():
            scores = as_scores(call(reward, images, prompts, metadata), count, images.shape[-2:])
    except RewardError as error:
        return failed(count), [f"{one_line(error)}; prompts from {_quoted(prompts[0])} on"] * count
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise
        if count == 1:
            return _failed_prompt(error, prompts)
        rows = [slice(i, i + 1) for i in range(count)]
        parts = [score(reward, images[row], prompts[row], metadata[row]) for row in rows]
        return concatenate([part for part, _ in parts]), [line for _, lines in parts for line in lines]
    finite = torch.isfinite(scores.reward)
    bad = (~finite).nonzero().flatten().tolist()
    lines = [_missing_number(scores, i, prompts) for i in bad]
    known = torch.where(finite, scores.reward, torch.nan)
    field, credits = scores.reward_map, scores.credits
    if field is not None:
        field = torch.where(finite.view(-1, 1, 1), field, torch.nan)
    if credits is not None:
        credits = torch.where(finite.view(-1, 1), credits, torch.nan)
    return replace(scores, reward=known, reward_map=field, credits=credits), lines


def _missing_number(scores: Scores, row: int, prompts: Sequence[str]) -> str:
    """The line for an image for which a reward returned None, NaN or an infinity."""
    names = [repr(name) for name, value in scores.terms.items() if not value[row].isfinite()]
    source = f" from {', '.join(names)}" if names else ""
    which = f" (image {row + 1} of {len(prompts)})" if len(prompts) > 1 else ""
    return (
        f"reward: got {scores.reward[row].item()}{source} for the prompt {_quoted(prompts[row])}{which}; "
        "the image does not count, return a number if it should"
    )


def _failed_prompt(error: BaseException, prompts: Sequence[str]) -> Outcome:
    notes = [f" {one_line(note)}" for note in getattr(error, "__notes__", ()) if note.startswith(TERM)]
    term = notes[-1] if notes else ""
    line = f"reward: {type(error).__name__}{term} ({one_line(error)}) for the prompt {_quoted(prompts[0])}"
    return failed(len(prompts)), [line] * len(prompts)


def _quoted(prompt: str) -> str:
    return repr(one_line(prompt, 200))


class Ticket:
    """A batch on its way."""

    def __init__(self, worker: RewardWorker, batch: tuple) -> None:
        self.worker, self.batch = worker, batch
        self.done, self.started = threading.Event(), 0.0
        self.outcome: Outcome | None = None

    def settle(self, outcome: Outcome) -> None:
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
        strict: raise RewardError at the first image whose reward fails instead of going on without it.

    Raises:
        RewardError: from `Ticket.result`, if strict, or if the reward did not return from several batches.
    """

    def __init__(self, reward: Reward, timeout: float | None = None, strict: bool = False) -> None:
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout: got {timeout}, expected seconds above 0")
        self.reward, self.timeout, self.strict = reward, timeout, strict
        self.waiting: collections.deque[Ticket] = collections.deque()  # its first may be in work; guarded by `changed`
        self.changed = threading.Condition()
        self.thread: threading.Thread | None = None
        self.hung, self.failures, self.closed = 0, 0, False
        self.scored, self.first_line = False, ""  # whether any image has had a reward; the first failure

    def submit(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Ticket:
        """Queue B images (B, 3, H, W) in 0..1. They must not be changed afterwards."""
        if self.closed:
            raise RewardError("reward: its worker is closed")
        metadata = [{} for _ in prompts] if metadata is None else list(metadata)
        if not len(images) == len(prompts) == len(metadata):
            raise ValueError(
                f"prompts: got {len(prompts)} prompts and {len(metadata)} metadata for {len(images)} images"
            )
        ready = torch.cuda.current_stream(images.device).record_event() if images.is_cuda else None
        ticket = Ticket(self, (images, list(prompts), metadata, ready))
        with self.changed:
            self.waiting.append(ticket)
            self.changed.notify_all()
            if self.thread is None:
                self._start()
        return ticket

    def accept(self, scores: Scores, lines: list[str]) -> Scores:
        """Log and count the failures, or raise."""
        self.scored = self.scored or len(lines) < len(scores.reward)
        if lines and self.strict:
            raise RewardError(lines[0])
        self.failures += len(lines)
        for line in dict.fromkeys(lines[:LOGGED]):
            self.first_line = self.first_line or line
            log.warning("%s", line)
        if len(lines) > LOGGED:
            log.warning("reward: failed for %d more images of this batch", len(lines) - LOGGED)
        return scores

    def count_failures(self, scored_elsewhere: bool = False) -> int:
        """Images whose reward failed since the last call, once an iteration. Raises RewardError if the reward has
        failed for every image so far: nothing could be learned. scored_elsewhere: another process has scored some."""
        self.scored = self.scored or scored_elsewhere
        if self.failures and not self.scored:
            raise RewardError(f"{self.first_line}; it failed for every image")
        count, self.failures = self.failures, 0
        return count

    def look_after(self) -> None:
        """Give up a batch that takes too long, and its thread with it: a thread cannot be stopped from outside. Go on
        with another thread, too, if the reward ended this one."""
        with self.changed:
            ticket = self.waiting[0] if self.waiting and self.waiting[0].started else None
            if self.thread is not None and not self.thread.is_alive():
                if ticket is not None:
                    self._give_up(ticket, "ended its thread in")
                self._start()
            elif ticket is not None and self.timeout and time.monotonic() - ticket.started >= self.timeout:
                what = f"took longer than {self.timeout:g} s for"
                if self.hung + 1 == HUNG:
                    raise RewardError(f"{self._complaint(ticket, what)}, like {HUNG - 1} batches before it")
                self.hung += 1
                self._give_up(ticket, what)
                self._start()

    def _complaint(self, ticket: Ticket, what: str) -> str:
        return f"reward: {what} the batch of the prompt {_quoted(ticket.batch[1][0])}"

    def _give_up(self, ticket: Ticket, what: str) -> None:
        count = len(ticket.batch[1])
        ticket.settle((failed(count), [self._complaint(ticket, what)] * count))
        self.waiting.popleft()

    def _start(self) -> None:
        self.thread = threading.Thread(target=self._run, name="star-reward", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        me = threading.current_thread()
        streams: dict[torch.device, torch.cuda.Stream] = {}  # of this thread
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.waiting or self.closed or self.thread is not me)
                if not self.waiting or self.thread is not me:
                    return
                ticket = self.waiting[0]  # stays there until it is settled, so that it is not lost with this thread
                ticket.started = time.monotonic()
                batch = ticket.batch
            try:
                outcome = self._score(streams, *batch)
            except BaseException as error:  # not the reward's own, which `score` has caught: a GPU's, for example
                outcome = _failed_prompt(error, batch[1])
            with self.changed:
                if self.thread is not me:  # given up: another thread goes on
                    return
                ticket.settle(outcome)
                self.waiting.popleft()

    def _score(self, streams: dict, images: Tensor, prompts: list, metadata: list, ready: torch.cuda.Event) -> Outcome:
        if ready is None:
            return score(self.reward, images, prompts, metadata)
        if images.device not in streams:
            streams[images.device] = torch.cuda.Stream(images.device)
        stream = streams[images.device]
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            images.record_stream(stream)
            return score(self.reward, images, prompts, metadata)

    def close(self) -> None:
        """Let the thread end after what is waiting."""
        with self.changed:
            self.closed = True
            self.changed.notify_all()

    def __enter__(self) -> RewardWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
