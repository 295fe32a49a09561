"""Several processes that evaluate one checkpoint find what one finds."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ranks import TOKENGROW, TORCHRUN, run
from rich.console import Console

from tokengrow.cli.eval import EvalArguments, evaluate
from tokengrow.evaluation.scoring import Scorer
from tokengrow.parsing import parse_dataclass

pytestmark = pytest.mark.dist

DATA = Path(__file__).parents[1] / "evaluation" / "data"


def words(source: Path, out: Path, *more: str) -> list[str]:
    tasks = ["tasks=[lambada_openai,piqa]", f"data_dir={DATA}", "batch_size=1"]
    return [f"source={source}", *tasks, "fabric.accelerator=cpu", f"out={out}", *more]


@pytest.mark.parametrize(
    ("launcher", "more"),
    [
        pytest.param(TOKENGROW, ("fabric=ddp", "fabric.devices=2"), id="fabric"),
        pytest.param((*TORCHRUN, "--nproc-per-node=3", "-m", "tokengrow"), (), id="torchrun"),
    ],
)
def test_several_processes_find_what_one_finds_and_need_not_ask_again(
    composed: Callable[..., dict[str, Any]],
    source: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    launcher: tuple[str, ...],
    more: tuple[str, ...],
) -> None:
    def alone(*arguments: str) -> dict[str, Any]:
        given = parse_dataclass(EvalArguments, composed("eval", *arguments))
        return evaluate(given, Console(quiet=True))[0]

    ended = run([*launcher, "eval", *words(source, tmp_path / "out", *more)], tmp_path)
    assert ended.status == 0, ended.said
    assert ended.said.count("results  ") == 1, "one process tells it"
    (file,) = (tmp_path / "out").glob("*.json")
    found, expected = json.loads(file.read_text()), alone(*words(source, tmp_path / "alone"))
    assert found["ran"]["processes"] == (2 if more else 3)
    assert found["settings"] == expected["settings"]
    for together, one in zip(found["scores"], expected["scores"], strict=True):
        # The documents come in another order, so sums over them round otherwise; the error of a
        # perplexity is that of samples drawn from them.
        assert together.pop("value") == pytest.approx(one.pop("value"), rel=1e-9)
        assert together.pop("error") == pytest.approx(one.pop("error"), rel=0.5)
        assert together == one

    monkeypatch.setattr(Scorer, "_score_batch", None)  # all of it is known, whoever answered
    assert alone(*words(source, tmp_path / "out", "limit=39"))["scores"]
