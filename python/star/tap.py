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
import operator
import textwrap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType, FunctionType
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from star_kernels.api import autocasts

try:
    from diffusers.models import attention_dispatch
except ImportError:  # before diffusers 0.35, where every processor calls F.scaled_dot_product_attention
    attention_dispatch = None

PARALLEL = "splits its sequence or its heads over devices; each would make maps of a part: run the captured pass on one"


class Observer(Protocol):
    """Who is told of the attention calls of a processor."""

    def sees(self, query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None, lse: Tensor | None) -> None:
        """query, key: (B, H, S, D) and (B, H', S', D). mask, scale: as the call had them. lse: (B, H, S) float32, or
        with padding behind, where the kernel gave it."""


# The kernels of F.scaled_dot_product_attention that diffusers' backends ask for by name, or whichever it chooses.
# Their `return_lse` serves sequence parallelism alone: without it they raise.
SDPA_BACKENDS: dict[str, SDPBackend | None] = {
    "native": None,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
}
FLASH, EFFICIENT, CUDNN = 1, 2, 3  # as torch._fused_sdp_choice numbers them


def sdpa_only(kernel: SDPBackend | None) -> AbstractContextManager[Any]:
    """Inside the context F.scaled_dot_product_attention has that kernel alone; None: those that it has."""
    return nullcontext() if kernel is None else sdpa_kernel(kernel)


@torch.compiler.assume_constant_result
def traced_choice(
    device: torch.device, dtype: torch.dtype, width: int, requires_grad: bool, only: SDPBackend | None
) -> int:
    """torch._fused_sdp_choice where torch.compile traces, which cannot follow it: asked on real tensors outside the
    graph, once for each graph, as PyTorch itself chooses when it compiles the call."""
    sample = torch.empty(1, 8, 256, width, device=device, dtype=dtype, requires_grad=requires_grad)
    with sdpa_only(only):
        return torch._fused_sdp_choice(sample, sample, sample)


def attention_with_lse(
    query: Tensor, key: Tensor, value: Tensor, scale: float | None = None, only: SDPBackend | None = None
) -> tuple[Tensor, Tensor | None]:
    """F.scaled_dot_product_attention with the bits it would have, and the log-sum-exp of its rows where it has one.

    query, key, value: (B, H, S, D). only: the kernel it is restricted to. Returns (output, lse (B, H, S) or padded, or
    None).
    """
    if torch.compiler.is_compiling():
        requires_grad = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
        width = operator.index(query.shape[-1])  # a constant, where all sizes are symbols too
        choice = traced_choice(query.device, query.dtype, width, requires_grad, only)
    elif only is None:
        choice = torch._fused_sdp_choice(query, key, value, scale=scale)
    else:
        with sdpa_only(only):
            choice = torch._fused_sdp_choice(query, key, value, scale=scale)
    # The flash kernels take head widths in multiples of 8; F.scaled_dot_product_attention pads others itself.
    if choice == FLASH and query.device.type == "cpu":
        return torch._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    if choice == FLASH and query.shape[-1] % 8 == 0:
        return torch._scaled_dot_product_flash_attention(query, key, value, scale=scale)[:2]
    if choice == EFFICIENT:
        return torch._scaled_dot_product_efficient_attention(query, key, value, None, True, scale=scale)[:2]
    if choice == CUDNN:
        out, lse, *_ = torch._scaled_dot_product_cudnn_attention(query, key, value, None, True, scale=scale)
        return out, lse.flatten(2)  # it has a trailing axis of 1
    with sdpa_only(only):
        return F.scaled_dot_product_attention(query, key, value, scale=scale), None


def _cast(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As F.scaled_dot_product_attention casts under autocast, which the kernels below it do not."""
    device = query.device.type
    if not autocasts(device):
        return query, key, value
    dtype = torch.get_autocast_dtype(device)
    query, key, value = (x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value))
    return query, key, value


def active_backend(backend: Any) -> str:
    """The name of an attention backend of diffusers, of the active one for None."""
    active = attention_dispatch._AttentionBackendRegistry.get_active_backend()[0] if backend is None else backend
    return getattr(active, "value", active)


class LseArgument(NamedTuple):
    """How a backend of diffusers gives its log-sum-exp."""

    name: str
    """The argument that asks for it."""
    layout: str
    """Of what it gives, a key of LSE_LAYOUTS."""


# (lse, B, H, S) -> (B, H, S) or padded behind. flash-attn has the first, its third version and those made for sequence
# parallelism the second, the variants for packed sequences the third.
LSE_LAYOUTS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "BHS": lambda lse, batch, heads, length: lse.flatten(2),
    "BSH": lambda lse, batch, heads, length: lse.flatten(2).transpose(1, 2),
    "HBS": lambda lse, batch, heads, length: lse.view(heads, batch, length).transpose(0, 1),
}


@functools.cache
def probed_lse_argument(
    backend: Any, run: Callable, device: torch.device, dtype: torch.dtype, width: int
) -> LseArgument | None:
    """What a small attention shows of the log-sum-exp that a backend offers; None where it gives none that is right.

    Asked once for each kind of call, since nothing says what a backend returns: layouts differ, some ignore the
    argument, some raise without sequence parallelism, and a kernel might count in another base or leave out the scale.
    run: the backend's function.
    """
    parameters = inspect.signature(run).parameters
    name = next((name for name in ("return_lse", "return_attn_probs") if name in parameters), None)
    if name is None:
        return None
    batch, heads, length = 2, 3, 40
    cpu: Any = {"generator": torch.Generator().manual_seed(0), "device": "cpu"}  # whatever the default device is
    query, key, value = torch.randn(3, batch, length, heads, width, **cpu)
    query = query * torch.rand(batch, length, heads, 1, **cpu) * 3  # so that no two rows are alike
    query, key, value = (x.to(device, dtype) for x in (query, key, value))
    expected = torch.logsumexp(torch.einsum("bihd,bjhd->bhij", query.double(), key.double()) * width**-0.5, -1)
    try:
        with torch.no_grad():
            plain = attention_dispatch.dispatch_attention_fn(query, key, value, backend=backend)
            out, lse = attention_dispatch.dispatch_attention_fn(
                query, key, value, attention_kwargs={name: True}, backend=backend
            )
            if not isinstance(lse, Tensor) or not torch.equal(out, plain):
                return None
    except Exception:  # backends raise whatever they like where they have no log-sum-exp, or not for such tensors
        return None
    for layout, arrange in LSE_LAYOUTS.items():
        try:
            found = arrange(lse, batch, heads, length)
        except (RuntimeError, IndexError):  # another shape
            continue
        fits = found.shape[:2] == (batch, heads) and found.shape[2] >= length
        # Quantized scores are off by a percent or so, another layout or base by whole units.
        if fits and (found[..., :length].double() - expected).abs().max() < 0.2:
            return LseArgument(name, layout)
    return None


@torch.compiler.assume_constant_result
def lse_argument(backend: str, device: torch.device, dtype: torch.dtype, width: int) -> LseArgument | None:
    """`probed_lse_argument`, outside of the graph where torch.compile traces."""
    name = attention_dispatch.AttentionBackendName(backend)
    run = attention_dispatch._AttentionBackendRegistry._backends[name]
    return probed_lse_argument(name, run, device, dtype, width)


class Tapped:
    """The two attention calls of a tapped processor."""

    star_observer: Observer

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles are of the processor, which nobody observes."""
        plain: Any = object.__new__(type(self).__mro__[2])
        vars(plain).update({name: value for name, value in vars(self).items() if name != "star_observer"})
        return plain.__reduce_ex__(protocol)

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
        if attn_mask is None and dropout_p == 0 and not is_causal and not enable_gqa:
            query, key, value = _cast(query, key, value)
            out, lse = attention_with_lse(query, key, value, scale)
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
        if parallel_config is not None:
            raise TypeError(f"transformer: {PARALLEL}")
        name = active_backend(backend)
        plain = attn_mask is None and dropout_p == 0 and not is_causal and not enable_gqa
        heads_first = query.transpose(1, 2), key.transpose(1, 2)
        if plain and name in SDPA_BACKENDS:
            only = SDPA_BACKENDS[name]
            query, key, value = _cast(*heads_first, value.transpose(1, 2))
            if only is SDPBackend.CUDNN_ATTENTION:  # as diffusers does for it
                query, key, value = query.contiguous(), key.contiguous(), value.contiguous()
            out, lse = attention_with_lse(query, key, value, scale, only)
            self.star_observer.sees(query, key, None, scale, lse)
            return out.transpose(1, 2)
        asked = lse_argument(name, query.device, query.dtype, query.shape[-1]) if plain else None
        attention_kwargs = dict(attention_kwargs or {}) | ({} if asked is None else {asked.name: True})
        out = attention_dispatch.dispatch_attention_fn(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs, backend=backend
        )
        lse = None
        if asked is not None:
            out, lse = out
            lse = LSE_LAYOUTS[asked.layout](lse, query.shape[0], query.shape[2], query.shape[1])
        if isinstance(attn_mask, Tensor) and attn_mask.ndim == 2 and attn_mask.shape == (query.shape[0], key.shape[1]):
            attn_mask = attn_mask[:, None, None]  # of the keys, which diffusers reads so
        self.star_observer.sees(*heads_first, attn_mask, scale, lse)
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


class Untappable(TypeError):
    """A processor whose attention call cannot be seen. Its words follow the processor's name and end in what to do."""


OTHERS = "set the processor that the model came with"


@functools.cache
def _tapped_class(kind: type) -> type | Untappable:
    """A subclass whose source has the calls of Tapped, or why there is none."""
    run = kind.__call__
    if issubclass(kind, torch.nn.Module):
        return Untappable(f"has weights and attention of its own, as IP-Adapters do; unload it, or {OTHERS}")
    if not isinstance(run, FunctionType) or run.__closure__:
        return Untappable(f"has a __call__ that is no plain function; {OTHERS}")
    try:
        lines, first = inspect.getsourcelines(run)
    except OSError:
        return Untappable(f"has no source that can be read; define it in a file, or {OTHERS}")
    (function,) = ast.parse(textwrap.dedent("".join(lines))).body
    if not isinstance(function, ast.FunctionDef) or function.decorator_list:
        return Untappable(f"has a __call__ that is no plain function; {OTHERS}")
    calls = _OwnCalls(function.args.args[0].arg)
    calls.visit(function)
    if not calls.found:
        return Untappable(f"calls neither dispatch_attention_fn nor F.scaled_dot_product_attention itself; {OTHERS}")
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
    if isinstance(kind, Untappable):
        raise TypeError(f"a {type(processor).__name__} {kind}")
    copy: Any = object.__new__(kind)
    vars(copy).update(vars(processor), star_observer=observer)
    return copy
