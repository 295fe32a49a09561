"""Log-likelihoods in batches: against one forward pass each, padding, truncation, memory."""

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
    """Random, and far from uniform: its likeliest token is clear."""
    kinds = {"tokenformer": tiny_model, "transformer": tiny_transformer}
    made = build_model(kinds[request.param](init="published"))
    generator = torch.Generator().manual_seed(0)
    made.init_weights(generator)
    for weight in made.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    return made.eval()


@pytest.fixture(scope="module")
def windows() -> list[Window]:
    """Twenty of different lengths, in no order; all fit into the model's context."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(512, (length,), generator=generator).tolist()

    return [Window(ids(1 + 7 * n % 23), ids(1 + 5 * n % 9)) for n in range(20)]


def one_by_one(model: LanguageModel, window: Window) -> Tensor:
    """Log-probabilities of a continuation, by the definition, in float64."""
    ids = torch.tensor([[*window.context, *window.continuation]])
    with torch.no_grad():
        logits = model(ids).double()[0].log_softmax(dim=-1)
    places = range(len(window.context) - 1, ids.shape[1] - 1)
    return torch.stack([logits[place, ids[0, place + 1]] for place in places])


def test_the_sum_is_that_of_a_forward_pass_of_each(
    model: LanguageModel, windows: list[Window]
) -> None:
    for window, scored in zip(windows, Scorer(model, 8).score(windows), strict=True):
        expected = one_by_one(model, window)
        assert scored.log_probabilities == pytest.approx(expected.tolist(), abs=1e-5)
        assert scored.log_likelihood == pytest.approx(expected.sum().item(), abs=1e-5)


@pytest.mark.parametrize("batch_size", [16, None])
def test_one_by_one_and_in_batches_agree(
    model: LanguageModel, windows: list[Window], batch_size: int | None
) -> None:
    alone, together = (Scorer(model, size).score(windows) for size in (1, batch_size))
    for one, other in zip(alone, together, strict=True):
        assert one.log_probabilities == pytest.approx(other.log_probabilities, abs=1e-5)
        assert one.greedy == other.greedy


def test_padding_does_not_change_a_bit_whatever_stands_in_it(
    model: LanguageModel, windows: list[Window], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for padding in (0, 17, 511):
        monkeypatch.setattr(scoring, "PADDING", padding)
        found.append(Scorer(model, 20).score(windows))
    assert found[0] == found[1] == found[2]


def test_a_continuation_that_the_model_would_write_is_greedy(
    model: LanguageModel, windows: list[Window]
) -> None:
    context = [*windows[0].context, *windows[1].context]
    written = list(context)
    for _ in range(3):
        with torch.no_grad():
            written.append(int(model(torch.tensor([written]))[0, -1].argmax()))
    likely = written[len(context) :]
    other = [*likely[:2], (likely[2] + 1) % 512]
    scored = Scorer(model).score([Window(context, likely), Window(context, other)])
    assert [each.greedy for each in scored] == [True, False]


def test_what_does_not_fit_is_cut_off_on_the_left(
    model: LanguageModel, windows: list[Window]
) -> None:
    long = [token for window in windows for token in window.context]
    continuation = windows[0].continuation
    # The last token is never an input, so one id more than the context length counts.
    kept = Window(long[-(CONTEXT_LENGTH + 1 - len(continuation)) :], continuation)
    scorer = Scorer(model, 1)
    assert scorer.score([Window(long, continuation)]) == scorer.score([kept])


def test_the_head_computes_as_the_model_does(
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
    """A model that counts what it is called with; the likeliest token is that which came last."""

    @dataclass
    class Counting:
        fits: int = 1000
        """Rows of a batch; of more it runs out of memory."""

        def __post_init__(self) -> None:
            self.config = SimpleNamespace(context_length=CONTEXT_LENGTH)
            self.shapes: list[tuple[int, ...]] = []
            self.asked: list[int] = []

        def parameters(self) -> Iterator[nn.Parameter]:
            yield nn.Parameter(torch.zeros(1))

        def hidden_states(self, ids: Tensor) -> Tensor:
            self.shapes.append(tuple(ids.shape))
            if len(ids) > self.fits:
                raise torch.OutOfMemoryError("out of memory")
            return torch.nn.functional.one_hot(ids, 512).float()

        def logits(self, hidden_states: Tensor) -> Tensor:
            self.asked.append(len(hidden_states))
            return hidden_states

    def test_continuations_that_differ_in_their_last_token_alone_share_one(self) -> None:
        model = self.Counting()
        windows = [Window([1, 2], [3, 4]), Window([1, 2], [3, 5]), Window([1, 2, 3], [3])]
        scored = Scorer(model).score(windows)
        assert model.shapes == [(1, 3)]
        assert [each.greedy for each in scored] == [False, False, True]

    def test_logits_are_those_of_scored_tokens_alone(
        self, windows: list[Window], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scoring, "ROWS_AT_ONCE", 16)
        model = self.Counting()
        Scorer(model, 20).score(windows)
        assert sum(model.asked) == sum(len(window.continuation) for window in windows)
        assert max(model.asked) == 16

    def test_the_longest_come_first(self, windows: list[Window]) -> None:
        model = self.Counting()
        Scorer(model, 4).score(windows)
        lengths = [shape[1] for shape in model.shapes]
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] == max(len(w.context) + len(w.continuation) - 1 for w in windows)

    def test_an_automatic_batch_holds_so_many_tokens(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(scoring.TOKENS_AT_ONCE, "cpu", 64)
        model = self.Counting()
        Scorer(model).score([Window([n] * 10, [1]) for n in range(13)])
        assert model.shapes == [(6, 10), (6, 10), (1, 10)]

    @pytest.mark.parametrize("batch_size", [8, None])
    def test_a_batch_that_is_too_large_is_halved(
        self, windows: list[Window], batch_size: int | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        longest = max(len(w.context) + len(w.continuation) - 1 for w in windows)
        monkeypatch.setitem(scoring.TOKENS_AT_ONCE, "cpu", 8 * longest)
        small, large = self.Counting(fits=2), self.Counting()
        found = Scorer(small, batch_size).score(windows)
        assert [shape[0] for shape in small.shapes[:4]] == [8, 4, 2, 2]
        assert found == Scorer(large, 1).score(windows)

    def test_a_row_that_is_too_large_is_an_error(self, windows: list[Window]) -> None:
        with pytest.raises(torch.OutOfMemoryError):
            Scorer(self.Counting(fits=0), 4).score(windows)

    def test_each_result_is_told_once_as_soon_as_it_is_there(self, windows: list[Window]) -> None:
        told: dict[int, WindowScore] = {}

        def note(index: int, scored: WindowScore) -> None:
            assert told.setdefault(index, scored) is scored
            assert len(told) <= 4 * len(model.shapes)

        model = self.Counting()
        scored = Scorer(model, 4).score(windows, note)
        assert [told[index] for index in range(len(windows))] == scored


@pytest.mark.parametrize(
    ("context", "continuation", "message"),
    [
        ([], [1], "window 1 has no context"),
        ([1], [], "or no continuation"),
        ([1], list(range(33)), "a continuation of 33 tokens, and a context length of 32"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    model: LanguageModel, context: list[int], continuation: list[int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Scorer(model).score([Window([1], [2]), Window(context, continuation)])


def test_a_batch_size_is_a_number_or_automatic() -> None:
    assert [parse_batch_size(given) for given in ("16", "auto")] == [16, None]
    for given in ("0", "-1", "many", "1.5", ""):
        with pytest.raises(UserError, match="batch_size must be auto or a number above 0"):
            parse_batch_size(given)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
class TestOnAGPU:
    def test_it_finds_what_a_cpu_finds(self, model: LanguageModel, windows: list[Window]) -> None:
        scorer = Scorer(deepcopy(model).cuda())
        for found, expected in zip(
            scorer.score(windows), Scorer(model).score(windows), strict=True
        ):
            assert found.log_probabilities == pytest.approx(expected.log_probabilities, abs=1e-3)
        assert scorer._tokens_at_once == scoring.TOKENS_AT_ONCE["cuda"], "there is memory for more"

    def test_a_batch_is_as_large_as_the_memory_lets_it(
        self, model: LanguageModel, windows: list[Window], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        scorer = Scorer(deepcopy(model).cuda())
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (0, 0))
        torch.cuda.empty_cache()
        scorer.score(windows)
        assert scorer._tokens_at_once is not None
        assert scorer._tokens_at_once < scoring.TOKENS_AT_ONCE["cuda"]

    def test_bf16_stays_near(self, model: LanguageModel, windows: list[Window]) -> None:
        def autocast() -> torch.autocast:
            return torch.autocast("cuda", torch.bfloat16)

        narrow = Scorer(deepcopy(model).cuda(), autocast=autocast).score(windows)
        for found, expected in zip(narrow, Scorer(model).score(windows), strict=True):
            assert found.log_likelihood == pytest.approx(expected.log_likelihood, rel=0.05)
