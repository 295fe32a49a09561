"""Checkpoints on disk: atomic writes, verification, fallback, deletion of old ones."""

import json
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tokengrow.checkpoint import layout, store
from tokengrow.checkpoint.schema import LineageSource, RecordedRun
from tokengrow.checkpoint.store import (
    Checkpoint,
    delete_old_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    quarantine_damaged,
    save_checkpoint,
)
from tokengrow.errors import UserError
from tokengrow.files import sha256
from tokengrow.growth.checkpoint import grow_checkpoint
from tokengrow.growth.plan import plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

Full = Callable[..., Checkpoint]
Sizes = Callable[[int], ModelConfig]
FILES = {
    "model.safetensors",
    "optimizer.safetensors",
    "train_state.json",
    "config.yaml",
    "lineage.json",
    "tokenizer.json",
    "COMPLETE",
}


def same_tensors(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        first[name].dtype == second[name].dtype and torch.equal(first[name], second[name])
        for name in first
    )


def assert_same(found: Checkpoint, saved: Checkpoint) -> None:
    assert found.config == saved.config
    assert same_tensors(found.weights, saved.weights)
    assert same_tensors(found.optimizer, saved.optimizer)
    for part in ("train_state", "run", "lineage", "tokenizer", "end_of_text"):
        assert getattr(found, part) == getattr(saved, part), part


def flip_byte(file: Path, position: int = -1) -> None:
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(content)


@pytest.fixture
def run(tmp_path: Path, full_checkpoint: Full) -> Path:
    """A run's folder with the checkpoints of steps 1, 2 and 3."""
    for step in (1, 2, 3):
        save_checkpoint(tmp_path / "run" / layout.step_folder(step), full_checkpoint(step))
    return tmp_path / "run"


class TestRoundTrip:
    def test_everything_comes_back_bit_for_bit(self, tmp_path: Path, full_checkpoint: Full) -> None:
        folder = save_checkpoint(tmp_path / "step_00000003", full_checkpoint())
        found = load_checkpoint(folder)
        assert_same(found, full_checkpoint())
        assert (found.folder, found.step) == (folder, 3)
        assert {path.name for path in folder.iterdir()} == FILES

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_weights_keep_their_precision(
        self, tmp_path: Path, full_checkpoint: Full, dtype: torch.dtype
    ) -> None:
        weights = {name: t.to(dtype) for name, t in full_checkpoint().weights.items()}
        found = load_checkpoint(
            save_checkpoint(tmp_path / "c", Checkpoint(full_checkpoint().config, weights))
        )
        assert same_tensors(found.weights, weights)
        assert found.model.embedding.weight.dtype == dtype

    def test_a_bare_model_is_a_checkpoint(self, tmp_path: Path, sizes: Sizes) -> None:
        model = TokenFormer(sizes(4))
        found = load_checkpoint(save_checkpoint(tmp_path / "c", model))
        assert same_tensors(found.weights, model.state_dict())
        assert (found.optimizer, found.tokenizer, found.end_of_text, found.step) == (
            {},
            None,
            None,
            0,
        )
        ids = torch.arange(6)[None]
        with torch.no_grad():
            assert torch.equal(found.model(ids), model.eval()(ids))

    def test_tensors_that_are_views_are_saved(self, tmp_path: Path, full_checkpoint: Full) -> None:
        saved = full_checkpoint()
        views = {
            name: t.T.contiguous().T if t.dim() == 2 else t for name, t in saved.weights.items()
        }
        assert_same(
            load_checkpoint(save_checkpoint(tmp_path / "c", replace(saved, weights=views))), saved
        )

    @pytest.mark.parametrize("text", ["${open.end}", "${", "???", "a\r\nb", "null", "1e5", "é"])
    def test_any_text_comes_back(self, tmp_path: Path, full_checkpoint: Full, text: str) -> None:
        run = RecordedRun(stages={}, settings={"prompt": text})
        saved = replace(full_checkpoint(), end_of_text=text, tokenizer=text, run=run)
        assert_same(load_checkpoint(save_checkpoint(tmp_path / "c", saved)), saved)

    def test_parents_are_made(self, tmp_path: Path, full_checkpoint: Full) -> None:
        folder = tmp_path / "a" / "b" / "step_00000003"
        assert_same(
            load_checkpoint(save_checkpoint(str(folder), full_checkpoint())), full_checkpoint()
        )

    def test_no_file_is_a_pickle(self, run: Path) -> None:
        files = [path for path in run.rglob("*") if path.is_file()]
        assert {path.suffix for path in files} == {".safetensors", ".json", ".yaml", ""}
        for path in files:  # neither a pickle nor the zip that torch.save writes around one
            assert path.read_bytes()[:2] not in (b"PK", b"\x80\x02", b"\x80\x04", b"\x80\x05")

    def test_the_marker_holds_the_size_and_hash_of_every_other_file(self, run: Path) -> None:
        folder = run / "step_00000001"
        marker = json.loads((folder / "COMPLETE").read_text())
        assert set(marker) == FILES - {"COMPLETE"}
        for name, entry in marker.items():
            assert entry == {
                "bytes": (folder / name).stat().st_size,
                "sha256": sha256(folder / name),
            }


class TestSaving:
    def test_whoever_may_read_one_file_may_read_them_all(
        self, tmp_path: Path, full_checkpoint: Full
    ) -> None:
        folder = save_checkpoint(tmp_path / "step_00000001", full_checkpoint(1))
        assert len({path.stat().st_mode for path in folder.iterdir()}) == 1

    def test_nothing_is_overwritten(self, run: Path, full_checkpoint: Full) -> None:
        folder = run / "step_00000002"
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        with pytest.raises(UserError, match=rf"{folder} exists\. Choose"):
            save_checkpoint(folder, full_checkpoint(9))
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert sorted(path.name for path in run.iterdir()) == [
            layout.step_folder(s) for s in (1, 2, 3)
        ]

    @pytest.mark.parametrize(
        ("where", "name"),
        [
            (store, "stream_tensors"),
            (store, "_write_json"),
            (layout, "sync"),
            (layout, "write_marker"),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_failed_save_leaves_no_checkpoint_and_next_works(
        self,
        run: Path,
        full_checkpoint: Full,
        monkeypatch: pytest.MonkeyPatch,
        where: object,
        name: str,
    ) -> None:
        def full_disk(*_: object) -> None:
            raise OSError("No space left on device")

        folder = run / "step_00000004"
        with monkeypatch.context() as patch:
            patch.setattr(where, name, full_disk)
            with pytest.raises(OSError, match="No space left"):
                save_checkpoint(folder, full_checkpoint(4))
        assert not folder.exists()
        assert load_checkpoint(run).step == 3
        save_checkpoint(folder, full_checkpoint(4))
        assert_same(load_checkpoint(run), full_checkpoint(4))
        assert not [path for path in run.iterdir() if "partial" in path.name]

    def test_killed_save_leaves_no_checkpoint_and_next_works(
        self, run: Path, full_checkpoint: Full
    ) -> None:
        folder = run / "step_00000004"
        script = """
import os, signal, sys
from tokengrow.checkpoint import layout
from tokengrow.checkpoint.store import load_checkpoint, save_checkpoint
layout.write_marker = lambda folder: os.kill(os.getpid(), signal.SIGKILL)
save_checkpoint(sys.argv[2], load_checkpoint(sys.argv[1]))
"""
        killed = subprocess.run([sys.executable, "-c", script, str(run), str(folder)], timeout=120)
        assert killed.returncode == -signal.SIGKILL
        assert not folder.exists()
        assert load_checkpoint(run).step == 3
        save_checkpoint(folder, full_checkpoint(4))
        assert load_checkpoint(run).step == 4
        assert not [path for path in run.iterdir() if "partial" in path.name]

    def test_files_are_flushed_before_marker_and_marker_before_name(
        self, tmp_path: Path, full_checkpoint: Full, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        synced: list[str] = []
        fsync = os.fsync

        def noted(descriptor: int) -> None:
            synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
            fsync(descriptor)

        monkeypatch.setattr(os, "fsync", noted)
        save_checkpoint(tmp_path / "run" / "step_00000003", full_checkpoint())
        assert set(synced[:6]) == FILES - {"COMPLETE"}
        assert synced[6:] == ["COMPLETE", ".step_00000003.partial", "run"]


class TestDamage:
    def test_a_folder_without_its_marker_does_not_exist(self, run: Path) -> None:
        (run / "step_00000003" / "COMPLETE").unlink()
        assert [p.name for p in layout.find_checkpoints(run)] == ["step_00000001", "step_00000002"]
        assert load_checkpoint(run).step == 2
        with pytest.raises(UserError, match=r"step_00000003 holds no complete checkpoint"):
            load_checkpoint(run / "step_00000003")

    @pytest.mark.parametrize("name", ["pytorch_model.bin", "model.safetensors"])
    def test_weights_of_another_format_are_sent_to_convert(self, tmp_path: Path, name: str) -> None:
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(
            UserError, match=rf"Convert them first: `tokengrow convert source={tmp_path} "
        ):
            load_checkpoint(tmp_path)

    @pytest.mark.parametrize("name", sorted(FILES - {"COMPLETE"}))
    def test_a_file_with_a_flipped_byte_is_named(self, run: Path, name: str) -> None:
        flip_byte(run / "step_00000003" / name)
        with pytest.raises(UserError, match=f"step_00000003/{name} is damaged"):
            load_checkpoint(run / "step_00000003")

    @pytest.mark.parametrize("name", sorted(FILES - {"COMPLETE"}))
    def test_a_truncated_file_is_named_with_both_sizes(self, run: Path, name: str) -> None:
        file = run / "step_00000003" / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1])
        sizes = f"must have {len(whole)} bytes, got {len(whole) - 1}"
        with pytest.raises(UserError, match=f"step_00000003/{name} {sizes}"):
            load_checkpoint(run / "step_00000003")

    @pytest.mark.parametrize("name", sorted(FILES - {"COMPLETE"}))
    def test_a_missing_file_is_named(self, run: Path, name: str) -> None:
        (run / "step_00000003" / name).unlink()
        with pytest.raises(UserError, match=f"step_00000003/{name} is missing"):
            load_checkpoint(run / "step_00000003")

    @pytest.mark.parametrize(
        "content", ["", "{", "{}", "[]", "null", '{"model.safetensors": {}}', "\0" * 900]
    )
    def test_a_damaged_marker_is_named(self, run: Path, content: str) -> None:
        (run / "step_00000003" / "COMPLETE").write_text(content)
        with pytest.raises(UserError, match=r"step_00000003/COMPLETE is damaged"):
            load_checkpoint(run / "step_00000003")

    def test_no_flipped_byte_of_the_marker_escapes_as_another_error(self, run: Path) -> None:
        marker = run / "step_00000003" / "COMPLETE"
        whole = marker.read_bytes()
        for position in range(len(whole)):
            flip_byte(marker, position)
            try:
                layout.verify(run / "step_00000003")
            except UserError:
                pass
            except Exception as error:
                line = whole[:position].count(b"\n") + 1
                pytest.fail(f"byte {position}, line {line}: {error!r}")
            marker.write_bytes(whole)


class TestLoading:
    def test_a_run_gives_its_newest_checkpoint(self, run: Path, full_checkpoint: Full) -> None:
        assert_same(load_checkpoint(run), full_checkpoint(3))

    def test_steps_are_ordered_as_numbers(self, tmp_path: Path, full_checkpoint: Full) -> None:
        for step in (99_999_999, 100_000_000, 7):
            save_checkpoint(tmp_path / layout.step_folder(step), full_checkpoint(step))
        assert load_checkpoint(tmp_path).step == 100_000_000

    def test_damaged_checkpoint_is_logged_and_older_one_loaded(
        self, run: Path, full_checkpoint: Full, caplog: pytest.LogCaptureFixture
    ) -> None:
        flip_byte(run / "step_00000003" / "model.safetensors")
        with caplog.at_level(logging.WARNING):
            assert_same(load_checkpoint(run), full_checkpoint(2))
        assert "step_00000003/model.safetensors is damaged" in caplog.text
        assert "Trying the previous one." in caplog.text
        assert (run / "step_00000003").is_dir()  # reading a run never renames

    def test_a_damaged_marker_is_fallen_back_from_too(self, run: Path) -> None:
        (run / "step_00000003" / "COMPLETE").write_text("{}garbage")
        assert load_checkpoint(run).step == 2

    def test_nothing_whole_is_an_error(self, run: Path, caplog: pytest.LogCaptureFixture) -> None:
        for step in (1, 2, 3):
            flip_byte(run / layout.step_folder(step) / "config.yaml")
        with pytest.raises(UserError, match=r"holds no complete checkpoint.* Give another run"):
            load_checkpoint(run)
        assert [message.partition(" of this run. ")[2] for message in caplog.messages] == [
            "Trying the previous one.",
            "Trying the previous one.",
            "There is no earlier one.",
        ]

    def test_of_a_folder_of_runs_one_is_to_be_named(self, run: Path) -> None:
        said = rf"{run.parent} is a directory of runs. Name one of them, for example {run}\.$"
        with pytest.raises(UserError, match=said):
            load_checkpoint(run.parent)

    def test_a_path_that_does_not_exist_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=f"{tmp_path}/nowhere does not exist"):
            load_checkpoint(tmp_path / "nowhere")
        assert newest_checkpoint(tmp_path / "nowhere") is None

    def test_other_folders_of_a_run_are_ignored(self, run: Path) -> None:
        for name in ("step_00000009.damaged", "step_12", "logs", ".step_00000009.partial"):
            (run / name).mkdir()
            (run / name / "COMPLETE").write_text("{}")
        assert load_checkpoint(run).step == 3

    def test_a_config_key_that_is_not_ours_is_refused(self, run: Path) -> None:
        folder = run / "step_00000003"
        text = (folder / "config.yaml").read_text().replace("rotary_base", "rotary_bass")
        (folder / "config.yaml").write_text(text)
        (folder / "COMPLETE").unlink()
        layout.write_marker(folder)
        with pytest.raises(
            UserError, match=r"Unknown key model\.rotary_bass. Did you mean 'rotary_base'\?"
        ):
            load_checkpoint(folder)


def newest_setting_aside(run: Path) -> Checkpoint | None:
    """Load the newest checkpoint and quarantine damaged ones, as a resumed run does."""
    found = newest_checkpoint(run)
    quarantine_damaged(run, found)
    return found


class TestSettingAside:
    def test_damaged_checkpoints_are_renamed_and_nothing_is_deleted(
        self, run: Path, full_checkpoint: Full
    ) -> None:
        flip_byte(run / "step_00000003" / "model.safetensors")
        damaged = {p.name: p.read_bytes() for p in (run / "step_00000003").iterdir()}
        found = newest_setting_aside(run)
        assert found is not None
        assert_same(found, full_checkpoint(2))
        assert {path.name for path in run.iterdir()} == {
            "step_00000001",
            "step_00000002",
            "step_00000003.damaged",
        }
        aside = run / "step_00000003.damaged"
        assert {p.name: p.read_bytes() for p in aside.iterdir()} == damaged

    def test_its_place_is_free_for_the_step_to_be_saved_again(
        self, run: Path, full_checkpoint: Full
    ) -> None:
        flip_byte(run / "step_00000003" / "model.safetensors")
        newest_setting_aside(run)
        save_checkpoint(run / "step_00000003", full_checkpoint(3))
        assert_same(load_checkpoint(run), full_checkpoint(3))

    def test_one_step_may_be_damaged_again_and_again(
        self, run: Path, full_checkpoint: Full
    ) -> None:
        for _ in range(3):
            flip_byte(run / "step_00000003" / "model.safetensors")
            newest_setting_aside(run)
            save_checkpoint(run / "step_00000003", full_checkpoint(3))
        assert len(list(run.glob("step_00000003.damaged*"))) == 3

    def test_quarantine_works_after_manual_removal(self, run: Path, full_checkpoint: Full) -> None:
        for _ in range(2):
            flip_byte(run / "step_00000003" / "model.safetensors")
            newest_setting_aside(run)
            save_checkpoint(run / "step_00000003", full_checkpoint(3))
        for file in (run / "step_00000003.damaged").iterdir():
            file.unlink()
        (run / "step_00000003.damaged").rmdir()
        flip_byte(run / "step_00000003" / "model.safetensors")
        found = newest_setting_aside(run)
        assert found is not None and found.step == 2


class TestPruning:
    def test_the_newest_and_the_ends_of_stages_are_kept(
        self, run: Path, full_checkpoint: Full
    ) -> None:
        for step in (4, 5):
            save_checkpoint(run / layout.step_folder(step), full_checkpoint(step))
        delete_old_checkpoints(run, keep=2, keep_steps={2})
        assert [p.name for p in layout.find_checkpoints(run)] == [
            layout.step_folder(step) for step in (2, 4, 5)
        ]
        assert not (run / "step_00000001").exists()

    def test_no_more_than_there_is(self, run: Path) -> None:
        delete_old_checkpoints(run, keep=5, keep_steps=set())
        assert len(layout.find_checkpoints(run)) == 3

    def test_damaged_ones_that_were_set_aside_are_kept(self, run: Path) -> None:
        flip_byte(run / "step_00000002" / "model.safetensors")
        (run / "step_00000002").rename(run / "step_00000002.damaged")
        delete_old_checkpoints(run, keep=1, keep_steps=set())
        assert {p.name for p in run.iterdir()} == {"step_00000002.damaged", "step_00000003"}

    def test_leftover_of_killed_deletion_is_not_a_checkpoint(
        self, run: Path, full_checkpoint: Full, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def killed(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(store.shutil, "rmtree", killed)
            with pytest.raises(KeyboardInterrupt):
                delete_old_checkpoints(run, keep=1, keep_steps=set())
        assert [p.name for p in layout.find_checkpoints(run)] == ["step_00000002", "step_00000003"]
        # If both of these are damaged, training starts over and reaches step 1 again.
        save_checkpoint(run / "step_00000001", full_checkpoint(1))
        assert len(layout.find_checkpoints(run)) == 3


class TestLineage:
    def test_a_growth_appends_where_it_came_from(self, run: Path, sizes: Sizes) -> None:
        source = load_checkpoint(run)
        grown = grow_checkpoint(source, plan_growth(sizes(4), sizes(6)))
        older, entry = grown.lineage
        assert older == source.lineage[0]
        assert entry.source == LineageSource(
            parameters=sizes(4).num_parameters(),
            step=3,
            weights_sha256=sha256(run / "step_00000003" / "model.safetensors"),
            config=sizes(4).to_dict(),
        )
        assert entry.target.parameters == grown.config.num_parameters()
        assert entry.target.config == grown.config.to_dict()
        assert entry.drift.relative < 1e-10

    def test_the_source_is_not_modified(
        self, run: Path, sizes: Sizes, full_checkpoint: Full
    ) -> None:
        source = load_checkpoint(run)
        grow_checkpoint(source, plan_growth(sizes(4), sizes(6)))
        assert_same(source, full_checkpoint(3))

    def test_grown_checkpoint_round_trips(self, run: Path, tmp_path: Path, sizes: Sizes) -> None:
        source = load_checkpoint(run)
        grown = grow_checkpoint(source, plan_growth(sizes(4), sizes(6)))
        found = load_checkpoint(save_checkpoint(tmp_path / "grown", grown))
        assert (found.step, found.tokenizer, found.end_of_text) == (3, source.tokenizer, "<|end|>")
        assert same_tensors(found.weights, grown.weights)
        assert same_tensors(found.optimizer, grown.optimizer)
        assert found.config.tokens == sizes(6).tokens
        assert found.config.tau == source.config.tau

    def test_two_growths_are_two_entries_oldest_first(
        self, run: Path, tmp_path: Path, sizes: Sizes
    ) -> None:
        checkpoint = replace(load_checkpoint(run), lineage=())
        for n in (6, 9):
            plan = plan_growth(checkpoint.config, sizes(n))
            grown = grow_checkpoint(checkpoint, plan)
            checkpoint = load_checkpoint(save_checkpoint(tmp_path / f"n{n}", grown))
        first, second = checkpoint.lineage
        assert first.source.config["tokens"]["query"] == 4
        assert first.target.config == second.source.config
        digest = sha256(tmp_path / "n6" / "model.safetensors")
        assert second.source.weights_sha256 == digest
