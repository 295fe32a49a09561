"""Preemption: a run that receives SIGTERM finishes its update, saves a checkpoint and exits."""

import signal
import threading
from types import FrameType
from typing import Any

from tokengrow.distributed.collectives import StopFlag


class StopRequest:
    """Handler of SIGTERM, active as a context manager.

    The first signal is recorded, and the training loop polls it where it can stop without a loss.
    A second one has its previous effect. Outside the main thread, where Python cannot install
    handlers, no signal is recorded. Every rank must create it, after the process group.
    """

    def __init__(self) -> None:
        self._received = False
        self._flag = StopFlag()
        self._previous_handler: Any = None

    def requested(self) -> bool:
        """Return whether any process of the run received SIGTERM before the previous call.

        All ranks return the same value, and must call this equally often.
        """
        return self._flag.poll(self._received)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._previous_handler = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous_handler is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._received = True
        signal.signal(signal.SIGTERM, self._previous_handler)
