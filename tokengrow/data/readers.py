"""Text files into documents: plain text, JSON and Parquet, compressed or not."""

import glob
import gzip
import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

from tokengrow.errors import UserError

PLAIN_ENDINGS = (".txt", ".md", ".rst", ".tex", ".html", ".py")
"""Endings of plain text, where a file is one document."""
JSON_ENDINGS = (".jsonl", ".json")
"""Endings of JSON Lines (or one JSON array), where a record is one document."""
COMPRESSED_ENDINGS = (".gz", ".zst")
"""Endings that may follow those of plain text and JSON."""


def import_datasets() -> Any:
    """The ``datasets`` library, made quiet: what goes wrong reaches the user as one sentence."""
    import datasets  # here and not above: it takes a second, and most commands do not need it

    datasets.logging.set_verbosity(logging.CRITICAL)
    datasets.disable_progress_bars()
    return datasets


def expand_files(patterns: list[str], key: str) -> list[Path]:
    """The files that the patterns name, absolute, in the order given, each once.

    Args:
        patterns: files, globs, and folders, which are searched for every known ending.
        key: the config key that holds the patterns, for error messages.

    Raises:
        UserError: a pattern that matches nothing, or a named file whose ending is not known.
    """
    found: dict[Path, None] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        matches = (
            [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
        )
        files = [file for match in matches for file in _files_at(match, key)]
        if not files:
            raise UserError(
                f"{key}: {pattern!r} names no text file: give an existing file, folder or glob "
                f"(relative paths start at {Path.cwd()})"
            )
        found.update(dict.fromkeys(files))
    return list(found)


def list_files(files: list[Path]) -> list[list[Any]]:
    """Absolute path, size in bytes and change time in nanoseconds of each file, JSON-able."""
    return [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def read_documents(path: Path, text_key: str) -> Iterator[str]:
    """The documents of one file in order; empty ones are left out.

    Args:
        path: a file whose ending is known.
        text_key: the key of the text in a JSON record, or the column of a Parquet file.

    Raises:
        UserError: bytes that are not the announced format, or a record without text; names the file
            and the line, record or byte offset.
    """
    key = "text" if _kind(path) == "text" else text_key
    for number, row in enumerate(_rows(path, text_key), 1):
        if not isinstance(row.get(key), str):
            line = _bad_line(path, text_key)[0] if _kind(path) == "json" else 0
            place = f"line {line}" if line else f"record {number}"
            raise UserError(f"data.text_key: {path}, {place}: {no_text(row, key)}")
        if row[key]:
            yield row[key]


def no_text(row: Mapping[str, Any], text_key: str) -> str:
    """What is wrong with a record that has no string under ``text_key``, and the way out."""
    if row.get(text_key) is None:
        keys = ", ".join(str(key) for key in row)
        return f"no text under {text_key!r}: name the key that holds it (the record has {keys})"
    return f"{text_key!r} holds {row[text_key]!r}, not text: name the key that holds the text"


def _files_at(path: Path, key: str) -> list[Path]:
    """One file, or the files of known endings anywhere in a folder, sorted."""
    if path.is_dir():
        inside = sorted(path.rglob("*"), key=lambda file: file.relative_to(path).as_posix())
        return [
            file.absolute()
            for file in inside
            if file.is_file()
            and _kind(file)
            and not any(part.startswith(".") for part in file.relative_to(path).parts)
        ]
    if not _kind(path):
        known = ", ".join((*PLAIN_ENDINGS, *JSON_ENDINGS, ".parquet"))
        raise UserError(
            f"{key}: {path} has an unknown ending: known are {known}, all but the last also with "
            f"{' or '.join(COMPRESSED_ENDINGS)} after it"
        )
    return [path.absolute()]


def _kind(path: Path) -> str:
    """``text``, ``json`` or ``parquet`` by the ending of the name; empty where it is not known."""
    if path.name.endswith(".parquet"):
        return "parquet"
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(PLAIN_ENDINGS):
        return "text"
    return "json" if name.endswith(JSON_ENDINGS) else ""


def _rows(path: Path, text_key: str) -> Iterator[dict[str, Any]]:
    """The records of a file, read as they are asked for."""
    try:
        yield from _open(path)
    except StopIteration:  # what `datasets` says of an empty JSON file
        return
    # The readers below raise whatever they like (zstandard, zlib, Arrow and datasets errors share
    # no base class), and each of them means that this file is not what it claims to be.
    except Exception as error:
        raise UserError(_why_unreadable(path, text_key, error)) from error


def _open(path: Path) -> Iterable[dict[str, Any]]:
    """The file as a streaming dataset."""
    # Dataset.from_json and its like, not load_dataset("json"): the latter counts its uses with a
    # request to a server for every call. The throw-away cache keeps lock files out of the user's.
    dataset = import_datasets().Dataset
    name = glob.escape(str(path))
    with TemporaryDirectory() as cache:
        if _kind(path) == "text":
            return dataset.from_text(name, streaming=True, cache_dir=cache, sample_by="document")
        if _kind(path) == "json":
            return dataset.from_json(name, streaming=True, cache_dir=cache)
        return dataset.from_parquet(name, streaming=True, cache_dir=cache)


def _why_unreadable(path: Path, text_key: str, error: Exception) -> str:
    """One sentence on why ``datasets`` could not read the file, with the place where it broke."""
    if _kind(path) == "text" and isinstance(error, UnicodeDecodeError):
        return (
            f"data.files: {path}, byte {error.start}: not UTF-8 text: convert or leave out the file"
        )
    if _kind(path) == "json":
        line, reason = _bad_line(path, text_key)
        if line:
            return f"data.files: {path}, line {line}: {reason}: mend the line or leave out the file"
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return f"data.files: cannot read {path}: {reason}: mend the file or leave it out"


def _bad_line(path: Path, text_key: str) -> tuple[int, str]:
    """Number (from 1) of the first line without text in it, and what is wrong with it; else 0.

    The Arrow reader counts rows inside its own blocks, so the line has to be looked for again.
    """
    try:
        with _open_bytes(path) as lines:
            if lines.read(1) == b"[":  # one JSON array
                json.loads(b"[" + lines.read())
                return 0, ""
        with _open_bytes(path) as lines:
            for number, line in enumerate(lines, 1):
                if line.strip() and (reason := _bad_record(line, text_key)):
                    return number, reason
    except json.JSONDecodeError as error:
        return error.lineno, error.msg
    except Exception:  # a broken compressed file: the first error says so
        return 0, ""
    return 0, ""


def _bad_record(line: bytes, text_key: str) -> str:
    """What is wrong with one line of JSON Lines, or nothing."""
    try:
        row = json.loads(line)
        json.dumps(row, ensure_ascii=False).encode()  # refuses half a surrogate pair, as Arrow does
    except ValueError as error:
        return f"not JSON ({error})"
    if not isinstance(row, dict):
        return "not a JSON object"
    return "" if isinstance(row.get(text_key), str) else no_text(row, text_key)


def _open_bytes(path: Path) -> IO[bytes]:
    """The decompressed bytes of a file, iterable by line."""
    if path.name.endswith(".gz"):
        return gzip.open(path)  # type: ignore[return-value]
    if path.name.endswith(".zst"):
        import zstandard

        return io.BufferedReader(zstandard.open(path))  # its own reader knows no lines
    return path.open("rb")
