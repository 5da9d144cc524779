"""Several processes as one: who makes which images, what is gathered, and how all of them end together."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Literal, overload

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from star.config import Config, ConfigError
from star.rewards import Scores

# accelerate's words.
PRECISIONS = {"no": "no", "float16": "fp16", "bfloat16": "bf16"}
# How a metric of every process becomes one; the mean where nothing is said.
REDUCTIONS: dict[str, Any] = {
    "ratio_min": Tensor.amin,
    "ratio_max": Tensor.amax,
    "weights_uniform": Tensor.sum,
    "reward_failed": Tensor.sum,
    "memory_gib": Tensor.amax,
}


class LostProcess(RuntimeError):
    """Another process of the run is gone; the message is one line for the user."""


def make_accelerator(config: Config) -> Accelerator:
    """The process group is that of `accelerate launch`; without it there is one process."""
    for name in ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM"):
        if os.environ.get(name, "false").lower() in ("1", "true", "yes"):
            raise ConfigError(f"accelerate: {name} is set, but runs go on one process, DDP or FSDP2; unset it")
    return Accelerator(
        mixed_precision=PRECISIONS[config.optimization.mixed_precision],
        # Given as a number it would be overruled by the launcher's environment, which divides the gradients.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=timedelta(minutes=config.run.timeout_minutes)),
            DistributedDataParallelKwargs(
                broadcast_buffers=False,  # they are constants
                gradient_as_bucket_view=True,
                # The text stream of SD3's last block has no gradient; adapters are never there.
                find_unused_parameters=config.model.lora_rank == 0,
            ),
        ],
    )


def share_rows(images: int, updates: int, processes: int) -> Tensor:
    """(processes, b) int64: the images of an iteration that each process makes, a contiguous part of each update."""
    return torch.arange(images).view(updates, processes, -1).transpose(0, 1).flatten(1)


class Share:
    """Which of an iteration's images this process makes: an equal, contiguous part of each update.

    The micro batches are those of a single process, and a group may be spread over processes: rewards are gathered
    before its statistics are taken. rows: (b,) int64 rows among the iteration's images.
    """

    def __init__(self, accelerator: Accelerator, images: int, updates: int) -> None:
        self.accelerator = accelerator
        parts = share_rows(images, updates, accelerator.num_processes)
        self.rows = parts[accelerator.process_index]
        self.order = parts.flatten()

    def gather(self, x: Tensor) -> Tensor:
        """(b, ...) of this process -> (B, ...) of all of them, each row where it belongs."""
        if self.accelerator.num_processes == 1:
            return x
        gathered = self.accelerator.gather(x.to(self.accelerator.device).contiguous()).to(x.device)
        return torch.empty_like(gathered).index_copy_(0, self.order.to(x.device), gathered)

    def gather_scores(self, scores: Scores) -> Scores:
        """`gather` of what a reward said, with credits in the columns of the prompts' concepts (`matched_credits`).
        Masks stay with the process that made their images."""
        if self.accelerator.num_processes == 1:
            return scores
        # Where the reward failed for every image of a process, it said less than elsewhere.
        fields = {"reward_map": scores.reward_map, "credits": scores.credits}
        shapes = {name: tuple(x.shape[1:]) for name, x in fields.items() if x is not None}
        said = gather_object([(list(scores.details), list(scores.terms), shapes)])
        nothing = torch.full_like(scores.reward, torch.nan)

        def columns(values: dict[str, Tensor], which: int) -> dict[str, Tensor]:
            names = dict.fromkeys(name for one in said for name in one[which])
            return {name: self.gather(values.get(name, nothing)) for name in names}

        def array(name: str) -> Tensor | None:
            shape = next((one[2][name] for one in said if name in one[2]), None)
            if shape is None:
                return None
            own = fields[name]
            return self.gather(nothing.view(-1, *(1,) * len(shape)).expand(-1, *shape) if own is None else own)

        return Scores(
            self.gather(scores.reward),
            columns(scores.details, 0),
            reward_map=array("reward_map"),
            terms=columns(scores.terms, 1),
            credits=array("credits"),
        )

    def reduce(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of all processes in one; phases take as long as the slowest process."""
        if self.accelerator.num_processes == 1:
            return metrics
        everyone = gather_object([metrics])

        def one(name: str) -> float:
            values = torch.tensor([own[name] for own in everyone if name in own], dtype=torch.float64)
            return REDUCTIONS.get(name, Tensor.amax if name.startswith("seconds/") else Tensor.mean)(values).item()

        return {name: one(name) for name in dict.fromkeys(name for own in everyone for name in own)}


def on_main(accelerator: Accelerator, function: Callable[[], object]) -> None:
    """Run something on the first process only. If it fails there, the others end too, without a message."""
    error = None
    if accelerator.is_main_process:
        try:
            function()
        except Exception as caught:
            error = caught
    failed = [error is not None]
    if accelerator.num_processes > 1:
        broadcast_object_list(failed)
    if error is not None:
        raise error
    if failed[0]:
        raise SystemExit(1)


def is_lost_process(error: RuntimeError) -> bool:
    """Whether an error is a collective's: the backends raise it where another process has ended."""
    words = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe")
    return isinstance(error, torch.distributed.DistError) or any(word in str(error).lower() for word in words)


class Termination:
    """Remembers a signal that ends a process, in a `with` block, instead of dying of it, so that the run can save.

    SIGTERM (a scheduler), SIGINT (Ctrl-C), SIGHUP (a terminal that was closed) and SIGUSR1 (a warning ahead of the time
    limit). A second Ctrl-C interrupts at once. Only a main thread can hear them. received: the signal's name, or None.
    """

    SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1")

    def __init__(self) -> None:
        self.received: str | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Termination:
        if threading.current_thread() is threading.main_thread():
            for name in self.SIGNALS:
                number = getattr(signal, name, None)
                # One that is ignored, as under nohup, stays ignored.
                if number is not None and signal.getsignal(number) != signal.SIG_IGN:
                    self.previous[number] = signal.signal(number, self.handle)
        return self

    def handle(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received == "SIGINT":
            raise KeyboardInterrupt
        self.received = signal.Signals(number).name

    def __exit__(self, *error: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop: all of them stop after the same iteration."""
        if accelerator.num_processes == 1:
            return self.received is not None
        asked = self.received is not None
        return bool(accelerator.gather(torch.tensor([asked], device=accelerator.device)).any())


@overload
def full_tensor(x: Tensor, keep: Literal[True] = True) -> Tensor: ...
@overload
def full_tensor(x: Tensor, keep: bool) -> Tensor | None: ...
def full_tensor(x: Tensor, keep: bool = True) -> Tensor | None:
    """A possibly sharded tensor whole and on the CPU. A collective; keep=False takes part and returns None."""
    x = x.detach()
    whole = x.full_tensor() if isinstance(x, DTensor) else x
    return whole.cpu() if keep else None


def gather_again(module: torch.nn.Module) -> None:
    """Let the next pass gather the sharded weights: FSDP2 keeps those outside of the blocks whole until a backward
    pass, so that a pass after another one would not see what was written to the shards in between."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def shard_like(x: Tensor, parameter: Tensor) -> Tensor:
    """A whole tensor on the device of a parameter, and sharded as it is."""
    x = x.to(parameter.device)
    if not isinstance(parameter, DTensor):
        return x
    return distribute_tensor(x, parameter.device_mesh, parameter.placements)
