"""What is evaluated: a checkpoint's model on a device, and the tokenizer of its training."""

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
    """A model that is ready to be asked."""

    tokenizer: Tokenizer
    """Of its checkpoint."""
    scorer: Scorer
    """With the model, in eval mode and on its device."""

    @property
    def model(self) -> LanguageModel:
        """The scorer's."""
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
        """Puts a checkpoint's model on a device.

        Args:
            checkpoint: with weights and a tokenizer.
            device: where it computes.
            precision: as `FabricConfig.chosen_precision` gives it; weights become float32, but for
                bf16-true.
            autocast: of that precision; Fabric's.
            batch_size: rows of a batch; None: automatic.

        Raises:
            UserError: a checkpoint without a tokenizer.
        """
        tokenizer = checkpoint_tokenizer(checkpoint)
        dtype = torch.bfloat16 if precision == "bf16-true" else torch.float32
        model = checkpoint.model.to(device, dtype).eval()
        return cls(tokenizer, Scorer(model, batch_size, autocast))


def model_key(checkpoint: Checkpoint, precision: str) -> str:
    """A hash of all that a model's answers depend on, but for rounding: weights, sizes, tokenizer
    and precision.

    Args:
        checkpoint: from the disk, with a tokenizer.
        precision: as `FabricConfig.chosen_precision` gives it.
    """
    assert checkpoint.folder is not None, "weights are known by their hash on the disk"
    fingerprint = checkpoint_tokenizer(checkpoint).fingerprint
    identity = [asdict(checkpoint.lineage_source()), fingerprint, precision]
    return sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
