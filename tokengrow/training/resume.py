"""Start of a run: initial weights, the checkpoint of another run, or its own newest checkpoint."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tokengrow.checkpoint.layout import RUN_CONFIG, SESSIONS, find_checkpoints
from tokengrow.checkpoint.schema import RecordedRun, SourceCost, TrainState
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, newest_checkpoint
from tokengrow.data.sequences import TokenSource
from tokengrow.errors import UserError
from tokengrow.files import is_stale_temporary, read_yaml
from tokengrow.growth.plan import plan_growth
from tokengrow.training.config import TrainConfig

CONFIG_FILE = RUN_CONFIG
RECORDS = (CONFIG_FILE, SESSIONS)
"""Files that a run writes next to its checkpoints, each atomically."""

FIXED_KEYS = ("seed", "batch_size", "source", "growth")
"""Top-level keys that a resumed run must share with its checkpoint, besides its past stages."""

FIXED_PLATEAU_KEYS = ("validation_every", "validation_sequences")
"""Keys that must stay the same within a stage with a plateau, whose end depends on them."""


def find_start(config: TrainConfig, tokens: TokenSource) -> tuple[TrainState, Checkpoint | None]:
    """Return the state to continue from, with its checkpoint.

    Args:
        config: the run.
        tokens: tokens to train on.

    Returns:
        The state of the newest complete checkpoint in `config.out` with that checkpoint; for a new
        run, a new state with the checkpoint that `config.source` names, or None.

    Raises:
        UserError: `out` holds something else, or a run that this config cannot resume.
    """
    out = Path(config.out)
    not_empty = out.is_dir() and any(
        not is_stale_temporary(path, RECORDS) for path in out.iterdir()
    )
    if config.resume == "never" and not_empty:
        raise UserError(
            f"out={out} must be empty with resume=never. Choose another out=, or set resume=auto "
            "to resume the run."
        )
    found = newest_checkpoint(out)
    if found is not None:
        state = check_same_run(config, tokens.fingerprint, found)
        return state, found
    if not_empty and not _is_run(out):
        raise UserError(f"out={out} holds files that are not a run. Choose another out=.")
    state = TrainState(tokens.fingerprint)
    if not config.source:
        return state, None
    source = _load_source(config, tokens)
    state.source = source_cost(source)
    seen = source.train_state
    if seen is not None and seen.fingerprint == tokens.fingerprint:
        # Continue with data that the source has not seen, as between the stages of one run.
        batch_size = (source.run and source.run.batch_size) or config.batch_size
        state.next_batch = -(-seen.next_batch * batch_size // config.batch_size)
    return state, source


def source_cost(source: Checkpoint) -> SourceCost:
    """Return the record that a run keeps of its source; a growth outside a run keeps the cost."""
    state, origin = source.train_state, source.lineage_source()
    before = state.source if state else None
    tokens = before.tokens if before else 0
    flops = before.flops if before else 0
    if before is None and source.run and source.run.source:
        tokens = flops = None  # an older version did not record the cost of that run's own source
    return SourceCost(
        weights_sha256=origin.weights_sha256,
        step=origin.step,
        tokens=tokens + state.tokens if state and tokens is not None else None,
        flops=flops + state.flops if state and flops is not None else None,
    )


def resume_hint(out: Path) -> str:
    """Return a hint, a clause without a full stop, on how to resume the run in `out`."""
    complete = find_checkpoints(out)
    if not complete:
        return "the same command starts over, because no checkpoint is complete yet"
    return f"the same command resumes from {complete[-1]}"


def status_line(config: TrainConfig, state: TrainState) -> str:
    """Return one line with the position of a run that has started."""
    stage = config.stages[state.stage]
    if len(state.stage_ends) == len(config.stages):
        return f"{config.out} is finished; there is nothing to train"
    if state.stage_ended:
        return f"{config.out} resumes after stage {stage.name}"
    return f"{config.out} resumes in stage {stage.name} at step {state.stage_step}/{stage.steps}"


def _is_run(out: Path) -> bool:
    """Return whether a directory without checkpoints is a run, by its recorded config."""
    try:
        return set(read_yaml(out / CONFIG_FILE)) >= {"out", "stages", "growth"}
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        return False


def _load_source(config: TrainConfig, tokens: TokenSource) -> Checkpoint:
    """Load the source of a run; check that it can be grown and has the same tokenizer."""
    path = config.source
    assert path is not None
    source = load_checkpoint(path)
    plan_growth(source.config, config.stages[0].model, config=config.growth)
    if source.tokenizer is not None and source.tokenizer != tokens.tokenizer().to_json():
        raise UserError(
            f"source={path} was trained with another tokenizer than that of the data. Make the "
            f"store with tokenizer=file tokenizer.file={source.folder}/tokenizer.json."
        )
    return source


def check_same_run(config: TrainConfig, fingerprint: str, checkpoint: Checkpoint) -> TrainState:
    """Check that a config can resume a checkpoint. Stages after the current one may change.

    Args:
        config: the run.
        fingerprint: fingerprint of its tokens.
        checkpoint: newest checkpoint in `config.out`.

    Returns:
        The state of the checkpoint.

    Raises:
        UserError: a key differs that would change the past; the message names the first one.
    """
    state, run = checkpoint.train_state, checkpoint.run
    if state is None or run is None or not state.in_run:
        raise UserError(
            f"{config.out} holds a checkpoint that no run wrote. Give it as source=, and choose "
            "another out=."
        )
    where = f"{config.out} holds a run ({checkpoint.folder and checkpoint.folder.name})"
    recorded, current = run.to_dict(), config.to_dict()
    passed = list(run.stages)[: state.stage + 1]
    if list(current["stages"])[: len(passed)] != passed:
        raise UserError(
            f"{where} with the stages {', '.join(passed)}. Start `stages` with these, or choose "
            "another out=."
        )
    fixed = [*FIXED_KEYS]
    if config.stages[state.stage].plateau is not None and not state.stage_ended:
        fixed += FIXED_PLATEAU_KEYS
    for keys in [*([key] for key in fixed), *(["stages", name] for name in passed)]:
        before, now = recorded, current
        for key in keys:
            before, now = before[key], now[key]
        for path, old, new in _differences(before, now, ".".join(keys)):
            raise UserError(
                f"{where} with another configuration: {path} must be {old!r}, got {new!r}. Restore "
                "it, or choose another out=."
            )
    _check_data(config, fingerprint, state, run, where)
    return state


def _check_data(
    config: TrainConfig, fingerprint: str, state: TrainState, run: RecordedRun, where: str
) -> None:
    """Refuse other tokens, and Megatron samples ordered for another number of epochs."""
    origins = (run.tokens_from, config.tokens_from)
    before, now = (origin and origin.data.get("epochs") for origin in origins)
    if before and now and before != now:
        raise UserError(
            f"{where} whose samples were ordered for another number of epochs: data.epochs must be "
            f"{before}, got {now}. Set data.epochs={before}; that order repeats after its last "
            "sample. Or choose another out=."
        )
    if state.fingerprint != fingerprint:
        raise UserError(
            f"{where} on other data: the fingerprint of its tokens is {state.fingerprint[:12]}, "
            f"got {fingerprint[:12]}. Give the same data and tokenizer, or choose another out=."
        )


def _differences(before: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, old, new) for every value that differs; a list equals a tuple."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}")
        return
    as_list = [list(v) if isinstance(v, tuple) else v for v in (before, now)]
    if as_list[0] != as_list[1]:
        yield path, before, now
