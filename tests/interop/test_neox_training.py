"""Training keys of a GPT-NeoX YAML: bounds, and batch sizes."""

from typing import Any

import pytest

from tokengrow.errors import UserError
from tokengrow.interop.neox_training import POSITIVE_KEYS, NeoxTraining
from tokengrow.parsing import parse_dataclass


def parse_training(**changes: Any) -> NeoxTraining:
    """Parse the required keys of a run, with these changes."""
    adam = {"lr": 1e-3, "betas": [0.9, 0.95], **changes.pop("adam", {})}
    needed = {"train_iters": 100, "lr_decay_style": "cosine", "optimizer": {"params": adam}}
    return parse_dataclass(NeoxTraining, {**needed, **changes})


def training_error(**changes: Any) -> str:
    """Return the error message of the changes."""
    with pytest.raises(UserError) as error:
        parse_training(**changes)
    return str(error.value)


class TestBounds:
    @pytest.mark.parametrize("key", POSITIVE_KEYS)
    @pytest.mark.parametrize("value", [0, -1])
    def test_positive_keys_are_at_least_one(self, key: str, value: int) -> None:
        assert training_error(**{key: value}) == f"{key} must be at least 1, got {value}."
        assert getattr(parse_training(**{key: 1}), key) == 1

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"gradient_clipping": 0}, "gradient_clipping must be positive, got 0.0. To disable"),
            ({"gradient_clipping": -1}, "gradient_clipping must be positive, got -1.0."),
            ({"adam": {"lr": 0}}, "optimizer.params.lr must be positive, got 0.0."),
            ({"adam": {"lr": "nan"}}, "optimizer.params.lr must be positive"),
            ({"adam": {"eps": 0}}, "optimizer.params.eps must be positive, got 0.0."),
            ({"adam": {"betas": [0.9, 1]}}, "optimizer.params.betas must be in [0, 1), got [0.9,"),
            (
                {"adam": {"betas": [-0.1, 0.9]}},
                "optimizer.params.betas must be in [0, 1), got [-0.1,",
            ),
            ({"min_lr": -1e-5}, "min_lr must be in [0, 0.001] (optimizer.params.lr), got"),
            ({"min_lr": 2e-3}, "min_lr must be in [0, 0.001] (optimizer.params.lr), got"),
            ({"warmup": -0.1}, "warmup must be in [0, 1), got -0.1."),
            ({"warmup": 1}, "warmup must be in [0, 1), got 1.0."),
            ({"weight_decay": -0.1}, "weight_decay must be at least 0, got -0.1."),
            ({"seed": -1}, "seed must be in [0, 2**63), got -1."),
        ],
    )
    def test_number_out_of_bounds_is_an_error(self, changes: dict[str, Any], message: str) -> None:
        assert training_error(**changes).startswith(message)

    def test_bounds_are_inclusive(self) -> None:
        edge = parse_training(warmup=0, weight_decay=0, min_lr=1e-3, seed=0, adam={"betas": [0, 0]})
        assert (edge.warmup, edge.min_lr) == (0.0, 1e-3)
        assert (
            parse_training(lr_decay_style="constant", min_lr=1).min_lr == 1
        )  # a constant rate does not use it

    def test_error_names_every_invalid_key(self) -> None:
        message = training_error(
            eval_iters=0, lr_decay_style="linear", data_impl="cached", warmup=2
        )
        assert all(
            key in message for key in ("eval_iters", "lr_decay_style", "data_impl", "warmup")
        )


class TestBatch:
    @pytest.mark.parametrize(
        ("given", "micro", "accumulated", "gpus", "batch_size", "micro_batch_size"),
        [
            (None, 32, 4, 8, 1024, 32),
            (None, 32, 4, None, None, 32),
            (1024, 32, 4, 8, 1024, 32),
            (1024, 32, 4, None, 1024, 32),
            (1024, None, 1, 8, 1024, 128),
            (1024, None, 4, 8, 1024, 32),
            (1024, None, 4, None, 1024, None),
            (None, None, 1, 8, None, None),
        ],
    )
    def test_missing_batch_sizes_are_computed(
        self,
        given: int | None,
        micro: int | None,
        accumulated: int,
        gpus: int | None,
        batch_size: int | None,
        micro_batch_size: int | None,
    ) -> None:
        training = parse_training(
            train_batch_size=given,
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=accumulated,
        )
        assert training.batch_size(gpus) == batch_size
        assert training.micro_batch_size(gpus) == micro_batch_size

    def test_inconsistent_batch_sizes_are_errors(self) -> None:
        with pytest.raises(
            UserError, match=r"train_batch_size must be a multiple of gpus=8 x .*, got 100"
        ):
            parse_training(train_batch_size=100).micro_batch_size(8)
        several = parse_training(
            train_batch_size=100, train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=3
        )
        with pytest.raises(
            UserError, match=r"train_batch_size must be 96, 8 x 3 on each of gpus=4, got 100"
        ):
            several.batch_size(4)
        with pytest.raises(
            UserError, match=r"train_batch_size must be a multiple of 8 x 3, .*, got 100"
        ):
            several.batch_size(None)
