"""Drift: its measurement, and the drift that is refused."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tokengrow.growth import verify
from tokengrow.growth.verify import (
    MAX_FLOAT64_PARAMETERS,
    Drift,
    DriftError,
    check_drift,
    compute_logits,
    default_tolerance,
    measure_drift,
    probe_dtype,
    random_probe,
)
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

Sized = Callable[..., ModelConfig]
RandomModel = Callable[..., TokenFormer]


class Fixed(torch.nn.Module):
    """Stub of a model with the same row of logits at every position."""

    def __init__(self, logits: list[float]) -> None:
        super().__init__()
        self.logits = torch.nn.Parameter(torch.tensor(logits, dtype=torch.float64))

    def forward(self, ids: Tensor) -> Tensor:
        """Return the row of logits for every id."""
        return self.logits.expand(*ids.shape, -1)


IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(3))
PROBE = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 1]])
NO_DRIFT = Drift("float64", 6, 0.0, 0.0, 0.0, 0.0, 3.0, 3.0)


def test_drift_computed_by_hand() -> None:
    # Probabilities: 1/2, 1/2 before and 3/4, 1/4 after. Two of the six targets are 0, four are 1.
    before, after = Fixed([0.0, 0.0]), Fixed([math.log(3), 0.0])
    drift = measure_drift(before, after, PROBE)
    assert (drift.dtype, drift.probe_tokens) == ("float64", 6)
    assert drift.max_logit == pytest.approx(math.log(3))
    assert drift.mean_logit == pytest.approx(math.log(3) / 2)
    assert drift.relative == pytest.approx(math.log(3))  # the source's logits are below 1
    assert drift.kl == pytest.approx(0.5 * math.log(2 / 3) + 0.5 * math.log(2))
    assert drift.loss_source == pytest.approx(math.log(2))
    assert drift.loss_grown == pytest.approx((2 * math.log(4 / 3) + 4 * math.log(4)) / 6)


def test_drift_is_relative_to_the_largest_source_logit() -> None:
    drift = measure_drift(Fixed([-50.0, 0.0]), Fixed([-50.0, 1.0]), PROBE)
    assert drift.max_logit == 1.0
    assert drift.relative == pytest.approx(1 / 50)


def test_copy_has_no_drift(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    probe = random_probe(sized(6), torch.Generator().manual_seed(0))
    drift = measure_drift(model, random_model(sized(6)), probe)
    assert (drift.max_logit, drift.mean_logit, drift.relative) == (0.0, 0.0, 0.0)
    assert drift.kl == pytest.approx(0.0, abs=1e-12)
    assert drift.loss_source == drift.loss_grown


def test_perturbed_copy_is_refused(random_model: RandomModel, sized: Sized) -> None:
    model, copy = random_model(sized(6)), random_model(sized(6))
    with torch.no_grad():
        copy.final_norm.bias[3] += 1e-6
    probe = random_probe(sized(6), torch.Generator().manual_seed(0))
    drift = measure_drift(model, copy, probe)
    # A bias adds the same to every logit of a token: 1e-6 times channel 3 of its embedding.
    wanted = 1e-6 * model.embedding.weight[:, 3].abs().max().item()
    assert drift.max_logit == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(DriftError):
        check_drift(drift, 1e-12)


@pytest.mark.parametrize(("dtype", "limit"), [("float64", 1e-12), ("float32", 1e-5)])
def test_each_precision_has_its_tolerance(dtype: str, limit: float) -> None:
    kind = getattr(torch, dtype)
    assert (
        default_tolerance(kind, kind, rounded=True)
        == default_tolerance(kind, kind, rounded=False)
        == limit
    )


def test_rounded_weights_have_the_tolerance_of_their_dtype() -> None:
    # float32 weights compared in float64: copies and zeros are exact, means of rows are not.
    assert default_tolerance(torch.float32, torch.float64, rounded=False) == 1e-12
    assert default_tolerance(torch.float32, torch.float64, rounded=True) == 1e-5


def test_drift_equal_to_the_limit_is_allowed() -> None:
    check_drift(replace(NO_DRIFT, relative=0.25), 0.25)
    with pytest.raises(DriftError):
        check_drift(replace(NO_DRIFT, relative=0.2501), 0.25)


def test_given_tolerance_is_used() -> None:
    check_drift(replace(NO_DRIFT, relative=0.5), 0.5)
    with pytest.raises(DriftError):
        check_drift(replace(NO_DRIFT, relative=1e-15), 0.0)
    check_drift(NO_DRIFT, 0.0)


def test_error_has_the_numbers() -> None:
    drift = replace(NO_DRIFT, max_logit=7.5, relative=0.25, loss_source=3.5, loss_grown=4.25)
    with pytest.raises(DriftError) as caught:
        check_drift(drift, 0.125)
    for number in (
        "moved by 7.5",
        "0.25 of their size",
        "tolerance is 0.125",
        "from 3.500000 to 4.2500",
        "growth=zero_key",
    ):
        assert number in str(caught.value)


def test_nan_is_refused() -> None:
    drift = measure_drift(Fixed([0.0, 1.0]), Fixed([0.0, math.nan]), PROBE)
    for tolerance in (1e-12, 1e9):
        with pytest.raises(DriftError, match=r"moved by nan.*Check the weights of the source"):
            check_drift(drift, tolerance)


def test_infinite_logit_is_refused() -> None:
    drift = measure_drift(Fixed([0.0, math.inf]), Fixed([0.0, math.inf]), PROBE)
    with pytest.raises(DriftError):
        check_drift(drift, 1e9)


def test_drift_converts_to_plain_values(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    drift = measure_drift(model, model, random_probe(sized(6), torch.Generator()))
    values = drift.to_dict()
    assert {type(value) for value in values.values()} <= {str, int, float}
    assert Drift(**values) == drift


def test_large_models_are_compared_in_float32(sized: Sized) -> None:
    width, rest = 16, sized(6, vocab_size=1).num_parameters() - 16
    rows = (MAX_FLOAT64_PARAMETERS - rest) // width
    assert probe_dtype(sized(6, vocab_size=rows)) == torch.float64
    assert probe_dtype(sized(6, vocab_size=rows + 1)) == torch.float32


def test_random_probe_has_two_rows_of_context_length(sized: Sized) -> None:
    probe = random_probe(sized(6), torch.Generator().manual_seed(0))
    assert probe.shape == (2, 13)
    assert probe.min() >= 0 and probe.max() < 40
    long = random_probe(sized(6, context_length=4096), torch.Generator().manual_seed(0))
    assert long.shape == (2, 129)


def test_chunked_comparison_equals_unchunked(
    random_model: RandomModel, sized: Sized, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = random_probe(sized(6), torch.Generator().manual_seed(0))
    models = random_model(sized(6)), random_model(sized(6), seed=1)
    expected = measure_drift(*models, probe).to_dict()
    monkeypatch.setattr(verify, "CHUNK_POSITIONS", 5)
    chunked = measure_drift(*models, probe).to_dict()
    for key, value in expected.items():
        assert chunked[key] == (
            value if isinstance(value, str) else pytest.approx(value, rel=1e-12)
        )


def test_logits_are_computed_without_copying_weights(
    random_model: RandomModel, sized: Sized
) -> None:
    model = random_model(sized(6))
    weights = model.to_weights()
    found = compute_logits(model.config, weights, torch.float64, IDS)
    with torch.no_grad():
        assert torch.equal(found, model(IDS))
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in weights.items())
