"""SIGTERM: a run that is asked to stop finishes its update, saves, and ends."""

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Stopped(Exception):
    """A run that was asked to stop has: one sentence that says where, and what is saved."""


class StopRequest:
    """Whether SIGTERM has come while the block runs.

    The first one is only noted; whoever trains asks at moments when stopping loses nothing. A
    second one does what it would have done without us. Outside the main thread, where Python sets
    no handlers, nothing is noted.
    """

    def __init__(self) -> None:
        self._asked = False
        self._before: Any = None

    def requested(self) -> bool:
        """Whether the process was asked to stop."""
        return self._asked

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, self._before)
