"""JSON files of evaluation results: checkpoint, settings, circumstances and scores."""

import json
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from tokengrow.checkpoint.layout import step_folders
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.errors import UserError
from tokengrow.evaluation.perplexity import Perplexity
from tokengrow.evaluation.scores import Score
from tokengrow.files import write_atomically

PERPLEXITY = "perplexity"
"""Name of the one task that does not belong to the harness."""
RESULTS_FOLDER = "eval"
"""Name of the results directory in a run."""
RESPONSES_FOLDER = "responses"
"""Name of the directory of response caches, in the results directory."""


def default_results_folder(checkpoint: Path) -> Path:
    """Return `eval` in the run of a checkpoint, or `NAME-eval` next to one outside a run."""
    if checkpoint in step_folders(checkpoint.parent):
        return checkpoint.parent / RESULTS_FOLDER
    return checkpoint.with_name(f"{checkpoint.name}-{RESULTS_FOLDER}")


def results_file(folder: Path, checkpoint: Path, key: str, settings: Mapping[str, Any]) -> Path:
    """Return the results file of an evaluation; its name depends on weights and settings.

    Args:
        folder: results directory.
        checkpoint: directory of the checkpoint.
        key: hash of the model, from `model_key`.
        settings: settings of the evaluation, as JSON values.
    """
    digest = sha256(json.dumps([key, settings], sort_keys=True).encode()).hexdigest()
    return folder / f"{checkpoint.name}-{digest[:8]}.json"


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the `checkpoint` section of a results file."""
    source = checkpoint.lineage_source()
    return {
        "folder": str(checkpoint.folder),
        "parameters": source.parameters,
        "step": source.step,
        "weights_sha256": source.weights_sha256,
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Write a results file atomically; create its directory if necessary."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def results_files(run: Path) -> list[Path]:
    """Return the results files in the default results directory of a run."""
    return sorted((run / RESULTS_FOLDER).glob("step_*.json"))


def read_results(path: Path) -> dict[str, Any]:
    """Read a file that `write_results` wrote.

    Raises:
        UserError: the file is damaged, or does not hold evaluation results.
    """
    try:
        results: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        _check_results(results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({type(error).__name__}: {error}). Delete it, or "
            "choose another out=."
        ) from None
    return results


def _check_results(results: Mapping[str, Any]) -> None:
    """Raise an error if a value that readers of results need is missing or has a wrong type."""
    required = [("checkpoint", "step"), ("checkpoint", "weights_sha256"), ("ran", "began")]
    required += [("settings", "limit")]
    for score in results.get("scores", ()):
        Score(**score)
    if PERPLEXITY in results:
        Perplexity.from_dict(results[PERPLEXITY])
        required += [("settings", "data"), ("settings", PERPLEXITY)]
    missing = [f"{section}.{key}" for section, key in required if key not in results[section]]
    if missing:
        raise KeyError(*missing)
