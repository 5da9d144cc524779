"""GenEval (Ghosh et al. 2023): are the objects there that the prompt names, in number, color and position?

The rules are those of the benchmark's evaluate_images.py and, for partial credit, of Flow-GRPO's reward server
(yifan123/reward-server, gen_eval.py), as pure functions of detections. The objects come from Mask2Former trained on
COCO instances, the colors from CLIP, both transformers': no mmdet, no server. The metadata of a prompt is one line of
GenEval's evaluation_metadata.jsonl: "tag", and "include" and "exclude" lists of {"class", "count", "color",
"position": [relation, index of an earlier entry]}.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Mask2FormerForUniversalSegmentation

from star.rewards import Metadata, Scores, without_nulls
from star.rewards.clip import CLIP, OPENAI_L, load_clip
from star.rewards.loading import load_pretrained

DETECTOR = "facebook/mask2former-swin-small-coco-instance"
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
RELATIONS = ("left of", "right of", "above", "below")
TEMPLATES = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")
# COCO's 80 classes in their order, under the names that GenEval gives them; published detectors name some otherwise.
OBJECTS = tuple(
    "person|bicycle|car|motorcycle|airplane|bus|train|truck|boat|traffic light|fire hydrant|stop sign|"
    "parking meter|bench|bird|cat|dog|horse|sheep|cow|elephant|bear|zebra|giraffe|backpack|umbrella|handbag|tie|"
    "suitcase|frisbee|skis|snowboard|sports ball|kite|baseball bat|baseball glove|skateboard|surfboard|"
    "tennis racket|bottle|wine glass|cup|fork|knife|spoon|bowl|banana|apple|sandwich|orange|broccoli|carrot|"
    "hot dog|pizza|donut|cake|chair|couch|potted plant|bed|dining table|toilet|tv|laptop|computer mouse|"
    "tv remote|computer keyboard|cell phone|microwave|oven|toaster|sink|refrigerator|book|clock|vase|scissors|"
    "teddy bear|hair drier|toothbrush".split("|")
)
THRESHOLD, COUNTING_THRESHOLD = 0.3, 0.9  # confidence above which a detection counts
MAX_OBJECTS = 16  # of each class
POSITION_THRESHOLD = 0.1  # share of both sizes by which centers must differ
BACKGROUND = 0x99 / 255  # gray around a cut-out object
DETECTIONS = 100  # per image


@dataclass(frozen=True)
class Detection:
    """One object. box: (left, top, right, bottom) in pixels. mask: (H, W) bool."""

    name: str
    score: float
    box: tuple[float, float, float, float]
    mask: np.ndarray


Groups = dict[str, list[Detection]]
ColorsOf = Callable[[list[Detection]], list[str]]
"""The color of each of some objects of one class."""


@dataclass(frozen=True)
class Verdict:
    """correct: the benchmark's yes or no. strict: Flow-GRPO's, with exact numbers. soft: its partial credit, at most 1
    (below 0 where more than twice as many objects are there as requested). found: the objects that the include list
    matched. credits: for each entry of that list the mean of its numbers in soft, which is the mean of them all.
    earned: each object of a class that the list has, with its own credit in 0..1."""

    correct: bool
    strict: bool
    soft: float
    found: tuple[Detection, ...]
    reasons: tuple[str, ...]
    credits: tuple[float, ...]
    earned: tuple[tuple[Detection, float], ...]


# --- the rules --------------------------------------------------------------------------------------------------------


def select(detections: Sequence[Detection], tag: str) -> Groups:
    """What counts as seen: by class, most confident first. As published, objects of a class may overlap."""
    threshold = COUNTING_THRESHOLD if tag == "counting" else THRESHOLD
    groups: Groups = {}
    for detection in sorted(detections, key=lambda d: -d.score):
        if detection.score > threshold:
            groups.setdefault(detection.name, []).append(detection)
    return {name: group[:MAX_OBJECTS] for name, group in groups.items()}


def relations(a: Sequence[float], b: Sequence[float]) -> set[str]:
    """In which of RELATIONS box a lies to box b: the direction between their centers, less a share of their sizes."""
    (ax, ay), (bx, by) = (((box[0] + box[2]) / 2, (box[1] + box[3]) / 2) for box in (a, b))
    offset = np.array([ax - bx, ay - by])
    sizes = np.array([abs(a[2] - a[0]) + abs(b[2] - b[0]), abs(a[3] - a[1]) + abs(b[3] - b[1])])
    shortened = np.maximum(np.abs(offset) - POSITION_THRESHOLD * sizes, 0) * np.sign(offset)
    if (np.abs(shortened) < 1e-3).all():
        return set()
    dx, dy = shortened / np.linalg.norm(offset)
    held = {"left of": dx < -0.5, "right of": dx > 0.5, "above": dy < -0.5, "below": dy > 0.5}
    return {name for name, holds in held.items() if holds}


def _related(objects: list[Detection], targets: list[Detection] | None, relation: str) -> bool:
    return targets is not None and all(relation in relations(o.box, t.box) for o in objects for t in targets)


def judge(groups: Groups, metadata: Mapping[str, Any], colors_of: ColorsOf) -> Verdict:
    """Judge what was seen against a prompt's metadata. Raises ValueError for metadata that is not GenEval's."""
    metadata = check(metadata)
    known: dict[str, list[str]] = {}

    def colors(name: str, objects: list[Detection]) -> list[str]:  # always the first so many of a class
        if len(known.get(name, ())) < len(objects):
            known[name] = colors_of(objects)
        return known[name][: len(objects)]

    correct, reasons = _correct(groups, metadata, colors)
    strict, parts = _partial(groups, metadata, colors)
    credits = [credit for part in parts for credit in part]
    found = [d for entry in metadata["include"] for d in groups.get(entry["class"], [])[: entry["count"]]]
    return Verdict(
        correct,
        strict,
        sum(credits) / len(credits),
        tuple(found),
        tuple(reasons),
        tuple(sum(part) / len(part) for part in parts),
        tuple(_earned(groups, metadata, colors)),
    )


def _correct(groups: Groups, metadata: Mapping[str, Any], colors: Callable) -> tuple[bool, list[str]]:
    """At least as many of each as requested; colors and positions of the most confident ones; nothing excluded."""
    reasons: list[str] = []
    matched: list[list[Detection] | None] = []
    for entry in metadata["include"]:
        name, count = entry["class"], entry["count"]
        objects = groups.get(name, [])[:count]
        before = len(reasons)
        if len(objects) < count:
            reasons.append(f"expected {count} {name}, found {len(objects)}")
        else:
            if "color" in entry and (seen := colors(name, objects)).count(entry["color"]) < count:
                reasons.append(f"expected {count} {entry['color']} {name}, found {', '.join(seen)}")
            if "position" in entry and len(reasons) == before:
                relation, index = entry["position"]
                if not _related(objects, matched[index], relation):
                    reasons.append(f"expected {name} {relation} {metadata['include'][index]['class']}")
        matched.append(objects if len(reasons) == before else None)
    for entry in metadata.get("exclude", ()):
        if (number := len(groups.get(entry["class"], []))) >= entry["count"]:
            reasons.append(f"expected fewer than {entry['count']} {entry['class']}, found {number}")
    return not reasons, reasons


def _partial(groups: Groups, metadata: Mapping[str, Any], colors: Callable) -> tuple[bool, list[list[float]]]:
    """Exactly as many of each as requested; for each entry the credits of number, color and position. The exclude list
    does not count.

    As the reward server has it: a position that is wrong adds a 0 and a 1 to that mean, one that is right a 1.
    """
    strict, parts = True, []
    matched: list[list[Detection] | None] = []
    for entry in metadata["include"]:
        name, count = entry["class"], entry["count"]
        objects = groups.get(name, [])
        right = len(objects) == count
        credits = [1 - abs(count - len(objects)) / count]
        if not right:
            credits += [0.0] * ("color" in entry or "position" in entry)
        else:
            if "color" in entry:
                number = colors(name, objects).count(entry["color"])
                credits.append(1 - abs(count - number) / count)
                right = number == count
            if "position" in entry and right:
                relation, index = entry["position"]
                right = _related(objects, matched[index], relation)
                credits += [1.0] if right else [0.0] if matched[index] is None else [0.0, 1.0]
        matched.append(objects if right else None)
        parts.append(credits)
        strict = strict and right
    return strict, parts


def _earned(groups: Groups, metadata: Mapping[str, Any], colors: Callable) -> list[tuple[Detection, float]]:
    """What each object of the requested classes earned: the mean of 1 for being requested and of 1 or 0 for its own
    color and its own position where these are requested; 0 for a surplus object. A position is missed where the object
    that it refers to is missing. Of surplus objects the best ones count, and of equal ones the most confident."""
    free = {name: list(range(len(objects))) for name, objects in groups.items()}
    earned: list[tuple[Detection, float]] = []
    for entry in metadata["include"]:
        name = entry["class"]
        objects = groups.get(name, [])
        credits: dict[int, float] = {}
        for i in free.get(name, []):
            own = [1.0]
            if "color" in entry:
                own.append(float(colors(name, objects)[i] == entry["color"]))
            if "position" in entry:
                relation, index = entry["position"]
                target = metadata["include"][index]
                beside = groups.get(target["class"], [])[: target["count"]]
                own.append(float(_related([objects[i]], beside or None, relation)))
            credits[i] = sum(own) / len(own)
        best = sorted(credits, key=lambda i: -credits[i])[: entry["count"]]
        free[name] = [i for i in free.get(name, []) if i not in best]
        earned += [(objects[i], credits[i]) for i in best]
    wanted = dict.fromkeys(entry["class"] for entry in metadata["include"])
    return earned + [(groups[name][i], 0.0) for name in wanted for i in free[name]]


def reward_map(verdict: Verdict, size: tuple[int, int]) -> np.ndarray:
    """(H, W) float32: each object's own credit inside its mask, the more confident one's where masks overlap;
    elsewhere, where what is missing could have been, what the image earned."""
    field = np.full(size, verdict.soft, np.float32)
    for detection, credit in sorted(verdict.earned, key=lambda pair: pair[0].score):
        field[detection.mask] = credit
    return field


def phrases(prompt: str, include: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """The words of a prompt that name each entry: its class, with letters behind it ("benchs"), and its color if that
    stands before it. None for an entry that the prompt does not name."""
    names = [entry["class"] for entry in include]
    found: list[str | None] = [None] * len(names)
    taken: list[tuple[int, int]] = []
    for i in sorted(range(len(names)), key=lambda i: -len(names[i])):  # "hot dog" before "dog"
        color = include[i].get("color")
        for pattern in [rf"{color} {re.escape(names[i])}"] * bool(color) + [re.escape(names[i])]:
            spans = [match.span() for match in re.finditer(rf"\b{pattern}\w*", prompt, re.IGNORECASE)]
            span = next((s for s in spans if all(s[1] <= start or end <= s[0] for start, end in taken)), None)
            if span is not None:
                taken.append(span)
                found[i] = prompt[slice(*span)]
                break
    return found


def check(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt's metadata without its nulls, which say nothing. Raises ValueError, with what is wrong, if it is not
    GenEval's."""

    def wrong(what: str) -> ValueError:
        return ValueError(f"reward: 'geneval' got metadata {what}; it needs GenEval's .jsonl prompt files")

    said = without_nulls(dict(metadata))
    for name in ("include", "exclude"):
        entries = said.setdefault(name, [])
        if not isinstance(entries, list) or (name == "include" and not entries):
            raise wrong(f"with {metadata.get(name)!r} under {name!r}")
        for entry in entries:
            if not isinstance(entry, Mapping) or not isinstance(entry.get("class"), str):
                raise wrong(f"with the entry {entry!r} without a class")
    for number, entry in enumerate([*said["include"], *said["exclude"]]):
        if type(entry.get("count")) is not int or entry["count"] < 1:
            raise wrong(f"with count {entry.get('count')!r} of {entry['class']!r}")
        if entry.get("color", COLORS[0]) not in COLORS:
            raise wrong(f"with color {entry['color']!r}, not one of {list(COLORS)}")
        if "position" in entry:
            position = entry["position"]
            relation, index = position if isinstance(position, list | tuple) and len(position) == 2 else (None, None)
            if relation not in RELATIONS or type(index) is not int or not 0 <= index < number:
                raise wrong(f"with position {position!r} of {entry['class']!r}")
    return said


# --- the networks -----------------------------------------------------------------------------------------------------


class Detector:
    """Objects of COCO's 80 classes by Mask2Former, prepared and read out as mmdet does for GenEval."""

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    SHORT, LONG, MULTIPLE = 800, 1333, 32

    def __init__(self, model: Mask2FormerForUniversalSegmentation, short: int = SHORT, long: int = LONG) -> None:
        self.model, self.short, self.long = model.eval().requires_grad_(False), short, long
        labels = model.config.id2label
        self.names = OBJECTS if len(labels) == len(OBJECTS) else tuple(labels[i] for i in range(len(labels)))

    def prepare(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Resized with the shorter side to `short` and at most `long`, normalized, padded with 0 to a MULTIPLE."""
        height, width = images.shape[-2:]
        scale = min(self.short / min(height, width), self.long / max(height, width))
        size = (int(height * scale + 0.5), int(width * scale + 0.5))
        images = (images.float() * 255).round().clamp(0, 255) / 255
        images = F.interpolate(images, size, mode="bilinear", align_corners=False)
        mean, std = (images.new_tensor(value).view(3, 1, 1) for value in (self.MEAN, self.STD))
        padding = [-side % self.MULTIPLE for side in size]
        return F.pad((images - mean) / std, (0, padding[1], 0, padding[0])), size

    @torch.no_grad()
    def __call__(self, images: Tensor) -> list[list[Detection]]:
        """Up to DETECTIONS of each image of (B, 3, H, W) in 0..1, of any confidence."""
        prepared, size = self.prepare(images.to(self.model.device))
        found = []
        for row in prepared.split(1):  # the masks of one image at 800 px are large enough
            output = self.model(pixel_values=row, pixel_mask=torch.ones_like(row[:, 0], dtype=torch.int64))
            logits = output.masks_queries_logits  # (1, Q, h, w)
            logits = F.interpolate(logits, row.shape[-2:], mode="bilinear", align_corners=False)
            logits = logits[..., : size[0], : size[1]]
            masks = F.interpolate(logits, images.shape[-2:], mode="bilinear", align_corners=False)[0]
            found.append(self.instances(output.class_queries_logits[0], masks))
        return found

    def instances(self, class_logits: Tensor, mask_logits: Tensor) -> list[Detection]:
        """The most probable pairs of query and class: confidence is the class's times the mask's own mean.

        class_logits: (Q, classes + 1), the last of nothing. mask_logits: (Q, H, W).
        """
        probabilities = class_logits.float().softmax(-1)[:, :-1]
        scores, pairs = probabilities.flatten().topk(min(DETECTIONS, probabilities.numel()))
        queries, labels = pairs // probabilities.shape[1], pairs % probabilities.shape[1]
        masks = mask_logits > 0  # (Q, H, W)
        areas = masks.sum((1, 2))
        quality = (mask_logits.float().sigmoid() * masks).sum((1, 2)) / (areas + 1e-6)
        shown = masks.cpu().numpy()
        return [
            Detection(self.names[label], score, _box(shown[query]), shown[query])
            for query, label, score in zip(
                queries.tolist(), labels.tolist(), (scores * quality[queries]).tolist(), strict=True
            )
            if areas[query] > 0
        ]


def _box(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The tight box of a mask that is not empty, far edges exclusive."""
    columns, rows = np.flatnonzero(mask.any(0)), np.flatnonzero(mask.any(1))
    return float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1)


class ColorClassifier:
    """Which of COLORS an object has: CLIP on the object cut out over gray, against sentences with each color."""

    def __init__(self, clip: CLIP) -> None:
        self.clip = clip
        self.sentences: dict[str, Tensor] = {}

    def classes(self, name: str) -> Tensor:
        """(10, D): of each color the mean over TEMPLATES."""
        if name not in self.sentences:
            texts = [template.format(color=color, name=name) for color in COLORS for template in TEMPLATES]
            mean = self.clip.texts(texts).view(len(COLORS), len(TEMPLATES), -1).mean(1)
            self.sentences[name] = F.normalize(mean, dim=-1)
        return self.sentences[name]

    def __call__(self, image: Tensor, objects: list[Detection]) -> list[str]:
        """image: (3, H, W) in 0..1; objects of one class."""
        embeddings = []
        for item in objects:
            mask = torch.from_numpy(item.mask).to(image.device)
            left, top, right, bottom = (round(edge) for edge in item.box)
            cut = torch.where(mask, image, BACKGROUND)[:, top:bottom, left:right]
            embeddings.append(self.clip.images(cut[None]))
        best = (torch.cat(embeddings) @ self.classes(objects[0].name).T).argmax(-1)
        return [COLORS[i] for i in best.tolist()]


class GenEval:
    """Flow-GRPO's partial credit as the reward; the benchmark's `correct` (also by tag) and Flow-GRPO's `strict` as
    details; as mask the requested objects that were found; what each location earned (`reward_map`), and the credit
    of each entry of the include list."""

    def __init__(self, detector: Detector, classifier: ColorClassifier) -> None:
        self.detector, self.classifier = detector, classifier

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        metadata = [check(item) for item in metadata]  # before the networks run
        for item in metadata:
            unknown = {entry["class"] for entry in item["include"]} - set(self.detector.names)
            if unknown:
                raise ValueError(f"reward: 'geneval' got the class {min(unknown)!r}, which its detector does not know")
        verdicts = []
        for image, detections, item in zip(images, self.detector(images), metadata, strict=True):
            groups = select(detections, item.get("tag", ""))
            verdicts.append(judge(groups, item, partial(self.classifier, image)))
        height, width = images.shape[-2:]
        masks = np.zeros((len(images), height, width), np.float32)
        for mask, verdict in zip(masks, verdicts, strict=True):
            for detection in verdict.found:
                mask[detection.mask] = 1.0
        correct = torch.tensor([float(verdict.correct) for verdict in verdicts])
        details = {"correct": correct, "strict": torch.tensor([float(verdict.strict) for verdict in verdicts])}
        for tag in TAGS:
            chosen = torch.tensor([item.get("tag") == tag for item in metadata])
            if chosen.any():
                details[f"correct_{tag}"] = torch.where(chosen, correct, torch.nan)
        named = [phrases(prompt, item["include"]) for prompt, item in zip(prompts, metadata, strict=True)]
        credits = torch.full((len(images), max((len(row) for row in named), default=0)), torch.nan)
        for row, verdict, words in zip(credits, verdicts, named, strict=True):
            known = [c if phrase is not None else np.nan for c, phrase in zip(verdict.credits, words, strict=True)]
            row[: len(known)] = torch.tensor(known)
        return Scores(
            torch.tensor([verdict.soft for verdict in verdicts]),
            details,
            torch.from_numpy(masks),
            torch.from_numpy(np.stack([reward_map(verdict, (height, width)) for verdict in verdicts])),
            credits=credits,
            concepts=tuple(tuple(phrase or "" for phrase in row) for row in named),
        )


def load(path: str | None, clip_path: str | None, device: torch.device | str) -> GenEval:
    """path: a Mask2FormerForUniversalSegmentation trained on COCO instances. clip_path: a CLIPModel."""
    model = load_pretrained("geneval", Mask2FormerForUniversalSegmentation, path or DETECTOR, device)
    return GenEval(
        Detector(model), ColorClassifier(load_clip("geneval", "geneval_clip", clip_path or OPENAI_L, device))
    )
