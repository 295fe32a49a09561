"""What a report says of evaluations: only figures of the same questions beside each other."""

from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from arms import record
from rich.console import Console

from tokengrow.reports.run_data import RunRecord
from tokengrow.reports.score_comparison import Answer, Figure, Scores, compare_scores, score_table


def evaluation(step: int = 1, began: str = "2026-01-01", **found: Any) -> dict[str, Any]:
    """Results as `tokengrow eval` writes them: of PIQA if nothing else is said."""
    files = {"piqa": {"piqa_valid.jsonl": "93503c"}}
    settings = {"files": files, "lm_eval": "0.4.13", "limit": None, "num_fewshot": None}
    return {
        "checkpoint": {"step": step},
        "settings": {**settings, **found.pop("settings", {})},
        "ran": {"began": began},
        **(found or {"scores": [score()]}),
    }


def score(**changes: Any) -> dict[str, Any]:
    values = {"task": "piqa", "metric": "acc", "value": 0.5, "error": 0.04, "samples": 150}
    return {**values, "shots": 0, "version": 1.0, **changes}


def measured(context_length: int = 128, **changes: Any) -> dict[str, Any]:
    """The results of perplexity, on one text."""
    text = {"bytes": 3664, "tokens": 1196, "text_sha256": "8bb3c4"}
    sums = {**text, "context_length": context_length, "stride": 128}
    ratios = {"bits_per_byte": 1.9875, "word_perplexity": 54276.6, "token_perplexity": 68.058}
    data = {"source": "text", "files": ["books/book.txt"]}
    settings = {"data": data, "perplexity": {"split": "validation"}}
    return evaluation(settings=settings, perplexity={**sums, **ratios, **changes})


def run(name: str, *evaluations: dict[str, Any]) -> RunRecord:
    """A run whose newest checkpoint is that of step 1."""
    return replace(record(name, (1.0, 4.0), (2.0, 3.0)), evaluations=evaluations)


def values(scores: Scores) -> dict[str, list[float | None]]:
    found = [answer.figures if answer else {} for answer in scores.answers]
    return {
        metric: [each[metric].value if metric in each else None for each in found]
        for metric in scores.metrics
    }


def test_runs_that_were_asked_the_same_stand_beside_each_other() -> None:
    both = score(metric="acc_norm", value=0.6)
    one = run("one", evaluation(scores=[score(), both]))
    other = run("other", evaluation(scores=[score(value=0.7), both]))
    (scores,) = compare_scores([one, other])
    assert (scores.task, scores.asked) == ("piqa", "150 questions, 0 shots")
    assert values(scores) == {"acc": [0.5, 0.7], "acc_norm": [0.6, 0.6]}


def test_a_run_that_was_not_asked_has_no_figure() -> None:
    (scores,) = compare_scores([run("one"), run("other", evaluation())])
    assert values(scores) == {"acc": [None, 0.5]}


def test_what_was_asked_otherwise_stands_apart() -> None:
    of_other_files = evaluation(settings={"files": {"piqa": {"piqa_valid.jsonl": "000000"}}})
    for other in (
        evaluation(scores=[score(samples=20)]),
        evaluation(scores=[score(shots=5)]),
        evaluation(scores=[score(version=2.0)]),
        of_other_files,
        evaluation(settings={"lm_eval": "0.4.12"}),
    ):
        apart = compare_scores([run("one", evaluation()), run("other", other)])
        assert [values(scores) for scores in apart] == [{"acc": [0.5, None]}, {"acc": [None, 0.5]}]


def test_files_of_another_task_asked_along_make_no_difference() -> None:
    files = {"piqa": {"piqa_valid.jsonl": "93503c"}, "lambada_openai": {"lambada_test.jsonl": "4a"}}
    other = evaluation(settings={"files": files})
    (scores,) = compare_scores([run("one", evaluation()), run("other", other)])
    assert values(scores) == {"acc": [0.5, 0.5]}


def test_perplexity_compares_over_tokenizers_on_one_text_in_the_same_windows() -> None:
    other = measured(tokens=900, bits_per_byte=1.5, word_perplexity=2000.0)
    (scores,) = compare_scores([run("one", measured()), run("other", other)])
    assert values(scores) == {
        "bits per byte": [1.9875, 1.5],
        "word perplexity": [54276.6, 2000.0],
    }
    for apart in measured(256), measured(stride=64), measured(text_sha256="000000"):
        assert len(compare_scores([run("one", measured()), run("other", apart)])) == 2


@pytest.mark.parametrize(
    ("data", "named"),
    [
        ({"source": "stdlib", "validation_fraction": 0.02}, "stdlib, validation"),
        ({"source": "text", "files": ["a/b.txt", "c.zst"]}, "b.txt, c.zst, validation"),
        ({"source": "text", "files": ["b.txt", "c", "d"]}, "b.txt, c, ..., validation"),
        ({"source": "hub", "name": "owner/books"}, "books, validation"),
        ({"store": "stores/1dea"}, "1dea, validation"),
    ],
)
def test_the_text_of_a_perplexity_is_named(data: dict[str, Any], named: str) -> None:
    results = measured()
    results["settings"]["data"] = data
    (scores,) = compare_scores([run("one", results)])
    assert scores.asked == f"{named}: 3.7 kB; windows of 128 tokens, 128 new"


def test_one_text_in_files_of_another_place_is_the_same_text() -> None:
    moved = measured()
    moved["settings"]["data"] = {"source": "text", "files": ["elsewhere.txt"]}
    (scores,) = compare_scores([run("one", measured()), run("other", moved)])
    assert scores.answered == 2
    assert scores.asked.startswith("book.txt, validation")


def test_a_group_whose_questions_are_not_counted_is_told_by_its_limit() -> None:
    scores = [score(task="mmlu", samples=0)]
    whole = run("whole", evaluation(scores=scores))
    part = run("part", evaluation(scores=scores, settings={"limit": 5}))
    compared = compare_scores([whole, part])
    assert [(each.asked, values(each)) for each in compared] == [
        ("all questions", {"acc": [0.5, None]}),
        ("limit=5", {"acc": [None, 0.5]}),
    ]


def test_what_only_an_older_checkpoint_was_asked_is_not_mixed_in() -> None:
    older = evaluation(0, scores=[score(value=0.4), score(metric="acc_norm", value=0.4)])
    (scores,) = compare_scores([run("one", older, evaluation(1))])
    assert values(scores) == {"acc": [0.5]}


def test_the_newest_checkpoint_counts_and_of_its_evaluations_the_last() -> None:
    one = run(
        "one",
        evaluation(1, "2026-01-02", scores=[score(value=0.62)]),
        evaluation(1, "2026-01-01", scores=[score(value=0.61)]),
        evaluation(0, "2026-01-03", scores=[score(value=0.4)]),
    )
    (scores,) = compare_scores([one])
    assert scores.answers == (Answer(step=1, figures={"acc": Figure(value=0.62, error=0.04)}),)


def test_tasks_come_by_name_and_what_more_were_asked_first() -> None:
    few = evaluation(scores=[score(samples=20)])
    arc = evaluation(scores=[score(task="arc_easy")])
    one, two = run("one", measured(), few, evaluation(), arc), run("two", evaluation())
    scores = compare_scores([one, two])
    assert [(each.task, each.asked.split()[0]) for each in scores] == [
        ("arc_easy", "150"),
        ("piqa", "150"),
        ("piqa", "20"),
        ("perplexity", "book.txt,"),
    ]


def test_a_table_names_the_step_of_a_checkpoint_that_is_not_the_newest() -> None:
    unknown = evaluation(scores=[score(value=None)])
    runs = [run("one", evaluation(0)), run("two"), run("three", unknown)]
    (scores,) = compare_scores(runs)
    console = Console(width=80, record=True, file=StringIO())
    console.print(score_table(scores, runs))
    title, header, _, *rows = (line for line in console.export_text().splitlines() if line.strip())
    assert title.strip() == "piqa (150 questions, 0 shots)"
    assert header.split() == ["run", "acc", "%"]
    shown = [" ".join(row.split()) for row in rows]
    assert shown == ["one 50.0 ± 4.0", "step 0", "three -"]
