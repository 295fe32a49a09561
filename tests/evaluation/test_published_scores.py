"""Published scores, and the published model that is nearest in size."""

import pytest

from tokengrow.evaluation.published_scores import PUBLISHED_SCORES, nearest_published_model
from tokengrow.model.config import ModelConfig


@pytest.mark.parametrize("preset", PUBLISHED_SCORES)
def test_published_model_is_nearest_to_itself(preset: str) -> None:
    parameters = ModelConfig.preset(preset).num_parameters()
    assert nearest_published_model(parameters).name == PUBLISHED_SCORES[preset][0]


@pytest.mark.parametrize(
    ("parameters", "name"),
    [(10**5, "150M"), (2 * 10**8, "150M"), (3 * 10**8, "450M"), (10**10, "1.5B")],
)
def test_nearest_model_has_smallest_ratio(parameters: int, name: str) -> None:
    assert nearest_published_model(parameters).name == f"TokenFormer-{name}"


@pytest.mark.parametrize("preset", PUBLISHED_SCORES)
def test_mean_accuracy_equals_that_of_the_paper(preset: str) -> None:
    published = nearest_published_model(ModelConfig.preset(preset).num_parameters())
    _, *accuracies = published.scores.values()
    paper = {"150m": 44.7, "450m": 52.0, "900m": 56.4, "1.5b": 59.3}
    assert sum(accuracies) / 6 == pytest.approx(paper[preset], abs=0.051)
