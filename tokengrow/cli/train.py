"""tokengrow train: a ladder from its recipe to its last checkpoint."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli.generate import sample_text
from tokengrow.cli.mixture import resolve_mixture
from tokengrow.cli.resolve import (
    TrainArguments,
    plain,
    resolve_corpus,
    resolve_megatron,
    resolve_tokenizer,
    resolve_train,
)
from tokengrow.cli.runner import run_command
from tokengrow.cli.sweep import run_job
from tokengrow.data.corpus import Text
from tokengrow.data.megatron_source import MegatronConfig, MegatronSource
from tokengrow.data.mixture import MixtureConfig, open_store, prepare_mixture
from tokengrow.data.sequences import TokenSource
from tokengrow.data.store import prepare_store
from tokengrow.data.tokenizer import Tokenizer, TokenizerConfig, prepare_tokenizer
from tokengrow.distributed.launch import fabric_run_options, process_rank
from tokengrow.errors import UserError
from tokengrow.evaluation.source import checkpoint_tokenizer
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.paths import cache_dir
from tokengrow.reports.report import Report, rung_table
from tokengrow.training.config import TrainConfig
from tokengrow.training.fit import FitResult, fit

REPORT = "report"
"""Folder in that of a run."""

SAMPLE = SamplingConfig(max_tokens=96)
"""How the text at the end of a run is sampled."""


def train(config: DictConfig) -> float | None:
    """Trains what the config describes; returns the last validation loss, a sweep's objective."""
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job(config, climb)
    values = plain(config)
    values["fabric"] = with_options(values["fabric"], fabric_run_options())
    arguments = resolve_train(values)
    console = Console(quiet=process_rank() > 0)
    result = climb(arguments, console)
    if process_rank() == 0:
        show(console, arguments, result)
    return result.state.rung.loss_end


def climb(arguments: TrainArguments, console: Console) -> FitResult:
    """Trains a ladder on its tokens, which are made first where need be."""
    arguments.run.check_kernel()  # before minutes are spent on the data
    arguments.run.logger.check_installed()
    tokens = open_tokens(arguments, console)
    return fit(record_epochs(arguments.run, tokens), tokens, console)


def with_options(values: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """The `fabric` section with the options of `fabric run` where it says auto.

    Raises:
        UserError: it says something else.
    """
    for key, option in options.items():
        if values[key] not in ("auto", option):
            raise UserError(
                f"fabric.{key}={values[key]}, and `fabric run` was given {option}: give one of them"
            )
    return {**values, **options}


def open_tokens(arguments: TrainArguments, console: Console) -> TokenSource:
    """The run's tokens: the store that is given, one made from text, or Megatron's files."""
    recipe = arguments.recipe
    if recipe.store:
        return open_store(Path(recipe.store))
    if files := resolve_megatron(recipe.data):
        return _open_megatron(files, arguments, console)
    if mixed := resolve_mixture(recipe.data):
        return _open_mixture(mixed, arguments, console)
    corpus = resolve_corpus(recipe.data)
    tokenizer = given_tokenizer(arguments) or _trained_tokenizer(arguments, corpus, console)
    store = prepare_store(corpus, tokenizer, cache_dir())
    console.print(
        f"data: {len(store.split('train')):,} training and {len(store.split('validation')):,} "
        f"validation tokens in {store.folder}",
        highlight=False,
        soft_wrap=True,
    )
    return store


def _open_mixture(mixed: MixtureConfig, arguments: TrainArguments, console: Console) -> TokenSource:
    """Several stores of one tokenizer: those that are given, or made from text in the cache."""
    tokenizer = given_tokenizer(arguments) or mixed.stored_tokenizer()
    tokenizer = tokenizer or _trained_tokenizer(arguments, mixed.text, console)
    mixture = prepare_mixture(mixed, tokenizer, cache_dir())
    for line in mixture.lines():
        console.print(f"data: {line}", highlight=False, soft_wrap=True)
    return mixture


def _open_megatron(
    files: MegatronConfig, arguments: TrainArguments, console: Console
) -> MegatronSource:
    """Token files in the published order, which is computed once and kept in the cache."""
    tokenizer = given_tokenizer(arguments)
    if tokenizer is None:
        raise UserError(
            "tokenizer.file is missing: data=megatron holds token ids, and none can be made from "
            "them; give tokenizer=file tokenizer.file=PATH, the one that made the data"
        )
    run = arguments.run
    context_length = max(stage.model.context_length for stage in run.stages)
    with console.status("order of the samples: computed once; it is kept in the cache"):
        source = MegatronSource.open(
            files,
            tokenizer,
            samples=run.batch_size * sum(stage.steps for stage in run.stages),
            context_length=context_length,
            seed=run.seed,
            cache=cache_dir(),
        )
        samples = len(source.sequences("train", context_length))
    console.print(
        f"data: {samples:,} samples of {context_length:,} tokens, {source.epochs} x the training "
        f"documents of {files.prefix}",
        highlight=False,
        soft_wrap=True,
    )
    return source


def record_epochs(run: TrainConfig, tokens: TokenSource) -> TrainConfig:
    """The run with the epochs that its order was made for: what goes on from it must share them."""
    if not isinstance(tokens, MegatronSource):
        return run
    data = run.tokens_from["data"] | {"epochs": tokens.epochs}
    return replace(run, tokens_from=run.tokens_from | {"data": data})


def given_tokenizer(arguments: TrainArguments) -> Tokenizer | None:
    """The tokenizer in `tokenizer.file`, else the source's; None where there is neither."""
    config, source = _tokenizer_config(arguments), arguments.run.source
    if config.file is not None:
        tokenizer = Tokenizer.from_file(config.file, config.end_of_text)
    elif source:
        tokenizer = checkpoint_tokenizer(load_checkpoint(source, tensors=False))
    else:
        return None
    arguments.run.check_vocabulary(tokenizer.vocab_size)
    return tokenizer


def _trained_tokenizer(arguments: TrainArguments, corpus: Text, console: Console) -> Tokenizer:
    """A tokenizer of the `tokenizer` section's size, trained on the corpus."""
    config = _tokenizer_config(arguments)
    arguments.run.check_vocabulary(config.vocab_size)  # before minutes are spent on training it
    with console.status("tokenizer: training, once; it is kept in the cache"):
        tokenizer = prepare_tokenizer(config, corpus, cache_dir())
    arguments.run.check_vocabulary(tokenizer.vocab_size)
    return tokenizer


def _tokenizer_config(arguments: TrainArguments) -> TokenizerConfig:
    vocabularies = [stage.model.vocab_size for stage in arguments.run.stages]
    return resolve_tokenizer(arguments.recipe.tokenizer, min(vocabularies))


def show(console: Console, arguments: TrainArguments, result: FitResult) -> None:
    """Prints the ladder's table and a sample of the last model, writes the run's report, and says
    where everything is."""
    console.print()
    console.print(rung_table([asdict(rung) for rung in result.state.rungs]))
    sample = sample_text(result.checkpoint, arguments.recipe.prompt, SAMPLE)
    console.print("\n[bold]sample[/]")
    console.print(sample, markup=False, highlight=False)
    folder = result.checkpoint.folder
    assert folder is not None
    paths = {"checkpoint": folder, "report": write_report(folder.parent), "run": folder.parent}
    console.print()
    for what, path in paths.items():
        console.print(f"{what:<11} {path}", markup=False, highlight=False, soft_wrap=True)


def write_report(run: Path) -> str:
    """Writes the report of a run into its folder; gives its place, or why there is none: a run
    that is done does not fail over that."""
    try:
        return str(Report.of([run]).write(run / REPORT))
    except OSError as error:
        return (
            f"not written ({error.strerror}): `tokengrow report runs=[{run}] out=DIR` writes it "
            "elsewhere"
        )


if __name__ == "__main__":
    run_command("train", train)
