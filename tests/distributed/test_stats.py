"""Statistics of routing add up over ranks."""

import pytest
import torch
import torch.distributed as dist

from st_moe_pytorch import MoE
from st_moe_pytorch.tools.watch import RoutingStats, record_routing


def stats_of(rank):
    """Routing of that rank's tokens: as many sequences as its number, of different length, none on rank 0."""
    torch.manual_seed(7)
    moe = MoE(8, 4, capacity_factor_train=0.5)
    generator = torch.Generator().manual_seed(rank)
    moe.gate.policy_train = "threshold"
    with record_routing(moe) as records:
        moe(torch.randn(rank, 5 + 3 * rank, 8, generator=generator))
    return RoutingStats.of(records[""])


def check(rank):
    ranks = dist.get_world_size()
    summed = stats_of(rank).over_ranks()
    expected = sum((stats_of(other) for other in range(1, ranks)), stats_of(0))
    assert summed.tokens == sum(other * (5 + 3 * other) for other in range(ranks))
    for name, value in vars(summed).items():
        if name == "squared_z":
            torch.testing.assert_close(value, expected.squared_z, rtol=1e-12, atol=0)
        else:
            assert torch.equal(value, vars(expected)[name]), name


@pytest.mark.parametrize("workers", [2, 3], indirect=True)
def test_sums_are_those_of_all_ranks(workers):
    workers.run(check)


def check_a_group(rank):
    """Two ranks of three, whose counts are neither those of all nor changed."""
    group = dist.new_group([0, 1])
    if rank == 2:
        return
    mine = stats_of(rank)
    before = {name: value.clone() for name, value in vars(mine).items()}
    summed, expected = mine.over_ranks(group), stats_of(0) + stats_of(1)
    assert all(torch.equal(value, before[name]) for name, value in vars(mine).items())
    for name in ("tokens", "asked", "kept", "choices_at", "dropped_at", "not_asked_at", "without_expert"):
        assert torch.equal(getattr(summed, name), getattr(expected, name)), name


@pytest.mark.parametrize("workers", [3], indirect=True)
def test_sums_over_a_group_are_its_own(workers):
    workers.run(check_a_group)
