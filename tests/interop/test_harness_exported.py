"""What the lm-evaluation-harness is told by a checkpoint, beside what its own HF class is told by
the checkpoint's export."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from exported import checkpoint, written
from lm_eval.api.instance import Instance
from torch import nn

from tokengrow.data.tokenizer import Tokenizer
from tokengrow.evaluation.harness import TokengrowLM
from tokengrow.evaluation.harness_tasks import load_tasks, silence_harness
from tokengrow.evaluation.loaded_model import LoadedModel
from tokengrow.evaluation.scoring import Scorer

TASK_FILES = Path(__file__).parents[1] / "evaluation" / "data"
"""With the first 40 questions of LAMBADA and PIQA."""


class Pair(NamedTuple):
    ours: TokengrowLM
    theirs: Any


@pytest.fixture(scope="module")
def pair(
    hub: ModuleType,
    load: Callable[..., nn.Module],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Pair:
    """The same weights, in float32, by two ways into the harness, in batches of other sizes."""
    from lm_eval.models.huggingface import HFLM  # which imports transformers

    texts = {"tokenizer": tokenizer.to_json(), "end_of_text": tokenizer.end_of_text_token}
    source = replace(checkpoint(context_length=768), **texts)
    folder = written(tmp_path_factory.mktemp("judged") / "hf", source)
    words = hub.AutoTokenizer.from_pretrained(folder)
    theirs = HFLM(load(folder), tokenizer=words, batch_size=7, max_length=768)
    return Pair(TokengrowLM(LoadedModel(tokenizer, Scorer(source.model, 16))), theirs)


def questions(task: str) -> Sequence[Instance]:
    with silence_harness():
        (loaded,) = load_tasks([task], TASK_FILES).loaded["tasks"].values()
        loaded.build_all_requests(limit=40)
    return loaded.instances


@pytest.mark.parametrize(("task", "requests"), [("lambada_openai", 40), ("piqa", 80)])
def test_log_likelihoods_agree(pair: Pair, task: str, requests: int) -> None:
    asked = list(questions(task))
    assert len(asked) == requests
    ours = pair.ours.loglikelihood(asked)
    theirs = pair.theirs.loglikelihood(asked, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
    distances = [abs(one - other) for (one, _), (other, _) in zip(ours, theirs, strict=True)]
    assert max(distances) < 1e-4


def test_rolling_log_likelihoods_agree_beyond_the_context(pair: Pair) -> None:
    texts = [request.args[0] for request in questions("lambada_openai")]
    documents = ["\n\n".join(texts[:5]), texts[5], "\n\n".join(texts[6:20])]
    lengths = [len(pair.ours.tok_encode(text)) for text in documents]
    assert lengths[1] < 768 < lengths[0] < lengths[2]
    asked = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in documents]
    ours = pair.ours.loglikelihood_rolling(asked)
    theirs = pair.theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_texts_agree(pair: Pair) -> None:
    contexts = [request.args[0] for request in questions("piqa")[:12]]

    def texts(lm: Any, *until: str) -> list[str]:
        wish = {"until": list(until), "max_gen_toks": 20, "do_sample": False}
        asked = [Instance("generate_until", {}, (context, wish), 0) for context in contexts]
        # The last token may leave a character unfinished, which ours leaves out.
        return [text.rstrip("\ufffd") for text in lm.generate_until(asked, disable_tqdm=True)]

    whole = texts(pair.ours)
    assert whole == texts(pair.theirs)
    stop = whole[0][len(whole[0]) // 2]
    stopped = texts(pair.ours, stop)
    assert stopped == texts(pair.theirs, stop)
    assert len(stopped[0]) < len(whole[0])
