"""SIGTERM: a run that is asked to stop finishes its update, saves, and ends."""

import signal
import threading
from types import FrameType
from typing import Any

from tokengrow.distributed.collectives import StopFlag


class StopRequest:
    """Whether SIGTERM has come while the block runs.

    The first one is only noted; whoever trains asks at moments when stopping loses nothing. A
    second one does what it would have done without us. Outside the main thread, where Python sets
    no handlers, nothing is noted. Made on every rank, once they talk to each other.
    """

    def __init__(self) -> None:
        self._asked = False
        self._agreement = StopFlag()
        self._before: Any = None

    def requested(self) -> bool:
        """Whether a process of the run was asked to stop, the same on every rank, which all ask
        equally often; what came after the time before is answered the next time."""
        return self._agreement.any(self._asked)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGTERM, self._before)
