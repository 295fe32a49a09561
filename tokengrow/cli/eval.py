"""tokengrow eval: evaluate a checkpoint with lm-evaluation-harness tasks and perplexity."""

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
from tokengrow.console.format import format_count
from tokengrow.console.progress import status_progress
from tokengrow.data.corpus import Text
from tokengrow.data.open_tokens import resolve_text, text_section
from tokengrow.distributed.collectives import rank, world_size
from tokengrow.distributed.fabric import FabricConfig, build_fabric, child_processes
from tokengrow.distributed.launch import rank_from_env
from tokengrow.distributed.peer_failure import monitor_peers
from tokengrow.errors import UserError
from tokengrow.evaluation.loaded_model import LoadedModel, model_key
from tokengrow.evaluation.perplexity import (
    Perplexity,
    PerplexityConfig,
    measure_perplexity,
    perplexity_caption,
    perplexity_table,
    select_documents,
)
from tokengrow.evaluation.published_scores import CITATION, nearest_published_model
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.results import (
    PERPLEXITY,
    RESPONSES_FOLDER,
    default_results_folder,
    describe_checkpoint,
    read_results,
    results_file,
    write_results,
)
from tokengrow.evaluation.scores import Score, score_table
from tokengrow.evaluation.scoring import parse_batch_size
from tokengrow.parsing import parse_dataclass

if TYPE_CHECKING:  # the harness is an extra, imported only for its tasks
    from tokengrow.evaluation.harness_tasks import HarnessTasks


@dataclass(frozen=True, kw_only=True)
class EvalArguments:
    """Keys of eval.yaml."""

    source: str
    """Checkpoint, or run whose newest checkpoint is used."""
    tasks: list[str]
    """Names of harness tasks, and perplexity."""
    limit: float | None
    """Number of questions per task, or their fraction if below 1; null: all."""
    num_fewshot: int | None
    """Number of examples before each question; null: the default of the task."""
    data_dir: str | None
    """Directory of task files; null: datasets of the Hugging Face Hub."""
    data: dict[str, Any]
    """Text of perplexity; its keys depend on `data.source`."""
    perplexity: PerplexityConfig
    """Settings of perplexity."""
    batch_size: str
    """Rows per batch, or auto."""
    out: str | None
    """Directory of the results; null: next to the checkpoint."""
    fabric: FabricConfig
    """Devices and precision."""

    def __post_init__(self) -> None:
        if not self.tasks:
            raise UserError(
                "tasks is empty. Name at least one, for example tasks=[lambada_openai]."
            )
        if len(set(self.tasks)) < len(self.tasks):
            raise UserError(
                f"tasks must be different, got {', '.join(self.tasks)}. Remove the repeated one."
            )
        if self.limit is not None and not 0 < self.limit < math.inf:
            raise UserError(f"limit must be a number above 0, got {self.limit:g}.")
        if self.limit is not None and self.limit > 1 and self.limit % 1:
            raise UserError(f"limit must be a whole number, or below 1, got {self.limit:g}.")
        if self.limit is not None and self.limit < 1 and PERPLEXITY in self.tasks:
            raise UserError(
                "limit must be a whole number of documents for perplexity, got a fraction."
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"num_fewshot must be 0 or more, got {self.num_fewshot}.")
        parse_batch_size(self.batch_size)
        if self.fabric.strategy == "fsdp2":
            raise UserError(
                "fabric.strategy must be auto or ddp, got fsdp2: every device holds the full model."
                " Set fabric=ddp."
            )


@dataclass(frozen=True)
class EvalPlan:
    """Tasks and text of an evaluation, read before a device is used."""

    tasks: "HarnessTasks | None"
    """Tasks of the harness; None: none requested."""
    text: Text | None
    """Text of perplexity; None: not requested."""
    settings: dict[str, Any]
    """Everything besides the model that the results depend on, as JSON values."""


def main(config: DictConfig) -> None:
    """Evaluate a checkpoint; print tables, and write a JSON file."""
    arguments = parse_dataclass(EvalArguments, plain_values(config))
    # With an explicit file, because stdout is redirected while the harness prints.
    console = Console(file=sys.stdout, highlight=False, soft_wrap=True, quiet=rank_from_env() > 0)
    results, path = evaluate(arguments, Console(stderr=True, quiet=rank_from_env() > 0))
    if rank() == 0:
        show(console, results, path)


def evaluate(arguments: EvalArguments, console: Console) -> tuple[dict[str, Any], Path]:
    """Evaluate a checkpoint, or read the results of an earlier evaluation.

    Args:
        arguments: keys of eval.yaml.
        console: receives progress.

    Returns:
        The results, complete only on rank 0, and their file.
    """
    with status_progress(console, "reading the checkpoint and the tasks"):
        checkpoint = load_source(arguments.source)
        assert checkpoint.folder is not None
        plan = plan_evaluation(arguments, checkpoint)
    key = model_key(checkpoint, arguments.fabric.chosen_precision)
    out = Path(arguments.out) if arguments.out else default_results_folder(checkpoint.folder)
    if out.exists() and not out.is_dir():
        raise UserError(f"out must be a directory, got the file {out}. Choose another out=.")
    path = results_file(out, checkpoint.folder, key, plan.settings)
    if path.is_file():
        console.print("results already exist; skipping evaluation")
        return read_results(path), path
    begun, since = datetime.now(UTC), time.monotonic()
    fabric = build_fabric(arguments.fabric)
    with monitor_peers(child_processes(fabric)):
        precision, rows = arguments.fabric.chosen_precision, parse_batch_size(arguments.batch_size)
        model = LoadedModel.from_checkpoint(
            checkpoint, fabric.device, precision, fabric.autocast, rows
        )
        try:
            found = run_evaluation(
                model, plan, arguments, out / RESPONSES_FOLDER / key[:16], console
            )
        except KeyboardInterrupt:
            hint = "answers so far are kept; the same command resumes"
            raise KeyboardInterrupt(hint) from None
    ran = {
        "device": str(fabric.device),
        "processes": world_size(),
        "batch_size": arguments.batch_size,
        "began": begun.isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - since, 1),
        "versions": {"tokengrow": __version__, "torch": torch.__version__},
    }
    named = {"checkpoint": describe_checkpoint(checkpoint), "settings": plan.settings, "ran": ran}
    if rank() == 0:
        write_results(path, named | found)
    return named | found, path


def plan_evaluation(arguments: EvalArguments, checkpoint: Checkpoint) -> EvalPlan:
    """Load the tasks and the text; raise `UserError` if one is missing."""
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
                "tasks of the lm-evaluation-harness need an extra: pip install 'tokengrow[eval]'. "
                "tasks=[perplexity] does not."
            )
        from tokengrow.evaluation.harness_tasks import load_tasks

        data_dir = Path(arguments.data_dir) if arguments.data_dir else None
        tasks = load_tasks(names, data_dir, arguments.num_fewshot)
        settings |= {"num_fewshot": arguments.num_fewshot, "files": tasks.files}
        settings["lm_eval"] = version("lm_eval")  # it defines prompts, metrics and examples
    if PERPLEXITY in arguments.tasks:
        text = resolve_text(arguments.data, checkpoint)
        identity = sha256(json.dumps(text.identity(), sort_keys=True).encode()).hexdigest()
        settings |= {"data": text_section(arguments.data, checkpoint), "data_sha256": identity}
        settings[PERPLEXITY] = asdict(arguments.perplexity)
    return EvalPlan(tasks, text, settings)


def run_evaluation(
    model: LoadedModel, plan: EvalPlan, arguments: EvalArguments, folder: Path, console: Console
) -> dict[str, Any]:
    """Return the scores and the perplexity.

    Args:
        model: model on the device of this rank.
        plan: tasks and text.
        arguments: keys of eval.yaml.
        folder: directory for answers, each written as soon as it is known.
        console: receives progress.
    """
    found: dict[str, Any] = {}
    with ResponseCache(folder) as responses:
        if plan.tasks is not None:
            from tokengrow.evaluation.harness import TokengrowLM
            from tokengrow.evaluation.harness_tasks import run_tasks

            lm = TokengrowLM(model, responses, console)
            scores = run_tasks(lm, plan.tasks, arguments.limit)
            found["scores"] = [asdict(score) for score in scores]
        if plan.text is not None:
            limit = None if arguments.limit is None else int(arguments.limit)
            documents = select_documents(plan.text, arguments.perplexity, limit)
            stride = arguments.perplexity.stride
            scorer, tokenizer = model.scorer, model.tokenizer
            measured = measure_perplexity(
                documents, tokenizer, scorer, stride, responses=responses, console=console
            )
            found[PERPLEXITY] = measured.to_dict()
    return found


def show(console: Console, results: dict[str, Any], path: Path) -> None:
    """Print the tables, with the nearest published model, and the path of the results."""
    checkpoint = results["checkpoint"]
    console.print(f"{checkpoint['folder']}: {format_count(checkpoint['parameters'])} parameters\n")
    if "scores" in results:
        near = nearest_published_model(checkpoint["parameters"])
        console.print(score_table([Score(**score) for score in results["scores"]], near))
        console.print(f"{near.name}: the nearest published size, {CITATION}\n")
    if PERPLEXITY in results:
        measured = Perplexity.from_dict(results[PERPLEXITY])
        console.print(perplexity_table(measured))
        console.print(f"{perplexity_caption(measured)}\n")
    console.print(f"results  {path}")


if __name__ == "__main__":
    run_command("eval", main)
