"""The one exception that a wrong input raises."""


class UserError(ValueError):
    """A wrong input: one sentence that names the key, the place and the way out.

    The command line prints it without a traceback and exits with status 2. Code that hits a broken
    invariant of its own uses ``assert`` instead.
    """
