"""What becomes of a word of the command line before Hydra reads it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.cli.resolve import resolve_train
from tokengrow.cli.verb import as_hydra_reads_it, as_hydra_reads_them
from tokengrow.errors import UserError

Composed = Callable[..., dict[str, Any]]


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
    word = as_hydra_reads_it(f"prompt={prompt}")
    assert composed("generate", "source=x", word)["prompt"] == prompt


def test_a_stage_takes_a_key_that_its_recipe_does_not_list(composed: Composed) -> None:
    words = ["stages.large.optim.lr=2e-3", "stages.medium.model.tokens.ffn=600"]
    values = composed("train", "recipes=quickstart", *map(as_hydra_reads_it, words))
    stages = resolve_train(values).run.stages
    assert stages[2].optim.lr == 2e-3
    assert stages[1].model.tokens.ffn == 600


def test_a_stage_that_is_not_there_is_refused(composed: Composed) -> None:
    word = as_hydra_reads_it("stages.lrage.optim.lr=1e-4")
    with pytest.raises(UserError, match=r"stages\.lrage\.steps is missing"):
        resolve_train(composed("train", "recipes=quickstart", word))


def test_other_words_are_left_alone() -> None:
    for word in (
        "optim.lr=1",
        "+stages.xl.steps=3",
        "stages.small.steps=2",
        "--multirun",
        "prompt",
    ):
        assert as_hydra_reads_it(word) == word


@pytest.mark.parametrize(
    "words",
    [
        ["--json", "model=150m", "seed=1"],
        ["model=150m", "--json", "seed=1"],
        ["model=150m", "seed=1", "--json"],
    ],
)
def test_json_becomes_a_key_among_the_others(words: list[str]) -> None:
    assert as_hydra_reads_them(words) == ["json=true", "model=150m", "seed=1"]


def test_json_stands_beside_the_keys_whatever_options_are_in_front() -> None:
    # Hydra refuses keys on both sides of an option.
    words = ["--json", "--config-dir", "mine", "recipes=a"]
    assert as_hydra_reads_them(words) == ["--config-dir", "mine", "json=true", "recipes=a"]


def test_json_may_stand_alone() -> None:
    assert as_hydra_reads_them(["--json"]) == ["json=true"]


def test_null_stands_for_what_the_sources_run_had(composed: Composed, source: Path) -> None:
    values = composed("train", "recipes=continue", f"source={source}", "stages.continued.steps=3")
    arguments = resolve_train(values)
    assert (arguments.run.batch_size, arguments.run.validation_sequences) == (4, 8)
    assert arguments.run.stages[0].optim.lr == 3e-3
    assert arguments.recipe.data["source"] == "stdlib"
    assert arguments.recipe.store is not None
    given = resolve_train({**values, "batch_size": 8, "data": {"source": "text", "files": ["a"]}})
    assert given.run.batch_size == 8
    assert given.recipe.data == {"source": "text", "files": ["a"]}
    assert given.recipe.store is None
