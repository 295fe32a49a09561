"""Is the grown model the same function? Measured, never assumed.

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

FLOAT64_PARAMETERS = 50_000_000
"""Models up to this size are compared in float64, larger ones in float32; never in bfloat16, whose
own noise would hide the drift."""

POSITIONS = 256
"""Tokens compared at a time: a row of 50,304 logits in float64 is 0.4 MB."""

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
"""Largest |delta logit| over max(1, largest |logit|) that counts as the same function."""


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
def logits_of(
    config: ModelConfig, weights: Mapping[str, Tensor], dtype: torch.dtype, ids: Tensor
) -> Tensor:
    """Logits [B, T, V] of a model that lives no longer than this, without a copy of weights that
    have the dtype already."""
    with torch.device("meta"):
        model = TokenFormer(config)
    model.load_state_dict({name: weights[name].to(dtype) for name in weights}, assign=True)
    return model.eval()(ids)


@torch.inference_mode()
def measure_drift(source: TokenFormer, grown: TokenFormer, probe: Tensor) -> Drift:
    """Runs both models on the same tokens.

    Args:
        source: on the CPU, in the precision to compare in.
        grown: likewise.
        probe: [B, T + 1] int64 token ids.
    """
    inputs = probe[:, :-1]
    return compare_logits(source(inputs), grown(inputs), probe[:, 1:])


@torch.inference_mode()
def compare_logits(before: Tensor, after: Tensor, targets: Tensor) -> Drift:
    """How far logits have moved.

    Sums and differences are taken in float64, some positions at a time: at a long context and a
    large vocabulary such copies would outgrow the models.

    Args:
        before: [B, T, V] of the source.
        after: [B, T, V] of the grown model.
        targets: [B, T] int64 ids that were to be predicted.
    """
    largest, moved = torch.zeros(2, dtype=torch.float64)
    sums = torch.zeros(4, dtype=torch.float64)  # |delta logit|, KL, loss before, loss after
    for old, new, ids in zip(
        *(tensor.flatten(0, 1).split(POSITIONS) for tensor in (before, after)),
        targets.flatten().split(POSITIONS),
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
