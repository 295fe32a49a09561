"""What a report says of several runs beside each other: what differs between their recipes, what
was made of what, and what must be known before their numbers are compared."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Any

from tokengrow.checkpoint.layout import step_folder
from tokengrow.checkpoint.schema import LineageEntry
from tokengrow.console.format import format_small_number
from tokengrow.reports.run_data import LeftOut, RunRecord, Values

SAYS_NOTHING = {"out", "resume", "logger", "checkpoint_every", "keep_checkpoints", "log_every"}
"""Keys of a recipe that change nothing of what is trained."""


@dataclass(frozen=True)
class Difference:
    """A key that is not the same in all runs."""

    key: str
    """Dotted."""
    values: tuple[str | None, ...]
    """Of each run, as text; None: the run has no such key."""


@dataclass
class LineageNode:
    """A size on a branch: trained, grown or pruned."""

    text: str
    """What it is."""
    growth: str | None
    """What led to it from the one before."""
    branches: list["Branch"] = field(default_factory=list)
    """Runs that start from one of its checkpoints."""


@dataclass
class Branch:
    """A run in the tree."""

    run: int
    """Index of the run."""
    start: str
    """What it started from."""
    twigs: list[LineageNode] = field(default_factory=list)
    """Its sizes, the first one first."""


# Recipes


def config_differences(runs: Sequence[RunRecord]) -> list[Difference]:
    """The keys in which the recipes differ. Stages are compared where runs share their names."""
    flat = [dict(_flat(_compared(run.config))) for run in runs]
    ladders = tuple(_ladder(run.config) for run in runs)
    found = [] if len(set(ladders)) == 1 else [Difference("stages", ladders)]
    for key in dict.fromkeys(key for values in flat for key in values):
        values = tuple(each.get(key) for each in flat)
        compared = zip(values, runs, strict=True)
        if len({value for value, run in compared if _has_stage_of(run.config, key)}) > 1:
            found.append(Difference(key, values))
    return found


def _has_stage_of(config: Values, key: str) -> bool:
    """Whether a recipe has the stage that a key is of, if it is of one."""
    return not _of_a_stage(key) or key.split(".")[1] in config["stages"]


def _compared(config: Values) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in SAYS_NOTHING}


def _ladder(config: Values) -> str:
    """`small: 160 steps, then large: 120 steps`."""
    stages = config.get("stages", {}).items()
    return ", then ".join(f"{name}: {stage['steps']} steps" for name, stage in stages)


def _of_a_stage(key: str) -> bool:
    return key.startswith("stages.")


def _flat(values: Values, prefix: str = "") -> Iterator[tuple[str, str]]:
    """(dotted key, value as text) of every leaf."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif not (_of_a_stage(prefix) and key == "name"):
            yield f"{prefix}{key}", _text(value)


def _text(value: Any) -> str:
    """A value as YAML would have it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_text, value))}]"
    return str(value)


# Lineage


def lineage_tree(runs: Sequence[RunRecord]) -> list[Branch]:
    """The runs as a tree: one that starts from a checkpoint of another hangs on the size that this
    checkpoint is of. Checkpoints are known by the SHA-256 of their weights."""
    sizes = [_twigs(run) for run in runs]
    roots: list[Branch] = []
    for index, run in enumerate(runs):
        start, outside, siblings = _start(run), _outside(run), roots
        if (found := _parent(run, runs)) is not None:
            parent, step, behind = found
            start, outside = f"from {runs[parent].name}, step {step}", outside[behind:]
            siblings = sizes[parent][_rung_at(runs[parent], step)].branches
        siblings.append(Branch(index, start, [*map(_twig_outside, outside), *sizes[index]]))
    return roots


def _twigs(run: RunRecord) -> list[LineageNode]:
    """A twig for each rung; those that were grown take the lineage's last entries."""
    grown = iter(run.lineage[len(run.lineage) - run.own_growths :])
    twigs = []
    for rung in run.rungs:
        end = "not ended" if rung.loss_end is None else f"loss {rung.loss_end:.4f}"
        text = f"{rung.name}: {rung.parameters:,} parameters, {rung.tokens:,} tokens, {end}"
        twigs.append(LineageNode(text, None if rung.drift is None else _growth(next(grown))))
    return twigs


def _twig_outside(entry: LineageEntry) -> LineageNode:
    parameters = entry.target.parameters
    return LineageNode(f"{parameters:,} parameters, outside of any run", _growth(entry))


def _outside(run: RunRecord) -> tuple[LineageEntry, ...]:
    """What was grown or pruned before the run."""
    return run.lineage[: len(run.lineage) - run.own_growths]


def _start(run: RunRecord) -> str:
    if not run.config.get("source"):
        return f"initial weights, seed {run.config.get('seed')}"
    return f"from {run.config['source']}, which is not among these runs"


def _growth(entry: LineageEntry) -> str:
    """`grown: tokens.query, key 64 → 128; tokens.ffn 256 → 512; largest |Δ logit| 7.1e-15`."""
    same: dict[tuple[str, str], list[str]] = {}
    for step in entry.steps:
        for key, (before, after) in step.changes.items():
            section, _, name = key.rpartition(".")
            same.setdefault((section, f"{_number(before)} → {_number(after)}"), []).append(name)
    changes = [
        f"{section}{'.' if section else ''}{', '.join(names)} {change}"
        for (section, change), names in same.items()
    ]
    what = "pruned" if entry.operation == "prune" else "grown"
    moved = format_small_number(entry.drift.max_logit)
    return f"{what}: {'; '.join(changes)}; largest |Δ logit| {moved}"


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _parent(run: RunRecord, runs: Sequence[RunRecord]) -> tuple[int, int, int] | None:
    """The run from one of whose checkpoints this one descends.

    Returns:
        Its index, the step of the checkpoint, and how many of the entries of `_outside` lie before
        that; None: it is not among the runs.
    """
    chain = [entry.source.weights_sha256 for entry in _outside(run)]
    own = run.lineage[len(chain) :]
    if run.source:
        chain.append(run.source.weights_sha256)
    elif run.rungs[0].drift is not None:  # of a version that noted less: by its first growth
        chain.append(own[0].source.weights_sha256)
    for behind, digest in reversed(list(enumerate(chain))):
        found = [n for n, each in enumerate(runs) if each is not run and digest in each.weights]
        if (
            found and digest
        ):  # runs of one recipe and seed have the same weights: then it is the one named
            index = next((n for n in found if runs[n].folder in _named(run)), found[0])
            return index, runs[index].weights[digest], behind
    return _parent_by_path(run, runs)


def _named(run: RunRecord) -> tuple[Path, Path]:
    """The folders that a run may mean by its source: of a run, or of one of its checkpoints."""
    path = Path(run.config["source"]).resolve()
    return path, path.parent


def _parent_by_path(run: RunRecord, runs: Sequence[RunRecord]) -> tuple[int, int, int] | None:
    """Likewise, of a run that noted no hash: by the path that it was given."""
    if run.source or not run.config.get("source"):
        return None
    path, _ = _named(run)
    for index, other in enumerate(runs):
        if other is not run and other.folder in _named(run):
            steps = list(other.weights.values())
            step = next((s for s in steps if path.name == step_folder(s)), max(steps))
            return index, step, len(_outside(run))
    return None


def _rung_at(run: RunRecord, step: int) -> int:
    """Index of the rung that a checkpoint of the run is of."""
    ends = (rung.ends_at for rung in run.rungs)
    reached = (index for index, end in enumerate(ends) if end is not None and step <= end)
    return next(reached, len(run.rungs) - 1)


# What to know


def notes(runs: Sequence[RunRecord], left_out: Sequence[LeftOut]) -> list[str]:
    """Sentences on what keeps numbers from being compared, or is missing."""
    said = []
    if len({run.validated_on for run in runs}) > 1:
        said.append(
            "The runs were not all validated on the same tokens (data, tokenizer, context length "
            "or validation_sequences differ): their losses and the ratios do not compare."
        )
    for run in runs:
        unknown = [key for key in ("tokens", "flops") if getattr(run.before, key) is None]
        if unknown:
            said.append(
                f"What lies behind the source of {run.name} is not recorded: its tokens and FLOPs "
                "count from its own start."
            )
        if run.seconds is None:
            said.append(f"The wall time of {run.name} is not recorded.")
        elif run.before.seconds is None:
            said.append(
                f"The wall time behind the source of {run.name} is not recorded: its time counts "
                "from its own start."
            )
        if run.step < max(run.weights.values(), default=0):
            said.append(f"{run.name} is shown up to step {run.step:,}, the checkpoint named.")
        elif run.stands != "finished":
            said.append(f"{run.name} is {run.stands}; it is shown up to its newest checkpoint.")
    said += [
        f"{one.name} and {other.name} have the same losses at the same costs: one line of the "
        "figures lies on the other."
        for one, other in combinations(runs, 2)
        if _course(one) == _course(other)
    ]
    devices = {(each["device"], each["processes"]) for run in runs for each in run.sessions}
    if len(devices) > 1:
        said.append("The runs were trained on different devices: their wall times do not compare.")
    said += [f"Left out: {each.path} ({each.reason})." for each in left_out]
    return said


def _course(run: RunRecord) -> list[tuple[float, float]]:
    """What a figure shows of a run."""
    return [(point.flops, point.loss) for point in run.points]
