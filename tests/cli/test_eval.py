"""`tokengrow eval`: tables, the file of results, what is not asked again, the harness's own
command line."""

import json
import re
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.evaluation import harness_cli
from tokengrow.evaluation.harness import TokengrowLM
from tokengrow.evaluation.published_scores import METRICS
from tokengrow.model.architectures import build_model
from tokengrow.model.transformer import TransformerConfig

Command = Callable[..., Any]
KilledAfter = Callable[[int], AbstractContextManager[None]]

DATA = Path(__file__).parents[1] / "evaluation" / "data"
"""The first 40 questions of LAMBADA and PIQA, and a few by hand of other tasks."""

LAMBADA = ("tasks=[lambada_openai]", f"data_dir={DATA}", "fabric=cpu")


@pytest.fixture
def copied(source: Path, tmp_path: Path) -> Path:
    """The session's checkpoint, in a run of the test's own."""
    return save_checkpoint(tmp_path / "run" / source.name, load_checkpoint(source))


def results(outcome: Any) -> dict[str, Any]:
    assert outcome.status == 0, outcome.err
    path = Path(re.findall(r"results  (.+)", outcome.out)[-1])
    return json.loads(path.read_text())


def test_tasks_are_a_table_beside_the_published_model(
    command: Command, source: Path, tmp_path: Path
) -> None:
    tasks = "tasks=[lambada_openai,piqa,hellaswag,arc_easy,winogrande]"
    outcome = command(
        "eval", f"source={source}", tasks, f"data_dir={DATA}", "fabric=cpu", f"out={tmp_path}"
    )
    found = results(outcome)
    rows = [line.split() for line in outcome.out.splitlines()]
    for task in ("lambada_openai", "piqa", "hellaswag", "arc_easy", "winogrande"):
        assert any(row[:1] == [task] for row in rows), task
    table = outcome.out[outcome.out.index("Tasks\n") : outcome.out.index("TokenFormer-150M:")]
    assert max(map(len, table.splitlines())) <= 80
    assert "the nearest published size, arXiv 2410.23168, Table 1" in outcome.out
    scores = {(score["task"], score["metric"]): score for score in found["scores"]}
    assert set(METRICS) - set(scores) == {("arc_challenge", "acc_norm")}
    lambada = scores["lambada_openai", "acc"]
    assert (lambada["samples"], lambada["shots"], lambada["version"]) == (40, 0, 1.0)
    assert 0 <= lambada["value"] <= 1


def test_the_file_says_what_was_asked_of_what_and_where(
    command: Command, source: Path, tmp_path: Path
) -> None:
    outcome = command("eval", f"source={source.parent}", *LAMBADA, "limit=5", f"out={tmp_path}")
    found = results(outcome)
    assert found["checkpoint"]["folder"] == str(source)
    assert found["checkpoint"]["weights_sha256"] in (source / "COMPLETE").read_text()
    assert repr(found["settings"]["limit"]) == "5"
    assert list(found["settings"]["files"]["lambada_openai"]) == ["lambada_test.jsonl"]
    assert found["ran"]["processes"] == 1
    assert found["settings"]["lm_eval"] == version("lm_eval")
    assert found["ran"]["versions"]["torch"] == torch.__version__


def test_a_run_is_evaluated_in_a_folder_of_its_own(command: Command, copied: Path) -> None:
    found = results(command("eval", f"source={copied.parent}", *LAMBADA, "limit=2"))
    (file,) = (copied.parent / "eval").glob("*.json")
    assert json.loads(file.read_text()) == found
    assert file.name.startswith(f"{copied.name}-")


def test_a_bare_checkpoint_is_evaluated_beside_itself(
    command: Command, copied: Path, tmp_path: Path
) -> None:
    bare = copied.rename(tmp_path / "model")
    results(command("eval", f"source={bare}", *LAMBADA, "limit=2"))
    assert list((tmp_path / "model-eval").glob("model-*.json"))


def test_the_same_again_asks_nothing(
    command: Command, source: Path, tmp_path: Path, batches: list[int]
) -> None:
    words = ("eval", f"source={source}", *LAMBADA, "limit=6", f"out={tmp_path}")
    first = command(*words)
    asked = len(batches)
    again = command(*words)
    assert asked > 0
    assert len(batches) == asked
    assert "results already exist; skipping evaluation" in again.err
    assert results(first) == results(again)


def test_another_harness_is_asked_anew(
    command: Command, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("eval", f"source={source}", *LAMBADA, "limit=2", f"out={tmp_path}")
    results(command(*words))
    monkeypatch.setattr("tokengrow.cli.eval.version", lambda _: "0.4.99")
    assert results(command(*words))["settings"]["lm_eval"] == "0.4.99"
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_more_questions_are_another_file_and_ask_only_for_what_is_new(
    command: Command, source: Path, tmp_path: Path, batches: list[int]
) -> None:
    words = ("eval", f"source={source}", *LAMBADA, f"out={tmp_path}", "batch_size=1")
    results(command(*words, "limit=6"))
    assert len(batches) == 6
    found = results(command(*words, "limit=10"))
    assert len(batches) == 10
    assert found["scores"][0]["samples"] == 10
    assert len(list(tmp_path.glob("*.json"))) == 2


def test_after_a_kill_the_rest_is_asked(
    command: Command, source: Path, tmp_path: Path, batches: list[int], killed_after: KilledAfter
) -> None:
    words = ("eval", f"source={source}", *LAMBADA, "limit=9", "batch_size=1")
    with killed_after(4):
        assert command(*words, f"out={tmp_path / 'killed'}").status == 130
    assert not list((tmp_path / "killed").glob("*.json"))
    batches.clear()
    resumed = command(*words, f"out={tmp_path / 'killed'}")
    assert len(batches) == 9 - 4
    assert "answers: 9, 4 already done" in resumed.err
    whole = command(*words, f"out={tmp_path / 'whole'}")
    assert results(resumed)["scores"] == results(whole)["scores"]


def test_other_weights_are_asked_anew(
    command: Command, copied: Path, tmp_path: Path, batches: list[int]
) -> None:
    words = (*LAMBADA, "limit=4", "batch_size=1", f"out={tmp_path / 'out'}")
    results(command("eval", f"source={copied}", *words))
    checkpoint = load_checkpoint(copied)
    weights = {**checkpoint.weights, "final_norm.bias": checkpoint.weights["final_norm.bias"] + 1}
    changed = replace(checkpoint, weights=weights)
    other = save_checkpoint(tmp_path / "other" / copied.name, changed)
    results(command("eval", f"source={other}", *words))
    assert len(batches) == 2 * 4
    assert len(list((tmp_path / "out").glob("*.json"))) == 2


def test_a_transformer_is_asked_the_same(
    command: Command,
    source: Path,
    tiny_transformer: Callable[..., TransformerConfig],
    tmp_path: Path,
) -> None:
    model = build_model(tiny_transformer())
    words = {key: getattr(load_checkpoint(source), key) for key in ("tokenizer", "end_of_text")}
    folder = save_checkpoint(tmp_path / "transformer", replace(Checkpoint.of(model), **words))
    found = results(command("eval", f"source={folder}", *LAMBADA, "limit=4"))
    assert found["checkpoint"]["parameters"] == model.config.num_parameters()
    assert found["scores"][0]["samples"] == 4


def test_perplexity_is_one_of_the_tasks(command: Command, source: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("import os\n\nprint(os.getcwd())\n")
    outcome = command(
        "eval",
        f"source={source}",
        "tasks=[perplexity]",
        "data=text",
        f"data.files=[{text}]",
        "perplexity.split=all",
        "fabric=cpu",
        f"out={tmp_path / 'out'}",
    )
    assert outcome.status == 0
    assert "bits per byte" in outcome.out
    path = Path(re.findall(r"results  (.+)", outcome.out)[-1])
    found = json.loads(path.read_text())
    assert found["perplexity"]["bytes"] == len(text.read_bytes())
    assert "scores" not in found


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tasks=[]"], "tasks is empty"),
        (
            ["tasks=[piqa,piqa]"],
            "tasks must be different, got piqa, piqa. Remove the repeated one.",
        ),
        (["tasks=[piqa]", "limit=0"], "limit must be a number above 0, got 0."),
        (["tasks=[piqa]", "limit=inf"], "limit must be a number above 0, got inf."),
        (
            ["tasks=[perplexity]", "limit=0.5"],
            "limit must be a whole number of documents for perplexity, got a fraction.",
        ),
        (["tasks=[piqa]", "num_fewshot=-1"], "num_fewshot must be 0 or more, got -1."),
        (["tasks=[piqa]", "batch_size=many"], "batch_size must be auto or a number above 0"),
        (
            ["tasks=[piqa]", "fabric=fsdp2"],
            "fabric.strategy must be auto or ddp, got fsdp2: every device holds the full model. "
            "Set fabric=ddp.",
        ),
        (["tasks=[piqa]", "data_dir=nowhere"], "data_dir must be a directory, got nowhere"),
        (["tasks=[piqa]", "limt=4"], "Unknown key limt. Did you mean 'limit'?"),
    ],
)
def test_wrong_input_is_one_sentence(
    command: Command, source: Path, tmp_path: Path, words: list[str], message: str
) -> None:
    outcome = command("eval", f"source={source}", f"out={tmp_path / 'out'}", *words)
    assert outcome.status == 2
    assert outcome.err.splitlines()[-1].startswith(f"tokengrow eval: {message}")
    assert not (tmp_path / "out").exists()


def test_without_the_extra_its_name_is_told(
    command: Command, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tokengrow.cli.eval.find_spec", lambda _: None)
    outcome = command("eval", f"source={source}", "tasks=[piqa]")
    assert outcome.status == 2
    assert "pip install 'tokengrow[eval]'" in outcome.err


# The harness's own command line

OWN_TASK = """\
task: last_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood
doc_to_text: "{{{{text.split(' ')[:-1]|join(' ')}}}}"
doc_to_target: "{{{{' '+text.split(' ')[-1]}}}}"
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


def test_the_harness_itself_takes_a_checkpoint(
    program: Callable[..., Any], source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    (tmp_path / "tasks").mkdir()
    task = OWN_TASK.format(file=DATA / "lambada_test.jsonl")
    (tmp_path / "tasks" / "last_words.yaml").write_text(task)
    outcome = program(
        *("--model", "tokengrow", "--model_args", f"source={source},batch_size=8"),
        *("--tasks", "last_words", "--include_path", str(tmp_path / "tasks")),
        *("--device", "cpu", "--limit", "6", "--output_path", str(tmp_path / "out")),
        module="tokengrow.evaluation.harness_cli",
    )
    assert outcome.status == 0, outcome.err
    assert "|last_words|" in outcome.out
    (file,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(file.read_text())["results"]["last_words"]["acc,none"] <= 1


def test_the_harness_itself_is_told_what_is_wrong_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        harness_cli, "cli_evaluate", lambda: TokengrowLM.create_from_arg_string("source=nowhere")
    )
    with pytest.raises(SystemExit, match="2"):
        harness_cli.main()
    assert capsys.readouterr().err.startswith("tokengrow: nowhere does not exist")
