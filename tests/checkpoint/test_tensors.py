"""Tensor files that are read and written tensor by tensor."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tokengrow.checkpoint.tensors import TensorFile, stream_tensors
from tokengrow.errors import UserError

TENSORS = {
    "matrix": torch.arange(12, dtype=torch.float32).view(3, 4),
    "scalar": torch.tensor(7.0),
    "half": torch.arange(5, dtype=torch.bfloat16),
    "empty": torch.empty(0, 3),
    "double": torch.arange(2, dtype=torch.float64),
}


def test_what_was_streamed_is_what_safetensors_reads(tmp_path: Path) -> None:
    stream_tensors(tmp_path / "file", iter(TENSORS.items()), max_tensors=9)
    found = load_file(tmp_path / "file")
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


def test_part_of_a_tensor_is_written_as_it_is_seen(tmp_path: Path) -> None:
    column = TENSORS["matrix"][:, 1]
    stream_tensors(tmp_path / "file", [("column", column)], max_tensors=1)
    assert torch.equal(load_file(tmp_path / "file")["column"], column)


def test_more_tensors_than_there_is_room_for_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="9 tensors need a header of"):
        stream_tensors(tmp_path / "file", [(f"{'x' * 90}{n}", torch.ones(1)) for n in range(9)], 2)


def test_a_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FileExistsError):
        stream_tensors(tmp_path / "file", [], max_tensors=1)


def test_what_is_no_float_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="ids must be one of float64, float32, float16, bfloat16, got int64"
    ):
        stream_tensors(tmp_path / "file", [("ids", torch.arange(3))], max_tensors=1)


def test_a_tensor_file_is_a_mapping(tmp_path: Path) -> None:
    save_file(TENSORS, tmp_path / "file")
    tensors = TensorFile(tmp_path / "file")
    assert set(tensors) == set(TENSORS) and len(tensors) == 5
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    assert "half" in tensors and "another" not in tensors
    assert tensors.get("another") is None
    with pytest.raises(KeyError):
        tensors["another"]


def test_the_header_has_the_metadata_of_the_file(tmp_path: Path) -> None:
    stream_tensors(tmp_path / "file", TENSORS.items(), len(TENSORS), {"format": "pt"})
    with safe_open(tmp_path / "file", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert set(file.keys()) == set(TENSORS)
