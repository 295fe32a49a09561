"""Files that are there whole or not at all, whenever the process or the machine stops."""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from tokengrow.errors import UserError

TEMPORARY = ".tmp"
"""Ending of names that a killed process may leave behind; never anything of value."""
PARTIAL = ".partial"
"""Ending of the hidden folder in which a folder is written before it gets its name."""

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What a full disk, a quota or a limit on the size of files say."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes `content` under another name, flushes it to disk, then renames it to `path`."""
    # The process id keeps two processes that write the same cache entry out of each other's file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        rename_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_stale_temporary(path: Path, names: Iterable[str]) -> bool:
    """Whether this is what a kill left of writing a file of one of these names atomically."""
    return any(fnmatch(path.name, f"{name}.*{TEMPORARY}") for name in names)


def rename_durably(temporary: Path, path: Path) -> None:
    """Renames a flushed file or folder, so that the new name survives a power cut."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a folder
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(folder: Path, seal: Callable[[Path], None] = lambda _: None) -> Iterator[Path]:
    """Yields an empty folder beside `folder`, which takes its name once the block has ended well.

    What was written is flushed to the disk first. After an exception nothing is left; after a kill,
    a hidden folder that the next attempt removes.

    Args:
        folder: its parents are made if need be; an empty folder of its name gives way.
        seal: writes, and flushes, what says that all the rest is on the disk.

    Raises:
        UserError: `folder` holds something, and nothing is overwritten; or it cannot be made.
    """
    if folder.exists() and not _is_empty(folder):
        raise UserError(f"{folder} exists already: choose another place; nothing is overwritten")
    partial = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(partial, ignore_errors=True)
    made = [parent for parent in folder.parents if not parent.exists()]
    try:
        _make(partial, folder)
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        seal(partial)
        sync(partial)
        if folder.exists():
            os.rmdir(folder)  # which refuses a folder into which somebody wrote meanwhile
        rename_durably(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # one in which somebody has put something stays
            for parent in made:
                parent.rmdir()
        raise


def _make(partial: Path, folder: Path) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}: choose another place") from None


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


@contextmanager
def directory_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Lets one process at a time work in a folder, by a lock that dies with its holder.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where nothing starts several processes on one folder
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_yaml(value: dict[str, Any]) -> bytes:
    """Plain values, keys in their order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, encoding="utf-8")


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """Writes `as_yaml(value)`."""
    path.write_bytes(as_yaml(value))


def read_yaml(path: Path) -> dict[str, Any]:
    """Reads what `write_yaml` wrote."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))
