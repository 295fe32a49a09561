"""Local files as the data of harness tasks, so that tasks run without a network.

A task keeps its prompts, metrics and processing. Its dataset is replaced by the rows of a file with
the columns of that dataset.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from tokengrow.errors import UserError

GUIDE = "docs/evaluating.md"

SPLIT_SUFFIXES = {"validation": ("validation", "valid", "val", "dev")}
"""Split of a dataset to its names in file names; other splits have one name."""

USUAL_FILES = {
    "lambada_openai": "lambada_test",
    "hellaswag": "hellaswag_val",
    "piqa": "piqa_valid",
    "arc_easy": "ARC-Easy_test",
    "arc_challenge": "ARC-Challenge_test",
    "winogrande": "winogrande_dev",
}
"""Task to the name of its question file in the guide, which is that of its publisher."""

LABELS_SUFFIX = "_labels.lst"
"""End of the name of a file with one number per line: column `label` of the .jsonl file."""

SPLIT_KEYS = ("training_split", "validation_split", "test_split", "fewshot_split")
"""Keys of a task's config that name a split of its dataset."""


@dataclass(frozen=True)
class LocalTask:
    """Config of a task whose data are the rows of local files."""

    config: dict[str, Any]
    """Config for the harness's `TaskManager.load`."""
    files: tuple[Path, ...]
    """Files that hold the rows."""


def local_task(config: Mapping[str, Any], folder: Path, shots: int = 0) -> LocalTask:
    """Find and read the files of a task.

    Args:
        config: config of the task.
        folder: directory that holds `NAME_SPLIT.jsonl` or `NAME_SPLIT.parquet`.
        shots: examples before each question, which come from a split of their own.

    Raises:
        UserError: a file is missing, or cannot be read.
    """
    task = config["task"]
    if "class" in config:
        raise UserError(
            f"data_dir must be null for {task}, which loads its data with its own code."
        )
    splits = dict.fromkeys(config[key] for key in SPLIT_KEYS if config.get(key))
    paths = {split: path for split in splits if (path := _find_file(config, folder, split))}
    # Order in which the harness chooses the split of the examples.
    order = ("fewshot_split", "training_split", "validation_split", "test_split")
    examples = next(config[key] for key in order if config.get(key))
    for split in [_questions_split(config), *([examples] if shots else [])]:
        if split not in paths:
            raise UserError(
                f"data_dir must hold a file of {task}'s {split} split, got none in {folder}. Put "
                f"{_file_names(config, split)[0]} there, with the columns of "
                f"{config['dataset_path']} (see {GUIDE})."
            )
    rows = {split: datasets.Dataset.from_list(_read_rows(path)) for split, path in paths.items()}
    data = datasets.DatasetDict(rows)
    # The task must not load a split that has no file.
    missing = {key: None for key in SPLIT_KEYS if config.get(key) not in paths}
    changes = {"custom_dataset": lambda **_: data, "dataset_kwargs": None, **missing}
    files = [each for path in paths.values() for each in (path, _labels_path(path))]
    return LocalTask({**config, **changes}, tuple(file for file in files if file.is_file()))


def questions_file_name(config: Mapping[str, Any]) -> str:
    """Return the preferred name of the file with a task's questions."""
    return _file_names(config, _questions_split(config))[0]


def questions_path(config: Mapping[str, Any], folder: Path) -> Path | None:
    """Return the file with a task's questions, or None if the directory has none."""
    return _find_file(config, folder, _questions_split(config))


def _questions_split(config: Mapping[str, Any]) -> str:
    """Return the split that holds a task's questions, by the rule of the harness."""
    return str(config.get("test_split") or config["validation_split"])


def _file_names(config: Mapping[str, Any], split: str) -> list[str]:
    """Return the possible file names of a split, the preferred one first."""
    task, dataset = config["task"], str(config["dataset_path"]).rpartition("/")[2]
    stems = dict.fromkeys([task, config.get("dataset_name"), dataset])
    suffixes = SPLIT_SUFFIXES.get(split, (split,))
    names = [f"{stem}_{suffix}" for stem in stems if stem for suffix in suffixes]
    usual = USUAL_FILES.get(task, "")
    if usual.rpartition("_")[2] in suffixes:
        names.insert(0, usual)
    return [f"{name}.{extension}" for name in names for extension in ("jsonl", "parquet")]


def _find_file(config: Mapping[str, Any], folder: Path, split: str) -> Path | None:
    paths = (folder / name for name in _file_names(config, split))
    return next((path for path in paths if path.is_file()), None)


def _labels_path(path: Path) -> Path:
    return path.with_name(f"{path.stem}{LABELS_SUFFIX}")


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a file, with the column `label` of its labels file if there is one."""
    if path.suffix == ".parquet":
        try:
            # Streaming leaves no copy of the rows in a cache.
            files = datasets.load_dataset(
                "parquet", data_files=str(path), split="train", streaming=True
            )
            return list(files)
        except Exception as error:  # pyarrow raises several types
            raise UserError(
                f"data_dir must hold readable Parquet files. Reading {path} failed: {error}"
            ) from None
    rows = list(_read_json_lines(path))
    labels = _labels_path(path)
    if not labels.is_file():
        return rows
    numbers = [_parse_label(labels, *line) for line in _nonblank_lines(labels)]
    if len(numbers) != len(rows):
        raise UserError(
            f"data_dir must hold one label per row, got {len(numbers)} labels in {labels} for "
            f"{len(rows)} rows of {path.name}. Use two files of the same data."
        )
    return [{**row, "label": number} for row, number in zip(rows, numbers, strict=True)]


def _read_json_lines(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in _nonblank_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"data_dir: {path}, line {number} must be JSON. Parsing failed: {error}"
            ) from None
        if not isinstance(row, dict):
            raise UserError(
                f"data_dir: {path}, line {number} must be a mapping of columns, got "
                f"{type(row).__name__}."
            )
        yield row


def _parse_label(path: Path, number: int, line: str) -> int:
    try:
        return int(line)
    except ValueError:
        raise UserError(
            f"data_dir: {path}, line {number} must be a whole number, got {line.strip()!r}. Write "
            "one label per line."
        ) from None


def _nonblank_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield (number, line) of the lines that are not blank."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield from ((n, line) for n, line in enumerate(file, start=1) if line.strip())
    except UnicodeDecodeError:
        raise UserError(f"data_dir: {path} must be UTF-8. Save it as UTF-8.") from None
