"""Files that are either whole or as they were before."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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


@contextmanager
def new_folder(folder: Path, option: str) -> Iterator[None]:
    """Within it a folder that was empty, or not there, is this process' own. Raises ValueError, naming the option, for
    one that is not empty or that another process fills."""
    if not is_empty(folder):
        raise ValueError(f"{option}: {folder} is not empty; choose a new folder")
    made = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FolderLock(folder)
    except BlockingIOError:
        raise ValueError(f"{option}: another process writes into {folder}; choose a new folder") from None
    try:
        yield
    finally:
        if made and is_empty(folder):  # nothing was written
            shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def is_unfinished(name: str) -> bool:
    """Whether a file of this name is what `replace` leaves when it is killed."""
    return name.startswith(".") and name.endswith(".writing")


def is_empty(folder: Path) -> bool:
    """Whether a folder is not there, or has nothing in it but a lock and files that were never finished. Raises
    NotADirectoryError for a file."""
    return not folder.exists() or all(path.name == LOCK or is_unfinished(path.name) for path in folder.iterdir())


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


def numbered_json_lines(path: Path) -> list[tuple[str, dict]]:
    """The objects of a file with one a line, each with its "FILE:LINE"; none if there is no file. A last line that was
    cut short, by a crash or because it is being written, is left out. Raises Unreadable."""
    if not path.exists():
        return []
    *lines, cut = read_text(path).split("\n")
    if cut.rstrip().endswith("}"):
        lines.append(cut)
    return [(f"{path}:{n}", parse_object(line, f"{path}:{n}")) for n, line in enumerate(lines, 1) if line.strip()]


def read_json_lines(path: Path) -> list[dict]:
    """`numbered_json_lines` without the numbers."""
    return [line for _, line in numbered_json_lines(path)]


def json_line(values: Mapping[str, Any]) -> str:
    """An object as a line of such a file. A number that is not finite is null: JSON has none, and other readers stop
    at Python's NaN."""
    return json.dumps(_finite(values), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def is_number(value: object) -> bool:
    """Whether a value of a JSON text is a number; true and false are none, though Python counts them as such."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_count(value: object) -> bool:
    """Whether it is a whole number from 0 on that an array holds."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


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


PNG = b"\x89PNG\r\n\x1a\n"  # begins every file of this kind
BEGINNING = 2**20  # bytes, by which a file is recognized


def claim(path: Path, option: str, noun: str, is_own: Callable[[bytes], bool]) -> None:
    """Make sure, before the work, that an output can be written to a path, over nothing but an earlier one like it.

    noun: what is written there, for the error. is_own: whether a file that begins with these bytes is such a one. Makes
    the folder. Raises ValueError, naming the option, for anything else that is there, and for a folder that takes no
    file.
    """
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; name a file in it")
    if path.is_file():
        with path.open("rb") as file:
            beginning = file.read(BEGINNING)
        if not is_own(beginning):
            raise ValueError(f"{option}: {path} is no {noun}, so it stays as it is; choose another --{option}")
    elif path.exists() or path.is_symlink():
        raise ValueError(f"{option}: {path} is no file, so it stays as it is; choose another --{option}")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise ValueError(f"{option}: {path.parent} takes no file (no permission); choose another --{option}")


def is_json_of(*keys: str) -> Callable[[bytes], bool]:
    """For `claim`: whether a file is an object with these keys, or a list that begins with one."""

    def is_own(beginning: bytes) -> bool:
        try:
            value = json.loads(beginning)
        except (ValueError, RecursionError):
            return False
        first = value[0] if isinstance(value, list) and value else value
        return isinstance(first, dict) and set(keys) <= first.keys()

    return is_own


def replace(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file under another name and then rename it, so that a crash or a full disk leaves the old one."""
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
