"""gaussian_step in Triton: one launch, each element read and written once, every tensor in its own type.

Products are not contracted into fused multiply-adds: policy_loss makes the mean again that this stored, perhaps in
another implementation, and only with the same bits is the ratio of an unchanged policy exactly 1.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from star_kernels.checks import check_reach

BLOCK = 1024  # elements of a program
WARPS = 4


@triton.jit
def transition_mean(a, sample, b, velocity):
    """Mean of the step, in the type of its arguments. To be compiled without contraction."""
    return a * sample + b * velocity


@triton.jit
def step_kernel(
    sample,  # (B, elements), and what follows
    velocity,
    noise,
    a,  # (B,), and what follows
    b,
    s,
    prev_sample,
    mean,  # in the type of the arithmetic, float32 or float64
    stride_a,
    stride_b,
    stride_s,
    elements,
    BLOCK: tl.constexpr,
):
    kind: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    at = row * elements + i
    x = tl.load(sample + at, mask=inside).to(kind)
    v = tl.load(velocity + at, mask=inside).to(kind)
    z = tl.load(noise + at, mask=inside).to(kind)
    to = transition_mean(tl.load(a + row * stride_a).to(kind), x, tl.load(b + row * stride_b).to(kind), v)
    tl.store(mean + at, to, mask=inside)
    result = to + tl.load(s + row * stride_s).to(kind) * z
    if prev_sample.dtype.element_ty != tl.float64:
        result = result.to(tl.float32)  # as PyTorch rounds float64 to half precision, in two steps
    tl.store(prev_sample + at, result.to(prev_sample.dtype.element_ty), mask=inside)


def launch(sample: Tensor, velocity: Tensor, noise: Tensor, a: Tensor, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The operator star::gaussian_step_triton; see api.gaussian_step."""
    wide = torch.float64 in (sample.dtype, velocity.dtype)
    prev_sample = sample.new_empty(sample.shape)
    mean = sample.new_empty(sample.shape, dtype=torch.float64 if wide else torch.float32)
    if sample.numel() == 0:
        return prev_sample, mean
    batch, elements = sample.shape[0], sample.numel() // sample.shape[0]
    check_reach("sample", (batch,), (elements,))  # within a sample it counts in 64 bits
    with torch.cuda.device_of(sample):
        step_kernel[-(-elements // BLOCK), batch](  # triton.cdiv takes the host ten times as long
            sample.contiguous(),
            velocity.contiguous(),
            noise.contiguous(),
            a,
            b,
            s,
            prev_sample,
            mean,
            a.stride(0),
            b.stride(0),
            s.stride(0),
            elements,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return prev_sample, mean
