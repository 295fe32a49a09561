"""The names and the marker of a checkpoint folder.

    step_00001000/
        model.safetensors  optimizer.safetensors  train_state.json
        config.yaml  lineage.json  tokenizer.json  times.json
        COMPLETE

COMPLETE is written last and holds every file's size and SHA-256. Without it there is no
checkpoint.
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
"""In a run's folder, beside its checkpoints: the resolved recipe, and where it was trained."""

ALWAYS = {WEIGHTS, TRAIN_STATE, CONFIG, LINEAGE}
"""The files that no checkpoint lacks."""

TENSORS = {WEIGHTS, OPTIMIZER}
"""The files that are as large as the model."""

_WAY_OUT = "use another checkpoint of this run"

_STEP = re.compile(r"step_(\d{8,})")


def step_folder(step: int) -> str:
    """Name of the checkpoint of an optimizer step."""
    return f"step_{step:08d}"


def step_of(folder: Path) -> int:
    """The optimizer step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step_"))


def step_folders(run: Path) -> list[Path]:
    """Every folder of a run that has a checkpoint's name, whole or not, oldest first."""
    found = [path for path in run.glob("step_*") if _STEP.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def find_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return [folder for folder in step_folders(run) if (folder / COMPLETE).is_file()]


def write_marker(folder: Path) -> None:
    """Makes the folder a checkpoint: writes sizes and hashes of its files, flushed to the disk."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sha256(path)}
        for path in sorted(folder.iterdir())
    }
    marker = folder / COMPLETE
    marker.write_text(json.dumps(files, indent=1), encoding="utf-8")
    sync(marker)


def verify(folder: Path, tensors: bool = True) -> None:
    """Compares every file with the marker.

    Args:
        folder: of the checkpoint.
        tensors: look into weights and moments too, not only at whether they are there.

    Raises:
        UserError: names the first file that is missing or not what was written.
    """
    for name, (size, digest) in _read_marker(folder).items():
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path} is missing: {_WAY_OUT}")
        if (found := path.stat().st_size) != size:
            raise UserError(f"{path} has {found} bytes, {size} were written: {_WAY_OUT}")
        if (tensors or name not in TENSORS) and sha256(path) != digest:
            raise UserError(
                f"{path} is damaged (its SHA-256 is not that in {COMPLETE}): {_WAY_OUT}"
            )


def recorded_sha256(folder: Path, name: str) -> str:
    """The hash that a checkpoint's marker holds of one of its files."""
    return _read_marker(folder)[name][1]


def _read_marker(folder: Path) -> dict[str, tuple[int, str]]:
    """File name to (bytes, SHA-256)."""
    marker = folder / COMPLETE
    if not marker.is_file():
        raise UserError(f"{folder} has no {COMPLETE}: it is not a checkpoint, or half of one")
    try:
        entries = json.loads(marker.read_text(encoding="utf-8")).items()
        files = {str(name): (int(file["bytes"]), str(file["sha256"])) for name, file in entries}
    except (ValueError, AttributeError, KeyError, TypeError):
        files = {}
    if not files.keys() >= ALWAYS:
        raise UserError(f"{marker} is damaged: {_WAY_OUT}")
    return files
