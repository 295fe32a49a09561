"""Functions of the public Python API that combine several packages."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from tokengrow.data.tokenizer import Tokenizer
from tokengrow.evaluation.perplexity import Perplexity, measure_perplexity
from tokengrow.evaluation.scoring import Scorer
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.engine import apply_growth
from tokengrow.growth.plan import plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import LanguageModel, TokenFormer
from tokengrow.optim.adamw import AgedAdamW
from tokengrow.optim.config import OptimConfig
from tokengrow.optim.config import build_optimizer as build_empty_optimizer
from tokengrow.optim.state import collect_optimizer_state, load_optimizer_state


class GrowthResult(NamedTuple):
    """Grown model with the optimizer state that belongs to it."""

    model: TokenFormer
    """Grown model on the CPU."""
    optimizer_state: Mapping[str, Tensor]
    """Flat optimizer state, `{slot}.{parameter name}`; empty without an optimizer."""


def grow(
    model: TokenFormer,
    target: ModelConfig,
    optimizer: AgedAdamW | None = None,
    config: GrowthConfig | None = None,
    probe: Tensor | None = None,
) -> GrowthResult:
    """Return a larger model that computes the same function, with its optimizer state.

    Args:
        model: source, on any device; not modified.
        target: target sizes, none smaller than those of the source. tau and rotary channels stay
            those of the source.
        optimizer: optimizer of `model`, as `build_optimizer` returns it; None: no state is carried.
        config: initialisation of new parameters and drift tolerance; None: the defaults.
        probe: token ids [B, T + 1], int64, on which the growth is verified; None: random ids.

    Returns:
        The grown model on the CPU, in the precision of the source (half precision becomes float32
        if width or heads grow), and the state for `build_optimizer`.

    Raises:
        UserError: the target cannot be reached.
        DriftError: the logits changed by more than the tolerance.
    """
    plan = plan_growth(model.config, target, config=config or GrowthConfig())
    moments = collect_optimizer_state(model, optimizer) if optimizer is not None else {}
    grown = apply_growth(plan, model.to_weights(), moments, probe)
    return GrowthResult(TokenFormer.from_weights(grown.config, grown.weights), grown.optimizer)


def build_optimizer(
    model: LanguageModel,
    config: OptimConfig,
    state: Mapping[str, Tensor] | None = None,
    growth: GrowthConfig | None = None,
) -> AgedAdamW:
    """Return AdamW for all parameters of a model.

    Args:
        model: the model, on the device where it trains.
        config: optimizer settings. The learning rate is that of the first update; set
            `group["lr"]` to follow a schedule.
        state: flat optimizer state, as `grow` or a checkpoint holds it; None: start empty.
        growth: learning rate and warm-up of parameters that a growth added; None: the defaults.

    Raises:
        UserError: a tensor of the state is missing or has another shape.
    """
    optimizer = build_empty_optimizer(model, config)
    if state:
        load_optimizer_state(model, optimizer, state)
    optimizer.begin_stage(growth or GrowthConfig(), 0)
    return optimizer


def perplexity(
    model: LanguageModel,
    tokenizer: Tokenizer,
    documents: Iterable[str],
    stride: int | None = None,
    batch_size: int | None = None,
) -> Perplexity:
    """Measure the perplexity of a model on documents.

    Args:
        model: the model, on the device where it computes.
        tokenizer: its tokenizer.
        documents: texts, none of them empty; read one at a time.
        stride: tokens between two windows, at most the context length T; None: T.
        batch_size: rows per batch; None: chosen automatically.

    Returns:
        Loss (nats per token), token and word perplexity, bits per byte.

    Raises:
        UserError: the stride is above T, or there are no tokens.
    """
    return measure_perplexity(documents, tokenizer, Scorer(model.eval(), batch_size), stride)
