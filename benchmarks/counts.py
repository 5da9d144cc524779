"""What a call does, whatever the mood of the machine: operators, their bytes and FLOPs, allocations, instructions."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count


class Counts(NamedTuple):
    """operators: called by PyTorch's dispatcher, views left out; what a call of C++ does inside is not seen. bytes: of
    their tensors, each read and each written once; see `moved`. flops: of products and attention. allocations: of
    PyTorch's allocator, inside of operators too. allocated: their bytes. None where a compiled graph does not show
    it."""

    operators: int | None
    bytes: int | None
    flops: int | None
    allocations: int
    allocated: int


def _attention(query, key, value, *_, out_val=None, **__) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(gradient, query, key, value, *_, out_val=None, **__) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


FLOPS = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


# They work in place and do not look at what is there.
OVERWRITES = ("copy_", "fill_", "zero_", "normal_", "uniform_", "random_", "bernoulli_", "exponential_")


def moved(func: torch._ops.OpOverload, args: tuple, kwargs: dict, result: object) -> int:
    """Bytes that an operator reads and writes. A tensor that it changes in place is read and written, once each; one
    that it only writes, `out` or the target of one of OVERWRITES, is written alone."""
    named = zip(func._schema.arguments, args, strict=False)
    given = [
        *named,
        *((argument, kwargs[argument.name]) for argument in func._schema.arguments if argument.name in kwargs),
    ]
    changed, read = [], []
    for argument, value in given:
        is_changed = argument.alias_info is not None and argument.alias_info.is_write
        (changed if is_changed else read).extend(x for x in tree_leaves(value) if isinstance(x, torch.Tensor))
    name = func._schema.name.rpartition("::")[2]
    if name.endswith("_") and name not in OVERWRITES:
        read += changed
    known = {id(x) for x in changed}
    made = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor) and id(x) not in known]
    return sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in [*read, *changed, *made])


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators = self.bytes = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns):
            self.operators += 1
            self.bytes += moved(func, args, kwargs, result)
        if count := FLOPS.get(func._overloadpacket):
            self.flops += count(*args, **kwargs, out_val=result)
        return result


def counts(call: Callable[[], object], compiled: bool = False) -> Counts:
    """Of one call, which is made twice. compiled: with torch.compile, which under a dispatch mode would run eagerly now
    and, for that code, ever after."""
    shown: tuple[int | None, ...] = (None, None, None)
    if not compiled:
        with Operators() as seen:
            call()
        shown = (seen.operators, seen.bytes, seen.flops)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    events = profiled.profiler.kineto_results.events()
    sizes = [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
    return Counts(*shown, len(sizes), sum(sizes))


def page_faults() -> int:
    """Of this process since it began, those that read no disk: a page of memory was new to it."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


SYSTEM_CALL = {"x86_64": 298, "aarch64": 241}  # perf_event_open
INSTRUCTIONS = (0, 1)  # PERF_TYPE_HARDWARE, PERF_COUNT_HW_INSTRUCTIONS


class PerfCounter:
    """A counter of the kernel over this thread and those that it starts later. reads None where it may not, or the
    machine has none: virtual ones seldom do."""

    def __init__(self, kind: int, event: int) -> None:
        number = SYSTEM_CALL.get(platform.machine())
        self.descriptor = -1
        if number is None or platform.system() != "Linux":
            return
        # struct perf_event_attr: type, size, config, sample_period, sample_type, read_format, then flags.
        inherit, exclude_kernel, exclude_hypervisor = 1 << 1, 1 << 5, 1 << 6
        attributes = ctypes.create_string_buffer(128)
        flags = inherit | exclude_kernel | exclude_hypervisor
        struct.pack_into("IIQQQQQ", attributes, 0, kind, len(attributes), event, 0, 0, 0, flags)
        self.descriptor = ctypes.CDLL(None).syscall(number, attributes, 0, -1, -1, 0)

    def read(self) -> int | None:
        return None if self.descriptor < 0 else struct.unpack("Q", os.read(self.descriptor, 8))[0]
