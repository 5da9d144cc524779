"""Reads concept maps out of a transformer while it runs, without changing a bit of what it computes.

    with capture(transformer, tokens) as maps:
        transformer(...)
    weights = star_kernels.allocate(maps.read(), maps.grid)

`record` does the same around a whole sampler and keeps the maps of every pass; `allocated` makes weights of them at
once and gives them to the gradient of the pass's output.

The attention of the chosen blocks runs as it would (`star.tap`); its kernel also returns the log-sum-exp, from which
the maps follow with the few key columns of the concepts. The table `star.layouts` says where image and text lie. A
checkpointed block may be captured. A backward pass outside the context recomputes it with diffusers' own processor,
which saves the same tensors in the same order.
"""

from __future__ import annotations

from star.capture.blocks import capture
from star.capture.drop_in import Record, allocated, record
from star.capture.maps import Maps

__all__ = ["Maps", "Record", "allocated", "capture", "record"]
