"""ZeRO stage 1: each rank holds the optimizer state of its own parameters only.

The losses of a run do not depend on this, so no training test would fail without it.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tokengrow.distributed.parallelize import local_optimizer, shard_optimizer
from tokengrow.optim.adamw import AgedAdamW

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture(params=[0, 1])
def fake_group_of_two(request: pytest.FixtureRequest) -> Iterator[int]:
    """Rank of this process in a fake process group of two."""
    dist.init_process_group("fake", rank=request.param, world_size=2, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_each_rank_holds_the_state_of_half_the_parameters(fake_group_of_two: int) -> None:
    parameters = [nn.Parameter(torch.ones(4, 4)) for _ in range(6)]
    groups = [
        {"params": parameters[:4], "weight_decay": 0.1},
        {"params": parameters[4:], "weight_decay": 0.0},
    ]
    sharded = shard_optimizer(AgedAdamW(groups, lr=0.1))
    local = local_optimizer(sharded)
    assert isinstance(local, AgedAdamW)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    sharded.step()
    assert len(local.state) == 3
    assert [len(group["params"]) for group in local.param_groups] == [2, 1]
    assert [group["weight_decay"] for group in local.param_groups] == [0.1, 0.0]
