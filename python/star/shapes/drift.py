"""What changed in images that no prompt names: the background, colors, sizes and locations that prompts leave open."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import ndimage
from torch import Tensor

from star.shapes.reward import verify_images
from star.shapes.scenes import BACKGROUNDS, COLORS
from star.shapes.verifier import Detection, Verdict, background_name, ground

MEASURES = ("background", "background_shares", "color", "color_shares", "size", "location")


@dataclass(frozen=True)
class Seen:
    """An image (S, S, 3) in 0..1, and what the verifier says of it."""

    image: np.ndarray
    verdict: Verdict

    @property
    def background(self) -> str:
        return background_name(self.image, self.verdict.detections)

    @property
    def ground(self) -> np.ndarray:
        """(S, S) bool, the pixels that no object touches, not even with its smoothed edge."""
        return ndimage.binary_erosion(ground(self.verdict.detections, self.image.shape[:2]), border_value=1)

    def objects(self, index: int) -> list[Detection]:
        """The objects that were found for the scene's things at an index."""
        mask = self.verdict.masks[index]
        return [one for one in self.verdict.detections if (one.mask & mask).any()]


def unasked_changes(before: Tensor, after: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    """How far the images of two models are apart in what their prompts leave open.

    Args:
        before, after: (B, 3, H, W) in 0..1, image by image of the same prompt and noise.
        prompts: B, of the embedded world.

    Returns:
        Means over the images whose prompt leaves it open, where both images show it; NaN if there is none:
        background: absolute change, in 0..1, of the pixels that no object touches in either image. background_shares:
        distance, in 0..1, of the shares of black, gray and white ones. color: share of the objects whose color is
        another one. color_shares: distance of the colors' shares. size: absolute change, in pixels, of the side of a
        square of an object's area. location: distance in pixels between an object's centers, in prompts without a
        relation.
    """
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    backgrounds: list[tuple[str, str]] = []
    colors: list[tuple[str, str]] = []
    first, second = (verify_images(images, prompts) for images in (before, after))
    pairs = zip(_seen(before, first.verdicts), _seen(after, second.verdicts), strict=True)
    for scene, (old, new) in zip(first.scenes, pairs, strict=True):
        if scene.background is None:
            shared = old.ground & new.ground
            if shared.any():
                found["background"].append(float(np.abs(new.image[shared] - old.image[shared]).mean()))
            backgrounds.append((old.background, new.background))
        for index, things in enumerate(scene.things):
            was, now = old.objects(index), new.objects(index)
            if not was or not now:
                continue
            found["size"].append(abs(_side(now) - _side(was)))
            if things.count == 1 and scene.relation is None:
                found["location"].append(float(np.hypot(*np.subtract(now[0].center, was[0].center))))
            if things.color is None:
                found["color"].append(float(now[0].color != was[0].color))
                colors.append((was[0].color, now[0].color))
    found["background_shares"], found["color_shares"] = _distance(backgrounds, BACKGROUNDS), _distance(colors, COLORS)
    return {name: float(np.mean(values)) if values else float("nan") for name, values in found.items()}


def _seen(images: Tensor, verdicts: Sequence[Verdict]) -> list[Seen]:
    arrays = images.permute(0, 2, 3, 1).cpu().numpy()
    return [Seen(image, verdict) for image, verdict in zip(arrays, verdicts, strict=True)]


def _side(objects: Sequence[Detection]) -> float:
    return float(np.mean([one.mask.sum() ** 0.5 for one in objects]))


def _distance(pairs: Sequence[tuple[str, str]], names: Iterable[str]) -> list[float]:
    """[the total variation between the shares of the first names and those of the second], [] without pairs."""
    if not pairs:
        return []
    first, second = zip(*pairs, strict=True)
    return [sum(abs(first.count(name) - second.count(name)) for name in names) / (2 * len(pairs))]
