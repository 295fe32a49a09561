"""`tokengrow plan`: the numbers of a ladder or a growth, without building a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.cli.resolve import resolve_train
from tokengrow.evaluation.format import bytes_text, count
from tokengrow.model import tokenformer
from tokengrow.training.memory import checkpoint_bytes, training_bytes

Command = Callable[..., Any]


def rows_of(text: str) -> dict[str, str]:
    """First word of every line to the line, its gaps narrowed to one space."""
    lines = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return {line.split()[0]: line for line in lines}


def test_the_rows_of_a_recipe_are_its_configs_numbers(
    command: Command, composed: Callable[..., dict[str, Any]]
) -> None:
    outcome = command("plan", "recipes=quickstart")
    assert outcome.status == 0
    rows = rows_of(outcome.out)
    run = resolve_train(composed("plan", "recipes=quickstart")).run
    for stage in run.stages:
        row = rows[stage.name]
        assert f"{stage.model.num_parameters():,}" in row
        assert count(stage.model.flops_per_token()) in row
        assert bytes_text(checkpoint_bytes(stage.model)) in row
        assert bytes_text(training_bytes(stage.model, run.micro_batch_size)) in row
        assert count(stage.steps * run.batch_size * stage.model.context_length) in row


LADDER = (
    "model=tiny",
    "batch_size=16",
    "+stages.small.steps=300",
    "+stages.large={steps: 220, model: {tokens: {ffn: 512}}}",
)


def test_the_last_row_is_the_sum(command: Command) -> None:
    total = rows_of(command("plan", *LADDER).out)["total"]
    assert total.split()[1:3] == ["520", "1.06M"]  # 520 updates of 16 sequences of 128 tokens


def test_a_budget_of_tokens_is_shown_in_steps(command: Command) -> None:
    words = ("recipes=quickstart", "stages.small.steps=null", "stages.small.tokens=1e6")
    small = rows_of(command("plan", *words).out)["small"].split()
    assert "489" in small  # 1e6 / (16 sequences of 128 tokens) = 488.3


def test_a_stage_that_may_end_before_is_named(command: Command) -> None:
    said = "at most: small may end before, at a plateau"
    assert (
        said in command("plan", *LADDER, "optim.schedule=constant", "+stages.small.plateau={}").out
    )
    assert "at most" not in command("plan", *LADDER).out


def test_the_parameters_of_a_stage_worked_by_hand(command: Command) -> None:
    # 2048 x 128 embedding; 4 layers of 4 roles x 64 x (128 + 128) and 256 x 256; 2 x 128 norm.
    small = 2048 * 128 + 4 * (4 * 64 * 256 + 256 * 256) + 2 * 128
    rows = rows_of(command("plan", *LADDER).out)
    assert f"{small:,}" in rows["small"]
    assert f"{small + 4 * 256 * 256:,}" in rows["large"]  # 256 more tokens in each of 4 layers


def test_a_growth_is_shown_before_and_after(command: Command, source: Path) -> None:
    outcome = command("plan", f"source={source}", "model.tokens.ffn=64")
    rows = rows_of(outcome.out)
    config = load_checkpoint(source).config
    assert f"{config.num_parameters():,}" in rows["source"]
    # 48 more tokens with a key of 32 and a value of 32 in each of 2 layers.
    assert f"{config.num_parameters() + 2 * 48 * 64:,}" in rows["grown"]


def test_a_growth_to_a_preset_is_refused_where_the_axes_differ(
    command: Command, source: Path
) -> None:
    outcome = command("plan", f"source={source}", "model=150m")
    assert outcome.status == 2
    assert "growth cannot change it" in outcome.err


def test_no_model_is_built(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenformer.TokenFormer, "__init__", None)  # would fail if it were called
    outcome = command("plan", "model=1.5b", "+stages.only.steps=10")
    assert outcome.status == 0
    assert rows_of(outcome.out)["only"]


def test_it_fits_80_columns(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = command("plan", "recipes=quickstart").out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not any("…" in line for line in lines)
