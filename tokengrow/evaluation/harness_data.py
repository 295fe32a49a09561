"""Task files on disk: the harness's own tasks, without a network.

A task keeps its prompts, metrics and processing; where it would fetch a dataset it gets the rows of
a file instead, which have the dataset's own columns.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from tokengrow.errors import UserError

GUIDE = "docs/evaluating.md"

SPLIT_NAMES = {"validation": ("validation", "valid", "val", "dev")}
"""A split's name in a dataset to its names in files."""

USUAL_FILES = {
    "lambada_openai": "lambada_test",
    "hellaswag": "hellaswag_val",
    "piqa": "piqa_valid",
    "arc_easy": "ARC-Easy_test",
    "arc_challenge": "ARC-Challenge_test",
    "winogrande": "winogrande_dev",
}
"""Task to what the file of its questions is called in the guide, after its publishers."""

LABELS = "_labels.lst"
"""Ending of a file with one number a line, the column `label` of the .jsonl file beside it."""

DATASET_SPLITS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""Keys of a task's config that name a split of its dataset."""


@dataclass(frozen=True)
class LocalTask:
    """A task's config with rows of files in place of its dataset."""

    config: dict[str, Any]
    """For the harness's `TaskManager.load`."""
    files: tuple[Path, ...]
    """Of which the rows come."""


def local_task(config: Mapping[str, Any], folder: Path, shots: int = 0) -> LocalTask:
    """Finds and reads a task's files.

    Args:
        config: the task's own.
        folder: that holds `NAME_SPLIT.jsonl` or `NAME_SPLIT.parquet`.
        shots: examples before each question, which come from a split of their own.

    Raises:
        UserError: a file that is missing, or that cannot be read.
    """
    task = config["task"]
    if "class" in config:
        raise UserError(f"{task} reads its data by code of its own: leave data_dir out for it")
    splits = dict.fromkeys(config[key] for key in DATASET_SPLITS if config.get(key))
    found = {split: path for split in splits if (path := _find(config, folder, split))}
    asked = _asked_split(config)
    before = ("fewshot_split", "training_split", "validation_split", "test_split")
    examples = next(config[key] for key in before if config.get(key))  # by its rule, too
    for split in [asked, *([examples] if shots else [])]:
        if split not in found:
            raise UserError(
                f"data_dir={folder} has no file of {task}'s {split} split: put "
                f"{_file_names(config, split)[0]} there, with the columns of "
                f"{config['dataset_path']} ({GUIDE} says more)"
            )
    rows = {split: datasets.Dataset.from_list(_read(path)) for split, path in found.items()}
    data = datasets.DatasetDict(rows)
    # A split without a file is one that the task must not look for.
    gone = {key: None for key in DATASET_SPLITS if config.get(key) not in found}
    changed = {"custom_dataset": lambda **_: data, "dataset_kwargs": None, **gone}
    files = [file for path in found.values() for file in (path, _labels(path)) if file.is_file()]
    return LocalTask({**config, **changed}, tuple(files))


def asked_file(config: Mapping[str, Any]) -> str:
    """What the file with a task's questions may be called."""
    return _file_names(config, _asked_split(config))[0]


def asked_path(config: Mapping[str, Any], folder: Path) -> Path | None:
    """The file with a task's questions, if the folder has one."""
    return _find(config, folder, _asked_split(config))


def _asked_split(config: Mapping[str, Any]) -> str:
    """The split that holds a task's questions, by the harness's rule."""
    return config.get("test_split") or config["validation_split"]


def _file_names(config: Mapping[str, Any], split: str) -> list[str]:
    """What a split's file may be called, the likeliest first."""
    task, dataset = config["task"], str(config["dataset_path"]).rpartition("/")[2]
    stems = dict.fromkeys([task, config.get("dataset_name"), dataset])
    endings = SPLIT_NAMES.get(split, (split,))
    names = [f"{stem}_{ending}" for stem in stems if stem for ending in endings]
    usual = USUAL_FILES.get(task, "")
    if usual.rpartition("_")[2] in endings:
        names.insert(0, usual)
    return [f"{name}.{kind}" for name in names for kind in ("jsonl", "parquet")]


def _find(config: Mapping[str, Any], folder: Path, split: str) -> Path | None:
    paths = (folder / name for name in _file_names(config, split))
    return next((path for path in paths if path.is_file()), None)


def _labels(path: Path) -> Path:
    return path.with_name(f"{path.stem}{LABELS}")


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, with the labels beside it."""
    if path.suffix == ".parquet":
        # Streamed, the rows leave no copy in a cache.
        try:
            files = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True
            )
            return list(files)
        except Exception as error:  # of pyarrow, which raises several kinds
            raise UserError(f"data_dir: cannot read {path} as Parquet: {error}") from None
    rows = list(_json_lines(path))
    labels = _labels(path)
    if not labels.is_file():
        return rows
    numbers = [_number(labels, *line) for line in _filled_lines(labels)]
    if len(numbers) != len(rows):
        raise UserError(
            f"data_dir: {labels} has {len(numbers)} labels for {len(rows)} rows of {path.name}: "
            "give the two files that belong together"
        )
    return [{**row, "label": number} for row, number in zip(rows, numbers, strict=True)]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in _filled_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"data_dir: {path}, line {number}: no JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"data_dir: {path}, line {number}: no mapping of columns")
        yield row


def _number(path: Path, number: int, line: str) -> int:
    try:
        return int(line)
    except ValueError:
        raise UserError(
            f"data_dir: {path}, line {number}: {line.strip()!r} is no number: give one a line"
        ) from None


def _filled_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number, line) of the lines that are not blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((n, line) for n, line in enumerate(file, start=1) if line.strip())
    except UnicodeDecodeError:
        raise UserError(f"data_dir: {path} is no UTF-8: save it as UTF-8") from None
