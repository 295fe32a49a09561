"""The GPT-NeoX YAML of the published code: which of its keys say how the model is trained."""

from dataclasses import dataclass

from tokengrow.errors import UserError
from tokengrow.model.presets import PADDED_VOCABULARY

SCHEDULES = {"cosine": "neox_cosine", "constant": "constant"}
"""GPT-NeoX's lr_decay_style to our schedule."""

JSON_TOKENIZER = "HFTokenizer"
"""The kind of tokenizer whose file tokengrow reads: that of the published models."""


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
    """The keys that say how the model is trained. An absent one has GPT-NeoX's own default."""

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
    """Sequences in an update."""
    train_micro_batch_size_per_gpu: int | None = None
    """Sequences that one GPU takes at once."""
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
    """Updates between checkpoints."""
    checkpoint_scale: str = "linear"
    """log: that grow further and further apart."""
    keep_last_n_checkpoints: int | None = None
    """Checkpoints kept."""
    log_interval: int = 100
    """Updates between logged metrics."""
    pretrain_partial_init: str | None = None
    """Checkpoint of the smaller model that is grown."""

    def __post_init__(self) -> None:
        if self.lr_decay_style not in SCHEDULES:
            raise UserError(
                f"lr_decay_style is {self.lr_decay_style!r}, and tokengrow has "
                f"{' and '.join(SCHEDULES)} alone"
            )
        if self.optimizer.type.lower() not in ("adam", "adamw"):
            raise UserError(
                f"optimizer.type is {self.optimizer.type!r}, and tokengrow has Adam and AdamW alone"
            )
        if self.data_impl not in ("infer", "mmap"):
            raise UserError(f"data_impl is {self.data_impl!r}, and tokengrow reads mmap alone")

    @property
    def padded_vocabulary(self) -> int | None:
        """V, if it is that of the published models; else the YAML does not say it."""
        published = self.tokenizer_type, self.make_vocab_size_divisible_by
        return PADDED_VOCABULARY if published == (JSON_TOKENIZER, 128) else None

    def batch_size(self, gpus: int | None) -> int | None:
        """Sequences in an update, if the keys and the number of GPUs say it."""
        micro, accumulated = self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps
        made = micro * accumulated * gpus if micro and gpus else None
        if made and self.train_batch_size not in (None, made):
            raise UserError(
                f"train_batch_size is {self.train_batch_size}, and {micro} x {accumulated} on each "
                f"of gpus={gpus} are {made}: give the number of GPUs that it was meant for"
            )
        return self.train_batch_size or made

    def batch_text(self, gpus: int | None) -> str:
        """How the sequences in an update come about."""
        micro, accumulated = self.train_micro_batch_size_per_gpu, self.gradient_accumulation_steps
        if self.train_batch_size:
            return "train_batch_size"
        if not micro:
            return "the YAML does not say it"
        made = f"{micro} x {accumulated}"
        return f"{made} on each of {gpus}" if gpus else f"{made} = {micro * accumulated} per GPU"
