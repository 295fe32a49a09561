"""Checkpoints on disk: atomic writes, verified reads, deletion of old ones."""

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tokengrow.checkpoint import layout
from tokengrow.checkpoint.schema import (
    SCHEMA_VERSION,
    LineageEntry,
    LineageSource,
    RecordedRun,
    TrainState,
    WallTimes,
    check_schema_version,
)
from tokengrow.checkpoint.tensors import EXTENSIONS, TensorFile, stream_tensors
from tokengrow.errors import UserError
from tokengrow.files import PARTIAL, atomic_directory, read_yaml, write_yaml
from tokengrow.model.architectures import architecture_of, read_config
from tokengrow.model.config import LanguageModelConfig
from tokengrow.model.tokenformer import LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """Model weights with everything that a run needs to resume."""

    config: LanguageModelConfig
    """Model config."""
    weights: Mapping[str, Tensor]
    """State dict on the CPU."""
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    """Flat optimizer state, `{slot}.{parameter name}`."""
    train_state: TrainState | None = None
    """Counters of training; None: the model was never trained."""
    run: RecordedRun | None = None
    """Resolved configuration of the run; None: no run wrote the checkpoint."""
    lineage: tuple[LineageEntry, ...] = ()
    """Growths and prunings, oldest first."""
    times: WallTimes | None = None
    """Wall-clock time; None: not recorded. Unlike `train_state` it depends on how often the run was
    killed."""
    tokenizer: str | None = None
    """JSON of the tokenizer."""
    end_of_text: str | None = None
    """Text of the token that ends a document."""
    folder: Path | None = None
    """Directory that the checkpoint was loaded from."""

    @classmethod
    def of(cls, model: LanguageModel) -> "Checkpoint":
        """Build the checkpoint of a model without training state."""
        return cls(model.config, model.to_weights())

    @cached_property
    def model(self) -> LanguageModel:
        """Model on the CPU, in eval mode."""
        return architecture_of(self.config).model.from_weights(self.config, self.weights)

    @property
    def step(self) -> int:
        """Optimizer step of the checkpoint."""
        return self.train_state.step if self.train_state else 0

    def without_tensors(self) -> "Checkpoint":
        """Return a copy without weights and optimizer state."""
        return replace(self, weights={}, optimizer={})

    def lineage_source(self) -> LineageSource:
        """Return the record that identifies this checkpoint in the lineage of its descendants."""
        digest = layout.recorded_sha256(self.folder, layout.WEIGHTS) if self.folder else None
        return LineageSource(
            parameters=self.config.num_parameters(),
            step=self.step,
            weights_sha256=digest,
            config=self.config.to_dict(),
        )


def is_stale_partial(path: Path) -> bool:
    """Return whether `path` is an incomplete checkpoint that a killed process left."""
    return path.name.startswith(".step_") and path.name.endswith(PARTIAL)


def save_checkpoint(folder: str | Path, source: LanguageModel | Checkpoint) -> Path:
    """Write a checkpoint atomically.

    Args:
        folder: directory of the checkpoint; must not exist, or be empty.
        source: a model, or a checkpoint.

    Returns:
        The directory.

    Raises:
        UserError: the directory is not empty.
    """
    folder = Path(folder)
    checkpoint = Checkpoint.of(source) if isinstance(source, LanguageModel) else source
    with atomic_directory(folder, layout.write_marker) as partial:
        files = {layout.WEIGHTS: checkpoint.weights, layout.OPTIMIZER: checkpoint.optimizer}
        for name, tensors in files.items():
            if tensors or name == layout.WEIGHTS:
                # One tensor at a time: safetensors would hold the GIL for the complete file.
                stream_tensors(partial / name, tensors.items(), len(tensors))
        write_records(partial, checkpoint)
    return folder


def load_checkpoint(path: str | Path, tensors: bool = True, streamed: bool = False) -> Checkpoint:
    """Load a checkpoint after verifying the hash of every file.

    Args:
        path: directory of a checkpoint, or of a run, whose newest complete checkpoint is loaded.
        tensors: whether to read weights and moments; otherwise they are not verified either.
        streamed: whether to verify weights and moments but to leave them on disk, and read each
            tensor on access.

    Raises:
        UserError: there is no complete checkpoint at `path`, or a newer tokengrow wrote it.
    """
    path = Path(path)
    if (path / layout.COMPLETE).is_file():
        layout.verify(path, tensors)
        return _read_files(path, tensors, streamed)
    if not path.is_dir():
        problem = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {problem}. Give the directory of a run or of a checkpoint.")
    found = newest_checkpoint(path, tensors, streamed)
    if found is None:
        raise UserError(_no_checkpoint_message(path))
    return found


def load_source(source: str, tensors: bool = True, streamed: bool = False) -> Checkpoint:
    """Load the checkpoint that the key `source` names.

    Args:
        source: value of the key.
        tensors: as in `load_checkpoint`.
        streamed: as in `load_checkpoint`.

    Raises:
        UserError: there is no complete checkpoint; the message names the key.
    """
    try:
        return load_checkpoint(source, tensors, streamed)
    except UserError as error:
        raise UserError(f"source: {error}") from None


def _no_checkpoint_message(folder: Path) -> str:
    """Return an error message for a directory without a complete checkpoint."""
    has_config = (folder / layout.CONFIG).is_file()
    if not has_config and any(file.suffix in EXTENSIONS for file in folder.iterdir()):
        return (
            f"{folder} holds weights in another format. Convert them first: "
            f"`tokengrow convert source={folder} to=tokengrow out=DIR`."
        )
    if runs := [run for run in sorted(folder.iterdir()) if layout.find_checkpoints(run)]:
        return f"{folder} is a directory of runs. Name one of them, for example {runs[0]}."
    return (
        f"{folder} holds no complete checkpoint: {layout.COMPLETE}, or a file that it lists, is "
        "missing there and in every step_* directory. Give another run, or train this one again."
    )


def newest_checkpoint(run: Path, tensors: bool = True, streamed: bool = False) -> Checkpoint | None:
    """Load the newest complete checkpoint of a run, and log each damaged one as a warning.

    Args:
        run: directory of the run.
        tensors: as in `load_checkpoint`.
        streamed: as in `load_checkpoint`.

    Returns:
        None if there is no complete checkpoint.
    """
    found = layout.find_checkpoints(run)
    for older, folder in reversed(list(enumerate(found))):
        try:
            layout.verify(folder, tensors)
        except UserError as error:
            next_step = "Trying the previous one." if older else "There is no earlier one."
            log.warning("%s %s", error, next_step)
            continue
        return _read_files(folder, tensors, streamed)
    return None


def quarantine_damaged(run: Path, newest: Checkpoint | None) -> list[Path]:
    """Rename every checkpoint directory after the newest complete one to `*.damaged`.

    Nothing is deleted. Only the process that trains the run may call this function, because it
    writes these steps again.

    Args:
        run: directory of the run.
        newest: result of `newest_checkpoint` for that run.

    Returns:
        The new paths.
    """
    quarantined = []
    last = layout.step_of(newest.folder) if newest and newest.folder else -1
    for folder in layout.step_folders(run):
        if layout.step_of(folder) > last:
            names = (f"{folder.name}.damaged{number or ''}" for number in count())
            paths = (folder.with_name(name) for name in names)
            quarantined.append(folder.rename(next(path for path in paths if not path.exists())))
    return quarantined


def delete_old_checkpoints(run: Path, keep: int, keep_steps: set[int]) -> None:
    """Delete all checkpoints of a run except the newest `keep` and those of `keep_steps`."""
    kept = {layout.step_folder(step) for step in keep_steps}
    for leftover in run.glob(".step_*.pruned"):  # a killed process left it
        shutil.rmtree(leftover)
    for folder in layout.find_checkpoints(run)[:-keep]:
        if folder.name not in kept:
            # Renamed first, so that a kill leaves no partial checkpoint under its name.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.pruned")))


def write_records(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the files of a checkpoint that hold no tensors."""
    config = {
        "schema_version": SCHEMA_VERSION,
        "model": checkpoint.config.to_dict(),
        "end_of_text": checkpoint.end_of_text,
        "run": checkpoint.run.to_dict() if checkpoint.run else {},
    }
    write_yaml(folder / layout.CONFIG, config)
    state = checkpoint.train_state
    _write_json(folder / layout.TRAIN_STATE, state.to_dict() if state else {})
    _write_json(folder / layout.LINEAGE, [entry.to_dict() for entry in checkpoint.lineage])
    if checkpoint.times:
        _write_json(folder / layout.TIMES, checkpoint.times.to_dict())
    if checkpoint.tokenizer is not None:
        (folder / layout.TOKENIZER).write_bytes(checkpoint.tokenizer.encode())


def _read_files(folder: Path, tensors: bool, streamed: bool) -> Checkpoint:
    def read(path: Path) -> Mapping[str, Tensor]:
        if not tensors or not path.is_file():
            return {}
        return TensorFile(path) if streamed else load_file(path)

    config_file, state_file = folder / layout.CONFIG, folder / layout.TRAIN_STATE
    times_file, lineage_file = folder / layout.TIMES, folder / layout.LINEAGE
    config, state = read_yaml(config_file), _read_json(state_file)
    check_schema_version(config.get("schema_version", 0), str(config_file))
    try:
        model_config = read_config(config["model"])
    except UserError as error:
        raise UserError(f"{config_file}: {error}") from None
    times = _read_json(times_file) if times_file.is_file() else None
    tokenizer = folder / layout.TOKENIZER
    return Checkpoint(
        config=model_config,
        weights=read(folder / layout.WEIGHTS),
        optimizer=read(folder / layout.OPTIMIZER),
        train_state=TrainState.from_dict(state, str(state_file)) if state else None,
        run=RecordedRun.from_dict(config["run"], str(config_file)) if config["run"] else None,
        lineage=tuple(
            LineageEntry.from_dict(entry, str(lineage_file)) for entry in _read_json(lineage_file)
        ),
        times=WallTimes.from_dict(times, str(times_file)) if times else None,
        tokenizer=tokenizer.read_bytes().decode() if tokenizer.is_file() else None,
        end_of_text=config["end_of_text"],
        folder=folder,
    )


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
