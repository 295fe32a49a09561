"""Exceptions that end a command with one sentence instead of a traceback."""


class UserError(ValueError):
    """Wrong input: one sentence with the key, the value and the remedy.

    The command line prints it and exits with status 2. A broken internal invariant is an `assert`.
    """


class Stopped(Exception):
    """A run stopped on SIGTERM after it saved its state; one sentence with its position."""


class PeerLostError(Exception):
    """Another process of the job is gone; one sentence with what is known about it."""
