"""Where a run stands: what a checkpoint's train_state.json holds.

Nothing random happens in a step, and the order of batches is a function of the seed and the number
of the global batch, so a few numbers are all that a resumed run needs besides weights and moments.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tokengrow.checkpoint.store import Checkpoint


@dataclass
class Rung:
    """One trained size: a row of the ladder's table."""

    name: str
    """Of its stage."""
    parameters: int
    """Of the model."""
    tokens: int = 0
    """Trained on in this stage."""
    flops: float = 0.0
    """Spent in this stage."""
    loss_before: float | None = None
    """Validation loss of the model that it was grown from."""
    loss_start: float | None = None
    """Validation loss right after the growth, or at initialisation."""
    loss_end: float | None = None
    """Validation loss at the end of the stage."""
    drift: float | None = None
    """Largest |delta logit| measured at the growth."""
    tau_start: dict[str, float] | None = None
    """tau of each role when the stage began, if it is annealed in this stage."""
    skipped: int = 0
    """Updates that were not taken, their gradient not being finite."""


@dataclass
class TrainState:
    """Counters of a run, the rungs climbed and the validation losses seen."""

    fingerprint: str
    """Of the tokens."""
    next_batch: int = 0
    """Number of the next global batch; with the fingerprint, the whole state of the data."""
    step: int = 0
    """Optimizer updates done in this run, with those that were not taken."""
    stage: int = 0
    """Index of the stage."""
    stage_step: int = 0
    """Likewise in the stage; the schedule goes by it."""
    tokens: int = 0
    """Trained on in all stages."""
    flops: float = 0.0
    """Spent in all stages, as `ModelConfig.flops_per_token` counts."""
    rungs: list[Rung] = field(default_factory=list)
    """One per stage entered."""
    validation: list[dict[str, float]] = field(default_factory=list)
    """Every validation: step, tokens, flops, loss, stage."""
    stage_ends: list[int] = field(default_factory=list)
    """The step at which each finished stage ended."""
    skipped_in_a_row: int = 0
    """Updates, up to the last one, that were not taken."""
    source: dict[str, Any] | None = None
    """The checkpoint that the run started from: weights_sha256, step, and the tokens and flops
    behind it (null: not recorded); None: initial weights, or not recorded."""

    @property
    def rung(self) -> Rung:
        """The one being trained."""
        return self.rungs[-1]

    def losses(self, since: float = 1) -> list[float]:
        """Validation losses within the stage from an update of it on, nats per token.

        Args:
            since: number of the update; from 1 on the validation at the stage's start is left out.
        """
        first = self.step - self.stage_step + since
        rows = (row for row in self.validation if row["stage"] == self.stage)
        return [row["loss"] for row in rows if row["step"] >= first]

    @property
    def stage_updates(self) -> int:
        """Updates that the model has had in the stage."""
        return self.stage_step - self.rung.skipped

    @property
    def stage_ended(self) -> bool:
        """Whether the stage entered last is done."""
        return len(self.stage_ends) > self.stage

    def advance(self, tokens: int, flops_per_token: int) -> None:
        """Counts one update over `tokens` tokens."""
        self.step += 1
        self.next_batch += 1
        self.stage_step += 1
        self.tokens += tokens
        self.flops += tokens * flops_per_token
        self.rung.tokens += tokens
        self.rung.flops += tokens * flops_per_token

    def enter(self, stage: int, rung: Rung) -> None:
        """Begins a stage."""
        self.stage, self.stage_step = stage, 0
        self.rungs.append(rung)

    def leave(self, loss: float) -> None:
        """Ends the stage with a validation loss, nats per token."""
        self.rung.loss_end = loss
        self.stage_ends.append(self.step)

    def record_validation(self, loss: float) -> None:
        """Notes a validation loss, nats per token."""
        self.validation.append(
            {
                "step": self.step,
                "stage": self.stage,
                "tokens": self.tokens,
                "flops": self.flops,
                "loss": loss,
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it."""
        return asdict(self)

    @staticmethod
    def source_of(checkpoint: Checkpoint) -> dict[str, Any]:
        """What a run that starts from a checkpoint notes of it: a growth outside of any run, too,
        keeps what its source had cost."""
        ancestor, spent = checkpoint.ancestor(), checkpoint.train_state
        before = spent.get("source")
        if before is None:
            # A run of a version that did not note what its own source had cost.
            unknown = bool(checkpoint.run.get("source"))
            before = dict.fromkeys(("tokens", "flops"), None if unknown else 0)
        return {
            "weights_sha256": ancestor["weights_sha256"],
            "step": checkpoint.step,
            "tokens": _sum(before["tokens"], spent.get("tokens")),
            "flops": _sum(before["flops"], spent.get("flops")),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainState":
        """The inverse of `to_dict`."""
        rungs = [Rung(**rung) for rung in values["rungs"]]
        return cls(**{**values, "rungs": rungs})


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other
