"""The `data` section of data=mixture into its typed config."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokengrow.cli.resolve import MIXTURE, Values, resolve_corpus
from tokengrow.data.mixture import MixedSource, MixtureConfig
from tokengrow.errors import UserError
from tokengrow.parsing import check_keys, parse_dataclass


@dataclass(frozen=True, kw_only=True)
class MixtureEntries:
    """The keys of mixture.yaml."""

    sources: dict[str, Any]
    """Name to a text source or a token store, and its weight."""


def resolve_mixture(values: Values) -> MixtureConfig | None:
    """The mixture that the `data` section names; None where it names one source."""
    settings = dict(values)
    if settings.pop("source", None) != MIXTURE:
        return None
    entries = parse_dataclass(MixtureEntries, settings, "data").sources
    return MixtureConfig(sources={name: _mixed(entries[name], name) for name in entries})


def _mixed(entry: Any, name: str) -> MixedSource:
    """One of `data.sources`."""
    where = f"data.sources.{name}"
    if not isinstance(entry, Mapping) or not {"source", "store"} & entry.keys():
        raise UserError(
            f"{where} must say what it is: give {{source: NAME, ..., weight: 1}} with the keys of "
            "data=NAME, or {store: DIR, weight: 1}"
        )
    settings = dict(entry)
    if "store" in entry:
        check_keys(entry, ("store", "weight"), where)
    else:
        given = {key: settings.pop(key) for key in entry if key == "weight"}
        settings = {**given, "corpus": resolve_corpus(settings, where)}
    return parse_dataclass(MixedSource, settings, where)
