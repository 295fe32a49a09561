"""Where a run starts: at initial weights, at another run's checkpoint, or where it was left."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from tokengrow.checkpoint.layout import RUN_CONFIG, SESSIONS, find_checkpoints
from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, newest_checkpoint
from tokengrow.data.sequences import TokenSource
from tokengrow.errors import UserError
from tokengrow.files import is_stale_temporary, read_yaml
from tokengrow.growth.plan import plan_growth
from tokengrow.training.config import TrainConfig
from tokengrow.training.state import TrainState

CONFIG_FILE = RUN_CONFIG
RECORDS = (CONFIG_FILE, SESSIONS)
"""What a run writes of itself beside its checkpoints, each whole or not at all."""

SHAPES_THE_RESULT = ("seed", "batch_size", "source", "growth")
"""Top-level keys that a resumed run must share with its checkpoint, besides the stages passed."""

SHAPES_A_PLATEAU = ("validation_every", "validation_sequences")
"""Likewise, in the middle of a stage whose end depends on its validations."""


def find_start(config: TrainConfig, tokens: TokenSource) -> tuple[TrainState, Checkpoint | None]:
    """Where `config.out` stands, or a new run's state with the checkpoint that it starts from.

    Args:
        config: the run.
        tokens: what it trains on.

    Raises:
        UserError: `out` holds something else, or a run that this one cannot go on with.
    """
    out = Path(config.out)
    holds_something = out.is_dir() and any(
        not is_stale_temporary(path, RECORDS) for path in out.iterdir()
    )
    if config.resume == "never" and holds_something:
        raise UserError(
            f"out={out} is not empty: choose another out=, or resume=auto to go on there"
        )
    found = newest_checkpoint(out)
    if found is not None:
        check_same_run(config, tokens.fingerprint, found)
        return TrainState.from_dict(found.train_state), found
    if holds_something and not _is_run(out):
        raise UserError(f"out={out} holds something that is not a run: choose another out=")
    state = TrainState(tokens.fingerprint)
    if not config.source:
        return state, None
    source = _load_source(config, tokens)
    state.source = TrainState.source_of(source)
    if source.train_state.get("fingerprint") == tokens.fingerprint:
        # The data that the source has not seen comes next, as in the stages of one run.
        seen = source.train_state["next_batch"] * source.run.get("batch_size", config.batch_size)
        state.next_batch = -(-seen // config.batch_size)
    return state, source


def resume_hint(out: Path) -> str:
    """Return a hint, a clause without a full stop, on how to resume the run in `out`."""
    complete = find_checkpoints(out)
    if not complete:
        return "the same command starts over, because no checkpoint is complete yet"
    return f"the same command resumes from {complete[-1]}"


def _is_run(out: Path) -> bool:
    """Whether a folder without checkpoints is a run that has just begun: by its resolved recipe."""
    try:
        return set(read_yaml(out / CONFIG_FILE)) >= {"out", "stages", "growth"}
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        return False


def _load_source(config: TrainConfig, tokens: TokenSource) -> Checkpoint:
    """The checkpoint that a run starts from, if it can be grown and speaks the same tokens."""
    path = config.source
    assert path is not None
    source = load_checkpoint(path)
    plan_growth(source.config, config.stages[0].model, config=config.growth)
    if source.tokenizer is not None and source.tokenizer != tokens.tokenizer().to_json():
        raise UserError(
            f"source={path} was trained on the tokens of another tokenizer: make the "
            f"store with tokenizer=file tokenizer.file={source.folder}/tokenizer.json"
        )
    return source


def status_line(config: TrainConfig, state: TrainState) -> str:
    """One line on what is done and what comes next, for a run that has begun."""
    stage = config.stages[state.stage]
    if len(state.stage_ends) == len(config.stages):
        return f"{config.out} is finished: nothing to train"
    if state.stage_ended:
        return f"{config.out} goes on after stage {stage.name}, which is done"
    return f"{config.out} goes on from stage {stage.name}, step {state.stage_step}/{stage.steps}"


def check_same_run(config: TrainConfig, fingerprint: str, checkpoint: Checkpoint) -> None:
    """Refuses to go on with a checkpoint of another run, naming the first key that differs.

    Stages that lie ahead may change: a ladder can be given another rung.
    """
    if "rungs" not in checkpoint.train_state:
        raise UserError(
            f"{config.out} holds a checkpoint that no run wrote: give it as source=, and another "
            "folder as out="
        )
    state = TrainState.from_dict(checkpoint.train_state)
    where = f"{config.out} holds a run ({checkpoint.folder and checkpoint.folder.name})"
    there, here = checkpoint.run, config.to_dict()
    passed = list(there["stages"])[: state.stage + 1]
    if list(here["stages"])[: len(passed)] != passed:
        raise UserError(
            f"{where} whose stages so far are {', '.join(passed)}: give these first, then others, "
            "or choose another out="
        )
    shaping = list(SHAPES_THE_RESULT)
    if config.stages[state.stage].plateau is not None and not state.stage_ended:
        shaping += SHAPES_A_PLATEAU
    for keys in [*([key] for key in shaping), *(["stages", name] for name in passed)]:
        before, now = there, here
        for key in keys:
            before, now = before[key], now[key]
        for path, old, new in _differences(before, now, ".".join(keys)):
            raise UserError(
                f"{where} of another configuration ({path} was {old!r}, now {new!r}): "
                "set it back, or choose another out="
            )
    _check_data(config, fingerprint, checkpoint, where)


def _check_data(config: TrainConfig, fingerprint: str, checkpoint: Checkpoint, where: str) -> None:
    """Refuses other tokens, and an order of them that was made for another number of epochs."""
    there, here = checkpoint.run["tokens_from"], config.tokens_from
    before, now = (values.get("data", {}).get("epochs") for values in (there, here))
    if before and now and before != now:
        raise UserError(
            f"{where} whose order of samples was made for data.epochs={before}, and this one has "
            f"{now}: set data.epochs={before} to go on in that order, which begins again behind "
            "its last sample, or choose another out="
        )
    found = checkpoint.train_state["fingerprint"]
    if found != fingerprint:
        raise UserError(
            f"{where} on other data: its tokens were {found[:12]}, these are {fingerprint[:12]}; "
            "give the same data and tokenizer, or choose another out="
        )


def _differences(before: Any, now: Any, path: str) -> Iterator[tuple[str, Any, Any]]:
    """(dotted key, old, new) of every leaf that differs; lists and tuples are the same thing."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for key in {**before, **now}:
            yield from _differences(before.get(key), now.get(key), f"{path}.{key}")
        return
    as_list = [list(v) if isinstance(v, tuple) else v for v in (before, now)]
    if as_list[0] != as_list[1]:
        yield path, before, now
