"""tokengrow data: a corpus into a token store, or into Megatron's token files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from tokengrow.cli.config import plain_values
from tokengrow.cli.runner import run_command
from tokengrow.data.corpus import Corpus
from tokengrow.data.megatron import export_store
from tokengrow.data.mixture import MixtureConfig, build_mixture
from tokengrow.data.sections import resolve_corpus, resolve_mixture, resolve_tokenizer
from tokengrow.data.store import TokenStore, build_store, prepare_store
from tokengrow.data.store_record import TOKENIZER
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig, prepare_tokenizer
from tokengrow.errors import UserError
from tokengrow.parsing import parse_dataclass, suggest
from tokengrow.paths import cache_dir

FORMATS = ("store", "megatron")


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The keys of data.yaml."""

    out: str
    """Folder of the token store, or of the token files."""
    to: str
    """store, or megatron."""
    data: dict[str, Any]
    """The text source; its keys depend on `data.source`."""
    tokenizer: dict[str, Any]
    """Which tokenizer to use."""

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise UserError(f"to={self.to}: there is no such format{suggest(self.to, FORMATS)}")


def main(config: DictConfig) -> None:
    """Tokenises `data` into `out`, or goes on where that was left, and verifies the result."""
    arguments = parse_dataclass(DataArguments, plain_values(config))
    out = Path(arguments.out)
    if arguments.to == "megatron" and out.exists():
        raise UserError(f"out={out} exists already: choose another out=; nothing is overwritten")
    tokenizer_config = resolve_tokenizer(arguments.tokenizer)
    console = Console(highlight=False, soft_wrap=True)
    if mixed := resolve_mixture(arguments.data):
        _build_mixture(mixed, arguments, tokenizer_config, console)
        return
    corpus = resolve_corpus(arguments.data)
    with console.status("tokenizer"):
        tokenizer = prepare_tokenizer(tokenizer_config, corpus, cache_dir())
    if arguments.to == "megatron":
        store = prepare_store(corpus, tokenizer, cache_dir())
        with console.status("writing the token files"):
            prefixes = export_store(store, out)
    else:
        store = _build(corpus, tokenizer, out, console)
    show(store, console)
    if arguments.to == "megatron":
        show_files(prefixes, out, console)
    else:
        console.print(f"store       {store.folder}")


def _build_mixture(
    mixed: MixtureConfig, arguments: DataArguments, config: TokenizerConfig, console: Console
) -> None:
    """A store for each source in `out`, and their shares."""
    if arguments.to != "store":
        raise UserError(
            f"to={arguments.to} takes one source: give its own data=, once for each source"
        )
    tokenizer = mixed.stored_tokenizer()
    if tokenizer is None:
        with console.status("tokenizer"):
            tokenizer = prepare_tokenizer(config, mixed.text, cache_dir())
    mixture = build_mixture(mixed, tokenizer, Path(arguments.out))
    for line in mixture.lines():
        console.print(line)
    console.print(f"train with  store={arguments.out}")


def _build(corpus: Corpus, tokenizer: Tokenizer, out: Path, console: Console) -> TokenStore:
    """A store in `out`, verified where it was there already."""
    was_there = out.is_dir() and TokenStore.is_complete(out)
    store = build_store(corpus, tokenizer, out)
    if was_there:
        with console.status("verifying the store that is there"):
            store.verify()
    return store


def show(store: TokenStore, console: Console) -> None:
    """Prints how many tokens there are in each split."""
    console.print(f"training    {len(store.split('train')):,} tokens")
    console.print(f"validation  {len(store.split('validation')):,} tokens")
    if not len(store.split("validation")):
        console.print(
            "            none is held out, and training needs some: raise "
            "data.validation_fraction, or give data.validation_files"
        )
    console.print(f"vocabulary  {store.vocab_size:,}")


def show_files(prefixes: list[str], out: Path, console: Console) -> None:
    """Prints where the token files are, and how to train on them."""
    for prefix in prefixes:
        console.print(f"files       {prefix}.bin, .idx")
    keys = ("data.prefix", "data.validation_prefix")
    given = " ".join(f"{key}={prefix}" for key, prefix in zip(keys, prefixes, strict=False))
    tokenizer = f"tokenizer=file tokenizer.file={out / TOKENIZER}"
    console.print(f"train with  data=megatron {given} {tokenizer}")


if __name__ == "__main__":
    run_command("data", main)
