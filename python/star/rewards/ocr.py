"""Whether an image shows the text that its prompt quotes: Flow-GRPO's reward (flow_grpo/ocr.py), read by RapidOCR.

Flow-GRPO reads with PaddleOCR; RapidOCR runs PaddleOCR's networks in onnxruntime, with the weights inside its wheel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from star.messages import one_line
from star.rewards import Metadata, RewardError, Scores, pixels

# Of several languages; a text may be left unclosed. A straight quote after a digit is an inch.
QUOTED = re.compile(
    r'(?<!\d)"([^"]*)(?:"|$)|“([^“”]*)(?:[“”]|$)|„([^“”]*)(?:[“”]|$)|”([^”]*)”|«([^»]*)(?:»|$)|»([^«]*)«'
    r"|「([^」]*)(?:」|$)|『([^』]*)(?:』|$)|＂([^＂]*)(?:＂|$)"
)
MATCH = 0.5  # similarity from which a line counts as a part of the quoted text


def target(prompt: str) -> str:
    """The first text in double quotes, without spaces, in lower case. Raises ValueError if there is none."""
    return normalize(quoted(prompt)[0])


def quoted(prompt: str) -> list[str]:
    """The texts in double quotes as they stand, those without a letter or sign left out. Raises ValueError if there is
    none."""
    found = [next(group for group in match.groups() if group is not None) for match in QUOTED.finditer(prompt)]
    texts = [text for text in found if normalize(text)]
    if not texts:
        raise ValueError(f"reward: 'ocr' found no text in double quotes in the prompt {prompt!r}")
    return texts


def normalize(text: str) -> str:
    return "".join(text.split()).lower()


def edit_reward(read: str, wanted: str) -> float:
    """1 - edit distance / length of the wanted text, in 0..1; 1 if it is anywhere in what was read.

    Both texts are normalized. An image full of other text is worth no less than an empty one.
    """
    from rapidfuzz.distance import Levenshtein

    if wanted in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(read, wanted), len(wanted)) / len(wanted)


def line_reward(line: str, wanted: str) -> float:
    """1 - edit distance of the shorter one to the best part of the longer one / length of the shorter one, in 0..1.

    So a line that is a part of the text, or has the text in it, earns 1, and an empty line 0. Both
    texts are normalized.
    """
    short, long = sorted((line, wanted), key=len)
    row = [0] * (len(long) + 1)  # of the edit distance of the beginnings of `short` to a part that ends there
    for i, sign in enumerate(short, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(long, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (sign != other))
    return 1.0 - min(row) / len(short) if short else 0.0


class OCR:
    """The reward in 0..1, `exact` as a detail, as mask the boxes of the lines that are a part of the text, what each
    location earned, and the credit of each quoted text.

    A line that was read earns inside its box what it is worth by itself (`line_reward`) for the quoted text that it is
    nearest to. Elsewhere, where missing text could have been, a location earns what the image earned.

    threads: of onnxruntime per operator; 0 or less: as many as there are cores.
    """

    def __init__(self, threads: int = 0) -> None:
        from rapidfuzz import fuzz
        from rapidocr import RapidOCR

        self.similarity = fuzz.partial_ratio
        try:
            self.engine = RapidOCR(
                params={
                    "Global.use_cls": False,  # no rotated lines, as in Flow-GRPO
                    "Global.log_level": "error",
                    "EngineConfig.onnxruntime.intra_op_num_threads": threads if threads > 0 else -1,
                }
            )
        except ImportError:
            raise
        except Exception as error:  # a network of its wheel that is damaged, or missing and not to be downloaded
            raise RewardError(
                f"reward: 'ocr' could not load its networks ({one_line(error)}); pip install --force-reinstall rapidocr"
            ) from error

    def read(self, image: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Lines of text and their boxes (4, 2) in (x, y) pixels. image: (H, W, 3) uint8, RGB."""
        found = self.engine(np.ascontiguousarray(image[..., ::-1]))  # the networks were trained on BGR
        return list(zip(found.txts or (), found.boxes if found.txts else (), strict=True))

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Metadata) -> Scores:
        arrays = pixels(images)
        concepts = tuple(tuple(quoted(prompt)) for prompt in prompts)
        masks, maps = (np.zeros(arrays.shape[:3], np.float32) for _ in range(2))
        credits = torch.full((len(prompts), max((len(row) for row in concepts), default=0)), torch.nan)
        for array, texts, row, mask, field in zip(arrays, concepts, credits, masks, maps, strict=True):
            wanted, lines = [normalize(text) for text in texts], self.read(array)
            everything = normalize("".join(text for text, _ in lines))
            row[: len(wanted)] = torch.tensor([edit_reward(everything, text) for text in wanted])
            field[:] = float(row[0])
            for text, box in lines:
                inside, line = inside_box(box, *array.shape[:2]), normalize(text)
                field[inside] = max(line_reward(line, text) for text in wanted)
                similarity = self.similarity(line, wanted[0]) / 100
                if similarity >= MATCH:
                    mask[inside] = np.maximum(mask[inside], similarity)
        reward = credits[:, 0].clone() if len(prompts) else torch.zeros(0)
        return Scores(
            reward,
            {"exact": (reward == 1).float()},
            torch.from_numpy(masks),
            torch.from_numpy(maps),
            credits=credits,
            concepts=concepts,
        )


def inside_box(box: np.ndarray, height: int, width: int) -> np.ndarray:
    """(height, width) bool, the pixels within a quadrangle (4, 2) in (x, y)."""
    canvas = Image.new("1", (width, height))
    ImageDraw.Draw(canvas).polygon([tuple(point) for point in box.tolist()], fill=1)
    return np.asarray(canvas)
