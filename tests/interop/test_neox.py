"""The published layout: its names, what is read of a file and what is refused, the way back."""

import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.checkpoint.tensors import StateDict
from tokengrow.errors import UserError
from tokengrow.interop.neox import (
    EMBEDDING,
    find_weights,
    fitting_presets,
    from_official,
    official_names,
    read_tensors,
    write_neox,
)
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

WEIGHTS = Path(__file__).parents[1] / "golden" / "A_tiny_init" / "model.safetensors"
"""Of model A, as the published code initialised it."""


@pytest.fixture(scope="module")
def official() -> StateDict:
    """Model A by the published names."""
    return load_file(WEIGHTS)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(value)`: what torch.save makes of it."""

    def save(value: Any, **options: Any) -> Path:
        path = tmp_path / "pytorch_model.bin"
        torch.save(value, path, **options)
        return path

    return save


def same(found: StateDict, expected: StateDict) -> bool:
    return found.keys() == expected.keys() and all(
        found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
        for name, tensor in expected.items()
    )


def refused(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_tensors(path)
    said = str(error.value)
    assert said.startswith(str(path)) and len(said.splitlines()) == 1
    return said


class TestNames:
    def test_every_tensor_has_the_published_name(
        self, published_config: ModelConfig, official: StateDict, our_name: Callable[[str], str]
    ) -> None:
        names = official_names(published_config)
        assert set(names.values()) == set(official)
        assert all(our_name(theirs) == ours for ours, theirs in names.items())

    def test_the_order_is_that_of_a_published_state_dict(
        self, published_config: ModelConfig
    ) -> None:
        names = list(official_names(published_config).values())
        assert names[:3] == [
            "sequential.0.word_embeddings.weight",
            "sequential.2.attention.query.key_param_tokens",
            "sequential.2.attention.query.value_param_tokens",
        ]
        assert names[9:12] == [
            "sequential.2.mlp.key_param_tokens",
            "sequential.2.mlp.value_param_tokens",
            "sequential.3.attention.query.key_param_tokens",
        ]
        assert names[-2:] == ["sequential.6.norm.weight", "sequential.6.norm.bias"]


class TestReading:
    def test_a_pickle_and_a_safetensors_file_hold_the_same(
        self, official: StateDict, saved: Callable[..., Path]
    ) -> None:
        assert same(read_tensors(saved(official)), official)
        assert same(read_tensors(WEIGHTS), official)

    def test_an_ordered_dict_of_parameters_is_a_mapping_of_tensors(
        self, official: StateDict, saved: Callable[..., Path]
    ) -> None:
        named = OrderedDict((name, torch.nn.Parameter(t)) for name, t in official.items())
        found = read_tensors(saved(named))
        assert same(found, official)
        assert not any(tensor.requires_grad for tensor in found.values())

    def test_the_format_that_torch_wrote_before_1_6_is_read(
        self, official: StateDict, saved: Callable[..., Path]
    ) -> None:
        assert same(read_tensors(saved(official, _use_new_zipfile_serialization=False)), official)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_precisions_stay_as_they_are(
        self, official: StateDict, saved: Callable[..., Path], dtype: torch.dtype
    ) -> None:
        mixed = official | {EMBEDDING: official[EMBEDDING].to(dtype)}
        assert same(read_tensors(saved(mixed)), mixed)

    def test_the_tensors_are_mapped_and_not_read(
        self, official: StateDict, saved: Callable[..., Path]
    ) -> None:
        path = saved(official)
        tensors = read_tensors(path)
        mapped = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(path))
        ]
        for tensor in tensors.values():
            assert any(start <= tensor.data_ptr() < end for start, end in mapped)

    def test_tensors_that_share_memory_get_their_own(
        self, saved: Callable[..., Path], tmp_path: Path
    ) -> None:
        rows = torch.arange(12.0).reshape(3, 4)
        found = read_tensors(saved({"a": rows, "b": rows, "c": rows[1:], "d": rows[:, :2]}))
        assert torch.equal(found["b"], rows) and torch.equal(found["c"], rows[1:])
        assert torch.equal(found["d"], rows[:, :2])
        save_file(found, tmp_path / "c.safetensors")  # which refuses shared memory


class TestRefusal:
    def test_a_pickle_that_would_run_a_program_runs_nothing(
        self, official: StateDict, saved: Callable[..., Path], tmp_path: Path
    ) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        said = refused(saved(official | {"x": Evil()}))
        assert "system" in said and "nothing in it was run" in said
        for protocol in (2, 4):
            (tmp_path / "bare.bin").write_bytes(pickle.dumps(Evil(), protocol))
            refused(tmp_path / "bare.bin")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("value", "said"),
        [
            ([torch.ones(2)], "holds a list"),
            (torch.ones(2), "holds a Tensor"),
            ({"module": {"a": torch.ones(2)}}, "'module' is a dict"),
            ({"a": torch.ones(2), "step": 3}, "'step' is a int"),
            ({0: torch.ones(2)}, "0 is a Tensor"),
            (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ],
    )
    def test_what_is_no_mapping_of_names_to_tensors_is_named(
        self, saved: Callable[..., Path], value: Any, said: str
    ) -> None:
        assert said in refused(saved(value))

    @pytest.mark.parametrize(
        ("tensor", "kind"),
        [
            (torch.arange(3), "int64"),
            (torch.ones(3, dtype=torch.bool), "bool"),
            (torch.ones(3, dtype=torch.complex64), "complex64"),
            (torch.ones(3, 3).to_sparse(), "float32"),
            (torch.ones(3, device="meta"), "float32"),
            (torch.ones(3).to(torch.float8_e4m3fn), "float8_e4m3fn"),
            (torch.ones(3).to(torch.float8_e5m2), "float8_e5m2"),
        ],
    )
    def test_a_tensor_that_is_no_weight_is_named(
        self, saved: Callable[..., Path], tmp_path: Path, tensor: Tensor, kind: str
    ) -> None:
        tensors = {"a": torch.ones(2), "x.y": tensor}
        assert f": x.y ({kind}): convert" in refused(saved(tensors))
        if tensor.layout == torch.strided and not tensor.is_meta:
            save_file(tensors, tmp_path / "a.safetensors")
            assert f": x.y ({kind}): convert" in refused(tmp_path / "a.safetensors")

    def test_a_file_that_was_cut_is_refused_wherever_it_was_cut(
        self, saved: Callable[..., Path], tmp_path: Path
    ) -> None:
        tensors = {"a": torch.ones(300), "b": torch.zeros(40, 2)}
        save_file(tensors, tmp_path / "whole.safetensors")
        wholes = {
            "cut.bin": saved(tensors).read_bytes(),
            "old.bin": saved(tensors, _use_new_zipfile_serialization=False).read_bytes(),
            "cut.safetensors": (tmp_path / "whole.safetensors").read_bytes(),
        }
        for name, whole in wholes.items():
            for end in {0, 3, 9, len(whole) // 2, len(whole) - 100, len(whole) - 1}:
                (tmp_path / name).write_bytes(whole[:end])
                assert "again" in refused(tmp_path / name)

    def test_a_flipped_bit_of_a_tensor_is_noticed(self, saved: Callable[..., Path]) -> None:
        path = saved({"a": torch.ones(3000)})
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert "damaged" in refused(path)

    def test_a_file_without_checksums_is_read(self, saved: Callable[..., Path]) -> None:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            path = saved({"a": torch.ones(3000)})
        finally:
            torch.serialization.set_crc32_options(before)
        assert read_tensors(path)["a"].sum() == 3000

    def test_a_zip_that_torch_did_not_write_is_refused(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
            archive.writestr("a/notes.txt", "hello")
        assert "again" in refused(tmp_path / "a.bin")

    def test_a_pointer_of_git_lfs_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert "Git LFS" in refused(tmp_path / "a.bin")

    def test_a_file_that_is_not_there_is_refused(self, tmp_path: Path) -> None:
        said = refused(tmp_path / "nowhere.bin")
        assert "does not exist" in said
        assert said.replace(".bin", ".safetensors") == refused(tmp_path / "nowhere.safetensors")


class TestFitting:
    def test_every_tensor_that_does_not_fit_is_named(
        self, official: StateDict, published_config: ModelConfig
    ) -> None:
        wrong = dict(official)
        del wrong["sequential.3.mlp.key_param_tokens"], wrong["sequential.6.norm.bias"]
        wrong["sequential.2.rotary.inv_freq"] = torch.ones(2)
        wrong["sequential.4.attention.proj.value_param_tokens"] = torch.ones(41, 64)
        with pytest.raises(UserError) as error:
            from_official(wrong, published_config, "a.bin", "a.yml")
        assert str(error.value) == (
            "a.bin does not fit a.yml: it has 3 layers, width 64, 48 / 48 / 48 / 40 / 160 "
            "parameter tokens (query / key / value / output / ffn) and a vocabulary of 512; give "
            "the sizes "
            "that it was trained with: sequential.3.mlp.key_param_tokens [160, 64] is missing; "
            "sequential.4.attention.proj.value_param_tokens is [41, 64], not [40, 64]; "
            "sequential.6.norm.bias [64] is missing; "
            "sequential.2.rotary.inv_freq [2] is not part of the model"
        )

    def test_sizes_of_another_model_name_every_tensor(
        self, official: StateDict, published_config: ModelConfig
    ) -> None:
        with pytest.raises(UserError) as error:
            from_official(official, ModelConfig.preset("1.5b"), "a.bin", "preset=1.5b")
        said = str(error.value)
        both = {*official_names(ModelConfig.preset("1.5b")).values(), *official}
        assert all(f" {name} " in said for name in both)

    def test_nothing_at_all_is_a_model_of_which_everything_is_missing(
        self, published_config: ModelConfig
    ) -> None:
        with pytest.raises(UserError, match="0 layers"):
            from_official({}, published_config, "a.bin", "a.yml")

    def test_a_published_size_is_recognised(self, official: StateDict) -> None:
        sizes = ModelConfig.preset("owt2-354m")
        with torch.device("meta"):
            state = TokenFormer(sizes).state_dict()
        names = official_names(sizes)
        assert fitting_presets({names[ours]: state[ours] for ours in state}) == ["owt2-354m"]
        assert fitting_presets(official) == []


class TestFolder:
    def test_the_usual_names_come_first(self, tmp_path: Path) -> None:
        for name in ("a.pt", "b.safetensors", "model.safetensors", "pytorch_model.bin"):
            (tmp_path / name).touch()
        assert find_weights(tmp_path).name == "pytorch_model.bin"
        (tmp_path / "pytorch_model.bin").unlink()
        assert find_weights(tmp_path).name == "model.safetensors"
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(UserError, match=r"several files of weights: give one of a\.pt, b\.saf"):
            find_weights(tmp_path)
        (tmp_path / "a.pt").unlink()
        assert find_weights(tmp_path).name == "b.safetensors"

    def test_a_folder_without_weights_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").touch()
        with pytest.raises(UserError, match="holds no weights"):
            find_weights(tmp_path)


class TestWriting:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> Path:
        """Where it is written to: there, and empty."""
        (tmp_path / "neox").mkdir()
        return tmp_path / "neox"

    def test_a_model_without_a_published_word_leaves_the_folder_empty(
        self, official: StateDict, published_config: ModelConfig, folder: Path
    ) -> None:
        checkpoint = from_official(official, published_config, "a", "a")
        kept = replace(published_config, norm_eps=1e-6)
        with pytest.raises(UserError, match="no word for"):
            write_neox(folder, replace(checkpoint, config=kept))
        assert not list(folder.iterdir())

    def test_the_published_code_finds_what_it_wrote(
        self, official: StateDict, published_config: ModelConfig, folder: Path
    ) -> None:
        write_neox(folder, from_official(official, published_config, "a", "a"))
        found = torch.load(folder / "pytorch_model.bin")  # the call of the published code
        assert type(found) is dict
        assert list(found) == list(official_names(published_config).values())
        assert same(found, official)

    def test_a_view_is_written_without_what_it_is_a_view_of(
        self, official: StateDict, published_config: ModelConfig, folder: Path
    ) -> None:
        checkpoint = from_official(official, published_config, "a", "a")
        row = torch.cat([tensor.flatten() for tensor in checkpoint.weights.values()])
        views, start = {}, 0
        for name, tensor in checkpoint.weights.items():
            views[name] = row[start : (start := start + tensor.numel())].view(tensor.shape)
        views["embedding.weight"] = torch.cat([views["embedding.weight"]] * 5)[512:1024]
        write_neox(folder, Checkpoint(published_config, views))
        file = folder / "pytorch_model.bin"
        assert same(torch.load(file), official)
        assert file.stat().st_size < 1.1 * row.nbytes
