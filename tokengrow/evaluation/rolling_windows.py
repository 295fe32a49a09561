"""Rolling windows that together score every token of a text exactly once.

Shapes: `T` context length, `S` stride.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokengrow.evaluation.scoring import Window


class Span(NamedTuple):
    """Positions of one window in a document: the model reads `start` to `last` - 1."""

    start: int
    """Position of the first token that is read."""
    first: int
    """Position of the first token that is predicted; `start` to `first` - 1 are context."""
    last: int
    """Position of the last token that is predicted."""


def rolling_spans(tokens: int, context_length: int, stride: int) -> Iterator[Span]:
    """Yield the spans that together predict every token of a document once.

    The first span predicts the first T tokens. Each later span predicts the next S tokens, or those
    that remain, and reads the T positions before the last one that it predicts. Each of its tokens
    therefore has at least T - S + 1 tokens of context.

    Args:
        tokens: number of tokens of the document.
        context_length: T.
        stride: S, from 1 to T.
    """
    done = 0
    while done < tokens:
        last = min(done + (stride if done else context_length), tokens)
        yield Span(max(0, last - context_length), done + 1, last)
        done = last


def rolling_windows(ids: Sequence[int], context_length: int, stride: int) -> Iterator[Window]:
    """Yield windows that score all ids except the first, which has no context.

    Args:
        ids: token ids of a text, at positions 0 to n.
        context_length: T.
        stride: S, from 1 to T.
    """
    for start, first, last in rolling_spans(len(ids) - 1, context_length, stride):
        yield Window(ids[start:first], ids[first : last + 1])
