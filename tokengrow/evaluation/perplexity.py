"""Perplexity of text: which tokens are predicted from which, and what is made of the sum.

Every document is measured by itself: its n tokens stand at positions 1 to n, the end-of-text token
that starts a document at position 0. `docs/evaluating.md` has the definitions in full.

Shapes: `T` context length, `S` stride.
"""

import math
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from typing import Any

from rich.console import Console
from rich.table import Table

from tokengrow.console.format import table
from tokengrow.console.progress import doing
from tokengrow.data.corpus import Split, Text
from tokengrow.data.store_writer import BATCH_CHARACTERS, batches
from tokengrow.data.tokenizer import Tokenizer
from tokengrow.distributed.collectives import all_gather_object, rank, world_size
from tokengrow.errors import UserError
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.rolling_windows import rolling_windows
from tokengrow.evaluation.scoring import Scorer, Window, WindowScore

TOKENS_AT_ONCE = 2**17
"""Read by the windows that a rank scores at once: memory for ids, and many batches."""

KIND = "window"
"""What windows are called among the answers that are kept."""

SPLITS: dict[str, tuple[Split, ...]] = {
    "validation": ("validation",),
    "train": ("train",),
    "all": ("train", "validation"),
}
"""What `perplexity.split` may say, and the splits of a text that it names."""


@dataclass(frozen=True, kw_only=True)
class PerplexityConfig:
    """How the perplexity of text is measured."""

    split: str = "validation"
    """Documents of the data to measure: those held out, those trained on, or all."""
    stride: int | None = None
    """New tokens that a window predicts, T at most; null: T, so that each token is read once."""
    max_bytes: int | None = None
    """Of text, UTF-8; the document that goes beyond is cut there. null: all of it."""

    def __post_init__(self) -> None:
        if self.split not in SPLITS:
            raise UserError(f"perplexity.split {self.split!r}: valid are {', '.join(SPLITS)}")
        for key in ("stride", "max_bytes"):
            if (number := getattr(self, key)) is not None and number < 1:
                raise UserError(f"perplexity.{key} must be at least 1, not {number}")


def count_words(text: str) -> int:
    """The pieces between runs of white space, as the lm-evaluation-harness counts them: white space
    at the start or the end of a text parts an empty piece, which counts too."""
    return len(re.split(r"\s+", text))


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What a model makes of some text: sums over all documents, and ratios of the sums."""

    documents: int
    """With text in them."""
    bytes: int
    """Of the text in UTF-8, end-of-text tokens not included."""
    words: int
    """By `count_words`."""
    text_sha256: str
    """Of the documents, each as its length in bytes, a newline and its bytes."""
    tokens: int
    """Predicted: those of the documents, end-of-text tokens not included."""
    nats: float
    """Negative log-likelihood of all tokens."""
    context_length: int
    """The most tokens that a window reads."""
    stride: int
    """The most tokens that a window predicts, a document's first one apart."""

    @property
    def loss(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def token_perplexity(self) -> float:
        """`exp(nats / tokens)`."""
        return _exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        """`nats / ln 2 / bytes`: comparable between models of different tokenizers."""
        return self.nats / math.log(2) / self.bytes

    @property
    def byte_perplexity(self) -> float:
        """`exp(nats / bytes)`."""
        return _exp(self.nats / self.bytes)

    @property
    def word_perplexity(self) -> float:
        """`exp(nats / words)`; comparable as bits per byte are. Infinite beyond 1.8e308."""
        return _exp(self.nats / self.words)

    def to_dict(self) -> dict[str, Any]:
        """The sums and the ratios, as JSON values; what is no finite number is null."""
        names = ("loss", "token_perplexity", "bits_per_byte", "byte_perplexity", "word_perplexity")
        values = asdict(self) | {name: getattr(self, name) for name in names}
        return {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Perplexity":
        """What `to_dict` wrote."""
        sums = {item.name: values[item.name] for item in fields(cls)}
        return cls(**sums | {"nats": math.nan if sums["nats"] is None else sums["nats"]})


def select_documents(
    text: Text, config: PerplexityConfig, limit: int | None = None
) -> Iterator[str]:
    """The documents to measure, up to a number of them, or of bytes, whichever comes first.

    Args:
        text: where they come from.
        config: which of its splits, and the most bytes.
        limit: the most documents.

    Raises:
        UserError: there is none.
    """
    found = chain.from_iterable(text.documents(split) for split in SPLITS[config.split])
    first = next(found, None)
    if first is not None:
        return _first_bytes(islice(chain([first], found), limit), config.max_bytes)
    if config.split == "validation":
        raise UserError(
            "data: its validation split has no document: set perplexity.split=all, or raise "
            "data.validation_fraction"
        )
    named = [str(file) for file, *_ in text.identity().get("files", [])]
    where = ", ".join(named[:3]) + ", ..." * (len(named) > 3)
    raise UserError(f"data: there is no document in {where or 'it'}: check data")


def _first_bytes(documents: Iterable[str], most: int | None) -> Iterator[str]:
    """The documents up to a number of bytes, the last one cut at the end of a character."""
    left = math.inf if most is None else most
    for document in documents:
        content = document.encode()
        part = document if len(content) <= left else content[: int(left)].decode(errors="ignore")
        if part:
            yield part
        left -= len(content)
        if left <= 0:
            return


def measure_perplexity(
    documents: Iterable[str],
    tokenizer: Tokenizer,
    scorer: Scorer,
    stride: int | None = None,
    *,
    responses: ResponseCache | None = None,
    console: Console | None = None,
) -> Perplexity:
    """Measures a model on documents, which are read and forgotten one after another.

    With several ranks all read the same documents, each scores its share of the windows, and all
    give the same result.

    Args:
        documents: none of them empty.
        tokenizer: the model's.
        scorer: with the model.
        stride: S, at most the model's context length T; None: T.
        responses: the windows that are known already, and where those scored are kept.
        console: where the perplexity so far, tokens and tokens/s are shown; by default nowhere.

    Raises:
        UserError: a stride beyond T, which would leave tokens out, or no tokens.
    """
    context_length = scorer.model.config.context_length
    if stride is not None and stride > context_length:
        raise UserError(
            f"perplexity.stride is {stride}, more than the model's context_length of "
            f"{context_length}: give {context_length} at most"
        )
    run = _Run(tokenizer, context_length, stride or context_length)
    mine, kept = slice(rank(), None, world_size()), responses or ResponseCache()
    begun = 0.0
    with doing(console or Console(quiet=True), "perplexity: reading the text") as say:

        def show(loss: float, scored: int) -> None:
            told = f"perplexity {_digits(_exp(loss))}, {scored:,} tokens"
            if known := run.scored - run.asked:
                told += f", {known * world_size():,} of them known from before"
            if run.asked:
                told += f", {run.asked / max(time.monotonic() - begun, 1e-9):,.0f} tokens/s"
            say(told)

        def show_share() -> None:
            if run.scored:
                show(run.nats / run.scored, min(run.scored * world_size(), run.tokens))

        def done(windows: Sequence[Window], index: int, scored: WindowScore) -> None:
            window = windows[index]
            kept.add(KIND, (window.context, window.continuation), scored.log_likelihood)
            run.asked += len(window.continuation)
            run.add(window, scored.log_likelihood)
            show_share()

        for chunk in _chunks(run.windows(documents), TOKENS_AT_ONCE * world_size()):
            new = run.without_known(chunk[mine], kept)
            show_share()
            begun = begun or time.monotonic()  # what is known takes no time
            scorer.score(new, partial(done, new))
        found = run.result()
        show(found.loss, found.tokens)
    return found


class _Run:
    """A measurement as it goes on.

    Attributes:
        documents: read so far, as are `bytes`, `words` and `tokens`.
        scored: tokens whose log-likelihood this rank has.
        asked: those of them that were not known from before.
        nats: what they sum up to.
    """

    def __init__(self, tokenizer: Tokenizer, context_length: int, stride: int) -> None:
        self.documents = self.bytes = self.words = self.tokens = self.scored = self.asked = 0
        self.nats = 0.0
        self._digest = sha256()
        self._tokenizer = tokenizer
        self._context_length, self._stride = context_length, stride

    def windows(self, documents: Iterable[str]) -> Iterator[Window]:
        """What is to be scored, counting what is read."""
        for texts, _ in batches(((text, None) for text in documents), BATCH_CHARACTERS):
            for text, ids in zip(texts, self._tokenizer.encode_batch(texts), strict=True):
                content = text.encode()
                self.documents += 1
                self.bytes += len(content)
                self._digest.update(b"%d\n%b" % (len(content), content))
                self.words += count_words(text)
                self.tokens += len(ids)
                at = [self._tokenizer.end_of_text, *ids]
                yield from rolling_windows(at, self._context_length, self._stride)

    def without_known(self, windows: Sequence[Window], responses: ResponseCache) -> list[Window]:
        """Those that are not known yet; the others are counted."""
        new = []
        for window in windows:
            known = responses.get(KIND, (window.context, window.continuation))
            if known is None:
                new.append(window)
            else:
                self.add(window, known)
        return new

    def add(self, window: Window, log_likelihood: float) -> None:
        """Counts the tokens of a window."""
        self.scored += len(window.continuation)
        self.nats -= log_likelihood

    def result(self) -> Perplexity:
        """The sums, those of all ranks together."""
        parts = all_gather_object((self.scored, self.nats))
        assert sum(scored for scored, _ in parts) == self.tokens
        if not self.tokens:
            raise UserError("data: the text has no tokens: check data and the source's tokenizer")
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
    """Lists of windows that together hold so many tokens, or a few more."""
    chunk: list[Window] = []
    held = 0
    for window in windows:
        chunk.append(window)
        held += len(window.context) + len(window.continuation)
        if held >= tokens:
            yield chunk
            chunk, held = [], 0
    if chunk:
        yield chunk


def perplexity_table(found: Perplexity) -> Table:
    """The ratios, a row for each."""
    rows = table("Perplexity", "measure", ("value",))
    for name, value in (
        ("loss (nats per token)", f"{found.loss:.5f}"),
        ("token perplexity", _digits(found.token_perplexity)),
        ("bits per byte", f"{found.bits_per_byte:.5f}"),
        ("word perplexity", _digits(found.word_perplexity)),
    ):
        rows.add_row(name, value)
    return rows


def perplexity_caption(found: Perplexity) -> str:
    """What was measured, and how: two lines for under the table."""
    documents = f"{found.documents:,} document{'s' * (found.documents != 1)}"
    return (
        f"{documents}: {found.bytes:,} bytes, {found.words:,} words, {found.tokens:,} tokens\n"
        f"windows of {found.context_length:,} tokens, {found.stride:,} of them new"
    )


def _digits(number: float) -> str:
    return f"{number:,.6g}"


def _exp(nats: float) -> float:
    """e to the power of nats; infinite where no float is large enough."""
    try:
        return math.exp(nats)
    except OverflowError:
        return math.inf
