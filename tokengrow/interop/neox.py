"""The published layout of the weights: GPT-NeoX's names, in one file, beside its YAML.

A folder of it holds `pytorch_model.bin`, `config.yml` and, if there is one, `tokenizer.json`.
"""

import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from tokengrow.checkpoint import layout
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.checkpoint.tensors import (
    EXTENSIONS,
    StateDict,
    check_exists,
    check_weights,
    read_safetensors,
    shape_mismatches,
)
from tokengrow.errors import UserError
from tokengrow.files import write_yaml
from tokengrow.interop.neox_config import NeoxConfig
from tokengrow.model.architectures import as_tokenformer
from tokengrow.model.config import ROLES, ModelConfig
from tokengrow.model.presets import PRESETS
from tokengrow.model.tokenformer import weight_shapes

WEIGHTS = "pytorch_model.bin"
"""The only file that the published code reads."""
CONFIG = "config.yml"
"""The model's keys, in a folder that tokengrow wrote."""

EMBEDDING = "sequential.0.word_embeddings.weight"

MODULES = {
    "attention.query": "attention.query",
    "attention.key": "attention.key",
    "attention.value": "attention.value",
    "attention.output": "attention.proj",
    "ffn": "mlp",
}
"""Our name of a Pattention layer in its block to the published one, in the published order."""

_ZIP = b"PK\x03\x04"
_CHUNK = 2**20


def official_names(config: ModelConfig) -> dict[str, str]:
    """Our name of every tensor to the published one, in the published order."""
    names = {"embedding.weight": EMBEDDING}
    for layer in range(config.layers):
        for ours, theirs in MODULES.items():
            for tokens in ("key_param_tokens", "value_param_tokens"):
                # Before the blocks stand the embedding and a layer that only transposes.
                names[f"blocks.{layer}.{ours}.{tokens}"] = (
                    f"sequential.{layer + 2}.{theirs}.{tokens}"
                )
    for part in ("weight", "bias"):
        names[f"final_norm.{part}"] = f"sequential.{config.layers + 3}.norm.{part}"
    return names


def find_weights(folder: Path) -> Path:
    """The one file of weights in a folder, as one downloads it.

    Raises:
        UserError: there is none, or there are several and none has a usual name.
    """
    for name in (WEIGHTS, layout.WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in EXTENSIONS)
    if not found:
        raise UserError(
            f"{folder} holds no weights: neither {WEIGHTS} nor another of *{', *'.join(EXTENSIONS)}"
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} holds several files of weights: give one of {names}")
    return found[0]


def read_tensors(path: Path) -> StateDict:
    """The tensors of a published file, by its names; memory-mapped if the format allows it.

    Nothing in a pickle is executed.

    Args:
        path: `.safetensors`, or else what `torch.save` wrote.

    Raises:
        UserError: a file that is missing, damaged, or holds anything but weights.
    """
    if path.suffix == ".safetensors":
        return _apart(read_safetensors(path))
    tensors = _read_pickle(path)
    check_weights(path, tensors)
    return _apart(tensors)


def vocabulary_of(tensors: Mapping[str, Tensor]) -> int:
    """V, the rows of the embedding; 1 where there is none."""
    rows = tensors[EMBEDDING].shape[:1] if EMBEDDING in tensors else ()
    return rows[0] if rows else 1


def fitting_presets(tensors: Mapping[str, Tensor]) -> list[str]:
    """The published sizes whose every tensor is there, in its shape, and no other."""
    sizes = {name: _official_shapes(ModelConfig.preset(name)) for name in PRESETS}
    return [name for name, shapes in sizes.items() if not shape_mismatches(tensors, shapes)]


def from_official(
    tensors: Mapping[str, Tensor], config: ModelConfig, weights: str, sizes: str
) -> Checkpoint:
    """A checkpoint of published tensors.

    Args:
        tensors: by published names; not copied.
        config: of the model that they are.
        weights: where the tensors are from, for error messages.
        sizes: where the config is from.

    Raises:
        UserError: names every tensor that is missing, not part of the model, or of another shape.
    """
    if wrong := shape_mismatches(tensors, _official_shapes(config)):
        fitting = "".join(f", the size of preset={name}" for name in fitting_presets(tensors))
        raise UserError(
            f"{weights} does not fit {sizes}: it has {_sizes_text(tensors)}{fitting}; give the "
            f"sizes that it was trained with: {'; '.join(wrong)}"
        )
    names = official_names(config)
    return Checkpoint(config, {ours: tensors[theirs] for ours, theirs in names.items()})


def write_neox(folder: Path, checkpoint: Checkpoint) -> None:
    """Writes a checkpoint as the published code reads it.

    That code reads nothing but a pickle: `pytorch_model.bin` is the only one that tokengrow writes.
    Optimizer, training state and lineage have no place in it.

    Args:
        folder: exists and is empty.
        checkpoint: of a model that the published code can express.

    Raises:
        UserError: it cannot; nothing is written then.
    """
    config = as_tokenformer(checkpoint.config, "The published format has no other models.")
    keys = NeoxConfig.describing(config).to_dict()  # which refuses, so it comes first
    names = official_names(config)
    tensors = {theirs: _alone(checkpoint.weights[ours]) for ours, theirs in names.items()}
    torch.save(tensors, folder / WEIGHTS)
    write_yaml(folder / CONFIG, keys)
    if checkpoint.tokenizer is not None:
        (folder / layout.TOKENIZER).write_bytes(checkpoint.tokenizer.encode())


def _official_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """The published name of every tensor to its shape."""
    shapes = weight_shapes(config)
    return {theirs: shapes[ours] for ours, theirs in official_names(config).items()}


def _sizes_text(tensors: Mapping[str, Tensor]) -> str:
    """The sizes that published tensors say, in words."""
    layers = {name.split(".")[1] for name in tensors if name.endswith("_param_tokens")}
    embedding = tensors.get(EMBEDDING)
    width = embedding.shape[-1] if embedding is not None and embedding.dim() else "?"
    firsts = [tensors.get(f"sequential.2.{module}.key_param_tokens") for module in MODULES.values()]
    tokens = [str(first.shape[0]) if first is not None and first.dim() else "?" for first in firsts]
    return (
        f"{len(layers)} layers, width {width}, {' / '.join(tokens)} parameter tokens ("
        f"{' / '.join(ROLES)}) and a vocabulary of {vocabulary_of(tensors)}"
    )


def _read_pickle(path: Path) -> StateDict:
    """A flat mapping of names to tensors; refuses everything else."""
    check_exists(path)
    with path.open("rb") as file:
        zipped = file.read(len(_ZIP)) == _ZIP
    try:
        if zipped:
            _check_sums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the format that torch wrote before version 1.6
            read = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises nothing more precise
        raise UserError(f"{path} {_what_is_wrong(str(error))}") from None
    if not isinstance(read, dict):
        raise UserError(f"{path} holds a {type(read).__name__}, not named tensors: {_STATE_DICT}")
    others = [
        f"{name!r} is a {type(value).__name__}"
        for name, value in read.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if others:
        raise UserError(
            f"{path} holds more than named tensors ({', '.join(others)}): {_STATE_DICT}"
        )
    return read


_STATE_DICT = "give a file of the model's own state dict"


def _what_is_wrong(reason: str) -> str:
    """The end of a sentence about a pickle that torch refused."""
    if refused := re.search(r"GLOBAL ([\w.]+)", reason):
        return (
            f"holds a {refused[1]}, and of a pickle nothing but tensors is read (nothing in it was "
            f"run): {_STATE_DICT}"
        )
    return (
        "is no whole file of tensors as torch.save writes it (cut short, damaged, or a pointer of "
        "Git LFS): download or copy it again"
    )


def _check_sums(path: Path) -> None:
    """Compares every record of a zip with its CRC-32, which torch does not do.

    Raises:
        zipfile.BadZipFile: one that differs.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.CRC == 0:  # torch can be told to leave it out
                continue
            with archive.open(record) as file:
                while file.read(_CHUNK):
                    pass


def _apart(tensors: StateDict) -> StateDict:
    """The same tensors, contiguous; one that shares memory with another is copied."""
    apart, end = {}, 0
    rows = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    for name, tensor in sorted(rows.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        apart[name] = tensor.clone() if start < end else tensor
        end = max(end, start + tensor.nbytes)
    return apart


def _alone(tensor: Tensor) -> Tensor:
    """The same memory as a tensor of its own: torch.save writes all that a view is a view of."""
    tensor = tensor.detach().contiguous()
    start = tensor.storage_offset() * tensor.element_size()
    memory = tensor.untyped_storage()[start : start + tensor.nbytes]
    return tensor.new_empty(0).set_(memory, 0, tensor.shape)  # type: ignore[call-overload]
