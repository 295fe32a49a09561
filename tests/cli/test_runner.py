"""What becomes of a word of the command line before Hydra reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from hydra._internal.utils import get_args_parser
from hydra.errors import HydraException

from tokengrow.checkpoint.schema import TokensFrom
from tokengrow.cli.errors import OPTIONS
from tokengrow.cli.runner import to_hydra_override, to_hydra_overrides
from tokengrow.training.config import StageConfig
from tokengrow.training.plateau import PlateauConfig
from tokengrow.training.recipe import resolve_train

Composed = Callable[..., dict[str, Any]]


def resolved(composed: Composed, *words: str) -> tuple[StageConfig, ...]:
    """The stages of the quickstart with these words typed."""
    read = [as_hydra for word in words for as_hydra in to_hydra_override(word)]
    return resolve_train(composed("train", "recipes=quickstart", *read)).stages


@pytest.mark.parametrize(
    "prompt",
    [
        "Hello, world",
        "def f(x):",
        "it's",
        "print('hi",
        "# comment",
        "x = 1",
        "cost $5 ${x}",
        "1e3",
        "true",
        "    return ",
        "C:\\",
        "\\'",
        "",
        "Zoë",
    ],
)
def test_a_prompt_is_taken_to_the_letter(prompt: str, composed: Composed) -> None:
    words = to_hydra_override(f"prompt={prompt}")
    assert composed("generate", "source=x", *words)["prompt"] == prompt


@pytest.mark.parametrize(
    ("word", "read"),
    [
        ("source=runs/sweep/optim.lr=0.001", "source='runs/sweep/optim.lr=0.001'"),
        ("runs=[runs/s/arm=grown,runs/b]", "runs=['runs/s/arm=grown',runs/b]"),
        ("runs=[runs/b, runs/s/a=1]", "runs=[runs/b, 'runs/s/a=1']"),
        ("out='runs/s/a=1'", "out='runs/s/a=1'"),
        ("out=runs/plain", "out=runs/plain"),
        ("source=runs/s/a=1,runs/b", "source='runs/s/a=1',runs/b"),
        ("prompts=runs/s/a=1/questions.txt", "prompts='runs/s/a=1/questions.txt'"),
        ("runs=['runs/a=1, 2', runs/a=3]", "runs=['runs/a=1, 2', 'runs/a=3']"),
    ],
)
def test_a_path_may_hold_an_equals_sign_as_the_folders_of_a_sweep_do(word: str, read: str) -> None:
    assert to_hydra_override(word) == [read]


def test_a_path_may_hold_umlauts(composed: Composed) -> None:
    words = [*to_hydra_override("source=Läufe/a"), *to_hydra_override("prompts=Fragen/übung.txt")]
    values = composed("generate", *words)
    assert (values["source"], values["prompts"]) == ("Läufe/a", "Fragen/übung.txt")


@pytest.mark.parametrize(
    ("typed", "strings"),
    [
        ("[ü]", ["ü"]),
        ("[END, Ende ,(x),it's]", ["END", "Ende", "(x)", "it's"]),
        (r"[\n\n]", [r"\n\n"]),
        (r'["\n",\n]', [r"\n", r"\n"]),
        ("""['a, b',"it's"]""", ["a, b", "it's"]),
        ("[1,true,${x}]", ["1", "true", "${x}"]),
        ("[]", []),
    ],
)
def test_stop_strings_are_taken_to_the_letter(
    typed: str, strings: list[str], composed: Composed
) -> None:
    assert composed("generate", "source=x", *to_hydra_override(f"stop={typed}"))["stop"] == strings


def test_a_path_may_begin_in_the_users_folder(
    composed: Composed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    words = ["source=~/runs/a", "tasks=[perplexity]", "out=~/runs/lr=1", "data_dir=runs/~/b"]
    assert [read for word in words for read in to_hydra_override(word)] == [
        "source=/home/ada/runs/a",
        "tasks=[perplexity]",
        "out='/home/ada/runs/lr=1'",
        "data_dir=runs/~/b",
    ]
    runs = to_hydra_override("runs=[~/a, ~/b]")
    assert composed("report", *runs, "out=x")["runs"] == ["/home/ada/a", "/home/ada/b"]


def test_a_stage_takes_a_key_that_its_recipe_does_not_list(composed: Composed) -> None:
    words = ["stages.large.optim.lr=2e-3", "stages.medium.model.tokens.ffn=600"]
    words += ["stages.medium.plateau.patience=5", "stages.small.steps=null"]
    words += ["stages.small.tokens=1e6", "stages.large.steps=7"]
    small, medium, large = resolved(composed, *words)
    assert large.optim.lr == 2e-3
    assert medium.model.tokens.ffn == 600
    assert medium.plateau == PlateauConfig(patience=5)
    assert small.steps == 489  # 1e6 / (16 sequences of 128 tokens) = 488.3
    assert large.steps == 7


def test_a_stage_that_was_added_takes_further_keys(composed: Composed) -> None:
    *_, added = resolved(composed, "+stages.xl.steps=3", "stages.xl.optim.lr=1e-4")
    assert (added.name, added.optim.lr) == ("xl", 1e-4)


@pytest.mark.parametrize("word", ["optim.lr=1e-4", "steps=3", "tokens=1e6", "plateau={}"])
def test_a_stage_that_is_not_there_is_refused(composed: Composed, word: str) -> None:
    with pytest.raises(HydraException, match=r"Could not override 'stages\.lrage'"):
        resolved(composed, f"stages.lrage.{word}")


def test_other_words_are_left_alone() -> None:
    for word in ("optim.lr=1", "+stages.xl.steps=3", "~stages.small", "--multirun", "prompt"):
        assert to_hydra_override(word) == [word]


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "model=150m", "seed=1"],
        ["model=150m", "--json", "seed=1"],
        ["model=150m", "seed=1", "--json"],
    ],
)
def test_json_becomes_a_key_among_the_others(words: list[str]) -> None:
    assert to_hydra_overrides(words) == ["json=true", "model=150m", "seed=1"]


def test_json_stands_beside_the_keys_whatever_options_are_in_front() -> None:
    # Hydra refuses keys on both sides of an option.
    words = ["--json", "--config-dir", "mine", "recipes=a"]
    assert to_hydra_overrides(words) == ["--config-dir", "mine", "json=true", "recipes=a"]


def test_json_may_stand_alone() -> None:
    assert to_hydra_overrides(["--json"]) == ["json=true"]


def test_null_stands_for_what_the_sources_run_had(composed: Composed, source: Path) -> None:
    values = composed("train", "recipes=continue", f"source={source}", "stages.continued.steps=3")
    run = resolve_train(values)
    assert (run.batch_size, run.validation_sequences) == (4, 8)
    assert run.stages[0].optim.lr == 3e-3
    assert run.tokens_from is not None
    assert run.tokens_from.data["source"] == "stdlib"
    assert run.tokens_from.store is not None
    given = resolve_train({**values, "batch_size": 8, "data": {"source": "text", "files": ["a"]}})
    assert given.batch_size == 8
    assert given.tokens_from == TokensFrom({"source": "text", "files": ["a"]}, ANY, None)


def test_the_options_that_are_known_are_hydras_and_json() -> None:
    theirs = {option for option in get_args_parser()._option_string_actions if option[:2] == "--"}
    assert set(OPTIONS) == theirs | {"--json"}
