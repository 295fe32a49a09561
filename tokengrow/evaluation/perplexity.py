"""Perplexity of text: windows of documents, sums over them, and ratios of the sums.

Every document is measured separately: its n tokens have the positions 1 to n, and the end-of-text
token that starts a document has position 0. `docs/evaluating.md` defines all figures.

Shapes: `T` context length, `S` stride.
"""

import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from tokengrow.console.format import empty_table
from tokengrow.console.progress import status_progress
from tokengrow.data.corpus import Split, Text, first_bytes
from tokengrow.data.store_writer import CHARACTERS_PER_BATCH, batch_documents
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.distributed.collectives import all_gather_object, rank, world_size
from tokengrow.errors import UserError
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.rolling_windows import rolling_windows
from tokengrow.evaluation.scoring import Scorer, Window, WindowScore

TOKENS_PER_CHUNK = 2**17
"""Tokens of the windows that a rank scores at once: little memory for ids, and many batches."""

REQUEST_KIND = "window"
"""Kind of a window among the requests of the response cache."""

SPLITS: dict[str, tuple[Split, ...]] = {
    "validation": ("validation",),
    "train": ("train",),
    "all": ("train", "validation"),
}
"""Value of `perplexity.split` to the splits of a text that it selects."""


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """Settings of a perplexity measurement."""

    split: Literal["validation", "train", "all"] = "validation"
    """Documents of the data to measure: held out, trained on, or all."""
    stride: int | None = None
    """New tokens predicted per window, at most T; null: T, so that each token is read once."""
    max_bytes: int | None = None
    """Maximum bytes of text in UTF-8; the document that exceeds it is truncated. null: no limit."""

    def __post_init__(self) -> None:
        for key in ("stride", "max_bytes"):
            if (number := getattr(self, key)) is not None and number < 1:
                raise UserError(f"perplexity.{key} must be at least 1, got {number}.")


def count_words(text: str) -> int:
    """Count the pieces between runs of white space, as the lm-evaluation-harness does.

    White space at the start or the end of the text adds one empty piece each.
    """
    return len(re.split(r"\s+", text))


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Result of a measurement: sums over all documents, and ratios of these sums."""

    documents: int
    """Number of documents that are not empty."""
    bytes: int
    """Bytes of the text in UTF-8, without end-of-text tokens."""
    words: int
    """Words of the text, from `count_words`."""
    text_sha256: str
    """SHA-256 of the documents, each as its length in bytes, a newline and its bytes."""
    tokens: int
    """Predicted tokens: those of the documents, without end-of-text tokens."""
    nats: float
    """Negative log-likelihood of all tokens."""
    context_length: int
    """Maximum tokens that a window reads."""
    stride: int
    """Maximum tokens that a window predicts, except the first window of a document."""

    @property
    def loss(self) -> float:
        """Loss in nats per token: `nats / tokens`."""
        return self.nats / self.tokens

    @property
    def token_perplexity(self) -> float:
        """Perplexity per token: `exp(nats / tokens)`."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte, `nats / ln 2 / bytes`; comparable between models of any tokenizer."""
        return self.nats / math.log(2) / self.bytes

    @property
    def byte_perplexity(self) -> float:
        """Perplexity per byte: `exp(nats / bytes)`."""
        return _exp(self.nats / self.bytes)

    @property
    def word_perplexity(self) -> float:
        """Perplexity per word, `exp(nats / words)`; comparable between models of any tokenizer.

        It is infinite above 1.8e308.
        """
        return _exp(self.nats / self.words)

    def to_dict(self) -> dict[str, int | float | str | None]:
        """Return the sums and the ratios as JSON values; None replaces an infinite one or NaN."""
        names = ("loss", "token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
        values = asdict(self) | {name: getattr(self, name) for name in names}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Perplexity":
        """Build a perplexity from the output of `to_dict`."""
        sums = {item.name: values[item.name] for item in fields(cls)}
        return cls(**sums | {"nats": math.nan if sums["nats"] is None else sums["nats"]})


def select_documents(
    text: Text, config: PerplexityConfig, limit: int | None = None
) -> Iterator[str]:
    """Return the documents to measure, up to the first limit reached: documents or bytes.

    Args:
        text: text with its splits.
        config: split to measure, and maximum bytes.
        limit: maximum number of documents.

    Raises:
        UserError: there is no document.
    """
    documents = chain.from_iterable(text.documents(split) for split in SPLITS[config.split])
    first = next(documents, None)
    if first is not None:
        # The last document is truncated, and may be empty.
        limited = islice(chain([first], documents), limit)
        return filter(None, first_bytes(limited, config.max_bytes))
    if config.split == "validation":
        raise UserError(
            "data must have a document in its validation split, got none. Set "
            "perplexity.split=all, or raise data.validation_fraction."
        )
    files = [str(file) for file, *_ in text.identity().get("files", [])]
    place = f" in {', '.join(files[:3])}" + ", ..." * (len(files) > 3) if files else ""
    raise UserError(f"data must have at least one document, got none{place}. Check data.")


def measure_perplexity(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    scorer: Scorer,
    stride: int | None = None,
    *,
    responses: ResponseCache | None = None,
    console: Console | None = None,
) -> Perplexity:
    """Measure the perplexity of documents, which are read and released one after another.

    All ranks read the same documents, each scores its share of the windows, and all return the same
    result.

    Args:
        documents: documents, none of them empty.
        tokenizer: tokenizer of the model.
        scorer: scorer with the model.
        stride: S, at most the model's context length T; None: T.
        responses: cache of windows scored by earlier sessions; None stores nothing.
        console: receives the perplexity so far, tokens and tokens/s; None shows nothing.

    Raises:
        UserError: the stride exceeds T, which would leave tokens out, or there are no tokens.
    """
    context_length = scorer.model.config.context_length
    if stride is not None and stride > context_length:
        raise UserError(
            f"perplexity.stride must be at most {context_length}, the model's context_length, got "
            f"{stride}."
        )
    run = _Measurement(tokenizer, context_length, stride or context_length)
    cache = responses or ResponseCache()
    with status_progress(console or Console(quiet=True), "perplexity: reading the text") as write:

        def on_score(windows: Sequence[Window], index: int, score: WindowScore) -> None:
            window = windows[index]
            cache.add(REQUEST_KIND, (window.context, window.continuation), score.log_likelihood)
            run.add(window, score.log_likelihood, from_cache=False)
            run.show_share(write)

        chunks = _chunks(run.windows(documents), TOKENS_PER_CHUNK * world_size())
        for chunk in chunks:
            new = run.add_cached(chunk[rank() :: world_size()], cache)
            run.show_share(write)
            run.start_clock()  # after the lookups: cached windows take no time
            scorer.score(new, partial(on_score, new))
        result = run.result()
        run.show(write, result.loss, result.tokens)
    return result


class _Measurement:
    """State of a running measurement on one rank.

    Attributes:
        documents: documents read so far; `bytes`, `words` and `tokens` are their sizes.
        scored: tokens whose log-likelihood this rank has.
        computed: scored tokens that did not come from the cache.
        nats: negative log-likelihood of the scored tokens.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, stride: int) -> None:
        self.documents = self.bytes = self.words = self.tokens = self.scored = self.computed = 0
        self.nats = 0.0
        self._started = 0.0
        self._digest = sha256()
        self._tokenizer = tokenizer
        self._context_length, self._stride = context_length, stride

    def windows(self, documents: Iterable[str]) -> Iterator[Window]:
        """Yield the windows of documents, and count what is read."""
        for texts, _ in batch_documents(((t, None) for t in documents), CHARACTERS_PER_BATCH):
            for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
                content = text.encode()
                self.documents += 1
                self.bytes += len(content)
                self._digest.update(b"%d\n%b" % (len(content), content))
                self.words += count_words(text)
                self.tokens += len(ids)
                positions = [self._tokenizer.end_of_text, *ids]
                yield from rolling_windows(positions, self._context_length, self._stride)

    def add_cached(self, windows: Sequence[Window], cache: ResponseCache) -> list[Window]:
        """Count the windows that the cache holds, and return the others."""
        new = []
        for window in windows:
            log_likelihood = cache.get(REQUEST_KIND, (window.context, window.continuation))
            if log_likelihood is None:
                new.append(window)
            else:
                self.add(window, log_likelihood, from_cache=True)
        return new

    def add(self, window: Window, log_likelihood: float, from_cache: bool) -> None:
        """Count the tokens of a window and their log-likelihood."""
        self.scored += len(window.continuation)
        self.computed += 0 if from_cache else len(window.continuation)
        self.nats -= log_likelihood

    def start_clock(self) -> None:
        """Start the time from which tokens/s is computed, once."""
        self._started = self._started or time.monotonic()

    def show(self, write: Callable[[str], None], loss: float, scored: int) -> None:
        """Write a progress line.

        Args:
            write: receives the line.
            loss: nats per token.
            scored: tokens that all ranks have scored.
        """
        line = f"perplexity {_format_number(_exp(loss))}, {scored:,} tokens"
        if cached := self.scored - self.computed:
            line += f", {cached * world_size():,} of them from the cache"
        if self.computed:
            seconds = max(time.monotonic() - self._started, 1e-9)
            line += f", {self.computed / seconds:,.0f} tokens/s"
        write(line)

    def show_share(self, write: Callable[[str], None]) -> None:
        """Write a progress line estimated from the windows of this rank."""
        if self.scored:
            total = min(self.scored * world_size(), self.tokens)
            self.show(write, self.nats / self.scored, total)

    def result(self) -> Perplexity:
        """Return the sums over all ranks."""
        parts = all_gather_object((self.scored, self.nats))
        assert sum(scored for scored, _ in parts) == self.tokens
        if not self.tokens:
            raise UserError(
                "data must have at least one token, got none. Check data and the tokenizer of "
                "source."
            )
        return Perplexity(
            documents=self.documents,
            bytes=self.bytes,
            words=self.words,
            text_sha256=self._digest.hexdigest(),
            tokens=self.tokens,
            nats=sum(nats for _, nats in parts),
            context_length=self._context_length,
            stride=self._stride,
        )


def _chunks(windows: Iterable[Window], tokens: int) -> Iterator[list[Window]]:
    """Yield lists of windows, each with at least `tokens` tokens except the last."""
    chunk: list[Window] = []
    size = 0
    for window in windows:
        chunk.append(window)
        size += len(window.context) + len(window.continuation)
        if size >= tokens:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def perplexity_table(result: Perplexity) -> Table:
    """Build a table with one row per ratio."""
    rows = empty_table("Perplexity", "measure", ("value",))
    rows.add_row("loss (nats per token)", f"{result.loss:.5f}")
    rows.add_row("token perplexity", _format_number(result.token_perplexity))
    rows.add_row("bits per byte", f"{result.bits_per_byte:.5f}")
    rows.add_row("word perplexity", _format_number(result.word_perplexity))
    return rows


def perplexity_caption(result: Perplexity) -> str:
    """Return two lines on the measured text and its windows, to print below the table."""
    documents = f"{result.documents:,} document{'s' * (result.documents != 1)}"
    return (
        f"{documents}: {result.bytes:,} bytes, {result.words:,} words, {result.tokens:,} tokens\n"
        f"windows of {result.context_length:,} tokens, {result.stride:,} of them new"
    )


def _format_number(number: float) -> str:
    return f"{number:,.6g}"


def _exp(nats: float) -> float:
    """Return e to the power of `nats`, infinite if it exceeds the largest float."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
