"""Private APIs and error messages of other libraries.

Everything here depends on details that a library does not promise to keep. Each entry names the
version it was checked with, and `tests/test_compat.py` fails when a new version changes it. Other
modules import these functions instead of using the details themselves.
"""

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning.fabric import Fabric
    from torch import nn


def is_out_of_memory(error: RuntimeError) -> bool:
    """Return whether an error means that the memory of a device is too small.

    torch 2.13: the CUDA allocator raises `OutOfMemoryError`; the CPU allocator raises a
    RuntimeError, which only its message distinguishes.
    """
    import torch

    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def is_peer_connection_error(error: RuntimeError) -> bool:
    """Return whether an error means that another process of the job no longer answers.

    torch 2.13: the TCP store raises its own classes; gloo raises a RuntimeError whose message holds
    the path of its source file, NCCL one with "remote process exited".
    """
    import torch.distributed as dist

    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    return any(text in str(error) for text in ("/gloo/", "remote process exited"))


def is_compiled(block: "nn.Module") -> bool:
    """Return whether a module was compiled in place.

    torch 2.13: `Module.compile` sets the private attribute `_compiled_call_impl`.
    """
    return block._compiled_call_impl is not None


def recompile_limit(limit: int) -> AbstractContextManager[None]:
    """Return a context in which torch.compile keeps up to `limit` versions of a function.

    torch 2.13: the limit is a setting of the private module `torch._dynamo`.
    """
    import torch

    patched: AbstractContextManager[None] = torch._dynamo.config.patch(recompile_limit=limit)
    return patched


def unregister_module(fabric: "Fabric", module: Any) -> None:
    """Remove a LightningModule from Fabric, so that its memory can be freed.

    lightning 2.6: `Fabric.setup_module` appends the module to the private list `_callbacks`, and
    there is no function that removes it.

    Args:
        fabric: Fabric that set up the module.
        module: wrapper that `setup_module` returned.
    """
    callbacks = fabric._callbacks
    callbacks[:] = [callback for callback in callbacks if callback is not module._original_module]


def hydra_unknown_key(error: Exception) -> str | None:
    """Return the key of an override that the config does not have; None for other errors.

    hydra-core 1.3.2: ConfigCompositionException names the key only in its message.
    """
    match = re.search(r"Could not override '([^'@]+)", str(error))
    return match[1] if match else None


def hydra_ambiguous_override(error: Exception) -> tuple[str, str] | None:
    """Return key and value of a sweep without --multirun; None for other errors.

    hydra-core 1.3.2: ConfigCompositionException names them only in its message.
    """
    match = re.search(r"Ambiguous value for argument '([^=']+)=(.*)'", str(error))
    return (match[1], match[2]) if match else None


def omegaconf_missing_key(error: Exception) -> str | None:
    """Return the key of a mandatory value that was not given; None for other errors.

    omegaconf 2.3: an interpolation to a missing value raises InterpolationToMissingValueError or
    MissingMandatoryValue; only the message is common to both.
    """
    key: str | None = getattr(error, "full_key", None)
    return key if key and "Missing mandatory value" in str(error) else None


def load_task_yaml(path: Path) -> dict[str, Any]:
    """Return the config in a task file of the lm-evaluation-harness.

    lm_eval 0.4.13: the loader that resolves `!function` is in the private module `_yaml_loader`.
    """
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(path, resolve_func=True))


def missing_column(error: Exception) -> str | None:
    """Return the quoted name of a column that a task template reads in vain; None if unknown.

    jinja2 3.1: UndefinedError names the attribute only in its message, as KeyError does.
    """
    from jinja2 import UndefinedError

    match = re.search(r"'\w+'", str(error))
    return match[0] if match and isinstance(error, UndefinedError | KeyError) else None


def refused_pickle_global(reason: str) -> str | None:
    """Return the class that `torch.load` refused to unpickle; None for other reasons.

    torch 2.13: `weights_only=True` names it only in the message of its UnpicklingError.
    """
    match = re.search(r"GLOBAL ([\w.]+)", reason)
    return match[1] if match else None
