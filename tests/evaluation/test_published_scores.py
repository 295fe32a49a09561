"""The published figures that results stand beside."""

import pytest

from tokengrow.evaluation.published_scores import PUBLISHED_SCORES, nearest_published_model
from tokengrow.evaluation.scores import Score, score_table
from tokengrow.model.config import ModelConfig


@pytest.mark.parametrize("preset", PUBLISHED_SCORES)
def test_a_published_model_is_its_own_neighbour(preset: str) -> None:
    parameters = ModelConfig.preset(preset).num_parameters()
    assert nearest_published_model(parameters).name == PUBLISHED_SCORES[preset][0]


@pytest.mark.parametrize(
    ("parameters", "name"),
    [(10**5, "150M"), (2 * 10**8, "150M"), (3 * 10**8, "450M"), (10**10, "1.5B")],
)
def test_the_neighbour_has_the_smallest_ratio(parameters: int, name: str) -> None:
    assert nearest_published_model(parameters).name == f"TokenFormer-{name}"


@pytest.mark.parametrize("preset", PUBLISHED_SCORES)
def test_the_figures_have_the_average_that_the_paper_gives(preset: str) -> None:
    _, *accuracies = nearest_published_model(
        ModelConfig.preset(preset).num_parameters()
    ).figures.values()
    paper = {"150m": 44.7, "450m": 52.0, "900m": 56.4, "1.5b": 59.3}
    assert sum(accuracies) / 6 == pytest.approx(paper[preset], abs=0.051)


def score(task: str, metric: str, value: float | None, shots: int = 0) -> Score:
    return Score(task, metric, value, 0.01, samples=1838, shots=shots, version=1.0)


def cells(*scores: Score) -> list[list[str]]:
    table = score_table(scores, nearest_published_model(150_000_000))
    return [list(row) for row in zip(*(column._cells for column in table.columns), strict=True)]


def test_the_table_shows_accuracy_in_per_cent_beside_the_published_one() -> None:
    assert cells(score("piqa", "acc", 0.6123), score("piqa", "acc_norm", 0.6)) == [
        ["piqa", "acc %", "0", "1,838", "61.2", "1.0", "64.9"],
        ["", "acc_norm %", "", "", "60.0", "1.0", "-"],
    ]


def test_the_table_shows_perplexity_as_it_is() -> None:
    assert cells(score("lambada_openai", "perplexity", 12.345))[0][4:] == ["12.35", "0.01", "16.38"]
    assert cells(score("lambada_openai", "perplexity", 1234567.0))[0][4] == "1.23e+06"
    assert cells(score("lambada_openai", "perplexity", None))[0][4] == "-"


def test_nothing_published_stands_beside_few_shot_results() -> None:
    assert cells(score("piqa", "acc", 0.6, shots=5))[0][-1] == "-"
