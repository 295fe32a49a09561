"""`tokengrow bench`: tables, rows in a file, and what it refuses."""

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(file.read_text().splitlines()))


def test_a_suite_is_a_table_and_rows(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "here" / "rows.csv"
    done = command("bench", "suite=decode", "fabric=cpu", f"out={out}")
    assert done.status == 0, done.err
    assert "A token of one text" in done.out and "weights read once" in done.out
    assert "small shapes, which say nothing of a GPU" in done.out
    rows = rows_of(out)
    assert [row["peer"] for row in rows][-1] == "tokengrow"
    assert all(row["device"].startswith("CPU (") and row["torch_version"] for row in rows)


def test_rows_are_added_behind_those_that_are_there(command: Command, tmp_path: Path) -> None:
    out = tmp_path / "rows.csv"
    for _ in range(2):
        assert command("bench", "suite=decode", "fabric=cpu", f"out={out}").status == 0
    rows = rows_of(out)
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
        (["suite=steps"], "suite 'steps': did you mean 'step'?"),
        (["suite=step", "models=[150m]"], "models and batches go together: give both, or neither"),
        (
            ["suite=step", "models=[150m]", "batches=[1,2]"],
            "batches has 2 entries for 1 models: give one for each",
        ),
        (["shapes=[[64]]"], "shapes must be pairs [D, N], not [[64]]"),
        (["shapes=[[64,0]]"], "shapes, tokens and batches must be above 0"),
        (["suite=step", "peers=[tokengro]"], "peers 'tokengro': did you mean 'tokengrow'?"),
        (["suite=decode", "peers=[tokengrow]"], "peers are of suite=step: leave them out"),
        (["suite=decode", "models=[2b]"], "model.preset '2b': valid are 150m,"),
    ],
)
def test_wrong_input_is_one_sentence(command: Command, arguments: list[str], message: str) -> None:
    done = command("bench", "fabric=cpu", *arguments)
    assert done.status == 2 and message in done.err
