"""Files that are either whole or as they were before."""

from __future__ import annotations

import fcntl
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


LOCK = ".lock"


class FolderLock:
    """Holds a folder for one process; the operating system lets it go when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        """Raises BlockingIOError if another process holds the folder."""
        self.file = (folder / LOCK).open("ab")
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.file.close()
            raise

    def release(self) -> None:
        self.file.close()


def is_empty(folder: Path) -> bool:
    """Whether a folder is not there, or has nothing in it but a lock and files that were never finished."""
    unfinished = lambda name: name.startswith(".") and name.endswith(".writing")
    return not folder.exists() or all(path.name == LOCK or unfinished(path.name) for path in folder.iterdir())


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
