"""The Python door to growth: a model in, a larger model out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import tokengrow
from tokengrow.errors import UserError
from tokengrow.growth.engine import GrowthConfig, carry_out, grow, verify_growth
from tokengrow.growth.plan import plan_growth
from tokengrow.growth.verify import DriftError
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

Sized = Callable[..., ModelConfig]
RandomModel = Callable[..., TokenFormer]
IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(3))


def test_three_lines_of_python(random_model: RandomModel, sized: Sized, tmp_path: Path) -> None:
    tokengrow.save_checkpoint(tmp_path / "small", random_model(sized(6), dtype=torch.float32))
    model = tokengrow.load_checkpoint(tmp_path / "small").model
    bigger = tokengrow.grow(model, target=sized(10))
    with torch.no_grad():
        torch.testing.assert_close(bigger(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_the_grown_model_has_the_precision_of_its_source_and_is_in_eval_mode(
    random_model: RandomModel, sized: Sized
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bigger = grow(random_model(sized(6), dtype=dtype), sized(10))
        assert {p.dtype for p in bigger.parameters()} == {dtype}
        assert not bigger.training


def test_the_source_is_untouched_by_growing_and_by_training_the_grown_model(
    random_model: RandomModel, sized: Sized
) -> None:
    model = random_model(sized(6)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bigger = grow(model, sized(10))
    with torch.no_grad():
        for parameter in bigger.parameters():
            parameter.add_(1.0)
    assert model.training and model.config == sized(6)
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())


def test_a_seed_bears_the_same_values_again(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    first, again, other = (
        grow(model, sized(10), GrowthConfig(seed=seed)).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "blocks.0.ffn.value_param_tokens"
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name][:12], other[name][:12])


def test_the_global_generator_is_left_alone(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    before = torch.get_rng_state()
    grow(model, sized(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_growing_to_the_same_size_is_a_copy(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    copy = grow(model, sized(6))
    assert copy is not model
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
        assert copy.state_dict()[name].data_ptr() != tensor.data_ptr()


def test_the_report_says_what_happened(random_model: RandomModel, sized: Sized) -> None:
    plan = plan_growth(sized(6), sized(10))
    config = GrowthConfig(seed=4, new_value_scale=0.5)
    report = carry_out(plan, random_model(sized(6)).state_dict(), {}, config).report
    (step,) = report["steps"]
    assert step["axis"] == "tokens"
    assert step["changes"]["tokens.ffn"] == (12, 20)
    assert (report["seed"], report["new_value_scale"]) == (4, 0.5)
    assert report["drift"]["dtype"] == "float64"
    assert report["drift"]["relative"] < 1e-12
    assert json.loads(json.dumps(report))["drift"] == report["drift"]


def test_the_probe_may_be_given(random_model: RandomModel, sized: Sized) -> None:
    plan, weights = plan_growth(sized(6), sized(10)), random_model(sized(6)).state_dict()
    grown = carry_out(plan, weights, {}, GrowthConfig(), probe=IDS[:, :6])
    assert grown.report["drift"]["probe_tokens"] == 2 * 5
    assert carry_out(plan, weights, {}, GrowthConfig()).report["drift"]["probe_tokens"] == 2 * 12


def test_damaged_weights_are_found_out(random_model: RandomModel, sized: Sized) -> None:
    plan, weights = plan_growth(sized(6), sized(10)), random_model(sized(6)).state_dict()
    grown = carry_out(plan, weights, {}, GrowthConfig()).weights
    verify_growth(plan, weights, grown, GrowthConfig())
    broken = {**grown, "embedding.weight": grown["embedding.weight"] * 1.001}
    with pytest.raises(DriftError):
        verify_growth(plan, weights, broken, GrowthConfig())


def test_a_source_with_nan_is_refused(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    with torch.no_grad():
        model.blocks[0].ffn.key_param_tokens[0, 0] = torch.nan
    with pytest.raises(DriftError, match="nan"):
        grow(model, sized(10))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_new_values_of_zero_are_refused(scale: float) -> None:
    with pytest.raises(UserError, match=r"growth\.new_value_scale must be positive, not"):
        GrowthConfig(new_value_scale=scale)


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(UserError, match=r"growth\.tolerance must not be negative: -1e-05"):
        GrowthConfig(tolerance=-1e-5)


def test_a_smaller_target_is_refused(random_model: RandomModel, sized: Sized) -> None:
    with pytest.raises(UserError, match=r"model\.tokens\.query: 6 -> 5"):
        grow(random_model(sized(6)), sized(5))
