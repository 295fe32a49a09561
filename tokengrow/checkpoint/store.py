"""Checkpoints on disk: saved atomically, loaded only when whole, pruned with care."""

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from tokengrow.checkpoint import layout
from tokengrow.checkpoint.tensors import EXTENSIONS, TensorFile, stream_tensors
from tokengrow.errors import UserError
from tokengrow.files import PARTIAL, atomic_directory, read_yaml, write_yaml
from tokengrow.model.architectures import architecture_of, read_config
from tokengrow.model.config import LanguageModelConfig
from tokengrow.model.tokenformer import LanguageModel

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """All that a run needs to go on, and all that a model's reader wants to know."""

    config: LanguageModelConfig
    """Of the model."""
    weights: Mapping[str, Tensor]
    """State dict on the CPU."""
    optimizer: Mapping[str, Tensor] = field(default_factory=dict)
    """Flat optimizer state, `{slot}.{parameter name}`."""
    train_state: Mapping[str, Any] = field(default_factory=dict)
    """Where training stands; see `tokengrow.training.state`."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """The resolved recipe that made it."""
    lineage: Sequence[Mapping[str, Any]] = ()
    """One entry per growth or pruning, oldest first."""
    times: Mapping[str, Any] = field(default_factory=dict)
    """Wall time of the run, see `tokengrow.training.wall_time`. Not part of `train_state`,
    which does not depend on how often a run was killed."""
    tokenizer: str | None = None
    """The tokenizer's JSON."""
    end_of_text: str | None = None
    """The token, as text, that ends a document."""
    folder: Path | None = None
    """Where it was loaded from."""

    @classmethod
    def of(cls, model: LanguageModel) -> "Checkpoint":
        """A checkpoint of a bare model."""
        return cls(model.config, model.to_weights())

    @cached_property
    def model(self) -> LanguageModel:
        """The model, on the CPU, in eval mode."""
        return architecture_of(self.config).model.from_weights(self.config, self.weights)

    @property
    def step(self) -> int:
        """The optimizer step at which it was taken."""
        return int(self.train_state.get("step", 0))

    def described(self) -> "Checkpoint":
        """All of it but weights and optimizer state."""
        return replace(self, weights={}, optimizer={})

    def ancestor(self) -> dict[str, Any]:
        """How a lineage names this checkpoint: size, step and the hash of its weights."""
        digest = layout.recorded_sha256(self.folder, layout.WEIGHTS) if self.folder else None
        return {
            "parameters": self.config.num_parameters(),
            "step": self.step,
            "weights_sha256": digest,
            "config": self.config.to_dict(),
        }


def is_stale_partial(path: Path) -> bool:
    """Whether this is what a save that was killed leaves behind."""
    return path.name.startswith(".step_") and path.name.endswith(PARTIAL)


def save_checkpoint(folder: str | Path, source: LanguageModel | Checkpoint) -> Path:
    """Writes a checkpoint: first beside its place, then, whole and on the disk, into it.

    Args:
        folder: the checkpoint's own folder; must not exist yet, or be empty.
        source: a bare model, or a model with all that belongs to it.

    Returns:
        The folder.

    Raises:
        UserError: the folder holds something.
    """
    folder = Path(folder)
    checkpoint = Checkpoint.of(source) if isinstance(source, LanguageModel) else source
    with atomic_directory(folder, layout.write_marker) as partial:
        files = {layout.WEIGHTS: checkpoint.weights, layout.OPTIMIZER: checkpoint.optimizer}
        for name, tensors in files.items():
            if tensors or name == layout.WEIGHTS:
                # Tensor by tensor: safetensors itself would keep Python from training meanwhile.
                stream_tensors(partial / name, tensors.items(), len(tensors))
        write_description(partial, checkpoint)
    return folder


def load_checkpoint(path: str | Path, tensors: bool = True, streamed: bool = False) -> Checkpoint:
    """Reads a checkpoint after verifying every file's hash.

    Args:
        path: a checkpoint's folder, or a run's, whose newest whole checkpoint is taken.
        tensors: read weights and moments too; without, they are neither read nor verified.
        streamed: leave weights and moments on the disk, verified, and read each tensor whenever it
            is asked for.

    Raises:
        UserError: nothing there, or nothing whole.
    """
    path = Path(path)
    if (path / layout.COMPLETE).is_file():
        layout.verify(path, tensors)
        return _read_files(path, tensors, streamed)
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise UserError(f"{path} {what}: give the folder of a run or of a checkpoint")
    found = newest_checkpoint(path, tensors, streamed)
    if found is None:
        raise UserError(_what_else(path))
    return found


def _what_else(folder: Path) -> str:
    """What a folder is that holds no whole checkpoint, and the way out."""
    if _is_foreign(folder):
        return (
            f"{folder} holds weights in another format: first `tokengrow convert source={folder} "
            "to=tokengrow out=DIR`"
        )
    if runs := [run for run in sorted(folder.iterdir()) if layout.find_checkpoints(run)]:
        return f"{folder} is a folder of runs: name one of them, for example {runs[0]}"
    return (
        f"{folder} holds no whole checkpoint: neither it nor a step_* in it has a whole "
        f"{layout.COMPLETE} and what that lists: give another run, or train this one anew"
    )


def _is_foreign(folder: Path) -> bool:
    """Whether a folder holds weights, and nothing that says that they were once a checkpoint."""
    ours = (folder / layout.CONFIG).is_file()
    return not ours and any(file.suffix in EXTENSIONS for file in folder.iterdir())


def newest_checkpoint(run: Path, tensors: bool = True, streamed: bool = False) -> Checkpoint | None:
    """The newest whole checkpoint of a run; damaged ones are named in the log.

    Args:
        run: the run's folder.
        tensors: as for `load_checkpoint`.
        streamed: likewise.
    """
    found = layout.find_checkpoints(run)
    for older, folder in reversed(list(enumerate(found))):
        try:
            layout.verify(folder, tensors)
        except UserError as error:
            what_then = "falling back to an older one" if older else "there is no older one"
            log.warning("%s; %s", error, what_then)
            continue
        return _read_files(folder, tensors, streamed)
    return None


def quarantine_damaged(run: Path, newest: Checkpoint | None) -> list[Path]:
    """Renames to `*.damaged` every checkpoint folder after the newest whole one; deletes nothing.

    For the run's owner alone, who will write those steps again.

    Args:
        run: the run's folder.
        newest: what `newest_checkpoint` gave for it.

    Returns:
        Where they are now.
    """
    aside = []
    last = layout.step_of(newest.folder) if newest and newest.folder else -1
    for folder in layout.step_folders(run):
        if layout.step_of(folder) > last:
            names = (f"{folder.name}.damaged{number or ''}" for number in count())
            paths = (folder.with_name(name) for name in names)
            aside.append(folder.rename(next(path for path in paths if not path.exists())))
    return aside


def delete_old_checkpoints(run: Path, keep: int, keep_steps: set[int]) -> None:
    """Deletes all but the newest `keep` checkpoints of a run and those of `keep_steps`."""
    kept = {layout.step_folder(step) for step in keep_steps}
    for leftover in run.glob(".step_*.pruned"):  # of a pruning that was killed
        shutil.rmtree(leftover)
    for folder in layout.find_checkpoints(run)[:-keep]:
        if folder.name not in kept:
            # Renamed first: a kill must leave neither half a checkpoint nor its name taken.
            shutil.rmtree(folder.rename(folder.with_name(f".{folder.name}.pruned")))


def write_description(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes the files of a checkpoint that hold no tensors."""
    config = {
        "model": checkpoint.config.to_dict(),
        "end_of_text": checkpoint.end_of_text,
        "run": dict(checkpoint.run),
    }
    write_yaml(folder / layout.CONFIG, config)
    _write_json(folder / layout.TRAIN_STATE, checkpoint.train_state)
    _write_json(folder / layout.LINEAGE, checkpoint.lineage)
    if checkpoint.times:
        _write_json(folder / layout.TIMES, checkpoint.times)
    if checkpoint.tokenizer is not None:
        (folder / layout.TOKENIZER).write_bytes(checkpoint.tokenizer.encode())


def _read_files(folder: Path, tensors: bool, streamed: bool) -> Checkpoint:
    def read(path: Path) -> Mapping[str, Tensor]:
        if not tensors or not path.is_file():
            return {}
        return TensorFile(path) if streamed else load_file(path)

    config = read_yaml(folder / layout.CONFIG)
    tokenizer, times = folder / layout.TOKENIZER, folder / layout.TIMES
    return Checkpoint(
        config=_model_config(folder, config["model"]),
        weights=read(folder / layout.WEIGHTS),
        optimizer=read(folder / layout.OPTIMIZER),
        train_state=_read_json(folder / layout.TRAIN_STATE),
        run=config["run"],
        lineage=_read_json(folder / layout.LINEAGE),
        times=_read_json(times) if times.is_file() else {},
        tokenizer=tokenizer.read_bytes().decode() if tokenizer.is_file() else None,
        end_of_text=config["end_of_text"],
        folder=folder,
    )


def _model_config(folder: Path, values: Any) -> LanguageModelConfig:
    try:
        return read_config(values)
    except UserError as error:
        raise UserError(f"{folder / layout.CONFIG}: {error}") from None


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def without_validations(times: Mapping[str, Any]) -> dict[str, Any]:
    """What of a run's times a checkpoint outside any run still has."""
    return {key: value for key, value in times.items() if key != "validation"}
