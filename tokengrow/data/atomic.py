"""A file is there whole or not at all, whenever the process or the machine stops."""

import os
from pathlib import Path

TEMPORARY = ".tmp"
"""Ending of names that a killed process may leave behind; never anything of value."""


def write_atomically(path: Path, content: bytes) -> None:
    """Writes ``content`` under another name, flushes it to disk, then renames it to ``path``."""
    # The process id keeps two processes that write the same cache entry out of each other's file.
    temporary = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY}")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    replace_durably(temporary, path)


def replace_durably(temporary: Path, path: Path) -> None:
    """Renames a flushed file and flushes the folder, so that the new name survives a power cut."""
    os.replace(temporary, path)
    if os.name == "posix":  # Windows cannot open a folder
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
