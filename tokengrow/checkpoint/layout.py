"""The names and the marker of a checkpoint folder.

    step_00001000/
        model.safetensors  optimizer.safetensors  train_state.json
        config.yaml  lineage.json  tokenizer.json
        COMPLETE

COMPLETE is written last and holds every file's size and SHA-256; a folder without it does not
exist.
"""

import hashlib
import json
import os
import re
from pathlib import Path

from tokengrow.errors import UserError

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAIN_STATE = "train_state.json"
CONFIG = "config.yaml"
LINEAGE = "lineage.json"
TOKENIZER = "tokenizer.json"
COMPLETE = "COMPLETE"

_STEP = re.compile(r"step_(\d{8,})")


def step_folder(step: int) -> str:
    """Name of the checkpoint of an optimizer step."""
    return f"step_{step:08d}"


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not run.is_dir():
        return []
    found = [p for p in run.iterdir() if _STEP.fullmatch(p.name) and (p / COMPLETE).is_file()]
    return sorted(found, key=lambda p: int(p.name.removeprefix("step_")))


def write_marker(folder: Path) -> None:
    """Makes the folder a checkpoint: sizes and hashes of its files, on the disk before it
    returns."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    }
    write_durably(folder / COMPLETE, json.dumps(files, indent=1))


def verify(folder: Path) -> None:
    """Compares every file with the marker.

    Raises:
        UserError: names the first file that is missing or not what was written.
    """
    marker = folder / COMPLETE
    if not marker.is_file():
        raise UserError(f"{folder} has no {COMPLETE}: it is not a checkpoint, or half of one")
    try:
        files = json.loads(marker.read_text())
    except ValueError:
        raise UserError(f"{marker} is damaged: use another checkpoint of this run") from None
    for name, wanted in files.items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: use another checkpoint of this run")
        if (size := path.stat().st_size) != wanted["bytes"]:
            raise UserError(
                f"{path} has {size} bytes, {wanted['bytes']} were written: "
                "use another checkpoint of this run"
            )
        if sha256(path) != wanted["sha256"]:
            raise UserError(
                f"{path} is damaged (its SHA-256 is not that in {COMPLETE}): "
                "use another checkpoint of this run"
            )


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, text: str) -> None:
    """Writes a text file that is on the disk when this returns."""
    path.write_text(text)
    sync(path)


def sync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
