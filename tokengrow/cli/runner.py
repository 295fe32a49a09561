"""Runner of a verb: Hydra around its function, exit statuses, and quoting of the command line."""

import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from tokengrow.checkpoint.store import is_stale_partial
from tokengrow.cli.errors import error_message, refuse, unknown_option
from tokengrow.cli.sweep import sweep_report
from tokengrow.distributed.launch import rank_from_env
from tokengrow.errors import PeerLostError, Stopped, UserError
from tokengrow.paths import data_root

PEER_LOST = 1
"""Exit status after the loss of another process of the job."""

STOPPED = 75
"""Exit status of a run that saved its state after SIGTERM: EX_TEMPFAIL of sysexits.h, after which
launchers try again."""

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

PATHS = (
    *("source", "out", "store", "runs", "prompts", "data_dir"),
    *("data.files", "data.validation_files", "tokenizer.file"),
)
"""Keys whose value is a path or a list of paths."""

HOME = r"(?:^|(?<=[\[,]))\s*~(?=/)"
"""Pattern of ~ at the start of a path, which no shell expands after a key."""

QUOTES = "'\""

QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""

UNQUOTED = r"[^\s\[\],](?:[^\[\],]*[^\s\[\],])?"

VALUE = re.compile(f"{QUOTED}|{UNQUOTED}")
"""Pattern of a value, or of one value in a list."""

STAGE_KEYS = r"((model|optim|plateau)(\.\w+)+|steps|tokens|flops|plateau)"
"""Pattern of the keys of a stage that the command line may add to its recipe."""


def run_command(name: str, function: Callable[[DictConfig], Any]) -> None:
    """Compose `conf/{name}.yaml` with the command line and call the function of a verb.

    Wrong input prints one message on stderr and exits with status 2. Any other exception keeps its
    traceback.

    Args:
        name: name of the verb and of its primary config.
        function: function of the verb; takes the composed config.
    """
    as_typed = sys.argv[1:]

    @hydra.main(version_base="1.3", config_path=str(data_root() / "conf"), config_name=name)
    @wraps(function)
    def job(config: DictConfig) -> Any:
        sys.argv[1:] = as_typed  # launchers of further processes repeat the command line
        try:
            return function(config)
        # Caught here, because Hydra would print a line of its own outside the job.
        except Stopped as stopped:
            # The other processes exit too, and a launcher may send the signal again.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if rank_from_env() == 0:
                print(f"tokengrow {name}: {stopped}", file=sys.stderr)
            sys.exit(STOPPED)
        except PeerLostError as lost:
            refuse(name, str(lost), PEER_LOST)
        except Exception as error:
            if (message := error_message(name, error)) is None:
                raise
            refuse(name, message)

    # Otherwise Hydra prints exceptions itself and exits with status 1.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if (message := unknown_option(name, as_typed)) is not None:
        refuse(name, message)
    sys.argv[1:] = to_hydra_overrides(as_typed)
    try:
        with sweep_report():
            job()
    except (HydraException, OmegaConfBaseException) as error:
        sys.argv[1:] = as_typed  # the message quotes it
        refuse(name, error_message(name, error))
    except KeyboardInterrupt as interrupt:
        message = "; ".join(["interrupted", *interrupt.args])
        print(f"\ntokengrow {name}: {message}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def new_folder(out: str) -> Path:
    """Return the directory of a verb's `out`, which must not exist or must be empty.

    Raises:
        UserError: it holds something other than the incomplete checkpoint of a killed process.
    """
    folder = Path(out)
    if folder.exists() and any(not is_stale_partial(path) for path in folder.iterdir()):
        raise UserError(f"out={out} exists. Choose another out=; nothing is overwritten.")
    return folder


def new_file(out: str) -> Path:
    """Return the file of a verb's `out`, which must not exist.

    Raises:
        UserError: it exists.
    """
    if Path(out).exists():
        raise UserError(f"out={out} exists. Choose another out=; nothing is overwritten.")
    return Path(out)


def to_hydra_overrides(words: Sequence[str]) -> list[str]:
    """Translate the words of the command line into Hydra's grammar.

    `--json` becomes the key json of `tokengrow plan`, next to the other overrides, because Hydra
    reads overrides from one place only.
    """
    read = [each for word in words if word != "--json" for each in to_hydra_override(word)]
    if "--json" in words:
        overrides = (i for i, word in enumerate(read) if "=" in word and not word.startswith("-"))
        read.insert(next(overrides, len(read)), "json=true")
    return read


def to_hydra_override(word: str) -> list[str]:
    """Translate one word of the command line into Hydra's grammar.

    Prompts, stop strings, and paths with an equals sign or a non-ASCII letter are quoted, and ~ at
    the start of a path is expanded. Keys of a stage that the recipe does not list are added. An
    empty change of the stage precedes them, which Hydra rejects if there is no such stage.
    """
    key, equals, value = word.partition("=")
    if equals and key == "prompt":
        return [f"prompt={_quote_text(value)}"]
    if equals and key == "stop":
        return [f"stop={VALUE.sub(_quote_stop, value)}"]
    if key in PATHS:
        value = re.sub(HOME, lambda _: str(Path.home()), value)
        return [f"{key}{equals}{VALUE.sub(_quote_path, value)}"]
    if stage := re.fullmatch(rf"(stages\.[^.]+)\.{STAGE_KEYS}", key):
        return [f"{stage[1]}={{}}", f"++{word}"]
    return [word]


def _quote_text(value: str) -> str:
    # Hydra: a quote is escaped by a backslash, and backslashes before a quote are doubled.
    value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{value}'".replace("${", "\\${")


def _quote_stop(found: re.Match[str]) -> str:
    return found[0] if found[0][0] in QUOTES else _quote_text(found[0])


def _quote_path(found: re.Match[str]) -> str:
    # Directories of a sweep have names like optim.lr=0.001. Hydra reads both only inside quotes.
    special = "=" in found[0] or not found[0].isascii()
    return f"'{found[0]}'" if special and found[0][0] not in QUOTES else found[0]
