"""ZeRO stage 1: that a rank keeps the state of its parameters alone, on which no loss depends."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from tokengrow.distributed.parallelize import own_part, share_optimizer
from tokengrow.optim.adamw import AgedAdamW

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="needs torch.distributed")


@pytest.fixture(params=[0, 1])
def one_of_two(request: pytest.FixtureRequest) -> Iterator[int]:
    """The rank of this process among two, of which the other one is imagined."""
    dist.init_process_group("fake", rank=request.param, world_size=2, store=FakeStore())
    yield request.param
    dist.destroy_process_group()


def test_each_of_two_ranks_keeps_the_state_of_half_the_parameters(one_of_two: int) -> None:
    parameters = [nn.Parameter(torch.ones(4, 4)) for _ in range(6)]
    groups = [
        {"params": parameters[:4], "weight_decay": 0.1},
        {"params": parameters[4:], "weight_decay": 0.0},
    ]
    shared = share_optimizer(AgedAdamW(groups, lr=0.1))
    own = own_part(shared)
    assert isinstance(own, AgedAdamW)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    shared.step()
    assert len(own.state) == 3
    assert [len(group["params"]) for group in own.param_groups] == [2, 1]
    assert [group["weight_decay"] for group in own.param_groups] == [0.1, 0.0]
