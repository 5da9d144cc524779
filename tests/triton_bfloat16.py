"""Makes bfloat16 right in Triton's interpreter: to be imported after TRITON_INTERPRET=1 is set, before any kernel.

The interpreter keeps bfloat16 as raw 16-bit integers, so that tl.dot multiplies bit patterns, and it rounds float32 to
bfloat16 by truncation, where hardware rounds to nearest even.
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def to_bits(value: np.ndarray) -> np.ndarray:
    """float32 to the bits of bfloat16, to nearest even."""
    bits = np.ascontiguousarray(value, dtype=np.float32).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(value), np.uint16(0x7FC0), rounded).reshape(value.shape)


def from_bits(bits: np.ndarray) -> np.ndarray:
    return (np.asarray(bits).astype(np.uint32) << 16).view(np.float32)


def widened(handle: TensorHandle) -> np.ndarray:
    """The values of a floating tensor in float32: products of two narrow values are exact there."""
    is_bfloat16 = handle.dtype.scalar == tl.bfloat16
    return from_bits(handle.data) if is_bfloat16 else handle.data.astype(np.float32)


convert_before = interpreter._convert_float
dot_before = InterpreterBuilder.create_dot


def convert(value, source, target, rounding):
    if source == tl.float32 and target == tl.bfloat16:
        return to_bits(value).reshape(value.shape)
    if source == tl.bfloat16 and target == tl.float32:
        return from_bits(value).view(np.uint32).reshape(value.shape)
    return convert_before(value, source, target, rounding)


def dot(self, a, b, accumulator, *rest):
    if {a.dtype.scalar, b.dtype.scalar} & {tl.bfloat16, tl.float16}:
        return TensorHandle(np.matmul(widened(a), widened(b)) + accumulator.data, accumulator.dtype.scalar)
    return dot_before(self, a, b, accumulator, *rest)


interpreter._convert_float = convert
InterpreterBuilder.create_dot = dot
