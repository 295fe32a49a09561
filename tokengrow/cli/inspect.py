"""tokengrow inspect: show sizes, lineage and the use of parameter tokens of a checkpoint."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from tokengrow.checkpoint.layout import find_checkpoints, step_of
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, load_source
from tokengrow.cli.config import plain_values
from tokengrow.cli.runner import new_folder, run_command
from tokengrow.data.loader import evenly_spaced_batch
from tokengrow.data.open_tokens import open_checkpoint_tokens
from tokengrow.errors import UserError
from tokengrow.files import atomic_directory
from tokengrow.inspection.analysis import Inspection, inspect_checkpoint
from tokengrow.inspection.plots import plot_history, plot_tokens
from tokengrow.inspection.tables import DEFINITIONS, history_table, inspection_tables
from tokengrow.model.config import ModelConfig
from tokengrow.parsing import parse_dataclass


@dataclass(frozen=True, kw_only=True)
class InspectArguments:
    """Keys of inspect.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is used."""
    out: str | None
    """Directory for inspection.json and the plots; null: nothing is written."""
    store: str | None
    """Token store of the text; null: the one that the run of source recorded."""
    sequences: int
    """Number of validation sequences on which contributions are measured."""
    history: bool
    """Whether to include all checkpoints that the run kept."""

    def __post_init__(self) -> None:
        if self.sequences < 1:
            raise UserError(f"sequences must be at least 1, got {self.sequences}.")


def main(config: DictConfig) -> None:
    """Print the tables of `source`, and write them to `out` if it is given."""
    arguments = parse_dataclass(InspectArguments, plain_values(config))
    out = new_folder(arguments.out) if arguments.out else None
    newest = load_source(arguments.source, streamed=True)
    console = Console()
    earlier = _earlier(Path(arguments.source), newest, console) if arguments.history else []
    ids, problem = _text(arguments, newest, console)
    if arguments.history and problem:
        raise UserError(f"history=true cannot measure contributions. {problem}")
    past = _inspected([*earlier, newest], ids, console)
    for shown in inspection_tables(past[-1]):
        console.print(shown)
    if arguments.history:
        console.print(history_table(past))
    missing = f"Contributions are not measured. {problem}"
    for line in DEFINITIONS if ids is not None else [missing]:
        console.print(line, highlight=False, soft_wrap=True)
    if out:
        for path in _write(out, past, arguments.history):
            console.print(f"written     {path}", highlight=False, soft_wrap=True)


def _text(
    arguments: InspectArguments, source: Checkpoint, console: Console
) -> tuple[Tensor | None, str]:
    """Return validation tokens [B, T], or None with the reason why there are none.

    Raises:
        UserError: the given store does not exist, or has another tokenizer.
    """
    if not isinstance(source.config, ModelConfig):
        return None, "source is not a TokenFormer, so it has no parameter tokens to measure."
    try:
        tokens = open_checkpoint_tokens(arguments.store, source, console)
    except UserError as error:
        if arguments.store:
            raise
        return None, str(error)
    length = source.config.context_length
    validation = tokens.sequences("validation", length)
    return evenly_spaced_batch(validation, arguments.sequences)[:, :-1], ""


def _earlier(run: Path, newest: Checkpoint, console: Console) -> list[Checkpoint]:
    """Return the complete checkpoints of a run before its newest, oldest first.

    Raises:
        UserError: `run` is a checkpoint instead of a run.
    """
    folders = find_checkpoints(run)
    if not folders:
        raise UserError(
            f"source must be a run with history=true, got the checkpoint {run}. Give the directory "
            "of the run."
        )
    found = []
    for folder in folders:
        if step_of(folder) >= newest.step:
            break
        try:
            found.append(load_checkpoint(folder, streamed=True))
        except UserError as error:  # damaged, or deleted by the run that writes them
            console.print(f"skipped: {error}", highlight=False, soft_wrap=True)
    return found


def _inspected(
    checkpoints: Sequence[Checkpoint], ids: Tensor | None, console: Console
) -> list[Inspection]:
    """Inspect each checkpoint, with progress by block."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("blocks", total=sum(each.config.layers for each in checkpoints))

        def watch(blocks: Iterable[int]) -> Iterator[int]:
            for block in blocks:
                yield block
                progress.advance(task)

        return [inspect_checkpoint(each, ids, device, watch) for each in checkpoints]


def _write(out: Path, past: Sequence[Inspection], history: bool) -> list[Path]:
    """Write inspection.json and the plots atomically; return their paths."""
    newest = past[-1]
    with atomic_directory(out) as folder:
        figures = newest.to_dict()
        if history:
            figures["history"] = [each.summary() for each in past]
            plot_history(past, folder / "history.png")
        if newest.text_tokens:
            plot_tokens(newest, folder / "tokens.png")
        (folder / "inspection.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")
    return sorted(out.iterdir())


if __name__ == "__main__":
    run_command("inspect", main)
