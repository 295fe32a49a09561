"""`tokengrow report`, and the report with which `tokengrow train` ends."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tokengrow.data.store import TokenStore
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit

Command = Callable[..., Any]


@pytest.fixture(scope="module")
def runs(
    tiny_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A folder with a ladder in `grown`, and its last size alone in `scratch`."""
    folder = tmp_path_factory.mktemp("runs")
    fit(tiny_run(folder / "grown", rungs=(8, 12), steps=3), store)
    fit(tiny_run(folder / "scratch", rungs=(12,), steps=4), store)
    return folder


def test_it_prints_a_line_for_each_run_and_where_the_page_is(
    command: Command, runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "report"
    outcome = command("report", f"runs=[{runs}/grown,{runs}/scratch]", f"out={out}")
    assert (outcome.status, outcome.err) == (0, "")
    assert str(out / "index.html") in outcome.out
    names = [line.split()[0] for line in outcome.out.splitlines() if line.strip()]
    assert names[-3:] == ["grown", "scratch", "report"]
    page = (out / "index.html").read_text()
    assert "Comparison of 2 runs" in page
    with (out / "points.csv").open() as file:
        assert {row["run"] for row in csv.DictReader(file)} == {"grown", "scratch"}


def test_the_folder_of_a_sweep_stands_for_its_runs(
    command: Command, runs: Path, tmp_path: Path
) -> None:
    assert command("report", f"runs=[{runs}]", f"out={tmp_path}/report").status == 0
    facts = json.loads((tmp_path / "report" / "report.json").read_text())
    assert [run["name"] for run in facts["runs"]] == ["grown", "scratch"]


def test_a_report_is_written_anew_where_one_is(
    command: Command, runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    command("report", f"runs=[{runs}]", f"out={out}")
    assert command("report", f"runs=[{runs}/grown]", f"out={out}").status == 0
    assert len(json.loads((out / "report.json").read_text())["runs"]) == 1


def test_what_a_kill_left_of_a_report_gives_way(
    command: Command, runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    command("report", f"runs=[{runs}]", f"out={out}")
    (out / "index.html.123.tmp").write_text("<!doctype")
    assert command("report", f"runs=[{runs}]", f"out={out}").status == 0
    assert not list(out.glob("*.tmp"))


@pytest.mark.parametrize("name", ["thesis.txt", "index.html"])
def test_what_is_no_report_is_not_overwritten(
    name: str, command: Command, runs: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    out.mkdir()
    (out / name).write_text("mine")
    outcome = command("report", f"runs=[{runs}]", f"out={out}")
    assert outcome.status == 2
    assert f"out={out} exists. Choose another out=; nothing is overwritten." in outcome.err
    assert [path.read_text() for path in out.iterdir()] == ["mine"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            "runs=[none]",
            "runs must be directories, got none, which does not exist. Give directories of runs.",
        ),
        ("runs=[]", "runs is empty. Give directories of runs (runs=[DIR,DIR])."),
        ("runs=none", "runs must be a list, got 'none'. Write runs=[none]."),
    ],
)
def test_a_wrong_input_is_one_sentence_and_nothing_is_written(
    given: str,
    said: str,
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    outcome = command("report", given, "out=report")
    assert outcome.status == 2
    assert outcome.err.startswith(f"tokengrow report: {said}")
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_run_is_left_out_and_named(command: Command, runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    for state in (tmp_path / "runs" / "scratch").glob("*/train_state.json"):
        state.write_text("{}")
    outcome = command("report", f"runs=[{tmp_path}/runs]", f"out={tmp_path}/report")
    assert outcome.status == 0
    assert f"Skipped: {tmp_path}/runs/scratch (" in outcome.out


def test_a_run_ends_with_its_report(
    command: Command, tiny_recipe: Callable[[Path, str], None], store: TokenStore, tmp_path: Path
) -> None:
    stages = "stages: {small: {steps: 2}, large: {steps: 2, model: {layers: 3}}}"
    tiny_recipe(tmp_path, f"micro_batch_size: 4\n{stages}\n")
    words = ["--config-dir", str(tmp_path), "recipes=climb", f"store={store.folder}", "fabric=cpu"]
    outcome = command("train", *words, f"out={tmp_path}/run")
    page = tmp_path / "run" / "report" / "index.html"
    assert outcome.status == 0
    assert f"report      {page}" in outcome.out
    assert "small" in page.read_text() and "grown: layers 2 → 3" in page.read_text()
    page.write_text("old")
    command("train", *words, f"out={tmp_path}/run")  # finished: nothing to train
    assert "grown: layers 2 → 3" in page.read_text()


def test_a_report_that_cannot_be_written_does_not_fail_the_run(
    command: Command, tiny_recipe: Callable[[Path, str], None], store: TokenStore, tmp_path: Path
) -> None:
    tiny_recipe(tmp_path, "micro_batch_size: 4\nstages: {small: {steps: 1}}\n")
    words = ["--config-dir", str(tmp_path), "recipes=climb", f"store={store.folder}", "fabric=cpu"]
    command("train", *words, f"out={tmp_path}/run")
    shutil.rmtree(tmp_path / "run" / "report")
    (tmp_path / "run" / "report").write_text("a file of somebody's")
    outcome = command("train", *words, f"out={tmp_path}/run")
    assert outcome.status == 0
    assert "report      not written (File exists). Run `tokengrow report runs=[" in outcome.out
    assert "out=DIR` to write it elsewhere." in outcome.out
    assert (tmp_path / "run" / "report").read_text() == "a file of somebody's"


@pytest.fixture
def evaluated(command: Command, runs: Path, tmp_path: Path) -> Path:
    """The runs, asked for the perplexity of one text; grown at its first rung too."""
    folder, text = shutil.copytree(runs, tmp_path / "runs"), tmp_path / "text.txt"
    text.write_text("def grow(model):\n    return model\n" * 4)
    asked = "tasks=[perplexity]", "data=text", f"data.files=[{text}]", "perplexity.split=all"
    for source in ("grown", "grown/step_00000003", "scratch"):
        outcome = command("eval", f"source={folder / source}", *asked, "fabric=cpu")
        assert outcome.status == 0, outcome.err
    return folder


def test_what_one_run_alone_was_asked_is_on_the_page(
    command: Command, evaluated: Path, tmp_path: Path
) -> None:
    shutil.rmtree(evaluated / "grown" / "eval")
    outcome = command("report", f"runs=[{evaluated}]", f"out={tmp_path}/report")
    assert "scores      1 of a single run; see the page" in outcome.out
    assert "bits per byte" not in outcome.out
    assert "bits per byte" in (tmp_path / "report" / "index.html").read_text()


def found_in(run: Path, step: int) -> dict[str, float]:
    (path,) = (run / "eval").glob(f"step_{step:08d}-*.json")
    found: dict[str, float] = json.loads(path.read_text())["perplexity"]
    return found


def test_what_the_runs_were_asked_is_compared(
    command: Command, evaluated: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    outcome = command("report", f"runs=[{evaluated}]", f"out={out}")
    assert outcome.status == 0, outcome.err
    grown, scratch = found_in(evaluated / "grown", 6), found_in(evaluated / "scratch", 4)
    (scores,) = json.loads((out / "report.json").read_text())["scores"]
    steps = [
        (answer["step"], answer["figures"]["bits per byte"]["value"])
        for answer in scores["answers"]
    ]
    assert steps == [(6, grown["bits_per_byte"]), (4, scratch["bits_per_byte"])]
    for found in grown, scratch:
        shown = f"{found['bits_per_byte']:.4f}"
        assert shown in outcome.out
        assert shown in (out / "index.html").read_text()


def test_a_report_up_to_a_checkpoint_says_nothing_of_later_ones(
    command: Command, evaluated: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    outcome = command("report", f"runs=[{evaluated}/grown/step_00000003]", f"out={out}")
    assert "grown is shown up to step 3, the checkpoint given." in outcome.out
    assert "perplexity (text.txt, all: 136 B;" in outcome.out, "of a single run all is told"
    (scores,) = json.loads((out / "report.json").read_text())["scores"]
    (answer,) = scores["answers"]
    found = answer["figures"]["bits per byte"]["value"]
    assert found == found_in(evaluated / "grown", 3)["bits_per_byte"]


@pytest.mark.parametrize(
    "content",
    ["", '{"checkpoint": {"step"', "[]", '{"mine": 1}', '{"scores": [{"task": "piqa"}]}', None],
)
def test_what_is_no_results_is_named_and_left_out(
    command: Command, runs: Path, tmp_path: Path, content: str | None
) -> None:
    path = shutil.copytree(runs, tmp_path / "runs") / "scratch" / "eval" / "step_00000004-0.json"
    path.parent.mkdir()
    path.mkdir() if content is None else path.write_text(content)
    words = f"runs=[{tmp_path}/runs,{tmp_path}/runs/scratch/step_00000004]"
    outcome = command("report", words, f"out={tmp_path}/report")
    assert outcome.status == 0, outcome.err
    assert outcome.out.count(f"Skipped: {path} (damaged, or not results of") == 1


def test_results_of_weights_that_were_replaced_are_left_out(
    command: Command, evaluated: Path, tmp_path: Path
) -> None:
    (path,) = (evaluated / "scratch" / "eval").glob("*.json")
    results = json.loads(path.read_text())
    results["checkpoint"]["weights_sha256"] = "0" * 64
    path.write_text(json.dumps(results))
    outcome = command("report", f"runs=[{evaluated}]", f"out={tmp_path}/report")
    assert f"Skipped: {path} (its weights differ from those of step 4 on disk" in outcome.out
    (scores,) = json.loads((tmp_path / "report" / "report.json").read_text())["scores"]
    assert scores["answers"][1] is None
