"""tokengrow eval: how good a checkpoint is, by tasks of the lm-evaluation-harness."""

import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.cli.resolve import plain
from tokengrow.cli.verb import run_verb
from tokengrow.distributed.contact import in_contact
from tokengrow.distributed.exchange import rank, world_size
from tokengrow.distributed.fabric import FabricConfig, build_fabric, started_by
from tokengrow.distributed.launch import process_rank
from tokengrow.errors import UserError
from tokengrow.evaluation import published
from tokengrow.evaluation.format import count
from tokengrow.evaluation.results import (
    RESPONSES,
    default_folder,
    describe_checkpoint,
    read_results,
    results_file,
    versions,
    write_results,
)
from tokengrow.evaluation.source import Evaluated, answer_key
from tokengrow.typed import typed


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """The keys of eval.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is taken."""
    tasks: list[str]
    """Names of the harness."""
    limit: float | None
    """Questions of each task, or below 1 their share; null: all."""
    num_fewshot: int | None
    """Examples before each question; null: as the task says."""
    data_dir: str | None
    """Folder of task files; null: the datasets of the Hub."""
    batch_size: str
    """Rows of a batch, or auto."""
    out: str | None
    """Folder of the results."""
    fabric: FabricConfig
    """Devices and precision."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError("tasks is empty: name at least one, as in tasks=[lambada_openai]")
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(f"tasks names one twice: {', '.join(self.tasks)}")
        if self.limit is not None and not self.limit > 0:
            raise UserError(f"limit must be above 0, not {self.limit:g}")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"num_fewshot must not be negative: {self.num_fewshot}")
        if self.batch_size != "auto" and not (
            self.batch_size.isdecimal() and int(self.batch_size) > 0
        ):
            raise UserError(f"batch_size must be auto or a number above 0, not {self.batch_size!r}")
        if self.fabric.strategy == "fsdp2":
            raise UserError(
                "fabric.strategy fsdp2 is for training: here every device holds the whole model; "
                "set fabric=ddp"
            )

    @property
    def rows(self) -> int | None:
        """Of a batch; None: automatic."""
        return None if self.batch_size == "auto" else int(self.batch_size)


def main(config: DictConfig) -> None:
    """Asks a checkpoint the questions of the tasks: a table, and a file of JSON."""
    arguments = typed(EvalArguments, plain(config))
    if find_spec("lm_eval") is None:
        raise UserError("tokengrow eval needs the harness: pip install 'tokengrow[eval]'")
    # By its file: the harness prints, and is kept from it by turning stdout elsewhere.
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=process_rank() > 0)
    results, path = evaluate(arguments, console)
    if results:
        show(console, results, path)


def evaluate(arguments: EvalArguments, console: Console) -> tuple[dict[str, Any], Path]:
    """What a checkpoint's evaluation finds, or found before, and the file that holds it.

    Args:
        arguments: the verb's.
        console: where progress is shown.

    Returns:
        The results, empty on other ranks than the first, and their file.
    """
    from tokengrow.evaluation.harness_run import load_tasks

    checkpoint = load_checkpoint(arguments.source)
    assert checkpoint.folder is not None
    data_dir = Path(arguments.data_dir) if arguments.data_dir else None
    with console.status("tasks: reading"):
        tasks = load_tasks(arguments.tasks, data_dir, arguments.num_fewshot)
    settings = {
        "tasks": sorted(arguments.tasks),
        "limit": arguments.limit,
        "num_fewshot": arguments.num_fewshot,
        "precision": arguments.fabric.chosen_precision,
        "files": tasks.files,
    }
    key = answer_key(checkpoint, arguments.fabric.chosen_precision)
    out = Path(arguments.out) if arguments.out else default_folder(checkpoint.folder)
    path = results_file(out, checkpoint.folder, key, settings)
    if path.is_file():
        console.print(f"evaluated before, by {path}")
        return read_results(path), path
    found = {"checkpoint": describe_checkpoint(checkpoint), "settings": settings}
    found |= _ask(checkpoint, arguments, tasks, out / RESPONSES / key[:16], console)
    if rank() > 0:
        return {}, path
    write_results(path, found)
    return found, path


def _ask(
    checkpoint: Checkpoint, arguments: EvalArguments, tasks: Any, folder: Path, console: Console
) -> dict[str, Any]:
    """Scores, on the first rank, and where they were found."""
    from tokengrow.evaluation.harness import TokengrowLM
    from tokengrow.evaluation.harness_responses import Responses
    from tokengrow.evaluation.harness_run import run_tasks

    begun, since = datetime.now(UTC), time.monotonic()
    fabric = build_fabric(arguments.fabric)
    with in_contact(started_by(fabric)):
        precision = arguments.fabric.chosen_precision
        model = Evaluated.place(
            checkpoint, fabric.device, precision, fabric.autocast, arguments.rows
        )
        lm = TokengrowLM(model, Responses(folder), console)
        scores = run_tasks(lm, tasks, arguments.limit)
    ran = {
        "device": str(fabric.device),
        "processes": world_size(),
        "batch_size": arguments.batch_size,
        "began": begun.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - since, 1),
        "versions": versions(["torch", "lm_eval", "datasets"]),
    }
    return {"ran": ran, "scores": [asdict(score) for score in scores]}


def show(console: Console, results: dict[str, Any], path: Path) -> None:
    """Prints the table, beside the nearest published model, and where the results are."""
    from tokengrow.evaluation.harness_run import Score, score_table

    checkpoint = results["checkpoint"]
    console.print(f"\n{checkpoint['folder']}: {count(checkpoint['parameters'])} parameters")
    near = published.nearest_published(checkpoint["parameters"])
    console.print(score_table([Score(**score) for score in results["scores"]], near))
    console.print(f"{near.name}, the published model of the nearest size: {published.SOURCE}")
    console.print(f"results  {path}")


if __name__ == "__main__":
    run_verb("eval", main)
