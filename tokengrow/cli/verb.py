"""What every verb shares: Hydra around its function, and wrong inputs as one sentence."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokengrow.checkpoint.store import left_by_a_kill
from tokengrow.distributed.launch import process_rank
from tokengrow.errors import UserError
from tokengrow.files import NO_ROOM
from tokengrow.paths import data_root
from tokengrow.training.stop import Stopped
from tokengrow.typed import nearest

WRONG_INPUT = 2
"""Exit status for a wrong input."""

STOPPED = 75
"""Exit status after SIGTERM, of a run that has saved what it trained: EX_TEMPFAIL of sysexits.h,
for which launchers try again."""

INTERRUPTED = 130
"""Exit status after Ctrl-C."""

STAGE_KEYS = r"((model|optim|plateau)(\.\w+)+|steps|tokens|flops|plateau)"
"""What of a stage the command line may give though its recipe does not."""


def run_verb(name: str, function: Callable[[DictConfig], Any]) -> None:
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
        except UserError as error:
            _refuse(name, str(error))
        except Stopped as stopped:
            if process_rank() == 0:
                print(f"tokengrow {name}: {stopped}", file=sys.stderr)
            sys.exit(STOPPED)
        except OmegaConfBaseException as error:
            _refuse(name, _explain(name, error))
        except (PermissionError, NotADirectoryError, FileExistsError) as error:
            _refuse(name, f"{error.filename}: {error.strerror}: choose another place")
        except OSError as error:
            if error.errno not in NO_ROOM:
                raise
            _refuse(name, f"{error.strerror}: make room on the disk, or choose another place")

    # Hydra prints exceptions of its own accord and exits with 1, unless told not to.
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")
    sys.argv[1:] = as_hydra_reads_them(as_typed)
    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        _refuse(name, _explain(name, error))
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
    if folder.exists() and any(not left_by_a_kill(path) for path in folder.iterdir()):
        raise UserError(f"out={out} exists already: choose another out=; nothing is overwritten")
    return folder


def as_hydra_reads_them(words: Sequence[str]) -> list[str]:
    """The arguments of the command line in Hydra's grammar.

    `--json` is the key json of `tokengrow plan`. Hydra takes its overrides from one place alone,
    so there it goes, wherever it was typed.
    """
    read = [each for word in words if word != "--json" for each in as_hydra_reads_it(word)]
    if "--json" in words:
        overrides = (i for i, word in enumerate(read) if "=" in word and not word.startswith("-"))
        read.insert(next(overrides, len(read)), "json=true")
    return read


def as_hydra_reads_it(word: str) -> list[str]:
    """An argument of the command line in Hydra's grammar, for two keys that are not plain values.

    A prompt is text, whatever it holds: it is quoted. A stage has keys that the recipe need not
    list, so they are added where they are not there; a change of nothing goes before them, which
    Hydra refuses where the stage itself is not there.
    """
    key, equals, value = word.partition("=")
    if equals and key == "prompt":
        # Hydra: a quote is escaped by a backslash, and backslashes before a quote are doubled.
        value = re.sub(r"(\\*)('|$)", lambda m: m[1] * 2 + ("\\'" if m[2] else ""), value)
        return [f"prompt='{value}'".replace("${", "\\${")]
    if stage := re.fullmatch(rf"(stages\.[^.]+)\.{STAGE_KEYS}", key):
        return [f"{stage[1]}={{}}", f"++{word}"]
    return [word]


def _refuse(name: str, message: str) -> NoReturn:
    rank = process_rank()
    where = f" (rank {rank})" if rank else ""
    print(f"tokengrow {name}{where}: {message}", file=sys.stderr)
    sys.exit(WRONG_INPUT)


def _explain(name: str, error: Exception) -> str:
    """One sentence for an exception of Hydra or OmegaConf, with the nearest valid key or choice."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        return f"{group}={choice}: there is no such choice{nearest(choice, error.options)}"
    text = str(error)
    if match := re.search(r"Could not override '([^'@]+)", text):
        key = match.group(1)
        return f"unknown key {key}{nearest(key, list(_valid_keys(name)))}"
    if match := re.search(r"Ambiguous value for argument '([^=']+)=(.*)'", text):
        key, value = match.groups()
        return (
            f"{key}={value}: commas stand for several values, which --multirun tries one after "
            f"the other; as one value it is '{key}=\"{value}\"', a list '{key}=[{value}]'"
        )
    key = getattr(error, "full_key", None)
    if key and "Missing mandatory value" in text:
        return f"{key} is missing: it has no default, so give it a value ({key}=...)"
    first = text.strip().splitlines()[0]
    return f"{key}: {first}" if key and key not in first else first


def _valid_keys(name: str) -> Iterator[str]:
    """The dotted keys of a verb's config, with the groups that the command line chose."""
    GlobalHydra.instance().clear()
    chosen = [word for word in sys.argv[1:] if re.fullmatch(r"(recipes|model|data)=[\w./-]+", word)]
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        for overrides in (chosen, []):
            try:
                config = compose(name, overrides)
                break
            except HydraException:
                continue
        else:
            return
    yield from _dotted(OmegaConf.to_container(config, resolve=False))
    if "stages" in config:
        yield "recipes"


def _dotted(node: Any, where: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{where}.{key}" if where else str(key)
            yield path
            yield from _dotted(value, path)
