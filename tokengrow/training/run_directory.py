"""Directory of a run: exclusive access, its recorded config, and cleanup after a kill."""

import shutil
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tokengrow.checkpoint.store import Checkpoint, is_stale_partial, quarantine_damaged
from tokengrow.errors import UserError
from tokengrow.files import as_yaml, directory_lock, is_stale_temporary, write_atomically
from tokengrow.training.config import TrainConfig
from tokengrow.training.resume import CONFIG_FILE, RECORDS


def claim_run_directory(
    config: TrainConfig, newest: Checkpoint | None, stack: ExitStack, console: Console
) -> None:
    """Create and lock the directory of a run, and clean up what a killed process left in it.

    Args:
        config: the run.
        newest: checkpoint that the run resumes from; None: it starts from the beginning.
        stack: keeps the lock until it is closed.
        console: receives a line for each damaged checkpoint.

    Raises:
        UserError: another process trains the run, or the directory cannot be written.
    """
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        stack.enter_context(directory_lock(out, wait=False))
        for path in quarantine_damaged(out, newest):
            line = f"damaged checkpoint renamed: {path}"
            console.print(line, highlight=False, soft_wrap=True)
        write_atomically(out / CONFIG_FILE, as_yaml(config.to_dict()))
        for path in list(out.iterdir()):
            if is_stale_partial(path):
                shutil.rmtree(path)
            elif is_stale_temporary(path, RECORDS):
                path.unlink()
    except BlockingIOError:
        raise UserError(
            f"out={out} is in use: another process trains this run. Wait for it, or choose another "
            "out=."
        ) from None
    except OSError as error:
        raise UserError(
            f"out={out} is not writable ({error.strerror}). Choose another out=."
        ) from None
