"""tokengrow data: a corpus into a token store."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from tokengrow.cli.resolve import plain, resolve_corpus, resolve_tokenizer
from tokengrow.cli.verb import run_verb
from tokengrow.data.store import TokenStore, build_store
from tokengrow.data.tokenizer import prepare_tokenizer
from tokengrow.paths import cache_dir
from tokengrow.typed import typed


@dataclass(frozen=True, kw_only=True)
class DataArguments:
    """The keys of data.yaml."""

    out: str
    """Folder of the token store."""
    data: dict[str, Any]
    """The text source; its keys depend on `data.source`."""
    tokenizer: dict[str, Any]
    """Which tokenizer to use."""


def main(config: DictConfig) -> None:
    """Tokenises `data` into `out`, or goes on where that was left, and verifies the result."""
    arguments = typed(DataArguments, plain(config))
    corpus = resolve_corpus(arguments.data)
    tokenizer_config = resolve_tokenizer(arguments.tokenizer)
    console = Console(highlight=False)
    with console.status("tokenizer"):
        tokenizer = prepare_tokenizer(tokenizer_config, corpus, cache_dir())
    out = Path(arguments.out)
    was_there = out.is_dir() and TokenStore.is_complete(out)
    store = build_store(corpus, tokenizer, out)
    if was_there:
        with console.status("verifying the store that is there"):
            store.verify()
    console.print(f"training    {len(store.split('train')):,} tokens")
    console.print(f"validation  {len(store.split('validation')):,} tokens")
    if not len(store.split("validation")):
        console.print(
            "            none is held out, and training needs some: raise "
            "data.validation_fraction, or give data.validation_files",
            soft_wrap=True,
        )
    console.print(f"vocabulary  {store.vocab_size:,}")
    console.print(f"store       {store.folder}", soft_wrap=True)


if __name__ == "__main__":
    run_verb("data", main)
