"""Tasks of the harness on files: the six of the published models, few-shot, what is missing."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import datasets
import pytest
from lm_eval.api.instance import Instance

from tokengrow.errors import UserError
from tokengrow.evaluation.harness_tasks import load_tasks, silence_harness

Asked = Callable[..., Sequence[Instance]]


# What is asked


def test_lambada_asks_for_the_last_word(asked: Asked) -> None:
    requests = asked("lambada_openai")
    assert len(requests) == 40
    context, word = requests[1].args
    assert context.endswith('"I can make it there on my own,')
    assert word == " Shane"


def test_piqa_asks_for_both_solutions_and_takes_its_labels(asked: Asked) -> None:
    first, second = asked("piqa")[:2]
    assert first.args[0] == second.args[0]
    assert first.args[0].startswith("Question: How do I ready a guinea pig cage")
    assert "ripped paper strips" in first.args[1]
    assert "ripped jeans material" in second.args[1]
    assert first.doc["label"] == 0


def test_hellaswag_is_processed_as_the_task_does(asked: Asked) -> None:
    requests = asked("hellaswag")
    assert len(requests) == 3 * 4
    assert requests[0].args == (
        "Baking bread: A baker puts a loaf into the oven. The door is closed. After half an "
        "hour, she",
        " throws the oven out of the window.",
    )
    assert requests[1].args[1] == " paints the loaf with blue paint.", "no [brackets]"


def test_arc_asks_for_as_many_answers_as_there_are(asked: Asked) -> None:
    requests = asked("arc_easy")
    assert [request.args for request in requests[4:]] == [
        ("Question: What do plants need to make sugar?\nAnswer:", f" {answer}")
        for answer in ("light", "noise", "sand")
    ]


def test_winogrande_asks_for_the_end_after_each_beginning(asked: Asked) -> None:
    assert [request.args for request in asked("winogrande")[:2]] == [
        (f"The ball did not fit into the box because the {thing}", " was too large.")
        for thing in ("ball", "box")
    ]


def test_rows_may_be_parquet(task_files: Path, tmp_path: Path) -> None:
    lines = (task_files / "ARC-Easy_test.jsonl").read_text().splitlines()
    rows = datasets.Dataset.from_list([json.loads(line) for line in lines])
    rows.to_parquet(tmp_path / "arc_challenge_test.parquet")
    with silence_harness():
        loaded = load_tasks(["arc_challenge"], tmp_path)
        task = loaded.loaded["tasks"]["arc_challenge"]
        task.build_all_requests()
    assert [request.args[1] for request in task.instances[:2]] == [" a stone", " a snowball"]
    assert list(loaded.files["arc_challenge"]) == ["arc_challenge_test.parquet"]


def test_blank_lines_and_a_byte_order_mark_are_no_rows(task_files: Path, tmp_path: Path) -> None:
    for path in task_files.glob("piqa*"):
        lines = path.read_text().splitlines()
        (tmp_path / path.name).write_text("\ufeff" + "\n\n".join(lines) + "\n\n")
    (there,) = load_tasks(["piqa"], task_files).loaded["tasks"].values()
    (here,) = load_tasks(["piqa"], tmp_path).loaded["tasks"].values()
    assert list(here.eval_docs) == list(there.eval_docs)


def test_examples_come_from_the_training_split(task_files: Path) -> None:
    with silence_harness():
        (task,) = load_tasks(["arc_easy"], task_files, num_fewshot=2).loaded["tasks"].values()
        task.build_all_requests()
    question = task.instances[0].args[0]
    assert question.count("Question: ") == 3
    assert "Question: What falls from clouds?\nAnswer: rain\n\n" in question
    assert question.endswith("Question: Which of these melts in the sun?\nAnswer:")


def test_the_files_are_known_by_their_content(task_files: Path, tmp_path: Path) -> None:
    for path in task_files.glob("piqa*"):
        shutil.copy(path, tmp_path)
    before = load_tasks(["piqa"], tmp_path).files["piqa"]
    assert set(before) == {"piqa_valid.jsonl", "piqa_valid_labels.lst"}
    labels = tmp_path / "piqa_valid_labels.lst"
    labels.write_text("1" + labels.read_text()[1:])
    after = load_tasks(["piqa"], tmp_path).files["piqa"]
    assert {name for name in before if before[name] != after[name]} == {labels.name}


def test_a_tag_stands_for_its_tasks(task_files: Path, tmp_path: Path) -> None:
    for name in ("arc_easy", "arc_challenge"):
        shutil.copy(task_files / "ARC-Easy_test.jsonl", tmp_path / f"{name}_test.jsonl")
    assert set(load_tasks(["ai2_arc"], tmp_path).loaded["tasks"]) == {"arc_easy", "arc_challenge"}


# What is refused


def test_a_file_that_is_missing_is_named(task_files: Path) -> None:
    message = "has no file of sciq's test split: put sciq_test.jsonl there, with the columns of"
    with pytest.raises(UserError, match=message):
        load_tasks(["sciq"], task_files)


def test_examples_are_not_taken_from_the_questions_instead(task_files: Path) -> None:
    with pytest.raises(UserError, match="no file of hellaswag's train split"):
        load_tasks(["hellaswag"], task_files, num_fewshot=1)


def test_a_folder_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere is no folder"):
        load_tasks(["piqa"], tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("piqa_valid.jsonl", '{"goal": 1}\n{"goal"', "piqa_valid.jsonl, line 2: no JSON"),
        ("piqa_valid.jsonl", "[1]\n", "piqa_valid.jsonl, line 1: no mapping of columns"),
        (
            "piqa_valid.jsonl",
            '{"aim": "x"}\n',
            "valid.jsonl has not the columns of baber/piqa: 'goal' is missing",
        ),
        ("piqa_valid.parquet", "PAR2", "cannot read .*piqa_valid.parquet as Parquet"),
    ],
)
def test_a_file_that_is_damaged_is_named(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        load_tasks(["piqa"], tmp_path)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "piqa_valid.jsonl").write_bytes('{"goal": "é"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"piqa_valid\.jsonl is no UTF-8: save it as UTF-8"):
        load_tasks(["piqa"], tmp_path)


def test_a_label_that_is_no_number_is_named(task_files: Path, tmp_path: Path) -> None:
    shutil.copy(task_files / "piqa_valid.jsonl", tmp_path)
    (tmp_path / "piqa_valid_labels.lst").write_text("0\nb\n")
    with pytest.raises(UserError, match=r"piqa_valid_labels\.lst, line 2: 'b' is no number"):
        load_tasks(["piqa"], tmp_path)


def test_labels_of_other_rows_are_refused(task_files: Path, tmp_path: Path) -> None:
    shutil.copy(task_files / "piqa_valid.jsonl", tmp_path)
    (tmp_path / "piqa_valid_labels.lst").write_text("0\n1\n")
    with pytest.raises(UserError, match="2 labels for 40 rows of piqa_valid"):
        load_tasks(["piqa"], tmp_path)


def test_a_task_that_is_not_there_gets_its_nearest_neighbour() -> None:
    with pytest.raises(UserError, match=r"'perplexty'. Did you mean 'perplexity'"):
        load_tasks(["perplexty"])
    with pytest.raises(UserError, match=r"'lambada_openia'. Did you mean 'lambada_openai'"):
        load_tasks(["lambada_openia"])


def test_without_files_and_network_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    message = "Couldn't reach .* give data_dir=DIR that holds piqa_valid.jsonl"
    with pytest.raises(UserError, match=message):
        load_tasks(["piqa"])
