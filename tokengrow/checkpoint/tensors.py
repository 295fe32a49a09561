"""Named tensors in .safetensors files: streamed reads and writes, and checks."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tokengrow.errors import UserError

StateDict = dict[str, Tensor]

EXTENSIONS = (".bin", ".pt", ".pth", ".safetensors")
"""Extensions of files that can hold weights."""
WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""Data types of weights. torch cannot compute in narrower ones."""


class TensorFile(Mapping[str, Tensor]):
    """Tensors of a .safetensors file, each read on access and not cached.

    Args:
        path: the file; it must not change.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        with safe_open(path, "pt") as file:
            self._names = dict.fromkeys(file.keys())

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        # Opened for each tensor: pages of a mapped file stay in memory while it is open.
        with safe_open(self._path, "pt") as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
}
"""Data type to its name in a safetensors header."""
HEADER_ENTRY = 256
"""Maximum size of the header entry of one tensor, in bytes: name, dtype, shape and offsets."""


def stream_tensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    max_tensors: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a .safetensors file tensor by tensor, with one tensor in memory at a time.

    The header comes first in the file but is known last. Space is reserved for it, and the rest is
    padded with spaces, which the format allows.

    Args:
        path: file to create; must not exist.
        tensors: (name, tensor on the CPU), each read once.
        max_tensors: maximum number of tensors.
        metadata: metadata of the header.

    Raises:
        UserError: a tensor has a data type that a checkpoint cannot hold.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    room = 8 * ((max_tensors * HEADER_ENTRY + len(json.dumps(entries))) // 8 + 1)
    with path.open("xb") as file:
        file.seek(8 + room)
        for name, tensor in tensors:
            begin = file.tell() - 8 - room
            if tensor.dtype not in DTYPES:
                valid = ", ".join(map(dtype_name, DTYPES))
                raise UserError(
                    f"{name} must be one of {valid}, got {dtype_name(tensor.dtype)}. Convert it."
                )
            flat = tensor.detach().contiguous().reshape(-1)
            file.write(flat.view(torch.uint8).numpy().data)
            entries[name] = {
                "dtype": DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [begin, file.tell() - 8 - room],
            }
        header = json.dumps(entries, separators=(",", ":")).encode().ljust(room)
        if len(header) > room:
            raise ValueError(f"{len(entries)} tensors need a header of {len(header)} bytes")
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header)


def read_safetensors(path: Path) -> StateDict:
    """Return the memory-mapped weights of a .safetensors file, which may be foreign.

    Raises:
        UserError: the file is missing or damaged, or holds tensors that are not weights.
    """
    check_exists(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is not a complete .safetensors file ({error}). Download or export it again."
        ) from None
    check_weights(path, tensors)
    return tensors


def check_exists(path: Path) -> None:
    """Raise `UserError` if a weights file does not exist."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist. Give the path of a weights file, or download or export it "
            "again."
        )


def check_weights(path: Path, tensors: StateDict) -> None:
    """Raise `UserError` with the names of the tensors that cannot be weights.

    Args:
        path: file of the tensors, for the error message.
        tensors: name to tensor.
    """
    wrong = [
        f"{name} ({dtype_name(tensor.dtype)})"
        for name, tensor in tensors.items()
        if tensor.dtype not in WEIGHT_TYPES or tensor.layout != torch.strided or tensor.is_meta
    ]
    if wrong:
        raise UserError(
            f"{path}: all tensors must be dense and of type "
            f"{', '.join(map(dtype_name, WEIGHT_TYPES))}, got {', '.join(wrong)}. Convert or "
            "remove them."
        )


def shape_mismatches(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> list[str]:
    """Return one clause per tensor that is missing, unexpected, or of the wrong shape.

    Args:
        tensors: name to tensor.
        shapes: name to shape of exactly the tensors of the model.
    """
    wrong = []
    for name, shape in shapes.items():
        if name not in tensors:
            wrong.append(f"{name} {shape} is missing")
        elif (found := list(tensors[name].shape)) != shape:
            wrong.append(f"{name} must have shape {shape}, got {found}")
    wrong += [
        f"{name} {list(tensor.shape)} is not part of the model"
        for name, tensor in tensors.items()
        if name not in shapes
    ]
    return wrong


def dtype_name(dtype: torch.dtype) -> str:
    """Return the short name of a data type, for example float16."""
    return str(dtype).removeprefix("torch.")
