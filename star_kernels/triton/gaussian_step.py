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
def normal_pair(first, second):
    """Two standard normals, float32, of two words, in the steps of `reference.normal_pair`."""
    bits = (first | 1).to(tl.float32).to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = ((bits >> 23) - 32).to(tl.float32)
    x = ((bits & 0x7FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    square = x * x
    log = tl.full(x.shape, -0.076344930, tl.float32)
    log = log * x + 0.12761575
    log = log * x - 0.13160183
    log = log * x + 0.14201759
    log = log * x - 0.16623357
    log = log * x + 0.20001227
    log = log * x - 0.25000820
    log = log * x + 0.33333331
    log = x * square * log - 0.5 * square + exponent * -2.1219444e-4
    log = x + log + exponent * 0.693359375
    radius = tl.sqrt_rn(-2.0 * log)
    turns = (second + 0x20000000) >> 30
    angle = (second - (turns << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 1.4629181e-9
    z = angle * angle
    sine = tl.full(z.shape, 2.7557319e-6, tl.float32)
    sine = sine * z - 1.9841270e-4
    sine = sine * z + 8.333334e-3
    sine = sine * z - 0.16666667
    sine = angle * z * sine + angle
    cosine = tl.full(z.shape, -2.7557319e-7, tl.float32)
    cosine = cosine * z + 2.4801587e-5
    cosine = cosine * z - 1.3888889e-3
    cosine = cosine * z + 4.1666667e-2
    cosine = z * z * cosine - 0.5 * z + 1.0
    is_odd = (turns & 1) != 0
    along, across = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    along = tl.where(((turns + 1) & 2) != 0, -along, along)
    return radius * along, radius * tl.where((turns & 2) != 0, -across, across)


@triton.jit
def normals(seed, first, BLOCK: tl.constexpr):
    """(BLOCK,) standard normals, float32: a sample's elements from `first` on, int64, a multiple of 4."""
    group = first // 4 + tl.arange(0, BLOCK // 4)
    low, high = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    none = low * 0
    w0, w1, w2, w3 = tl.philox(seed, low, high, none, none)
    n0, n1 = normal_pair(w0, w1)
    n2, n3 = normal_pair(w2, w3)
    return tl.reshape(tl.join(tl.join(n0, n2), tl.join(n1, n3)), (BLOCK,))


@triton.jit
def step_kernel(
    sample,  # (B, elements), and what follows
    velocity,
    unconditional_velocity,  # or None
    noise,  # or None
    seeds,  # (B,) int64, or None
    a,  # (B,), and what follows
    b,
    s,
    prev_sample,
    mean,  # in the type of the arithmetic, float32 or float64
    stride_a,
    stride_b,
    stride_s,
    elements,
    guidance_scale: tl.float64,
    BLOCK: tl.constexpr,
):
    kind: tl.constexpr = mean.dtype.element_ty
    row = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    i = first + tl.arange(0, BLOCK)
    inside = i < elements
    at = row * elements + i
    x = tl.load(sample + at, mask=inside).to(kind)
    v = tl.load(velocity + at, mask=inside).to(kind)
    if unconditional_velocity is not None:
        u = tl.load(unconditional_velocity + at, mask=inside).to(kind)
        v = u + tl.full((), guidance_scale, kind) * (v - u)
    to = transition_mean(tl.load(a + row * stride_a).to(kind), x, tl.load(b + row * stride_b).to(kind), v)
    tl.store(mean + at, to, mask=inside)
    result = to
    if seeds is not None:
        result += tl.load(s + row * stride_s).to(kind) * normals(tl.load(seeds + row), first, BLOCK).to(kind)
    elif noise is not None:
        result += tl.load(s + row * stride_s).to(kind) * tl.load(noise + at, mask=inside).to(kind)
    if prev_sample.dtype.element_ty != tl.float64:
        result = result.to(tl.float32)  # as PyTorch rounds float64 to half precision, in two steps
    tl.store(prev_sample + at, result.to(prev_sample.dtype.element_ty), mask=inside)


def dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def launch(
    sample: Tensor,
    velocity: Tensor,
    noise: Tensor | None,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    unconditional_velocity: Tensor | None = None,
    guidance_scale: float = 1.0,
    seeds: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator star::gaussian_step_triton; see api.gaussian_step."""
    velocities = (velocity,) if unconditional_velocity is None else (velocity, unconditional_velocity)
    wide = torch.float64 in (sample.dtype, *(v.dtype for v in velocities))
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
            dense(unconditional_velocity),
            dense(noise),
            dense(seeds),
            a,
            b,
            s,
            prev_sample,
            mean,
            a.stride(0),
            b.stride(0),
            s.stride(0),
            elements,
            guidance_scale,
            BLOCK=BLOCK,
            num_warps=WARPS,
            enable_fp_fusion=False,
        )
    return prev_sample, mean
