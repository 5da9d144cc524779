"""Skips of tests for what an older library lacks.

Nobody lists versions: a test asks for the class or the kernel that it needs. From the versions of requirements-ci.txt
on the lack is a failure, so that no skip hides what is broken or was renamed there.
"""

from __future__ import annotations

import importlib
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

import pytest

from star_kernels import native

PINS = Path(__file__).parents[1] / "requirements-ci.txt"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:3]))


def is_older_than_pinned(distribution: str) -> bool:
    pinned = re.search(rf"^{distribution}==(\S+)", PINS.read_text(), re.M)
    assert pinned, f"{distribution} is not in {PINS.name}"
    return numbers(version(distribution)) < numbers(pinned[1])


def skip_without(distribution: str, what: str) -> NoReturn:
    """Skip the test that runs, or the file that is read, for what an older version of a distribution lacks; fail under
    the pinned one."""
    text = f"{distribution} {version(distribution)} has no {what}"
    if is_older_than_pinned(distribution):
        pytest.skip(text, allow_module_level=True)
    pytest.fail(f"{text}, which the tests' own version has", pytrace=False)


def module_or_skip(name: str) -> Any:
    """A module of a distribution of the same name."""
    try:
        return importlib.import_module(name)
    except ImportError:
        skip_without(name.partition(".")[0], name)


def built_or_skip(build: Any) -> Any:
    """What build() makes of a class of a library, or a skip if the library has no such class."""
    try:
        return build()
    except AttributeError as error:
        library = getattr(error.obj, "__name__", None)
        if library not in ("diffusers", "transformers"):
            raise
        skip_without(library, str(error.name))


def compiled_or_skip() -> None:
    """Skip the test that runs where this torch is too old for the compiled operators."""
    if native.REASON is not None:
        skip_without("torch", f"compiled operators: {native.REASON}")
