"""Windows that together score every token of a text once, however long it is.

Shapes: `T` context length, `S` stride.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokengrow.evaluation.scoring import Window


class Span(NamedTuple):
    """Where in a document a window lies: the model reads positions `start` to `last` - 1."""

    start: int
    """Position of the first token that is read."""
    first: int
    """Position of the first token that is predicted here, from `start` to `first` - 1."""
    last: int
    """Position of the last token that is predicted."""


def rolling_spans(tokens: int, context_length: int, stride: int) -> Iterator[Span]:
    """The windows that together predict every token of a document once.

    The first window predicts the first T tokens, each later one the next S, or those that are left.
    A later one reads the T positions in front of the last that it predicts: so each of its tokens
    has at least T - S + 1 in front of it.

    Args:
        tokens: of the document, n.
        context_length: T.
        stride: S, from 1 to T.
    """
    done = 0
    while done < tokens:
        last = min(done + (stride if done else context_length), tokens)
        yield Span(max(0, last - context_length), done + 1, last)
        done = last


def rolling_windows(ids: Sequence[int], context_length: int, stride: int) -> Iterator[Window]:
    """Windows of all ids but the first, in front of which nothing stands.

    Args:
        ids: of a text, at positions 0 to n.
        context_length: T.
        stride: S, from 1 to T.
    """
    for start, first, last in rolling_spans(len(ids) - 1, context_length, stride):
        yield Window(ids[start:first], ids[first : last + 1])
