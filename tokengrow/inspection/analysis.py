"""What a checkpoint is, and what its parameter tokens do: by role, layer, and the growth that each
token came with.

contribution: what a token adds to its layer's output on a text (`tokengrow.model.activity`).
effective number: `(Σ c)² / Σ c²` over the contributions c of a layer, the participation ratio: N if
all contribute alike, 1 if one does all. Σ c over it is the *even share*, `Σ c² / Σ c`: what each
would contribute if so many did all the work alike.
dead: a token that contributes at most `DEAD` of the even share. Tokens that do nothing change
neither number, so that a growth moves no old token from one side to the other; the mean over all N
would be halved by as many new ones.
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
from tokengrow.growth.generations import Generations, generations
from tokengrow.growth.moments import COUNT, ROW_AGE
from tokengrow.growth.tensors import pattention_name, role_and_part
from tokengrow.model.activity import Activity, Layer, measure_activity
from tokengrow.model.config import ROLES, ModelConfig

DEAD = 0.001
"""Contribution over the even share of its layer, up to which a token is dead."""


PARTS = ("key", "value")
"""Of a parameter token."""


@dataclass(frozen=True)
class RoleParameters:
    """The tensors of one role, in all layers together."""

    role: str
    """Of the five of a block, or what else the tensors are."""
    tokens: int | None
    """N; None: they are no parameter tokens."""
    d_in: int | None
    """Channels, or token ids, that it reads."""
    d_out: int
    """Channels that it gives."""
    parameters: int
    """All of them."""


@dataclass(frozen=True)
class Generation:
    """The parameter tokens that came with one growth, in all layers together."""

    number: int
    """Of the growth in the lineage; 0: from birth."""
    axes: list[str]
    """Along which the growth was; empty: birth."""
    tokens: int
    """How many there are."""
    updates: int | None
    """That they have had, as the optimizer counts: to it, what was there before a growth has had
    one at least. None: there is no optimizer state."""


@dataclass(frozen=True)
class ActivitySummary:
    """What the tokens of one layer do on the text."""

    contribution: list[float]
    """[G] in sum over the tokens of each generation."""
    share: list[float]
    """[G] share of them in the sum that the activation divides by."""
    dead: list[int]
    """[G] dead tokens."""
    effective: float
    """Effective number of tokens; 0 where none contributes."""
    score_norm: float
    """Norm of the scores."""


@dataclass(frozen=True)
class LayerSummary:
    """The parameter tokens of one Pattention layer."""

    layer: int
    """Number of its block."""
    role: str
    """In that block."""
    tokens: list[int]
    """[G] how many there are of each generation; they lie in this order."""
    key_norm: list[float]
    """[G] root mean square of their keys' lengths; 0 where there are none."""
    value_norm: list[float]
    """[G] likewise of their values."""
    activity: ActivitySummary | None
    """What they do; None: no text was given."""


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint is."""

    checkpoint: Checkpoint
    """Without its tensors."""
    dtypes: list[str]
    """Of the weights."""
    parts: list[RoleParameters]
    """Parameters by role, in the order of the model."""
    generations: list[Generation]
    """Birth and every growth and pruning; empty for a model without parameter tokens."""
    layers: list[LayerSummary]
    """Every Pattention layer."""
    text_tokens: int
    """On which contributions were measured; 0: on none."""
    activity: Mapping[Layer, Activity]
    """Of every single token."""

    def shares(self) -> dict[str, list[float]]:
        """[G] share of the contribution of each generation, by role, in sum over the layers; all 0
        where nothing contributes."""
        return {role: fractions(self._contributions(role)) for role in ROLES}

    def mean_shares(self) -> list[float]:
        """[G] the mean of `shares` over the roles."""
        columns = zip(*self.shares().values(), strict=True)
        return [sum(column) / len(ROLES) for column in columns]

    def dead_tokens(self) -> list[int]:
        """[G] dead tokens of each generation in the whole model."""
        each = [layer.activity.dead for layer in self.layers if layer.activity]
        return [sum(column) for column in zip(*each, strict=True)]

    def _contributions(self, role: str) -> list[float]:
        each = [x.activity.contribution for x in self.layers if x.role == role and x.activity]
        return [sum(column) for column in zip(*each, strict=True)]

    def summary(self) -> dict[str, Any]:
        """What changes while a model is trained: one row of a history."""
        return {
            "step": self.checkpoint.step,
            "tokens": [generation.tokens for generation in self.generations],
            "dead": self.dead_tokens(),
            "shares": self.shares(),
        }

    def to_dict(self) -> dict[str, Any]:
        """As JSON stores it; single tokens are left out."""
        checkpoint = self.checkpoint
        return {
            "checkpoint": str(checkpoint.folder),
            "step": checkpoint.step,
            "model": checkpoint.config.to_dict(),
            "parameters": checkpoint.config.num_parameters(),
            "flops_per_token": checkpoint.config.flops_per_token(),
            "dtypes": self.dtypes,
            "parts": [asdict(part) for part in self.parts],
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
    watch: Callable[[Iterable[int]], Iterable[int]] = lambda blocks: blocks,
) -> Inspection:
    """Looks into a checkpoint.

    Args:
        checkpoint: loaded with `streamed` if its model is large: then one block is in memory at a
            time.
        ids: [B, T] int64 token ids on which contributions are measured; None: they are not.
        device: that computes.
        watch: shows progress over the numbers of the blocks.

    Raises:
        UserError: a lineage that is not this model's.
    """
    config, counts = checkpoint.config, Generations()
    if isinstance(config, ModelConfig):  # other models have sizes, and nothing of what follows
        counts = generations(config, checkpoint.lineage)
    of_tensor = {pattention_name(*at, part): counts[at] for at in counts for part in PARTS}
    shapes: dict[str, list[int]] = {}
    norms: dict[str, list[float]] = {}
    dtypes: dict[str, None] = {}
    for name in checkpoint.weights:
        tensor = checkpoint.weights[name]
        shapes[name] = list(tensor.shape)
        dtypes[str(tensor.dtype).removeprefix("torch.")] = None
        if name in of_tensor:
            # To plain numbers at once: a small tensor kept between large ones would keep the memory
            # that those have left from being given back.
            norms[name] = _norms(tensor, of_tensor[name])
    activity: Mapping[Layer, Activity] = {}
    if isinstance(config, ModelConfig) and ids is not None:
        activity = measure_activity(config, checkpoint.weights, ids, device, watch)
    return Inspection(
        checkpoint=checkpoint.without_tensors(),
        dtypes=list(dtypes),
        parts=role_parameters(shapes),
        generations=_generations(checkpoint, counts),
        layers=[_layer(at, each, norms, activity.get(at)) for at, each in counts.items()],
        text_tokens=ids.numel() if activity and ids is not None else 0,
        activity=activity,
    )


def role_parameters(shapes: Mapping[str, Sequence[int]]) -> list[RoleParameters]:
    """Parameters by role: the embedding, the roles of a block, then all else.

    Args:
        shapes: name of every weight to its shape. What has the same name in all blocks is one role;
            a matrix that is no parameter tokens is [D_out, D_in], an embedding [V, D].
    """
    groups: dict[str, dict[str, Sequence[int]]] = {}
    for name, shape in shapes.items():
        within = name.split(".", 2)[2] if name.startswith("blocks.") else name
        groups.setdefault(role_and_part(name)[0] or within.rpartition(".")[0], {})[name] = shape
    order = {role: place for place, role in enumerate(("embedding", *ROLES))}
    roles = sorted(groups, key=lambda role: order.get(role, len(order)))
    return [_part(role, groups[role]) for role in roles]


def _part(role: str, shapes: Mapping[str, Sequence[int]]) -> RoleParameters:
    """The part that the tensors of one role are."""
    size = sum(math.prod(shape) for shape in shapes.values())
    of = {role_and_part(name)[1]: shape for name, shape in shapes.items()}
    if of.keys() == {"key", "value"}:
        return RoleParameters(role, of["key"][0], of["key"][1], of["value"][1], size)
    widest = max(shapes.values(), key=len)  # the matrix, beside its bias
    if len(widest) == 1:
        return RoleParameters(role, None, None, widest[0], size)
    d_out, d_in = reversed(widest) if role == "embedding" else widest
    return RoleParameters(role, None, d_in, d_out, size)


def _generations(checkpoint: Checkpoint, counts: Generations) -> list[Generation]:
    """Birth and every entry of the lineage, with the tokens that are left of it."""
    if not counts:
        return []
    found = []
    for number in range(len(checkpoint.lineage) + 1):
        found.append(
            Generation(
                number=number,
                axes=checkpoint.lineage[number - 1].axes if number else [],
                tokens=sum(each[number] for each in counts.values()),
                updates=_updates(checkpoint.optimizer, counts, number),
            )
        )
    return found


def _updates(optimizer: Mapping[str, Tensor], counts: Generations, generation: int) -> int | None:
    """Those of the first token of a generation; None: there is none, or nobody counted."""
    for (number, role), each in counts.items():
        if each[generation]:
            name = pattention_name(number, role, "key")
            if f"{ROW_AGE}.{name}" in optimizer:
                return int(optimizer[f"{ROW_AGE}.{name}"][sum(each[:generation])])
            if f"{COUNT}.{name}" in optimizer:
                return int(optimizer[f"{COUNT}.{name}"])
            return None
    return None


def _norms(tokens: Tensor, counts: Sequence[int]) -> list[float]:
    """[G] root mean square of the lengths of keys or values [N, D], by generation."""
    sums = _sums(tokens.double().square().sum(1), counts)
    return [math.sqrt(total / max(n, 1)) for total, n in zip(sums, counts, strict=True)]


def _layer(
    at: Layer,
    counts: Sequence[int],
    norms: Mapping[str, list[float]],
    activity: Activity | None,
) -> LayerSummary:
    """The tokens of one layer, by generation.

    Args:
        at: where it is.
        counts: [G] tokens of each generation.
        norms: of `_norms`, by name of the tensor.
        activity: of the tokens, if it was measured.
    """
    return LayerSummary(
        layer=at[0],
        role=at[1],
        tokens=list(counts),
        key_norm=norms[pattention_name(*at, "key")],
        value_norm=norms[pattention_name(*at, "value")],
        activity=summarise_activity(activity, counts) if activity else None,
    )


def summarise_activity(activity: Activity, counts: Sequence[int]) -> ActivitySummary:
    """What the tokens of a layer do, by generation.

    Args:
        activity: of each token, [N].
        counts: [G] tokens of each generation, in the order in which they lie.
    """
    contribution = activity.contribution
    even = even_share(contribution)
    dead = contribution <= DEAD * even
    return ActivitySummary(
        contribution=_sums(contribution, counts),
        share=_sums(activity.share, counts),
        dead=[int(number) for number in _sums(dead, counts)],
        effective=contribution.sum().item() / even if even else 0.0,
        score_norm=math.sqrt(activity.square.sum()),
    )


def even_share(contribution: Tensor) -> float:
    """`Σ c² / Σ c` of the contributions [N] of a layer; 0 where none contributes."""
    largest = contribution.max().item()
    if not largest:
        return 0.0
    relative = contribution / largest  # squares of what is tiny would be 0
    return largest * (relative.square().sum() / relative.sum()).item()


def _sums(values: Tensor, counts: Sequence[int]) -> list[float]:
    """[N] to the sum over each generation, [G]."""
    return [part.sum().item() for part in values.split(list(counts))]


def fractions(amounts: Sequence[float]) -> list[float]:
    """Amounts as shares of their sum; all 0 where that is 0."""
    whole = sum(amounts)
    return [amount / whole if whole else 0.0 for amount in amounts]
