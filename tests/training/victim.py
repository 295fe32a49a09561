"""The command in a process that reports its activity, so that a test can stop it there.

The process is forked off one that has imported everything, which takes longer than a small run.
"""

import os
import signal
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from tokengrow.checkpoint import store
from tokengrow.checkpoint.schema import TrainState
from tokengrow.cli.main import main
from tokengrow.growth import checkpoint as boundary
from tokengrow.optim.adamw import AgedAdamW
from tokengrow.training.module import TokenFormerModule

FORKS = get_context("forkserver")
FORKS.set_forkserver_preload(
    ["tokengrow.cli.runner", "tokengrow.training.recipe", "tokengrow.training.trainer"]
)


def killed(process: int) -> None:
    os.kill(process, signal.SIGKILL)


class Watched:
    """Current activity of the process, and the usual duration of each activity."""

    def __init__(self) -> None:
        self._open: list[str] = []
        self._since = 0.0
        self._lengths: dict[str, list[float]] = defaultdict(lambda: [0.01])  # a first guess

    @property
    def now(self) -> str:
        """The innermost of what has begun and not ended: step (forward, backward and update), save,
        growth, between (two stages, around these), other."""
        return self._open[-1] if self._open else "other"

    def usually(self, doing: str) -> float:
        """Seconds for which it is innermost."""
        return median(self._lengths[doing])

    def run(
        self, arguments: list[str], log: Path, aim: str = "", times: int = 0, delay: float = 0.0,
        then: Callable[[int], object] = killed,
    ) -> int:  # fmt: skip
        """Runs the command, and does something to it.

        Args:
            arguments: of the command.
            log: file for what it prints.
            aim: what it is doing then.
            times: how often that has begun then; 0: never.
            delay: seconds after that.
            then: what is done, given its process id.

        Returns:
            Its exit status; of a signal that ended it, the number with a minus.
        """
        self._open, begun = [], 0
        hearing, telling = FORKS.Pipe(duplex=False)
        process = FORKS.Process(target=live, args=(arguments, log, telling))
        process.start()
        telling.close()
        with hearing:
            for sign, doing, clock in _heard(hearing):
                was_open = aim in self._open
                self._hear(sign, doing, clock)
                if aim in self._open and not was_open:  # a save runs next to steps
                    begun += 1
                    if begun == times:
                        time.sleep(delay)
                        assert process.pid is not None
                        then(process.pid)
        process.join()
        assert process.exitcode is not None
        return process.exitcode

    def _hear(self, sign: str, doing: str, clock: float) -> None:
        self._lengths[self.now].append(clock - self._since)
        self._since = clock
        if doing in self._open:  # the second micro-batch of a step begins no other
            self._open.remove(doing)
        if sign == "+":
            self._open.append(doing)


def _heard(hearing: Connection) -> Iterator[tuple[str, str, float]]:
    while True:
        try:
            yield hearing.recv()
        except EOFError:
            return


def live(arguments: list[str], log: Path, telling: Connection) -> None:
    """Run the command in the forked process, and report its activities."""

    def tell(sign: str, doing: str) -> None:
        telling.send((sign, doing, time.monotonic()))

    def around(owner: Any, name: str, begins: str = "", ends: str = "") -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def told(*given: Any, **settings: Any) -> Any:
            if begins:
                tell("+", begins)
            result = function(*given, **settings)
            if ends:
                tell("-", ends)
            return result

        setattr(owner, name, told)

    atomic_directory = store.atomic_directory

    @contextmanager
    def saving(*given: Any) -> Iterator[Path]:
        tell("+", "save")
        with atomic_directory(*given) as partial:
            yield partial
        tell("-", "save")

    store.atomic_directory = saving
    around(boundary, "apply_growth", begins="growth", ends="growth")
    around(TokenFormerModule, "training_step", begins="step")
    around(AgedAdamW, "step", ends="step")
    around(TrainState, "leave", begins="between")
    around(TrainState, "enter", ends="between")
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(file, stream.fileno())
    sys.argv = ["tokengrow", *arguments]
    main()
