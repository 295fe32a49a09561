"""tokengrow data: tokenise a corpus into a token store, or into Megatron token files."""

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
    """Keys of data.yaml."""

    out: str
    """Directory of the token store, or of the token files."""
    to: str
    """Output format: store or megatron."""
    data: dict[str, Any]
    """Text source; its keys depend on `data.source`."""
    tokenizer: dict[str, Any]
    """Tokenizer section."""

    def __post_init__(self) -> None:
        if self.to not in FORMATS:
            raise UserError(f"Unknown format to={self.to}. {suggest(self.to, FORMATS)}")


def main(config: DictConfig) -> None:
    """Tokenise `data` into `out`, or resume an interrupted build, and verify an existing store."""
    arguments = parse_dataclass(DataArguments, plain_values(config))
    out = Path(arguments.out)
    if arguments.to == "megatron" and out.exists():
        raise UserError(f"out={out} exists. Choose another out=; nothing is overwritten.")
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
    """Build a store per source in `out`, and print their shares."""
    if arguments.to != "store":
        raise UserError(
            f"to must be store for a mixture, got {arguments.to}. Convert each source by itself."
        )
    tokenizer = mixed.stored_tokenizer()
    if tokenizer is None:
        with console.status("tokenizer"):
            tokenizer = prepare_tokenizer(config, mixed.text, cache_dir())
    mixture = build_mixture(mixed, tokenizer, Path(arguments.out))
    for line in mixture.summary_lines():
        console.print(line)
    console.print(f"train with  store={arguments.out}")


def _build(corpus: Corpus, tokenizer: Tokenizer, out: Path, console: Console) -> TokenStore:
    """Build a store in `out`; verify it if it was complete before."""
    was_complete = out.is_dir() and TokenStore.is_complete(out)
    store = build_store(corpus, tokenizer, out)
    if was_complete:
        with console.status("verifying the existing store"):
            store.verify()
    return store


def show(store: TokenStore, console: Console) -> None:
    """Print the number of tokens in each split."""
    console.print(f"training    {len(store.split('train')):,} tokens")
    console.print(f"validation  {len(store.split('validation')):,} tokens")
    if not len(store.split("validation")):
        console.print(
            "            no validation tokens, which training needs. Raise "
            "data.validation_fraction, or set data.validation_files."
        )
    console.print(f"vocabulary  {store.vocab_size:,}")


def show_files(prefixes: list[str], out: Path, console: Console) -> None:
    """Print the paths of the token files, and the keys for training on them."""
    for prefix in prefixes:
        console.print(f"files       {prefix}.bin, .idx")
    keys = ("data.prefix", "data.validation_prefix")
    given = " ".join(f"{key}={prefix}" for key, prefix in zip(keys, prefixes, strict=False))
    tokenizer = f"tokenizer=file tokenizer.file={out / TOKENIZER}"
    console.print(f"train with  data=megatron {given} {tokenizer}")


if __name__ == "__main__":
    run_command("data", main)
