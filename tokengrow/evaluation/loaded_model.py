"""Model of a checkpoint, placed on a device and ready for scoring."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from hashlib import sha256

import torch

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.data.open_tokens import checkpoint_tokenizer
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.evaluation.scoring import Scorer
from tokengrow.model.tokenformer import LanguageModel


@dataclass(frozen=True)
class LoadedModel:
    """Model in eval mode on its device, with its tokenizer."""

    tokenizer: Tokenizer
    """Tokenizer stored in the checkpoint."""
    scorer: Scorer
    """Scorer that holds the model."""

    @property
    def model(self) -> LanguageModel:
        """Model of the scorer."""
        return self.scorer.model

    @classmethod
    def from_checkpoint(
        cls,
        checkpoint: Checkpoint,
        device: torch.device,
        precision: str,
        autocast: Callable[[], AbstractContextManager[object]],
        batch_size: int | None = None,
    ) -> "LoadedModel":
        """Move the model of a checkpoint to a device.

        Args:
            checkpoint: checkpoint with weights and a tokenizer.
            device: device of the computation.
            precision: value of `FabricConfig.chosen_precision`. Weights become float32, except for
                bf16-true.
            autocast: context manager of that precision, such as Fabric's `autocast`.
            batch_size: rows per batch; None: automatic.

        Raises:
            UserError: the checkpoint has no tokenizer.
        """
        tokenizer = checkpoint_tokenizer(checkpoint)
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        model = checkpoint.model.to(device, dtype).eval()
        return cls(tokenizer, Scorer(model, batch_size, autocast))


def model_key(checkpoint: Checkpoint, precision: str) -> str:
    """Return a hash of everything that the responses of a model depend on, except rounding.

    It covers the weights, the sizes, the tokenizer and the precision.

    Args:
        checkpoint: checkpoint on disk, with a tokenizer.
        precision: value of `FabricConfig.chosen_precision`.
    """
    assert checkpoint.folder is not None, "the hash of the weights comes from the checkpoint files"
    fingerprint = checkpoint_tokenizer(checkpoint).fingerprint
    identity = [asdict(checkpoint.lineage_source()), fingerprint, precision]
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
