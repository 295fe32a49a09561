"""Measurement of the drift between a grown model and its source.

Shapes: `B` batch, `T` sequence, `V` vocabulary.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrow.checkpoint.schema import Drift
from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

MAX_FLOAT64_PARAMETERS = 50_000_000
"""Maximum size of a model that is compared in float64.

Larger ones are compared in float32, never in bfloat16, whose rounding would hide the drift."""

CHUNK_POSITIONS = 256
"""Tokens compared at a time: a row of 50,304 logits in float64 takes 0.4 MB."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Maximum |delta logit| over max(1, largest |logit|) that counts as the same function."""


class DriftError(UserError):
    """Growth whose drift exceeds the tolerance."""


def probe_dtype(config: ModelConfig) -> torch.dtype:
    """Return the precision in which a model of this size is compared."""
    is_small = config.num_parameters() <= MAX_FLOAT64_PARAMETERS
    return torch.float64 if is_small else torch.float32


def default_tolerance(weights: torch.dtype, compared: torch.dtype, rounded: bool) -> float:
    """Return the maximum relative drift that counts as the same function.

    Args:
        weights: dtype in which the grown weights are stored.
        compared: dtype in which the models are compared.
        rounded: whether the growth computes new numbers from old ones and rounds them to
            `weights`, instead of only placing old numbers next to zeros.
    """
    narrow = min((weights, compared), key=lambda dtype: dtype.itemsize) if rounded else compared
    return TOLERANCE[narrow]


def random_probe(config: ModelConfig, generator: torch.Generator) -> Tensor:
    """Draw random token ids [2, T + 1], with T at most 128."""
    length = min(config.context_length, 128) + 1
    return torch.randint(config.vocab_size, (2, length), generator=generator)


@torch.inference_mode()
def compute_logits(
    config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, ids: Tensor
) -> Tensor:
    """Return the logits [B, T, V] of a model that exists only during this call.

    Weights that have the dtype already are not copied.
    """
    with torch.device("meta"):
        model = TokenFormer(config)
    model.load_state_dict({name: weights[name].to(dtype) for name in weights}, assign=True)
    logits: Tensor = model.eval()(ids)
    return logits


@torch.inference_mode()
def measure_drift(source: TokenFormer, grown: TokenFormer, probe: Tensor) -> Drift:
    """Run both models on the same tokens and compare their logits.

    Args:
        source: model on the CPU, in the precision of the comparison.
        grown: model on the CPU, in the precision of the comparison.
        probe: [B, T + 1] int64 token ids.
    """
    inputs = probe[:, :-1]
    return compare_logits(source(inputs), grown(inputs), probe[:, 1:])


@torch.inference_mode()
def compare_logits(before: Tensor, after: Tensor, targets: Tensor) -> Drift:
    """Measure the change of logits.

    Sums and differences are computed in float64, for `CHUNK_POSITIONS` positions at a time. With a
    long context and a large vocabulary, full copies would need more memory than the models.

    Args:
        before: [B, T, V] logits of the source.
        after: [B, T, V] logits of the grown model.
        targets: [B, T] int64 ids of the next tokens.
    """
    largest, moved = torch.zeros(2, dtype=torch.float64)
    sums = torch.zeros(4, dtype=torch.float64)  # |delta logit|, KL, loss before, loss after
    for old, new, ids in zip(
        *(torch.split(tensor.flatten(0, 1), CHUNK_POSITIONS) for tensor in (before, after)),
        torch.split(targets.flatten(), CHUNK_POSITIONS),
        strict=True,
    ):
        old, new = old.double(), new.double()
        delta = (new - old).abs()
        largest, moved = torch.maximum(largest, old.abs().max()), torch.maximum(moved, delta.max())
        log_old, log_new = old.log_softmax(-1), new.log_softmax(-1)
        kl = F.kl_div(log_new, log_old, reduction="sum", log_target=True)
        losses = [F.nll_loss(each, ids, reduction="sum") for each in (log_old, log_new)]
        sums += torch.stack([delta.sum(), kl, *losses])
    count = targets.numel()
    return Drift(
        dtype=str(after.dtype).removeprefix("torch."),
        probe_tokens=count,
        max_logit=moved.item(),
        mean_logit=sums[0].item() / after.numel(),
        relative=moved.item() / max(1.0, largest.item()),
        kl=sums[1].item() / count,
        loss_source=sums[2].item() / count,
        loss_grown=sums[3].item() / count,
    )


def check_drift(drift: Drift, limit: float) -> None:
    """Raise an error if the relative drift exceeds the limit.

    Raises:
        DriftError: the drift exceeds the limit, or is not a number.
    """
    if drift.relative <= limit:
        return
    if drift.relative > limit:
        remedy = "Use growth=zero_key, or accept the change with growth.tolerance=inf."
    else:
        remedy = "Check the weights of the source for NaN and infinity."
    raise DriftError(
        f"The grown model is not the same function. Its logits moved by {drift.max_logit:.3g}, "
        f"which is {drift.relative:.3g} of their size; growth.tolerance is {limit:.3g}. Its loss "
        f"moved from {drift.loss_source:.6f} to {drift.loss_grown:.6f}. Nothing was written. "
        f"{remedy}"
    )
