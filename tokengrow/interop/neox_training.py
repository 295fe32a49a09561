"""The GPT-NeoX YAML of the published code: which of its keys say how the model is trained."""

from collections.abc import Iterator
from dataclasses import dataclass

from tokengrow.errors import UserError

SCHEDULES = {"cosine": "neox_cosine", "constant": "constant"}
"""GPT-NeoX's lr_decay_style to our schedule."""

JSON_TOKENIZER = "HFTokenizer"
"""The kind of tokenizer whose file tokengrow reads: that of the published models."""

AT_LEAST_ONE = (
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
"""Keys that count something; where GPT-NeoX takes 0 for never, tokengrow has no word for it."""


@dataclass(frozen=True, kw_only=True)
class NeoxAdam:
    """The keys of `optimizer.params`; absent ones are as in Adam's own signature."""

    lr: float
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments."""
    eps: float = 1e-8
    """Adam's epsilon."""


@dataclass(frozen=True, kw_only=True)
class NeoxOptimizer:
    """The keys of `optimizer`."""

    params: NeoxAdam
    """Its settings."""
    type: str = "Adam"
    """Adam, which is AdamW there, or AdamW."""


@dataclass(frozen=True, kw_only=True)
class NeoxTraining:
    """The keys that say how the model is trained.

    One that is absent has GPT-NeoX's own default, but for `checkpoint_factor`: none at all is the
    default there, and here the recipe leaves it to tokengrow's own.

    Raises:
        UserError: a run that tokengrow does not have, naming every such key.
    """

    train_iters: int
    """Optimizer updates."""
    optimizer: NeoxOptimizer
    """AdamW."""
    min_lr: float = 0.0
    """Where a cosine ends."""
    lr_decay_style: str = "linear"
    """A key of `SCHEDULES`."""
    lr_decay_iters: int | None = None
    """Updates over which the rate falls; null: all."""
    warmup: float = 0.01
    """Share of them over which it rises."""
    weight_decay: float = 0.1
    """Decoupled decay."""
    gradient_clipping: float = 1.0
    """Largest norm of a gradient."""
    train_batch_size: int | None = None
    """Sequences in an update; null: as the three numbers below and the GPUs make it."""
    train_micro_batch_size_per_gpu: int | None = None
    """Sequences that one GPU takes at once; null: its share of an update."""
    gradient_accumulation_steps: int = 1
    """How often it does so in an update."""
    data_path: str | None = None
    """Token files, without .bin and .idx."""
    split: str = "969, 30, 1"
    """Shares of training, validation and test."""
    data_impl: str = "infer"
    """Format of the token files."""
    tokenizer_type: str = "GPT2BPETokenizer"
    """What kind of file `vocab_file` is."""
    vocab_file: str | None = None
    """The tokenizer."""
    make_vocab_size_divisible_by: int = 128
    """The vocabulary is padded to a multiple of it."""
    seed: int = 1234
    """Of the weights and the order of the data."""
    eval_interval: int = 1000
    """Updates between validations."""
    eval_iters: int = 100
    """Batches in one."""
    checkpoint_factor: int | None = None
    """Updates between checkpoints; null: nothing is said of them."""
    checkpoint_scale: str = "linear"
    """log: that grow further and further apart."""
    keep_last_n_checkpoints: int | None = None
    """Checkpoints kept; null: all."""
    log_interval: int = 100
    """Updates between logged metrics."""
    pretrain_partial_init: str | None = None
    """Checkpoint of the smaller model that is grown."""

    def __post_init__(self) -> None:
        if wrong := [*_unsupported(self), *_out_of_bounds(self)]:
            raise UserError("; ".join(wrong))

    def micro_batch_size(self, gpus: int | None) -> int | None:
        """Sequences that one GPU takes at once, if the keys and the number of GPUs say it.

        Raises:
            UserError: the GPUs do not share an update evenly.
        """
        whole, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        if micro or not (whole and gpus):
            return micro
        accumulated = self.gradient_accumulation_steps
        if whole % (gpus * accumulated):
            raise UserError(
                f"train_batch_size is {whole}, no multiple of gpus={gpus} x "
                f"gradient_accumulation_steps ({accumulated}): give the number of GPUs that it was "
                "meant for"
            )
        return whole // (gpus * accumulated)

    def batch_size(self, gpus: int | None) -> int | None:
        """Sequences in an update, if the keys and the number of GPUs say it.

        Raises:
            UserError: they say two numbers.
        """
        whole, micro = self.train_batch_size, self.train_micro_batch_size_per_gpu
        if not micro:
            return whole
        accumulated = self.gradient_accumulation_steps
        if gpus is None:
            if whole and whole % (micro * accumulated):
                raise UserError(
                    f"train_batch_size is {whole}, no multiple of the {micro} x {accumulated} of "
                    "train_micro_batch_size_per_gpu and gradient_accumulation_steps: change one of "
                    "them"
                )
            return whole
        made = micro * accumulated * gpus
        if whole not in (None, made):
            raise UserError(
                f"train_batch_size is {whole}, and {micro} x {accumulated} on each of gpus={gpus} "
                f"are {made}: give the number of GPUs that it was meant for"
            )
        return made

    def batch_text(self, gpus: int | None) -> str:
        """How the sequences in an update come about."""
        micro, accumulated = self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps
        if self.train_batch_size:
            return "train_batch_size"
        if not micro:
            return "the YAML does not say it"
        made = f"{micro} x {accumulated}"
        return f"{made} on each of {gpus}" if gpus else f"{made} = {micro * accumulated} per GPU"


def _unsupported(keys: NeoxTraining) -> Iterator[str]:
    """What GPT-NeoX would do otherwise than tokengrow, one clause for each key."""
    if keys.lr_decay_style not in SCHEDULES:
        there = " and ".join(SCHEDULES)
        yield f"lr_decay_style is {keys.lr_decay_style!r}, and tokengrow has {there} alone"
    if keys.optimizer.type.lower() not in ("adam", "adamw"):
        found = keys.optimizer.type
        yield f"optimizer.type is {found!r}, and tokengrow has Adam and AdamW alone"
    if keys.data_impl not in ("infer", "mmap"):
        yield f"data_impl is {keys.data_impl!r}, and tokengrow reads mmap alone"


def _out_of_bounds(keys: NeoxTraining) -> Iterator[str]:
    """Numbers that the recipe would be refused for, one clause for each key."""
    for key in AT_LEAST_ONE:
        if (value := getattr(keys, key)) is not None and value < 1:
            yield f"{key} must be at least 1, not {value}"
    adam = keys.optimizer.params
    if not keys.gradient_clipping > 0:
        yield (
            f"gradient_clipping must be positive, not {keys.gradient_clipping}: to clip nothing, "
            "give a number that no norm exceeds"
        )
    if not adam.lr > 0:
        yield f"optimizer.params.lr must be positive, not {adam.lr}"
    if not adam.eps > 0:
        yield f"optimizer.params.eps must be positive, not {adam.eps}"
    if not all(0 <= beta < 1 for beta in adam.betas):
        yield f"optimizer.params.betas must lie in [0, 1), not {list(adam.betas)}"
    if keys.lr_decay_style != "constant" and not 0 <= keys.min_lr <= adam.lr:
        yield f"min_lr must lie between 0 and optimizer.params.lr ({adam.lr}), not {keys.min_lr}"
    if not 0 <= keys.warmup < 1:
        yield f"warmup must lie in [0, 1), not {keys.warmup}"
    if not keys.weight_decay >= 0:
        yield f"weight_decay must be at least 0, not {keys.weight_decay}"
    if not 0 <= keys.seed < 2**63:
        yield f"seed must lie in [0, 2**63), not {keys.seed}"
