"""Cache of a model's responses on disk, so that a resumed evaluation computes none twice."""

import json
import os
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO


class ResponseCache:
    """Responses to requests, stored as one JSON line `[key, response]` each.

    Every process writes its own file and reads the files of all processes. The number of processes
    may therefore change between sessions. A line cut short by a kill is skipped. Leaving a `with`
    block closes the file.

    Args:
        folder: directory for the responses of one model, created with the first response; None
            stores nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: TextIO | None = None
        self._responses: dict[str, Any] = {}
        for path in sorted(folder.glob("*.jsonl")) if folder else []:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    key, response = json.loads(line)
                except (ValueError, TypeError):
                    continue
                self._responses[key] = response

    def __enter__(self) -> "ResponseCache":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, kind: str, arguments: Iterable[Any]) -> Any:
        """Return the response to a request that an earlier session stored, or None.

        Args:
            kind: kind of the request. Requests of the harness have its name, such as
                `loglikelihood`.
            arguments: arguments of the request, as JSON values.

        Returns:
            The response, with lists in place of tuples.
        """
        return self._responses.get(_request_key(kind, arguments)) if self._responses else None

    def add(self, kind: str, arguments: Iterable[Any], response: Any) -> None:
        """Write a response to disk."""
        if self._folder is None:
            return
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"{time.time_ns()}-{os.getpid()}.jsonl"
            self._file = (self._folder / name).open("x", encoding="utf-8")
        self._file.write(json.dumps([_request_key(kind, arguments), response]) + "\n")
        self._file.flush()


def _request_key(kind: str, arguments: Iterable[Any]) -> str:
    return sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()
