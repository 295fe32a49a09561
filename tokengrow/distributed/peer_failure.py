"""When a process of a job is gone: the others say so in one sentence, and end."""

import atexit
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen, TimeoutExpired

import torch.distributed as dist

from tokengrow.errors import PeerLostError

FOUND_DEAD = 10.0
"""Seconds in which one learns how a process that one has started has ended."""


@contextmanager
def monitor_peers(children: list[Popen]) -> Iterator[None]:
    """The block in which the processes of a job talk to each other.

    Args:
        children: those that this process has started, ranks 1 and up; nobody watches over them
            after the block.

    Raises:
        PeerLostError: a process is gone.
    """
    atexit.register(_hang_up)
    try:
        with _lines_watched(children):
            yield
    except BaseException:
        _see_off(children)
        raise
    finally:
        # At one that ends with an error Lightning would kill this process, which may be about to
        # end by itself, with a status that tells more.
        children.clear()


@contextmanager
def _lines_watched(children: list[Popen]) -> Iterator[None]:
    """Turns an error of a line to another process into `PeerLostError`."""
    try:
        yield
    except RuntimeError as error:
        if not _is_of_the_line(error):
            raise
        atexit.unregister(_hang_up)  # nobody would answer
        raise PeerLostError(
            f"lost contact with another process: {_how_it_ended(children)}; checkpoints are "
            "whole, and the same command resumes from the last one"
        ) from error


def _see_off(children: list[Popen]) -> None:
    """Waits for processes that an error has ended too, and ends those that it has not: on a GPU
    they may wait for this one for half an hour."""
    until = time.monotonic() + FOUND_DEAD
    for child in children:
        try:
            child.wait(max(until - time.monotonic(), 0.1))
        except TimeoutExpired:
            child.kill()


def _hang_up() -> None:
    """Ends the threads that talk to the others, before Python is taken from under them."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _is_of_the_line(error: RuntimeError) -> bool:
    """Whether an error says that another process does not answer any more."""
    gone = isinstance(error, dist.DistNetworkError | dist.DistStoreError)
    return gone or any(sign in str(error) for sign in ("/gloo/", "remote process exited"))


def _how_it_ended(children: list[Popen]) -> str:
    """How the first of the processes that this one has started has ended, as far as known."""
    until = time.monotonic() + FOUND_DEAD
    while children and time.monotonic() < until:
        for rank, child in enumerate(children, start=1):
            if status := child.poll():
                how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
                return f"rank {rank} has ended with {how}"
        time.sleep(0.1)
    return "its own output, or its launcher's, says why it ended"
