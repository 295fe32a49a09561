"""Records in a checkpoint: train state, run configuration, lineage and wall time.

`SCHEMA_VERSION` is written into config.yaml. Version 0 is a checkpoint without that key; its
records are read as well. A checkpoint of a newer version is refused.
"""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any, Literal, TypeVar

from tokengrow.errors import UserError

SCHEMA_VERSION = 1
"""Version of the records that this code writes."""

JSON = str | int | float | bool | None | list["JSON"] | dict[str, "JSON"]
"""Value of a record whose type depends on what wrote it."""

JSONMapping = Mapping[str, Any]
"""Mapping as JSON or YAML holds it."""

Operation = Literal["grow", "prune"]

T = TypeVar("T")


def check_schema_version(version: int, place: str) -> None:
    """Refuse a record that a newer version of tokengrow wrote.

    Args:
        version: schema version of the record.
        place: file that holds it, for the error message.

    Raises:
        UserError: the version is above `SCHEMA_VERSION`.
    """
    if version > SCHEMA_VERSION:
        raise UserError(
            f"{place}: schema_version must be at most {SCHEMA_VERSION}, got {version}. A newer "
            "tokengrow wrote this checkpoint. Upgrade tokengrow."
        )


@dataclass
class Rung:
    """One trained size: a row of the ladder's table."""

    name: str
    """Name of the rung and of its stage."""
    parameters: int
    """Number of parameters of the model."""
    tokens: int = 0
    """Tokens trained on in this stage."""
    flops: float = 0.0
    """FLOPs spent in this stage."""
    loss_before: float | None = None
    """Validation loss of the model before its growth, nats per token."""
    loss_start: float | None = None
    """Validation loss after the growth, or at initialisation, nats per token."""
    loss_end: float | None = None
    """Validation loss at the end of the stage, nats per token; None: the stage has not ended."""
    drift: float | None = None
    """Largest |delta logit| measured at the growth; None: the model was not grown."""
    tau_start: dict[str, float] | None = None
    """tau of each role at the start of the stage; None: tau is not annealed in this stage."""
    skipped: int = 0
    """Updates skipped because their gradient was not finite."""
    ends_at: int | None = None
    """Step at which the stage ended; None: the stage has not ended."""


@dataclass(frozen=True)
class Validation:
    """Result of one validation."""

    step: int
    """Optimizer updates of the run before it."""
    stage: int
    """Index of the stage."""
    tokens: int
    """Tokens trained on before it."""
    flops: float
    """FLOPs spent before it."""
    loss: float
    """Mean loss, nats per token."""


@dataclass(frozen=True)
class SourceCost:
    """Checkpoint that a run started from, and its cost."""

    weights_sha256: str | None
    """SHA-256 of its weights file; None: it was never on disk."""
    step: int
    """Optimizer step of the checkpoint."""
    tokens: int | None
    """Tokens trained on up to it, with those of its own sources; None: not recorded."""
    flops: float | None
    """FLOPs spent up to it, with those of its own sources; None: not recorded."""


@dataclass
class TrainState:
    """Counters of a run, its rungs and its validation losses: the content of train_state.json.

    Updates use no random numbers, and the order of batches is a function of the seed and the global
    batch index. A resumed run therefore needs only these numbers, weights and moments. After a
    growth or pruning outside a run, `rungs` and `validation` are empty.
    """

    fingerprint: str
    """Fingerprint of the tokens."""
    next_batch: int = 0
    """Index of the next global batch; together with the fingerprint, the state of the data."""
    step: int = 0
    """Optimizer updates done in this run, skipped ones included."""
    stage: int = 0
    """Index of the current stage."""
    stage_step: int = 0
    """Optimizer updates done in the current stage, skipped ones included."""
    tokens: int = 0
    """Tokens trained on in all stages."""
    flops: float = 0.0
    """FLOPs spent in all stages, as `ModelConfig.flops_per_token` counts."""
    rungs: list[Rung] = field(default_factory=list)
    """One entry per stage entered."""
    validation: list[Validation] = field(default_factory=list)
    """Every validation so far."""
    skipped_in_a_row: int = 0
    """Skipped updates at the end of those done so far."""
    source: SourceCost | None = None
    """Checkpoint that the run started from; None: initial weights, or not recorded."""

    @property
    def in_run(self) -> bool:
        """Whether a training run wrote this state, in contrast to a growth outside a run."""
        return bool(self.rungs)

    @property
    def rung(self) -> Rung:
        """Current rung."""
        return self.rungs[-1]

    @property
    def stage_ends(self) -> list[int]:
        """Step at which each finished stage ended."""
        return [rung.ends_at for rung in self.rungs if rung.ends_at is not None]

    @property
    def stage_updates(self) -> int:
        """Updates of the stage that were applied to the model."""
        return self.stage_step - self.rung.skipped

    @property
    def stage_ended(self) -> bool:
        """Whether the current stage is finished."""
        return len(self.stage_ends) > self.stage

    def losses(self, since: float = 1) -> list[float]:
        """Return the validation losses of the current stage, nats per token.

        Args:
            since: first update of the stage that counts; 1 leaves out the validation at its start.
        """
        first = self.step - self.stage_step + since
        rows = (row for row in self.validation if row.stage == self.stage)
        return [row.loss for row in rows if row.step >= first]

    def advance(self, tokens: int, flops_per_token: int) -> None:
        """Count one update over `tokens` tokens."""
        self.step += 1
        self.next_batch += 1
        self.stage_step += 1
        self.tokens += tokens
        self.flops += tokens * flops_per_token
        self.rung.tokens += tokens
        self.rung.flops += tokens * flops_per_token

    def enter(self, stage: int, rung: Rung) -> None:
        """Start the stage with index `stage`."""
        self.stage, self.stage_step = stage, 0
        self.rungs.append(rung)

    def leave(self, loss: float) -> None:
        """End the current stage with a validation loss, nats per token."""
        self.rung.loss_end = loss
        self.rung.ends_at = self.step

    def record_validation(self, loss: float) -> None:
        """Append a validation loss, nats per token."""
        self.validation.append(
            Validation(self.step, self.stage, self.tokens, float(self.flops), loss)
        )

    def outside_run(self) -> "TrainState":
        """Return the position in the data and the cost, without the stages of the run."""
        return replace(self, stage=0, stage_step=0, rungs=[], validation=[], skipped_in_a_row=0)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of train_state.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: JSONMapping, place: str = "train_state") -> "TrainState":
        """Build the state from the content of train_state.json.

        Args:
            values: as `to_dict` returns them, or as schema version 0 wrote them.
            place: file that holds them, for error messages.

        Raises:
            UserError: a key is missing or unknown.
        """
        values = dict(values)
        rungs = [dict(rung) for rung in values.get("rungs", [])]
        # Schema version 0 kept the ends of stages in a list of their own.
        for rung, end in zip(rungs, values.pop("stage_ends", []), strict=False):
            rung["ends_at"] = end
        source = values.get("source")
        return _record(
            cls,
            {
                **values,
                "rungs": [_record(Rung, rung, f"{place}: rungs") for rung in rungs],
                "validation": [
                    _record(Validation, row, f"{place}: validation")
                    for row in values.get("validation", [])
                ],
                "source": source and _record(SourceCost, source, f"{place}: source"),
            },
            place,
        )


@dataclass(frozen=True)
class WallTimes:
    """Wall-clock time of a run up to a checkpoint: the content of times.json."""

    seconds: float | None
    """Time of all sessions of the run, s; None: unknown."""
    before: float | None
    """Time spent on the checkpoint that the run started from, s; None: unknown."""
    validation: tuple[float | None, ...] | None = None
    """Time at the end of each validation, s; None: the checkpoint is outside a run."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of times.json."""
        values: dict[str, Any] = {"seconds": self.seconds, "before": self.before}
        return values if self.validation is None else values | {"validation": [*self.validation]}

    @classmethod
    def from_dict(cls, values: JSONMapping, place: str = "times") -> "WallTimes":
        """Build the record from the content of times.json.

        Raises:
            UserError: a key is missing or unknown.
        """
        times = values.get("validation")
        values = {**values, "validation": None if times is None else tuple(times)}
        return _record(cls, values, place)


@dataclass(frozen=True)
class LineageSource:
    """Checkpoint before a growth or pruning."""

    parameters: int
    """Number of parameters."""
    step: int
    """Optimizer step."""
    weights_sha256: str | None
    """SHA-256 of the weights file; None: the checkpoint was never on disk."""
    config: JSONMapping
    """Model config, as `ModelConfig.to_dict` returns it."""


@dataclass(frozen=True)
class LineageTarget:
    """Model after a growth or pruning."""

    parameters: int
    """Number of parameters."""
    config: JSONMapping
    """Model config, as `ModelConfig.to_dict` returns it."""


@dataclass(frozen=True)
class LineageStep:
    """Change of the sizes along one growth axis."""

    axis: str
    """Growth axis."""
    changes: Mapping[str, list[int]]
    """Config field to its value before and after."""


@dataclass(frozen=True)
class Drift:
    """Difference between the logits of two models on one probe batch."""

    dtype: str
    """Precision of the comparison."""
    probe_tokens: int
    """Number of tokens compared."""
    max_logit: float
    """Largest |delta logit|."""
    mean_logit: float
    """Mean |delta logit|."""
    relative: float
    """max_logit over max(1, largest |logit| of the source); the tolerance bounds it."""
    kl: float
    """Mean KL divergence from the source distribution to the grown one, nats."""
    loss_source: float
    """Cross-entropy of the source model on the probe, nats per token."""
    loss_grown: float
    """Cross-entropy of the grown model on the probe, nats per token."""

    def to_dict(self) -> dict[str, str | int | float]:
        """Return the entry of lineage.json."""
        return asdict(self)


@dataclass(frozen=True)
class LineageEntry:
    """One growth or pruning in the history of a checkpoint: an entry of lineage.json."""

    source: LineageSource
    """Checkpoint before the operation."""
    target: LineageTarget
    """Model after the operation."""
    steps: tuple[LineageStep, ...]
    """Changes of the sizes, in order."""
    drift: Drift
    """Measured change of the logits."""
    operation: Operation = "grow"
    """Kind of the operation."""
    settings: JSONMapping = field(default_factory=dict)
    """Settings of the operation: the fields of GrowthConfig, or the results of a pruning."""

    @property
    def axes(self) -> list[str]:
        """Growth axes along which the sizes changed, in order."""
        return [step.axis for step in self.steps]

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of lineage.json; settings are next to the other keys."""
        kind = {} if self.operation == "grow" else {"operation": self.operation}
        return {
            "source": asdict(self.source),
            "target": asdict(self.target),
            **kind,
            "steps": [asdict(step) for step in self.steps],
            **self.settings,
            "drift": self.drift.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: JSONMapping, place: str = "lineage") -> "LineageEntry":
        """Build the entry from lineage.json.

        Raises:
            UserError: a key is missing, or one of a nested record is unknown.
        """
        own = ("source", "target", "steps", "drift", "operation")
        for key in own[:-1]:
            if key not in values:
                raise UserError(f"{place}: {key} is missing. Use another checkpoint.")
        return cls(
            source=_record(LineageSource, values["source"], f"{place}: source"),
            target=_record(LineageTarget, values["target"], f"{place}: target"),
            steps=tuple(_record(LineageStep, step, f"{place}: steps") for step in values["steps"]),
            drift=_record(Drift, values["drift"], f"{place}: drift"),
            operation=values.get("operation", "grow"),
            settings={key: value for key, value in values.items() if key not in own},
        )


@dataclass(frozen=True)
class TokensFrom:
    """Sections of a recipe that name the tokens of a run."""

    data: JSONMapping
    """The `data` section."""
    tokenizer: JSONMapping
    """The `tokenizer` section."""
    store: str | None
    """Directory of the token store; None: the store was built from `data` and `tokenizer`."""


@dataclass(frozen=True)
class RecordedStage:
    """Stage of a recorded run."""

    name: str
    """Name of the stage."""
    steps: int
    """Optimizer updates."""
    model: JSONMapping
    """Model config."""
    optim: JSONMapping
    """Optimizer settings."""
    plateau: JSONMapping | None = None
    """Rule that ends the stage early; None: no such rule."""


@dataclass(frozen=True)
class RecordedRun:
    """Resolved configuration of the run that wrote a checkpoint: `run` in config.yaml."""

    stages: Mapping[str, RecordedStage]
    """Stage by name, in order."""
    source: str | None = None
    """Checkpoint that the run started from."""
    seed: int = 0
    """Seed of initial weights, growths and data order."""
    batch_size: int | None = None
    """Sequences per optimizer update; None: not recorded."""
    tokens_from: TokensFrom | None = None
    """Origin of the tokens; None: not recorded."""
    settings: JSONMapping = field(default_factory=dict)
    """All other keys of the configuration."""

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as nested plain values."""
        values = asdict(self)
        return values | dict(values.pop("settings"))

    @classmethod
    def from_dict(cls, values: JSONMapping, place: str = "run") -> "RecordedRun":
        """Build the record from `run` in config.yaml.

        Raises:
            UserError: a key of a stage or of `tokens_from` is missing or unknown.
        """
        own = {item.name for item in fields(cls)} - {"settings"}
        known = {key: value for key, value in values.items() if key in own}
        tokens_from = values.get("tokens_from")
        return cls(
            **{
                **known,
                "stages": {
                    name: _record(RecordedStage, {"name": name, **stage}, f"{place}: stages.{name}")
                    for name, stage in values.get("stages", {}).items()
                },
                "tokens_from": _record(TokensFrom, tokens_from, f"{place}: tokens_from")
                if tokens_from
                else None,
            },
            settings={key: value for key, value in values.items() if key not in own},
        )


def _record(cls: type[T], values: JSONMapping, place: str) -> T:
    """Build a dataclass from a mapping, and name a missing or unknown key.

    Raises:
        UserError: a key is missing or unknown, or `values` is not a mapping.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{place} must be a mapping, got {type(values).__name__}.")
    known = fields(cls)  # type: ignore[arg-type]
    unknown = values.keys() - {item.name for item in known}
    if unknown:
        raise UserError(f"{place}: unknown key {min(unknown)}. Use another checkpoint.")
    for item in known:
        required = item.default is MISSING and item.default_factory is MISSING
        if required and item.name not in values:
            raise UserError(f"{place}: {item.name} is missing. Use another checkpoint.")
    return cls(**values)
