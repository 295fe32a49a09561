"""Which sessions a run had: when, on what, and with which versions. In sessions.json of its folder.

A session is one start of the command that has something to train.
"""

import json
import platform
import subprocess
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
from tokengrow.distributed.fabric import device_name
from tokengrow.files import write_atomically
from tokengrow.paths import data_root
from tokengrow.training.config import TrainConfig
from tokengrow.training.preemption import Stopped


@dataclass(frozen=True, kw_only=True)
class Session:
    """What is known of a session, with no name of a machine or of a person."""

    started: str
    """UTC, ISO 8601."""
    ended: str | None = None
    """Likewise; null: it is running, or was killed."""
    outcome: str | None = None
    """finished, stopped (SIGTERM), interrupted (Ctrl-C) or failed; null likewise."""
    first_step: int
    """Updates that were done before it."""
    device: str
    """Of rank 0."""
    processes: int
    """One a device, on all nodes."""
    strategy: str
    """How the model is spread: auto, ddp or fsdp2."""
    precision: str
    """32-true, bf16-mixed or bf16-true."""
    kernel: str
    """How Pattention is computed."""
    compiled: bool
    """Whether the blocks are."""
    tokengrow: str
    """Versions: of this package."""
    commit: str | None
    """Of its repository, if it is a checkout."""
    dirty: bool | None
    """Whether files of that differ from it, others than new ones; null: no checkout."""
    python: str
    torch: str
    cuda: str | None
    """That torch was built with."""
    triton: str | None
    lightning: str | None


def session_here(config: TrainConfig, fabric: Fabric, step: int) -> Session:
    """The session that begins now.

    Args:
        config: of its run.
        fabric: its devices.
        step: updates that are done.
    """
    commit, dirty = commit_of(data_root())
    return Session(
        started=_now(),
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
        triton=_version("triton"),
        lightning=_version("lightning"),
    )


@contextmanager
def recorded(run: Path, session: Session) -> Iterator[None]:
    """Keeps a session in the run's folder: at once, and with its end when the block is left."""
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
        with suppress(OSError):  # a full disk has a sentence of its own
            write(replace(session, ended=_now(), outcome=outcome))


def commit_of(root: Path) -> tuple[str | None, bool | None]:
    """The commit of a checkout, and whether one of its files was changed since; None where there is
    none.

    Args:
        root: the repository's own folder. A folder inside of somebody else's is no checkout.
    """
    if not (root / ".git").exists():
        return None, None

    def git(*words: str) -> str:
        command = ["git", "-C", str(root), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.SubprocessError):  # no git, or it does not trust the folder
        return None, None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
