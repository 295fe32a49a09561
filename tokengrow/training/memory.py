"""What a model will need, from its sizes alone.

Shapes: `B` micro-batch, `T` sequence, `D` width, `N` parameter tokens, `L` layers, `V` vocabulary.
"""

from tokengrow.model.config import ROLES, ModelConfig

FLOAT32 = 4
ADAM_MOMENTS = 2


def checkpoint_bytes(config: ModelConfig) -> int:
    """Bytes of a checkpoint: float32 weights and Adam's two moments."""
    return config.num_parameters() * FLOAT32 * (1 + ADAM_MOMENTS)


def state_bytes(config: ModelConfig) -> int:
    """Bytes that training holds whatever the batch: float32 weights, gradients, Adam's moments."""
    return config.num_parameters() * FLOAT32 * (2 + ADAM_MOMENTS)


def activation_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes that the backward pass of one micro-batch keeps, in float32 without checkpointing.

    Counts the tensors that autograd saves in the plain-PyTorch model, per token: of a Pattention
    layer its three arrays of N (scores, normalised scores, weights) and its input; of attention
    the rotated query and key, value and output; of a norm its input; of the head the input
    and the log-softmax of the logits. An estimate: `tests/training/test_memory.py` holds it to
    15 % of what autograd saves.

    Args:
        config: the model.
        batch: sequences in a micro-batch.
    """
    pattention = sum(3 * n for n in (config.role_shape(role)[0] for role in ROLES))
    attention = 5 * config.inner_dim
    norms = 4 * config.width  # two inputs, and two outputs that the projections share
    per_token = config.layers * (pattention + attention + norms)
    per_token += 2 * config.width + config.vocab_size
    return batch * config.context_length * per_token * FLOAT32


def training_bytes(config: ModelConfig, batch: int) -> int:
    """Bytes of a training step on one device: state and activations of a micro-batch."""
    return state_bytes(config) + activation_bytes(config, batch)
