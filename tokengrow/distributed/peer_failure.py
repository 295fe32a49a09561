"""Detect a lost peer process and exit with a one-line error."""

import atexit
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen, TimeoutExpired

import torch.distributed as dist

from tokengrow.compat import is_peer_connection_error
from tokengrow.errors import PeerLostError

EXIT_TIMEOUT = 10.0
"""Seconds to wait for child processes to exit after an error."""


@contextmanager
def monitor_peers(children: list[Popen[bytes]]) -> Iterator[None]:
    """Raise `PeerLostError` if the processes in this context lose their connection.

    Args:
        children: processes that this one has started, ranks 1 and up. The list is emptied at the
            end, which stops Fabric from monitoring them.

    Raises:
        PeerLostError: another process is gone.
    """
    atexit.register(_destroy_process_group)
    try:
        yield
    except BaseException as error:
        lost = isinstance(error, RuntimeError) and is_peer_connection_error(error)
        if lost:
            atexit.unregister(_destroy_process_group)  # it would wait for the lost process
            cause = _describe_exit(children)
        _stop_children(children)
        if not lost:
            raise
        raise PeerLostError(
            f"Lost contact with another process: {cause}. Checkpoints are complete, and the same "
            "command resumes from the last one."
        ) from error
    finally:
        # Lightning kills this process once a child in the list ends with an error. This process
        # may be about to exit by itself, with a more specific status.
        children.clear()


def _stop_children(children: list[Popen[bytes]]) -> None:
    """Wait for child processes to exit, and kill those that do not.

    On a GPU they may wait in a collective for half an hour.
    """
    deadline = time.monotonic() + EXIT_TIMEOUT
    for child in children:
        try:
            child.wait(max(deadline - time.monotonic(), 0.1))
        except TimeoutExpired:
            child.kill()


def _destroy_process_group() -> None:
    """End the communication threads before the interpreter shuts down."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _describe_exit(children: list[Popen[bytes]]) -> str:
    """Return how the first child process failed, or where to find out."""
    deadline = time.monotonic() + EXIT_TIMEOUT
    while children and time.monotonic() < deadline:
        for rank, child in enumerate(children, start=1):
            if status := child.poll():
                if status < 0:
                    return f"rank {rank} exited with signal {signal.Signals(-status).name}"
                return f"rank {rank} exited with status {status}"
        time.sleep(0.1)
    return "its output, or that of its launcher, has the reason"
