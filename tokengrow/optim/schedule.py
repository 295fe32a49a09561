"""The learning rate of every update of a stage."""

import math

from tokengrow.optim.config import OptimConfig


def learning_rate(config: OptimConfig, update: int, updates: int) -> float:
    """The rate of one update of a stage.

    `neox_cosine` is GPT-NeoX's schedule, with which the published models were trained. It counts
    the updates already done, so the first update has rate 0 and the last one not quite min_lr, and
    past its end the cosine rises again.

    Args:
        config: of the stage.
        update: 1 for the stage's first.
        updates: how many the stage has.
    """
    as_published = config.schedule == "neox_cosine"
    position = update - 1 if as_published else update
    if position <= config.warmup and config.warmup > 0:
        return config.lr * position / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        start, end = max(config.warmup, updates * (1 - config.decay_share)), updates
        progress = _progress(position, start, end)
        return config.lr if progress <= 0 else _between(config, 1 - min(progress, 1.0))
    end = updates if config.decay_steps is None else config.decay_steps
    progress = _progress(position, config.warmup, end)
    if not as_published:
        progress = min(progress, 1.0)
    return _between(config, (math.cos(math.pi * progress) + 1) / 2)


def _progress(position: float, start: float, end: float) -> float:
    """How far a decay is: 0 at its start, 1 at its end."""
    length = end - start
    return (position - start) / (length if length > 0 else 1)


def _between(config: OptimConfig, share: float) -> float:
    """The rate that lies this share of the way up from min_lr to lr."""
    return config.min_lr + (config.lr - config.min_lr) * share
