"""Named tensors: in .safetensors files, and beside those that a model has."""

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from tokengrow.errors import UserError

State = dict[str, Tensor]

EXTENSIONS = (".bin", ".pt", ".pth", ".safetensors")
"""Of the files that can hold weights, whoever wrote them."""
WEIGHT_TYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""What a weight can be; of narrower floats torch can neither mix nor compute any."""


class TensorFile(Mapping[str, Tensor]):
    """The tensors of a .safetensors file, each read when it is asked for and not kept.

    Args:
        path: of the file; it must stay as it is.
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
        # Opened anew for each: pages of a mapped file stay in memory for as long as it is open.
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
"""What safetensors calls them."""
HEADER_ENTRY = 256
"""Bytes that a tensor takes at most in the header: its name, dtype, shape and offsets."""


def stream_tensors(
    path: Path,
    tensors: Iterable[tuple[str, Tensor]],
    most: int,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a .safetensors file tensor by tensor; safetensors itself wants all of them at once.

    The header stands in front and is known at the end. So room is left for it, and what it does not
    need is filled with spaces, as the format allows.

    Args:
        path: must not exist yet.
        tensors: (name, tensor on the CPU), each looked at once.
        most: how many there are at most.
        metadata: of the file's header.
    """
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    room = 8 * ((most * HEADER_ENTRY + len(json.dumps(entries))) // 8 + 1)
    with path.open("xb") as file:
        file.seek(8 + room)
        for name, tensor in tensors:
            begin = file.tell() - 8 - room
            if tensor.dtype not in DTYPES:
                raise UserError(
                    f"{name} is {dtype_name(tensor.dtype)}: a checkpoint holds "
                    f"{', '.join(map(dtype_name, DTYPES))}"
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


def read_safetensors(path: Path) -> State:
    """The weights of a .safetensors file that somebody else may have written, memory-mapped.

    Raises:
        UserError: it is missing or damaged, or holds anything but weights.
    """
    check_there(path)
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise UserError(
            f"{path} is no whole .safetensors file ({error}): download, copy or export it again"
        ) from None
    check_weights(path, tensors)
    return tensors


def check_there(path: Path) -> None:
    """Refuses a file of weights that does not exist."""
    if not path.is_file():
        raise UserError(
            f"{path} does not exist: give the path of a file of weights, or download or export it "
            "again"
        )


def check_weights(path: Path, tensors: State) -> None:
    """Refuses tensors that cannot be weights, by their names.

    Args:
        path: of their file, for the error message.
        tensors: what it holds.
    """
    wrong = [
        f"{name} ({dtype_name(tensor.dtype)})"
        for name, tensor in tensors.items()
        if tensor.dtype not in WEIGHT_TYPES or tensor.layout != torch.strided or tensor.is_meta
    ]
    if wrong:
        raise UserError(
            f"{path} holds tensors that are no dense weights of "
            f"{', '.join(map(dtype_name, WEIGHT_TYPES))}: {', '.join(wrong)}: convert or remove "
            "them"
        )


def misfits(tensors: Mapping[str, Tensor], shapes: Mapping[str, list[int]]) -> list[str]:
    """What keeps tensors from being those of a model, one clause for each of them.

    Args:
        tensors: at hand.
        shapes: name to shape of every tensor that there has to be, and no other.
    """
    wrong = []
    for name, shape in shapes.items():
        if name not in tensors:
            wrong.append(f"{name} {shape} is missing")
        elif (found := list(tensors[name].shape)) != shape:
            wrong.append(f"{name} is {found}, not {shape}")
    surplus = [name for name in tensors if name not in shapes]
    return wrong + [f"{name} {list(tensors[name].shape)} is no part of it" for name in surplus]


def dtype_name(dtype: torch.dtype) -> str:
    """As one says it: float16."""
    return str(dtype).removeprefix("torch.")
