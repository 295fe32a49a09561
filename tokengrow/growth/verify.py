"""Is the grown model the same function? Measured, never assumed.

Shapes: `B` batch, `T` sequence, `V` vocabulary.
"""

from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

FLOAT64_PARAMETERS = 50_000_000
"""Models up to this size are compared in float64, larger ones in float32; never in bfloat16, whose
own noise would hide the drift."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest |delta logit| over max(1, largest |logit|) that counts as the same function."""


@dataclass(frozen=True)
class Drift:
    """How far the grown model is from its source on one probe batch."""

    dtype: str
    """Precision of the comparison."""
    probe_tokens: int
    """Tokens compared."""
    max_logit: float
    """Largest |delta logit|."""
    mean_logit: float
    """Mean |delta logit|."""
    relative: float
    """max_logit over max(1, largest |logit| of the source); what the tolerance bounds."""
    kl: float
    """Mean KL divergence of the grown from the source distribution, nats."""
    loss_source: float
    """Cross-entropy of the source on the probe, nats per token."""
    loss_grown: float
    """Cross-entropy of the grown model on the probe, nats per token."""

    def to_dict(self) -> dict[str, str | int | float]:
        """As it stands in lineage.json."""
        return asdict(self)


class DriftError(UserError):
    """A growth that moved the function further than the tolerance."""


def probe_dtype(config: ModelConfig) -> torch.dtype:
    """The precision in which a model of this size is compared."""
    return torch.float64 if config.num_parameters() <= FLOAT64_PARAMETERS else torch.float32


def exactness(weights: torch.dtype, compared: torch.dtype, rounds: bool) -> float:
    """The largest relative drift that counts as the same function.

    Args:
        weights: dtype in which the grown weights are kept.
        compared: dtype in which they are compared.
        rounds: whether the growth computes new numbers from old ones, which are then rounded to
            `weights`, or only places old numbers beside zeros.
    """
    narrow = min((weights, compared), key=lambda dtype: dtype.itemsize) if rounds else compared
    return TOLERANCE[narrow]


def random_probe(config: ModelConfig, generator: torch.Generator) -> Tensor:
    """[2, T + 1] random token ids, for want of real ones; T is at most 128."""
    length = min(config.context_length, 128) + 1
    return torch.randint(config.vocab_size, (2, length), generator=generator)


@torch.inference_mode()
def measure_drift(source: TokenFormer, grown: TokenFormer, probe: Tensor) -> Drift:
    """Runs both models on the same tokens.

    Args:
        source: on the CPU, in the precision to compare in.
        grown: likewise.
        probe: [B, T + 1] int64 token ids.

    Returns:
        The drift; sums and differences are taken in float64.
    """
    inputs, targets = probe[:, :-1], probe[:, 1:].reshape(-1)
    before, after = source(inputs).double(), grown(inputs).double()  # [B, T, V]
    delta = (after - before).abs()
    log_before, log_after = (
        before.log_softmax(-1).flatten(0, 1),
        after.log_softmax(-1).flatten(0, 1),
    )
    return Drift(
        dtype=str(next(grown.parameters()).dtype).removeprefix("torch."),
        probe_tokens=inputs.numel(),
        max_logit=delta.max().item(),
        mean_logit=delta.mean().item(),
        relative=delta.max().item() / max(1.0, before.abs().max().item()),
        kl=F.kl_div(log_after, log_before, reduction="batchmean", log_target=True).item(),
        loss_source=F.nll_loss(log_before, targets).item(),
        loss_grown=F.nll_loss(log_after, targets).item(),
    )


def check_drift(drift: Drift, limit: float) -> None:
    """Refuses a relative drift past the limit.

    Raises:
        DriftError: also for a drift that is not a number.
    """
    if not drift.relative <= limit:
        raise DriftError(
            f"the grown model is not the same function: its logits moved by {drift.max_logit:.3g} "
            f"({drift.relative:.3g} of their size, growth.tolerance is {limit:.3g}), "
            f"loss {drift.loss_source:.6f} -> {drift.loss_grown:.6f}; nothing was written"
        )
