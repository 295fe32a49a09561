"""Tasks of the lm-evaluation-harness, run: from their names to rows of results."""

import logging
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from functools import cache, partialmethod
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import lm_eval.api.task
from jinja2 import UndefinedError
from lm_eval.api.task import Task
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from tokengrow.errors import UserError
from tokengrow.evaluation.harness import TokengrowLM
from tokengrow.evaluation.harness_data import GUIDE, asked_file, asked_path, local_task
from tokengrow.evaluation.results import PERPLEXITY
from tokengrow.evaluation.scores import Score
from tokengrow.files import sha256
from tokengrow.parsing import suggest

FEWSHOT_SEED = 1234
"""The harness's own default: which examples stand before a question."""

COLUMN = re.compile("'\\w+'")
"""The name of a column in what is said where it is missing."""

BOOTSTRAP = 1000
"""Resamples for the standard error of a metric that has no formula for it, such as perplexity."""


@dataclass(frozen=True)
class HarnessTasks:
    """Tasks that are ready to run."""

    loaded: dict[str, Any]
    """For `lm_eval.evaluate`."""
    files: dict[str, dict[str, str]]
    """Task to the files of `data_dir` that it reads: the name of each to its SHA-256."""


def load_tasks(
    names: Sequence[str], data_dir: Path | None = None, num_fewshot: int | None = None
) -> HarnessTasks:
    """Finds tasks by name and reads their data, from `data_dir` or as the harness itself does.

    Args:
        names: of tasks, groups or tags of the harness.
        data_dir: folder of task files.
        num_fewshot: examples before each question; None: as the task says.

    Raises:
        UserError: an unknown name, or data that is not there.
    """
    manager = _manager(names)
    for name in names:
        if name not in manager.task_index:
            raise UserError(f"tasks: {name!r}{suggest(name, [PERPLEXITY, *manager.all_tasks])}")
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"data_dir={data_dir} is no folder: give one that holds task files")
    specs: list[Any] = list(names)
    files: dict[str, dict[str, str]] = {}
    if data_dir is not None:
        leaves = [leaf for name in names for leaf in _leaves(manager, name)]
        found = [local_task(_config(manager, leaf), data_dir, num_fewshot or 0) for leaf in leaves]
        specs = [each.config for each in found]
        files = {
            leaf: {path.name: sha256(path) for path in each.files}
            for leaf, each in zip(leaves, found, strict=True)
        }
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}, "group_map": {}}
    with silence_harness():
        for spec in specs:
            for key, more in _built(manager, spec, data_dir).items():
                loaded[key].update(more)
    for task in loaded["tasks"].values():
        _set_shots(task, num_fewshot)
    return HarnessTasks(loaded, files)


def run_tasks(lm: TokengrowLM, tasks: HarnessTasks, limit: float | None = None) -> list[Score]:
    """Asks a model all questions.

    Args:
        lm: the model.
        tasks: what to ask.
        limit: questions of each task, or below 1 their share; None: all.

    Returns:
        A figure for each metric of each task and group, in their order; on other ranks than the
        first none.

    Raises:
        UserError: fewer questions than ranks, which the harness cannot deal out.
    """
    for name, task in tasks.loaded["tasks"].items():
        asked = _asked(len(task.eval_docs), limit)
        if asked < lm.world_size:
            raise UserError(
                f"{name} asks {asked} questions, fewer than there are processes "
                f"({lm.world_size}): start fewer, or raise limit"
            )
    with silence_harness():
        found = lm_eval.evaluate(
            lm=lm,
            task_dict=tasks.loaded,
            limit=limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=False,
        )
    return [] if found is None else list(_scores(found))


@contextmanager
def silence_harness() -> Iterator[None]:
    """Keeps the harness from writing over our own display: its bars, prints and notes."""
    bar = lm_eval.api.task.tqdm
    with ExitStack() as stack:
        for log in (logging.getLogger(name) for name in ("lm_eval", "huggingface_hub")):
            stack.callback(log.setLevel, log.level)
            log.setLevel(logging.ERROR)
        stack.callback(setattr, bar, "__init__", bar.__init__)
        bar.__init__ = partialmethod(bar.__init__, disable=True)
        # Else it forks a process for each core, beside torch's threads, for a second's work.
        if "DISABLE_MULTIPROC" not in os.environ:
            os.environ["DISABLE_MULTIPROC"] = "1"
            stack.callback(os.environ.pop, "DISABLE_MULTIPROC", None)
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(redirect_stdout(nowhere))
        yield


def _manager(names: Sequence[str]) -> TaskManager:
    """The harness's index of the tasks named, if need be of all."""
    root = Path(lm_eval.__file__).parent / "tasks"
    parts = (name.split("_") for name in names)
    beginnings = {"_".join(words[: n + 1]) for words in parts for n in range(len(words))}
    folders = [root / name for name in sorted(beginnings) if (root / name).is_dir()]
    if folders:
        manager = TaskManager(include_defaults=False, include_path=folders)
        if set(names) <= set(manager.all_subtasks):
            return manager
    return _all_tasks()


@cache
def _all_tasks() -> TaskManager:
    """The index of all tasks: to read their 14,000 files takes seconds."""
    return TaskManager()


def _leaves(manager: TaskManager, name: str) -> list[str]:
    """The tasks that a name stands for."""
    if name in manager.all_tags:
        return sorted(manager.task_index[name].tags)
    if name in manager.all_groups:
        raise UserError(
            f"tasks: {name} is a group of the harness, which has its data from several places: "
            "with data_dir name its tasks one by one"
        )
    return [name]


def _config(manager: TaskManager, name: str) -> dict[str, Any]:
    """A task as its YAML defines it."""
    return dict(load_yaml(manager.task_index[name].yaml_path, resolve_func=True))


def _built(manager: TaskManager, spec: Any, data_dir: Path | None) -> Mapping[str, Any]:
    """A task with its data, as the harness loads it."""
    name = spec if isinstance(spec, str) else spec["task"]
    try:
        return manager.load([spec])
    except (ConnectionError, OSError, datasets.exceptions.DatasetsError) as error:
        leaf = spec if isinstance(spec, dict) else _config(manager, _leaves(manager, name)[0])
        raise UserError(
            f"{name}: its data is neither in the cache of `datasets` nor can it be fetched "
            f"({_first_line(error)}): give data_dir=DIR that holds {asked_file(leaf)} ({GUIDE})"
        ) from None
    except Exception as error:
        if data_dir is None:
            raise
        # What a task asks of its rows, it asks in templates and functions of its own.
        file, what = asked_path(spec, data_dir), f"{type(error).__name__}: {_first_line(error)}"
        if isinstance(error, UndefinedError | KeyError) and (column := COLUMN.search(str(error))):
            what = f"{column[0]} is missing"
        raise UserError(
            f"{name}: {file} has not the columns of {spec['dataset_path']}: {what} ({GUIDE})"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _asked(questions: int, limit: float | None) -> int:
    """How many of a task's questions are asked."""
    if limit is None:
        return questions
    return math.ceil(questions * limit) if limit < 1 else min(int(limit), questions)


def _set_shots(task: Task, num_fewshot: int | None) -> None:
    """As the harness does: a task whose definition says 0 keeps that."""
    own = task.get_config("num_fewshot")
    if own is None or (num_fewshot is not None and own != 0):
        task.set_config("num_fewshot", num_fewshot or 0)
    task.set_fewshot_seed(FEWSHOT_SEED)


def _scores(found: Mapping[str, Any]) -> Iterator[Score]:
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, answers = key.partition(",")
            if not answers or metric.endswith("_stderr"):
                continue
            error = figures.get(f"{metric}_stderr,{answers}")
            yield Score(
                task=task,
                metric=metric if answers == "none" else f"{metric} ({answers})",
                value=_finite(value),
                error=_finite(error),
                samples=found["n-samples"].get(task, {}).get("effective", 0),
                shots=found["n-shot"].get(task, 0),
                version=found["versions"].get(task),
            )


def _finite(number: Any) -> float | None:
    """A number as JSON has it; the harness writes N/A where there is no error."""
    known = isinstance(number, int | float) and math.isfinite(number)
    return float(number) if known else None
