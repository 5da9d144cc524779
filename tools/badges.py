"""The badges of the README, from pyproject.toml: `python tools/badges.py`. They ask no other host for anything."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "badges"
LETTER, MARGIN, HEIGHT = 7, 6, 20  # pixels
BADGE = """<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}">
<title>{name}: {value}</title>
<rect width="{width}" height="{height}" rx="3" fill="#3f51b5"/>
<rect width="{left}" height="{height}" rx="3" fill="#555"/>
<g fill="#fff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">
<text x="{margin}" y="14">{name}</text>
<text x="{value_x}" y="14">{value}</text>
</g>
</svg>
"""


def badge(name: str, value: str) -> str:
    """An SVG."""
    left, right = (LETTER * len(text) + 2 * MARGIN for text in (name, value))
    return BADGE.format(
        name=name, value=value, width=left + right, left=left, height=HEIGHT, margin=MARGIN, value_x=left + MARGIN
    )


def badges() -> dict[str, str]:
    """SVGs by name."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (torch,) = (re.sub("[^0-9.]", "", one) for one in project["dependencies"] if one.startswith("torch"))
    python = project["requires-python"].removeprefix(">=")
    values = {"license": project["license"], "python": f"{python}+", "torch": f"{torch}+"}
    return {name: badge(name, value) for name, value in values.items()}


def main() -> None:
    FOLDER.mkdir(exist_ok=True)
    for name, text in badges().items():
        (FOLDER / f"{name}.svg").write_text(text)


if __name__ == "__main__":
    main()
