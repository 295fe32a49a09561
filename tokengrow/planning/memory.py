"""Memory of a training step and size of a checkpoint, computed from the sizes of a model.

Shapes: `B` micro-batch, `T` sequence, `D` width, `N` parameter tokens, `F` channels of the
feed-forward layer of the Transformer, `L` layers, `V` vocabulary.
"""

from dataclasses import dataclass, field

from tokengrow.model.config import ROLES, LanguageModelConfig, ModelConfig
from tokengrow.model.transformer import TransformerConfig

FLOAT32_BYTES = 4
ADAM_MOMENTS = 2
STORAGE_BYTES = {"32-true": 4, "bf16-mixed": 4, "bf16-true": 2}
"""Precision to bytes of each weight, gradient, moment, and element of the residual stream."""
COMPUTE_BYTES = {"32-true": 4, "bf16-mixed": 2, "bf16-true": 2}
"""Precision to bytes of each element in a matrix product."""


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Memory of a training step on one device, bytes."""

    weights: int
    """Memory of the parameters."""
    copies: int
    """Memory of copies of weights made in every micro-batch, mainly by autocast to bfloat16."""
    gradients: int
    """Memory of the gradients of all parameters."""
    moments: int
    """Memory of both moments of Adam."""
    activations: int
    """Memory of the tensors that a micro-batch saves for its backward pass."""
    total: int = field(init=False)
    """Sum of the other fields."""

    def __post_init__(self) -> None:
        parts = (self.weights, self.copies, self.gradients, self.moments, self.activations)
        object.__setattr__(self, "total", sum(parts))


def training_memory(
    config: LanguageModelConfig, batch: int, precision: str, kernel: str = "auto"
) -> TrainingMemory:
    """Return the memory of a training step on one device.

    Args:
        config: config of the model.
        batch: sequences in a micro-batch.
        precision: 32-true, bf16-mixed or bf16-true.
        kernel: Pattention kernel. auto counts as triton in bfloat16, which is used on GPUs.
    """
    fused = kernel == "triton" or (kernel == "auto" and precision != "32-true")
    weights = config.num_parameters() * STORAGE_BYTES[precision]
    return TrainingMemory(
        weights=weights,
        copies=copy_bytes(config, precision, fused),
        gradients=weights,
        moments=ADAM_MOMENTS * weights,
        activations=activation_bytes(config, batch, precision, fused),
    )


def checkpoint_bytes(config: LanguageModelConfig, precision: str) -> int:
    """Return the bytes of a checkpoint: weights and both moments of Adam, as stored in training."""
    return config.num_parameters() * STORAGE_BYTES[precision] * (1 + ADAM_MOMENTS)


def copy_bytes(config: LanguageModelConfig, precision: str, fused: bool) -> int:
    """Return the bytes of copies of weights, which do not depend on the batch.

    Autocast casts all multiplied weights except those of the norms. Without a cast, the fused
    kernels concatenate the keys of query, key and value if the three have the same shape.

    Args:
        config: config of the model.
        precision: 32-true, bf16-mixed or bf16-true.
        fused: whether Pattention is computed by the Triton kernels.
    """
    if STORAGE_BYTES[precision] != COMPUTE_BYTES[precision]:
        norms = 2 * config.width
        if isinstance(config, TransformerConfig):
            norms += config.layers * 2 * 2 * config.width
        return (config.matmul_parameters() - norms) * COMPUTE_BYTES[precision]
    if not isinstance(config, ModelConfig):
        return 0
    shapes = [config.role_shape(role) for role in ("query", "key", "value")]
    if not fused or len(set(shapes)) > 1:
        return 0
    tokens, d_in, _ = shapes[0]
    return config.layers * 3 * tokens * d_in * STORAGE_BYTES[precision]


def activation_bytes(config: LanguageModelConfig, batch: int, precision: str, fused: bool) -> int:
    """Return the bytes saved for the backward pass of one micro-batch, without checkpointing.

    Counts the tensors per token that autograd saves in the model without compilation. Attention
    saves the rotated query and key, the value and the output. A norm saves its input and output.
    The head saves the log-softmax of the logits, always float32; if fused, the gradient of its
    input. The result is an estimate, which `tests/planning/test_memory.py` compares with the
    tensors that autograd saves.

    Args:
        config: config of the model.
        batch: sequences in a micro-batch.
        precision: 32-true, bf16-mixed or bf16-true.
        fused: whether Pattention and the loss are computed by the Triton kernels.
    """
    stored, multiplied = STORAGE_BYTES[precision], COMPUTE_BYTES[precision]
    head = config.width * (stored + multiplied)
    if not fused:
        head += config.vocab_size * FLOAT32_BYTES
    block = 4 * config.inner_dim * multiplied + 2 * config.width * stored
    if isinstance(config, ModelConfig):
        block += _pattention_bytes(config, precision, fused)
    elif isinstance(config, TransformerConfig):
        block += _linear_bytes(config, precision)
    return batch * config.context_length * (config.layers * block + head)


def _pattention_bytes(config: ModelConfig, precision: str, fused: bool) -> int:
    """Return the bytes per token and block of Pattention and of the outputs of the norms.

    A Pattention layer saves arrays of N: scores and normalised scores, always float32, and weights.
    If fused, it saves only the scores and two float32 numbers.
    """
    stored, multiplied = STORAGE_BYTES[precision], COMPUTE_BYTES[precision]
    tokens = sum(config.role_shape(role)[0] for role in ROLES)
    if fused:
        layers = tokens * multiplied + len(ROLES) * 2 * FLOAT32_BYTES
        norm_outputs = 2  # query, key and value share the output of a norm
    else:
        scores = 1 if config.activation == "softmax" else 2  # softmax saves only its output
        layers = tokens * (scores * FLOAT32_BYTES + multiplied)
        # They also share it without fusion, unless autocast copies it for each.
        norm_outputs = 4 if stored != multiplied else 2
    return layers + norm_outputs * config.width * multiplied


def _linear_bytes(config: TransformerConfig, precision: str) -> int:
    """Return the bytes per token and block of the linear layers and of the outputs of the norms.

    The value is a slice of the output that also contains query and key, so all of it is saved. The
    feed-forward layer saves the input and the output of the GELU.
    """
    channels = 2 * config.width + 2 * config.inner_dim + 2 * config.mlp_width
    return channels * COMPUTE_BYTES[precision]
