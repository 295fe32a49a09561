"""Analysis of a checkpoint: sizes, lineage, and the contribution of its parameter tokens.

Contributions are grouped by role, layer, and generation, which is the growth that added a token.

contribution: what a token adds to the output of its layer on a text (`tokengrow.model.activity`).
effective number: `(Σ c)² / Σ c²` over the contributions c of a layer, the participation ratio. It
is N if all tokens contribute equally, and 1 if one token contributes everything.
even share: `Σ c² / Σ c`, which is Σ c over the effective number. It is the contribution of each
token if the effective number of tokens contributed equally.
dead: a token that contributes at most `DEAD` of the even share. Tokens that contribute nothing
change neither the effective number nor the even share, so a growth never makes an old token dead.
The mean over all N, in contrast, would be halved by as many new tokens.
score norm: root of the mean, over positions, of ‖s‖², s = x Kᵀ.

Shapes: `B` batch, `T` sequence, `N` parameter tokens, `L` layers, `G` generations.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from tokengrow.checkpoint.store import Checkpoint
from tokengrow.growth.generations import GenerationCounts, count_generations
from tokengrow.growth.moments import ROW_AGE, STEP
from tokengrow.growth.tensors import pattention_name, role_and_part
from tokengrow.model.activity import Activity, Layer, measure_activity
from tokengrow.model.config import ROLES, ModelConfig

DEAD = 0.001
"""Maximum contribution of a dead token, as a fraction of the even share of its layer."""


@dataclass(frozen=True)
class RoleParameters:
    """Parameters of one role in all layers."""

    role: str
    """Role of a Pattention layer, or the name of another module."""
    tokens: int | None
    """N; None: not parameter tokens."""
    d_in: int | None
    """Input channels, or token ids of an embedding; None: a vector, such as that of a norm."""
    d_out: int
    """Output channels."""
    parameters: int
    """Number of parameters."""


@dataclass(frozen=True)
class Generation:
    """Parameter tokens that one growth added, in all layers."""

    number: int
    """Number of the growth in the lineage; 0: initial tokens."""
    axes: list[str]
    """Axes of the growth; empty: initial tokens."""
    tokens: int
    """Number of tokens."""
    updates: int | None
    """Updates of these tokens as the optimizer counts them; None: no optimizer state.

    The optimizer counts at least one for tokens that existed before a growth.
    """


@dataclass(frozen=True)
class ActivitySummary:
    """Activity of the tokens of one layer on a text, by generation."""

    contribution: list[float]
    """[G] sum of the contributions of each generation."""
    share: list[float]
    """[G] share of each generation in the sum that the activation divides by."""
    dead: list[int]
    """[G] number of dead tokens."""
    effective: float
    """Effective number of tokens; 0 if no token contributes."""
    score_norm: float
    """Norm of the scores."""


@dataclass(frozen=True)
class LayerSummary:
    """Parameter tokens of one Pattention layer, by generation."""

    layer: int
    """Index of the block."""
    role: str
    """Role in the block."""
    tokens: list[int]
    """[G] number of tokens of each generation, in the order of the rows."""
    key_norm: list[float]
    """[G] root mean square of the lengths of the keys; 0 without tokens."""
    value_norm: list[float]
    """[G] root mean square of the lengths of the values; 0 without tokens."""
    activity: ActivitySummary | None
    """Activity on the text; None: no text was given."""


@dataclass(frozen=True)
class Inspection:
    """Result of inspecting a checkpoint."""

    checkpoint: Checkpoint
    """Checkpoint without its tensors."""
    dtypes: list[str]
    """Data types of the weights."""
    role_parameters: list[RoleParameters]
    """Parameters by role, in the order of the model."""
    generations: list[Generation]
    """Initial tokens, then one entry per growth and pruning; empty without parameter tokens."""
    layers: list[LayerSummary]
    """Summary of every Pattention layer."""
    text_tokens: int
    """Tokens of the text on which contributions were measured; 0: not measured."""
    activity: Mapping[Layer, Activity]
    """Activity of every single token, by layer."""

    def shares(self) -> dict[str, list[float]]:
        """Return the share of each generation in the contribution of each role, [G].

        Contributions are summed over the layers. All shares are 0 if no token contributes.
        """
        shares = {}
        for role in ROLES:
            active = [x.activity for x in self.layers if x.role == role and x.activity]
            columns = zip(*(activity.contribution for activity in active), strict=True)
            shares[role] = fractions([sum(column) for column in columns])
        return shares

    def mean_shares(self) -> list[float]:
        """Return the mean of `shares` over the roles, [G]."""
        columns = zip(*self.shares().values(), strict=True)
        return [sum(column) / len(ROLES) for column in columns]

    def dead_tokens(self) -> list[int]:
        """Return the number of dead tokens of each generation in all layers, [G]."""
        dead = [layer.activity.dead for layer in self.layers if layer.activity]
        return [sum(column) for column in zip(*dead, strict=True)]

    def summary(self) -> dict[str, Any]:
        """Return the values that change during training: one row of a history."""
        return {
            "step": self.checkpoint.step,
            "tokens": [generation.tokens for generation in self.generations],
            "dead": self.dead_tokens(),
            "shares": self.shares(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values without the activity of single tokens."""
        checkpoint = self.checkpoint
        return {
            "checkpoint": str(checkpoint.folder),
            "step": checkpoint.step,
            "model": checkpoint.config.to_dict(),
            "parameters": checkpoint.config.num_parameters(),
            "flops_per_token": checkpoint.config.flops_per_token(),
            "dtypes": self.dtypes,
            "parts": [asdict(each) for each in self.role_parameters],
            "lineage": [entry.to_dict() for entry in checkpoint.lineage],
            "generations": [asdict(generation) for generation in self.generations],
            "text_tokens": self.text_tokens,
            "dead_up_to": DEAD,
            "shares": self.shares() if self.text_tokens else None,
            "layers": [asdict(layer) for layer in self.layers],
        }


def inspect_checkpoint(
    checkpoint: Checkpoint,
    ids: Tensor | None = None,
    device: torch.device | str = "cpu",
    track: Callable[[Iterable[int]], Iterable[int]] = lambda blocks: blocks,
) -> Inspection:
    """Inspect a checkpoint.

    Args:
        checkpoint: checkpoint to inspect. Load a large one with `streamed=True`, so that one block
            at a time is in memory.
        ids: [B, T] int64 token ids on which contributions are measured; None: not measured.
        device: device of the computation.
        track: wraps the iteration over block indices to show progress.

    Raises:
        UserError: the lineage does not belong to this model.
    """
    config, counts = checkpoint.config, GenerationCounts()
    if isinstance(config, ModelConfig):  # other models have no parameter tokens
        counts = count_generations(config, checkpoint.lineage)
    token_tensors = {
        pattention_name(*layer, part): counts[layer]
        for layer in counts
        for part in ("key", "value")
    }
    shapes: dict[str, list[int]] = {}
    norms: dict[str, list[float]] = {}
    dtypes: dict[str, None] = {}
    for name in checkpoint.weights:
        tensor = checkpoint.weights[name]
        shapes[name] = list(tensor.shape)
        dtypes[str(tensor.dtype).removeprefix("torch.")] = None
        if name in token_tensors:
            # Converted to floats at once: a small tensor allocated between large ones would keep
            # the allocator from returning their memory.
            norms[name] = _rms_lengths(tensor, token_tensors[name])
    activity: Mapping[Layer, Activity] = {}
    if isinstance(config, ModelConfig) and ids is not None:
        activity = measure_activity(config, checkpoint.weights, ids, device, track)
    return Inspection(
        checkpoint=checkpoint.without_tensors(),
        dtypes=list(dtypes),
        role_parameters=role_parameters(shapes),
        generations=_summarise_generations(checkpoint, counts),
        layers=[
            LayerSummary(
                layer=number,
                role=role,
                tokens=list(layer_counts),
                key_norm=norms[pattention_name(number, role, "key")],
                value_norm=norms[pattention_name(number, role, "value")],
                activity=summarise_activity(activity[number, role], layer_counts)
                if activity
                else None,
            )
            for (number, role), layer_counts in counts.items()
        ],
        text_tokens=ids.numel() if activity and ids is not None else 0,
        activity=activity,
    )


def role_parameters(shapes: Mapping[str, Sequence[int]]) -> list[RoleParameters]:
    """Return the parameters by role: the embedding, the roles of a block, then the others.

    Args:
        shapes: name of every weight to its shape. Weights with the same name in all blocks form one
            role. A matrix that is not parameter tokens is [D_out, D_in], an embedding [V, D].
    """
    groups: dict[str, dict[str, Sequence[int]]] = {}
    for name, shape in shapes.items():
        in_block = name.split(".", 2)[2] if name.startswith("blocks.") else name
        role = role_and_part(name)[0] or in_block.rpartition(".")[0]
        groups.setdefault(role, {})[name] = shape
    order = {role: place for place, role in enumerate(("embedding", *ROLES))}
    roles = sorted(groups, key=lambda role: order.get(role, len(order)))
    return [_role_parameters(role, groups[role]) for role in roles]


def _role_parameters(role: str, shapes: Mapping[str, Sequence[int]]) -> RoleParameters:
    """Return the sizes of the tensors of one role."""
    parameters = sum(math.prod(shape) for shape in shapes.values())
    parts = {role_and_part(name)[1]: shape for name, shape in shapes.items()}
    if parts.keys() == {"key", "value"}:
        tokens, d_in = parts["key"]
        return RoleParameters(role, tokens, d_in, parts["value"][1], parameters)
    largest = max(shapes.values(), key=len)  # the matrix rather than its bias
    if len(largest) == 1:
        return RoleParameters(role, None, None, largest[0], parameters)
    d_out, d_in = reversed(largest) if role == "embedding" else largest
    return RoleParameters(role, None, d_in, d_out, parameters)


def _summarise_generations(checkpoint: Checkpoint, counts: GenerationCounts) -> list[Generation]:
    """Return the initial tokens and those of every entry of the lineage that still exist."""
    if not counts:
        return []
    return [
        Generation(
            number=number,
            axes=checkpoint.lineage[number - 1].axes if number else [],
            tokens=sum(layer_counts[number] for layer_counts in counts.values()),
            updates=_updates(checkpoint.optimizer, counts, number),
        )
        for number in range(len(checkpoint.lineage) + 1)
    ]


def _updates(
    optimizer: Mapping[str, Tensor], counts: GenerationCounts, generation: int
) -> int | None:
    """Return the updates of the first token of a generation, or None if they are not recorded."""
    for (number, role), layer_counts in counts.items():
        if layer_counts[generation]:
            name = pattention_name(number, role, "key")
            if f"{ROW_AGE}.{name}" in optimizer:
                return int(optimizer[f"{ROW_AGE}.{name}"][sum(layer_counts[:generation])])
            if f"{STEP}.{name}" in optimizer:
                return int(optimizer[f"{STEP}.{name}"])
            return None
    return None


def _rms_lengths(tokens: Tensor, counts: Sequence[int]) -> list[float]:
    """Return the root mean square of the lengths of keys or values [N, D] by generation, [G]."""
    sums = _sum_by_generation(tokens.double().square().sum(1), counts)
    return [math.sqrt(total / max(n, 1)) for total, n in zip(sums, counts, strict=True)]


def summarise_activity(activity: Activity, counts: Sequence[int]) -> ActivitySummary:
    """Sum the activity of the tokens of a layer by generation.

    Args:
        activity: activity of each token, [N].
        counts: [G] number of tokens of each generation, in the order of the rows.
    """
    contribution = activity.contribution
    even = even_share(contribution)
    dead = contribution <= DEAD * even
    return ActivitySummary(
        contribution=_sum_by_generation(contribution, counts),
        share=_sum_by_generation(activity.share, counts),
        dead=[int(number) for number in _sum_by_generation(dead, counts)],
        effective=contribution.sum().item() / even if even else 0.0,
        score_norm=math.sqrt(activity.square.sum()),
    )


def even_share(contribution: Tensor) -> float:
    """Return `Σ c² / Σ c` of the contributions [N] of a layer; 0 if no token contributes."""
    largest = contribution.max().item()
    if not largest:
        return 0.0
    relative = contribution / largest  # avoids underflow of the squares of tiny contributions
    return largest * (relative.square().sum() / relative.sum()).item()


def _sum_by_generation(values: Tensor, counts: Sequence[int]) -> list[float]:
    """Sum values [N] over the tokens of each generation, [G]."""
    return [part.sum().item() for part in torch.split(values, list(counts))]


def fractions(amounts: Sequence[float]) -> list[float]:
    """Divide amounts by their sum; return zeros if the sum is 0."""
    total = sum(amounts)
    return [amount / total if total else 0.0 for amount in amounts]
