"""How much wall time lies behind a model: what a checkpoint's times.json holds.

It counts from where a session begins to train, with growths, validations and compiling; data is
made before. Each session goes on from the time of the checkpoint that it begins with, so what a
killed one trained after its last checkpoint does not count, as none of it is left.
"""

import time
from collections.abc import Mapping
from typing import Any


class Clock:
    """The wall time of a run, over its sessions.

    Args:
        seconds: of the sessions before; None: one of them did not record it.
        before: behind the checkpoint that the run started from; None: not recorded.
        validations: when each validation so far was done, s; None: not recorded.
    """

    def __init__(
        self,
        seconds: float | None = 0.0,
        before: float | None = 0.0,
        validations: list[float | None] | None = None,
    ) -> None:
        self._earlier, self._before = seconds, before
        self._validations = list(validations or [])
        self._began = time.monotonic()

    @classmethod
    def starting_from(cls, source: Mapping[str, Any]) -> "Clock":
        """Of a run that starts from a checkpoint with these times; {}: they are not recorded."""
        seconds, before = source.get("seconds"), source.get("before")
        if seconds is None or before is None:
            return cls(before=None)
        return cls(before=seconds + before)

    @classmethod
    def resumed(cls, times: Mapping[str, Any], validations: int) -> "Clock":
        """Of a run that goes on from a checkpoint of its own.

        Args:
            times: of that checkpoint; {}: they are not recorded.
            validations: how many it has had.
        """
        unknown: list[float | None] = [None] * validations
        noted = times.get("validation", unknown)
        return cls(times.get("seconds"), times.get("before"), noted)

    @property
    def seconds(self) -> float | None:
        """Of all sessions up to now."""
        if self._earlier is None:
            return None
        return self._earlier + time.monotonic() - self._began

    def note_validation(self) -> None:
        """A validation is done."""
        self._validations.append(self.seconds)

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it."""
        return {
            "seconds": self.seconds,
            "before": self._before,
            "validation": list(self._validations),
        }
