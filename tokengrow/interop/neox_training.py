"""Training keys of the GPT-NeoX YAML of the published code."""

from collections.abc import Iterator
from dataclasses import dataclass

from tokengrow.errors import UserError

SCHEDULES = {"cosine": "neox_cosine", "constant": "constant"}
"""lr_decay_style of GPT-NeoX to the schedule of tokengrow."""

JSON_TOKENIZER = "HFTokenizer"
"""Tokenizer type of the published models, the only one whose file tokengrow reads."""

POSITIVE_KEYS = (
    "train_iters",
    "lr_decay_iters",
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "make_vocab_size_divisible_by",
    "eval_interval",
    "eval_iters",
    "checkpoint_factor",
    "keep_last_n_checkpoints",
    "log_interval",
)
"""Keys that must be at least 1. In some of them GPT-NeoX takes 0 for never."""


@dataclass(frozen=True, kw_only=True)
class NeoxAdam:
    """Keys of `optimizer.params`; an absent key has the default of Adam."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay rates of the moments."""
    eps: float = 1e-8
    """Epsilon of Adam."""


@dataclass(frozen=True, kw_only=True)
class NeoxOptimizer:
    """Keys of `optimizer`."""

    params: NeoxAdam
    """Settings of the optimizer."""
    type: str = "Adam"
    """Adam, which is AdamW in GPT-NeoX, or AdamW."""


@dataclass(frozen=True, kw_only=True)
class NeoxTraining:
    """Keys that define the training run.

    An absent key has GPT-NeoX's own default, except for `checkpoint_factor`. By default
    GPT-NeoX writes no checkpoints; a recipe uses the default of tokengrow.

    Raises:
        UserError: tokengrow does not have such a run; the message names every key.
    """

    train_iters: int
    """Optimizer updates."""
    optimizer: NeoxOptimizer
    """Optimizer and its settings."""
    min_lr: float = 0.0
    """Final learning rate of a cosine."""
    lr_decay_style: str = "linear"
    """Learning-rate schedule, a key of `SCHEDULES`."""
    lr_decay_iters: int | None = None
    """Updates of the decay; null: all updates."""
    warmup: float = 0.01
    """Fraction of `lr_decay_iters` for the warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    gradient_clipping: float = 1.0
    """Maximum norm of the gradient."""
    train_batch_size: int | None = None
    """Sequences per update; null: computed from the next two keys and the number of GPUs."""
    train_micro_batch_size_per_gpu: int | None = None
    """Sequences per forward pass of one GPU; null: computed from the batch size."""
    gradient_accumulation_steps: int = 1
    """Forward passes of one GPU per update."""
    data_path: str | None = None
    """Path of the token files, without .bin and .idx."""
    split: str = "969, 30, 1"
    """Proportions of training, validation and test data."""
    data_impl: str = "infer"
    """Format of the token files."""
    tokenizer_type: str = "GPT2BPETokenizer"
    """Format of `vocab_file`."""
    vocab_file: str | None = None
    """Path of the tokenizer."""
    make_vocab_size_divisible_by: int = 128
    """Divisor of the padded vocabulary size."""
    seed: int = 1234
    """Seed of the initial weights and the data order."""
    eval_interval: int = 1000
    """Updates between validations."""
    eval_iters: int = 100
    """Batches per validation."""
    checkpoint_factor: int | None = None
    """Updates between checkpoints; null: not set."""
    checkpoint_scale: str = "linear"
    """linear: equal intervals; log: increasing intervals."""
    keep_last_n_checkpoints: int | None = None
    """Number of checkpoints to keep; null: all."""
    log_interval: int = 100
    """Updates between logged metrics."""
    pretrain_partial_init: str | None = None
    """Checkpoint of a smaller model to grow."""

    def __post_init__(self) -> None:
        if problems := [*_unsupported_values(self), *_invalid_numbers(self)]:
            raise UserError(" ".join(problems))

    def micro_batch_size(self, gpus: int | None) -> int | None:
        """Return the sequences per forward pass of one GPU; None if they are unknown.

        Args:
            gpus: number of GPUs; None: unknown.

        Raises:
            UserError: the batch size is not a multiple of the number of GPUs and forward passes.
        """
        batch, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        if micro or not (batch and gpus):
            return micro
        accumulated = self.gradient_accumulation_steps
        if batch % (gpus * accumulated):
            raise UserError(
                f"train_batch_size must be a multiple of gpus={gpus} x "
                f"gradient_accumulation_steps ({accumulated}), got {batch}. Give the number of "
                "GPUs of the run."
            )
        return batch // (gpus * accumulated)

    def batch_size(self, gpus: int | None) -> int | None:
        """Return the sequences per update; None if they are unknown.

        Args:
            gpus: number of GPUs; None: unknown.

        Raises:
            UserError: the keys contradict each other, or the number of GPUs.
        """
        batch, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        if not micro:
            return batch
        accumulated = self.gradient_accumulation_steps
        if gpus is None:
            if batch and batch % (micro * accumulated):
                raise UserError(
                    f"train_batch_size must be a multiple of {micro} x {accumulated}, "
                    "train_micro_batch_size_per_gpu x gradient_accumulation_steps, got "
                    f"{batch}. Change one of them."
                )
            return batch
        product = micro * accumulated * gpus
        if batch not in (None, product):
            raise UserError(
                f"train_batch_size must be {product}, {micro} x {accumulated} on each of "
                f"gpus={gpus}, got {batch}. Give the number of GPUs of the run."
            )
        return product

    def batch_size_origin(self, gpus: int | None) -> str:
        """Return a comment on the keys that define the sequences per update."""
        micro, accumulated = self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps
        if self.train_batch_size:
            return "train_batch_size"
        if not micro:
            return "not in the YAML"
        product = f"{micro} x {accumulated}"
        if gpus:
            return f"{product} on each of {gpus}"
        return f"{product} = {micro * accumulated} per GPU"


def _unsupported_values(keys: NeoxTraining) -> Iterator[str]:
    """Yield an error for each key with which GPT-NeoX trains in a way that tokengrow lacks."""
    if keys.lr_decay_style not in SCHEDULES:
        yield f"lr_decay_style must be {' or '.join(SCHEDULES)}, got {keys.lr_decay_style!r}."
    if keys.optimizer.type.lower() not in ("adam", "adamw"):
        yield f"optimizer.type must be Adam or AdamW, got {keys.optimizer.type!r}."
    if keys.data_impl not in ("infer", "mmap"):
        yield f"data_impl must be infer or mmap, got {keys.data_impl!r}."


def _invalid_numbers(keys: NeoxTraining) -> Iterator[str]:
    """Yield an error for each number that the recipe could not have."""
    for key in POSITIVE_KEYS:
        if (value := getattr(keys, key)) is not None and value < 1:
            yield f"{key} must be at least 1, got {value}."
    adam = keys.optimizer.params
    if not keys.gradient_clipping > 0:
        yield (
            f"gradient_clipping must be positive, got {keys.gradient_clipping}. To disable "
            "clipping, give a number that no norm exceeds."
        )
    if not adam.lr > 0:
        yield f"optimizer.params.lr must be positive, got {adam.lr}."
    if not adam.eps > 0:
        yield f"optimizer.params.eps must be positive, got {adam.eps}."
    if not all(0 <= beta < 1 for beta in adam.betas):
        yield f"optimizer.params.betas must be in [0, 1), got {list(adam.betas)}."
    if keys.lr_decay_style != "constant" and not 0 <= keys.min_lr <= adam.lr:
        yield f"min_lr must be in [0, {adam.lr}] (optimizer.params.lr), got {keys.min_lr}."
    if not 0 <= keys.warmup < 1:
        yield f"warmup must be in [0, 1), got {keys.warmup}."
    if not keys.weight_decay >= 0:
        yield f"weight_decay must be at least 0, got {keys.weight_decay}."
    if not 0 <= keys.seed < 2**63:
        yield f"seed must be in [0, 2**63), got {keys.seed}."
