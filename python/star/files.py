"""Files that are either whole or as they were before."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from star.messages import one_line


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
    """Whether a folder is not there, or has nothing in it but a lock and files that were never finished. Raises
    NotADirectoryError for a file."""
    unfinished = lambda name: name.startswith(".") and name.endswith(".writing")
    return not folder.exists() or all(path.name == LOCK or unfinished(path.name) for path in folder.iterdir())


class Unreadable(ValueError):
    """A file that cannot be read as text, or holds something else; the message is one line that names it."""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, without the byte order mark that Notepad and Excel begin files with. Raises
    Unreadable."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unreadable(f"{path} cannot be read (not UTF-8)") from error
    except OSError as error:
        raise Unreadable(f"{path} cannot be read ({error.strerror})") from error


def read_json_lines(path: Path) -> list[dict]:
    """The objects of a file with one a line; none if there is no file. A last line that was cut short, by a crash or
    because it is being written, is left out. Raises Unreadable."""
    if not path.exists():
        return []
    *lines, cut = read_text(path).split("\n")
    if cut.rstrip().endswith("}"):
        lines.append(cut)
    return [parse_object(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _whole(digits: str) -> int:
    number = int(digits)
    float(number)  # raises OverflowError, here rather than where it is computed with
    return number


def parse_json(text: str, source: object) -> Any:
    """Raises Unreadable, naming the source, for what is no JSON, or has a whole number that no float holds."""
    try:
        return json.loads(text, parse_int=_whole)
    except (ValueError, RecursionError, OverflowError) as error:
        raise Unreadable(f"{source} is not JSON ({one_line(error)})") from error


def parse_object(text: str, source: object) -> dict[str, Any]:
    """The object of a JSON text. Raises Unreadable, naming the source, for anything else."""
    value = parse_json(text, source)
    if not isinstance(value, dict):
        raise Unreadable(f"{source} holds a {type(value).__name__}, expected a JSON object")
    return value


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside its place and rename it into it, so that a crash or a full disk leaves the old one."""
    writing = path.with_name(f".{path.name}.writing")
    writing.unlink(missing_ok=True)  # in a folder that somebody sent it may be a link to another file
    try:
        with writing.open("xb") as file:
            write(file)
        sync(writing)
        writing.replace(path)
    except OSError:
        writing.unlink(missing_ok=True)
        raise
    sync(path.parent)


def replace_text(path: Path, text: str) -> None:
    replace(path, lambda file: file.write(text.encode()))
