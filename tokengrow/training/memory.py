"""What a model will need, from its sizes alone.

Shapes: `B` micro-batch, `T` sequence, `D` width, `N` parameter tokens, `L` layers, `V` vocabulary.
"""

from dataclasses import dataclass, field

from tokengrow.model.config import ROLES, ModelConfig

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
    """bfloat16 copies of the weights, which autocast makes in every micro-batch."""
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


def training_memory(config: ModelConfig, batch: int, precision: str) -> Memory:
    """Bytes of a training step on one device.

    Args:
        config: the model.
        batch: sequences in a micro-batch.
        precision: 32-true, bf16-mixed or bf16-true.
    """
    weights = config.num_parameters() * STORED[precision]
    return Memory(
        weights=weights,
        copies=copy_bytes(config, precision),
        gradients=weights,
        moments=ADAM_MOMENTS * weights,
        activations=activation_bytes(config, batch, precision),
    )


def checkpoint_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of a checkpoint: weights and Adam's two moments, as training holds them."""
    return config.num_parameters() * STORED[precision] * (1 + ADAM_MOMENTS)


def copy_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of the weights that autocast casts: all but the final norm's, whatever the batch."""
    if STORED[precision] == MULTIPLIED[precision]:
        return 0
    return (config.num_parameters() - 2 * config.width) * MULTIPLIED[precision]


def activation_bytes(config: ModelConfig, batch: int, precision: str) -> int:
    """Bytes that the backward pass of one micro-batch keeps, without checkpointing.

    Counts the tensors that autograd saves in the plain-PyTorch model, per token: of a Pattention
    layer its arrays of N (scores and normalised scores, always float32, and weights); of attention
    the rotated query and key, value, and output, twice; of a norm its input and output; of the head
    the log-softmax of the logits, always float32. An estimate: `tests/training/test_memory.py`
    holds it to what autograd saves.

    Args:
        config: the model.
        batch: sequences in a micro-batch.
        precision: 32-true, bf16-mixed or bf16-true.
    """
    stored, multiplied = STORED[precision], MULTIPLIED[precision]
    scores = 1 if config.activation == "softmax" else 2  # softmax needs its output alone
    tokens = sum(config.role_shape(role)[0] for role in ROLES)
    # Query, key and value share a norm's output, unless autocast makes each a copy of its own.
    norm_outputs = 4 if stored != multiplied else 2
    layer = tokens * (scores * FLOAT32 + multiplied)
    layer += 5 * config.inner_dim * multiplied
    layer += config.width * (2 * stored + norm_outputs * multiplied)
    head = config.width * (stored + multiplied) + config.vocab_size * FLOAT32
    return batch * config.context_length * (config.layers * layer + head)
