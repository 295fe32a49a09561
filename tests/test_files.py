"""Folders that are there whole or not at all."""

from pathlib import Path

import pytest

from tokengrow.errors import UserError
from tokengrow.files import atomic_directory


def filled(folder: Path) -> Path:
    with atomic_directory(folder) as partial:
        (partial / "a.txt").write_text("a")
    return folder


@pytest.fixture(autouse=True)
def somewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder to stand in; every path below is relative to it."""
    monkeypatch.chdir(tmp_path)


def test_parents_are_made() -> None:
    assert [path.name for path in filled(Path("deep/er/folder")).iterdir()] == ["a.txt"]
    assert [path.name for path in Path("deep/er").iterdir()] == ["folder"]


def test_an_empty_folder_gives_way() -> None:
    Path("empty").mkdir()
    assert [path.name for path in filled(Path("empty")).iterdir()] == ["a.txt"]


def test_until_then_it_stays_as_it_is() -> None:
    Path("empty").mkdir()
    with atomic_directory(Path("empty")) as partial:
        (partial / "a.txt").write_text("a")
        assert not list(Path("empty").iterdir())


def test_a_folder_with_something_in_it_does_not() -> None:
    Path("mine").mkdir()
    Path("mine/.hidden").touch()
    Path("file").touch()
    Path("link").symlink_to("nowhere", target_is_directory=True)
    Path("nowhere").mkdir()
    for name in ("mine", "file", "link"):
        with pytest.raises(UserError, match=f"{name} exists already"):
            filled(Path(name))
    assert sorted(path.name for path in Path().iterdir()) == ["file", "link", "mine", "nowhere"]


@pytest.mark.parametrize("name", ["new", "deep/er/new", "empty"])
def test_what_fails_leaves_nothing_behind(name: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(RuntimeError), atomic_directory(Path(name)) as partial:
        (partial / "a.txt").write_text("a")
        raise RuntimeError
    assert [path.name for path in Path().rglob("*")] == ["empty"]


def test_a_parent_that_it_made_stays_once_somebody_uses_it() -> None:
    with pytest.raises(RuntimeError), atomic_directory(Path("deep/er/new")):
        Path("deep/note.txt").touch()
        raise RuntimeError
    assert [path.name for path in Path("deep").iterdir()] == ["note.txt"]
