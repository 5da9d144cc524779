"""Lets somebody see the attention call of a processor of diffusers, without a copy of its code.

    attn.processor = tapped(attn.processor, observer)

Every processor ends in diffusers' dispatch_attention_fn or in F.scaled_dot_product_attention. A tapped one runs the
processor's own source in which these calls are methods of its own: they call the attention with the bits it would have
had, and tell the observer. So nothing is patched for others, two models in two threads do not meet, and torch.compile
sees plain functions without side effects: all blocks share one graph, checkpointed or not.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
from types import CodeType, FunctionType
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from star_kernels.api import autocasts

try:
    from diffusers.models import attention_dispatch
except ImportError:  # before diffusers 0.35, where every processor calls F.scaled_dot_product_attention
    attention_dispatch = None


class Observer(Protocol):
    """Who is told of the attention calls of a processor."""

    def sees(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None) -> None:
        """query, key: (B, H, S, D) and (B, H', S', D). mask, scale: as the call had them. lse: (B, H, S) float32, or
        with trailing axes and padding, where the kernel gave it."""


def attention_with_lse(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor | None]:
    """F.scaled_dot_product_attention with the bits it would have, and the log-sum-exp of its rows where it has one.

    query, key, value: (B, H, S, D). Returns (output, lse (B, H, S) or padded, or None).
    """
    aten = torch.ops.aten
    device = query.device.type
    if not torch.compiler.is_compiling():
        choice = SDPBackend(torch._fused_sdp_choice(query, key, value))
    elif device == "cpu":
        choice = SDPBackend.FLASH_ATTENTION  # the only fused kernel there
    else:
        choice = SDPBackend.MATH  # the choice cannot be traced: leave it to PyTorch and let the operator make the LSE
    # The flash kernels take head widths in multiples of 8; F.scaled_dot_product_attention pads others itself.
    if choice == SDPBackend.FLASH_ATTENTION and device == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value)[:2]
    if choice == SDPBackend.FLASH_ATTENTION and query.shape[-1] % 8 == 0:
        return aten._scaled_dot_product_flash_attention(query, key, value)[:2]
    if choice == SDPBackend.EFFICIENT_ATTENTION:
        return aten._scaled_dot_product_efficient_attention(query, key, value, None, True)[:2]
    if choice == SDPBackend.CUDNN_ATTENTION:
        return aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)[:2]
    return F.scaled_dot_product_attention(query, key, value), None


def _cast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """As F.scaled_dot_product_attention casts under autocast, which the kernels below it do not."""
    device = tensors[0].device.type
    if not autocasts(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def runs_natively(backend: Any) -> bool:
    """Whether an attention backend of diffusers, None for the active one, is F.scaled_dot_product_attention."""
    native = attention_dispatch.AttentionBackendName.NATIVE
    active = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    return active == native or active == native.value


class Tapped:
    """The two attention calls of a tapped processor."""

    star_observer: Observer

    def star_scaled_dot_product_attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """F.scaled_dot_product_attention."""
        lse = None
        if attn_mask is None and dropout_p == 0 and not is_causal and scale is None and not enable_gqa:
            query, key, value = _cast(query, key, value)
            out, lse = attention_with_lse(query, key, value)
        else:
            grouped: dict[str, Any] = {"enable_gqa": True} if enable_gqa else {}  # torch 2.4 has none
            options = dict(attn_mask=attn_mask, dropout_p=dropout_p, is_causal=is_causal, scale=scale, **grouped)
            out = F.scaled_dot_product_attention(query, key, value, **options)
        self.star_observer.sees(query, key, attn_mask, scale, lse)
        return out

    def star_dispatch_attention_fn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
        attention_kwargs: dict[str, Any] | None = None,
        *,
        backend: Any = None,
        parallel_config: Any = None,
    ) -> Tensor:
        """diffusers' dispatch_attention_fn. query, key, value: (B, S, H, D)."""
        if attn_mask is None and runs_natively(backend):
            query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
            out = self.star_scaled_dot_product_attention(
                query, key, value, None, dropout_p, is_causal, scale, enable_gqa
            )
            return out.transpose(1, 2)
        # Older versions have no parallel_config.
        parallel = {} if parallel_config is None else {"parallel_config": parallel_config}
        out = attention_dispatch.dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
            backend=backend, **parallel,
        )  # fmt: skip
        self.star_observer.sees(query.transpose(1, 2), key.transpose(1, 2), attn_mask, scale, None)
        return out


class _OwnCalls(ast.NodeTransformer):
    """Makes the two attention calls methods of the function's first argument."""

    def __init__(self, owner: str) -> None:
        self.owner, self.found = owner, False

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        name = getattr(node.func, "attr", getattr(node.func, "id", None))
        if hasattr(Tapped, f"star_{name}"):
            owner = ast.Name(self.owner, ast.Load())
            node.func = ast.copy_location(ast.Attribute(owner, f"star_{name}", ast.Load()), node.func)
            ast.fix_missing_locations(node.func)
            self.found = True
        return node


@functools.cache
def _tapped_class(kind: type) -> type | None:
    """A subclass whose source has the calls of Tapped; None where the processor's own has no attention call."""
    run = kind.__call__
    if not isinstance(run, FunctionType) or run.__closure__ or issubclass(kind, torch.nn.Module):
        return None
    try:
        lines, first = inspect.getsourcelines(run)
    except OSError:
        return None
    (function,) = ast.parse(textwrap.dedent("".join(lines))).body
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return None
    calls = _OwnCalls(function.args.args[0].arg)
    calls.visit(function)
    if not calls.found:
        return None
    # Tracebacks and debuggers show the lines of the processor's file.
    module = compile(ast.Module([ast.increment_lineno(function, first - 1)], []), run.__code__.co_filename, "exec")
    code = next(one for one in module.co_consts if isinstance(one, CodeType) and one.co_name == run.__name__)
    own = FunctionType(code, run.__globals__, run.__name__, run.__defaults__)
    own.__kwdefaults__ = run.__kwdefaults__
    return type(kind.__name__, (Tapped, kind), {"__call__": own, "__module__": kind.__module__})


def tapped(processor: Any, observer: Observer) -> Any:
    """The processor, with the state that it has at this moment, whose attention calls the observer sees.

    Raises TypeError for one whose source has none of the two calls, or cannot be read."""
    kind = _tapped_class(type(processor))  # type: ignore[arg-type]  # mypy takes no class for hashable
    if kind is None:
        raise TypeError(
            f"a {type(processor).__name__} calls neither dispatch_attention_fn nor F.scaled_dot_product_attention "
            "itself; set the processor that the model came with"
        )
    copy: Any = object.__new__(kind)
    vars(copy).update(vars(processor), star_observer=observer)
    return copy
