"""Records of training sessions in sessions.json."""

import json
import os
import subprocess
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from killed import killed_at

import tokengrow
from tokengrow.checkpoint.layout import SESSIONS
from tokengrow.data.store import TokenStore
from tokengrow.errors import Stopped
from tokengrow.training.config import TrainConfig
from tokengrow.training.trainer import fit
from tokengrow.training.wall_time import git_commit, record_session

Runs = Callable[..., TrainConfig]


def sessions(run: Path) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = json.loads((run / SESSIONS).read_text())
    return loaded


def test_each_session_that_trains_is_recorded(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,))
    with killed_at(4):
        fit(run, store)
    fit(run, store)
    fit(run, store)  # finished: nothing is trained
    first, second = sessions(tmp_path / "run")
    assert (first["first_step"], second["first_step"]) == (0, 4)
    assert (first["outcome"], second["outcome"]) == ("failed", "finished")
    started, ended = (datetime.fromisoformat(second[key]) for key in ("started", "ended"))
    assert started <= ended and started.utcoffset() is not None


def test_a_session_says_what_it_ran_on(tiny_run: Runs, store: TokenStore, tmp_path: Path) -> None:
    fit(tiny_run(tmp_path / "run", rungs=(8,), steps=1), store)
    (session,) = sessions(tmp_path / "run")
    assert session["device"].startswith("CPU (")
    assert (session["processes"], session["precision"]) == (1, "32-true")
    assert session["torch"] == torch.__version__
    assert session["tokengrow"] == tokengrow.__version__
    assert not any(os.uname().nodename == value for value in session.values())


def test_a_killed_session_has_no_end(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,), steps=1)
    seen: list[dict[str, Any]] = []

    def look(*_: Any) -> None:
        seen.extend(sessions(tmp_path / "run"))

    monkeypatch.setattr("tokengrow.training.trainer.Trainer._train_stages", look)
    fit(run, store)
    assert [(each["ended"], each["outcome"]) for each in seen] == [(None, None)]


@pytest.mark.parametrize(
    ("error", "outcome"),
    [(Stopped("so"), "stopped"), (KeyboardInterrupt(), "interrupted"), (OSError(), "failed")],
)
def test_how_a_session_ended(
    error: BaseException,
    outcome: str,
    tiny_run: Runs,
    store: TokenStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def end(*_: Any) -> None:
        raise error

    monkeypatch.setattr("tokengrow.training.trainer.Trainer._train_stages", end)
    with pytest.raises(type(error)):
        fit(tiny_run(tmp_path / "run", rungs=(8,), steps=1), store)
    assert sessions(tmp_path / "run")[0]["outcome"] == outcome


# The commit


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of one commit, nothing changed since."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "code.py").write_text("one")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "-m", "one")
    return folder


def test_the_commit_of_a_checkout_and_whether_its_files_differ(checkout: Path) -> None:
    commit = git(checkout, "rev-parse", "HEAD")
    assert git_commit(checkout) == (commit, False)
    (checkout / "notes.txt").write_text("somebody's")
    assert git_commit(checkout) == (commit, False)
    (checkout / "code.py").write_text("two")
    assert git_commit(checkout) == (commit, True)


def test_package_inside_another_repository_has_no_commit(checkout: Path) -> None:
    package = checkout / "site-packages"
    package.mkdir()
    assert git_commit(package) == (None, None)


def test_without_git_there_is_no_commit(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit(checkout) == (None, None)


def test_a_full_disk_at_the_end_hides_nothing(
    tmp_path: Path, tiny_run: Runs, store: TokenStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_run(tmp_path / "run", rungs=(8,), steps=1), store)
    from tokengrow.training import wall_time as module

    session = module.Session(**sessions(tmp_path / "run")[0])
    with (
        pytest.raises(ValueError, match="what went wrong"),
        record_session(tmp_path / "run", session),
    ):
        monkeypatch.setattr(module, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError()))
        raise ValueError("what went wrong")
