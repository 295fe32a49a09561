"""The language rules of CONTRIBUTING.md hold in code, YAML and Markdown."""

from pathlib import Path

import pytest
from prose import EXCEPTIONS, PENDING, ROOT, check, check_python, tracked_files

FILES = [
    path for path in tracked_files() if not path.relative_to(ROOT).as_posix().startswith(PENDING)
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose(path: Path) -> None:
    assert [str(violation) for violation in check(path)] == []


def test_files_are_found() -> None:
    names = {path.relative_to(ROOT).as_posix() for path in FILES}
    assert {"README.md", "conf/run.yaml", "tokengrow/training/trainer.py"} <= names


def test_exceptions_name_existing_files() -> None:
    assert all((ROOT / name).exists() for name in EXCEPTIONS)


@pytest.mark.parametrize(
    "source",
    [
        '"""What a run is."""',
        'def f():\n    """The newest checkpoint."""',
        "x = 1  # the run goes on",
        'raise ValueError("the file says nothing of it")',
        'X = 1\n"""Of the model."""',
    ],
)
def test_banned_words_are_found(source: str) -> None:
    assert list(check_python(Path("a.py"), source))


def test_plain_english_passes() -> None:
    source = (
        'def f():\n    """Return the newest checkpoint."""\n    raise ValueError("x is missing")'
    )
    assert not list(check_python(Path("a.py"), source))
