"""`tokengrow bench`: tables, rows in a file, and what it refuses."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.bench import data
from tokengrow.data.corpus import TextCorpus

Command = Callable[..., Any]


def local_rows(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_a_suite_is_a_table_and_rows(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "here" / "rows.csv"
    done = command("bench", "suite=decode", "fabric=cpu", f"out={out}")
    assert done.status == 0, done.err
    assert "A token of one text" in done.out and "weights read once" in done.out
    assert "(small shapes, not comparable with a GPU)" in done.out
    rows = local_rows(out)
    assert [row["peer"] for row in rows][-1] == "tokengrow"
    assert all(row["device"].startswith("CPU (") and row["torch_version"] for row in rows)


def test_the_data_suite_takes_the_text_that_it_is_given(
    command: Command, corpus: TextCorpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"ROUNDS": 2, "RUNS": 2, "MICRO_BATCHES": 2}.items():
        monkeypatch.setattr(data, name, value)
    text = ["data=text", f"data.files={corpus.files}", "tokenizer.vocab_size=300"]
    done = command("bench", "suite=data", *text, f"out={tmp_path / 'rows.csv'}")
    assert done.status == 0, done.err
    assert "Text to tokens, tokens to batches" in done.out and "MB/s" in done.out
    assert "small shapes" not in done.out
    rows = local_rows(tmp_path / "rows.csv")
    assert rows[0]["peer"].startswith("tokenizers ") and rows[0]["against_limit"] == "1.0"
    assert {row["unit"] for row in rows} == {"MB/s", "M tokens/s"}


def test_rows_are_added_behind_those_that_are_there(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    for _ in range(2):
        assert command("bench", "suite=decode", "fabric=cpu", f"out={out}").status == 0
    rows = local_rows(out)
    assert len(rows) == 2 * len({row["peer"] for row in rows})


def test_a_file_of_something_else_is_left_alone(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "notes.csv"
    out.write_text("mine\n")
    done = command("bench", "fabric=cpu", f"out={out}")
    assert done.status == 2
    assert f"out={out} holds something that bench did not write: choose another out=" in done.err
    assert out.read_text() == "mine\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["suite=steps"], "Unknown suite=steps. Did you mean 'step'?"),
        (
            ["suite=step", "models=[150m]"],
            "models and batches must both be set, or neither. Set the other one.",
        ),
        (
            ["suite=step", "models=[150m]", "batches=[1,2]"],
            "batches must have one entry per model (1), got 2.",
        ),
        (["shapes=[[64]]"], "shapes must be pairs [D, N], got [[64]]."),
        (["shapes=[[64,0]]"], "shapes, tokens and batches must be above 0"),
        (["suite=step", "peers=[tokengro]"], "Unknown peer 'tokengro'. Did you mean 'tokengrow'?"),
        (
            ["suite=decode", "peers=[tokengrow]"],
            "peers must be null with suite=decode; only suite=step has peers. Remove it.",
        ),
        (
            ["suite=data", "data=mixture", "data.sources={}"],
            "data must be one text, got a mixture. Give the data= of one of its texts.",
        ),
        (
            ["suite=data", "data=text", "data.files=[no.txt]"],
            "data.files must name text files, got 'no.txt'",
        ),
        (["suite=decode", "models=[2b]"], "model.preset must be one of 150m, 450m,"),
    ],
)
def test_wrong_input_is_one_sentence(command: Command, arguments: list[str], message: str) -> None:
    done = command("bench", "fabric=cpu", *arguments)
    assert done.status == 2 and message in done.err
