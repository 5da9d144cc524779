"""DiffusionNFT's objective: the policy is drawn to its good images and away from its bad ones, relative to the velocity
of the old policy, which sampled them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from torch import Tensor

from star.config import Loss
from star.training.forward_process import Compared, Method
from star_kernels import nft_loss


def terms(config: Loss, at: Compared) -> tuple[Tensor, dict[str, Tensor]]:
    assert at.old_velocity is not None  # a run of this objective keeps an old policy
    loss, statistics = nft_loss(
        at.velocity,
        at.old_velocity,
        at.latents,
        at.image,
        at.sigma,
        (at.advantages / config.adv_clip).clamp(-1, 1) / 2 + 0.5,
        at.weights,
        reference_velocity=at.reference_velocity,
        beta=config.beta,
        adv_clip=config.adv_clip,
        kl_coef=config.kl_coef,
    )
    return loss, statistics._asdict()


def levels(numbers: random.Random, trained: Sequence[int], count: int) -> list[int]:
    """The trained steps in random order."""
    return numbers.sample(list(trained), len(trained))


NFT = Method(terms, levels)
