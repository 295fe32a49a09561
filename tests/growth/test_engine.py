"""Python API of growth: a model in, a larger model out."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from growing import grow_model

import tokengrow
from tokengrow.checkpoint.store import Checkpoint
from tokengrow.errors import UserError
from tokengrow.growth.config import GrowthConfig
from tokengrow.growth.engine import apply_growth, verify_growth
from tokengrow.growth.plan import plan_growth
from tokengrow.growth.verify import DriftError
from tokengrow.interop.neox import write_neox
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer

Sized = Callable[..., ModelConfig]
RandomModel = Callable[..., TokenFormer]
IDS = torch.randint(40, (2, 12), generator=torch.Generator().manual_seed(3))


def test_growth_in_three_lines_of_python(
    random_model: RandomModel, sized: Sized, tmp_path: Path
) -> None:
    tokengrow.save_checkpoint(tmp_path / "small", random_model(sized(6), dtype=torch.float32))
    model = tokengrow.load_checkpoint(tmp_path / "small").model
    bigger = tokengrow.grow(model, target=sized(10)).model
    with torch.no_grad():
        torch.testing.assert_close(bigger(IDS), model(IDS), rtol=1e-5, atol=1e-5)


def test_grown_model_has_source_precision_and_eval_mode(
    random_model: RandomModel, sized: Sized
) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        bigger = grow_model(random_model(sized(6), dtype=dtype), sized(10))
        assert {p.dtype for p in bigger.parameters()} == {dtype}
        assert not bigger.training


def test_source_is_not_modified_by_growing_or_training(
    random_model: RandomModel, sized: Sized
) -> None:
    model = random_model(sized(6)).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    bigger = grow_model(model, sized(10))
    with torch.no_grad():
        for parameter in bigger.parameters():
            parameter.add_(1.0)
    assert model.training and model.config == sized(6)
    assert all(torch.equal(model.state_dict()[name], old) for name, old in before.items())


def test_same_seed_gives_the_same_values(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    first, again, other = (
        grow_model(model, sized(10), GrowthConfig(seed=seed)).state_dict() for seed in (1, 1, 2)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    name = "blocks.0.ffn.value_param_tokens"
    assert not torch.equal(first[name], other[name])
    assert torch.equal(first[name][:12], other[name][:12])


def test_global_generator_is_not_used(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    before = torch.get_rng_state()
    grow_model(model, sized(10))
    assert torch.equal(torch.get_rng_state(), before)


def test_growing_to_the_same_size_is_a_copy(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    copy = grow_model(model, sized(6))
    assert copy is not model
    for name, tensor in model.state_dict().items():
        assert torch.equal(copy.state_dict()[name], tensor)
        assert copy.state_dict()[name].data_ptr() != tensor.data_ptr()


def test_report_has_steps_settings_and_drift(random_model: RandomModel, sized: Sized) -> None:
    config = GrowthConfig(seed=4, new_value_scale=0.5)
    plan = plan_growth(sized(6), sized(10), config=config)
    report = apply_growth(plan, random_model(sized(6)).state_dict(), {}).report
    (step,) = report["steps"]
    assert step["axis"] == "tokens"
    assert step["changes"]["tokens.ffn"] == (12, 20)
    assert (report["seed"], report["new_value_scale"]) == (4, 0.5)
    assert report["drift"]["dtype"] == "float64"
    assert report["drift"]["relative"] < 1e-12
    assert json.loads(json.dumps(report))["drift"] == report["drift"]


def test_given_probe_is_used(random_model: RandomModel, sized: Sized) -> None:
    plan, weights = plan_growth(sized(6), sized(10)), random_model(sized(6)).state_dict()
    grown = apply_growth(plan, weights, {}, probe=IDS[:, :6])
    assert grown.report["drift"]["probe_tokens"] == 2 * 5
    assert apply_growth(plan, weights, {}).report["drift"]["probe_tokens"] == 2 * 12


def test_damaged_weights_are_refused(random_model: RandomModel, sized: Sized) -> None:
    plan, weights = plan_growth(sized(6), sized(10)), random_model(sized(6)).state_dict()
    grown = apply_growth(plan, weights, {}).weights
    verify_growth(plan, weights, grown)
    broken = {**grown, "embedding.weight": grown["embedding.weight"] * 1.001}
    with pytest.raises(DriftError):
        verify_growth(plan, weights, broken)


def test_source_with_nan_is_refused(random_model: RandomModel, sized: Sized) -> None:
    model = random_model(sized(6))
    with torch.no_grad():
        model.blocks[0].ffn.key_param_tokens[0, 0] = torch.nan
    with pytest.raises(DriftError, match="nan"):
        grow_model(model, sized(10))


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan")])
def test_new_value_scale_of_zero_is_refused(scale: float) -> None:
    with pytest.raises(UserError, match=r"growth\.new_value_scale must be above 0, got"):
        GrowthConfig(new_value_scale=scale)


def test_a_negative_tolerance_is_refused() -> None:
    with pytest.raises(UserError, match=r"growth\.tolerance must be 0 or more, got -1e-05\."):
        GrowthConfig(tolerance=-1e-5)


def test_a_smaller_target_is_refused(random_model: RandomModel, sized: Sized) -> None:
    with pytest.raises(UserError, match=r"model\.tokens\.query must be at least 6, got 5\."):
        grow_model(random_model(sized(6)), sized(5))


class TestPublishedGrowth:
    """growth=published: the growth of the published code, which changes the function."""

    CONFIG = GrowthConfig(
        init="published", tau="recompute", optimizer="fresh", tolerance=float("inf")
    )

    def test_new_tokens_are_drawn_as_in_a_new_model(
        self, random_model: RandomModel, sized: Sized
    ) -> None:
        source = random_model(sized(6))
        grown = grow_model(source, sized(606), self.CONFIG).state_dict()
        for name, old in source.state_dict().items():
            assert torch.equal(grown[name][: len(old)], old)
            if name.endswith("_param_tokens"):
                new = grown[name][len(old) :]
                # keys N(0, 0.02), values N(0, 2 / L / sqrt(D)) = 2 / 2 / 4
                wanted = 0.02 if name.endswith("key_param_tokens") else 0.25
                assert new.std().item() == pytest.approx(wanted, rel=0.03)

    def test_tau_is_that_of_a_new_model_of_this_size(
        self, random_model: RandomModel, sized: Sized
    ) -> None:
        grown = grow_model(random_model(sized(6)), sized(9), self.CONFIG)
        assert grown.config == sized(9)

    def test_report_has_the_jump_and_the_settings(
        self, random_model: RandomModel, sized: Sized
    ) -> None:
        plan = plan_growth(sized(6), sized(9), config=self.CONFIG)
        state = {"exp_avg.embedding.weight": torch.zeros(1)}
        grown = apply_growth(plan, random_model(sized(6)).to_weights(), state)
        assert grown.report["drift"]["max_logit"] > 0.1
        assert (grown.report["init"], grown.report["tau"]) == ("published", "recompute")
        assert not any(key.startswith("exp_avg") for key in grown.optimizer)

    def test_default_tolerance_refuses_it(self, random_model: RandomModel, sized: Sized) -> None:
        for config in (GrowthConfig(init="published"), GrowthConfig(tau="recompute")):
            with pytest.raises(DriftError):
                grow_model(random_model(sized(6)), sized(9), config)

    def test_other_axes_are_refused(self, random_model: RandomModel, sized: Sized) -> None:
        with pytest.raises(UserError, match=r"only parameter tokens.*got width, depth\."):
            grow_model(
                random_model(sized(6)), sized(9, width=24, head_dim=8, layers=3), self.CONFIG
            )

    def test_published_code_can_load_the_result(
        self, random_model: RandomModel, sized: Sized, tmp_path: Path
    ) -> None:
        kept = grow_model(random_model(sized(6, init="published")), sized(9))
        published = grow_model(random_model(sized(6, init="published")), sized(9), self.CONFIG)
        write_neox(tmp_path, Checkpoint.of(published))
        with pytest.raises(UserError, match=r"model\.tau"):
            write_neox(tmp_path, Checkpoint.of(kept))


@pytest.mark.parametrize("key", ["init", "tau", "optimizer"])
def test_invalid_choice_is_named(key: str) -> None:
    with pytest.raises(UserError, match=rf"growth\.{key} must be one of .*, got 'x'\."):
        GrowthConfig(**{key: "x"})
