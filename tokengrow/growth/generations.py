"""Growth that added each parameter token, derived from the lineage.

The tokens of the initial model are generation 0. The tokens added by entry n of the lineage are
generation n; they are appended to a layer, or are in a new layer. A growth of width or heads makes
tokens longer and adds none. New tokens come after all others, and a pruning keeps the order. In
each layer the generations are therefore consecutive rows, oldest first, and their lengths describe
them completely.

The ages in the optimizer state would not be enough: bare models have none, and two growths without
an update between them would look like one.

Shapes: `N` parameter tokens, `L` layers, `G` generations.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from tokengrow.checkpoint.schema import LineageEntry, LineageSource, LineageTarget
from tokengrow.errors import UserError
from tokengrow.growth.depth import block_origins
from tokengrow.model.activity import Layer
from tokengrow.model.config import ROLES, ModelConfig
from tokengrow.parsing import parse_dataclass

GenerationCounts = dict[Layer, list[int]]
"""Number of tokens of each generation [G] in each layer."""

GENERATIONS_KEY = "generations"
"""Setting of a pruning in the lineage: role to the number of tokens it kept, [L][G]."""


def count_generations(config: ModelConfig, lineage: Sequence[LineageEntry]) -> GenerationCounts:
    """Count the tokens of each generation in every layer.

    Args:
        config: config of the model.
        lineage: lineage of the model, oldest first. If a pruning recorded no counts, the tokens
            that it kept count as generation 0.

    Raises:
        UserError: the lineage does not lead to the sizes of the config.
    """
    start = _model_config(lineage[0].source) if lineage else config
    counts = {layer: [getattr(start.tokens, layer[1])] for layer in _layers(start)}
    for entry in lineage:
        after = _counts_after_pruning if entry.operation == "prune" else _counts_after_growth
        counts = after(counts, entry)
    remedy = "Restore both files from one checkpoint."
    for (number, role), each in counts.items():
        if sum(each) != getattr(config.tokens, role):
            raise UserError(
                f"lineage.json must lead to the sizes in config.yaml, got {sum(each)} parameter "
                f"tokens of role {role} in layer {number} instead of "
                f"{getattr(config.tokens, role)}. {remedy}"
            )
    if counts.keys() != set(_layers(config)):
        raise UserError(
            f"lineage.json must lead to the sizes in config.yaml, got "
            f"{len(counts) // len(ROLES)} layers instead of {config.layers}. {remedy}"
        )
    return counts


def count_kept(
    counts: GenerationCounts, kept: Mapping[Layer, Tensor]
) -> dict[str, list[list[int]]]:
    """Count the tokens of each generation that a pruning keeps, as recorded in the lineage.

    Args:
        counts: counts before the pruning.
        kept: indices of the kept tokens of each layer, in ascending order.
    """
    result: dict[str, list[list[int]]] = {role: [] for role in ROLES}
    for (number, role), each in counts.items():
        rows, row = kept[number, role], 0
        result[role].append([])
        for count in each:
            result[role][-1].append(int(((rows >= row) & (rows < row + count)).sum()))
            row += count
    return result


def _counts_after_growth(counts: GenerationCounts, entry: LineageEntry) -> GenerationCounts:
    """Return the counts after a growth, which appends tokens before it inserts blocks."""
    source, target = _model_config(entry.source), _model_config(entry.target)
    generations = len(next(iter(counts.values())))
    grown = {}
    place = entry.settings["new_block_place"]
    for number, (old, is_original) in enumerate(block_origins(source, target, place)):
        for role in ROLES:
            before, after = getattr(source.tokens, role), getattr(target.tokens, role)
            grown[number, role] = (
                [*counts[old, role], after - before] if is_original else [*[0] * generations, after]
            )
    return grown


def _counts_after_pruning(counts: GenerationCounts, entry: LineageEntry) -> GenerationCounts:
    """Return the counts after a pruning, whose own generation has no tokens."""
    target = _model_config(entry.target)
    generations = len(next(iter(counts.values())))
    recorded = entry.settings.get(GENERATIONS_KEY) or {
        role: [[n, *[0] * (generations - 1)]] * target.layers for role, n in target.tokens.items()
    }
    return {(number, role): [*recorded[role][number], 0] for number, role in _layers(target)}


def _model_config(model: LineageSource | LineageTarget) -> ModelConfig:
    """Return the typed config of a model in the lineage."""
    return parse_dataclass(ModelConfig, model.config, "model")


def _layers(config: ModelConfig) -> list[Layer]:
    """Return (block number, role) of all Pattention layers."""
    return [(number, role) for number in range(config.layers) for role in ROLES]
