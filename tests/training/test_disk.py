"""Faults of a run directory: full, read-only, in use, or with damaged content."""

import errno
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from killed import same_bits
from rich.console import Console
from victim import Watched

from tokengrow.checkpoint.layout import COMPLETE, OPTIMIZER, TRAIN_STATE, WEIGHTS, find_checkpoints
from tokengrow.checkpoint.schema import TrainState
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.training import checkpoint_writer
from tokengrow.training.config import TrainConfig
from tokengrow.training.resume import RECORDS
from tokengrow.training.trainer import fit

Runs = Callable[..., TrainConfig]

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]
"""Command that runs another one in a namespace where mounting needs no privileges."""


def can_mount() -> bool:
    try:
        return subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


needs_mounts = pytest.mark.skipif(not can_mount(), reason="needs a mount namespace of its own")


def mounted(mount: str, arguments: list[str], then: str = "true") -> subprocess.CompletedProcess:
    """Run the command in a private mount namespace, and a line of shell after it."""
    script = f'set -e; {mount}; status=0; "$@" || status=$?; {then}; exit $status'
    python = [sys.executable, "-m", "tokengrow", *arguments]
    return subprocess.run(
        [*NAMESPACE, "sh", "-c", script, "sh", *python], capture_output=True, text=True, timeout=300
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


# Full


@needs_mounts
@pytest.mark.fault(
    "the disk is full",
    "a tmpfs with room for one checkpoint and a half",
    "training goes on; a stage's last save ends it with 2; older checkpoints whole; the same final "
    "bits on a larger disk",
)
def test_full_disk_stops_only_at_end_of_stage(climb: Any, tmp_path: Path) -> None:
    one = sum(file.stat().st_size for file in find_checkpoints(climb.whole)[0].iterdir())
    disk, kept = tmp_path / "disk", tmp_path / "kept"
    disk.mkdir()
    arguments = climb.arguments(disk / "run")
    mount = f"mount -t tmpfs -o size={one * 3 // 2} none {disk}"
    done = mounted(mount, arguments, then=f"cp -a {disk}/run {kept}")
    assert done.returncode == 2, done.stderr
    (warned,) = (line for line in done.stdout.splitlines() if "cannot write" in line)
    assert warned.startswith(f"cannot write {disk}/run/step_00000010 (No space left on device")
    assert warned.endswith(f"the same command resumes from {disk}/run/step_00000005")
    (said,) = done.stderr.splitlines()
    assert said.startswith(f"tokengrow train: cannot write {disk}/run/step_00000012 (No space")
    assert f"Free disk space; then the same command resumes from {disk}/run/step_0" in said
    assert "step 12/12" in done.stdout
    assert [folder.name for folder in find_checkpoints(kept)] == ["step_00000005"]
    assert load_checkpoint(kept).step == 5
    assert not list(kept.glob(".*")), "half a checkpoint takes no room"

    assert Watched().run(climb.arguments(kept), tmp_path / "log") == 0
    assert climb.ended_as_whole(kept)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_save_on_full_disk_does_not_change_training(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, number: int
) -> None:
    save, said = checkpoint_writer.save_checkpoint, io.StringIO()

    def full(folder: Path, checkpoint: Checkpoint) -> None:
        if checkpoint.step == 4:
            raise OSError(number, os.strerror(number))
        save(folder, checkpoint)

    whole = fit(tiny_run(tmp_path / "whole", rungs=(8,)), store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_writer, "save_checkpoint", full)
        done = fit(tiny_run(tmp_path / "run", rungs=(8,)), store, Console(file=said))
    assert same_bits(done, whole)
    assert "starts over, because no checkpoint is complete yet" in said.getvalue()


@pytest.mark.parametrize("room", [True, False])
def test_a_save_has_been_made_if_there_was_room_for_it(
    tiny_run: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: bool
) -> None:
    """SIGTERM right after a started save: a failed save is repeated."""
    save = checkpoint_writer.save_checkpoint

    def slow(folder: Path, checkpoint: Checkpoint) -> None:
        time.sleep(0.05)
        if not room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(folder, checkpoint)

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", slow)
    model = TokenFormer(tiny_run(tmp_path).stages[0].model)
    checkpoint = replace(Checkpoint.of(model), train_state=TrainState("tokens", step=4))
    with checkpoint_writer.CheckpointWriter(tmp_path, 2, Console(quiet=True)) as kept:
        kept.save(checkpoint, set(), required=False)
        assert kept.has(4) == room


def test_an_error_of_another_kind_ends_the_run(
    tiny_run: Runs, store: TokenStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(checkpoint_writer, "save_checkpoint", broken)
    with pytest.raises(OSError, match="Input/output error"):
        fit(tiny_run(tmp_path / "run", rungs=(8,)), store)


# Read-only, or taken


@needs_mounts
@pytest.mark.fault("the run's folder is read-only", "a read-only mount", "refused with 2")
def test_a_read_only_folder_is_refused_in_one_sentence(climb: Any, tmp_path: Path) -> None:
    out = shutil.copytree(climb.whole, tmp_path / "run")
    shutil.rmtree(find_checkpoints(out)[-1])  # there is something left to train
    before = contents(out)
    mount = f"mount --bind {out} {out}; mount -o remount,bind,ro {out}"
    done = mounted(mount, climb.arguments(out))
    assert done.stderr == (
        f"tokengrow train: out={out} is not writable (Read-only file system). Choose another "
        "out=.\n"
    )
    assert done.returncode == 2
    assert contents(out) == before


@pytest.mark.fault(
    "two runs in one folder", "the first one in a step", "the second: refused with 2"
)
def test_second_run_in_one_directory_is_refused(climb: Any, tmp_path: Path) -> None:
    out, statuses = tmp_path / "run", []

    def joined(first: int) -> None:
        os.kill(first, signal.SIGSTOP)  # it is in the middle of a step for as long as this takes
        before = contents(out)
        statuses.append(Watched().run(climb.arguments(out), tmp_path / "second"))
        assert contents(out) == before
        os.kill(first, signal.SIGCONT)

    assert Watched().run(climb.arguments(out), tmp_path / "log", "step", 8, then=joined) == 0
    assert statuses == [2]
    assert (tmp_path / "second").read_text() == (
        f"tokengrow train: out={out} is in use: another process trains this run. Wait for it, or "
        "choose another out=.\n"
    )
    assert climb.ended_as_whole(out)


# Damaged


def truncated(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def flipped(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = {
    "a checkpoint's weights are truncated": (truncated, WEIGHTS, "bytes, got "),
    "a byte of a checkpoint's weights is flipped": (flipped, WEIGHTS, "is damaged: its SHA-256"),
    "a byte of a checkpoint's moments is flipped": (flipped, OPTIMIZER, "is damaged: its SHA-256"),
    "a checkpoint's moments are missing": (Path.unlink, OPTIMIZER, "is missing"),
    "a checkpoint's train_state.json is truncated": (truncated, TRAIN_STATE, "bytes, got "),
    "a checkpoint's COMPLETE is truncated": (truncated, COMPLETE, "is damaged"),
    "a checkpoint's COMPLETE is missing": (Path.unlink, COMPLETE, None),
}
ALSO_FAST = ("a byte of a checkpoint's weights is flipped", "a checkpoint's COMPLETE is missing")
"""Faults in `make test`; the tests of the store cover all of them."""


@pytest.mark.parametrize(
    ("damage", "name", "said"),
    [
        pytest.param(
            *values,
            marks=[
                pytest.mark.fault(
                    what,
                    "on the disk, between two commands",
                    "named, set aside; the same final bits",
                ),
                *([] if what in ALSO_FAST else [pytest.mark.slow]),
            ],
            id=what,
        )
        for what, values in DAMAGES.items()
    ],
)
def test_damaged_checkpoint_is_quarantined_and_run_resumes(
    climb: Any,
    tmp_path: Path,
    damage: Callable[[Path], None],
    name: str,
    said: str | None,
) -> None:
    out = shutil.copytree(climb.whole, tmp_path / "run")
    folder = find_checkpoints(out)[-1]
    damage(folder / name)
    damaged = contents(folder)
    assert Watched().run(climb.arguments(out), tmp_path / "log") == 0
    lines = (tmp_path / "log").read_text().splitlines()
    assert f"damaged checkpoint renamed: {folder}.damaged" in lines
    if said is not None:
        (named,) = (line for line in lines if line.startswith(f"{folder / name} "))
        assert said in named and named.endswith("Trying the previous one.")
    assert contents(folder.with_name(f"{folder.name}.damaged")) == damaged
    assert climb.ended_as_whole(out)


# What a kill leaves


@pytest.mark.parametrize("name", RECORDS)
def test_half_a_record_is_overlooked_and_cleared_up(
    name: str, tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    run = tiny_run(tmp_path / "run", rungs=(8,), steps=1, resume="never")
    (tmp_path / "run").mkdir()
    leftover = tmp_path / "run" / f"{name}.123.tmp"
    leftover.write_text("out: ru")
    fit(run, store)
    assert not leftover.exists()


def test_somebody_elses_temporary_file_is_not(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tmp").write_text("mine")
    with pytest.raises(UserError, match="holds files that are not a run"):
        fit(tiny_run(tmp_path / "run", rungs=(8,), steps=1), store)
    assert (tmp_path / "run" / "thesis.tmp").read_text() == "mine"


def test_partial_checkpoint_of_unsaved_step_is_removed(
    tiny_run: Runs, store: TokenStore, tmp_path: Path
) -> None:
    fit(tiny_run(tmp_path / "run", rungs=(8,), steps=1), store)
    half = tmp_path / "run" / ".step_00000099.partial"
    half.mkdir()
    (half / WEIGHTS).write_bytes(b"half")
    fit(tiny_run(tmp_path / "run", rungs=(8,), steps=1), store)
    assert not half.exists()
