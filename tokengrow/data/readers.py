"""Readers of text files: plain text, JSON and Parquet, optionally compressed, into documents."""

import glob
import gzip
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any, Literal

from tokengrow.errors import UserError

PLAIN_EXTENSIONS = (".txt", ".md", ".rst", ".tex", ".html", ".py")
"""Extensions of plain text, in which a file is one document."""
JSON_EXTENSIONS = (".jsonl", ".json")
"""Extensions of JSON Lines, or of one JSON array, in which a record is one document."""
COMPRESSED_EXTENSIONS = (".gz", ".zst")
"""Extensions that may follow those of plain text and JSON."""

FileStat = list[str | int]
"""Absolute path, size in bytes and modification time in nanoseconds of a file, as JSON values."""


def import_datasets() -> Any:
    """Import the `datasets` library and silence its logs and progress bars.

    Errors reach the user as one `UserError`.
    """
    import datasets  # imported late: it takes a second, and most commands do not need it

    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its class name if the message is empty."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def expand_files(patterns: list[str], key: str) -> list[Path]:
    """Return the files that patterns name: absolute, in the given order, without duplicates.

    Args:
        patterns: files, globs, and folders, which are searched for every known extension.
        key: config key that holds the patterns, for error messages.

    Raises:
        UserError: a pattern matches nothing, or a named file has an unknown extension.
    """
    files: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        matches = (
            [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        )
        matched_files = [file for match in matches for file in _list_text_files(match, key)]
        if not matched_files:
            raise UserError(
                f"{key} must name text files, got {pattern!r}, which matches none. Give an "
                f"existing file, folder or glob, absolute or relative to {Path.cwd()}."
            )
        files.update(dict.fromkeys(matched_files))
    return list(files)


def file_stats(files: list[Path]) -> list[FileStat]:
    """Return the path, size and modification time of each file; see `FileStat`."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """Yield the non-empty documents of one file in order.

    Args:
        path: a file with a known extension.
        text_key: key of the text in a JSON record, or column of a Parquet file.

    Raises:
        UserError: the content does not match the extension, or a record has no text. The message
            names the file and the line, record or byte offset.
    """
    key = "text" if _file_format(path) == "text" else text_key
    for number, record in enumerate(_read_records(path, text_key), 1):
        if not isinstance(record.get(key), str):
            is_json = _file_format(path) == "json"
            line = _find_bad_line(path, text_key)[0] if is_json else 0
            place = f"line {line}" if line else f"record {number}"
            raise UserError(f"data.text_key: {path}, {place}: {missing_text(record, key)}")
        if record[key]:
            yield record[key]


def missing_text(record: Mapping[str, Any], text_key: str) -> str:
    """Return why a record has no string under `text_key`, and the remedy."""
    if record.get(text_key) is None:
        keys = ", ".join(str(key) for key in record)
        return f"no text under {text_key!r}. Name the key that holds it: the record has {keys}."
    return f"{text_key!r} holds {record[text_key]!r}, not text. Name the key that holds the text."


def _list_text_files(path: Path, key: str) -> list[Path]:
    """Return a file, or the files with known extensions anywhere in a folder, sorted."""
    if path.is_dir():
        descendants = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
        return [
            file.absolute()
            for file in descendants
            if file.is_file()
            and _file_format(file)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
    if not _file_format(path):
        known = ", ".join((*PLAIN_EXTENSIONS, *JSON_EXTENSIONS))
        raise UserError(
            f"{key} must name files with known extensions, got {path}. Known are {known}, each "
            f"optionally followed by {' or '.join(COMPRESSED_EXTENSIONS)}, and .parquet."
        )
    return [path.absolute()]


def _file_format(path: Path) -> Literal["text", "json", "parquet", ""]:
    """Return the format that a file name's extension denotes; empty if it is unknown."""
    if path.name.endswith(".parquet"):
        return "parquet"
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(PLAIN_EXTENSIONS):
        return "text"
    return "json" if name.endswith(JSON_EXTENSIONS) else ""


def _read_records(path: Path, text_key: str) -> Iterator[dict[str, Any]]:
    """Yield the records of a file, read lazily."""
    try:
        yield from _open_streaming(path)
    except StopIteration:  # raised by `datasets` for an empty JSON file
        return
    # The errors of zstandard, zlib, Arrow and datasets share no base class. Each of them means that
    # the content does not match the extension.
    except Exception as error:
        raise UserError(_unreadable_message(path, text_key, error)) from error


def _open_streaming(path: Path) -> Iterable[dict[str, Any]]:
    """Open a file as a streaming dataset."""
    # Dataset.from_json and its siblings, not load_dataset("json"), which reports its usage to a
    # server at every call. The temporary cache keeps lock files out of the user's cache.
    dataset = import_datasets().Dataset
    name = glob.escape(str(path))
    with TemporaryDirectory() as cache:
        records: Iterable[dict[str, Any]]
        if _file_format(path) == "text":
            records = dataset.from_text(name, streaming=True, cache_dir=cache, sample_by="document")
        elif _file_format(path) == "json":
            records = dataset.from_json(name, streaming=True, cache_dir=cache)
        else:
            records = dataset.from_parquet(name, streaming=True, cache_dir=cache)
    return records


def _unreadable_message(path: Path, text_key: str, error: Exception) -> str:
    """Return the error message for a file that `datasets` could not read, with the position."""
    if _file_format(path) == "text" and isinstance(error, UnicodeDecodeError):
        return (
            f"data.files: {path}, byte {error.start}: not UTF-8 text. Convert the file or leave it "
            "out."
        )
    if _file_format(path) == "json":
        line, reason = _find_bad_line(path, text_key)
        if line:
            reason = reason.removesuffix(".")
            return (
                f"data.files: {path}, line {line}: {reason}. Correct the line or leave out the "
                "file."
            )
    return f"data.files: cannot read {path}: {first_line(error)}. Repair the file or leave it out."


def _find_bad_line(path: Path, text_key: str) -> tuple[int, str]:
    """Return the number (from 1) of the first line without text and the reason; (0, "") if none.

    The Arrow reader counts rows within its own blocks, so the lines are read again.
    """
    try:
        with _open_decompressed(path) as lines:
            if lines.read(1) == b"[":  # one JSON array
                json.loads(b"[" + lines.read())
                return 0, ""
        with _open_decompressed(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and (reason := _line_error(line, text_key)):
                    return number, reason
    except json.JSONDecodeError as error:
        return error.lineno, error.msg
    except Exception:  # a damaged compressed file, which the original error reports
        return 0, ""
    return 0, ""


def _line_error(line: bytes, text_key: str) -> str:
    """Return the error in one line of JSON Lines, or an empty string."""
    try:
        record = json.loads(line)
        # This rejects half a surrogate pair, as Arrow does.
        json.dumps(record, ensure_ascii=False).encode()
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(record, dict):
        return "not a JSON object"
    return "" if isinstance(record.get(text_key), str) else missing_text(record, text_key)


def _open_decompressed(path: Path) -> IO[bytes]:
    """Open the decompressed bytes of a file, iterable by line."""
    if path.name.endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    if path.name.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.open(path))  # zstandard's reader does not iterate lines
    return path.open("rb")
