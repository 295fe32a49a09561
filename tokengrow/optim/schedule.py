"""Learning rate of every update of a stage."""

import math

from tokengrow.optim.config import OptimConfig


def learning_rate(config: OptimConfig, update: int, updates: int) -> float:
    """Return the learning rate of one update of a stage.

    `neox_cosine` is the schedule of GPT-NeoX, with which the published models were trained. It
    counts the updates already done. The first update therefore has rate 0, the last one is slightly
    above min_lr, and after its end the cosine rises again.

    Args:
        config: settings of the stage.
        update: number of the update in the stage, from 1.
        updates: number of updates in the stage.
    """
    as_published = config.schedule == "neox_cosine"
    position = update - 1 if as_published else update
    if position <= config.warmup and config.warmup > 0:
        return config.lr * position / config.warmup
    if config.schedule == "constant":
        return config.lr
    if config.schedule == "wsd":
        start, end = max(config.warmup, updates * (1 - config.decay_share)), updates
        progress = _decay_progress(position, start, end)
        return config.lr if progress <= 0 else _interpolate(config, 1 - min(progress, 1.0))
    end = updates if config.decay_steps is None else config.decay_steps
    progress = _decay_progress(position, config.warmup, end)
    if not as_published:
        progress = min(progress, 1.0)
    return _interpolate(config, (math.cos(math.pi * progress) + 1) / 2)


def _decay_progress(position: float, start: float, end: float) -> float:
    """Return the progress of a decay: 0 at its start, 1 at its end."""
    length = end - start
    return (position - start) / (length if length > 0 else 1)


def _interpolate(config: OptimConfig, share: float) -> float:
    """Return the rate between min_lr (share 0) and lr (share 1)."""
    return config.min_lr + (config.lr - config.min_lr) * share
