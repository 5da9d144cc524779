"""Synthetic scenes: what a prompt names, which prompts there are, and how a scene is drawn.

Seven categories in the manner of GenEval (Ghosh et al. 2023). A prompt is everything that is needed to know what
its image must show: `parse_scene` is the inverse of `Scene.prompt`.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass
from functools import cache

import numpy as np

SIZE = 36  # pixels on a side; three by three cells of 12 pixels
CELL = 12
COLORS = {
    "red": (0.92, 0.15, 0.15),
    "green": (0.15, 0.80, 0.20),
    "blue": (0.20, 0.35, 0.95),
    "yellow": (0.95, 0.90, 0.15),
    "purple": (0.72, 0.20, 0.90),
    "cyan": (0.15, 0.85, 0.90),
}
SHAPES = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}
COUNTS = {"two": 2, "three": 3, "four": 4}
# Each relation as the direction in which the second object lies from the first, (dx, dy) with y downwards.
RELATIONS = {"left of": (1, 0), "right of": (-1, 0), "above": (0, 1), "below": (0, -1)}
BACKGROUNDS = {"black": 0.08, "gray": 0.45, "white": 0.92}
PROPORTIONS = {
    "single_object": 0.05,
    "colors": 0.10,
    "two_objects": 0.10,
    "counting": 0.15,
    "color_attribution": 0.25,
    "position": 0.25,
    "background": 0.10,
}
CATEGORIES = tuple(PROPORTIONS)
WORDS = (
    *"a and on background".split(),
    *COUNTS,
    *"left right of above below".split(),
    *COLORS,
    *BACKGROUNDS,
    *SHAPES,
    *SHAPES.values(),
)
HELD_OUT_SHARE = 0.2
SUPERSAMPLING = 3
RADIUS = (3.9, 4.8)  # pixels; with JITTER, neighbors in adjacent cells never touch
JITTER = 0.6


@dataclass(frozen=True)
class Things:
    """`count` objects of one shape; `color` None means any color."""

    color: str | None
    shape: str
    count: int = 1

    @property
    def phrase(self) -> str:
        if self.count == 1:
            words = ("a", self.color, self.shape)
        else:
            number = next(word for word, count in COUNTS.items() if count == self.count)
            words = (number, self.color, SHAPES[self.shape])
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Scene:
    """What an image must show.

    things: what must be seen, and nothing besides. relation: a key of RELATIONS between the first and the second
    of two things, or None. background: a key of BACKGROUNDS, or None for any.
    """

    things: tuple[Things, ...]
    relation: str | None = None
    background: str | None = None

    @property
    def prompt(self) -> str:
        if not self.things:
            return f"a {self.background} background"
        text = f" {self.relation or 'and'} ".join(things.phrase for things in self.things)
        return f"{text} on a {self.background} background" if self.background else text

    @property
    def category(self) -> str:
        if self.background:
            return "background"
        if self.relation:
            return "position"
        if len(self.things) == 2:
            return "color_attribution" if self.things[0].color else "two_objects"
        if self.things[0].count > 1:
            return "counting"
        return "colors" if self.things[0].color else "single_object"


@cache
def all_scenes() -> dict[str, tuple[Scene, ...]]:
    """Every scene that a prompt can name, by category."""
    plain = [Things(None, shape) for shape in SHAPES]
    colored = [Things(color, shape) for color in COLORS for shape in SHAPES]
    pairs = [(a, b) for a in colored for b in colored if a != b]
    scenes = [Scene((things,)) for things in plain + colored]
    scenes += [Scene((a, b)) for a in plain for b in plain if a != b]
    scenes += [Scene((Things(t.color, t.shape, count),)) for t in colored for count in COUNTS.values()]
    scenes += [Scene(pair) for pair in pairs]
    scenes += [Scene(pair, relation) for pair in pairs for relation in RELATIONS]
    scenes += [Scene(things, None, b) for b in BACKGROUNDS for things in [(), *((t,) for t in colored)]]
    return {category: tuple(s for s in scenes if s.category == category) for category in CATEGORIES}


@cache
def _by_prompt() -> dict[str, Scene]:
    return {scene.prompt: scene for scenes in all_scenes().values() for scene in scenes}


def parse_scene(prompt: str) -> Scene:
    """The scene that `prompt` names. Raises ValueError for a prompt outside this world."""
    try:
        return _by_prompt()[prompt]
    except KeyError:
        raise ValueError(
            f"prompt: {prompt!r} is not a prompt of the shapes world; expected one like "
            "'a red circle left of a blue square' or 'three green rings'"
        ) from None


@cache
def split_scenes(split: str) -> dict[str, tuple[Scene, ...]]:
    """Scenes by category; a fifth of each category, chosen by a checksum of its prompt, is held out of all training.

    split: "train" or "heldout".
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"split: got {split!r}, expected 'train' or 'heldout'")
    chosen = {}
    for category, scenes in all_scenes().items():
        ordered = sorted(scenes, key=lambda scene: (zlib.crc32(scene.prompt.encode()), scene.prompt))
        held_out = max(1, round(HELD_OUT_SHARE * len(ordered)))
        chosen[category] = tuple(ordered[:held_out] if split == "heldout" else ordered[held_out:])
    return chosen


def prompts(
    n: int, seed: int | str, split: str = "train", categories: tuple[str, ...] | None = None, distinct: bool = False
) -> list[str]:
    """n prompts drawn with a seed, categories in the shares of PROPORTIONS (restricted to `categories` if given).

    distinct: no prompt twice before its category is used up.
    """
    unknown = set(categories or ()) - set(CATEGORIES)
    if unknown:
        raise ValueError(f"categories: unknown {sorted(unknown)}, expected some of {list(CATEGORIES)}")
    rng = random.Random(f"{seed}/{split}")
    pool = split_scenes(split)
    names = list(categories or CATEGORIES)
    shares = [PROPORTIONS[name] for name in names]
    decks: dict[str, list[Scene]] = {}
    out = []
    for name in rng.choices(names, shares, k=n):
        if distinct:
            if not decks.get(name):
                decks[name] = rng.sample(pool[name], len(pool[name]))
            out.append(decks[name].pop().prompt)
        else:
            out.append(rng.choice(pool[name]).prompt)
    return out


def coverage(shape: str, center_x: float, center_y: float, radius: float) -> np.ndarray:
    """Share of each pixel that a shape covers, (SIZE, SIZE) float32 in 0..1; lengths in pixels."""
    # Only the window around the shape is supersampled: a full canvas would cost ten times as much.
    x0, y0 = max(0, int(center_x - radius) - 1), max(0, int(center_y - radius) - 1)
    x1, y1 = min(SIZE, int(center_x + radius) + 2), min(SIZE, int(center_y + radius) + 2)
    x = (np.arange(x0 * SUPERSAMPLING, x1 * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - center_x
    y = ((np.arange(y0 * SUPERSAMPLING, y1 * SUPERSAMPLING) + 0.5) / SUPERSAMPLING - center_y)[:, None]
    if shape == "circle":
        inside = x * x + y * y <= radius**2
    elif shape == "ring":
        inside = (x * x + y * y <= radius**2) & (x * x + y * y >= (0.5 * radius) ** 2)
    elif shape == "square":
        inside = (abs(x) <= 0.88 * radius) & (abs(y) <= 0.88 * radius)
    elif shape == "triangle":
        inside = (y <= 0.9 * radius) & (y >= -radius) & (abs(x) <= (y + radius) / 1.9 * 1.05)
    elif shape == "cross":
        inside = ((abs(x) <= 0.36 * radius) & (abs(y) <= radius)) | ((abs(y) <= 0.36 * radius) & (abs(x) <= radius))
    else:
        raise ValueError(f"shape: got {shape!r}, expected one of {list(SHAPES)}")
    canvas = np.zeros((SIZE, SIZE), np.float32)
    window = inside.reshape(y1 - y0, SUPERSAMPLING, x1 - x0, SUPERSAMPLING)
    canvas[y0:y1, x0:x1] = window.mean((1, 3), dtype=np.float32)
    return canvas


def _cells(scene: Scene, rng: random.Random) -> list[tuple[int, int]]:
    cells = [(x, y) for x in range(3) for y in range(3)]
    number = sum(things.count for things in scene.things)
    while True:
        chosen = rng.sample(cells, number)
        if scene.relation is None:
            return chosen
        (ax, ay), (bx, by) = chosen
        dx, dy = RELATIONS[scene.relation]
        if (bx - ax) * dx + (by - ay) * dy > 0:
            return chosen


def render(scene: Scene, rng: random.Random) -> tuple[np.ndarray, np.ndarray]:
    """Draw a scene; what the prompt leaves open (cells, sizes, free colors, background) is drawn from rng.

    Returns (image (SIZE, SIZE, 3) float32 in 0..1, masks (objects, SIZE, SIZE) float32 coverage in 0..1).
    """
    level = BACKGROUNDS[scene.background or rng.choice(list(BACKGROUNDS))] + rng.uniform(-0.04, 0.04)
    image = np.full((SIZE, SIZE, 3), level, np.float32)
    masks = []
    objects = [things for things in scene.things for _ in range(things.count)]
    for things, (x, y) in zip(objects, _cells(scene, rng), strict=True):
        center_x = (x + 0.5) * CELL + rng.uniform(-JITTER, JITTER)
        center_y = (y + 0.5) * CELL + rng.uniform(-JITTER, JITTER)
        mask = coverage(things.shape, center_x, center_y, rng.uniform(*RADIUS))
        color = np.array(COLORS[things.color or rng.choice(list(COLORS))], np.float32)
        image = image * (1 - mask[..., None]) + mask[..., None] * color
        masks.append(mask)
    return image, np.stack(masks) if masks else np.zeros((0, SIZE, SIZE), np.float32)
