"""Parameter groups of the optimizer, and settings that are refused."""

from collections.abc import Callable
from typing import Any

import pytest

from tokengrow.errors import UserError
from tokengrow.model.config import ModelConfig
from tokengrow.model.tokenformer import TokenFormer
from tokengrow.optim.config import OptimConfig, build_optimizer


def test_everything_except_the_final_norm_decays(tiny_model: Callable[..., ModelConfig]) -> None:
    model = TokenFormer(tiny_model())
    decayed, undecayed = build_optimizer(model, OptimConfig(weight_decay=0.3)).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.3
    assert undecayed["weight_decay"] == 0.0
    assert {names[p] for p in undecayed["params"]} == {"final_norm.weight", "final_norm.bias"}
    assert len(decayed["params"]) == 1 + 2 * 5 * 2  # embedding, 2 layers of 5 roles, key and value


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": 0.0}, r"optim\.lr must be above 0, got 0\.0\."),
        ({"lr": 1e-4, "min_lr": 1e-3}, r"optim\.min_lr must be between 0 and lr \(0\.0001\)"),
        ({"warmup_steps": -1}, r"optim\.warmup_steps must be 0 or more, got -1\."),
        ({"betas": (0.9, 1.0)}, r"optim\.betas must be two .* got \(0\.9, 1\.0\)\."),
        ({"eps": 0.0}, r"optim\.eps must be above 0, got 0\.0\."),
        ({"weight_decay": -0.1}, r"optim\.weight_decay must be 0 or more, got -0\.1\."),
        ({"grad_clip": 0.0}, r"optim\.grad_clip must be above 0, got 0\.0\. Use inf"),
        (
            {"decay_steps": 100, "warmup_steps": 100},
            r"optim\.decay_steps must be above warmup_steps \(100\)",
        ),
        (
            {"decay_steps": 100, "schedule": "wsd"},
            r"decay_steps must be null .*Set optim\.decay_s",
        ),
        ({"decay_share": 0.0}, r"optim\.decay_share must be above 0 and at most 1"),
        ({"decay_share": 1.5}, r"optim\.decay_share must be .* got 1\.5\."),
        (
            {"schedule": "linear"},
            r"optim\.schedule must be one of cosine, .*got 'linear'\.",
        ),
        ({"enter": "warm"}, r"optim\.enter must be one of rewarm, continue, peak, got 'warm'\."),
    ],
)
def test_invalid_setting_is_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        OptimConfig(**setting)


def test_constant_stage_can_have_min_lr_above_lr() -> None:
    assert OptimConfig(lr=1e-5, min_lr=6e-5, schedule="constant").lr == 1e-5


def test_decay_steps_ignore_an_unused_warmup() -> None:
    assert OptimConfig(decay_steps=100, warmup_steps=100, enter="peak").warmup == 0
