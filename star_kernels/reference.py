"""The operators in plain PyTorch: the specification of what they compute, and the oracle of every test.

Float64 inputs are computed in float64, everything else in float32. Arguments are checked in api.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

LOG_RATIO_LIMIT = 30.0  # exp(30) = 1e13: far beyond any clip range, far from float32's overflow at 88
# In the order in which policy_loss returns them; api.Statistics has what they mean.
STATISTICS = (
    "approx_kl",
    "clip_fraction",
    "clip_fraction_low",
    "clip_fraction_high",
    "ratio_mean",
    "ratio_min",
    "ratio_max",
    "kl",
    "nonfinite",
)
# In the order in which nft_loss returns them; api.NFTStatistics has what they mean.
NFT_STATISTICS = (
    "positive_loss",
    "negative_loss",
    "positive_error",
    "negative_error",
    "old_deviation",
    "old_deviation_max",
    "kl",
    "nonfinite",
)


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float64 if any tensor is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def attention_maps(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None,
    lse: Tensor | None,
    scale: float,
    head_weight: Tensor | None,
    key_bias: Tensor | None,
) -> Tensor:
    """m[b,g,i] = sum_h head_weight[h] sum_k weight[b,g,k] exp(scale q_i . k_j + bias_j - lse_i), j = index[b,g,k]; see
    api.attention_maps."""
    dtype = compute_dtype(query, key)
    batch, heads, queries, width = query.shape
    groups, columns = concept_index.shape[1:]
    used = concept_index >= 0
    weight = used.to(dtype) if concept_weight is None else concept_weight.to(dtype).masked_fill(~used, 0.0)
    outside = (concept_index < -1) | (concept_index >= key.shape[2])
    weight = weight.masked_fill(outside, torch.nan)
    there = (used & ~outside).view(batch, 1, groups * columns)
    index = concept_index.masked_fill(outside | ~used, 0).view(batch, groups * columns, 1).expand(-1, -1, width)
    bias = None if key_bias is None else key_bias.to(dtype)[:, None]  # (B, 1, S)
    shared = heads // max(key.shape[1], 1)  # neighboring heads have one key head
    total = torch.zeros(batch, queries, groups * columns, dtype=dtype, device=query.device)
    # One head at a time: all of them would hold the matrix that the operator avoids. Without keys no slot is used.
    for head in range(heads if key.shape[2] else 0):
        q, k = query[:, head].to(dtype), key[:, head // shared].to(dtype)
        scores = q @ k.gather(1, index).transpose(1, 2) * scale  # (B, N, G*K)
        if bias is not None:
            scores = scores + bias.gather(2, index[..., 0][:, None])
        if lse is None:
            every = q @ k.transpose(1, 2) * scale
            norm = torch.logsumexp(every if bias is None else every + bias, -1)
            norm = norm.masked_fill(norm == torch.inf, torch.nan)  # an infinite score leaves no softmax
        else:
            norm = lse[:, head, :queries].reshape(batch, queries).to(dtype)
        probability = torch.where(norm[..., None] == -torch.inf, 0.0, torch.exp(scores - norm[..., None]))
        total += probability * (1 / heads if head_weight is None else head_weight[head].to(dtype))
    total = total.where(there, 0.0)  # of an unused slot: it must not bring 0 * nan
    return (total.view(batch, queries, groups, columns) * weight[:, None]).sum(-1).transpose(1, 2).contiguous()


def write_attention_maps(
    query: Tensor,
    key: Tensor,
    concept_index: Tensor,
    concept_weight: Tensor | None,
    lse: Tensor | None,
    scale: float,
    head_weight: Tensor | None,
    key_bias: Tensor | None,
    first_row: int,
    first_query: int,
    out: Tensor,
) -> None:
    """`attention_maps` into out (B, G, N): of the B rows of query, key and lse from first_row on and of their N queries
    from first_query on. The other arguments are those of the B rows."""
    rows, queries = slice(first_row, first_row + out.shape[0]), slice(first_query, first_query + out.shape[2])
    query, key, lse = query[rows, :, queries], key[rows], None if lse is None else lse[rows, :, queries]
    out.copy_(attention_maps(query, key, concept_index, concept_weight, lse, scale, head_weight, key_bias))


def allocate(
    maps: Tensor,
    rows: int,
    columns: int,
    combine: str,
    smooth: float,
    sharpen: float,
    cap: float,
    mix: float,
    patch: int,
) -> Tensor:
    """Maps (B, G, frames*rows*columns) to weights (B, frames*rows*patch, columns*patch) of mean 1; see api.allocate."""
    dtype = compute_dtype(maps)
    maps = maps.to(dtype)
    mean = maps.mean(-1, dtype=torch.float64).to(dtype)  # (B, G)
    present = mean > 0
    healthy = ((maps >= 0) & maps.isfinite()).all(-1).all(-1) & mean.isfinite().all(-1) & present.any(-1)  # (B,)
    relative = torch.where(present[..., None], maps / mean[..., None], 0.0)
    if combine == "mean":
        field = relative.sum(1) / present.sum(1, keepdim=True)
    else:
        field = relative.amax(1) if maps.shape[1] else relative.sum(1)
    if smooth > 0:
        frames = field.unflatten(1, (maps.shape[2] // (rows * columns), rows, columns))
        field = (smoothing(rows, smooth).to(field) @ frames @ smoothing(columns, smooth).to(field).T).flatten(1)
    if sharpen != 1:
        field = (field / field.amax(-1, keepdim=True)) ** sharpen  # the largest value cancels, but would overflow
    field = (field / field.mean(-1, keepdim=True)).clamp(max=cap)
    weights = (1 - mix) + mix * field
    weights = weights / weights.mean(-1, keepdim=True)
    weights = torch.where(healthy[:, None], weights, 1.0).unflatten(1, (maps.shape[2] // columns, columns))
    return weights.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def smoothing(size: int, sigma: float) -> Tensor:
    """Matrix (size, size) of a Gaussian along one axis, radius ceil(3 sigma), each row renormalized to sum 1."""
    position = torch.arange(size, dtype=torch.float64)
    distance = position[:, None] - position
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= math.ceil(min(3 * sigma, size)))
    return kernel / kernel.sum(1, keepdim=True)


def gaussian_step(
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
    """(prev_sample in sample's type, mean in float32 or float64); see api.gaussian_step."""
    dtype = compute_dtype(sample, velocity, unconditional_velocity)
    shape = (-1, *(1,) * (sample.ndim - 1))
    a, b, s = (field.to(dtype).view(shape) for field in (a, b, s))
    v = velocity.to(dtype)
    if unconditional_velocity is not None:
        u = unconditional_velocity.to(dtype)
        v = u + guidance_scale * (v - u)
    mean = (a * sample.to(dtype) + b * v).contiguous()
    if seeds is not None:
        noise = normals(seeds, math.prod(sample.shape[1:])).view(sample.shape)
    if noise is None:  # a copy: an operator's results share no memory
        return mean.to(sample.dtype, copy=True), mean
    return (mean + s * noise.to(dtype)).to(sample.dtype).contiguous(), mean


WORD = 0xFFFFFFFF
# Of ln(1 + x) = x - x^2 / 2 + x^3 * polynomial(x), x from sqrt(1/2) - 1 to sqrt(2) - 1, the highest power first: fitted
# so that the largest relative error is the least, 6e-9.
LOGARITHM = (
    -0.076344930,
    0.12761575,
    -0.13160183,
    0.14201759,
    -0.16623357,
    0.20001227,
    -0.25000820,
    0.33333331,
)
SINE = (1 / 362880, -1 / 5040, 1 / 120, -1 / 6)
COSINE = (-1 / 3628800, 1 / 40320, -1 / 720, 1 / 24)


def polynomial(coefficients: tuple[float, ...], x: Tensor) -> Tensor:
    """By Horner's scheme, the highest power first."""
    value = torch.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + coefficient
    return value


def philox(seeds: Tensor, counters: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 bits, each (B, N) int64, of the keys seeds (B,) and counters (N,), both int64.

    Source: Philox4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    key = [(seeds & WORD)[:, None], (seeds >> 32 & WORD)[:, None]]
    zero = torch.zeros_like(counters)[None]
    words = ((counters & WORD)[None], (counters >> 32 & WORD)[None], zero, zero)
    for _ in range(10):
        # What is beyond 64 bits of a product wraps around to a sign, which the masks take off.
        first, second = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = (
            (second >> 32 & WORD) ^ words[1] ^ key[0],
            second & WORD,
            (first >> 32 & WORD) ^ words[3] ^ key[1],
            first & WORD,
        )
        key = [key[0] + 0x9E3779B9 & WORD, key[1] + 0xBB67AE85 & WORD]
    return words


def normal_pair(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals, float32, of two words: a radius and an angle (Box and Muller 1958).

    Made of sums, products and a square root alone, which every device rounds alike: the bits are the same everywhere.
    """
    # The word times 2^-32 is 2^exponent * (1 + x).
    bits = (first | 1).float().view(torch.int32) - 0x3F3504F3
    exponent = ((bits >> 23) - 32).float()
    x = ((bits & 0x7FFFFF) + 0x3F3504F3).view(torch.float32) - 1
    square = x * x
    log = x * square * polynomial(LOGARITHM, x) - 0.5 * square + exponent * -2.1219444e-4  # ln 2 in two parts
    log = x + log + exponent * 0.693359375
    radius = (-2 * log).double().sqrt().float()  # PyTorch's own root of float32 may be off by a rounding
    # The angle is a number of quarter turns and a rest of at most half of one.
    turns = (second + 0x20000000 & WORD) >> 30
    rest = (second - (turns << 30) & WORD) - ((second - (turns << 30) & 0x80000000) << 1)
    angle = rest.float() * 1.4629181e-9  # pi / 2 * 2^-30
    z = angle * angle
    sine = angle * z * polynomial(SINE, z) + angle
    cosine = z * z * polynomial(COSINE, z) - 0.5 * z + 1
    is_odd = (turns & 1).bool()
    along, across = torch.where(is_odd, sine, cosine), torch.where(is_odd, cosine, sine)
    signs = [torch.where((turns + shift & 2).bool(), -1.0, 1.0) for shift in (1, 0)]
    return radius * (signs[0] * along), radius * (signs[1] * across)


def normals(seeds: Tensor, count: int) -> Tensor:
    """(B, count) float32 standard normals of seeds (B,) int64."""
    words = philox(seeds, torch.arange((count + 3) // 4, device=seeds.device))
    pairs = (*normal_pair(*words[:2]), *normal_pair(*words[2:]))
    return torch.stack(pairs, -1).flatten(1)[:, :count]


def policy_loss(
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    precision: Tensor,
    log_norm: Tensor,
    kl_precision: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    old_mean: Tensor | None,
    old_log_prob: Tensor | None,
    reference_velocity: Tensor | None,
    step_weights: Tensor | None,
    ratio: str,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    kl_coef: float,
    guard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), statistics (9,) in the order of STATISTICS, log_ratio of the units; see api.policy_loss.

    log_ratio: (B,), or (B, P) for ratio "location", with P locations; what policy_loss_gradient needs of this pass.
    """
    dtype = compute_dtype(velocity, sample, prev_sample)
    v, x, next_x = (_pixels(tensor, dtype) for tensor in (velocity, sample, prev_sample))
    a, b, s, precision, log_norm, kl_precision = (
        field.to(dtype)[:, None] for field in (a, b, s, precision, log_norm, kl_precision)
    )
    mean = a[..., None] * x + b[..., None] * v
    residual = next_x - mean  # (B, C, P)
    if old_mean is not None:
        old_mean = _pixels(old_mean, dtype)
        if guard:
            delta = 2 * precision * s * ((next_x - old_mean) * (mean - old_mean)).mean(1)
        else:
            # Algebraically log p - log p_old, without the cancellation of subtracting two squared errors.
            delta = ((mean - old_mean) * (residual + (next_x - old_mean))).mean(1) * precision
    else:
        assert old_log_prob is not None  # one of the two is given
        delta = -residual.square().mean(1) * precision - log_norm - _rows(old_log_prob, dtype)
    nonfinite = (~delta.isfinite()).sum()

    w = _weights(weights, v)
    if ratio == "location":
        log_ratio = delta  # (B, P)
    else:
        of_ratio = w * delta if ratio == "sample" else delta
        log_ratio = of_ratio.mean(1, dtype=torch.float64).to(dtype)  # (B,)
    limited = limited_ratio(_rows(log_ratio, dtype))
    unit, excess, _ = limited
    adv = _advantages(advantages, adv_clip, step_weights, precision, kl_precision, guard)
    value, _ = surrogate(limited, adv, clip_low, clip_high)
    # Sums are taken in float64: those of float32 overflow long before their mean does.
    loss = (value if ratio == "sample" else w * value).expand(delta.shape).mean(dtype=torch.float64)
    kl = torch.zeros((), dtype=torch.float64, device=x.device)
    if reference_velocity is not None:
        difference = b[..., None] * (v - _pixels(reference_velocity, dtype))
        kl = (difference.square().mean((1, 2), dtype=torch.float64) * kl_precision[:, 0]).mean()
        loss = loss + kl_coef * kl

    unit, excess = unit.double(), excess.double()
    low, high = (excess < -clip_low).double().mean(), (excess > clip_high).double().mean()
    statistics = torch.stack(
        [
            0.5 * unit.square().mean(),
            low + high,
            low,
            high,
            1 + excess.mean(),
            1 + excess.min(),
            1 + excess.max(),
            kl,
            nonfinite.double(),
        ]
    ).to(torch.float32)
    return loss.to(dtype), statistics, log_ratio


def policy_loss_gradient(
    grad_loss: Tensor,
    log_ratio: Tensor,
    velocity: Tensor,
    sample: Tensor,
    prev_sample: Tensor,
    a: Tensor,
    b: Tensor,
    s: Tensor,
    precision: Tensor,
    log_norm: Tensor,
    kl_precision: Tensor,
    advantages: Tensor,
    weights: Tensor | None,
    old_mean: Tensor | None,
    old_log_prob: Tensor | None,
    reference_velocity: Tensor | None,
    step_weights: Tensor | None,
    ratio: str,
    clip_low: float,
    clip_high: float,
    adv_clip: float,
    kl_coef: float,
    guard: bool,
) -> Tensor:
    """Gradient of the velocity, in its type, for the gradient () of the loss. log_ratio: as policy_loss returned it.

    Everything else is what policy_loss took; old_mean is read under `guard` alone, log_norm and old_log_prob never.
    """
    dtype = compute_dtype(velocity, sample, prev_sample)
    v, next_x = _pixels(velocity, dtype), _pixels(prev_sample, dtype)
    batch, channels, count = v.shape
    a, b, s, precision, kl_precision = (field.to(dtype)[:, None] for field in (a, b, s, precision, kl_precision))
    # The derivative of a location's log-ratio by the velocity is slope * direction.
    slope = 2 * precision * b / channels
    if guard:
        assert old_mean is not None  # which the guard needs
        slope = slope * s
        direction = next_x - _pixels(old_mean, dtype)
    else:
        direction = next_x - (a[..., None] * _pixels(sample, dtype) + b[..., None] * v)
    adv = _advantages(advantages, adv_clip, step_weights, precision, kl_precision, guard)
    _, force = surrogate(limited_ratio(_rows(log_ratio, dtype)), adv, clip_low, clip_high)
    grad_loss = grad_loss.to(dtype)
    # In every ratio: the derivative of the loss by a location's log-ratio, times B * P.
    per_location = (_weights(weights, v) * force).expand(batch, count)
    gradient = (per_location * (slope / (batch * count) * grad_loss))[:, None] * direction
    if reference_velocity is not None:
        factor = 2 * kl_coef * kl_precision * b * b / (batch * channels * count) * grad_loss
        gradient = gradient + factor[..., None] * (v - _pixels(reference_velocity, dtype))
    gradient = gradient.transpose(1, 2) if velocity.ndim == 3 else gradient
    return gradient.reshape(velocity.shape).to(velocity.dtype).contiguous()  # whatever strides the latents have


def policy_loss_with_gradient(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, log_ratio) of policy_loss, which takes the same, and policy_loss_gradient of 1."""
    loss, statistics, log_ratio = policy_loss(velocity, *rest)
    return loss, statistics, log_ratio, policy_loss_gradient(torch.ones_like(loss), log_ratio, velocity, *rest)


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    sample: Tensor,
    clean: Tensor,
    sigma: Tensor,
    reward_prob: Tensor,
    weights: Tensor | None,
    reference_velocity: Tensor | None,
    beta: float,
    adaptive: bool,
    adaptive_min: float,
    adv_clip: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss (), statistics (8,) in the order of NFT_STATISTICS, mean absolute errors (B, 2); see api.nft_loss.

    errors: of the positive and of the negative branch; what nft_loss_gradient needs of this pass.
    """
    dtype = compute_dtype(velocity, sample, clean)
    deviation, positive, negative = nft_errors(velocity, old_velocity, sample, clean, sigma, beta)
    # Means are taken in float64: the sums of float32 overflow long before their mean does.
    errors = torch.stack([error.abs().mean((1, 2), dtype=torch.float64) for error in (positive, negative)], 1).to(dtype)
    sizes = (errors.clamp_min(adaptive_min) if adaptive else torch.ones_like(errors)).double()
    w, r = _weights(weights, positive)[:, None], _rows(reward_prob, dtype)[:, None]
    positive_loss = ((w * r * positive.square()).mean((1, 2), dtype=torch.float64) / sizes[:, 0]).mean()
    negative_loss = ((w * (1 - r) * negative.square()).mean((1, 2), dtype=torch.float64) / sizes[:, 1]).mean()
    loss = adv_clip / beta * (positive_loss + negative_loss)
    kl = torch.zeros((), dtype=torch.float64, device=velocity.device)
    if reference_velocity is not None:
        difference = _pixels(velocity, dtype) - _pixels(reference_velocity, dtype)
        kl = difference.square().mean(dtype=torch.float64)
        loss = loss + kl_coef * kl
    squares = deviation.square()
    nonfinite = (~(positive.isfinite() & negative.isfinite())).any(1).sum()
    statistics = torch.stack(
        [
            positive_loss,
            negative_loss,
            *errors.mean(0, dtype=torch.float64),
            squares.mean(dtype=torch.float64),
            squares.max().double(),
            kl,
            nonfinite.double(),
        ]
    ).to(torch.float32)
    return loss.to(dtype), statistics, errors


def nft_loss_gradient(
    grad_loss: Tensor,
    errors: Tensor,
    velocity: Tensor,
    old_velocity: Tensor,
    sample: Tensor,
    clean: Tensor,
    sigma: Tensor,
    reward_prob: Tensor,
    weights: Tensor | None,
    reference_velocity: Tensor | None,
    beta: float,
    adaptive: bool,
    adaptive_min: float,
    adv_clip: float,
    kl_coef: float,
) -> Tensor:
    """Gradient of the velocity, in its type, for the gradient () of the loss. errors: as nft_loss returned them.

    Everything else is what nft_loss took.
    """
    dtype = compute_dtype(velocity, sample, clean)
    _, positive, negative = nft_errors(velocity, old_velocity, sample, clean, sigma, beta)
    sizes = errors.clamp_min(adaptive_min) if adaptive else torch.ones_like(errors)
    w, r = _weights(weights, positive), _rows(reward_prob, dtype)
    up, down = w * r / sizes[:, :1], w * (1 - r) / sizes[:, 1:]
    grad_loss = grad_loss.to(dtype)
    share = 2 * adv_clip / positive.numel() * sigma.to(dtype) * grad_loss  # beta cancels
    gradient = share[:, None, None] * (down[:, None] * negative - up[:, None] * positive)
    if reference_velocity is not None:
        pull = 2 * kl_coef / positive.numel() * grad_loss
        gradient = gradient + pull * (_pixels(velocity, dtype) - _pixels(reference_velocity, dtype))
    gradient = gradient.transpose(1, 2) if velocity.ndim == 3 else gradient
    return gradient.reshape(velocity.shape).to(velocity.dtype).contiguous()


def nft_loss_with_gradient(velocity: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, statistics, errors) of nft_loss, which takes the same, and nft_loss_gradient of 1."""
    loss, statistics, errors = nft_loss(velocity, *rest)
    return loss, statistics, errors, nft_loss_gradient(torch.ones_like(loss), errors, velocity, *rest)


def nft_errors(
    velocity: Tensor, old_velocity: Tensor, sample: Tensor, clean: Tensor, sigma: Tensor, beta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(velocity - old velocity, error of the positive branch, of the negative one), each (B, C, P).

    A branch's error is that of its prediction of the clean latents: the old policy's, and what the policy has moved,
    once for and once against.
    """
    dtype = compute_dtype(velocity, sample, clean)
    v, old, x, x0 = (_pixels(tensor, dtype) for tensor in (velocity, old_velocity, sample, clean))
    sigma = sigma.to(dtype)[:, None, None]
    deviation = v - old
    error, moved = x - sigma * old - x0, sigma * beta * deviation
    return deviation, error - moved, error + moved


def limited_ratio(log_ratio: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(limited log-ratio, ratio - 1, whether it was inside of the limit); NaN for a log-ratio that is not finite."""
    inside = log_ratio.abs() <= LOG_RATIO_LIMIT
    limited = torch.where(log_ratio.isfinite(), log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), torch.nan)
    return limited, torch.expm1(limited), inside  # near 1 float32 resolves ratio - 1 far better than the ratio


def surrogate(
    ratio: tuple[Tensor, Tensor, Tensor], adv: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, Tensor]:
    """(max(-A ratio, -A clip(ratio)), its derivative by the log-ratio). ratio: as limited_ratio returns it."""
    _, excess, inside = ratio
    plain = -adv * (1 + excess)
    value = torch.maximum(plain, -adv * (1 + excess.clamp(-clip_low, clip_high)))
    # Where the clipped branch is the larger one the ratio carries no gradient. The edges belong to the inside.
    gate = torch.where(adv >= 0, excess <= clip_high, excess >= -clip_low) & inside
    return value, torch.where(gate | value.isnan(), plain, 0.0)


def _pixels(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Latents in the type of the arithmetic, (B, C, P)."""
    tensor = tensor.to(dtype)
    return tensor.transpose(1, 2) if tensor.ndim == 3 else tensor.flatten(2)


def _rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """One value per sample, (B,), or per location, to (B, 1) or (B, P)."""
    return tensor.to(dtype).reshape(tensor.shape[0], -1)


def _weights(weights: Tensor | None, v: Tensor) -> Tensor:
    """(B, P), or a one (1, 1) without weights. v: (B, C, P) in the type of the arithmetic."""
    return v.new_ones(1, 1) if weights is None else _rows(weights, v.dtype)


def _advantages(
    advantages: Tensor,
    adv_clip: float,
    step_weights: Tensor | None,
    precision: Tensor,
    kl_precision: Tensor,
    guard: bool,
) -> Tensor:
    """As the surrogate takes them, (B, 1) or (B, P). precision, kl_precision: (B, 1) in the type of the arithmetic."""
    adv = _rows(advantages, precision.dtype).clamp(-adv_clip, adv_clip)
    if step_weights is not None:
        adv = adv * _rows(step_weights, precision.dtype)
    return adv * (precision / kl_precision) if guard else adv
