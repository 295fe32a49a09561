"""A wrong input as one sentence that names the key, the valid values and the way out."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tokengrow.distributed.launch import process_rank
from tokengrow.errors import UserError
from tokengrow.files import NO_SPACE_ERRNOS
from tokengrow.parsing import suggest
from tokengrow.paths import data_root

WRONG_INPUT = 2
"""Exit status for a wrong input."""

SWEEP_PLUGINS = {
    "hydra/launcher": ("joblib", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("optuna",),
}
"""Choices that come with the extra `sweep`."""

OPTIONS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run"),
    *("--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir"),
    *("--experimental-rerun", "--info", "--json"),
)
"""Hydra's, and our own."""

KEY = r"[+~]{0,2}[\w./@-]+"


def refuse(name: str, message: str | None, status: int = WRONG_INPUT) -> NoReturn:
    """Prints a verb's one sentence and leaves, by default with the status of a wrong input."""
    rank = process_rank()
    where = f" (rank {rank})" if rank else ""
    print(f"tokengrow {name}{where}: {message}", file=sys.stderr)
    sys.exit(status)


def error_message(name: str, error: Exception) -> str | None:
    """One sentence for an exception that a wrong input raises; None for any other.

    Args:
        name: of the verb.
        error: that it raised, or Hydra around it.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _of_hydra(name, error)
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return f"{error.filename}: {error.strerror}: choose another place"
    if isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS:
        return f"{error.strerror}: make room on the disk, or choose another place"
    return None


def unknown_option(name: str, words: Sequence[str]) -> str | None:
    """One sentence for the first option that no verb knows; None: there is none.

    Args:
        name: of the verb.
        words: of the command line.
    """
    for word in words:
        option, _, value = word.partition("=")
        if not re.fullmatch(r"--\w[\w.-]*", option):
            continue
        if any(known.startswith(option) for known in OPTIONS):
            continue
        key = option.removeprefix("--").replace("-", "_")
        if key in _valid_keys(name):
            return f"unknown option {option}: did you mean {key}={value or '...'}?"
        return f"unknown option {option}{suggest(option, OPTIONS)}"
    return None


def _unreadable(name: str, word: str) -> str:
    """One sentence for a word of the command line that is none of Hydra's grammar."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(KEY, key):
        return f"{word} is no key=value: {_meant(name, word)}"
    if value.count("[") > value.count("]"):
        return f"{word}: the list has no end: spaces want quotes, as in '{key}=[a, b]'"
    word = next((typed for typed in sys.argv[1:] if typed.startswith(f"{key}=")), word)
    text = '["..."]' if value.startswith("[") else '"..."'
    return f"{word} cannot be read: put text into double quotes inside single ones, '{key}={text}'"


def _meant(name: str, word: str) -> str:
    """What a word without a key was to be."""
    keys, words = list(_valid_keys(name)), sys.argv[1:]
    if Path(word).is_dir():
        for key, written in (("source", f"source={word}"), ("runs", f"runs=[{word}]")):
            if key in keys and not any(each.startswith(f"{key}=") for each in words):
                return f"did you mean {written}?"
    before = words[: words.index(word)] if word in words else []
    if begun := [n for n, each in enumerate(before) if re.match(f"{KEY}=", each)]:
        key, _, text = " ".join([*before[begun[-1] :], word]).partition("=")
        return f"quote text with spaces, {key}={shlex.quote(text)}"
    return "--help lists the keys"


def _of_hydra(name: str, error: Exception) -> str:
    """One sentence for an exception of Hydra or OmegaConf, with the nearest valid key or choice."""
    if isinstance(error, MissingConfigException) and error.options:
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        if choice in SWEEP_PLUGINS.get(group, ()):
            return f"{group}={choice} is in an extra: pip install 'tokengrow[sweep]'"
        return f"{group}={choice}: there is no such choice{suggest(choice, error.options)}"
    if isinstance(error, OverrideParseException):
        return _unreadable(name, error.override)
    text = str(error)
    if match := re.search(r"Could not override '([^'@]+)", text):
        key = match.group(1)
        return f"unknown key {key}{suggest(key, list(_valid_keys(name)))}"
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
