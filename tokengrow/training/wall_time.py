"""Wall-clock time of a run and its training sessions: `times.json` and `sessions.json`.

The clock starts when a session begins to train; it includes growths, validations and compilation,
not the preparation of data. Each session continues from the time of the checkpoint that it loads,
so updates that a killed session lost are not counted.
"""

import json
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from lightning.fabric import Fabric

from tokengrow import __version__
from tokengrow.checkpoint.layout import SESSIONS
from tokengrow.checkpoint.schema import WallTimes
from tokengrow.distributed.fabric import device_name
from tokengrow.errors import Stopped
from tokengrow.files import write_atomically
from tokengrow.paths import data_root
from tokengrow.training.config import TrainConfig


class WallTime:
    """Wall-clock time of a run, summed over its sessions.

    Args:
        seconds: time of earlier sessions, s; None: unknown.
        before: time spent on the checkpoint that the run started from, s; None: unknown.
        validations: time at the end of each earlier validation, s; None: unknown.
    """

    def __init__(
        self,
        seconds: float | None = 0.0,
        before: float | None = 0.0,
        validations: list[float | None] | None = None,
    ) -> None:
        self._earlier, self._before = seconds, before
        self._validations = list(validations or [])
        self._began = time.monotonic()

    @classmethod
    def starting_from(cls, source: WallTimes | None) -> "WallTime":
        """Start the clock of a run that begins from a checkpoint.

        Args:
            source: wall time of that checkpoint; None: not recorded.
        """
        if source is None or source.seconds is None or source.before is None:
            return cls(before=None)
        return cls(before=source.seconds + source.before)

    @classmethod
    def resumed(cls, times: WallTimes | None, validations: int) -> "WallTime":
        """Continue the clock of a run that resumes from one of its own checkpoints.

        Args:
            times: wall time of that checkpoint; None: not recorded.
            validations: number of validations done so far.
        """
        unknown: list[float | None] = [None] * validations
        if times is None:
            return cls(None, None, unknown)
        recorded = unknown if times.validation is None else list(times.validation)
        return cls(times.seconds, times.before, recorded)

    @property
    def seconds(self) -> float | None:
        """Time of all sessions so far, s; None: unknown."""
        if self._earlier is None:
            return None
        return self._earlier + time.monotonic() - self._began

    def note_validation(self) -> None:
        """Record that a validation ended now."""
        self._validations.append(self.seconds)

    def times(self) -> WallTimes:
        """Return the record for a checkpoint."""
        return WallTimes(self.seconds, self._before, tuple(self._validations))


@dataclass(frozen=True, kw_only=True)
class Session:
    """One start of the training command, without names of machines or people."""

    started: str
    """Start time, UTC, ISO 8601."""
    ended: str | None = None
    """End time, UTC, ISO 8601; null: the session is running, or was killed."""
    outcome: str | None = None
    """finished, stopped (SIGTERM), interrupted (Ctrl-C) or failed; null: no end recorded."""
    first_step: int
    """Optimizer updates done before the session."""
    device: str
    """Device of rank 0."""
    processes: int
    """Number of processes on all nodes, one per device."""
    strategy: str
    """Distribution strategy: auto, ddp or fsdp2."""
    precision: str
    """32-true, bf16-mixed or bf16-true."""
    kernel: str
    """Pattention kernel."""
    compiled: bool
    """Whether torch.compile was applied to the blocks."""
    tokengrow: str
    """Version of this package."""
    commit: str | None
    """Git commit of the checkout; null: not a checkout."""
    dirty: bool | None
    """Whether tracked files differ from that commit; null: not a checkout."""
    python: str
    """Version of Python."""
    torch: str
    """Version of torch."""
    cuda: str | None
    """CUDA version of the torch build."""
    triton: str | None
    """Version of Triton; null: not installed."""
    lightning: str | None
    """Version of Lightning; null: not installed."""


def new_session(config: TrainConfig, fabric: Fabric, step: int) -> Session:
    """Return the record of the session that begins now.

    Args:
        config: the run.
        fabric: its devices.
        step: optimizer updates done so far.
    """
    commit, dirty = git_commit(data_root())
    return Session(
        started=_utc_now(),
        first_step=step,
        device=device_name(fabric.device),
        processes=fabric.world_size,
        strategy=config.fabric.strategy,
        precision=config.fabric.chosen_precision,
        kernel=config.kernel,
        compiled=config.compiles,
        tokengrow=__version__,
        commit=commit,
        dirty=dirty,
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        triton=_installed_version("triton"),
        lightning=_installed_version("lightning"),
    )


@contextmanager
def record_session(run: Path, session: Session) -> Iterator[None]:
    """Append a session to `sessions.json`, and add its end when the block exits.

    Args:
        run: directory of the run.
        session: the session that runs in the block.
    """
    path = run / SESSIONS
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def write(last: Session) -> None:
        content = json.dumps([*earlier, asdict(last)], indent=1)
        write_atomically(path, content.encode())

    write(session)
    outcome = "failed"
    try:
        yield
        outcome = "finished"
    except Stopped:
        outcome = "stopped"
        raise
    except KeyboardInterrupt:
        outcome = "interrupted"
        raise
    finally:
        with suppress(OSError):  # a full disk is reported by the checkpoint writer
            write(replace(session, ended=_utc_now(), outcome=outcome))


def git_commit(root: Path) -> tuple[str | None, bool | None]:
    """Return the commit of a checkout and whether its tracked files changed since.

    Args:
        root: top-level directory of the repository. A directory inside another repository does
            not count as a checkout.

    Returns:
        (None, None) if `root` is not a checkout, or git cannot be run.
    """
    if not (root / ".git").exists():
        return None, None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # git is missing, or rejects the directory
        return None, None


def _utc_now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
