"""Comparison of several runs: recipe differences, lineage tree and comparability notes."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.schema import LineageEntry
from tokengrow.console.format import format_small_number
from tokengrow.reports.run_data import JSONObject, RunRecord, SkippedPath

IGNORED_KEYS = {"out", "resume", "logger", "checkpoint_every", "keep_checkpoints", "log_every"}
"""Recipe keys that do not change the trained model."""


@dataclass(frozen=True)
class ConfigDifference:
    """Recipe key whose value is not the same in all runs."""

    key: str
    """Dotted key."""
    values: tuple[str | None, ...]
    """Value in each run, as text; None: the run does not have this key."""


@dataclass
class LineageNode:
    """Model size on a branch, from training, growth or pruning."""

    text: str
    """Description of the size."""
    growth: str | None
    """Description of the growth or pruning that led to it; None: the size was not grown."""
    branches: list["Branch"] = field(default_factory=list)
    """Runs that start from a checkpoint of this size."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        branches = [branch.to_dict() for branch in self.branches]
        return {"text": self.text, "growth": self.growth, "branches": branches}


@dataclass
class Branch:
    """Run in the lineage tree."""

    run: int
    """Index of the run."""
    start: str
    """Description of its starting point."""
    nodes: list[LineageNode] = field(default_factory=list)
    """Model sizes of the run, oldest first."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        nodes = [node.to_dict() for node in self.nodes]
        return {"run": self.run, "start": self.start, "twigs": nodes}


# Recipe differences


def config_differences(runs: Sequence[RunRecord]) -> list[ConfigDifference]:
    """Return the keys in which the recipes differ.

    The keys of a stage are compared between the runs that have a stage of this name.
    """
    flat_configs = []
    for run in runs:
        compared = {key: value for key, value in run.config.items() if key not in IGNORED_KEYS}
        flat_configs.append(dict(_flatten(compared)))
    ladders = tuple(_ladder_text(run.config) for run in runs)
    differences = [] if len(set(ladders)) == 1 else [ConfigDifference("stages", ladders)]
    for key in dict.fromkeys(key for config in flat_configs for key in config):
        values = tuple(config.get(key) for config in flat_configs)
        compared_values = {
            value for value, run in zip(values, runs, strict=True) if _has_stage(run.config, key)
        }
        if len(compared_values) > 1:
            differences.append(ConfigDifference(key, values))
    return differences


def _has_stage(config: JSONObject, key: str) -> bool:
    """Return whether a recipe has the stage of a key; true for keys outside stages."""
    return not key.startswith("stages.") or key.split(".")[1] in config["stages"]


def _ladder_text(config: JSONObject) -> str:
    """Return the stages of a recipe, as in `small: 160 steps, then large: 120 steps`."""
    stages = config.get("stages", {}).items()
    return ", then ".join(f"{name}: {stage['steps']} steps" for name, stage in stages)


def _flatten(values: JSONObject, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (dotted key, value as text) of every leaf, without the names of stages."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        elif not (prefix.startswith("stages.") and key == "name"):
            yield f"{prefix}{key}", _yaml_text(value)


def _yaml_text(value: Any) -> str:
    """Return a value as it is written in YAML."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml_text, value))}]"
    return str(value)


# Lineage


def lineage_tree(runs: Sequence[RunRecord]) -> list[Branch]:
    """Return the runs as a tree.

    A run that starts from a checkpoint of another run is a branch of the size of this checkpoint.
    Checkpoints are identified by the SHA-256 of their weights.
    """
    nodes = [_rung_nodes(run) for run in runs]
    roots: list[Branch] = []
    for index, run in enumerate(runs):
        outside, siblings = _outside_entries(run), roots
        parent = _find_parent(run, runs)
        if parent is not None:
            parent_run = runs[parent.run]
            start = f"from {parent_run.name}, step {parent.step}"
            outside = outside[parent.earlier_entries :]
            siblings = nodes[parent.run][_rung_at(parent_run, parent.step)].branches
        elif run.config.get("source"):
            start = f"from {run.config['source']}, which is not among these runs"
        else:
            start = f"initial weights, seed {run.config.get('seed')}"
        outside_nodes = [
            LineageNode(
                f"{entry.target.parameters:,} parameters, outside of any run", _growth_text(entry)
            )
            for entry in outside
        ]
        siblings.append(Branch(index, start, [*outside_nodes, *nodes[index]]))
    return roots


def _rung_nodes(run: RunRecord) -> list[LineageNode]:
    """Return a node for each rung; the last entries of the lineage are the growths of the run."""
    growths = iter(run.lineage[len(run.lineage) - run.own_growths :])
    nodes = []
    for rung in run.rungs:
        end = "not ended" if rung.loss_end is None else f"loss {rung.loss_end:.4f}"
        text = f"{rung.name}: {rung.parameters:,} parameters, {rung.tokens:,} tokens, {end}"
        nodes.append(LineageNode(text, None if rung.drift is None else _growth_text(next(growths))))
    return nodes


def _outside_entries(run: RunRecord) -> tuple[LineageEntry, ...]:
    """Return the growths and prunings before the run."""
    return run.lineage[: len(run.lineage) - run.own_growths]


def _growth_text(entry: LineageEntry) -> str:
    """Describe a growth or pruning.

    Example: `grown: tokens.query, key 64 → 128; tokens.ffn 256 → 512; largest |Δ logit| 7.1e-15`.
    """
    names_by_change: dict[tuple[str, str], list[str]] = {}
    for step in entry.steps:
        for key, values in step.changes.items():
            section, _, name = key.rpartition(".")
            before, after = (f"{v:,}" if isinstance(v, int) else f"{v:.4g}" for v in values)
            names_by_change.setdefault((section, f"{before} → {after}"), []).append(name)
    changes = [
        f"{section}{'.' if section else ''}{', '.join(names)} {change}"
        for (section, change), names in names_by_change.items()
    ]
    operation = "pruned" if entry.operation == "prune" else "grown"
    drift = format_small_number(entry.drift.max_logit)
    return f"{operation}: {'; '.join(changes)}; largest |Δ logit| {drift}"


@dataclass(frozen=True)
class _Parent:
    """Checkpoint of another run, from which a run descends."""

    run: int
    """Index of the other run."""
    step: int
    """Step of the checkpoint."""
    earlier_entries: int
    """Number of entries of `_outside_entries` that are older than the checkpoint."""


def _find_parent(run: RunRecord, runs: Sequence[RunRecord]) -> _Parent | None:
    """Return the newest ancestor of a run among the checkpoints of the other runs, or None."""
    ancestors = [entry.source.weights_sha256 for entry in _outside_entries(run)]
    own_growths = run.lineage[len(ancestors) :]
    if run.source:
        ancestors.append(run.source.weights_sha256)
    elif run.rungs[0].drift is not None:  # an older version: the first growth recorded the source
        ancestors.append(own_growths[0].source.weights_sha256)
    for earlier_entries, digest in reversed(list(enumerate(ancestors))):
        if digest is None:
            continue
        owners = [n for n, each in enumerate(runs) if each is not run and digest in each.weights]
        if owners:  # runs with the same recipe and seed have the same weights: prefer the given one
            given = _source_folders(run)
            owner = next((n for n in owners if runs[n].folder in given), owners[0])
            return _Parent(owner, runs[owner].weights[digest], earlier_entries)
    return _find_parent_by_path(run, runs)


def _find_parent_by_path(run: RunRecord, runs: Sequence[RunRecord]) -> _Parent | None:
    """Return the source of a run without a recorded hash, found by the path in its recipe."""
    if run.source or not run.config.get("source"):
        return None
    path, _ = _source_folders(run)
    for index, other in enumerate(runs):
        if other is not run and other.folder in _source_folders(run):
            steps = list(other.weights.values())
            step = next((s for s in steps if path.name == step_folder(s)), max(steps))
            return _Parent(index, step, len(_outside_entries(run)))
    return None


def _source_folders(run: RunRecord) -> tuple[Path, Path]:
    """Return the possible run directories of the key `source`: its path and the parent of it."""
    path = Path(run.config["source"]).resolve()
    return path, path.parent


def _rung_at(run: RunRecord, step: int) -> int:
    """Return the index of the rung of a checkpoint."""
    ends = (rung.ends_at for rung in run.rungs)
    reached = (index for index, end in enumerate(ends) if end is not None and step <= end)
    return next(reached, len(run.rungs) - 1)


# Comparability


def comparability_notes(runs: Sequence[RunRecord], skipped: Sequence[SkippedPath]) -> list[str]:
    """Return sentences on missing data, and on numbers that are not comparable."""
    notes = []
    if len({run.validation_key for run in runs}) > 1:
        notes.append(
            "The runs were not all validated on the same tokens (data, tokenizer, context length "
            "or validation_sequences differ). Their losses and ratios are not comparable."
        )
    for run in runs:
        if run.prior_cost.tokens is None or run.prior_cost.flops is None:
            notes.append(
                f"The cost of the source of {run.name} is not recorded. Its tokens and FLOPs count "
                "from its own start."
            )
        if run.seconds is None:
            notes.append(f"The wall time of {run.name} is not recorded.")
        elif run.prior_cost.seconds is None:
            notes.append(
                f"The wall time of the source of {run.name} is not recorded. Its wall time counts "
                "from its own start."
            )
        if run.step < max(run.weights.values(), default=0):
            notes.append(f"{run.name} is shown up to step {run.step:,}, the checkpoint given.")
        elif run.status != "finished":
            notes.append(f"{run.name} is {run.status}. It is shown up to its newest checkpoint.")
    notes += [
        f"{one.name} and {other.name} have the same losses at the same costs. Their curves "
        "coincide in the figures."
        for one, other in combinations(runs, 2)
        if _curve(one) == _curve(other)
    ]
    devices = {(each["device"], each["processes"]) for run in runs for each in run.sessions}
    if len(devices) > 1:
        notes.append(
            "The runs were trained on different devices. Their wall times are not comparable."
        )
    notes += [f"Skipped: {each.path} ({each.reason})." for each in skipped]
    return notes


def _curve(run: RunRecord) -> list[tuple[float, float]]:
    """Return the (FLOPs, loss) points of a run."""
    return [(point.flops, point.loss) for point in run.points]
