"""Log-likelihoods of continuations under a causal model, in batches.

A window is a context and its continuation. Windows of similar length go through the model together,
padded on the right. Under causal attention no position attends to the padding after it, so padding
changes no result. Windows that give the model the same ids share one row of a batch.

Shapes: `B` rows of a batch, `T` sequence, `D` width, `V` vocabulary, `M` scored tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.model.tokenformer import LanguageModel

PAD_ID = 0
"""Token id after the end of a row; any id gives the same results."""

MAX_BATCH_TOKENS = {"cpu": 2048, "cuda": 32768}
"""Device type to the maximum tokens of an automatic batch; larger batches are not faster."""

MAX_MEMORY_FRACTION = 0.8
"""Fraction of a GPU's free memory for an automatic batch.

The rest is for the logits of `LOGITS_CHUNK` positions.
"""

LOGITS_CHUNK = 1024
"""Positions whose float32 log-probabilities, [positions, V], are held at once."""


@dataclass(frozen=True)
class Window:
    """Continuation to score, with its context."""

    context: Sequence[int]
    """Ids before the continuation, at least one; truncated on the left if the model needs it."""
    continuation: Sequence[int]
    """Ids to score: at least one, and at most the model's context length."""


@dataclass(frozen=True)
class WindowScore:
    """Log-likelihood of the continuation of a window."""

    log_probabilities: tuple[float, ...]
    """Log-probability of each token of the continuation, in nats."""
    log_likelihood: float
    """Sum of the log-probabilities, in float64."""
    greedy: bool
    """Whether each token is the most likely one at its position."""


@dataclass(frozen=True)
class _Row:
    """One row of a batch, with the continuations to score in it."""

    ids: tuple[int, ...]
    """Input ids of the model."""
    targets: list[tuple[int, tuple[int, ...]]]
    """(index of a window, its continuation); the last token of the latter is not in `ids`."""


def parse_batch_size(text: str) -> int | None:
    """Parse the rows per batch; return None for `auto`.

    Raises:
        UserError: the text is neither a number above 0 nor auto.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"batch_size must be auto or a number above 0, got {text!r}.")
    return int(text)


class Scorer:
    """Scorer of windows with one model.

    Args:
        model: model in eval mode, on the device of the computation.
        batch_size: rows per batch; None: chosen from the memory of the device.
        autocast: context manager around each call of the model, such as Fabric's `autocast`.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.batch_size, self.autocast = model, batch_size, autocast
        self.device = next(model.parameters()).device
        self._batch_tokens: int | None = None

    @torch.no_grad()
    def score(
        self,
        windows: Sequence[Window],
        on_score: Callable[[int, WindowScore], None] | None = None,
    ) -> list[WindowScore]:
        """Score windows, the longest first.

        A batch that does not fit into the memory of the device is halved until it fits. Later
        batches keep the smaller size.

        Args:
            windows: windows in any order.
            on_score: called with the index and the score of each window as soon as it is known.

        Returns:
            One score per window, in the order of `windows`.

        Raises:
            ValueError: a window has no context or no continuation, or its continuation is longer
                than the model's context length.
        """
        scores: dict[int, WindowScore] = {}
        rows, start = self._build_rows(windows), 0
        while start < len(rows):
            batch = rows[start : start + self._batch_rows(len(rows[start].ids))]
            try:
                batch_scores = self._score_batch(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                if self.batch_size is not None:
                    self.batch_size = len(batch) // 2
                else:
                    self._batch_tokens = len(batch) // 2 * len(batch[0].ids)
                continue
            start += len(batch)
            for index, score in batch_scores:
                scores[index] = score
                if on_score is not None:
                    on_score(index, score)
        return [scores[index] for index in range(len(windows))]

    def _build_rows(self, windows: Sequence[Window]) -> list[_Row]:
        """Return the distinct inputs of the model, the longest first."""
        max_length = self.model.config.context_length
        rows: dict[tuple[int, ...], _Row] = {}
        for index, window in enumerate(windows):
            context, continuation = tuple(window.context), tuple(window.continuation)
            if not context or not continuation:
                raise ValueError(f"window {index} has no context or no continuation")
            if len(continuation) > max_length:
                raise ValueError(
                    f"window {index}: the continuation must have at most {max_length} tokens (the "
                    f"context length), got {len(continuation)}"
                )
            # The last token is a target only: its own logits are not needed.
            ids = (context + continuation)[-max_length - 1 : -1]
            rows.setdefault(ids, _Row(ids, [])).targets.append((index, continuation))
        return sorted(rows.values(), key=lambda row: -len(row.ids))

    def _score_batch(self, batch: Sequence[_Row]) -> list[tuple[int, WindowScore]]:
        """Return (index, score) of each window of a batch."""
        ids = torch.full((len(batch), len(batch[0].ids)), PAD_ID)  # [B, T]
        for row, source in zip(ids, batch, strict=True):
            row[: len(source.ids)] = torch.tensor(source.ids)
        with self.autocast():
            hidden_states = self.model.hidden_states(ids.to(self.device))  # [B, T, D]
        targets = [target for row in batch for target in row.targets]
        lengths = [len(continuation) for _, continuation in targets]
        log_probabilities, greedy = self._target_scores(hidden_states, _target_positions(batch))
        return [
            (index, WindowScore(tuple(logs.tolist()), logs.double().sum().item(), bool(best.all())))
            for (index, _), logs, best in zip(
                targets,
                torch.split(log_probabilities, lengths),
                torch.split(greedy, lengths),
                strict=True,
            )
        ]

    def _target_scores(self, hidden_states: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the log-probability of each target, and whether it is the most likely token.

        Args:
            hidden_states: [B, T, D].
            positions: [3, M], from `_target_positions`.

        Returns:
            [M] float32, or float64 for a float64 model, and [M] bool, both on the CPU.
        """
        log_probabilities, greedy = [], []
        chunks = torch.split(positions.to(self.device), LOGITS_CHUNK, dim=1)
        with self.autocast():  # around all chunks, so that the weights of the head are cast once
            for rows, columns, targets in chunks:
                logits = self.model.logits(hidden_states[rows, columns])  # [M, V]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                greedy.append(logits.argmax(dim=-1) == targets)
                of_targets = logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0]
                log_probabilities.append(of_targets)
        return torch.cat(log_probabilities).cpu(), torch.cat(greedy).cpu()

    def _batch_rows(self, length: int) -> int:
        """Return the rows of a batch whose longest row has `length` ids."""
        if self.batch_size is not None:
            return self.batch_size
        if self._batch_tokens is None:
            self._batch_tokens = self._measure_batch_tokens(length)
        return max(1, self._batch_tokens // length)

    def _measure_batch_tokens(self, length: int) -> int:
        """Return the tokens per batch, from the GPU memory that one row of `length` ids takes."""
        max_tokens = MAX_BATCH_TOKENS[self.device.type]
        if self.device.type != "cuda":
            return max_tokens
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with self.autocast():
            self.model.hidden_states(torch.full((1, length), PAD_ID, device=self.device))
        peak = torch.cuda.max_memory_allocated(self.device) - before
        unused = torch.cuda.memory_reserved(self.device) - before  # cached by torch, in no tensor
        free = torch.cuda.mem_get_info(self.device)[0] + unused
        return min(max_tokens, int(MAX_MEMORY_FRACTION * free / (peak / length)))


def _target_positions(batch: Sequence[_Row]) -> Tensor:
    """Return row, column and id of each target of a batch: [3, M] int64."""
    parts = []
    for number, row in enumerate(batch):
        for _, continuation in row.targets:
            columns = torch.arange(len(row.ids) - len(continuation), len(row.ids))
            rows = torch.full_like(columns, number)
            parts.append(torch.stack([rows, columns, torch.tensor(continuation)]))
    return torch.cat(parts, dim=1)
