"""tokengrow train: a ladder from its recipe to its last checkpoint."""

from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli.generate import stream_text
from tokengrow.cli.resolve import (
    TrainArguments,
    checkpoint_tokenizer,
    plain,
    resolve_corpus,
    resolve_tokenizer,
    resolve_train,
)
from tokengrow.cli.verb import run_verb
from tokengrow.data.corpus import Corpus
from tokengrow.data.store import TokenStore, prepare_store
from tokengrow.data.tokenizer import Tokenizer, prepare_tokenizer
from tokengrow.evaluation.report import rung_table
from tokengrow.model.generate import SamplingConfig
from tokengrow.paths import cache_dir
from tokengrow.training.fit import FitResult, fit

SAMPLE = SamplingConfig(max_tokens=96)
"""How the text at the end of a run is sampled."""


def train(config: DictConfig) -> float:
    """Trains what the config describes; returns the last validation loss, a sweep's objective."""
    values = plain(config)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        values["out"] = HydraConfig.get().runtime.output_dir  # each job of a sweep its own
    arguments = resolve_train(values)
    console = Console()
    store = open_store(arguments, console)
    result = fit(arguments.run, store, console)
    show(console, arguments, result)
    loss = result.state.rung.loss_end
    assert loss is not None
    return loss


def open_store(arguments: TrainArguments, console: Console) -> TokenStore:
    """The run's tokens: the store that is given, or one made from `data` and kept in the cache."""
    if arguments.recipe.store:
        return TokenStore.open(Path(arguments.recipe.store))
    corpus = resolve_corpus(arguments.recipe.data)
    tokenizer = _tokenizer(arguments, corpus, console)
    store = prepare_store(corpus, tokenizer, cache_dir())
    console.print(
        f"data: {len(store.split('train')):,} training and {len(store.split('validation')):,} "
        f"validation tokens in {store.folder}",
        highlight=False,
        soft_wrap=True,
    )
    return store


def _tokenizer(arguments: TrainArguments, corpus: Corpus, console: Console) -> Tokenizer:
    """The source's tokenizer if the run starts from one, else that of the `tokenizer` section."""
    run = arguments.run
    config = resolve_tokenizer(
        arguments.recipe.tokenizer, min(s.model.vocab_size for s in run.stages)
    )
    if run.source and config.file is None:
        return checkpoint_tokenizer(load_checkpoint(run.source, tensors=False))
    if config.file is None:
        run.check_vocabulary(config.vocab_size)  # before minutes are spent on training it
    with console.status("tokenizer: training, once; it is kept in the cache"):
        tokenizer = prepare_tokenizer(config, corpus, cache_dir())
    run.check_vocabulary(tokenizer.vocab_size)
    return tokenizer


def show(console: Console, arguments: TrainArguments, result: FitResult) -> None:
    """Prints the ladder's table, a sample of the last model, and where everything is."""
    console.print()
    console.print(rung_table([asdict(rung) for rung in result.state.rungs]))
    sample = "".join(stream_text(result.checkpoint, arguments.recipe.prompt, SAMPLE))
    console.print("\n[bold]sample[/]")
    console.print(sample, markup=False, highlight=False)
    paths = {"checkpoint": result.checkpoint.folder, "plot": result.plot, "run": arguments.run.out}
    console.print()
    for what, path in paths.items():
        console.print(f"{what:<11} {path}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    run_verb("train", train)
