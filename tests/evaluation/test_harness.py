"""A checkpoint as the lm-evaluation-harness asks it; against its own HF class see
tests/interop/test_harness_exported.py."""

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

Place = Callable[..., LoadedModel]
Asked = Callable[..., Sequence[Instance]]


def request(kind: str, *arguments: Any) -> Instance:
    return Instance(kind, doc={}, arguments=arguments, idx=0)


def ids(model: LoadedModel, text: str) -> list[int]:
    return model.tokenizer.encode(text)


@pytest.fixture
def asked_of_the_model(monkeypatch: pytest.MonkeyPatch) -> list[Window]:
    """The windows that were scored in the test so far."""
    seen: list[Window] = []
    score = Scorer.score

    def watched(self: Scorer, windows: Sequence[Window], done: Any = None) -> Any:
        seen.extend(windows)
        return score(self, windows, done)

    monkeypatch.setattr(Scorer, "score", watched)
    return seen


def test_the_harness_knows_it_by_its_name() -> None:
    assert get_model("tokengrow") is TokengrowLM
    assert get_model("hf-auto") is not None, "its own models are still there"


def test_installed_it_is_found_by_versions_that_look_for_it() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lm_eval.models"]["tokengrow"].partition(":")
    assert getattr(import_module(module), name) is TokengrowLM


# Log-likelihoods


@pytest.mark.parametrize("task", ["lambada_openai", "piqa"])
def test_one_by_one_and_in_batches_of_sixteen_agree(placed: Place, asked: Asked, task: str) -> None:
    requests = list(asked(task))
    one, sixteen = (TokengrowLM(placed(size)).loglikelihood(requests) for size in (1, 16))
    assert [greedy for _, greedy in one] == [greedy for _, greedy in sixteen]
    for (alone, _), (together, _) in zip(one, sixteen, strict=True):
        assert alone == pytest.approx(together, abs=1e-4)


def test_a_log_likelihood_is_that_of_the_tokens_behind_the_context(placed: Place) -> None:
    model = placed()
    question, answer = "def area(width, height):", " return width * height"
    found, _ = TokengrowLM(model).loglikelihood([request("loglikelihood", question, answer)])[0]
    context, whole = ids(model, question), ids(model, question + answer)
    with torch.no_grad():
        logits = model.model(torch.tensor([whole])).double()[0].log_softmax(dim=-1)
    by_hand = sum(logits[place - 1, whole[place]] for place in range(len(context), len(whole)))
    assert found == pytest.approx(float(by_hand), abs=1e-4)


def test_spaces_between_context_and_answer_belong_to_the_answer(placed: Place) -> None:
    lm = TokengrowLM(placed())
    pairs = [("import os", " path"), ("import os ", "path")]
    first, second = lm.loglikelihood([request("loglikelihood", *pair) for pair in pairs])
    assert first == second


def test_an_empty_context_is_the_start_of_a_document(placed: Place) -> None:
    model = placed()
    found = TokengrowLM(model).loglikelihood([request("loglikelihood", "", "import os")])
    scored = model.scorer.score([Window([model.tokenizer.end_of_text], ids(model, "import os"))])
    assert found == [(scored[0].log_likelihood, scored[0].greedy)]


def test_answers_that_differ_in_their_last_token_share_a_row(
    placed: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = placed()
    shapes: list[tuple[int, ...]] = []
    hidden_states = type(model.model).hidden_states

    def watched(self: Any, batch: torch.Tensor, *rest: Any) -> torch.Tensor:
        shapes.append(tuple(batch.shape))
        return hidden_states(self, batch, *rest)

    monkeypatch.setattr(type(model.model), "hidden_states", watched)
    letters = [request("loglikelihood", "Answer:\n", letter) for letter in "ABCD"]
    answers = TokengrowLM(model).loglikelihood(letters)
    assert len({likelihood for likelihood, _ in answers}) == 4
    assert [rows for rows, _ in shapes] == [1]


def test_an_answer_longer_than_the_context_counts_each_token_once(placed: Place) -> None:
    model = placed()
    answer = " = ".join(f"x{n}" for n in range(140))
    tokens = ids(model, answer)
    assert 512 < len(tokens) < 2 * 512
    rolling, (whole, _) = (
        TokengrowLM(model).loglikelihood_rolling([request("loglikelihood_rolling", answer)])[0],
        TokengrowLM(model).loglikelihood([request("loglikelihood", "", answer)])[0],
    )
    assert whole == rolling
    # The second window reads what is left, and before it as much as fits.
    left = len(tokens) - 512
    windows = [
        Window([model.tokenizer.end_of_text], tokens[:512]),
        Window(tokens[-513:-left], tokens[-left:]),
    ]
    parts = [scored.log_likelihood for scored in model.scorer.score(windows)]
    assert rolling == pytest.approx(sum(parts), abs=1e-9)


def test_a_text_of_nothing_is_certain(placed: Place) -> None:
    assert TokengrowLM(placed()).loglikelihood_rolling([request("", "")]) == [0.0]


# Texts


GREEDY = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}
DRAWN = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
CONTEXTS = ("import os", "def area(width):\n    return", "", "class A:", "x = 1\ny")


def test_a_text_is_the_likeliest_up_to_a_stop_string(placed: Place) -> None:
    model = placed()
    context = ids(model, CONTEXTS[1])
    with torch.no_grad():
        for _ in range(12):
            logits = model.model(torch.tensor([context]))[0, -1]
            context.append(int(logits.argmax()))
    written = model.tokenizer.decode(context[len(ids(model, CONTEXTS[1])) :])
    stop = written[len(written) // 2 :][:2]
    wishes = [GREEDY | {"until": [stop]}, GREEDY | {"until": []}]
    requests = [request("generate_until", CONTEXTS[1], wish) for wish in wishes]
    assert TokengrowLM(model).generate_until(requests) == [written.split(stop)[0], written]


def test_texts_are_the_same_one_by_one_and_in_a_batch(placed: Place) -> None:
    requests = [request("generate_until", context, GREEDY) for context in CONTEXTS]
    one, many = (TokengrowLM(placed(size)).generate_until(requests) for size in (1, 16))
    assert one == many
    assert len(set(one)) > 1


def test_a_text_that_is_drawn_again_is_another_one(placed: Place) -> None:
    requests = [request("generate_until", "import", DRAWN)] * 3
    texts = TokengrowLM(placed()).generate_until(requests)
    assert len(set(texts)) == 3
    assert TokengrowLM(placed()).generate_until(requests) == texts


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"max_gen_toks": 512}, "asks for 512 tokens of text, and the model takes 512"),
        ({"num_beams": 4, "max_gen_toks": 4}, "asks for num_beams"),
    ],
)
def test_a_text_that_cannot_be_written_is_refused(
    placed: Place, wish: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        TokengrowLM(placed()).generate_until([request("generate_until", "import", wish)])


# What is known already


class Killed(Exception):
    pass


def test_what_was_answered_before_a_kill_is_not_asked_again(
    placed: Place,
    asked: Asked,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked_of_the_model: list[Window],
) -> None:
    requests = list(asked("lambada_openai"))
    whole = TokengrowLM(placed(4)).loglikelihood(requests)
    asked_of_the_model.clear()
    passes = iter(range(6))
    score_batch = Scorer._score_batch

    def dies(self: Scorer, batch: Any) -> Any:
        if next(passes) == 5:
            raise Killed
        return score_batch(self, batch)

    with monkeypatch.context() as patch, ResponseCache(tmp_path) as kept, pytest.raises(Killed):
        patch.setattr(Scorer, "_score_batch", dies)
        TokengrowLM(placed(4), kept).loglikelihood(requests)
    asked_of_the_model.clear()
    with ResponseCache(tmp_path) as kept:
        resumed = TokengrowLM(placed(4), kept).loglikelihood(requests)
    assert len(asked_of_the_model) == 40 - 5 * 4
    # Other batches than before: the same answers but for rounding.
    assert [greedy for _, greedy in resumed] == [greedy for _, greedy in whole]
    for (found, _), (expected, _) in zip(resumed, whole, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_answers_of_each_kind_are_kept_bit_by_bit(
    placed: Place, tmp_path: Path, asked_of_the_model: list[Window]
) -> None:
    answers = []
    for _ in range(2):
        with ResponseCache(tmp_path) as kept:
            lm = TokengrowLM(placed(), kept)
            answers.append(
                (
                    lm.loglikelihood([request("loglikelihood", "a = ", "1")]),
                    lm.loglikelihood_rolling([request("loglikelihood_rolling", "a = 1")]),
                    lm.generate_until([request("generate_until", "import", GREEDY)]),
                )
            )
    assert answers[0] == answers[1]
    assert len(asked_of_the_model) == 2


def test_what_is_drawn_is_not_kept(placed: Place, tmp_path: Path) -> None:
    requests = [request("generate_until", "import", DRAWN)] * 2
    with ResponseCache(tmp_path) as kept:
        TokengrowLM(placed(), kept).generate_until(requests)
    assert not list(tmp_path.iterdir())


# Ranks


@pytest.mark.parametrize(("limit", "questions"), [(2, 2), (0.05, 2), (None, 40)])
def test_fewer_questions_than_ranks_are_refused(
    placed: Place, task_files: Path, limit: float | None, questions: int
) -> None:
    lm = TokengrowLM(placed())
    lm._world_size = 41
    with pytest.raises(UserError, match=rf"piqa asks {questions} questions, fewer than .* \(41\)"):
        run_tasks(lm, load_tasks(["piqa"], task_files), limit)


# Its arguments


def test_model_args_say_which_checkpoint(judged: Path) -> None:
    arguments = f"source={judged},batch_size=3"
    lm = TokengrowLM.create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
    assert lm._scorer.batch_size == 3
    assert lm.max_length == 512
    assert (lm.rank, lm.world_size) == (0, 1)


def test_a_batch_size_that_the_harness_measures_anew_for_others_is_automatic(judged: Path) -> None:
    lm = TokengrowLM.create_from_arg_string(f"source={judged},batch_size=auto:4,device=cpu")
    assert lm._scorer.batch_size is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("source=nowhere", "nowhere does not exist"),
        ("pretrained=nowhere", r"Unknown key model_args\.pretrained"),
        ("source=x,batch_size=0", "batch_size must be auto or a number above 0"),
        ("source=x,device=tpu", "fabric.accelerator 'tpu'"),
        ("source=x,device=cuda:1", "device=cuda:1: choose a GPU by CUDA_VISIBLE_DEVICES"),
    ],
)
def test_wrong_model_args_are_refused(arguments: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        TokengrowLM.create_from_arg_string(arguments)
