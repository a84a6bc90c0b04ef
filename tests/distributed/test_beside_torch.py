"""Sharded models inside what torch wraps around models: DDP's buckets, checkpointing modules, FSDP."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from reference import DIM, different_experts, largest_error
from torch import nn

from st_moe_pytorch import MoE
from st_moe_pytorch.distributed import data_parallel, shard_experts
from st_moe_pytorch.distributed.compat import timeout_of


class Branches(nn.Module):
    """Two sparse layers between dense ones, of which each rank uses its own."""

    def __init__(self):
        super().__init__()
        # DDP averages in the opposite order of these lines, and at once what a rank does not use
        self.last = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))
        self.moes = nn.ModuleList(MoE(DIM, 3, experts=different_experts(3)) for _ in range(2))
        self.first = nn.ModuleList(nn.Linear(DIM, DIM) for _ in range(2))

    def forward(self, x, branch):
        x = self.first[branch](x)
        for moe in self.moes:
            x = x + moe(x).outputs
        return self.last[branch](x)


def branches_loss(model, branch):
    torch.manual_seed(branch)
    x, cotangent = torch.randn(2, 2, 4 + branch, DIM, dtype=torch.float64)
    return (model(x, branch) * cotangent).sum()


def check_branches(rank):
    torch.manual_seed(0)
    model = Branches().double()
    expected = copy.deepcopy(model)
    (sum(branches_loss(expected, branch) for branch in range(2)) / 2).backward()
    # of some parameters each, as a large model's are by default
    ddp = data_parallel(shard_experts(model), find_unused_parameters=True, bucket_cap_mb=1e-4)
    for _ in range(3):
        ddp.zero_grad()
        branches_loss(ddp, rank).backward()
    name, error = largest_error(model, expected)
    assert error < 1e-12, (name, error)


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_ranks_that_use_different_dense_layers(workers):
    workers.run(check_branches)


def check_group_of_ddp(rank):
    """One beside that of experts, for all models, as patient; none where nothing else talks in the default group."""
    first, second = (data_parallel(shard_experts(MoE(DIM, 2))).process_group for _ in range(2))
    assert first is second is not dist.group.WORLD
    assert dist.get_process_group_ranks(first) == [0, 1]
    assert timeout_of(first) == timeout_of(dist.group.WORLD) != timedelta(minutes=30)
    assert data_parallel(nn.Linear(2, 2)).process_group is dist.group.WORLD
    own = dist.new_group()
    assert data_parallel(shard_experts(MoE(DIM, 2), own)).process_group is dist.group.WORLD
    assert data_parallel(shard_experts(MoE(DIM, 2)), own).process_group is own


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_ddp_has_a_group_of_its_own(workers):
    workers.run(check_group_of_ddp)
