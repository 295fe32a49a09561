"""Rolling windows: spans of a document, compared with the windows of the lm-evaluation-harness."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from lm_eval.utils import get_rolling_token_windows

from tokengrow.evaluation.rolling_windows import rolling_spans


def test_last_disjoint_span_extends_back_to_full_length() -> None:
    assert [*rolling_spans(10, 4, 4)] == [(0, 1, 4), (4, 5, 8), (6, 9, 10)]


def test_spans_overlap_if_stride_is_below_context_length() -> None:
    assert [*rolling_spans(10, 4, 2)] == [(0, 1, 4), (2, 5, 6), (4, 7, 8), (6, 9, 10)]


def test_text_shorter_than_a_window_is_one_span() -> None:
    assert [*rolling_spans(3, 4, 2)] == [(0, 1, 3)]


def test_empty_text_has_no_spans() -> None:
    assert [*rolling_spans(0, 4, 2)] == []


@given(st.data())
def test_each_token_is_predicted_once_with_enough_context(data: st.DataObject) -> None:
    tokens, context_length = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 40))
    stride = data.draw(st.integers(1, context_length))
    spans = [*rolling_spans(tokens, context_length, stride)]
    assert [spans[0].first, spans[-1].last] == [1, tokens]
    assert all(after.first == before.last + 1 for before, after in pairwise(spans))
    assert all(0 <= span.start < span.first <= span.last for span in spans)
    assert all(span.last - span.start <= context_length for span in spans)
    for span in spans[1:]:
        assert span.last - span.start == context_length
        assert span.last - span.first < stride
        assert span.first - span.start >= context_length - stride + 1


@given(st.data())
def test_spans_equal_those_of_the_harness(data: st.DataObject) -> None:
    tokens, context_length = data.draw(st.integers(1, 200)), data.draw(st.integers(1, 40))
    stride = data.draw(st.integers(1, context_length))
    expected = get_rolling_token_windows(
        [*range(1, tokens + 1)], 0, context_length, context_length - stride + 1
    )
    for (start, first, last), (read, predicted) in zip(
        rolling_spans(tokens, context_length, stride), expected, strict=True
    ):
        assert [*range(start, last)] == read
        assert [*range(first, last + 1)] == predicted
