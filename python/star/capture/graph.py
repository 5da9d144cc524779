"""What a compiled graph knows of a capture: a number, by which it finds what lives outside of it.

torch.compile burns what it finds on an object into the graph: sizes, offsets, every tensor's shape. With a number,
whose value is not looked at, nothing of a prompt is in the graph, and nothing is compiled again for another prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch._C import _functorch as functorch

from star.layouts import Pass

_numbers = itertools.count()
_by_number: WeakValueDictionary[int, Any] = WeakValueDictionary()


def numbered(value: Any) -> Tensor:
    """(1,) int64 on the CPU: the number by which a graph finds a value that lives outside of it."""
    number = next(_numbers)
    _by_number[number] = value
    return torch.tensor([number], device="cpu")


def outside(value: Any) -> Any:
    """A tensor, or a list with some, without the wrappers of torch.func's transforms.

    Raises TypeError for one that torch.func.vmap has taken the batch of."""
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        return type(value)(map(outside, value))
    while isinstance(value, Tensor) and functorch.is_functorch_wrapped_tensor(value):
        if functorch.is_batchedtensor(value):
            raise TypeError(
                "transformer: got a pass under torch.func.vmap, which hides its batch; call it with the whole batch"
            )
        value = functorch.get_unwrapped(value)
    return value


def in_backward() -> bool:
    """True while autograd runs, as in the recomputation of a checkpointed block."""
    return torch._C._current_graph_task_id() >= 0


# What torch.compile sees. Both are said to change the number, so that neither is left out nor comes out of order.
@torch.library.custom_op("star::begin_pass", mutates_args=("number",))
def begin_pass(
    number: Tensor,
    latents: Sequence[Tensor],
    stacked_latents: bool,
    embeds: Sequence[Tensor],
    stacked_embeds: bool,
    tokens: int,
    grid: Sequence[int],
    image: int,
    text: int,
    text_keys: Tensor | None,
    keys: int,
) -> None:
    shown = Pass(
        latents[0] if stacked_latents else latents,
        embeds[0] if stacked_embeds else embeds,
        tokens,
        tuple(grid) or None,
        image,
        text if text_keys is None else text_keys,
        None if keys < 0 else keys,
    )
    _by_number[int(number)].begin(shown)


@torch.library.custom_op("star::observe_attention", mutates_args=("number",))
def observe_attention(
    number: Tensor, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None
) -> None:
    if not in_backward():  # when the observer may be gone
        _by_number[int(number)].write(query, key, mask, scale, lse)


@begin_pass.register_fake
def _(*_: Any) -> None:
    return None


@observe_attention.register_fake
def _(*_: Any) -> None:
    return None
