"""Published format of the weights: tensors with GPT-NeoX's names in one file, next to its YAML.

A folder has `pytorch_model.bin`, `config.yml` and optionally `tokenizer.json`.
"""

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
from tokengrow.compat import refused_pickle_global
from tokengrow.errors import UserError
from tokengrow.files import write_yaml
from tokengrow.interop.neox_config import NeoxConfig
from tokengrow.model.architectures import as_tokenformer
from tokengrow.model.config import ROLES, ModelConfig
from tokengrow.model.presets import PRESETS
from tokengrow.model.tokenformer import weight_shapes

WEIGHTS = "pytorch_model.bin"
"""Only file of weights that the published code reads."""

CONFIG = "config.yml"
"""YAML of the model in a folder that tokengrow wrote."""

EMBEDDING = "sequential.0.word_embeddings.weight"

PATTENTION_NAMES = {
    "attention.query": "attention.query",
    "attention.key": "attention.key",
    "attention.value": "attention.value",
    "attention.output": "attention.proj",
    "ffn": "mlp",
}
"""Name of a Pattention layer in its block to its published name, in the published order."""

_ZIP_MAGIC = b"PK\x03\x04"
_CHUNK = 2**20
"""Bytes read at a time to verify a checksum."""


def published_names(config: ModelConfig) -> dict[str, str]:
    """Return the name of every tensor to its published name, in the published order."""
    names = {"embedding.weight": EMBEDDING}
    for layer in range(config.layers):
        for name, published in PATTENTION_NAMES.items():
            for tokens in ("key_param_tokens", "value_param_tokens"):
                # The embedding and a layer that only transposes come before the blocks.
                names[f"blocks.{layer}.{name}.{tokens}"] = (
                    f"sequential.{layer + 2}.{published}.{tokens}"
                )
    for part in ("weight", "bias"):
        names[f"final_norm.{part}"] = f"sequential.{config.layers + 3}.norm.{part}"
    return names


def find_weights(folder: Path) -> Path:
    """Return the file of weights in a downloaded folder.

    Raises:
        UserError: the folder has no weights, or several files and none with a usual name.
    """
    for name in (WEIGHTS, layout.WEIGHTS):
        if (folder / name).is_file():
            return folder / name
    found = sorted(path for path in folder.iterdir() if path.suffix in EXTENSIONS)
    if not found:
        raise UserError(
            f"{folder} has no weights. Give a directory with {WEIGHTS} or another file of "
            f"*{', *'.join(EXTENSIONS)}."
        )
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise UserError(f"{folder} has several files of weights. Give one of {names}.")
    return found[0]


def read_tensors(path: Path) -> StateDict:
    """Read the tensors of a published file by its names, memory-mapped if the format allows it.

    Nothing in a pickle is executed.

    Args:
        path: a `.safetensors` file, or any other file of `torch.save`.

    Raises:
        UserError: the file is missing or damaged, or holds anything other than weights.
    """
    if path.suffix == ".safetensors":
        return _unshare_memory(read_safetensors(path))
    tensors = _read_pickle(path)
    check_weights(path, tensors)
    return _unshare_memory(tensors)


def vocab_size_of(tensors: Mapping[str, Tensor]) -> int:
    """Return V, the rows of the embedding; 1 without an embedding."""
    rows = tensors[EMBEDDING].shape[:1] if EMBEDDING in tensors else ()
    return rows[0] if rows else 1


def matching_presets(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the published sizes that have exactly these tensors, with these shapes."""
    sizes = {name: _published_shapes(ModelConfig.preset(name)) for name in PRESETS}
    return [name for name, shapes in sizes.items() if not shape_mismatches(tensors, shapes)]


def from_published(
    tensors: Mapping[str, Tensor], config: ModelConfig, weights: str, sizes: str
) -> Checkpoint:
    """Build a checkpoint from published tensors.

    Args:
        tensors: published name to tensor; not copied.
        config: config of their model.
        weights: path of the tensors, for error messages.
        sizes: origin of the config, for error messages.

    Raises:
        UserError: tensors are missing, unexpected or of another shape; the message names all.
    """
    if mismatches := shape_mismatches(tensors, _published_shapes(config)):
        presets = "".join(f", the sizes of preset={name}" for name in matching_presets(tensors))
        raise UserError(
            f"{weights} does not match {sizes}: it has {_describe_sizes(tensors)}{presets}. Give "
            f"the sizes of its training. Mismatches: {'; '.join(mismatches)}."
        )
    names = published_names(config)
    return Checkpoint(config, {name: tensors[published] for name, published in names.items()})


def write_neox(folder: Path, checkpoint: Checkpoint) -> None:
    """Write the model and the tokenizer of a checkpoint for the published code.

    The published code reads only a pickle, `pytorch_model.bin`. It is the only pickle that
    tokengrow writes. The format has no optimizer state, training state or lineage.

    Args:
        folder: an existing empty directory.
        checkpoint: checkpoint of a model that the published code can express.

    Raises:
        UserError: the published code cannot express the model; nothing is written.
    """
    config = as_tokenformer(checkpoint.config, "The published format has no other models.")
    keys = NeoxConfig.from_model(config).to_dict()  # may raise, so it comes before any write
    names, weights = published_names(config), checkpoint.weights
    tensors = {published: _own_storage(weights[name]) for name, published in names.items()}
    torch.save(tensors, folder / WEIGHTS)
    write_yaml(folder / CONFIG, keys)
    if checkpoint.tokenizer is not None:
        (folder / layout.TOKENIZER).write_bytes(checkpoint.tokenizer.encode())


def _published_shapes(config: ModelConfig) -> dict[str, list[int]]:
    """Return the published name of every tensor to its shape."""
    shapes = weight_shapes(config)
    return {published: shapes[name] for name, published in published_names(config).items()}


def _describe_sizes(tensors: Mapping[str, Tensor]) -> str:
    """Return the sizes of a model as text, from its published tensors."""
    layers = {name.split(".")[1] for name in tensors if name.endswith("_param_tokens")}
    embedding = tensors.get(EMBEDDING)
    width = embedding.shape[-1] if embedding is not None and embedding.dim() else "?"
    names = [f"sequential.2.{name}.key_param_tokens" for name in PATTENTION_NAMES.values()]
    keys = [tensors.get(name) for name in names]
    tokens = [str(key.shape[0]) if key is not None and key.dim() else "?" for key in keys]
    return (
        f"{len(layers)} layers, width {width}, {' / '.join(tokens)} parameter tokens ("
        f"{' / '.join(ROLES)}) and a vocabulary of {vocab_size_of(tensors)}"
    )


def _read_pickle(path: Path) -> StateDict:
    """Read a flat mapping of names to tensors; raise `UserError` for anything else."""
    check_exists(path)
    with path.open("rb") as file:
        is_zip = file.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC
    try:
        if is_zip:
            _verify_checksums(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about its format before version 1.6
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (PermissionError, MemoryError):
        raise
    except Exception as error:  # torch raises nothing more specific
        raise UserError(f"{path} {_describe_pickle_error(str(error))}") from None
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise UserError(f"{path} must hold named tensors, got a {kind}. {_STATE_DICT}")
    others = [
        f"{name!r} is a {type(value).__name__}"
        for name, value in content.items()
        if not isinstance(name, str) or not isinstance(value, Tensor)
    ]
    if others:
        raise UserError(
            f"{path} must hold only named tensors, but {', '.join(others)}. {_STATE_DICT}"
        )
    return content


_STATE_DICT = "Give a file with only the state dict of the model."


def _describe_pickle_error(message: str) -> str:
    """Return the rest of an error message that starts with the path of a pickle.

    Args:
        message: message of the exception that torch raised.
    """
    if refused := refused_pickle_global(message):
        return (
            f"has a {refused}, but only tensors are read from a pickle. Nothing in it was run. "
            f"{_STATE_DICT}"
        )
    return (
        "is not a complete file of torch.save: it is truncated, damaged, or a pointer of Git LFS. "
        "Download or copy it again."
    )


def _verify_checksums(path: Path) -> None:
    """Compare every record of a zip file with its CRC-32, which torch does not do.

    Raises:
        zipfile.BadZipFile: a record differs.
    """
    with zipfile.ZipFile(path) as archive:
        for record in archive.infolist():
            if record.CRC == 0:  # torch has an option to omit it
                continue
            with archive.open(record) as file:
                while file.read(_CHUNK):
                    pass


def _unshare_memory(tensors: StateDict) -> StateDict:
    """Return contiguous tensors; a tensor that shares memory with another one is copied."""
    unshared, end = {}, 0
    contiguous = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    for name, tensor in sorted(contiguous.items(), key=lambda item: item[1].data_ptr()):
        start = tensor.data_ptr()
        unshared[name] = tensor.clone() if start < end else tensor
        end = max(end, start + tensor.nbytes)
    return unshared


def _own_storage(tensor: Tensor) -> Tensor:
    """Return a tensor in the same memory whose storage has no other bytes.

    torch.save writes the full storage of a view.
    """
    tensor = tensor.detach().contiguous()
    start = tensor.storage_offset() * tensor.element_size()
    storage = tensor.untyped_storage()[start : start + tensor.nbytes]
    # The stubs of torch lack the overload without strides.
    own: Tensor = tensor.new_empty(0).set_(storage, 0, tensor.shape)  # type: ignore[call-overload]
    return own
