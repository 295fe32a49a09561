"""Published format of the weights: names, reading, invalid files, writing."""

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
    from_published,
    matching_presets,
    published_names,
    read_tensors,
    write_neox,
)
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

WEIGHTS = Path(__file__).parents[1] / "golden" / "A_tiny_init" / "model.safetensors"
"""Weights of model A, initialised by the published code."""


@pytest.fixture(scope="module")
def published() -> StateDict:
    """Model A with the published names."""
    return load_file(WEIGHTS)


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Path]:
    """`saved(value)`: path of a file of torch.save."""

    def save(value: Any, **options: Any) -> Path:
        path = tmp_path / "pytorch_model.bin"
        torch.save(value, path, **options)
        return path

    return save


def equal_weights(actual: StateDict, expected: StateDict) -> bool:
    return actual.keys() == expected.keys() and all(
        actual[name].dtype == tensor.dtype and torch.equal(actual[name], tensor)
        for name, tensor in expected.items()
    )


def read_error(path: Path) -> str:
    """Return the error message of a file, one line that starts with its path."""
    with pytest.raises(UserError) as error:
        read_tensors(path)
    message = str(error.value)
    assert message.startswith(str(path)) and len(message.splitlines()) == 1
    return message


class TestNames:
    def test_published_names_equal_those_of_the_published_code(
        self, published_config: ModelConfig, published: StateDict, our_name: Callable[[str], str]
    ) -> None:
        names = published_names(published_config)
        assert set(names.values()) == set(published)
        assert all(our_name(published) == name for name, published in names.items())

    def test_order_is_that_of_the_published_state_dict(self, published_config: ModelConfig) -> None:
        names = list(published_names(published_config).values())
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
    def test_pickle_and_safetensors_give_the_same_tensors(
        self, published: StateDict, saved: Callable[..., Path]
    ) -> None:
        assert equal_weights(read_tensors(saved(published)), published)
        assert equal_weights(read_tensors(WEIGHTS), published)

    def test_ordered_dict_of_parameters_is_read_as_tensors(
        self, published: StateDict, saved: Callable[..., Path]
    ) -> None:
        named = OrderedDict((name, torch.nn.Parameter(t)) for name, t in published.items())
        actual = read_tensors(saved(named))
        assert equal_weights(actual, published)
        assert not any(tensor.requires_grad for tensor in actual.values())

    def test_format_of_torch_before_1_6_is_read(
        self, published: StateDict, saved: Callable[..., Path]
    ) -> None:
        assert equal_weights(
            read_tensors(saved(published, _use_new_zipfile_serialization=False)), published
        )

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
    def test_dtypes_are_kept(
        self, published: StateDict, saved: Callable[..., Path], dtype: torch.dtype
    ) -> None:
        mixed = published | {EMBEDDING: published[EMBEDDING].to(dtype)}
        assert equal_weights(read_tensors(saved(mixed)), mixed)

    def test_tensors_are_memory_mapped(
        self, published: StateDict, saved: Callable[..., Path]
    ) -> None:
        path = saved(published)
        tensors = read_tensors(path)
        mapped = [
            tuple(int(end, 16) for end in line.split()[0].split("-"))
            for line in Path("/proc/self/maps").read_text().splitlines()
            if line.endswith(str(path))
        ]
        for tensor in tensors.values():
            assert any(start <= tensor.data_ptr() < end for start, end in mapped)

    def test_tensors_that_share_memory_are_copied(
        self, saved: Callable[..., Path], tmp_path: Path
    ) -> None:
        rows = torch.arange(12.0).reshape(3, 4)
        actual = read_tensors(saved({"a": rows, "b": rows, "c": rows[1:], "d": rows[:, :2]}))
        assert torch.equal(actual["b"], rows) and torch.equal(actual["c"], rows[1:])
        assert torch.equal(actual["d"], rows[:, :2])
        save_file(actual, tmp_path / "c.safetensors")  # raises for shared memory


class TestInvalidFiles:
    def test_malicious_pickle_runs_nothing(
        self, published: StateDict, saved: Callable[..., Path], tmp_path: Path
    ) -> None:
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return os.system, (f"touch {tmp_path / 'ran'}",)

        message = read_error(saved(published | {"x": Evil()}))
        assert "system" in message and "Nothing in it was run" in message
        for protocol in (2, 4):
            (tmp_path / "bare.bin").write_bytes(pickle.dumps(Evil(), protocol))
            read_error(tmp_path / "bare.bin")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            ([torch.ones(2)], "must hold named tensors, got a list"),
            (torch.ones(2), "must hold named tensors, got a Tensor"),
            ({"module": {"a": torch.ones(2)}}, "'module' is a dict"),
            ({"a": torch.ones(2), "step": 3}, "'step' is a int"),
            ({0: torch.ones(2)}, "0 is a Tensor"),
            (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        ],
    )
    def test_content_other_than_named_tensors_is_an_error(
        self, saved: Callable[..., Path], value: Any, message: str
    ) -> None:
        assert message in read_error(saved(value))

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
    def test_error_names_a_tensor_of_an_invalid_kind(
        self, saved: Callable[..., Path], tmp_path: Path, tensor: Tensor, kind: str
    ) -> None:
        tensors = {"a": torch.ones(2), "x.y": tensor}
        assert f"got x.y ({kind}). Convert" in read_error(saved(tensors))
        if tensor.layout == torch.strided and not tensor.is_meta:
            save_file(tensors, tmp_path / "a.safetensors")
            assert f"got x.y ({kind}). Convert" in read_error(tmp_path / "a.safetensors")

    def test_file_truncated_anywhere_is_an_error(
        self, saved: Callable[..., Path], tmp_path: Path
    ) -> None:
        tensors = {"a": torch.ones(300), "b": torch.zeros(40, 2)}
        save_file(tensors, tmp_path / "complete.safetensors")
        contents = {
            "cut.bin": saved(tensors).read_bytes(),
            "old.bin": saved(tensors, _use_new_zipfile_serialization=False).read_bytes(),
            "cut.safetensors": (tmp_path / "complete.safetensors").read_bytes(),
        }
        for name, content in contents.items():
            for end in {0, 3, 9, len(content) // 2, len(content) - 100, len(content) - 1}:
                (tmp_path / name).write_bytes(content[:end])
                assert "again" in read_error(tmp_path / name)

    def test_flipped_bit_is_an_error(self, saved: Callable[..., Path]) -> None:
        path = saved({"a": torch.ones(3000)})
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert "damaged" in read_error(path)

    def test_file_without_checksums_is_read(self, saved: Callable[..., Path]) -> None:
        before = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            path = saved({"a": torch.ones(3000)})
        finally:
            torch.serialization.set_crc32_options(before)
        assert read_tensors(path)["a"].sum() == 3000

    def test_zip_of_another_program_is_an_error(self, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "a.bin", "w") as archive:
            archive.writestr("a/notes.txt", "hello")
        assert "again" in read_error(tmp_path / "a.bin")

    def test_pointer_of_git_lfs_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "a.bin").write_text("version https://git-lfs.github.com/spec/v1\n")
        assert "Git LFS" in read_error(tmp_path / "a.bin")

    def test_missing_file_is_an_error(self, tmp_path: Path) -> None:
        message = read_error(tmp_path / "nowhere.bin")
        assert "does not exist" in message
        assert message.replace(".bin", ".safetensors") == read_error(
            tmp_path / "nowhere.safetensors"
        )


class TestMismatches:
    def test_error_names_every_mismatch(
        self, published: StateDict, published_config: ModelConfig
    ) -> None:
        wrong = dict(published)
        del wrong["sequential.3.mlp.key_param_tokens"], wrong["sequential.6.norm.bias"]
        wrong["sequential.2.rotary.inv_freq"] = torch.ones(2)
        wrong["sequential.4.attention.proj.value_param_tokens"] = torch.ones(41, 64)
        with pytest.raises(UserError) as error:
            from_published(wrong, published_config, "a.bin", "a.yml")
        assert str(error.value) == (
            "a.bin does not match a.yml: it has 3 layers, width 64, 48 / 48 / 48 / 40 / 160 "
            "parameter tokens (query / key / value / output / ffn) and a vocabulary of 512. Give "
            "the sizes of its training. Mismatches: "
            "sequential.3.mlp.key_param_tokens [160, 64] is missing; "
            "sequential.4.attention.proj.value_param_tokens must have shape [40, 64], "
            "got [41, 64]; "
            "sequential.6.norm.bias [64] is missing; "
            "sequential.2.rotary.inv_freq [2] is not part of the model."
        )

    def test_sizes_of_another_model_name_every_tensor(
        self, published: StateDict, published_config: ModelConfig
    ) -> None:
        with pytest.raises(UserError) as error:
            from_published(published, ModelConfig.preset("1.5b"), "a.bin", "preset=1.5b")
        message = str(error.value)
        both = {*published_names(ModelConfig.preset("1.5b")).values(), *published}
        assert all(f" {name} " in message for name in both)

    def test_empty_file_lacks_every_tensor(self, published_config: ModelConfig) -> None:
        with pytest.raises(UserError, match="0 layers"):
            from_published({}, published_config, "a.bin", "a.yml")

    def test_published_size_is_recognised(self, published: StateDict) -> None:
        sizes = ModelConfig.preset("owt2-354m")
        with torch.device("meta"):
            state = TokenFormer(sizes).state_dict()
        names = published_names(sizes)
        assert matching_presets({names[name]: state[name] for name in state}) == ["owt2-354m"]
        assert matching_presets(published) == []


class TestFolder:
    def test_usual_names_come_first(self, tmp_path: Path) -> None:
        for name in ("a.pt", "b.safetensors", "model.safetensors", "pytorch_model.bin"):
            (tmp_path / name).touch()
        assert find_weights(tmp_path).name == "pytorch_model.bin"
        (tmp_path / "pytorch_model.bin").unlink()
        assert find_weights(tmp_path).name == "model.safetensors"
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(
            UserError, match=r"several files of weights\. Give one of a\.pt, b\.saf"
        ):
            find_weights(tmp_path)
        (tmp_path / "a.pt").unlink()
        assert find_weights(tmp_path).name == "b.safetensors"

    def test_folder_without_weights_is_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "README.md").touch()
        with pytest.raises(UserError, match="has no weights"):
            find_weights(tmp_path)


class TestWriting:
    @pytest.fixture(autouse=True)
    def folder(self, tmp_path: Path) -> Path:
        """Existing empty output folder."""
        (tmp_path / "neox").mkdir()
        return tmp_path / "neox"

    def test_inexpressible_model_leaves_the_folder_empty(
        self, published: StateDict, published_config: ModelConfig, folder: Path
    ) -> None:
        checkpoint = from_published(published, published_config, "a", "a")
        kept = replace(published_config, norm_eps=1e-6)
        with pytest.raises(UserError, match="cannot express"):
            write_neox(folder, replace(checkpoint, config=kept))
        assert not list(folder.iterdir())

    def test_call_of_the_published_code_reads_the_file(
        self, published: StateDict, published_config: ModelConfig, folder: Path
    ) -> None:
        write_neox(folder, from_published(published, published_config, "a", "a"))
        actual = torch.load(folder / "pytorch_model.bin")  # call in the published code
        assert type(actual) is dict
        assert list(actual) == list(published_names(published_config).values())
        assert equal_weights(actual, published)

    def test_view_is_written_without_the_rest_of_its_storage(
        self, published: StateDict, published_config: ModelConfig, folder: Path
    ) -> None:
        checkpoint = from_published(published, published_config, "a", "a")
        row = torch.cat([tensor.flatten() for tensor in checkpoint.weights.values()])
        views, start = {}, 0
        for name, tensor in checkpoint.weights.items():
            views[name] = row[start : (start := start + tensor.numel())].view(tensor.shape)
        views["embedding.weight"] = torch.cat([views["embedding.weight"]] * 5)[512:1024]
        write_neox(folder, Checkpoint(published_config, views))
        file = folder / "pytorch_model.bin"
        assert equal_weights(torch.load(file), published)
        assert file.stat().st_size < 1.1 * row.nbytes
