"""tokengrow train: train a ladder from its recipe to its last checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from tokengrow.cli.config import plain_values
from tokengrow.cli.generate import sample_text
from tokengrow.cli.runner import run_command
from tokengrow.cli.sweep import run_job
from tokengrow.data.megatron_source import MegatronSource
from tokengrow.data.open_tokens import open_tokens
from tokengrow.data.sequences import TokenSource
from tokengrow.distributed.launch import fabric_run_options, rank_from_env
from tokengrow.errors import UserError
from tokengrow.generation.sampling import SamplingConfig
from tokengrow.reports.report import Report, rung_table
from tokengrow.training.config import TrainConfig
from tokengrow.training.recipe import resolve_train, tokens_request
from tokengrow.training.trainer import FitResult, fit

REPORT = "report"
"""Name of the report's directory in the directory of a run."""

SAMPLE = SamplingConfig(max_tokens=96)
"""Sampling settings of the text at the end of a run."""


def main(config: DictConfig) -> float | None:
    """Train the run of a composed config.

    Returns:
        The last validation loss, nats per token: the objective of a sweep.
    """
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        return run_job(config, train)
    values = plain_values(config)
    values["fabric"] = apply_launch_options(values["fabric"], fabric_run_options())
    run = resolve_train(values)
    console = Console(quiet=rank_from_env() > 0)
    result = train(run, console)
    if rank_from_env() == 0:
        show(console, result, values["prompt"])
    return result.state.rung.loss_end


def train(config: TrainConfig, console: Console) -> FitResult:
    """Open the tokens of a run, and train it.

    Args:
        config: the run.
        console: receives progress.
    """
    config.check_kernel()  # before minutes of tokenisation
    config.logger.check_installed()
    tokens = open_tokens(tokens_request(config), console)
    return fit(record_epochs(config, tokens), tokens, console)


def apply_launch_options(section: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Return the `fabric` section with the options of `fabric run` in place of auto.

    Raises:
        UserError: the section sets one of them to another value.
    """
    for key, option in options.items():
        if section[key] not in ("auto", option):
            raise UserError(
                f"fabric.{key} must be auto or {option}, as given to `fabric run`, got "
                f"{section[key]}. Give one of them."
            )
    return {**section, **options}


def record_epochs(config: TrainConfig, tokens: TokenSource) -> TrainConfig:
    """Record the epochs that the order of Megatron samples was made for; resuming needs the same.

    Args:
        config: the run.
        tokens: its tokens.
    """
    if not isinstance(tokens, MegatronSource) or config.tokens_from is None:
        return config
    data = {**config.tokens_from.data, "epochs": tokens.epochs}
    return replace(config, tokens_from=replace(config.tokens_from, data=data))


def show(console: Console, result: FitResult, prompt: str) -> None:
    """Print the ladder's table and a sample, write the report, and print the paths of the results.

    Args:
        console: the terminal.
        result: result of the run.
        prompt: prompt of the sample.
    """
    console.print()
    console.print(rung_table(result.state.rungs))
    console.print("\n[bold]sample[/]")
    text = sample_text(result.checkpoint, prompt, SAMPLE)
    console.print(text, markup=False, highlight=False)
    folder = result.checkpoint.folder
    assert folder is not None
    paths = {"checkpoint": folder, "report": write_report(folder.parent), "run": folder.parent}
    console.print()
    for name, path in paths.items():
        console.print(f"{name:<11} {path}", markup=False, highlight=False, soft_wrap=True)


def write_report(run: Path) -> str:
    """Write the report of a run into its directory; a full disk does not fail a finished run.

    Returns:
        The path of the page, or a sentence on how to write it elsewhere.
    """
    try:
        return str(Report.from_paths([run]).write(run / REPORT))
    except OSError as error:
        return (
            f"not written ({error.strerror}). Run `tokengrow report runs=[{run}] out=DIR` to write "
            "it elsewhere."
        )


if __name__ == "__main__":
    run_command("train", main)
