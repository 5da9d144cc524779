"""Whether a image shows the text that its prompt quotes: Flow-GRPO's reward (flow_grpo/ocr.py), read by RapidOCR.

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
MATCH = 0.5  # similarity from which a line of text counts as a part of what was asked for


def target(prompt: str) -> str:
    """The first text in double quotes, without spaces, in lower case. Raises ValueError if there is none."""
    for found in QUOTED.finditer(prompt):
        text = normalize(next(group for group in found.groups() if group is not None))
        if text:
            return text
    raise ValueError(f"reward: 'ocr' found no text in double quotes in the prompt {prompt!r}")


def normalize(text: str) -> str:
    return "".join(text.split()).lower()


def edit_reward(read: str, wanted: str) -> float:
    """1 - edit distance / length of the text that is wanted, in 0..1; 1 if it is anywhere in what was read.

    Both normalized. An image full of other text is worth no less than an empty one.
    """
    from rapidfuzz.distance import Levenshtein

    if wanted in read:
        return 1.0
    return 1.0 - min(Levenshtein.distance(read, wanted), len(wanted)) / len(wanted)


class OCR:
    """The reward in 0..1, `exact` as a detail, and as mask the boxes of the lines that are a part of the text.

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
        rewards, masks = [], np.zeros(arrays.shape[:3], np.float32)
        for array, prompt, mask in zip(arrays, prompts, masks, strict=True):
            wanted, lines = target(prompt), self.read(array)
            rewards.append(edit_reward(normalize("".join(text for text, _ in lines)), wanted))
            for text, box in lines:
                similarity = self.similarity(normalize(text), wanted) / 100
                if similarity >= MATCH:
                    canvas = Image.new("1", mask.shape[::-1])
                    ImageDraw.Draw(canvas).polygon([tuple(point) for point in box.tolist()], fill=1)
                    np.maximum(mask, similarity * np.asarray(canvas, np.float32), out=mask)
        reward = torch.tensor(rewards)
        return Scores(reward, {"exact": (reward == 1).float()}, torch.from_numpy(masks))
