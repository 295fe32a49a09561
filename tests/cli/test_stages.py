"""What becomes of a recipe's stages: their lengths, their schedules and the rates that they begin
with."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tokengrow.checkpoint.store import Checkpoint, load_checkpoint, save_checkpoint
from tokengrow.data.store import TokenStore
from tokengrow.errors import UserError
from tokengrow.growth.checkpoint import grow_checkpoint
from tokengrow.growth.plan import plan_growth
from tokengrow.model.config import ModelConfig
from tokengrow.optim.config import OptimConfig
from tokengrow.optim.schedule import learning_rate
from tokengrow.training.config import StageConfig, TrainConfig
from tokengrow.training.plateau import PlateauConfig
from tokengrow.training.recipe import resolve_train
from tokengrow.training.trainer import fit

Stages = Callable[..., tuple[StageConfig, ...]]


@pytest.fixture
def stages(composed: Callable[..., dict[str, Any]]) -> Stages:
    """`stages(a, b, ..., *words)`: of a ladder whose entries are these mappings, named in order."""

    def resolve(*given: dict[str, Any] | str | None) -> tuple[StageConfig, ...]:
        entries = [entry for entry in given if not isinstance(entry, str)]
        words = [word for word in given if isinstance(word, str)]
        values = composed("train", "model=tiny", "batch_size=16", *words)
        values["stages"] = dict(zip("abcdef", entries, strict=False))
        return resolve_train(values).stages

    return resolve


# Lengths. An update of model=tiny is 16 sequences of 128 tokens: 2,048.


@pytest.mark.parametrize(
    ("entry", "steps"),
    [
        ({"steps": 7}, 7),
        ({"tokens": 2048 * 7}, 7),
        ({"tokens": 2048 * 7 + 1}, 8),
        ({"tokens": 1}, 1),
        ({"tokens": "1e6"}, 489),  # as YAML reads it: 488.3
        ({"steps": None, "tokens": 2048.0}, 1),
    ],
)
def test_a_stage_has_steps_or_tokens_in_whole_updates(
    stages: Stages, entry: dict[str, Any], steps: int
) -> None:
    (stage,) = stages(entry)
    assert stage.steps == steps


def test_flops_become_the_updates_of_that_stages_size(stages: Stages) -> None:
    larger = {"tokens": {"ffn": 1024}}
    small, large = stages({"flops": 1e13}, {"flops": 1e13, "model": larger})
    # tiny, by hand: 2048 x 128 embedding, 4 layers of 4 x 64 x 256 and 256 x 256, 2 x 128 norm:
    # 786,688 parameters; 6 P + 6 L T W = 6 x 786,688 + 6 x 4 x 128 x 128 = 5,113,344 a token.
    assert small.steps == 955  # 1e13 / (2048 x 5,113,344) = 954.9
    # 768 more tokens of 256 numbers in 4 layers: 1,573,120 parameters, 9,831,936 FLOPs a token.
    assert large.steps == 497  # 1e13 / (2048 x 9,831,936) = 496.6


def test_a_budget_worth_whole_updates_is_not_rounded_up(stages: Stages) -> None:
    (one,) = stages({"steps": 1})
    exactly = 955 * 2048 * one.model.flops_per_token()
    assert stages({"flops": float(exactly)})[0].steps == 955
    assert stages({"flops": float(exactly + 1)})[0].steps == 956


def test_the_cap_of_a_dry_run_holds_for_budgets_too(stages: Stages) -> None:
    (stage,) = stages({"tokens": 1e9}, "max_steps_per_stage=2")
    assert stage.steps == 2


def test_the_last_stage_gets_what_the_others_leave_of_the_runs_flops(stages: Stages) -> None:
    grown = {"model": {"tokens": {"ffn": 1024}}}
    small, large = stages({"steps": 955}, grown, "flops=2e13")
    # By the figures above: 955 updates of the small size are 1.00008e13.
    assert (small.steps, large.steps) == (955, 497)
    (alone,) = stages({}, "flops=2e13")
    assert alone.steps == 1910  # 2e13 / (2048 x 5,113,344) = 1909.9


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ({"steps": 5}, r"^stages\.b\.steps must be null with flops, got 5.*stages\.b\.steps=null"),
        ({"tokens": 5}, r"^stages\.b\.tokens must be null with flops, got 5"),
        ({}, r"^flops leaves nothing for stages\.b: the stages before it need 4\.71e\+10 more"),
    ],
)
def test_flops_of_a_run_that_the_last_stage_cannot_take_are_refused(
    stages: Stages, last: dict[str, Any], said: str
) -> None:
    # Ten updates of the first stage: 10 x 2048 x 5,113,344 = 1.0472e11.
    with pytest.raises(UserError, match=said):
        stages({"steps": 10}, last, "flops=5.76e10")


@pytest.mark.parametrize("given", ["0", "-1e9", "inf", "nan"])
def test_flops_of_a_run_are_a_positive_number(stages: Stages, given: str) -> None:
    with pytest.raises(UserError, match=r"^flops must be a positive number, got "):
        stages({}, f"flops={given}")


def test_a_stage_that_is_null_is_none(stages: Stages) -> None:
    assert [stage.name for stage in stages({"steps": 1}, None, {"steps": 1})] == ["a", "c"]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, r"^stages\.a\.steps is missing\. Set it, or stages\.a\.tokens or stages\.a\.flops"),
        (
            {"steps": 5, "tokens": 1e6},
            r"^stages\.a must have one of .*, got steps and tokens\..*\(stages\.a\.steps=null or ",
        ),
        ({"tokens": 1e6, "flops": 1e15}, r"^stages\.a must have one of .*, got tokens and flops"),
        ({"tokens": 0}, r"^stages\.a\.tokens must be a positive number, got 0"),
        ({"flops": -1e15}, r"^stages\.a\.flops must be a positive number, got -1e\+15"),
        ({"tokens": float("inf")}, r"^stages\.a\.tokens must be a positive number, got inf"),
        ({"tokens": float("nan")}, r"^stages\.a\.tokens must be a positive number, got nan"),
        ({"tokens": "many"}, r"^stages\.a\.tokens"),
        ({"steps": 0}, r"^stages\.a\.steps must be at least 1"),
        ({"steps": 5, "plateau": {"patiense": 2}}, r"stages\.a\.plateau\.patiense.*'patience'"),
        (
            {"steps": 5, "plateau": {}},
            r"^stages\.a\.optim\.schedule must be constant with a plateau",
        ),
    ],
)
def test_a_length_that_is_none_is_refused(stages: Stages, entry: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        stages(entry)


def test_a_budget_waits_for_a_batch_size(stages: Stages) -> None:
    with pytest.raises(UserError, match=r"^batch_size must be at least 1, got 0"):
        stages({"tokens": 1e6}, "batch_size=0")


def test_a_stage_may_have_a_plateau(stages: Stages) -> None:
    entries = [{"steps": 9, "plateau": {"patience": 5}}, {"steps": 9, "plateau": {}}, {"steps": 9}]
    found = [stage.plateau for stage in stages(*entries, "optim.schedule=constant")]
    assert found == [PlateauConfig(patience=5, min_delta=0.01), PlateauConfig(), None]


# Schedules


def schedules(found: tuple[StageConfig, ...]) -> list[str]:
    return [stage.optim.schedule for stage in found]


def test_of_a_ladder_with_wsd_the_last_stage_alone_decays(stages: Stages) -> None:
    steps = {"steps": 5}
    assert schedules(stages(steps, steps, steps, "optim.schedule=wsd")) == [
        "constant",
        "constant",
        "wsd",
    ]
    assert schedules(stages(steps, "optim.schedule=wsd")) == ["wsd"]


def test_a_stage_that_names_a_schedule_keeps_it(stages: Stages) -> None:
    decays = {"steps": 5, "optim": {"schedule": "wsd"}}
    steps = {"steps": 5}
    assert schedules(stages(decays, steps, steps, "optim.schedule=wsd")) == [
        "wsd",
        "constant",
        "wsd",
    ]
    assert schedules(stages(decays, steps, "optim.schedule=cosine")) == ["wsd", "cosine"]


# enter: continue


def continued(**settings: Any) -> dict[str, Any]:
    return {"steps": 5, "optim": {"enter": "continue", **settings}}


@pytest.mark.parametrize(
    ("before", "rate"),
    [
        ({"schedule": "constant"}, 4e-3),
        ({"schedule": "cosine"}, 1e-3),  # min_lr
        ({"schedule": "wsd"}, 1e-3),
        ({"schedule": "constant", "warmup_steps": 20}, 2e-3),  # 10 of 20 updates up
        # 10 of 16 updates down: (1 + cos 112.5 degrees) / 2 of the way from 1e-3 to 4e-3
        ({"schedule": "cosine", "decay_steps": 16}, 1e-3 + 3e-3 * (1 - 0.3826834323650898) / 2),
    ],
)
def test_a_stage_goes_on_at_the_rate_at_which_the_one_before_ended(
    stages: Stages, before: dict[str, Any], rate: float
) -> None:
    words = ("optim.lr=4e-3", "optim.min_lr=1e-3", "optim.warmup_steps=0")
    first, second = stages({"steps": 10, "optim": before}, continued(schedule="constant"), *words)
    assert second.optim.lr == pytest.approx(rate, rel=1e-12)
    ended = learning_rate(first.optim, first.steps, first.steps)
    assert learning_rate(second.optim, 1, second.steps) == ended


def test_the_rate_goes_through_every_stage_that_continues(stages: Stages) -> None:
    found = stages({"steps": 5}, continued(), continued(schedule="wsd"), "optim.schedule=constant")
    # The first stage ends after 5 updates of a warm-up of 100.
    assert [stage.optim.lr for stage in found] == pytest.approx([6e-4, 3e-5, 3e-5], rel=1e-12)


def test_a_min_lr_above_the_rate_is_that_rate(stages: Stages) -> None:
    words = ("optim.lr=4e-3", "optim.min_lr=1e-3", "optim.warmup_steps=0")
    low = {"steps": 5, "optim": {"min_lr": 1e-4}}
    _, second = stages(low, continued(), *words)
    assert (second.optim.lr, second.optim.min_lr) == (1e-4, 1e-4)


def test_a_rate_of_zero_is_not_continued(stages: Stages) -> None:
    with pytest.raises(
        UserError, match=r"^stages\.b\.optim\.enter must be rewarm or peak.*rate of 0"
    ):
        stages({"steps": 5}, continued(), "optim.min_lr=0", "optim.warmup_steps=0")


def test_nothing_is_not_continued(stages: Stages) -> None:
    with pytest.raises(
        UserError, match=r"^stages\.a\.optim\.enter must be rewarm or peak.*no previous stage"
    ):
        stages(continued())
    with pytest.raises(UserError, match=r"^stages\.a\.optim\.enter"):
        stages({"steps": 5}, {"steps": 5}, "optim.enter=continue")


def test_a_stage_that_continues_names_no_rate(stages: Stages) -> None:
    with pytest.raises(UserError, match=r"^stages\.b\.optim\.lr must be null with enter: continue"):
        stages({"steps": 5}, continued(lr=1e-3))


# enter: continue, from a source


@pytest.fixture(scope="module")
def halved(
    tiny_run: Callable[..., TrainConfig],
    store: TokenStore,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two stages of four updates with checkpoints in the middle: from 3e-3, then 5e-3, to 1e-3."""
    run = tiny_run(
        tmp_path_factory.mktemp("halved") / "run",
        rungs=(8, 12),
        steps=4,
        checkpoint_every=2,
        keep_checkpoints=9,
        tokens_from={"data": {"source": "stdlib"}, "tokenizer": {}, "store": str(store.folder)},
    )
    optim = OptimConfig(lr=3e-3, min_lr=1e-3, warmup_steps=0, schedule="wsd", decay_share=1.0)
    first, second = run.stages
    stages = replace(first, optim=optim), replace(second, optim=replace(optim, lr=5e-3))
    fit(replace(run, stages=stages), store)
    return Path(run.out)


def rate_from(source: Path, composed: Callable[..., dict[str, Any]]) -> float:
    words = ("recipes=continue", f"source={source}", "optim.enter=continue")
    (stage,) = resolve_train(composed("train", *words)).stages
    return stage.optim.lr


@pytest.mark.parametrize(
    ("step", "rate"),
    [(2, 2e-3), (4, 1e-3), (6, 3e-3), (8, 1e-3)],  # half-way down in either stage, and its end
)
def test_a_run_goes_on_at_the_rate_at_which_its_source_stood(
    halved: Path, composed: Callable[..., dict[str, Any]], step: int, rate: float
) -> None:
    assert rate_from(halved / f"step_{step:08}", composed) == pytest.approx(rate, rel=1e-12)


def test_what_was_grown_by_itself_goes_on_at_the_end_of_its_run(
    halved: Path,
    composed: Callable[..., dict[str, Any]],
    tiny_model: Callable[..., ModelConfig],
    tmp_path: Path,
) -> None:
    source = load_checkpoint(halved / "step_00000006")
    plan = plan_growth(source.config, tiny_model(16))
    grown = save_checkpoint(tmp_path / "grown", grow_checkpoint(source, plan))
    assert rate_from(grown, composed) == pytest.approx(1e-3, rel=1e-12)


def test_a_source_that_no_run_made_is_not_continued(
    composed: Callable[..., dict[str, Any]],
    tiny_model: Callable[..., ModelConfig],
    tmp_path: Path,
) -> None:
    bare = save_checkpoint(tmp_path / "bare", Checkpoint(tiny_model(8), weights={}))
    words = ["data=text", "data.files=[book.txt]", "recipes=continue", f"source={bare}"]
    with pytest.raises(
        UserError, match=r"stages\.continued\.optim\.enter must be rewarm or peak.*a run wrote"
    ):
        resolve_train(composed("train", *words, "optim.enter=continue"))
