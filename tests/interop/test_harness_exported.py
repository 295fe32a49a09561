"""lm-evaluation-harness: a checkpoint agrees with its export in the harness's own HF class."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
from exported import export, random_checkpoint
from lm_eval.api.instance import Instance
from torch import nn

from tokengrow.data.tokenizer import Tokenizer
from tokengrow.evaluation.harness import TokengrowLM
from tokengrow.evaluation.harness_tasks import load_tasks, silence_harness
from tokengrow.evaluation.loaded_model import LoadedModel
from tokengrow.evaluation.scoring import Scorer

TASK_FILES = Path(__file__).parents[1] / "evaluation" / "data"
"""Directory with the first 40 questions of LAMBADA and PIQA."""


class Models(NamedTuple):
    tokengrow: TokengrowLM
    transformers: Any


@pytest.fixture(scope="module")
def models(
    hub: ModuleType,
    load: Callable[..., nn.Module],
    tokenizer: Tokenizer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Models:
    """Load the same weights in two model classes of the harness, with other batch sizes.

    In float64, so that the comparison does not depend on the rounding of the CPU.
    """
    from lm_eval.models.huggingface import HFLM  # imports transformers

    texts = {"tokenizer": tokenizer.to_json(), "end_of_text": tokenizer.end_of_text_token}
    source = replace(random_checkpoint(context_length=768), **texts)
    folder = export(tmp_path_factory.mktemp("exported") / "hf", source)
    hf_tokenizer = hub.AutoTokenizer.from_pretrained(folder)
    exported = HFLM(load(folder).double(), tokenizer=hf_tokenizer, batch_size=7, max_length=768)
    return Models(TokengrowLM(LoadedModel(tokenizer, Scorer(source.model.double(), 16))), exported)


def questions(task: str) -> Sequence[Instance]:
    with silence_harness():
        (loaded,) = load_tasks([task], TASK_FILES).loaded["tasks"].values()
        loaded.build_all_requests(limit=40)
    return loaded.instances


@pytest.mark.parametrize(("task", "requests"), [("lambada_openai", 40), ("piqa", 80)])
def test_log_likelihoods_agree(models: Models, task: str, requests: int) -> None:
    instances = list(questions(task))
    assert len(instances) == requests
    actual = models.tokengrow.loglikelihood(instances)
    expected = models.transformers.loglikelihood(instances, disable_tqdm=True)
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    differences = [abs(one - other) for (one, _), (other, _) in zip(actual, expected, strict=True)]
    assert max(differences) < 1e-4


def test_rolling_log_likelihoods_agree_beyond_the_context(models: Models) -> None:
    texts = [request.args[0] for request in questions("lambada_openai")]
    documents = ["\n\n".join(texts[:5]), texts[5], "\n\n".join(texts[6:20])]
    lengths = [len(models.tokengrow.tok_encode(text)) for text in documents]
    assert lengths[1] < 768 < lengths[0] < lengths[2]
    instances = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in documents]
    actual = models.tokengrow.loglikelihood_rolling(instances)
    expected = models.transformers.loglikelihood_rolling(instances, disable_tqdm=True)
    assert actual == pytest.approx(expected, rel=1e-6)


def test_generated_texts_agree(models: Models) -> None:
    contexts = [request.args[0] for request in questions("piqa")[:12]]

    def texts(lm: Any, *until: str) -> list[str]:
        options = {"until": list(until), "max_gen_toks": 20, "do_sample": False}
        instances = [Instance("generate_until", {}, (context, options), 0) for context in contexts]
        # The last token may end within a character, which tokengrow omits.
        return [text.rstrip("\ufffd") for text in lm.generate_until(instances, disable_tqdm=True)]

    full = texts(models.tokengrow)
    assert full == texts(models.transformers)
    stop = full[0][len(full[0]) // 2]
    stopped = texts(models.tokengrow, stop)
    assert stopped == texts(models.transformers, stop)
    assert len(stopped[0]) < len(full[0])
