"""README is short, and each number in it is on the page that the same paragraph links to."""

import math
import re
from pathlib import Path

import pytest
from safetensors import safe_open

import badges

ROOT = Path(__file__).resolve().parents[2]
BEFORE_INSTALLING, INSTALLING, _ = (ROOT / "README.md").read_text().partition("\n## Installing\n")
WORDS = {"5": "five", "6": "six", "8": "eight"}
LONGEST = 400  # words before the section on installing
LINK = re.compile(r"\]\(([^)\s]+)\)")
NUMBER = re.compile(r"(?<![\w.-])[-+]?\d+(?:\.\d+)?(?![\w.]*\w)")


def paragraphs(text: str) -> list[str]:
    """Paragraphs, items of lists and rows of tables, without blocks of code and images."""
    text = re.sub(r"```.*?```|!\[[^\]]*\]\([^)]*\)", "", text, flags=re.S)
    return [part for part in re.split(r"\n\n|\n(?=[-|])", text) if part.strip()]


def numbers(paragraph: str) -> list[str]:
    """Of its text, without the targets of links, code, and names such as FLUX.1 and 2."""
    text = LINK.sub("]", re.sub(r"`[^`]*`|FLUX\.1 and 2", "", paragraph))
    return NUMBER.findall(text)


def unsupported(paragraph: str) -> list[str]:
    """The numbers that no page of this repository that the paragraph links to has."""
    targets = [ROOT / target.partition("#")[0] for target in LINK.findall(paragraph) if ":" not in target]
    linked = "\n".join(page.read_text() for page in targets)
    found = {*NUMBER.findall(linked)} | {number for number, word in WORDS.items() if f"{word} " in linked}
    return [number for number in numbers(paragraph) if number not in found]


def test_readme_is_short_before_it_installs():
    assert INSTALLING and len(BEFORE_INSTALLING.split()) <= LONGEST


@pytest.mark.parametrize("paragraph", paragraphs(BEFORE_INSTALLING), ids=lambda text: " ".join(text.split()[:4]))
def test_numbers_are_on_the_page_that_is_linked(paragraph):
    assert unsupported(paragraph) == []


def test_the_embedded_model_has_the_parameters_that_the_pages_name():
    name = "diffusion_pytorch_model.safetensors"
    with safe_open(ROOT / "python/star/shapes/weights/transformer" / name, "pt") as file:
        count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    for page in ("README.md", "docs/evidence.md", "docs/shapes.md"):
        found = re.findall(r"(\S+) million\s+parameters", (ROOT / page).read_text())
        assert found == [f"{count / 1e6:.1f}"], page


def test_the_numbers_of_the_readme_are_looked_for():
    found = [number for paragraph in paragraphs(BEFORE_INSTALLING) for number in numbers(paragraph)]
    assert {"28.0", "-0.013", "+0.003", "13"} <= {*found}


def test_a_number_that_the_page_does_not_have_is_found():
    text = "It takes 28.0 us, [not](docs/gpu-measured.md) 12.34567 us; H200 and SD3.5 are names."
    assert numbers(text) == ["28.0", "12.34567"] and unsupported(text) == ["12.34567"]
    assert unsupported("3.25 [of another site](https://a.org/3.25)") == ["3.25"]


def test_badges_say_what_the_package_says():
    assert {path.stem: path.read_text() for path in badges.FOLDER.glob("*.svg")} == badges.badges(), (
        "run tools/badges.py"
    )
