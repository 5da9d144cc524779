"""Files that are either whole or as they were before."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def sync(path: Path) -> None:
    """Ask the disk to keep a file or a folder before anything relies on it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place and rename it into it, so that a crash or a full disk leaves the old one."""
    writing = path.with_name(f".{path.name}.writing")
    try:
        with writing.open("wb") as file:
            write(file)
        sync(writing)
        writing.replace(path)
    except OSError:
        writing.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    replace(path, lambda file: file.write(text.encode()))
