"""Log-likelihoods in batches: agreement with single forward passes, padding, truncation, memory."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tokengrow.errors import UserError
from tokengrow.evaluation import scoring
from tokengrow.evaluation.scoring import Scorer, Window, WindowScore, parse_batch_size
from tokengrow.model.architectures import build_model
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import LanguageModel
from tokengrow.model.transformer import TransformerConfig

CONTEXT_LENGTH = 32


@pytest.fixture(scope="module", params=["tokenformer", "transformer"])
def model(
    request: pytest.FixtureRequest,
    tiny_model: Callable[..., ModelConfig],
    tiny_transformer: Callable[..., TransformerConfig],
) -> LanguageModel:
    """Random model, far from uniform, so that its most likely token is unambiguous."""
    configs = {"tokenformer": tiny_model, "transformer": tiny_transformer}
    random_model = build_model(configs[request.param](init="published"))
    generator = torch.Generator().manual_seed(0)
    random_model.init_weights(generator)
    for weight in random_model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return random_model.eval()


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """Twenty windows of different lengths, unordered, all within the model's context."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(512, (length,), generator=generator).tolist()

    return [Window(ids(1 + 7 * n % 23), ids(1 + 5 * n % 9)) for n in range(20)]


def reference_log_probabilities(model: LanguageModel, window: Window) -> Tensor:
    """Compute the log-probabilities of a continuation by definition, in float64."""
    ids = torch.tensor([[*window.context, *window.continuation]])
    with torch.no_grad():
        logits = model(ids).double()[0].log_softmax(dim=-1)
    positions = range(len(window.context) - 1, ids.shape[1] - 1)
    return torch.stack([logits[position, ids[0, position + 1]] for position in positions])


def test_batched_scores_equal_single_forward_passes(
    model: LanguageModel, windows: list[Window]
) -> None:
    for window, score in zip(windows, Scorer(model, 8).score(windows), strict=True):
        expected = reference_log_probabilities(model, window)
        assert score.log_probabilities == pytest.approx(expected.tolist(), abs=1e-5)
        assert score.log_likelihood == pytest.approx(expected.sum().item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [16, None])
def test_scores_do_not_depend_on_batch_size(
    model: LanguageModel, windows: list[Window], batch_size: int | None
) -> None:
    single, batched = (Scorer(model, size).score(windows) for size in (1, batch_size))
    for one, other in zip(single, batched, strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-5)
        assert one.greedy == other.greedy


def test_padding_id_does_not_change_a_bit(
    model: LanguageModel, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = []
    for pad_id in (0, 17, 511):
        monkeypatch.setattr(scoring, "PAD_ID", pad_id)
        scores.append(Scorer(model, 20).score(windows))
    assert scores[0] == scores[1] == scores[2]


def test_greedily_decoded_continuation_is_greedy(
    model: LanguageModel, windows: list[Window]
) -> None:
    context = [*windows[0].context, *windows[1].context]
    ids = list(context)
    for _ in range(3):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    likely = ids[len(context) :]
    other = [*likely[:2], (likely[2] + 1) % 512]
    scores = Scorer(model).score([Window(context, likely), Window(context, other)])
    assert [score.greedy for score in scores] == [True, False]


def test_long_context_is_truncated_on_the_left(model: LanguageModel, windows: list[Window]) -> None:
    long = [token for window in windows for token in window.context]
    continuation = windows[0].continuation
    # The last token is never an input, so one id more than the context length fits.
    truncated = Window(long[-(CONTEXT_LENGTH + 1 - len(continuation)) :], continuation)
    scorer = Scorer(model, 1)
    assert scorer.score([Window(long, continuation)]) == scorer.score([truncated])


def test_output_head_computes_under_autocast(
    model: LanguageModel, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    dtypes: list[torch.dtype] = []
    logits = LanguageModel.logits
    monkeypatch.setattr(
        type(model), "logits", lambda self, x: dtypes.append((y := logits(self, x)).dtype) or y
    )
    Scorer(model, autocast=lambda: torch.autocast("cpu", torch.bfloat16)).score(windows)
    assert set(dtypes) == {torch.bfloat16}


class TestForwardPasses:
    """Forward passes of a model that records its calls and predicts the last token again."""

    @dataclass
    class RecordingModel:
        max_rows: int = 1000
        """Rows of a batch above which the model raises an out-of-memory error."""

        def __post_init__(self) -> None:
            self.config = SimpleNamespace(context_length=CONTEXT_LENGTH)
            self.shapes: list[tuple[int, ...]] = []
            self.logit_rows: list[int] = []

        def parameters(self) -> Iterator[nn.Parameter]:
            yield nn.Parameter(torch.zeros(1))

        def hidden_states(self, ids: Tensor) -> Tensor:
            self.shapes.append(tuple(ids.shape))
            if len(ids) > self.max_rows:
                raise torch.OutOfMemoryError("out of memory")
            return torch.nn.functional.one_hot(ids, 512).float()

        def logits(self, hidden_states: Tensor) -> Tensor:
            self.logit_rows.append(len(hidden_states))
            return hidden_states

    def test_continuations_differing_in_last_token_share_a_row(self) -> None:
        model = self.RecordingModel()
        windows = [Window([1, 2], [3, 4]), Window([1, 2], [3, 5]), Window([1, 2, 3], [3])]
        scores = Scorer(model).score(windows)
        assert model.shapes == [(1, 3)]
        assert [score.greedy for score in scores] == [False, False, True]

    def test_logits_are_computed_for_scored_tokens_only(
        self, windows: list[Window], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scoring, "LOGITS_CHUNK", 16)
        model = self.RecordingModel()
        Scorer(model, 20).score(windows)
        assert sum(model.logit_rows) == sum(len(window.continuation) for window in windows)
        assert max(model.logit_rows) == 16

    def test_longest_windows_are_scored_first(self, windows: list[Window]) -> None:
        model = self.RecordingModel()
        Scorer(model, 4).score(windows)
        lengths = [shape[1] for shape in model.shapes]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] == max(len(w.context) + len(w.continuation) - 1 for w in windows)

    def test_automatic_batch_has_at_most_max_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(scoring.MAX_BATCH_TOKENS, "cpu", 64)
        model = self.RecordingModel()
        Scorer(model).score([Window([n] * 10, [1]) for n in range(13)])
        assert model.shapes == [(6, 10), (6, 10), (1, 10)]

    @pytest.mark.parametrize("batch_size", [8, None])
    def test_batch_that_is_too_large_is_halved(
        self, windows: list[Window], batch_size: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        longest = max(len(w.context) + len(w.continuation) - 1 for w in windows)
        monkeypatch.setitem(scoring.MAX_BATCH_TOKENS, "cpu", 8 * longest)
        small, large = self.RecordingModel(max_rows=2), self.RecordingModel()
        scores = Scorer(small, batch_size).score(windows)
        assert [shape[0] for shape in small.shapes[:4]] == [8, 4, 2, 2]
        assert scores == Scorer(large, 1).score(windows)

    def test_single_row_that_is_too_large_raises(self, windows: list[Window]) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            Scorer(self.RecordingModel(max_rows=0), 4).score(windows)

    def test_on_score_gets_each_score_once_after_its_batch(self, windows: list[Window]) -> None:
        received: dict[int, WindowScore] = {}

        def on_score(index: int, score: WindowScore) -> None:
            assert received.setdefault(index, score) is score
            assert len(received) <= 4 * len(model.shapes)

        model = self.RecordingModel()
        scores = Scorer(model, 4).score(windows, on_score)
        assert [received[index] for index in range(len(windows))] == scores


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [1], "window 1 has no context"),
        ([1], [], "or no continuation"),
        (
            [1],
            list(range(33)),
            r"the continuation must have at most 32 tokens \(the context length\), got 33",
        ),
    ],
)
def test_invalid_window_is_refused(
    model: LanguageModel, context: list[int], continuation: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(model).score([Window([1], [2]), Window(context, continuation)])


def test_batch_size_is_a_positive_number_or_auto() -> None:
    assert [parse_batch_size(text) for text in ("16", "auto")] == [16, None]
    for text in ("0", "-1", "many", "1.5", ""):
        with pytest.raises(UserError, match="batch_size must be auto or a number above 0"):
            parse_batch_size(text)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnGPU:
    def test_scores_equal_those_of_cpu(self, model: LanguageModel, windows: list[Window]) -> None:
        scorer = Scorer(deepcopy(model).cuda())
        for score, expected in zip(
            scorer.score(windows), Scorer(model).score(windows), strict=True
        ):
            assert score.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-3)
        assert scorer._batch_tokens == scoring.MAX_BATCH_TOKENS["cuda"], "memory suffices for more"

    def test_automatic_batch_is_limited_by_free_memory(
        self, model: LanguageModel, windows: list[Window], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scorer = Scorer(deepcopy(model).cuda())
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
        torch.cuda.empty_cache()
        scorer.score(windows)
        assert scorer._batch_tokens is not None
        assert scorer._batch_tokens < scoring.MAX_BATCH_TOKENS["cuda"]

    def test_bf16_scores_are_close(self, model: LanguageModel, windows: list[Window]) -> None:
        def autocast() -> torch.autocast:
            return torch.autocast("cuda", torch.bfloat16)

        scores = Scorer(deepcopy(model).cuda(), autocast=autocast).score(windows)
        for score, expected in zip(scores, Scorer(model).score(windows), strict=True):
            assert score.log_likelihood == pytest.approx(expected.log_likelihood, rel=0.05)
