"""The GPT-NeoX YAML: the run that it describes, and what of it tokengrow does not have."""

from typing import Any

import pytest

from tokengrow.errors import UserError
from tokengrow.interop.neox_training import AT_LEAST_ONE, NeoxTraining
from tokengrow.parsing import parse_dataclass


def keys(**changes: Any) -> NeoxTraining:
    """The few keys that a run needs, with these changed."""
    adam = {"lr": 1e-3, "betas": [0.9, 0.95], **changes.pop("adam", {})}
    needed = {"train_iters": 100, "lr_decay_style": "cosine", "optimizer": {"params": adam}}
    return parse_dataclass(NeoxTraining, {**needed, **changes})


def refused(**changes: Any) -> str:
    with pytest.raises(UserError) as error:
        keys(**changes)
    return str(error.value)


class TestBounds:
    @pytest.mark.parametrize("key", AT_LEAST_ONE)
    @pytest.mark.parametrize("value", [0, -1])
    def test_what_is_counted_is_at_least_one(self, key: str, value: int) -> None:
        assert refused(**{key: value}) == f"{key} must be at least 1, not {value}"
        assert getattr(keys(**{key: 1}), key) == 1

    @pytest.mark.parametrize(
        ("changes", "said"),
        [
            ({"gradient_clipping": 0}, "gradient_clipping must be positive, not 0.0: to clip"),
            ({"gradient_clipping": -1}, "gradient_clipping must be positive, not -1.0"),
            ({"adam": {"lr": 0}}, "optimizer.params.lr must be positive, not 0.0"),
            ({"adam": {"lr": "nan"}}, "optimizer.params.lr must be positive"),
            ({"adam": {"eps": 0}}, "optimizer.params.eps must be positive, not 0.0"),
            ({"adam": {"betas": [0.9, 1]}}, "optimizer.params.betas must lie in [0, 1), not [0.9,"),
            ({"adam": {"betas": [-0.1, 0.9]}}, "optimizer.params.betas must lie in [0, 1)"),
            ({"min_lr": -1e-5}, "min_lr must lie between 0 and optimizer.params.lr (0.001), not"),
            ({"min_lr": 2e-3}, "min_lr must lie between 0 and optimizer.params.lr (0.001), not"),
            ({"warmup": -0.1}, "warmup must lie in [0, 1), not -0.1"),
            ({"warmup": 1}, "warmup must lie in [0, 1), not 1.0"),
            ({"weight_decay": -0.1}, "weight_decay must be at least 0, not -0.1"),
            ({"seed": -1}, "seed must be in [0, 2**63), got -1."),
        ],
    )
    def test_a_number_that_no_run_can_have_is_named(
        self, changes: dict[str, Any], said: str
    ) -> None:
        assert refused(**changes).startswith(said)

    def test_numbers_on_the_edge_are_taken(self) -> None:
        edge = keys(warmup=0, weight_decay=0, min_lr=1e-3, seed=0, adam={"betas": [0, 0]})
        assert (edge.warmup, edge.min_lr) == (0.0, 1e-3)
        assert keys(lr_decay_style="constant", min_lr=1).min_lr == 1  # where nothing falls to it

    def test_all_that_is_wrong_is_named_at_once(self) -> None:
        said = refused(eval_iters=0, lr_decay_style="linear", data_impl="cached", warmup=2)
        assert all(key in said for key in ("eval_iters", "lr_decay_style", "data_impl", "warmup"))


class TestBatch:
    @pytest.mark.parametrize(
        ("whole", "micro", "accumulated", "gpus", "batch", "share"),
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
    def test_the_numbers_that_are_there_give_the_others(
        self,
        whole: int | None,
        micro: int | None,
        accumulated: int,
        gpus: int | None,
        batch: int | None,
        share: int | None,
    ) -> None:
        found = keys(
            train_batch_size=whole,
            train_micro_batch_size_per_gpu=micro,
            gradient_accumulation_steps=accumulated,
        )
        assert (found.batch_size(gpus), found.micro_batch_size(gpus)) == (batch, share)

    def test_what_does_not_divide_is_named(self) -> None:
        with pytest.raises(UserError, match=r"train_batch_size is 100, no multiple of gpus=8 x"):
            keys(train_batch_size=100).micro_batch_size(8)
        several = keys(
            train_batch_size=100, train_micro_batch_size_per_gpu=8, gradient_accumulation_steps=3
        )
        with pytest.raises(UserError, match=r"train_batch_size is 100, and 8 x 3 on each of gpus"):
            several.batch_size(4)
        with pytest.raises(UserError, match=r"train_batch_size is 100, no multiple of the 8 x 3"):
            several.batch_size(None)
