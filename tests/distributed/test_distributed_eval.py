"""`tokengrow eval` in several processes: the results are those of one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from launchers import TOKENGROW, TORCHRUN, run
from rich.console import Console

from tokengrow.cli.eval import EvalArguments, evaluate
from tokengrow.evaluation.scoring import Scorer
from tokengrow.parsing import parse_dataclass

pytestmark = pytest.mark.dist

DATA = Path(__file__).parents[1] / "evaluation" / "data"


def eval_arguments(source: Path, out: Path, *more: str) -> list[str]:
    tasks = ["tasks=[lambada_openai,piqa]", f"data_dir={DATA}", "batch_size=1"]
    return [f"source={source}", *tasks, "fabric.accelerator=cpu", f"out={out}", *more]


@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        pytest.param(TOKENGROW, ("fabric=ddp", "fabric.devices=2"), id="fabric"),
        pytest.param((*TORCHRUN, "--nproc-per-node=3", "-m", "tokengrow"), (), id="torchrun"),
    ],
)
def test_several_processes_give_the_results_of_one(
    composed: Callable[..., dict[str, Any]],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: tuple[str, ...],
    more: tuple[str, ...],
) -> None:
    def evaluate_in_one_process(*arguments: str) -> dict[str, Any]:
        values = parse_dataclass(EvalArguments, composed("eval", *arguments))
        return evaluate(values, Console(quiet=True))[0]

    out = tmp_path / "out"
    done = run([*launcher, "eval", *eval_arguments(source, out, *more)], tmp_path)
    assert done.returncode == 0, done.output
    assert done.output.count("results  ") == 1, "one process prints it"
    (file,) = out.glob("*.json")
    results = json.loads(file.read_text())
    expected = evaluate_in_one_process(*eval_arguments(source, tmp_path / "single"))
    assert results["ran"]["processes"] == (2 if more else 3)
    assert results["settings"] == expected["settings"]
    for score, reference in zip(results["scores"], expected["scores"], strict=True):
        # The order of documents differs, so sums over them round differently. The error of a
        # perplexity is estimated from random samples of them.
        assert score.pop("value") == pytest.approx(reference.pop("value"), rel=1e-9)
        assert score.pop("error") == pytest.approx(reference.pop("error"), rel=0.5)
        assert score == reference

    monkeypatch.setattr(Scorer, "_score_batch", None)  # all responses of all ranks are cached
    assert evaluate_in_one_process(*eval_arguments(source, out, "limit=39"))["scores"]
