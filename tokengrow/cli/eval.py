"""tokengrow eval: how good a checkpoint is, by tasks of the lm-evaluation-harness and by
perplexity."""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from omegaconf import DictConfig
from rich.console import Console

from tokengrow import __version__
from tokengrow.checkpoint.store import Checkpoint, load_source
from tokengrow.cli.config import plain_values
from tokengrow.cli.runner import run_command
from tokengrow.console.format import count
from tokengrow.console.progress import doing
from tokengrow.data.corpus import Text
from tokengrow.data.open_tokens import resolve_text, text_section
from tokengrow.distributed.collectives import rank, world_size
from tokengrow.distributed.fabric import FabricConfig, build_fabric, started_by
from tokengrow.distributed.launch import process_rank
from tokengrow.distributed.peer_failure import monitor_peers
from tokengrow.errors import UserError
from tokengrow.evaluation.perplexity import (
    Perplexity,
    PerplexityConfig,
    described,
    documents_of,
    measure_perplexity,
    perplexity_table,
)
from tokengrow.evaluation.published import SOURCE, nearest_published
from tokengrow.evaluation.responses import Responses
from tokengrow.evaluation.results import (
    PERPLEXITY,
    RESPONSES,
    default_folder,
    describe_checkpoint,
    read_results,
    results_file,
    write_results,
)
from tokengrow.evaluation.scores import Score, score_table
from tokengrow.evaluation.scoring import read_batch_size
from tokengrow.evaluation.source import Evaluated, answer_key
from tokengrow.parsing import parse_dataclass

if TYPE_CHECKING:  # the harness is an extra, and imported where a task of it is asked for
    from tokengrow.evaluation.harness_run import Tasks


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """The keys of eval.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is taken."""
    tasks: list[str]
    """Names of the harness, and perplexity."""
    limit: float | None
    """Questions of each task, or below 1 their share; null: all."""
    num_fewshot: int | None
    """Examples before each question; null: as the task says."""
    data_dir: str | None
    """Folder of task files; null: the datasets of the Hub."""
    data: dict[str, Any]
    """The text of perplexity; its keys depend on `data.source`."""
    perplexity: PerplexityConfig
    """What of it, and how."""
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
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise UserError(f"limit must be a number above 0, not {self.limit:g}")
        if self.limit is not None and self.limit > 1 and self.limit % 1:
            raise UserError(f"limit must be a whole number, or a share below 1, not {self.limit:g}")
        if self.limit is not None and self.limit < 1 and PERPLEXITY in self.tasks:
            raise UserError("limit must be a number of documents for perplexity, not a share")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"num_fewshot must not be negative: {self.num_fewshot}")
        read_batch_size(self.batch_size)
        if self.fabric.strategy == "fsdp2":
            raise UserError(
                "fabric.strategy fsdp2 is for training: here every device holds the whole model; "
                "set fabric=ddp"
            )


@dataclass(frozen=True)
class Asked:
    """What is asked of a model, read before anybody waits for a device."""

    tasks: "Tasks | None"
    """Of the harness."""
    text: Text | None
    """Of perplexity."""
    settings: dict[str, Any]
    """All that the results depend on beside the model, as JSON values."""


def main(config: DictConfig) -> None:
    """Asks a checkpoint the questions of the tasks: tables, and a file of JSON."""
    arguments = parse_dataclass(EvalArguments, plain_values(config))
    # By its file: the harness prints, and is kept from it by turning stdout elsewhere.
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=process_rank() > 0)
    results, path = evaluate(arguments, Console(stderr=True, quiet=process_rank() > 0))
    if rank() == 0:
        show(console, results, path)


def evaluate(arguments: EvalArguments, console: Console) -> tuple[dict[str, Any], Path]:
    """What a checkpoint's evaluation finds, or found before, and the file that holds it.

    Args:
        arguments: the verb's.
        console: where progress is shown.

    Returns:
        The results, whole on the first rank alone, and their file.
    """
    with doing(console, "reading the checkpoint and the tasks"):
        checkpoint = load_source(arguments.source)
        assert checkpoint.folder is not None
        asked = read_tasks(arguments, checkpoint)
    key = answer_key(checkpoint, arguments.fabric.chosen_precision)
    out = Path(arguments.out) if arguments.out else default_folder(checkpoint.folder)
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out} is a file: give a folder for the results")
    path = results_file(out, checkpoint.folder, key, asked.settings)
    if path.is_file():
        console.print("evaluated before: nothing is asked again")
        return read_results(path), path
    begun, since = datetime.now(UTC), time.monotonic()
    fabric = build_fabric(arguments.fabric)
    with monitor_peers(started_by(fabric)):
        precision, rows = arguments.fabric.chosen_precision, read_batch_size(arguments.batch_size)
        model = Evaluated.place(checkpoint, fabric.device, precision, fabric.autocast, rows)
        try:
            found = ask(model, asked, arguments, out / RESPONSES / key[:16], console)
        except KeyboardInterrupt:
            kept = "what was answered is kept, and the same command goes on from there"
            raise KeyboardInterrupt(kept) from None
    ran = {
        "device": str(fabric.device),
        "processes": world_size(),
        "batch_size": arguments.batch_size,
        "began": begun.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - since, 1),
        "versions": {"tokengrow": __version__, "torch": torch.__version__},
    }
    named = {"checkpoint": describe_checkpoint(checkpoint), "settings": asked.settings, "ran": ran}
    if rank() == 0:
        write_results(path, named | found)
    return named | found, path


def read_tasks(arguments: EvalArguments, checkpoint: Checkpoint) -> Asked:
    """Finds what is asked, and refuses what is not there."""
    names = [name for name in arguments.tasks if name != PERPLEXITY]
    limit = arguments.limit
    settings: dict[str, Any] = {
        "tasks": sorted(arguments.tasks),
        "limit": limit if limit is None or limit < 1 else int(limit),
        "precision": arguments.fabric.chosen_precision,
    }
    tasks, text = None, None
    if names:
        if find_spec("lm_eval") is None:
            raise UserError(
                "tasks of the lm-evaluation-harness need it: pip install 'tokengrow[eval]'; "
                "tasks=[perplexity] does not"
            )
        from tokengrow.evaluation.harness_run import load_tasks

        data_dir = Path(arguments.data_dir) if arguments.data_dir else None
        tasks = load_tasks(names, data_dir, arguments.num_fewshot)
        settings |= {"num_fewshot": arguments.num_fewshot, "files": tasks.files}
        settings["lm_eval"] = version("lm_eval")  # prompts, metrics and examples are its own
    if PERPLEXITY in arguments.tasks:
        text = resolve_text(arguments.data, checkpoint)
        identity = sha256(json.dumps(text.identity(), sort_keys=True).encode()).hexdigest()
        settings |= {"data": text_section(arguments.data, checkpoint), "data_sha256": identity}
        settings[PERPLEXITY] = asdict(arguments.perplexity)
    return Asked(tasks, text, settings)


def ask(
    model: Evaluated, asked: Asked, arguments: EvalArguments, folder: Path, console: Console
) -> dict[str, Any]:
    """Scores and perplexity.

    Args:
        model: on this rank's device.
        asked: what is asked.
        arguments: the verb's.
        folder: where answers are kept as they come.
        console: where progress is shown.
    """
    found: dict[str, Any] = {}
    with Responses(folder) as responses:
        if asked.tasks is not None:
            from tokengrow.evaluation.harness import TokengrowLM
            from tokengrow.evaluation.harness_run import run_tasks

            lm = TokengrowLM(model, responses, console)
            scores = run_tasks(lm, asked.tasks, arguments.limit)
            found["scores"] = [asdict(score) for score in scores]
        if asked.text is not None:
            limit = None if arguments.limit is None else int(arguments.limit)
            documents = documents_of(asked.text, arguments.perplexity, limit)
            stride = arguments.perplexity.stride
            scorer, tokenizer = model.scorer, model.tokenizer
            measured = measure_perplexity(
                documents, tokenizer, scorer, stride, responses=responses, console=console
            )
            found[PERPLEXITY] = measured.to_dict()
    return found


def show(console: Console, results: dict[str, Any], path: Path) -> None:
    """Prints the tables, beside the nearest published model, and where the results are."""
    checkpoint = results["checkpoint"]
    console.print(f"{checkpoint['folder']}: {count(checkpoint['parameters'])} parameters\n")
    if "scores" in results:
        near = nearest_published(checkpoint["parameters"])
        console.print(score_table([Score(**score) for score in results["scores"]], near))
        console.print(f"{near.name}: the nearest published size, {SOURCE}\n")
    if PERPLEXITY in results:
        measured = Perplexity.from_dict(results[PERPLEXITY])
        console.print(perplexity_table(measured))
        console.print(f"{described(measured)}\n")
    console.print(f"results  {path}")


if __name__ == "__main__":
    run_command("eval", main)
