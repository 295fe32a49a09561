"""What every verb shares: Hydra around its function, and words in the grammar that it reads."""

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
from tokengrow.distributed.launch import process_rank
from tokengrow.errors import PeerLostError, Stopped, UserError
from tokengrow.paths import data_root

PEER_LOST = 1
"""Exit status of a process whose job has lost another one."""

STOPPED = 75
"""Exit status after SIGTERM, of a run that has saved what it trained: EX_TEMPFAIL of sysexits.h,
for which launchers try again."""

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

PATHS = (
    *("source", "out", "store", "runs", "prompts", "data_dir"),
    *("data.files", "data.validation_files", "tokenizer.file"),
)
"""Keys whose values are paths, or a list of them."""

HOME = r"(?:^|(?<=[\[,]))\s*~(?=/)"
"""At the beginning of such a path: no shell replaces it behind a key."""

QUOTES = "'\""

QUOTED = r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*\""""

UNQUOTED = r"[^\s\[\],](?:[^\[\],]*[^\s\[\],])?"

VALUE = re.compile(f"{QUOTED}|{UNQUOTED}")
"""A value, or one of a list."""

STAGE_KEYS = r"((model|optim|plateau)(\.\w+)+|steps|tokens|flops|plateau)"
"""What of a stage the command line may give though its recipe does not."""


def run_command(name: str, function: Callable[[DictConfig], Any]) -> None:
    """Composes `conf/{name}.yaml` with the command line and calls the verb's function.

    A wrong input is one sentence on stderr and exit status 2; any other exception keeps its
    traceback.

    Args:
        name: of the verb and of its primary config.
        function: takes the composed config.
    """

    as_typed = sys.argv[1:]

    @hydra.main(version_base="1.3", config_path=str(data_root() / "conf"), config_name=name)
    @wraps(function)
    def job(config: DictConfig) -> Any:
        sys.argv[1:] = as_typed  # what launches further processes repeats the command line
        try:
            return function(config)
        # Here, and not around the job: Hydra would print a line of its own on their way out.
        except Stopped as stopped:
            # Others of the job leave as well, and a launcher may ask once more: too late.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            if process_rank() == 0:
                print(f"tokengrow {name}: {stopped}", file=sys.stderr)
            sys.exit(STOPPED)
        except PeerLostError as lost:
            refuse(name, str(lost), PEER_LOST)
        except Exception as error:
            if (sentence := error_message(name, error)) is None:
                raise
            refuse(name, sentence)

    # Hydra prints exceptions of its own accord and exits with 1, unless told not to.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    if (sentence := unknown_option(name, as_typed)) is not None:
        refuse(name, sentence)
    sys.argv[1:] = to_hydra_overrides(as_typed)
    try:
        with sweep_report():
            job()
    except (HydraException, OmegaConfBaseException) as error:
        sys.argv[1:] = as_typed  # what the sentence speaks of
        refuse(name, error_message(name, error))
    except KeyboardInterrupt as interrupt:
        told = "; ".join(["interrupted", *interrupt.args])
        print(f"\ntokengrow {name}: {told}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def new_folder(out: str) -> Path:
    """The folder of a verb's `out`, in which there is nothing yet.

    Raises:
        UserError: it holds something besides what a save that was killed leaves.
    """
    folder = Path(out)
    if folder.exists() and any(not is_stale_partial(path) for path in folder.iterdir()):
        raise UserError(f"out={out} exists already: choose another out=; nothing is overwritten")
    return folder


def new_file(out: str) -> Path:
    """The file of a verb's `out`, which is not there yet.

    Raises:
        UserError: it is.
    """
    if Path(out).exists():
        raise UserError(f"out={out} exists already: choose another out=; nothing is overwritten")
    return Path(out)


def to_hydra_overrides(words: Sequence[str]) -> list[str]:
    """The arguments of the command line in Hydra's grammar.

    `--json` is the key json of `tokengrow plan`. Hydra takes its overrides from one place alone,
    so there it goes, wherever it was typed.
    """
    read = [each for word in words if word != "--json" for each in to_hydra_override(word)]
    if "--json" in words:
        overrides = (i for i, word in enumerate(read) if "=" in word and not word.startswith("-"))
        read.insert(next(overrides, len(read)), "json=true")
    return read


def to_hydra_override(word: str) -> list[str]:
    """An argument of the command line in Hydra's grammar, for keys that are not plain values.

    A prompt is text, whatever it holds: it is quoted, and so are stop strings, and a path with an
    equals sign or an umlaut; ~ in front of one is the user's folder. A stage has keys that the
    recipe need not list, so they are added where they are not there; a change of nothing goes
    before them, which Hydra refuses where the stage itself is not there.
    """
    key, equals, value = word.partition("=")
    if equals and key == "prompt":
        return [f"prompt={_as_text(value)}"]
    if equals and key == "stop":
        return [f"stop={VALUE.sub(_stop_as_text, value)}"]
    if key in PATHS:
        value = re.sub(HOME, lambda _: str(Path.home()), value)
        return [f"{key}{equals}{VALUE.sub(_path_as_text, value)}"]
    if stage := re.fullmatch(rf"(stages\.[^.]+)\.{STAGE_KEYS}", key):
        return [f"{stage[1]}={{}}", f"++{word}"]
    return [word]


def _as_text(value: str) -> str:
    # Hydra: a quote is escaped by a backslash, and backslashes before a quote are doubled.
    value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
    return f"'{value}'".replace("${", "\\${")


def _stop_as_text(found: re.Match[str]) -> str:
    return found[0] if found[0][0] in QUOTES else _as_text(found[0])


def _path_as_text(found: re.Match[str]) -> str:
    # Folders of a sweep are named optim.lr=0.001. Both Hydra reads inside of quotes alone.
    special = "=" in found[0] or not found[0].isascii()
    return f"'{found[0]}'" if special and found[0][0] not in QUOTES else found[0]
