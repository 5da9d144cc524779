"""The compiled extension, or the reason why there is none."""

from __future__ import annotations

try:
    from star_kernels import _C

    REASON: str | None = None
except ImportError as error:
    _C = None
    REASON = f"star_kernels._C could not be imported ({error}); reinstall with a C++ compiler"


def build_info() -> dict[str, str]:
    """How the extension was built: instruction sets compiled and the one in use."""
    return dict(_C.build_info()) if _C is not None else {}
