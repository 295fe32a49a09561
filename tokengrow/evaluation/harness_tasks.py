"""Tasks of the lm-evaluation-harness: loading by name, evaluation, and conversion to scores."""

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager

from tokengrow.compat import load_task_yaml, missing_column
from tokengrow.console.format import first_line
from tokengrow.errors import UserError
from tokengrow.evaluation.harness import TokengrowLM
from tokengrow.evaluation.harness_data import (
    GUIDE,
    local_task,
    questions_file_name,
    questions_path,
)
from tokengrow.evaluation.results import PERPLEXITY
from tokengrow.evaluation.scores import Score
from tokengrow.files import sha256
from tokengrow.parsing import suggest

FEWSHOT_SEED = 1234
"""Seed of the choice of examples before a question, the harness's default."""

BOOTSTRAP_RESAMPLES = 1000
"""Resamples for the standard error of a metric without a formula for it, such as perplexity."""


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks with their data, ready to run."""

    loaded: dict[str, Any]
    """Tasks and groups for `lm_eval.evaluate`."""
    files: dict[str, dict[str, str]]
    """Task to the files of `data_dir` that it reads, as file name to SHA-256."""


def load_tasks(
    names: Sequence[str], data_dir: Path | None = None, num_fewshot: int | None = None
) -> HarnessTasks:
    """Load tasks by name, with data from `data_dir` or from the harness's own source.

    Args:
        names: names of tasks, groups or tags of the harness.
        data_dir: directory of task files.
        num_fewshot: examples before each question; None: the default of the task.

    Raises:
        UserError: a name is unknown, or data are missing.
    """
    manager = _task_manager(names)
    for name in names:
        if name not in manager.task_index:
            valid = [PERPLEXITY, *manager.all_tasks]
            raise UserError(f"tasks has an unknown name {name!r}. {suggest(name, valid)}")
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(
            f"data_dir must be a directory, got {data_dir}. Give one that holds task files."
        )
    specs: list[str | dict[str, Any]] = list(names)
    files: dict[str, dict[str, str]] = {}
    if data_dir is not None:
        leaves = [leaf for name in names for leaf in _leaf_tasks(manager, name)]
        local = [
            local_task(_task_config(manager, leaf), data_dir, num_fewshot or 0) for leaf in leaves
        ]
        specs = [task.config for task in local]
        files = {
            leaf: {path.name: sha256(path) for path in task.files}
            for leaf, task in zip(leaves, local, strict=True)
        }
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with silence_harness():
        for spec in specs:
            for key, entries in _load_task(manager, spec, data_dir).items():
                loaded[key].update(entries)
    for task in loaded["tasks"].values():
        _set_fewshot(task, num_fewshot)
    return HarnessTasks(loaded, files)


def run_tasks(lm: TokengrowLM, tasks: HarnessTasks, limit: float | None = None) -> list[Score]:
    """Evaluate a model on tasks.

    Args:
        lm: model to evaluate.
        tasks: tasks with their data.
        limit: number of questions per task, or their fraction if below 1; None: all.

    Returns:
        One score per metric of each task and group, in their order; empty on ranks other than 0.

    Raises:
        UserError: a task has fewer questions than there are ranks, which the harness does not
            support.
    """
    for name, task in tasks.loaded["tasks"].items():
        questions = len(task.eval_docs)
        if limit is not None:
            share = math.ceil(questions * limit) if limit < 1 else int(limit)
            questions = min(share, questions)
        if questions < lm.world_size:
            raise UserError(
                f"{name} must have at least {lm.world_size} questions, one per process, got "
                f"{questions}. Start fewer processes, or raise limit."
            )
    with silence_harness():
        results = lm_eval.evaluate(
            lm=lm,
            task_dict=tasks.loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP_RESAMPLES,
            log_samples=False,
        )
    return [] if results is None else list(_scores(results))


@contextmanager
def silence_harness() -> Iterator[None]:
    """Suppress the progress bars, prints and log lines of the harness."""
    bar = lm_eval.api.task.tqdm
    with ExitStack() as stack:
        for log in (logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")):
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.ERROR)
        stack.callback(setattr, bar, "__init__", bar.__init__)
        bar.__init__ = partialmethod(bar.__init__, disable=True)
        # By default the bootstrap forks one process per core, next to torch's threads, for about a
        # second of work.
        if "DISABLE_MULTIPROC" not in os.environ:
            os.environ["DISABLE_MULTIPROC"] = "1"
            stack.callback(os.environ.pop, "DISABLE_MULTIPROC", None)
        devnull = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(devnull))
        yield


def _task_manager(names: Sequence[str]) -> TaskManager:
    """Return an index of the named tasks, or of all tasks if their directories are not found.

    The directory of a task is searched under the leading words of its name.
    """
    root = Path(lm_eval.__file__).parent / "tasks"
    words = (name.split("_") for name in names)
    prefixes = {"_".join(each[: n + 1]) for each in words for n in range(len(each))}
    folders = [root / prefix for prefix in sorted(prefixes) if (root / prefix).is_dir()]
    if folders:
        manager = TaskManager(include_defaults=False, include_path=folders)
        if set(names) <= set(manager.all_subtasks):
            return manager
    return _all_tasks()


@cache
def _all_tasks() -> TaskManager:
    """Return the index of all tasks; reading their 14,000 files takes seconds."""
    return TaskManager()


def _leaf_tasks(manager: TaskManager, name: str) -> list[str]:
    """Return the tasks of a tag, or the task itself.

    Raises:
        UserError: the name is a group, whose tasks read several datasets.
    """
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    if name in manager.all_groups:
        raise UserError(
            f"tasks must be single tasks with data_dir, got the group {name}. Name its tasks one "
            "by one."
        )
    return [name]


def _task_config(manager: TaskManager, name: str) -> dict[str, Any]:
    """Return the config in the YAML file of a task."""
    return load_task_yaml(manager.task_index[name].yaml_path)


def _load_task(
    manager: TaskManager, spec: str | dict[str, Any], data_dir: Path | None
) -> dict[str, dict[str, Any]]:
    """Load a task with its data.

    Args:
        manager: index that holds the task.
        spec: name of the task, or its config with local data.
        data_dir: directory of task files, for error messages.

    Returns:
        Entries of `HarnessTasks.loaded`.

    Raises:
        UserError: the data are missing, or lack a column.
    """
    try:
        loaded: dict[str, dict[str, Any]] = manager.load([spec])
    except (ConnectionError, OSError, datasets.exceptions.DatasetsError) as error:
        name = spec if isinstance(spec, str) else spec["task"]
        config = (
            _task_config(manager, _leaf_tasks(manager, spec)[0]) if isinstance(spec, str) else spec
        )
        raise UserError(
            f"{name}: the dataset is not in the cache of `datasets` and cannot be downloaded "
            f"({first_line(error)}). Set data_dir=DIR to a directory with "
            f"{questions_file_name(config)} (see {GUIDE})."
        ) from None
    except Exception as error:  # templates and functions of the task read its columns
        if data_dir is None or isinstance(spec, str):
            raise
        problem = f"{type(error).__name__}: {first_line(error)}"
        if column := missing_column(error):
            problem = f"{column} is missing"
        raise UserError(
            f"{spec['task']}: {questions_path(spec, data_dir)} must have the columns of "
            f"{spec['dataset_path']}. Reading it failed: {problem} (see {GUIDE})."
        ) from None
    return loaded


def _set_fewshot(task: Task, num_fewshot: int | None) -> None:
    """Set the number of examples as the harness does: a task defined with 0 keeps 0."""
    default = task.get_config("num_fewshot")
    if default is None or (num_fewshot is not None and default != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)


def _scores(results: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the scores in the results of `lm_eval.evaluate`."""
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, _, filter_name = key.partition(",")
            if not filter_name or metric.endswith("_stderr"):
                continue
            error = metrics.get(f"{metric}_stderr,{filter_name}")
            yield Score(
                task=task,
                metric=metric if filter_name == "none" else f"{metric} ({filter_name})",
                value=_finite(value),
                error=_finite(error),
                samples=results["n-samples"].get(task, {}).get("effective", 0),
                shots=results["n-shot"].get(task, 0),
                version=results["versions"].get(task),
            )


def _finite(number: object) -> float | None:
    """Return a finite number as a float, else None; the harness writes N/A for a missing error."""
    if isinstance(number, int | float) and math.isfinite(number):
        return float(number)
    return None
