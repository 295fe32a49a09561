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
    config: ModelConfig, batch: int, precision: str, kernel: str = "auto"
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


def checkpoint_bytes(config: ModelConfig, precision: str) -> int:
    """Bytes of a checkpoint: weights and Adam's two moments, as training holds them."""
    return config.num_parameters() * STORED[precision] * (1 + ADAM_MOMENTS)


def copy_bytes(config: ModelConfig, precision: str, fused: bool) -> int:
    """Bytes of the weights that are held a second time, whatever the batch.

    Autocast casts all but the final norm's. Fused, and not cast, the keys of query, key and value
    are put side by side where the three are of one shape.

    Args:
        config: the model.
        precision: 32-true, bf16-mixed or bf16-true.
        fused: whether Pattention is computed by the Triton kernels.
    """
    if STORED[precision] != MULTIPLIED[precision]:
        return (config.num_parameters() - 2 * config.width) * MULTIPLIED[precision]
    shapes = [config.role_shape(role) for role in ("query", "key", "value")]
    if not fused or len(set(shapes)) > 1:
        return 0
    tokens, d_in, _ = shapes[0]
    return config.layers * 3 * tokens * d_in * STORED[precision]


def activation_bytes(config: ModelConfig, batch: int, precision: str, fused: bool) -> int:
    """Bytes that the backward pass of one micro-batch keeps, without checkpointing.

    Counts the tensors that autograd saves in the model, not compiled, per token. Of a Pattention
    layer its arrays of N: scores and normalised scores, always float32, and weights; or fused, the
    scores alone and two float32 numbers. Of attention the rotated query and key, value, and output.
    Of a norm its input and output. Of the head the log-softmax of the logits, always float32; or
    fused, the gradient of its input. An estimate: `tests/training/test_memory.py` holds it to what
    autograd saves.

    Args:
        config: the model.
        batch: sequences in a micro-batch.
        precision: 32-true, bf16-mixed or bf16-true.
        fused: whether Pattention and the loss are computed by the Triton kernels.
    """
    stored, multiplied = STORED[precision], MULTIPLIED[precision]
    tokens = sum(config.role_shape(role)[0] for role in ROLES)
    if fused:
        layer = tokens * multiplied + len(ROLES) * 2 * FLOAT32
        # Query, key and value share a norm's output.
        norm_outputs = 2
        head = config.width * (stored + multiplied)
    else:
        scores = 1 if config.activation == "softmax" else 2  # softmax needs its output alone
        layer = tokens * (scores * FLOAT32 + multiplied)
        # Here too, unless autocast makes each a copy of its own.
        norm_outputs = 4 if stored != multiplied else 2
        head = config.width * (stored + multiplied) + config.vocab_size * FLOAT32
    layer += 4 * config.inner_dim * multiplied
    layer += config.width * (2 * stored + norm_outputs * multiplied)
    return batch * config.context_length * (config.layers * layer + head)
