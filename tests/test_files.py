"""Tests of folders that are written atomically."""

from pathlib import Path

import pytest

from tokengrow.errors import UserError
from tokengrow.files import atomic_directory


def write_folder(folder: Path) -> Path:
    """Write a folder with one file, atomically."""
    with atomic_directory(folder) as partial:
        (partial / "a.txt").write_text("a")
    return folder


@pytest.fixture(autouse=True)
def working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Working folder of each test; all paths are relative to it."""
    monkeypatch.chdir(tmp_path)


def test_parents_are_created() -> None:
    assert [path.name for path in write_folder(Path("deep/er/folder")).iterdir()] == ["a.txt"]
    assert [path.name for path in Path("deep/er").iterdir()] == ["folder"]


def test_empty_folder_is_replaced() -> None:
    Path("empty").mkdir()
    assert [path.name for path in write_folder(Path("empty")).iterdir()] == ["a.txt"]


def test_folder_stays_empty_until_completion() -> None:
    Path("empty").mkdir()
    with atomic_directory(Path("empty")) as partial:
        (partial / "a.txt").write_text("a")
        assert not list(Path("empty").iterdir())


def test_existing_content_is_not_overwritten() -> None:
    Path("used").mkdir()
    Path("used/.hidden").touch()
    Path("file").touch()
    Path("link").symlink_to("target", target_is_directory=True)
    Path("target").mkdir()
    for name in ("used", "file", "link"):
        with pytest.raises(
            UserError, match=rf"{name} exists\. Choose another path; nothing is overwritten"
        ):
            write_folder(Path(name))
    assert sorted(path.name for path in Path().iterdir()) == ["file", "link", "target", "used"]


@pytest.mark.parametrize("name", ["new", "deep/er/new", "empty"])
def test_failure_leaves_no_files(name: str) -> None:
    Path("empty").mkdir()
    with pytest.raises(RuntimeError), atomic_directory(Path(name)) as partial:
        (partial / "a.txt").write_text("a")
        raise RuntimeError
    assert [path.name for path in Path().rglob("*")] == ["empty"]


def test_created_parent_with_other_files_is_kept() -> None:
    with pytest.raises(RuntimeError), atomic_directory(Path("deep/er/new")):
        Path("deep/note.txt").touch()
        raise RuntimeError
    assert [path.name for path in Path("deep").iterdir()] == ["note.txt"]
