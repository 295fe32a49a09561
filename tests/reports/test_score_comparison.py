"""Tests of the comparison of scores: only scores on the same questions are compared."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from report_runs import make_record
from rich.console import Console

from tokengrow.reports.run_data import RunRecord
from tokengrow.reports.score_comparison import (
    MetricValue,
    RunScores,
    ScoreComparison,
    compare_scores,
    score_table,
)


def make_results(step: int = 1, began: str = "2026-01-01", **sections: Any) -> dict[str, Any]:
    """Return results as `tokengrow eval` writes them, with scores on PIQA by default."""
    files = {"piqa": {"piqa_valid.jsonl": "93503c"}}
    settings = {"files": files, "lm_eval": "0.4.13", "limit": None, "num_fewshot": None}
    return {
        "checkpoint": {"step": step},
        "settings": {**settings, **sections.pop("settings", {})},
        "ran": {"began": began},
        **(sections or {"scores": [make_score()]}),
    }


def make_score(**changes: Any) -> dict[str, Any]:
    values = {"task": "piqa", "metric": "acc", "value": 0.5, "error": 0.04, "samples": 150}
    return {**values, "shots": 0, "version": 1.0, **changes}


def make_perplexity(context_length: int = 128, **changes: Any) -> dict[str, Any]:
    """Return results of a perplexity on one text."""
    text = {"bytes": 3664, "tokens": 1196, "text_sha256": "8bb3c4"}
    sums = {**text, "context_length": context_length, "stride": 128}
    ratios = {"bits_per_byte": 1.9875, "word_perplexity": 54276.6, "token_perplexity": 68.058}
    data = {"source": "text", "files": ["books/book.txt"]}
    settings = {"data": data, "perplexity": {"split": "validation"}}
    return make_results(settings=settings, perplexity={**sums, **ratios, **changes})


def make_run(name: str, *evaluations: dict[str, Any]) -> RunRecord:
    """Return a run whose newest checkpoint is that of step 1."""
    return replace(make_record(name, (1.0, 4.0), (2.0, 3.0)), evaluations=evaluations)


def values_by_metric(comparison: ScoreComparison) -> dict[str, list[float | None]]:
    """Return the value of each run for each metric."""
    runs = [scores.values if scores else {} for scores in comparison.scores]
    return {
        metric: [run[metric].value if metric in run else None for run in runs]
        for metric in comparison.metrics
    }


def test_runs_with_the_same_questions_are_compared() -> None:
    both = make_score(metric="acc_norm", value=0.6)
    one = make_run("one", make_results(scores=[make_score(), both]))
    other = make_run("other", make_results(scores=[make_score(value=0.7), both]))
    (comparison,) = compare_scores([one, other])
    assert (comparison.task, comparison.setting) == ("piqa", "150 questions, 0 shots")
    assert values_by_metric(comparison) == {"acc": [0.5, 0.7], "acc_norm": [0.6, 0.6]}


def test_run_without_an_evaluation_has_no_score() -> None:
    (comparison,) = compare_scores([make_run("one"), make_run("other", make_results())])
    assert values_by_metric(comparison) == {"acc": [None, 0.5]}


def test_different_settings_are_not_compared() -> None:
    other_files = make_results(settings={"files": {"piqa": {"piqa_valid.jsonl": "000000"}}})
    for other in (
        make_results(scores=[make_score(samples=20)]),
        make_results(scores=[make_score(shots=5)]),
        make_results(scores=[make_score(version=2.0)]),
        other_files,
        make_results(settings={"lm_eval": "0.4.12"}),
    ):
        comparisons = compare_scores([make_run("one", make_results()), make_run("other", other)])
        assert [values_by_metric(each) for each in comparisons] == [
            {"acc": [0.5, None]},
            {"acc": [None, 0.5]},
        ]


def test_files_of_other_tasks_do_not_matter() -> None:
    files = {"piqa": {"piqa_valid.jsonl": "93503c"}, "lambada_openai": {"lambada_test.jsonl": "4a"}}
    other = make_results(settings={"files": files})
    (comparison,) = compare_scores([make_run("one", make_results()), make_run("other", other)])
    assert values_by_metric(comparison) == {"acc": [0.5, 0.5]}


def test_perplexity_is_compared_between_tokenizers() -> None:
    other = make_perplexity(tokens=900, bits_per_byte=1.5, word_perplexity=2000.0)
    (comparison,) = compare_scores([make_run("one", make_perplexity()), make_run("other", other)])
    assert values_by_metric(comparison) == {
        "bits per byte": [1.9875, 1.5],
        "word perplexity": [54276.6, 2000.0],
    }
    for other in (
        make_perplexity(256),
        make_perplexity(stride=64),
        make_perplexity(text_sha256="000000"),
    ):
        runs = make_run("one", make_perplexity()), make_run("other", other)
        assert len(compare_scores(runs)) == 2


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"source": "stdlib", "validation_fraction": 0.02}, "stdlib, validation"),
        ({"source": "text", "files": ["a/b.txt", "c.zst"]}, "b.txt, c.zst, validation"),
        ({"source": "text", "files": ["b.txt", "c", "d"]}, "b.txt, c, ..., validation"),
        ({"source": "hub", "name": "owner/books"}, "books, validation"),
        ({"store": "stores/1dea"}, "1dea, validation"),
    ],
)
def test_text_of_a_perplexity_is_named(data: dict[str, Any], name: str) -> None:
    results = make_perplexity()
    results["settings"]["data"] = data
    (comparison,) = compare_scores([make_run("one", results)])
    assert comparison.setting == f"{name}: 3.7 kB; windows of 128 tokens, 128 new"


def test_path_of_a_text_does_not_matter() -> None:
    moved = make_perplexity()
    moved["settings"]["data"] = {"source": "text", "files": ["elsewhere.txt"]}
    (comparison,) = compare_scores([make_run("one", make_perplexity()), make_run("other", moved)])
    assert comparison.evaluated_runs == 2
    assert comparison.setting.startswith("book.txt, validation")


def test_group_without_a_question_count_shows_its_limit() -> None:
    scores = [make_score(task="mmlu", samples=0)]
    full = make_run("full", make_results(scores=scores))
    part = make_run("part", make_results(scores=scores, settings={"limit": 5}))
    comparisons = compare_scores([full, part])
    assert [(each.setting, values_by_metric(each)) for each in comparisons] == [
        ("all questions", {"acc": [0.5, None]}),
        ("limit=5", {"acc": [None, 0.5]}),
    ]


def test_scores_of_older_checkpoints_are_not_mixed_in() -> None:
    older = make_results(
        0, scores=[make_score(value=0.4), make_score(metric="acc_norm", value=0.4)]
    )
    (comparison,) = compare_scores([make_run("one", older, make_results(1))])
    assert values_by_metric(comparison) == {"acc": [0.5]}


def test_last_evaluation_of_the_newest_checkpoint_counts() -> None:
    one = make_run(
        "one",
        make_results(1, "2026-01-02", scores=[make_score(value=0.62)]),
        make_results(1, "2026-01-01", scores=[make_score(value=0.61)]),
        make_results(0, "2026-01-03", scores=[make_score(value=0.4)]),
    )
    (comparison,) = compare_scores([one])
    assert comparison.scores == (
        RunScores(step=1, values={"acc": MetricValue(value=0.62, error=0.04)}),
    )


def test_tasks_are_sorted_by_name_and_number_of_runs() -> None:
    few = make_results(scores=[make_score(samples=20)])
    arc = make_results(scores=[make_score(task="arc_easy")])
    one = make_run("one", make_perplexity(), few, make_results(), arc)
    comparisons = compare_scores([one, make_run("two", make_results())])
    assert [(each.task, each.setting.split()[0]) for each in comparisons] == [
        ("arc_easy", "150"),
        ("piqa", "150"),
        ("piqa", "20"),
        ("perplexity", "book.txt,"),
    ]


def test_table_shows_the_step_of_an_older_checkpoint() -> None:
    unknown = make_results(scores=[make_score(value=None)])
    runs = [make_run("one", make_results(0)), make_run("two"), make_run("three", unknown)]
    (comparison,) = compare_scores(runs)
    console = Console(width=80, record=True, file=StringIO())
    console.print(score_table(comparison, runs))
    title, header, _, *rows = (line for line in console.export_text().splitlines() if line.strip())
    assert title.strip() == "piqa (150 questions, 0 shots)"
    assert header.split() == ["run", "acc", "%"]
    shown = [" ".join(row.split()) for row in rows]
    assert shown == ["one 50.0 ± 4.0", "step 0", "three -"]


def test_json_has_a_value_per_metric_and_run() -> None:
    (comparison,) = compare_scores([make_run("one", make_results()), make_run("two")])
    assert comparison.to_dict() == {
        "task": "piqa",
        "asked": "150 questions, 0 shots",
        "answers": [{"step": 1, "figures": {"acc": {"value": 0.5, "error": 0.04}}}, None],
        "metrics": ("acc",),
    }
