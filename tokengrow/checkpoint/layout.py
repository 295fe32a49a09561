"""File names of a checkpoint, and the marker that makes it complete.

    step_00001000/
        model.safetensors  optimizer.safetensors  train_state.json
        config.yaml  lineage.json  tokenizer.json  times.json
        COMPLETE

COMPLETE is written last and holds the size and SHA-256 of every other file. A directory without it
is not a checkpoint.
"""

import json
import re
from pathlib import Path

from tokengrow.errors import UserError
from tokengrow.files import sha256, sync

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
TRAIN_STATE = "train_state.json"
CONFIG = "config.yaml"
LINEAGE = "lineage.json"
TOKENIZER = "tokenizer.json"
TIMES = "times.json"
COMPLETE = "COMPLETE"

RUN_CONFIG, SESSIONS = "config.yaml", "sessions.json"
"""Files in a run directory next to its checkpoints: the resolved recipe, and the sessions."""

REQUIRED_FILES = {WEIGHTS, TRAIN_STATE, CONFIG, LINEAGE}
"""Files that every checkpoint has."""

TENSOR_FILES = {WEIGHTS, OPTIMIZER}
"""Files whose size grows with the model."""

_REMEDY = "Use another checkpoint of this run."

_STEP = re.compile(r"step_(\d{8,})")


def step_folder(step: int) -> str:
    """Return the directory name of the checkpoint of an optimizer step."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """Return the optimizer step in the name of a checkpoint directory."""
    return int(folder.name.removeprefix("step_"))


def step_folders(run: Path) -> list[Path]:
    """Return the checkpoint directories of a run, complete or not, oldest first."""
    found = [path for path in run.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def find_checkpoints(run: Path) -> list[Path]:
    """Return the complete checkpoints of a run, oldest first."""
    return [folder for folder in step_folders(run) if (folder / COMPLETE).is_file()]


def write_marker(folder: Path) -> None:
    """Write COMPLETE with the sizes and hashes of all files, and flush it to disk."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    }
    marker = folder / COMPLETE
    marker.write_text(json.dumps(files, indent=1), encoding="utf-8")
    sync(marker)


def verify(folder: Path, tensors: bool = True) -> None:
    """Compare every file of a checkpoint with its marker.

    Args:
        folder: directory of the checkpoint.
        tensors: whether to hash the tensor files too, in addition to checking their size.

    Raises:
        UserError: a file is missing, or differs from what was written; the message names it.
    """
    for name, (size, digest) in _read_marker(folder).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing. {_REMEDY}")
        if (found := path.stat().st_size) != size:
            raise UserError(f"{path} must have {size} bytes, got {found}. {_REMEDY}")
        if (tensors or name not in TENSOR_FILES) and sha256(path) != digest:
            raise UserError(
                f"{path} is damaged: its SHA-256 differs from the one in {COMPLETE}. {_REMEDY}"
            )


def recorded_sha256(folder: Path, name: str) -> str:
    """Return the SHA-256 of a file of a checkpoint, as its marker holds it."""
    return _read_marker(folder)[name][1]


def _read_marker(folder: Path) -> dict[str, tuple[int, str]]:
    """Return each file name with its size in bytes and its SHA-256."""
    marker = folder / COMPLETE
    if not marker.is_file():
        raise UserError(f"{folder} has no {COMPLETE} file, so it is not a complete checkpoint.")
    try:
        entries = json.loads(marker.read_text(encoding="utf-8")).items()
        files = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in entries}
    except (ValueError, AttributeError, KeyError, TypeError):
        files = {}
    if not files.keys() >= REQUIRED_FILES:
        raise UserError(f"{marker} is damaged. {_REMEDY}")
    return files
