"""The program itself: its help, its verbs, and the command that child processes repeat."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tokengrow import __version__
from tokengrow.cli.main import VERBS, main
from tokengrow.paths import data_root

Program = Callable[..., Any]


def called(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.setattr(sys, "argv", ["tokengrow", *arguments])
    main()
    return capsys.readouterr().out


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_verbs_and_recipes(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = called(arguments, monkeypatch, capsys)
    for verb in ("train", "grow", "plan", "data", "convert", "generate"):
        assert f"  tokengrow {verb} " in text
    recipes = next(line for line in text.splitlines() if line.startswith("recipes:"))
    assert "quickstart" in recipes and "continue" in recipes


def test_the_version_is_the_packages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(["--version"], monkeypatch, capsys) == f"tokengrow {__version__}\n"


@pytest.mark.parametrize(
    ("verb", "said"), [("trian", "Did you mean 'train'?"), ("zzz", ", ".join(VERBS))]
)
def test_an_unknown_verb_is_named_with_the_nearest(
    verb: str,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as leaving:
        called([verb], monkeypatch, capsys)
    assert leaving.value.code == 2
    captured = capsys.readouterr()
    assert captured.err.startswith(f"tokengrow: Unknown verb '{verb}'")
    assert said in captured.err
    assert len(captured.err.splitlines()) == 1
    assert captured.out == ""


def test_every_verb_has_a_config_and_a_module() -> None:
    for verb in VERBS:
        assert (data_root() / "conf" / f"{verb}.yaml").is_file()
        assert find_spec(f"tokengrow.cli.{verb}") is not None


def test_the_program_composes_from_anywhere(program: Program, tmp_path: Path) -> None:
    outcome = program("train", "recipes=quickstart", "--cfg", "job")
    assert outcome.status == 0, outcome.err
    assert "name: quickstart" in outcome.out
    assert list(tmp_path.iterdir()) == []


def test_a_child_process_can_repeat_the_command_without_the_dispatcher(program: Program) -> None:
    # What launches further ranks runs `python -m tokengrow.cli.VERB` with the same overrides.
    outcome = program("recipes=quickstart", "stages.large.steps=7", module="tokengrow.cli.plan")
    assert outcome.status == 0, outcome.err
    assert "large" in outcome.out


def test_wrong_input_to_the_program_is_one_sentence(program: Program, tmp_path: Path) -> None:
    outcome = program("train", "recipes=quickstart", "optm.lr=3")
    assert outcome.status == 2
    assert outcome.out == ""
    assert outcome.err == "tokengrow train: Unknown key optm.lr. Did you mean 'optim.lr'?\n"
    assert list(tmp_path.iterdir()) == []
