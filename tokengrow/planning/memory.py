"""What a model will need, from its sizes alone.

Shapes: `B` micro-batch, `T` sequence, `D` width, `N` parameter tokens, `F` channels of the
Transformer's feed-forward layer, `L` layers, `V` vocabulary.
"""

from dataclasses import dataclass, field

from tokengrow.model.config import ROLES, LanguageModelConfig, ModelConfig
from tokengrow.model.transformer import TransformerConfig

FLOAT32 = 4
ADAM_MOMENTS = 2
STORED = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2}
"""Precision to bytes of a weight, its gradient, its moments, and a number of the residual
stream."""
MULTIPLIED = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2}
"""Precision to bytes of a number that enters a matrix product."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes that a training step holds on one device."""

    weights: int
    """Parameters."""
    copies: int
    """Copies of weights, which every micro-batch makes: autocast's, in bfloat16, above all."""
    gradients: int
    """One for each parameter."""
    moments: int
    """Adam's two."""
    activations: int
    """What the backward pass of a micro-batch keeps of the forward pass."""
    total: int = field(init=False)
    """All of these."""

    def __post_init__(self) -> None:
        parts = (self.weights, self.copies, self.gradients, self.moments, self.activations)
        object.__setattr__(self, "total", sum(parts))


def training_memory(
    config: LanguageModelConfig, batch: int, precision: str, kernel: str = "auto"
) -> Memory:
    """Bytes of a training step on one device.

    Args:
        config: the model.
        batch: sequences in a micro-batch.
        precision: 32-true, bf16-mixed or bf16-true.
        kernel: of Pattention; auto is taken for triton in bfloat16, for which one takes a GPU.
    """
    fused = kernel == "triton" or (kernel == "auto" and precision != "32-true")
    weights = config.num_parameters() * STORED[precision]
    return Memory(
        weights=weights,
        copies=copy_bytes(config, precision, fused),
        gradients=weights,
        moments=ADAM_MOMENTS * weights,
        activations=activation_bytes(config, batch, precision, fused),
    )


def checkpoint_bytes(config: LanguageModelConfig, precision: str) -> int:
    """Bytes of a checkpoint: weights and Adam's two moments, as training holds them."""
    return config.num_parameters() * STORED[precision] * (1 + ADAM_MOMENTS)


def copy_bytes(config: LanguageModelConfig, precision: str, fused: bool) -> int:
    """Bytes of the weights that are held a second time, whatever the batch.

    Autocast casts all that is multiplied but the norms'. Fused, and not cast, the keys of query,
    key and value are put side by side where the three are of one shape.

    Args:
        config: the model.
        precision: 32-true, bf16-mixed or bf16-true.
        fused: whether Pattention is computed by the Triton kernels.
    """
    if STORED[precision] != MULTIPLIED[precision]:
        norms = 2 * config.width
        if isinstance(config, TransformerConfig):
            norms += config.layers * 2 * 2 * config.width
        return (config.matmul_parameters() - norms) * MULTIPLIED[precision]
    if not isinstance(config, ModelConfig):
        return 0
    shapes = [config.role_shape(role) for role in ("query", "key", "value")]
    if not fused or len(set(shapes)) > 1:
        return 0
    tokens, d_in, _ = shapes[0]
    return config.layers * 3 * tokens * d_in * STORED[precision]


def activation_bytes(config: LanguageModelConfig, batch: int, precision: str, fused: bool) -> int:
    """Bytes that the backward pass of one micro-batch keeps, without checkpointing.

    Counts the tensors that autograd saves in the model, not compiled, per token. Of attention the
    rotated query and key, value, and output. Of a norm its input and output. Of the head the
    log-softmax of the logits, always float32; or fused, the gradient of its input. An estimate:
    `tests/planning/test_memory.py` holds it to what autograd saves.

    Args:
        config: the model.
        batch: sequences in a micro-batch.
        precision: 32-true, bf16-mixed or bf16-true.
        fused: whether Pattention and the loss are computed by the Triton kernels.
    """
    stored, multiplied = STORED[precision], MULTIPLIED[precision]
    head = config.width * (stored + multiplied)
    if not fused:
        head += config.vocab_size * FLOAT32
    block = 4 * config.inner_dim * multiplied + 2 * config.width * stored
    if isinstance(config, ModelConfig):
        block += _pattention_bytes(config, precision, fused)
    elif isinstance(config, TransformerConfig):
        block += _linear_bytes(config, precision)
    return batch * config.context_length * (config.layers * block + head)


def _pattention_bytes(config: ModelConfig, precision: str, fused: bool) -> int:
    """Of a token in a block, for Pattention and what the norms give it.

    Of a Pattention layer its arrays of N: scores and normalised scores, always float32, and
    weights; or fused, the scores alone and two float32 numbers.
    """
    stored, multiplied = STORED[precision], MULTIPLIED[precision]
    tokens = sum(config.role_shape(role)[0] for role in ROLES)
    if fused:
        layers = tokens * multiplied + len(ROLES) * 2 * FLOAT32
        norm_outputs = 2  # query, key and value share a norm's output
    else:
        scores = 1 if config.activation == "softmax" else 2  # softmax needs its output alone
        layers = tokens * (scores * FLOAT32 + multiplied)
        # Here too, unless autocast makes each a copy of its own.
        norm_outputs = 4 if stored != multiplied else 2
    return layers + norm_outputs * config.width * multiplied


def _linear_bytes(config: TransformerConfig, precision: str) -> int:
    """Of a token in a block, for the linear layers and what the norms give them.

    Value is a part of what gives query and key too, so all of it is kept; of the feed-forward layer
    what comes before the GELU, and behind it.
    """
    channels = 2 * config.width + 2 * config.inner_dim + 2 * config.mlp_width
    return channels * MULTIPLIED[precision]
