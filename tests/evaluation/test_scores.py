"""Table of scores next to those of a published model."""

from tokengrow.evaluation.published_scores import nearest_published_model
from tokengrow.evaluation.scores import Score, score_table


def score(task: str, metric: str, value: float | None, shots: int = 0) -> Score:
    return Score(task, metric, value, 0.01, samples=1838, shots=shots, version=1.0)


def cells(*scores: Score) -> list[list[str]]:
    table = score_table(scores, nearest_published_model(150_000_000))
    return [list(row) for row in zip(*(column._cells for column in table.columns), strict=True)]


def test_accuracy_and_published_accuracy_are_in_per_cent() -> None:
    assert cells(score("piqa", "acc", 0.6123), score("piqa", "acc_norm", 0.6)) == [
        ["piqa", "acc %", "0", "1,838", "61.2", "1.0", "64.9"],
        ["", "acc_norm %", "", "", "60.0", "1.0", "-"],
    ]


def test_perplexity_is_shown_without_a_unit() -> None:
    assert cells(score("lambada_openai", "perplexity", 12.345))[0][4:] == ["12.35", "0.01", "16.38"]
    assert cells(score("lambada_openai", "perplexity", 1234567.0))[0][4] == "1.23e+06"
    assert cells(score("lambada_openai", "perplexity", None))[0][4] == "-"


def test_few_shot_scores_have_no_published_score() -> None:
    assert cells(score("piqa", "acc", 0.6, shots=5))[0][-1] == "-"
