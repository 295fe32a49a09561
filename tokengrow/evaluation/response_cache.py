"""What a model has answered, kept as it comes, so that nothing is asked twice."""

import json
import os
import time
from collections.abc import Iterable
from hashlib import sha256
from pathlib import Path
from typing import Any, TextIO


class ResponseCache:
    """Answers to requests, one line of JSON each.

    Every process writes a file of its own and reads those of all, so it does not matter how many
    there are, nor how many there were before a kill. A line that a kill cut short is passed over.
    At the end of a `with` its file is closed.

    Args:
        folder: for answers of one model; made with the first answer. None keeps nothing.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._file: TextIO | None = None
        self._known: dict[str, Any] = {}
        for path in sorted(folder.glob("*.jsonl")) if folder else []:
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                try:
                    key, answer = json.loads(line)
                except (ValueError, TypeError):
                    continue
                self._known[key] = answer

    def __enter__(self) -> "ResponseCache":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def get(self, kind: str, arguments: Iterable[Any]) -> Any:
        """The answer to a request, with lists for tuples; None: not known.

        Args:
            kind: of request; the harness's name of it, such as `loglikelihood`, if it has one.
            arguments: what is asked: values that JSON knows.
        """
        return self._known.get(_key(kind, arguments)) if self._known else None

    def add(self, kind: str, arguments: Iterable[Any], answer: Any) -> None:
        """Keeps an answer."""
        if self._folder is None:
            return
        if self._file is None:
            self._folder.mkdir(parents=True, exist_ok=True)
            name = f"{time.time_ns()}-{os.getpid()}.jsonl"
            self._file = (self._folder / name).open("x", encoding="utf-8")
        self._file.write(json.dumps([_key(kind, arguments), answer]) + "\n")
        self._file.flush()


def _key(kind: str, arguments: Iterable[Any]) -> str:
    return sha256(json.dumps([kind, *arguments], sort_keys=True).encode()).hexdigest()
