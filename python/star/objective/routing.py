"""Credit per concept, placed by the map of that concept. Needs torch alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from star.objective.allocation import repeat_tokens


def route_advantages(
    advantages: Tensor,
    concept_advantages: Tensor,
    maps: Tensor,
    grid: tuple[int, int],
    *,
    strength: float | Tensor = 1.0,
    patch: int = 2,
) -> Tensor:
    """Advantages of locations from those of the images and of their prompts' concepts.

    A_p = A + strength * sum_g (s_gp - 1/G) A_g, where s_gp is the share of concept g among the G concepts at location
    p: its map over its own mean, divided by the sum of that over the concepts. The factors of A_g sum to zero at every
    location. So concepts with equal A_g change nothing, and neither does a single concept. A concept whose advantage is
    not finite or whose map is all zero, as of one without a token, is not among the G. A location at which all maps are
    zero keeps A.

    Args:
        advantages: (B,) floating, A of each image.
        concept_advantages: (B, G) floating, A_g, NaN where a concept has none.
        maps: (B, G, N) floating, read at the same step, not negative. A sample with a concept whose map is not finite
            or negative keeps its A everywhere.
        grid: (rows, columns) of the N image tokens.
        strength: not negative, one for all or (B,); 0 gives A everywhere.
        patch: latent locations per token and side; 1 for packed latents.

    Returns:
        (B, rows * patch, columns * patch) in the type of advantages; where nothing is added, the very bits of A.

    Raises:
        ValueError: shapes that do not fit each other, or a strength out of its range.
    """
    if advantages.ndim != 1 or maps.ndim != 3 or concept_advantages.shape != maps.shape[:2]:
        raise ValueError(
            f"concept_advantages: got {tuple(concept_advantages.shape)} for advantages {tuple(advantages.shape)} and "
            f"maps {tuple(maps.shape)}, expected (B, G), (B,) and (B, G, N)"
        )
    if len(advantages) != len(maps) or math.prod(grid) != maps.shape[2]:
        raise ValueError(
            f"maps: got {tuple(maps.shape)}, expected ({len(advantages)}, G, {math.prod(grid)}) for the grid {grid}"
        )
    factor = torch.as_tensor(strength, dtype=torch.float64, device=maps.device)
    if factor.shape not in ((), advantages.shape) or not bool(((factor >= 0) & factor.isfinite()).all()):
        raise ValueError(f"strength: got {strength}, expected a number of at least 0, or one for each sample")
    known, exact = concept_advantages.to(maps.device).double(), maps.double()
    mean = exact.mean(-1)
    present = known.isfinite() & (mean != 0)  # (B, G)
    healthy = ((exact >= 0) & exact.isfinite()).all(-1)
    usable = (healthy | ~present).all(1)
    relative = torch.where((present & healthy)[..., None], exact / mean[..., None], 0.0)
    total = relative.sum(1)  # (B, N)
    own = torch.where(present, known, 0.0)
    count = present.sum(1, keepdim=True)
    tilt = (relative * own[..., None]).sum(1) / total - own.sum(1, keepdim=True) / count
    routed = usable[:, None] & (count > 1) & (total > 0)
    added = torch.where(routed, tilt, 0.0) * factor.expand(len(maps))[:, None]
    image = advantages.to(maps.device)[:, None]
    result = torch.where(added == 0, image, (image + added).to(advantages.dtype))
    return repeat_tokens(result.view(-1, *grid), patch)


def other_concepts(maps: Tensor) -> Tensor:
    """The same maps (B, G, N), each of another concept of its sample.

    The control for whether the location of a concept's map matters. The concepts whose map is not all zero exchange
    their maps in a circle."""
    present = maps.ne(0).any(-1)  # (B, G)
    count = present.sum(1, keepdim=True)
    order = (~present).long().argsort(dim=1, stable=True)  # those with a map first
    rank = present.long().cumsum(1) - 1
    source = order.gather(1, (rank + 1).remainder(count.clamp_min(1)))
    columns = torch.arange(maps.shape[1], device=maps.device).expand_as(source)
    source = torch.where(present, source, columns)
    return maps.gather(1, source[..., None].expand_as(maps))
