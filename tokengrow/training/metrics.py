"""Where metrics go, and how fast training is."""

import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from lightning.fabric.loggers.csv_logs import CSVLogger
from lightning.fabric.loggers.logger import Logger
from lightning.fabric.loggers.tensorboard import TensorBoardLogger

from tokengrow.errors import UserError

LOGGERS = ("csv", "tensorboard")


@dataclass(frozen=True, kw_only=True)
class LoggerConfig:
    """Which loggers a run has."""

    kinds: list[str] = field(default_factory=lambda: ["csv"])
    """Any of csv (logs/version_N/metrics.csv) and tensorboard (tensorboard/version_N)."""

    def __post_init__(self) -> None:
        for kind in self.kinds:
            if kind not in LOGGERS:
                raise UserError(f"logger.kinds {kind!r}: valid are {', '.join(LOGGERS)}")


def build_loggers(config: LoggerConfig, out: Path) -> list[Logger]:
    """The loggers of one session; each session of a resumed run writes a version folder of its
    own."""
    loggers: list[Logger] = []
    if "csv" in config.kinds:
        loggers.append(CSVLogger(root_dir=out, name="logs", flush_logs_every_n_steps=1))
    if "tensorboard" in config.kinds:
        if find_spec("tensorboard") is None:
            raise UserError(
                "logger.kinds names tensorboard, which is not installed: pip install tensorboard, "
                "or set logger=csv"
            )
        loggers.append(TensorBoardLogger(root_dir=out, name="tensorboard"))
    return loggers


class Throughput:
    """Tokens per second since it was last asked."""

    def __init__(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Counts tokens trained on."""
        self._tokens += tokens

    def restart(self) -> None:
        """Leaves out what was spent on something other than training."""
        self._tokens, self._since = 0, time.perf_counter()

    def read(self) -> float:
        """Tokens per second; starts a new interval."""
        rate = self._tokens / max(time.perf_counter() - self._since, 1e-9)
        self.restart()
        return rate
