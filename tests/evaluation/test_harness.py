"""Model class of the lm-evaluation-harness.

tests/interop/test_harness_exported.py compares it with the harness's own class for Transformers.
"""

import tomllib
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from tokengrow.errors import UserError
from tokengrow.evaluation.harness import TokengrowLM
from tokengrow.evaluation.harness_tasks import load_tasks, run_tasks
from tokengrow.evaluation.loaded_model import LoadedModel
from tokengrow.evaluation.response_cache import ResponseCache
from tokengrow.evaluation.scoring import Scorer, Window

LoadModel = Callable[..., LoadedModel]
TaskRequests = Callable[..., Sequence[Instance]]


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, doc={}, arguments=arguments, idx=0)


def encode(model: LoadedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text)


@pytest.fixture
def scored_windows(monkeypatch: pytest.MonkeyPatch) -> list[Window]:
    """Windows that the test has scored so far."""
    scored: list[Window] = []
    score = Scorer.score

    def recording_score(self: Scorer, windows: Sequence[Window], on_score: Any = None) -> Any:
        scored.extend(windows)
        return score(self, windows, on_score)

    monkeypatch.setattr(Scorer, "score", recording_score)
    return scored


def test_harness_finds_model_by_name() -> None:
    assert get_model("tokengrow") is TokengrowLM
    assert get_model("hf-auto") is not None, "the harness's own models are still registered"


def test_entry_point_names_model_class() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["tokengrow"].partition(":")
    assert getattr(import_module(module), name) is TokengrowLM


# Log-likelihoods


@pytest.mark.parametrize("task", ["lambada_openai", "piqa"])
def test_batch_sizes_1_and_16_agree(
    load_model: LoadModel, task_requests: TaskRequests, task: str
) -> None:
    requests = list(task_requests(task))
    single, batched = (TokengrowLM(load_model(size)).loglikelihood(requests) for size in (1, 16))
    assert [greedy for _, greedy in single] == [greedy for _, greedy in batched]
    for (one, _), (other, _) in zip(single, batched, strict=True):
        assert one == pytest.approx(other, abs=1e-4)


def test_log_likelihood_sums_tokens_after_context(load_model: LoadModel) -> None:
    model = load_model()
    question, answer = "def area(width, height):", " return width * height"
    result, _ = TokengrowLM(model).loglikelihood([request("loglikelihood", question, answer)])[0]
    context, ids = encode(model, question), encode(model, question + answer)
    with torch.no_grad():
        logits = model.model(torch.tensor([ids])).double()[0].log_softmax(dim=-1)
    expected = sum(
        logits[position - 1, ids[position]] for position in range(len(context), len(ids))
    )
    assert result == pytest.approx(float(expected), abs=1e-4)


def test_space_before_answer_belongs_to_answer(load_model: LoadModel) -> None:
    lm = TokengrowLM(load_model())
    pairs = [("import os", " path"), ("import os ", "path")]
    first, second = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    assert first == second


def test_empty_context_is_start_of_document(load_model: LoadModel) -> None:
    model = load_model()
    result = TokengrowLM(model).loglikelihood([request("loglikelihood", "", "import os")])
    window = Window([model.tokenizer.end_of_text], encode(model, "import os"))
    (score,) = model.scorer.score([window])
    assert result == [(score.log_likelihood, score.greedy)]


def test_answers_differing_in_last_token_share_a_row(
    load_model: LoadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model()
    shapes: list[tuple[int, ...]] = []
    hidden_states = type(model.model).hidden_states

    def recording_hidden_states(self: Any, batch: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(batch.shape))
        return hidden_states(self, batch, *rest)

    monkeypatch.setattr(type(model.model), "hidden_states", recording_hidden_states)
    letters = [request("loglikelihood", "Answer:\n", letter) for letter in "ABCD"]
    responses = TokengrowLM(model).loglikelihood(letters)
    assert len({likelihood for likelihood, _ in responses}) == 4
    assert [rows for rows, _ in shapes] == [1]


def test_answer_beyond_context_counts_each_token_once(load_model: LoadModel) -> None:
    model = load_model()
    answer = " = ".join(f"x{n}" for n in range(140))
    ids = encode(model, answer)
    assert 512 < len(ids) < 2 * 512
    rolling, (single, _) = (
        TokengrowLM(model).loglikelihood_rolling([request("loglikelihood_rolling", answer)])[0],
        TokengrowLM(model).loglikelihood([request("loglikelihood", "", answer)])[0],
    )
    assert single == rolling
    # The second window predicts the remaining tokens, with as much context as fits.
    remaining = len(ids) - 512
    windows = [
        Window([model.tokenizer.end_of_text], ids[:512]),
        Window(ids[-513:-remaining], ids[-remaining:]),
    ]
    parts = [score.log_likelihood for score in model.scorer.score(windows)]
    assert rolling == pytest.approx(sum(parts), abs=1e-9)


def test_empty_text_has_log_likelihood_zero(load_model: LoadModel) -> None:
    assert TokengrowLM(load_model()).loglikelihood_rolling([request("", "")]) == [0.0]


# Generated texts


GREEDY = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
SAMPLED = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
CONTEXTS = ("import os", "def area(width):\n    return", "", "class A:", "x = 1\ny")


def test_greedy_text_ends_at_stop_string(load_model: LoadModel) -> None:
    model = load_model()
    context = encode(model, CONTEXTS[1])
    with torch.no_grad():
        for _ in range(12):
            logits = model.model(torch.tensor([context]))[0, -1]
            context.append(int(logits.argmax()))
    text = model.tokenizer.decode(context[len(encode(model, CONTEXTS[1])) :])
    stop = text[len(text) // 2 :][:2]
    settings = [GREEDY | {"until": [stop]}, GREEDY | {"until": []}]
    requests = [request("generate_until", CONTEXTS[1], each) for each in settings]
    assert TokengrowLM(model).generate_until(requests) == [text.split(stop)[0], text]


def test_texts_do_not_depend_on_batch_size(load_model: LoadModel) -> None:
    requests = [request("generate_until", context, GREEDY) for context in CONTEXTS]
    single, batched = (TokengrowLM(load_model(size)).generate_until(requests) for size in (1, 16))
    assert single == batched
    assert len(set(single)) > 1


def test_repeated_request_is_sampled_differently(load_model: LoadModel) -> None:
    requests = [request("generate_until", "import", SAMPLED)] * 3
    texts = TokengrowLM(load_model()).generate_until(requests)
    assert len(set(texts)) == 3
    assert TokengrowLM(load_model()).generate_until(requests) == texts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"max_gen_toks": 512},
            "max_gen_toks must be below the model's context_length of 512, got 512",
        ),
        ({"num_beams": 4, "max_gen_toks": 4}, "sets num_beams, which generation does not support"),
    ],
)
def test_unsupported_generation_request_is_refused(
    load_model: LoadModel, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TokengrowLM(load_model()).generate_until([request("generate_until", "import", settings)])


# Cache of responses


class Killed(Exception):
    pass


def test_resumed_evaluation_skips_cached_responses(
    load_model: LoadModel,
    task_requests: TaskRequests,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    scored_windows: list[Window],
) -> None:
    requests = list(task_requests("lambada_openai"))
    uninterrupted = TokengrowLM(load_model(4)).loglikelihood(requests)
    scored_windows.clear()
    calls = iter(range(6))
    score_batch = Scorer._score_batch

    def killed_at_sixth_batch(self: Scorer, batch: Any) -> Any:
        if next(calls) == 5:
            raise Killed
        return score_batch(self, batch)

    with monkeypatch.context() as patch, ResponseCache(tmp_path) as cache, pytest.raises(Killed):
        patch.setattr(Scorer, "_score_batch", killed_at_sixth_batch)
        TokengrowLM(load_model(4), cache).loglikelihood(requests)
    scored_windows.clear()
    with ResponseCache(tmp_path) as cache:
        resumed = TokengrowLM(load_model(4), cache).loglikelihood(requests)
    assert len(scored_windows) == 40 - 5 * 4
    # The batches differ from the uninterrupted ones, so responses agree except for rounding.
    assert [greedy for _, greedy in resumed] == [greedy for _, greedy in uninterrupted]
    for (result, _), (expected, _) in zip(resumed, uninterrupted, strict=True):
        assert result == pytest.approx(expected, abs=1e-4)


def test_cached_responses_have_same_bits(
    load_model: LoadModel, tmp_path: Path, scored_windows: list[Window]
) -> None:
    responses = []
    for _ in range(2):
        with ResponseCache(tmp_path) as cache:
            lm = TokengrowLM(load_model(), cache)
            responses.append(
                (
                    lm.loglikelihood([request("loglikelihood", "a = ", "1")]),
                    lm.loglikelihood_rolling([request("loglikelihood_rolling", "a = 1")]),
                    lm.generate_until([request("generate_until", "import", GREEDY)]),
                )
            )
    assert responses[0] == responses[1]
    assert len(scored_windows) == 2


def test_sampled_texts_are_not_cached(load_model: LoadModel, tmp_path: Path) -> None:
    requests = [request("generate_until", "import", SAMPLED)] * 2
    with ResponseCache(tmp_path) as cache:
        TokengrowLM(load_model(), cache).generate_until(requests)
    assert not list(tmp_path.iterdir())


# Ranks


@pytest.mark.parametrize(("limit", "questions"), [(2, 2), (0.05, 2), (None, 40)])
def test_fewer_questions_than_ranks_are_refused(
    load_model: LoadModel, task_files: Path, limit: float | None, questions: int
) -> None:
    lm = TokengrowLM(load_model())
    lm._world_size = 41
    message = f"piqa must have at least 41 questions, one per process, got {questions}"
    with pytest.raises(UserError, match=message):
        run_tasks(lm, load_tasks(["piqa"], task_files), limit)


# Model arguments


def test_model_args_override_harness_options(eval_checkpoint: Path) -> None:
    arguments = f"source={eval_checkpoint},batch_size=3"
    lm = TokengrowLM.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    assert lm._scorer.batch_size == 3
    assert lm.max_length == 512
    assert (lm.rank, lm.world_size) == (0, 1)


def test_batch_size_auto_n_is_automatic(eval_checkpoint: Path) -> None:
    arguments = f"source={eval_checkpoint},batch_size=auto:4,device=cpu"
    assert TokengrowLM.create_from_arg_string(arguments)._scorer.batch_size is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("source=nowhere", "nowhere does not exist"),
        ("pretrained=nowhere", r"Unknown key model_args\.pretrained"),
        ("source=x,batch_size=0", "batch_size must be auto or a number above 0"),
        ("source=x,device=tpu", "fabric.accelerator.*tpu"),
        (
            "source=x,device=cuda:1",
            "device must be cpu, cuda or auto, got cuda:1. Choose a GPU with CUDA_VISIBLE_DEVICES",
        ),
    ],
)
def test_wrong_model_args_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokengrowLM.create_from_arg_string(arguments)
