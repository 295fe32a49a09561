"""Which growth each parameter token came with.

The tokens that a model is born with are generation 0; those that the n-th entry of its lineage
brings, appended to a layer or in a layer of their own, are generation n. A growth by width or heads
lengthens tokens and brings none. New tokens stand behind all others, and a pruning keeps the order:
in each layer the generations are runs of rows, oldest first, and their lengths say all.

They follow from the lineage. The ages that the optimizer keeps would not do: bare models have none,
and two growths with no update between them would be one.

Shapes: `N` parameter tokens, `L` layers, `G` generations.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tokengrow.checkpoint.schema import LineageEntry, LineageSource, LineageTarget
from tokengrow.errors import UserError
from tokengrow.growth.depth import origins
from tokengrow.model.activity import Layer
from tokengrow.model.config import ROLES, ModelConfig
from tokengrow.parsing import parse_dataclass

Generations = dict[Layer, list[int]]
"""Of each layer: how many tokens there are of each generation, [G]."""

RECORD = "generations"
"""Under which a pruning's entry of the lineage holds what it left: role to [L][G]."""


def generations(config: ModelConfig, lineage: Sequence[LineageEntry]) -> Generations:
    """The tokens of each generation in every layer.

    Args:
        config: of the model.
        lineage: its own, oldest first. Of a pruning that recorded none, what it left counts as
            generation 0.

    Raises:
        UserError: a lineage that does not lead to these sizes.
    """
    start = _config(lineage[0].source) if lineage else config
    counts = {layer: [getattr(start.tokens, layer[1])] for layer in _layers(start)}
    for entry in lineage:
        counts = _pruned(counts, entry) if entry.operation == "prune" else _grown(counts, entry)
    for (number, role), each in counts.items():
        if sum(each) != getattr(config.tokens, role):
            raise UserError(
                f"the lineage leads to {sum(each)} parameter tokens of role {role} in layer "
                f"{number}, where the model has {getattr(config.tokens, role)}: lineage.json and "
                "config.yaml are not of one checkpoint"
            )
    if counts.keys() != set(_layers(config)):
        raise UserError(
            f"the lineage leads to {len(counts) // len(ROLES)} layers, where the model has "
            f"{config.layers}: lineage.json and config.yaml are not of one checkpoint"
        )
    return counts


def left_of(counts: Generations, kept: Mapping[Layer, Tensor]) -> dict[str, list[list[int]]]:
    """What a pruning leaves of each generation, as its entry of the lineage records it.

    Args:
        counts: before.
        kept: of each layer the indices of the tokens that stay, in their order.
    """
    left: dict[str, list[list[int]]] = {role: [] for role in ROLES}
    for (number, role), each in counts.items():
        rows, row = kept[number, role], 0
        left[role].append([])
        for count in each:
            left[role][-1].append(int(((rows >= row) & (rows < row + count)).sum()))
            row += count
    return left


def _grown(counts: Generations, entry: LineageEntry) -> Generations:
    """After a growth: tokens are appended before blocks are put among the others."""
    source, target = _config(entry.source), _config(entry.target)
    born = len(next(iter(counts.values())))  # the number of the new generation
    grown = {}
    place = entry.settings["new_block_place"]
    for number, (old, itself) in enumerate(origins(source, target, place)):
        for role in ROLES:
            before, after = getattr(source.tokens, role), getattr(target.tokens, role)
            grown[number, role] = (
                [*counts[old, role], after - before] if itself else [*[0] * born, after]
            )
    return grown


def _pruned(counts: Generations, entry: LineageEntry) -> Generations:
    """After a pruning, which brings none of its own."""
    target = _config(entry.target)
    born = len(next(iter(counts.values())))
    record = entry.settings.get(RECORD) or {
        role: [[n, *[0] * (born - 1)]] * target.layers for role, n in target.tokens.items()
    }
    return {(number, role): [*record[role][number], 0] for number, role in _layers(target)}


def _config(end: LineageSource | LineageTarget) -> ModelConfig:
    return parse_dataclass(ModelConfig, end.config, "model")


def _layers(config: ModelConfig) -> list[Layer]:
    return [(number, role) for number in range(config.layers) for role in ROLES]
