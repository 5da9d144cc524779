"""How well an image compresses: the rewards of DDPO (Black et al. 2023), with which a pipeline is easily checked."""

from __future__ import annotations

import io
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from star.rewards import Metadata, Scores, pixels

QUALITY = 95


def kilobytes(images: Tensor) -> Tensor:
    """(B,) size of each image as a JPEG of quality 95, in units of 1000 bytes. images: (B, 3, H, W) in 0..1."""
    sizes = []
    for image in pixels(images):
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, format="JPEG", quality=QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


def jpeg_incompressibility(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
    """Kilobytes, as in Flow-GRPO's rewards.py."""
    return Scores(kilobytes(images))


def jpeg_compressibility(images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
    """-kilobytes/500, as in Flow-GRPO's rewards.py: about -0.1..-1 for images of 512 px."""
    size = kilobytes(images)
    return Scores(-size / 500, {"kilobytes": size})
