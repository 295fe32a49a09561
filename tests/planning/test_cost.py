"""Numbers of a plan: the published sizes and their ladder, computed by hand."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokengrow.distributed.fabric import FabricConfig
from tokengrow.growth.plan import plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.planning.cost import Budget, growth_budget, model_budget, run_budget
from tokengrow.training.config import TrainConfig
from tokengrow.training.recipe import resolve_train

BATCH = 1024 * 2048
"""Tokens per update of the published runs."""


@pytest.fixture
def ladder(composed: Callable[..., dict[str, Any]]) -> TrainConfig:
    """Run 150m -> 450m -> 900m -> 1.5b."""
    return resolve_train(composed("train", "recipes=ladder-150m-to-1.5b"))


def published(name: str) -> Budget:
    """Return the budget of a published size."""
    return model_budget(ModelConfig.preset(name), 4, "32-true")


def test_150m_computed_by_hand() -> None:
    # Embedding; 12 blocks of four roles of 768 tokens and one of 3072, key and value of 768; norm.
    parameters = 50304 * 768 + 12 * (4 * 768 + 3072) * (768 + 768) + 2 * 768
    assert parameters == 151_881_216
    (rung,) = published("150m").rungs
    assert rung.parameters == parameters
    # 6 per parameter, and attention: 6 x 12 layers x 2048 positions x 768 channels.
    assert rung.flops_per_token == 6 * 151_881_216 + 113_246_208 == 1_024_533_504
    assert rung.scratch_flops == 300_000_000_000 * 1_024_533_504


def test_450m_computed_by_hand() -> None:
    parameters = 50304 * 1024 + 24 * (4 * 1024 + 4096) * (1024 + 1024) + 2 * 1024
    assert parameters == 454_166_528
    (rung,) = published("450m").rungs
    assert rung.parameters == parameters
    assert rung.flops_per_token == 6 * 454_166_528 + 301_989_888 == 3_026_989_056


def test_single_model_has_no_stage_and_no_total() -> None:
    budget = published("150m")
    assert budget.total is None
    assert budget.rungs[0].stage is None
    assert budget.rungs[0].appended == ()


def test_ladder_costs_0_287_of_1_5b_from_scratch(ladder: TrainConfig) -> None:
    budget = run_budget(ladder)
    per_token = (1_024_533_504, 3_026_989_056, 5_922_831_360, 10_278_291_456)
    steps = (143_000, 14_306, 14_306, 14_306)
    costs = [s * BATCH * f for s, f in zip(steps, per_token, strict=True)]
    stages = [rung.stage for rung in budget.rungs]
    assert [stage.flops for stage in stages if stage] == costs
    assert [stage.cumulative_flops for stage in stages if stage] == [
        costs[0],
        costs[0] + costs[1],
        costs[0] + costs[1] + costs[2],
        sum(costs),
    ]
    assert budget.total is not None
    assert budget.total.flops == sum(costs) == pytest.approx(8.8413e20, rel=1e-4)
    assert budget.total.steps == 185_918
    assert budget.total.tokens == 185_918 * BATCH
    assert budget.total.hours is None
    last = stages[-1]
    assert last is not None
    assert last.of_scratch == pytest.approx(8.8413e20 / 3.0835e21, rel=1e-4)


def test_first_rung_costs_as_much_as_published_run(ladder: TrainConfig) -> None:
    stage = run_budget(ladder).rungs[0].stage
    assert stage is not None
    assert stage.tokens == 299_892_736_000  # 143,000 updates; 51 more are 300 billion
    assert stage.of_scratch == pytest.approx(299_892_736_000 / 300e9)


def test_size_changes_of_each_rung_by_axis(ladder: TrainConfig) -> None:
    first, second, third, _ = run_budget(ladder).rungs
    assert first.appended == ()
    assert [step.axis for step in second.appended] == ["width", "heads", "tokens", "depth"]
    width, heads, tokens, depth = second.appended
    assert (width.before, width.after) == ({"width": 768}, {"width": 1024})
    assert (heads.before["heads"], heads.after["heads"]) == (12, 16)
    assert (tokens.before["tokens"]["ffn"], tokens.after["tokens"]["ffn"]) == (3072, 4096)
    assert (depth.before, depth.after) == ({"layers": 12}, {"layers": 24})
    heads = third.appended[1]
    assert heads.before == {"heads": 16, "head_dim": 64}
    assert heads.after == {"heads": 16, "head_dim": 80}


def test_hours_are_flops_divided_by_throughput(ladder: TrainConfig) -> None:
    throughput = {"150m": 2e14, "450m": 4e14, "900m": 4e14, "1.5b": 4e14}
    budget = run_budget(ladder, flops_per_second=throughput)
    first = budget.rungs[0].stage
    assert first is not None
    # 299,892,736,000 tokens x 1,024,533,504 FLOPs / 2e14 / 3600
    assert first.hours == pytest.approx(426.74, abs=0.01)
    assert budget.total is not None
    rest = (budget.total.flops - first.flops) / 4e14 / 3600
    assert budget.total.hours == pytest.approx(426.74 + rest, abs=0.01)


def test_run_from_a_checkpoint_grows_in_first_stage(
    tiny_run: Callable[..., TrainConfig], tiny_model: Callable[..., ModelConfig], tmp_path: Path
) -> None:
    run = tiny_run(tmp_path, rungs=(12,))
    source = replace(tiny_model(8), tau=run.stages[0].model.tau)
    (rung,) = run_budget(run, source).rungs
    (step,) = rung.appended
    assert (step.axis, step.before["tokens"]["ffn"], step.after["tokens"]["ffn"]) == (
        "tokens",
        16,
        24,
    )


def test_growth_has_two_sizes_and_no_stages(tiny_model: Callable[..., ModelConfig]) -> None:
    budget = growth_budget(plan_growth(tiny_model(8), tiny_model(12)), 4, "32-true")
    source, grown = budget.rungs
    # 4 more tokens of four roles and 8 of the FFN, key and value of 32, in each of 2 layers.
    assert grown.parameters - source.parameters == 2 * (4 * 4 + 8) * 64
    assert [step.axis for step in grown.appended] == ["tokens"]
    assert (source.stage, grown.stage, budget.total) == (None, None, None)


def test_growth_without_steps_has_only_the_source(tiny_model: Callable[..., ModelConfig]) -> None:
    budget = growth_budget(plan_growth(tiny_model(), tiny_model()), 4, "32-true")
    assert [rung.name for rung in budget.rungs] == ["source"]


def test_memory_uses_precision_and_micro_batch_of_run(
    tiny_run: Callable[..., TrainConfig], tmp_path: Path
) -> None:
    fabric = FabricConfig(accelerator="cpu", precision="bf16-true")
    budget = run_budget(tiny_run(tmp_path, rungs=(8,), fabric=fabric, micro_batch_size=2))
    assert (budget.precision, budget.micro_batch_size) == ("bf16-true", 2)
    (rung,) = budget.rungs
    assert rung.memory.weights == 2 * rung.parameters
