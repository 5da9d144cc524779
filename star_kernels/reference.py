"""The operators in plain PyTorch: the specification of what they compute, and the oracle of every test.

Float64 inputs are computed in float64, everything else in float32. Arguments are checked in api.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from star_kernels.transition import channel_dim

LOG_RATIO_LIMIT = 30.0  # exp(30) = 1e13: far beyond any clip range, far from float32's overflow at 88
TOP_SHARE = 0.1  # the top decile of the weights, in `gradient_share`


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
) -> Tensor:
    """m[b,g,i] = sum_h head_weight[h] sum_k weight[b,g,k] exp(scale q_i . k_index - lse_i); see api.attention_maps."""
    dtype = compute_dtype(query, key)
    batch, heads, queries, width = query.shape
    groups, columns = concept_index.shape[1:]
    used = concept_index >= 0
    weight = used.to(dtype) if concept_weight is None else concept_weight.to(dtype) * used
    outside = (concept_index < -1) | (concept_index >= key.shape[2])
    weight = weight.masked_fill(outside, torch.nan)
    index = concept_index.masked_fill(outside | ~used, 0).view(batch, groups * columns, 1).expand(-1, -1, width)
    total = torch.zeros(batch, queries, groups * columns, dtype=dtype, device=query.device)
    for head in range(heads):  # one head at a time: all of them would hold the matrix that the operator avoids
        q, k = query[:, head].to(dtype), key[:, head].to(dtype)
        scores = q @ k.gather(1, index).transpose(1, 2) * scale  # (B, N, G*K)
        if lse is None:
            norm = torch.logsumexp(q @ k.transpose(1, 2) * scale, -1)
        else:
            norm = lse[:, head, :queries].reshape(batch, queries).to(dtype)
        probability = torch.where(norm[..., None] == -torch.inf, 0.0, torch.exp(scores - norm[..., None]))
        total += probability * (1 / heads if head_weight is None else head_weight[head].to(dtype))
    return (total.view(batch, queries, groups, columns) * weight[:, None]).sum(-1).transpose(1, 2).contiguous()


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
    """Maps (B, G, N) to weights (B, rows*patch, columns*patch) of mean 1; see api.allocate."""
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
        field = (
            smoothing(rows, smooth).to(field) @ field.view(-1, rows, columns) @ smoothing(columns, smooth).to(field).T
        )
        field = field.flatten(1)
    if sharpen != 1:
        field = (field / field.amax(-1, keepdim=True)) ** sharpen  # the largest value cancels, but would overflow
    field = (field / field.mean(-1, keepdim=True)).clamp(max=cap)
    weights = (1 - mix) + mix * field
    weights = weights / weights.mean(-1, keepdim=True)
    weights = torch.where(healthy[:, None], weights, 1.0).view(-1, rows, columns)
    return weights.repeat_interleave(patch, 1).repeat_interleave(patch, 2)


def smoothing(size: int, sigma: float) -> Tensor:
    """Matrix (size, size) of a Gaussian along one axis, radius ceil(3 sigma), each row renormalized to sum 1."""
    position = torch.arange(size, dtype=torch.float64)
    distance = position[:, None] - position
    kernel = torch.exp(-0.5 * (distance / sigma) ** 2) * (distance.abs() <= -(-3 * sigma // 1))
    return kernel / kernel.sum(1, keepdim=True)


def gaussian_step(
    sample: Tensor, velocity: Tensor, noise: Tensor, a: Tensor, b: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """(prev_sample in sample's type, mean in float32 or float64); see api.gaussian_step."""
    dtype = compute_dtype(sample, velocity)
    shape = (-1, *(1,) * (sample.ndim - 1))
    a, b, s = (field.to(dtype).view(shape) for field in (a, b, s))
    mean = (a * sample.to(dtype) + b * velocity.to(dtype)).contiguous()
    return (mean + s * noise.to(dtype)).to(sample.dtype).contiguous(), mean


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
    """Loss (), statistics (10,) in the order of api.Statistics, gradient of the velocity; see api.policy_loss."""
    dtype = compute_dtype(velocity, sample, prev_sample)
    batch, channels = sample.shape[0], sample.shape[channel_dim(sample)]
    out_dtype = velocity.dtype

    def pixels(tensor: Tensor) -> Tensor:  # (B, C, P)
        tensor = tensor.to(dtype)
        return tensor.transpose(1, 2) if tensor.ndim == 3 else tensor.flatten(2)

    def locations(tensor: Tensor) -> Tensor:  # (B,) or like the weights -> (B, 1) or (B, P)
        return tensor.to(dtype).reshape(batch, -1)

    v, x, next_x = pixels(velocity), pixels(sample), pixels(prev_sample)
    count = x.shape[2]
    a, b, s, precision, log_norm, kl_precision = (
        field.to(dtype)[:, None] for field in (a, b, s, precision, log_norm, kl_precision)
    )
    mean = a[..., None] * x + b[..., None] * v
    residual = next_x - mean  # (B, C, P)

    # Log-ratio of each location, and its derivative by the velocity but for the factor `slope` (B, 1).
    slope = 2 * precision * b / channels
    direction = residual
    if old_mean is not None:
        old_mean = pixels(old_mean)
        if guard:
            direction = next_x - old_mean
            slope = slope * s
            delta = 2 * precision * s * (direction * (mean - old_mean)).mean(1)
        else:
            # Algebraically log p - log p_old, without the cancellation of subtracting two squared errors.
            delta = ((mean - old_mean) * (residual + (next_x - old_mean))).mean(1) * precision
    else:
        assert old_log_prob is not None  # one of the two is given
        delta = -residual.square().mean(1) * precision - log_norm - locations(old_log_prob)
    finite = delta.isfinite()

    w = torch.ones(1, 1, dtype=dtype, device=x.device) if weights is None else locations(weights)
    if ratio == "token":
        log_ratio = delta.mean(1, keepdim=True, dtype=torch.float64).to(dtype)  # (B, 1)
    elif ratio == "sample":
        log_ratio = (w * delta).mean(1, keepdim=True, dtype=torch.float64).to(dtype)  # (B, 1)
    else:
        log_ratio = delta  # (B, P)
    inside = log_ratio.abs() <= LOG_RATIO_LIMIT
    log_ratio = torch.where(log_ratio.isfinite(), log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), torch.nan)
    excess = torch.expm1(log_ratio)  # ratio - 1: near 1 float32 resolves it far better than the ratio

    adv = locations(advantages).clamp(-adv_clip, adv_clip)
    adv = adv * (1 if step_weights is None else locations(step_weights))
    if guard:
        adv = adv * (precision / kl_precision)
    clipped = excess.clamp(-clip_low, clip_high)
    surrogate = torch.maximum(-adv * (1 + excess), -adv * (1 + clipped))
    # Where the clipped branch is the larger one the ratio carries no gradient. The edges belong to the inside.
    gate = torch.where(adv >= 0, excess <= clip_high, excess >= -clip_low) & inside
    force = torch.where(gate | surrogate.isnan(), -adv * (1 + excess), 0.0)  # d surrogate / d log-ratio
    if ratio == "sample":
        loss = surrogate.mean()
    else:
        loss = (w * surrogate).expand(batch, count).mean()
    per_location = (w * force).expand(batch, count)  # every ratio: d loss / d delta, times B * P
    gradient = (per_location * slope / (batch * count))[:, None] * direction

    kl = torch.zeros((), dtype=dtype, device=x.device)
    if reference_velocity is not None:
        difference = b[..., None] * (v - pixels(reference_velocity))
        kl = (difference.square().mean((1, 2)) * kl_precision[:, 0]).mean()
        loss = loss + kl_coef * kl
        factor = 2 * kl_coef * kl_precision * b / (batch * channels * count)
        policy_gradient, gradient = gradient, gradient + factor[..., None] * difference
    else:
        policy_gradient = gradient

    low, high = (excess < -clip_low).to(dtype).mean(), (excess > clip_high).to(dtype).mean()
    statistics = torch.stack(
        [
            0.5 * log_ratio.square().mean(),
            low + high,
            low,
            high,
            1 + excess.mean(),
            1 + excess.min(),
            1 + excess.max(),
            kl,
            top_share(policy_gradient.abs().sum(1), w.expand(batch, count)),
            (~finite).sum().to(dtype),
        ]
    ).to(torch.float32)
    gradient = gradient.transpose(1, 2) if velocity.ndim == 3 else gradient
    return loss.to(dtype), statistics, gradient.reshape(velocity.shape).to(out_dtype)


def top_share(amount: Tensor, weights: Tensor) -> Tensor:
    """Share of `amount` (B, P) that lies in each sample's locations of highest weight, TOP_SHARE of all locations.

    Locations that tie at the edge count in proportion, so equal weights give exactly TOP_SHARE. 0 if amount is 0.
    """
    count = weights.shape[1]
    size = TOP_SHARE * count
    edge = weights.sort(1, descending=True).values[:, int(size) : int(size) + 1]  # (B, 1)
    above, tied = weights > edge, weights == edge
    portion = (size - above.sum(1)) / tied.sum(1).clamp_min(1)
    inside = (amount * above).sum(1) + portion * (amount * tied).sum(1)
    total = amount.sum()
    return torch.where(total == 0, 0.0, inside.sum() / total)
