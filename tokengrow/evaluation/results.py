"""What an evaluation found, as a file of JSON that says what was asked of what, and where."""

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
"""The one task that is not the harness's."""
FOLDER = "eval"
"""Of the results, in a run."""
RESPONSES_FOLDER = "responses"
"""Folder beside the results in which answers are kept as they come."""


def default_results_folder(checkpoint: Path) -> Path:
    """Where the results of a checkpoint go: `eval` in its run, or beside a bare checkpoint."""
    if checkpoint in step_folders(checkpoint.parent):
        return checkpoint.parent / FOLDER
    return checkpoint.with_name(f"{checkpoint.name}-{FOLDER}")


def results_file(folder: Path, checkpoint: Path, key: str, settings: Mapping[str, Any]) -> Path:
    """The file of an evaluation: another one for other weights or settings.

    Args:
        folder: of the results.
        checkpoint: that is evaluated.
        key: of its answers, as `model_key` gives it.
        settings: what is asked, as JSON values.
    """
    digest = sha256(json.dumps([key, settings], sort_keys=True).encode()).hexdigest()
    return folder / f"{checkpoint.name}-{digest[:8]}.json"


def describe_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Which checkpoint it is."""
    source = checkpoint.lineage_source()
    return {
        "folder": str(checkpoint.folder),
        "parameters": source.parameters,
        "step": source.step,
        "weights_sha256": source.weights_sha256,
    }


def write_results(path: Path, results: Mapping[str, Any]) -> None:
    """Writes results; their folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1, ensure_ascii=False)
    write_atomically(path, f"{text}\n".encode())


def results_files(run: Path) -> list[Path]:
    """The results that lie in a run, where `default_results_folder` puts them."""
    return sorted((run / FOLDER).glob("step_*.json"))


def read_results(path: Path) -> dict[str, Any]:
    """Reads what `write_results` wrote.

    Raises:
        UserError: it is damaged, or holds something else.
    """
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        _check(results)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        what = f"{path} is damaged ({type(error).__name__}: {error})"
        raise UserError(f"{what}: delete it, or choose another out=") from None
    return results


def _check(results: Any) -> None:
    """Raises where something is missing, or of another kind, that is read of results."""
    needed = [("checkpoint", "step"), ("checkpoint", "weights_sha256"), ("ran", "began")]
    needed += [("settings", "limit")]
    for score in results.get("scores", ()):
        Score(**score)
    if PERPLEXITY in results:
        Perplexity.from_dict(results[PERPLEXITY])
        needed += [("settings", "data"), ("settings", PERPLEXITY)]
    missing = [f"{section}.{key}" for section, key in needed if key not in results[section]]
    if missing:
        raise KeyError(*missing)
