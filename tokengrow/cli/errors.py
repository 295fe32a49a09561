"""Error messages of the command line: one message with the key, the valid values and the remedy."""

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

from tokengrow.compat import (
    hydra_ambiguous_override,
    hydra_unknown_key,
    omegaconf_missing_key,
)
from tokengrow.distributed.launch import rank_from_env
from tokengrow.errors import UserError
from tokengrow.files import NO_SPACE_ERRNOS
from tokengrow.parsing import suggest
from tokengrow.paths import data_root

WRONG_INPUT = 2
"""Exit status for wrong input."""

SWEEP_PLUGINS = {
    "hydra/launcher": ("joblib", "submitit_local", "submitit_slurm"),
    "hydra/sweeper": ("optuna",),
}
"""Choices that the extra `sweep` installs."""

RENAMED_CHOICES = {
    ("model", "same"): "inherit",
    ("data", "same"): "inherit",
    ("optim", "same"): "inherit",
}
"""Earlier (group, choice) to the current name of the choice."""

OPTIONS = (
    *("--help", "--hydra-help", "--version", "--cfg", "--resolve", "--package", "--run"),
    *("--multirun", "--shell-completion", "--config-path", "--config-name", "--config-dir"),
    *("--experimental-rerun", "--info", "--json"),
)
"""Options of Hydra, and `--json`."""

KEY = r"[+~]{0,2}[\w./@-]+"


def refuse(verb: str, message: str | None, status: int = WRONG_INPUT) -> NoReturn:
    """Print an error message on stderr and exit."""
    rank = rank_from_env()
    where = f" (rank {rank})" if rank else ""
    print(f"tokengrow {verb}{where}: {message}", file=sys.stderr)
    sys.exit(status)


def error_message(verb: str, error: Exception) -> str | None:
    """Return the message for an exception that wrong input raises; None for any other exception.

    Args:
        verb: name of the verb.
        error: exception of the verb, or of Hydra.
    """
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _hydra_message(verb, error)
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return f"{error.filename}: {error.strerror}. Choose another path."
    if isinstance(error, OSError) and error.errno in NO_SPACE_ERRNOS:
        return f"{error.strerror}. Free disk space, or choose another path."
    return None


def unknown_option(verb: str, words: Sequence[str]) -> str | None:
    """Return the message for the first unknown option; None if all options are known.

    Args:
        verb: name of the verb.
        words: words of the command line.
    """
    for word in words:
        option, _, value = word.partition("=")
        if not re.fullmatch(r"--\w[\w.-]*", option):
            continue
        if any(known.startswith(option) for known in OPTIONS):
            continue
        key = option.removeprefix("--").replace("-", "_")
        if key in _valid_keys(verb):
            return f"Unknown option {option}. Did you mean {key}={value or '...'}?"
        return f"Unknown option {option}. {suggest(option, OPTIONS)}"
    return None


def _unreadable_word(verb: str, word: str) -> str:
    """Return the message for a word of the command line that Hydra cannot parse."""
    key, equals, value = word.partition("=")
    if not equals or not re.fullmatch(KEY, key):
        return f"Expected key=value, got {word!r}. {_intended_word(verb, word)}"
    if value.count("[") > value.count("]"):
        return f"{word}: the list has no closing bracket. Quote spaces, as in '{key}=[a, b]'."
    word = next((typed for typed in sys.argv[1:] if typed.startswith(f"{key}=")), word)
    text = '["..."]' if value.startswith("[") else '"..."'
    return f"Cannot parse {word}. Put text in double quotes inside single ones: '{key}={text}'."


def _intended_word(verb: str, word: str) -> str:
    """Return a suggestion for a word without a key."""
    keys, words = list(_valid_keys(verb)), sys.argv[1:]
    if Path(word).is_dir():
        for key, written in (("source", f"source={word}"), ("runs", f"runs=[{word}]")):
            if key in keys and not any(typed.startswith(f"{key}=") for typed in words):
                return f"Did you mean {written}?"
    before = words[: words.index(word)] if word in words else []
    if pairs := [index for index, typed in enumerate(before) if re.match(f"{KEY}=", typed)]:
        key, _, text = " ".join([*before[pairs[-1] :], word]).partition("=")
        return f"Quote text with spaces: {key}={shlex.quote(text)}."
    return "--help lists the keys."


def _hydra_message(verb: str, error: Exception) -> str:
    """Return the message for an exception of Hydra or OmegaConf, with the nearest valid key."""
    if isinstance(error, MissingConfigException):
        group, _, choice = (error.missing_cfg_file or "").rpartition("/")
        if renamed := RENAMED_CHOICES.get((group, choice)):
            return f"{group}={choice} was renamed: use {group}={renamed}."
        if error.options and choice in SWEEP_PLUGINS.get(group, ()):
            return f"{group}={choice} needs an extra: pip install 'tokengrow[sweep]'."
        if error.options:
            return f"Unknown choice {group}={choice}. {suggest(choice, error.options)}"
    if isinstance(error, OverrideParseException):
        return _unreadable_word(verb, error.override)
    if key := hydra_unknown_key(error):
        return f"Unknown key {key}. {suggest(key, list(_valid_keys(verb)))}"
    if ambiguous := hydra_ambiguous_override(error):
        key, value = ambiguous
        return (
            f"{key}={value}: commas separate the values of a sweep (--multirun). Write one value "
            f"as '{key}=\"{value}\"', a list as '{key}=[{value}]'."
        )
    if key := omegaconf_missing_key(error):
        return f"{key} is missing and has no default. Set {key}=VALUE."
    key = getattr(error, "full_key", None)
    first = str(error).strip().splitlines()[0]
    return f"{key}: {first}" if key and key not in first else first


def _valid_keys(verb: str) -> Iterator[str]:
    """Yield the dotted keys of a verb's config, with the groups chosen on the command line."""
    GlobalHydra.instance().clear()
    chosen = [word for word in sys.argv[1:] if re.fullmatch(r"(recipes|model|data)=[\w./-]+", word)]
    with initialize_config_dir(str(data_root() / "conf"), version_base="1.3"):
        for overrides in (chosen, []):
            try:
                config = compose(verb, overrides)
                break
            except HydraException:
                continue
        else:
            return
    yield from _dotted_keys(OmegaConf.to_container(config, resolve=False))
    if "stages" in config:
        yield "recipes"


def _dotted_keys(node: Any, where: str = "") -> Iterator[str]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            path = f"{where}.{key}" if where else str(key)
            yield path
            yield from _dotted_keys(value, path)
