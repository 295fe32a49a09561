"""Resolution of the `data` and `tokenizer` sections of a config into typed configs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokengrow.data.corpus import CORPORA, Corpus
from tokengrow.data.megatron_source import MegatronConfig
from tokengrow.data.mixture import MixedSource, MixtureConfig
from tokengrow.data.tokenizer import TokenizerConfig
from tokengrow.errors import UserError
from tokengrow.parsing import check_keys, drop_nulls, parse_dataclass

Section = Mapping[str, Any]

MEGATRON = "megatron"
"""Value of `data.source` for token files instead of text."""

MIXTURE = "mixture"
"""Value of `data.source` for a mixture of other sources."""


@dataclass(frozen=True, kw_only=True)
class MixtureSection:
    """Keys of mixture.yaml."""

    sources: dict[str, Any]
    """Name to a text source or a token store, with its weight."""


def resolve_corpus(section: Section, where: str = "data") -> Corpus:
    """Return the text source of a `data` section.

    Args:
        section: the section, or one source of a mixture.
        where: name of the section, for error messages.

    Raises:
        UserError: the section names no source, or one that is not text.
    """
    settings = dict(section)
    source = settings.pop("source", None)
    if source is None:
        raise UserError(
            f"{where}.source is missing. Choose data=NAME or store=DIR, or a source= whose run "
            "recorded its data."
        )
    if source == MEGATRON:
        raise UserError(
            f"{where} must be a text source, got megatron, which holds token ids. Train on it "
            "directly."
        )
    if source == MIXTURE and where == "data":
        raise UserError("data must be one text, got a mixture. Give the data= of one of its texts.")
    if source not in CORPORA:
        others = [] if where != "data" else [MEGATRON, MIXTURE]
        valid = ", ".join([*CORPORA, *others])
        raise UserError(f"{where}.source must be one of {valid}, got {source!r}.")
    return parse_dataclass(CORPORA[source], settings, where)


def resolve_megatron(section: Section) -> MegatronConfig | None:
    """Return the token files of a `data` section, or None if it names another source."""
    settings = dict(section)
    if settings.pop("source", None) != MEGATRON:
        return None
    return parse_dataclass(MegatronConfig, settings, "data")


def resolve_mixture(section: Section) -> MixtureConfig | None:
    """Return the mixture of a `data` section, or None if it names a single source."""
    settings = dict(section)
    if settings.pop("source", None) != MIXTURE:
        return None
    sources = parse_dataclass(MixtureSection, settings, "data").sources
    return MixtureConfig(sources={name: _mixed_source(sources[name], name) for name in sources})


def _mixed_source(section: Any, name: str) -> MixedSource:
    """Resolve one entry of `data.sources`."""
    where = f"data.sources.{name}"
    if not isinstance(section, Mapping) or not {"source", "store"} & section.keys():
        raise UserError(
            f"{where} must have the key source or store, got {section!r}. Write {{source: NAME, "
            "..., weight: 1} with the keys of data=NAME, or {store: DIR, weight: 1}."
        )
    settings = dict(section)
    if "store" in section:
        check_keys(section, ("store", "weight"), where)
    else:
        given = {key: settings.pop(key) for key in section if key == "weight"}
        settings = {**given, "corpus": resolve_corpus(settings, where)}
    return parse_dataclass(MixedSource, settings, where)


def resolve_tokenizer(section: Section, vocab_size: int | None = None) -> TokenizerConfig:
    """Return the config of a `tokenizer` section.

    Args:
        section: the section.
        vocab_size: value for a null `vocab_size`, usually that of the model; None: the default of
            `TokenizerConfig`.
    """
    given = drop_nulls(section)
    if vocab_size is not None:
        given.setdefault("vocab_size", vocab_size)
    return parse_dataclass(TokenizerConfig, given, "tokenizer")
