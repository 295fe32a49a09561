"""Harness tasks on local files: the six of the published models, few-shot, and wrong files."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pytest
from lm_eval.api.instance import Instance

from tokengrow.errors import UserError
from tokengrow.evaluation.harness_tasks import load_tasks, silence_harness

TaskRequests = Callable[..., Sequence[Instance]]


# Requests


def test_lambada_requests_last_word(task_requests: TaskRequests) -> None:
    requests = task_requests("lambada_openai")
    assert len(requests) == 40
    context, word = requests[1].args
    assert context.endswith('"I can make it there on my own,')
    assert word == " Shane"


def test_piqa_requests_both_solutions_and_reads_labels(task_requests: TaskRequests) -> None:
    first, second = task_requests("piqa")[:2]
    assert first.args[0] == second.args[0]
    assert first.args[0].startswith("Question: How do I ready a guinea pig cage")
    assert "ripped paper strips" in first.args[1]
    assert "ripped jeans material" in second.args[1]
    assert first.doc["label"] == 0


def test_hellaswag_rows_are_processed_by_the_task(task_requests: TaskRequests) -> None:
    requests = task_requests("hellaswag")
    assert len(requests) == 3 * 4
    assert requests[0].args == (
        "Baking bread: A baker puts a loaf into the oven. The door is closed. After half an "
        "hour, she",
        " throws the oven out of the window.",
    )
    assert requests[1].args[1] == " paints the loaf with blue paint.", "no [brackets]"


def test_arc_requests_each_answer(task_requests: TaskRequests) -> None:
    requests = task_requests("arc_easy")
    assert [request.args for request in requests[4:]] == [
        ("Question: What do plants need to make sugar?\nAnswer:", f" {answer}")
        for answer in ("light", "noise", "sand")
    ]


def test_winogrande_requests_ending_after_each_option(task_requests: TaskRequests) -> None:
    assert [request.args for request in task_requests("winogrande")[:2]] == [
        (f"The ball did not fit into the box because the {thing}", " was too large.")
        for thing in ("ball", "box")
    ]


def test_rows_are_read_from_parquet(task_files: Path, tmp_path: Path) -> None:
    lines = (task_files / "ARC-Easy_test.jsonl").read_text().splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    rows.to_parquet(tmp_path / "arc_challenge_test.parquet")
    with silence_harness():
        loaded = load_tasks(["arc_challenge"], tmp_path)
        task = loaded.loaded["tasks"]["arc_challenge"]
        task.build_all_requests()
    assert [request.args[1] for request in task.instances[:2]] == [" a stone", " a snowball"]
    assert list(loaded.files["arc_challenge"]) == ["arc_challenge_test.parquet"]


def test_blank_lines_and_byte_order_mark_are_skipped(task_files: Path, tmp_path: Path) -> None:
    for path in task_files.glob("piqa*"):
        lines = path.read_text().splitlines()
        (tmp_path / path.name).write_text("\ufeff" + "\n\n".join(lines) + "\n\n")
    (original,) = load_tasks(["piqa"], task_files).loaded["tasks"].values()
    (spaced,) = load_tasks(["piqa"], tmp_path).loaded["tasks"].values()
    assert list(spaced.eval_docs) == list(original.eval_docs)


def test_examples_come_from_training_split(task_files: Path) -> None:
    with silence_harness():
        (task,) = load_tasks(["arc_easy"], task_files, num_fewshot=2).loaded["tasks"].values()
        task.build_all_requests()
    question = task.instances[0].args[0]
    assert question.count("Question: ") == 3
    assert "Question: What falls from clouds?\nAnswer: rain\n\n" in question
    assert question.endswith("Question: Which of these melts in the sun?\nAnswer:")


def test_file_hashes_depend_on_content(task_files: Path, tmp_path: Path) -> None:
    for path in task_files.glob("piqa*"):
        shutil.copy(path, tmp_path)
    before = load_tasks(["piqa"], tmp_path).files["piqa"]
    assert set(before) == {"piqa_valid.jsonl", "piqa_valid_labels.lst"}
    labels = tmp_path / "piqa_valid_labels.lst"
    labels.write_text("1" + labels.read_text()[1:])
    after = load_tasks(["piqa"], tmp_path).files["piqa"]
    assert {name for name in before if before[name] != after[name]} == {labels.name}


def test_tag_loads_its_tasks(task_files: Path, tmp_path: Path) -> None:
    for name in ("arc_easy", "arc_challenge"):
        shutil.copy(task_files / "ARC-Easy_test.jsonl", tmp_path / f"{name}_test.jsonl")
    assert set(load_tasks(["ai2_arc"], tmp_path).loaded["tasks"]) == {"arc_easy", "arc_challenge"}


# Errors


def test_error_names_missing_file(task_files: Path) -> None:
    message = (
        "a file of sciq's test split, got none .* Put sciq_test.jsonl there, with the columns of"
    )
    with pytest.raises(UserError, match=message):
        load_tasks(["sciq"], task_files)


def test_missing_examples_are_refused(task_files: Path) -> None:
    with pytest.raises(UserError, match="a file of hellaswag's train split, got none"):
        load_tasks(["hellaswag"], task_files, num_fewshot=1)


def test_error_names_missing_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data_dir must be a directory, got .*nowhere"):
        load_tasks(["piqa"], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa_valid.jsonl", '{"goal": 1}\n{"goal"', "piqa_valid.jsonl, line 2 must be JSON"),
        (
            "piqa_valid.jsonl",
            "[1]\n",
            "piqa_valid.jsonl, line 1 must be a mapping of columns, got list",
        ),
        (
            "piqa_valid.jsonl",
            '{"aim": "x"}\n',
            "valid.jsonl must have the columns of baber/piqa. .* 'goal' is missing",
        ),
        (
            "piqa_valid.parquet",
            "PAR2",
            "readable Parquet files. Reading .*piqa_valid.parquet failed",
        ),
    ],
)
def test_error_names_damaged_file(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tasks(["piqa"], tmp_path)


def test_error_names_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "piqa_valid.jsonl").write_bytes('{"goal": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"piqa_valid\.jsonl must be UTF-8\. Save it as UTF-8"):
        load_tasks(["piqa"], tmp_path)


def test_error_names_label_that_is_not_a_number(task_files: Path, tmp_path: Path) -> None:
    shutil.copy(task_files / "piqa_valid.jsonl", tmp_path)
    (tmp_path / "piqa_valid_labels.lst").write_text("0\nb\n")
    with pytest.raises(
        UserError, match=r"piqa_valid_labels\.lst, line 2 must be a whole number, got 'b'"
    ):
        load_tasks(["piqa"], tmp_path)


def test_wrong_number_of_labels_is_refused(task_files: Path, tmp_path: Path) -> None:
    shutil.copy(task_files / "piqa_valid.jsonl", tmp_path)
    (tmp_path / "piqa_valid_labels.lst").write_text("0\n1\n")
    with pytest.raises(
        UserError, match=r"got 2 labels in .*piqa_valid_labels\.lst for 40 rows of piqa_valid"
    ):
        load_tasks(["piqa"], tmp_path)


def test_unknown_task_suggests_nearest_name() -> None:
    with pytest.raises(UserError, match=r"'perplexty'\. Did you mean 'perplexity'"):
        load_tasks(["perplexty"])
    with pytest.raises(UserError, match=r"'lambada_openia'\. Did you mean 'lambada_openai'"):
        load_tasks(["lambada_openia"])


def test_error_without_network_names_data_dir(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = "Couldn't reach .* Set data_dir=DIR to a directory with piqa_valid.jsonl"
    with pytest.raises(UserError, match=message):
        load_tasks(["piqa"])
