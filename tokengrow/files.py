"""Atomic writes of files and directories, locks, hashes and YAML."""

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
"""Extension of temporary files, which a killed process may leave."""
PARTIAL = ".partial"
"""Extension of the hidden directory that is renamed once it is complete."""

NO_SPACE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""Error numbers of a full disk, a quota, or a limit on file sizes."""


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file, flush it to disk, and rename it to `path`."""
    # The process id separates two processes that write the same cache entry.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        temporary.write_bytes(content)
        sync(temporary)
        rename_durably(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def is_stale_temporary(path: Path, names: Iterable[str]) -> bool:
    """Return whether `path` is a temporary file that a killed process left for one of `names`."""
    return any(fnmatch(path.name, f"{name}.*{TEMPORARY}") for name in names)


def rename_durably(temporary: Path, path: Path) -> None:
    """Rename a flushed file or directory, so that the new name survives a power failure."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a directory, to disk."""
    if path.is_dir() and os.name != "posix":
        return  # Windows cannot open a directory
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_directory(folder: Path, seal: Callable[[Path], None] = lambda _: None) -> Iterator[Path]:
    """Yield an empty directory that is renamed to `folder` when the block succeeds.

    All files are flushed to disk first. After an exception nothing remains; after a kill, a hidden
    directory that the next attempt removes.

    Args:
        folder: missing parents are created; an existing empty directory is replaced.
        seal: writes and flushes a marker that the directory is complete.

    Raises:
        UserError: `folder` is not empty, or cannot be created.
    """
    if folder.exists() and not _is_empty(folder):
        raise UserError(f"{folder} exists. Choose another path; nothing is overwritten.")
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
            os.rmdir(folder)  # fails if another process wrote into it
        rename_durably(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # keeps a parent that is not empty
            for parent in made:
                parent.rmdir()
        raise


def _make(partial: Path, folder: Path) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"{folder}: {error.strerror}. Choose another path.") from None


def _is_empty(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())


@contextmanager
def directory_lock(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a directory; the lock ends with the process.

    Args:
        folder: the directory; must exist.
        wait: whether to wait for another process that holds the lock.

    Raises:
        BlockingIOError: another process holds the lock, and `wait` is false.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where no command starts several processes
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def as_yaml(value: dict[str, Any]) -> bytes:
    """Return plain values as YAML, with keys in order."""
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True, encoding="utf-8")


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    """Write plain values as YAML."""
    path.write_bytes(as_yaml(value))


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))
