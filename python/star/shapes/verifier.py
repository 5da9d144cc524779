"""Decides from the pixels alone whether an image shows what its prompt names, and where.

Objects are found by color segmentation (the backgrounds are gray, so chroma tells object from ground) and named by
matching templates of every shape. Strict: everything right and nothing besides, as in GenEval. Soft: partial credit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy import ndimage

from star.shapes.scenes import BACKGROUNDS, COLORS, RELATIONS, SHAPES, Scene, Things, coverage

WINDOW = 13  # pixels; holds the largest shape
MATCH = 0.72  # intersection over union with the best template from which a shape counts as drawn
FOREGROUND = 0.45  # coverage from which a pixel belongs to an object
SMALLEST = 8  # pixels; smaller specks are no objects
COLOR_CREDIT = 0.4
EXTRA_PENALTY = 0.8
RELATION_MARGIN = 4.0  # pixels by which centers must differ

_COLOR_NAMES = list(COLORS)
_SHAPE_NAMES = list(SHAPES)
_COLOR_VALUES = np.array(list(COLORS.values()), np.float32)  # (6, 3)
_CHROMA = _COLOR_VALUES.max(1) - _COLOR_VALUES.min(1)  # (6,)
_HUES = _COLOR_VALUES - _COLOR_VALUES.min(1, keepdims=True)
_HUES = _HUES / np.linalg.norm(_HUES, axis=1, keepdims=True)  # (6, 3)


@dataclass(frozen=True)
class Detection:
    """One object that was found. shape_scores: intersection over union with each shape's best template, (5,)."""

    color: str
    shape: str
    score: float
    center: tuple[float, float]  # (x, y) in pixels
    mask: np.ndarray  # (S, S) bool
    shape_scores: np.ndarray


@dataclass(frozen=True)
class Verdict:
    """strict: all right and nothing besides. soft: 0..1. parts: credit of each requirement.

    masks: (things of the scene, S, S) bool, where each required group was found (empty where it was not). credits: 0..1
    of each detection, 0 of one that was not requested.
    """

    strict: bool
    soft: float
    parts: tuple[float, ...]
    masks: np.ndarray
    detections: tuple[Detection, ...]
    credits: tuple[float, ...]


def _crop(image: np.ndarray, center_x: float, center_y: float) -> np.ndarray:
    padded = np.pad(image, WINDOW)
    left, top = round(center_x) + WINDOW - WINDOW // 2, round(center_y) + WINDOW - WINDOW // 2
    return padded[top : top + WINDOW, left : left + WINDOW]


@cache
def _templates() -> tuple[np.ndarray, np.ndarray]:
    """Every shape at several sizes and sub-pixel offsets: (T, WINDOW**2) coverage and (T,) shape indices."""
    crops, labels = [], []
    for index, shape in enumerate(_SHAPE_NAMES):
        for radius in np.arange(3.4, 5.4, 0.3):
            for dx in (-0.33, 0.0, 0.33):
                for dy in (-0.33, 0.0, 0.33):
                    drawn = coverage(shape, 16.5 + dx, 16.5 + dy, radius)
                    y, x = ndimage.center_of_mass(drawn)
                    crops.append(_crop(drawn, x, y).ravel())
                    labels.append(index)
    return np.stack(crops), np.array(labels)


def detect(image: np.ndarray) -> tuple[Detection, ...]:
    """Find the objects of an image. image: (S, S, 3) float in 0..1."""
    image = np.clip(image, 0, 1).astype(np.float32)
    low = image.min(-1)
    tint = image - low[..., None]
    norm = np.linalg.norm(tint, axis=-1) + 1e-6
    color = ((tint @ _HUES.T) / norm[..., None]).argmax(-1)  # (S, S)
    cover = np.clip((image.max(-1) - low) / _CHROMA[color], 0, 1)
    objects, crops = [], []
    for index in np.unique(color[cover > FOREGROUND]):
        labels, number = ndimage.label((cover > FOREGROUND) & (color == index))
        for label in range(1, number + 1):
            mask = labels == label
            if mask.sum() < SMALLEST:
                continue
            soft = np.where(ndimage.binary_dilation(mask) & (color == index), cover, 0)
            y, x = ndimage.center_of_mass(soft)
            objects.append((_COLOR_NAMES[index], (x, y), mask))
            crops.append(_crop(soft, x, y).ravel())
    if not objects:
        return ()
    templates, template_shapes = _templates()
    drawn = np.stack(crops)  # (objects, WINDOW**2)
    # min(a, b) = (a + b - |a - b|) / 2 needs one elementwise pass instead of two.
    difference = np.abs(drawn[:, None] - templates[None]).sum(-1)
    total = drawn.sum(-1)[:, None] + templates.sum(-1)[None]
    overlap = (total - difference) / (total + difference)  # (objects, T)
    scores = np.stack([overlap[:, template_shapes == i].max(1) for i in range(len(_SHAPE_NAMES))], 1)  # (objects, 5)
    return tuple(
        Detection(name, _SHAPE_NAMES[s.argmax()], float(s.max()), center, mask, s)
        for (name, center, mask), s in zip(objects, scores, strict=True)
    )


def _credit(detection: Detection, things: Things) -> float:
    """What one detection is worth for one required object, 0..1: the color, if the prompt names one, and the shape."""
    score = detection.shape_scores[_SHAPE_NAMES.index(things.shape)]
    right = detection.shape == things.shape and score >= MATCH
    shape = 1.0 if right else 0.5 * float(np.clip((score - 0.3) / 0.6, 0, 1))
    if things.color is None:
        return shape
    return (COLOR_CREDIT + (1 - COLOR_CREDIT) * shape) if detection.color == things.color else 0.0


def ground(detections: Sequence[Detection], size: tuple[int, ...]) -> np.ndarray:
    """(S, S) bool, which pixels of an image of this size belong to no object."""
    return ~np.any([d.mask for d in detections], 0) if detections else np.ones(size, bool)


def background_name(image: np.ndarray, detections: Sequence[Detection]) -> str:
    """The key of BACKGROUNDS that the ground of an image (S, S, 3) is nearest to."""
    pixels = image[ground(detections, image.shape[:2])]
    level = float(np.median(pixels)) if pixels.size else 0.0
    return min(BACKGROUNDS, key=lambda name: abs(BACKGROUNDS[name] - level))


def verify(image: np.ndarray, scene: Scene) -> Verdict:
    """Judge an image against a scene. image: (S, S, 3) float in 0..1.

    Soft is the mean credit over the requirements (each group of things, the relation, the background), times
    EXTRA_PENALTY for each object that was not requested.
    """
    image = np.asarray(image, np.float32)
    if image.ndim != 3 or image.shape[-1] != 3:
        raise ValueError(f"image: got shape {image.shape}, expected (S, S, 3)")
    detections = detect(image)
    free = list(range(len(detections)))
    parts, centers, masks = [], [], []
    own: dict[int, float] = {}
    for things in scene.things:
        credits = {i: _credit(detections[i], things) for i in free}
        best = sorted((i for i in free if credits[i] > 0), key=lambda i: -credits[i])[: things.count]
        free = [i for i in free if i not in best]
        own |= {i: credits[i] for i in best}
        parts.append(sum(credits[i] for i in best) / things.count)
        centers.append(detections[best[0]].center if best else None)
        masks.append(np.any([detections[i].mask for i in best], 0) if best else np.zeros(image.shape[:2], bool))
    if scene.relation:
        (dx, dy), (first, second) = RELATIONS[scene.relation], centers
        if first is None or second is None:
            parts.append(0.0)
        else:
            along = (second[0] - first[0]) * dx + (second[1] - first[1]) * dy
            parts.append(float(along > RELATION_MARGIN))
    if scene.background:
        parts.append(float(background_name(image, detections) == scene.background))
    strict = all(part == 1.0 for part in parts) and not free
    return Verdict(
        strict=strict,
        soft=float(np.mean(parts)) * EXTRA_PENALTY ** len(free),
        parts=tuple(parts),
        masks=np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool),
        detections=detections,
        credits=tuple(own.get(i, 0.0) for i in range(len(detections))),
    )
