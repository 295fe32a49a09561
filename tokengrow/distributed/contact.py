"""When a process of a job is gone: the others say so in one sentence, and end."""

import atexit
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from subprocess import Popen

import torch.distributed as dist

FOUND_DEAD = 10.0
"""Seconds in which one learns how a process that one has started has ended."""


class LostContact(Exception):
    """Another process of the job is gone: one sentence that says what is known of it."""


@contextmanager
def in_contact(children: list[Popen]) -> Iterator[None]:
    """The block in which the processes of a job talk to each other.

    Args:
        children: those that this process has started, ranks 1 and up; nobody watches over them
            after the block.

    Raises:
        LostContact: a process is gone.
    """
    atexit.register(_hang_up)
    try:
        yield
    except RuntimeError as error:
        if not _is_of_the_line(error):
            raise
        atexit.unregister(_hang_up)  # nobody would answer
        raise LostContact(
            f"lost contact with another process: {_how_it_ended(children)}; checkpoints are "
            "whole, and the same command goes on from the last one"
        ) from error
    finally:
        # At one that ends with an error Lightning would kill this process, which may be about to
        # end by itself, with a status that tells more.
        children.clear()


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
