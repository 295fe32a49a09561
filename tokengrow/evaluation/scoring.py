"""Log-likelihoods of continuations under a causal model, in batches.

A window is a context and what follows it. Windows of about the same length go through the model
together, padded on the right: under causal attention no position sees what stands behind it, so
padding changes nothing. Windows that give the model the same ids share one row of a batch.

Shapes: `B` rows of a batch, `T` sequence, `D` width, `V` vocabulary, `M` scored tokens.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrow.errors import UserError
from tokengrow.model.tokenformer import LanguageModel

PADDING = 0
"""The id behind a row's end. Any would do."""

TOKENS_AT_ONCE = {"cpu": 2048, "cuda": 32768}
"""Device to the most tokens of a batch of automatic size: more are no faster."""

SHARE_OF_MEMORY = 0.8
"""Of a GPU's free memory, what a batch of automatic size may take; the rest is for the logits of
`ROWS_AT_ONCE` places."""

ROWS_AT_ONCE = 1024
"""Positions whose float32 log-probabilities, [rows, V], are held at once."""


@dataclass(frozen=True)
class Window:
    """What is scored, and what it is scored after."""

    context: Sequence[int]
    """Ids before; at least one. Too many for the model are cut off on the left."""
    continuation: Sequence[int]
    """Ids that are scored; at least one, and no more than the model's context length."""


@dataclass(frozen=True)
class WindowScore:
    """How likely a window's continuation is."""

    log_probabilities: tuple[float, ...]
    """Of each of its tokens, in nats."""
    log_likelihood: float
    """Their sum, in float64."""
    greedy: bool
    """Whether each token is the likeliest at its place."""


@dataclass(frozen=True)
class _Row:
    """Ids that the model takes, and what is asked about them."""

    ids: tuple[int, ...]
    asked: list[tuple[int, tuple[int, ...]]]
    """Index of a window and its continuation, whose last token is not among `ids`."""


def parse_batch_size(text: str) -> int | None:
    """Rows of a batch, as a user writes them; None: `auto`.

    Raises:
        UserError: neither a number above 0 nor auto.
    """
    if text == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"batch_size must be auto or a number above 0, not {text!r}")
    return int(text)


class Scorer:
    """Scores windows with one model.

    Args:
        model: in eval mode, on the device on which it computes.
        batch_size: rows of a batch; None: as many as the device's memory suggests.
        autocast: the context in which the model is called, for example Fabric's `autocast`.
    """

    def __init__(
        self,
        model: LanguageModel,
        batch_size: int | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.model, self.batch_size, self.autocast = model, batch_size, autocast
        self.device = next(model.parameters()).device
        self._tokens_at_once: int | None = None

    @torch.no_grad()
    def score(
        self, windows: Sequence[Window], done: Callable[[int, WindowScore], None] | None = None
    ) -> list[WindowScore]:
        """Scores all windows.

        A batch that does not fit into the memory of the device is halved until it does, and so are
        those after it.

        Args:
            windows: in any order; the longest are scored first.
            done: called with a window's index and result as soon as it is there.

        Returns:
            A result for each window, in the order of `windows`.

        Raises:
            ValueError: a window without context or continuation, or with a continuation longer than
                the model's context length.
        """
        results: dict[int, WindowScore] = {}
        rows, begin = self._rows(windows), 0
        while begin < len(rows):
            batch = rows[begin : begin + self._batch_size(len(rows[begin].ids))]
            try:
                scored = self._score_batch(batch)
            except torch.OutOfMemoryError:
                if len(batch) == 1:
                    raise
                self._halve(batch)
                continue
            begin += len(batch)
            for index, result in scored:
                results[index] = result
                if done is not None:
                    done(index, result)
        return [results[index] for index in range(len(windows))]

    def _rows(self, windows: Sequence[Window]) -> list[_Row]:
        """What the model is called with, the longest first."""
        most = self.model.config.context_length
        rows: dict[tuple[int, ...], _Row] = {}
        for index, window in enumerate(windows):
            context, continuation = tuple(window.context), tuple(window.continuation)
            if not context or not continuation:
                raise ValueError(f"window {index} has no context, or no continuation")
            if len(continuation) > most:
                raise ValueError(
                    f"window {index}: a continuation of {len(continuation)} tokens, and a context "
                    f"length of {most}"
                )
            # The last token is only scored: nothing is asked about what follows it.
            ids = (context + continuation)[-most - 1 : -1]
            rows.setdefault(ids, _Row(ids, [])).asked.append((index, continuation))
        return sorted(rows.values(), key=lambda row: -len(row.ids))

    def _score_batch(self, batch: Sequence[_Row]) -> list[tuple[int, WindowScore]]:
        """(index, result) of the windows of a batch's rows."""
        ids = torch.full((len(batch), len(batch[0].ids)), PADDING)  # [B, T]
        for row, source in zip(ids, batch, strict=True):
            row[: len(source.ids)] = torch.tensor(source.ids)
        with self.autocast():
            hidden_states = self.model.hidden_states(ids.to(self.device))  # [B, T, D]
        windows = [asked for row in batch for asked in row.asked]
        lengths = [len(continuation) for _, continuation in windows]
        answers = self._look_up(hidden_states, _places(batch))
        found, likeliest = (each.split(lengths) for each in answers)
        return [
            (index, WindowScore(tuple(log.tolist()), log.double().sum().item(), bool(best.all())))
            for (index, _), log, best in zip(windows, found, likeliest, strict=True)
        ]

    def _look_up(self, hidden_states: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
        """The log-probability of each scored token, and whether it is the likeliest at its place.

        Args:
            hidden_states: [B, T, D].
            places: [3, M], as `_places` gives them.

        Returns:
            [M] float32, or float64 of a model in that, and [M] bool, on the CPU.
        """
        found, likeliest = [], []
        with self.autocast():  # around all: the head's weights are cast once
            for rows, columns, targets in places.to(self.device).split(ROWS_AT_ONCE, dim=1):
                logits = self.model.logits(hidden_states[rows, columns])  # [M, V]
                logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
                likeliest.append(logits.argmax(dim=-1) == targets)
                found.append(logits.log_softmax(dim=-1).gather(-1, targets[:, None])[:, 0])
        return torch.cat(found).cpu(), torch.cat(likeliest).cpu()

    def _batch_size(self, length: int) -> int:
        """Rows of a batch whose longest has so many ids."""
        if self.batch_size is not None:
            return self.batch_size
        if self._tokens_at_once is None:
            self._tokens_at_once = self._suggested_tokens(length)
        return max(1, self._tokens_at_once // length)

    def _suggested_tokens(self, length: int) -> int:
        """Tokens of a batch, by what one row of the longest takes of a GPU's memory."""
        most = TOKENS_AT_ONCE[self.device.type]
        if self.device.type != "cuda":
            return most
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        with self.autocast():
            self.model.hidden_states(torch.full((1, length), PADDING, device=self.device))
        peak = torch.cuda.max_memory_allocated(self.device) - before
        unused = torch.cuda.memory_reserved(self.device) - before  # held by torch, in no tensor
        free = torch.cuda.mem_get_info(self.device)[0] + unused
        return min(most, int(SHARE_OF_MEMORY * free / (peak / length)))

    def _halve(self, batch: Sequence[_Row]) -> None:
        if self.batch_size is not None:
            self.batch_size = len(batch) // 2
        else:
            self._tokens_at_once = len(batch) // 2 * len(batch[0].ids)


def _places(batch: Sequence[_Row]) -> Tensor:
    """Row, place in it and the token that does come next, of each scored token: [3, M] int64."""
    parts = []
    for number, row in enumerate(batch):
        for _, continuation in row.asked:
            places = torch.arange(len(row.ids) - len(continuation), len(row.ids))
            rows = torch.full_like(places, number)
            parts.append(torch.stack([rows, places, torch.tensor(continuation)]))
    return torch.cat(parts, dim=1)
