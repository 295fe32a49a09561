"""Tests of the wheel: built from the sdist, installed in a clean environment, run from `/`."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib.util import find_spec
from pathlib import Path

import pytest

from tokengrow.checkpoint.store import load_checkpoint
from tokengrow.data.store import TokenStore

REPOSITORY = Path(__file__).resolve().parents[2]


def run(*arguments: str | Path, cwd: str | Path = "/") -> str:
    """Run a program without this process' Python environment; return its stdout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    done = subprocess.run(
        list(map(str, arguments)),
        cwd=cwd,
        env={key: value for key, value in os.environ.items() if key not in hidden},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wheel built from the sdist of this checkout."""
    dist = tmp_path_factory.mktemp("dist")
    isolation = ["--no-isolation"] if find_spec("hatchling") else []
    run(sys.executable, "-m", "build", *isolation, "--outdir", dist, REPOSITORY)
    assert len(list(dist.glob("*.tar.gz"))) == 1
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder `bin` of an environment with the wheel and this environment's dependencies."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", wheel)
    paths = {"base": str(folder), "platbase": str(folder)}
    # This path file adds the packages of the current environment. Path files among them, such as
    # that of the editable install of this checkout, have no effect there.
    packages = Path(sysconfig.get_path("purelib", vars=paths))
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def test_wheel_contains_every_config_and_recipe(wheel: Path) -> None:
    files = set(zipfile.ZipFile(wheel).namelist())
    for root in ("conf", "recipes"):
        for path in (REPOSITORY / root).rglob("*.yaml"):
            assert f"tokengrow/{path.relative_to(REPOSITORY).as_posix()}" in files
    assert "tokengrow/py.typed" in files


def test_wheel_installs_one_package(wheel: Path) -> None:
    names = {name.partition("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {name for name in names if not name.endswith(".dist-info")} == {"tokengrow"}


def test_conf_and_recipes_are_found_in_wheel(installed: Path) -> None:
    code = "import tokengrow.paths; print(tokengrow.paths.data_root())"
    root = Path(run(installed / "python", "-c", code).strip())
    assert root.is_relative_to(installed.parent)
    assert root.name == "tokengrow"


def test_recipe_composes_from_root_folder(installed: Path) -> None:
    config = run(installed / "tokengrow", "train", "recipes=quickstart", "--cfg", "job")
    assert "name: quickstart" in config
    assert "width: 128" in config


def test_dry_run_trains_two_steps_per_stage(
    installed: Path, store: TokenStore, tmp_path: Path
) -> None:
    output = run(
        installed / "tokengrow",
        "train",
        "recipes=quickstart",
        "debug=dry_run",
        "model.vocab_size=512",
        "model.context_length=32",
        "model.layers=1",
        "model.width=32",
        "fabric=cpu",
        f"store={store.folder}",
        f"out={tmp_path / 'run'}",
    )
    assert "small  step 2/2" in output
    assert load_checkpoint(tmp_path / "run").step == 2 * 3
