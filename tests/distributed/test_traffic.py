"""What travels between ranks: only rows that change rank, in two all-to-alls each way, and cut experts' gradients."""

from contextlib import contextmanager
from copy import deepcopy
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from oracles import assert_close
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import MoE
from st_moe_pytorch.distributed import shard_experts
from st_moe_pytorch.distributed.agreement import MESSAGE
from st_moe_pytorch.grouped import linear as grouped

DIM, TOKENS = 6, 24


@contextmanager
def recorded():
    """The collectives called, by name, and the bytes that each sends to other ranks."""
    calls = []
    all_to_all, all_gather, all_gather_any = dist.all_to_all_single, dist.all_gather_single, dist.all_gather_object

    def all_to_all_single(output, x, received, sent, group=None):
        rank = dist.get_rank()
        calls.append(("all_to_all", (sum(sent) - sent[rank]) * x[0:1].numel() * x.element_size() if sum(sent) else 0))
        assert len(x) == sum(sent)
        all_to_all(output, x, received, sent, group=group)

    def all_gather_single(output, x, group=None):
        calls.append(("all_gather", x.numel() * x.element_size() * (dist.get_world_size() - 1)))
        all_gather(output, x, group=group)

    def all_gather_object(everyone, mine, group=None):
        calls.append(("all_gather_object", 0))
        all_gather_any(everyone, mine, group=group)

    functions = {f.__name__: f for f in (all_to_all_single, all_gather_single, all_gather_object)}
    with patch.multiple(dist, **functions):
        yield calls


def rows_to_other_ranks(moe, x):
    """Kept choices of this rank's tokens, and those of them whose expert is on another rank. Experts are whole."""
    placement = moe.experts.parallel.placement
    routing = moe.gate.route(x)
    owners = torch.tensor([placement.holders_of(expert)[0] for expert in range(moe.num_experts)])
    return int((routing.kept & (owners[routing.indices] != dist.get_rank())).sum())


def check_traffic(rank, num_experts, dtype):
    torch.manual_seed(0)
    moe = shard_experts(MoE(DIM, num_experts, 1)).to(dtype)
    ranks = dist.get_world_size()
    x = torch.randn(1, TOKENS, DIM, generator=torch.Generator().manual_seed(rank), dtype=dtype, requires_grad=True)
    torch.manual_seed(rank)
    away = torch.tensor([rows_to_other_ranks(moe, x)])
    everyone = [torch.empty_like(away) for _ in range(ranks)]
    dist.all_gather(everyone, away)
    torch.manual_seed(rank)
    with recorded() as calls:
        outputs, *_ = moe(x)
        forward = list(calls)
        (outputs.sum() + outputs.square().sum()).backward()
    backward = calls[len(forward) :]

    # counts, tokens, dtype and width of the results, results
    assert [name for name, _ in forward] == ["all_gather", "all_to_all", "all_gather", "all_to_all"]
    assert forward[0][1] == 256 * 8 * (ranks - 1)
    assert forward[1][1] == away.item() * DIM * x.element_size()
    assert forward[2][1] == 2 * 8 * (ranks - 1)
    assert [name for name, _ in backward] == ["all_to_all"] * 2
    # gradients of results go where the tokens went, and gradients of tokens where the results went
    assert [size for _, size in backward] == [size for _, size in forward[1::2]]
    total = torch.tensor([size for name, size in calls if name == "all_to_all"])
    dist.all_reduce(total)
    assert total.tolist() == [sum(everyone).item() * DIM * x.element_size()] * 4


@pytest.mark.parametrize(("num_experts", "dtype"), [(4, torch.float32), (4, torch.float64), (8, torch.bfloat16)])
@pytest.mark.parametrize("workers", [2, 4], indirect=True)
def test_only_rows_that_change_rank_travel(workers, num_experts, dtype):
    workers.run(check_traffic, num_experts, dtype)


def check_looks_at_data(rank, is_shared):
    """How often a device would have to be waited for: each time that integers of a tensor become Python's."""
    looks, tolist = [], torch.Tensor.tolist
    moe = shard_experts(MoE(DIM, 4))
    rows, offsets = torch.randn(TOKENS, DIM, requires_grad=True), torch.tensor([3, 9, 9, TOKENS - 1], dtype=torch.int32)

    def looked(t):
        looks.append(tuple(t.shape))
        return tolist(t)

    with (
        patch("st_moe_pytorch.experts.may_share_products", lambda t: is_shared),
        patch("st_moe_pytorch.experts.run_shared", lambda experts, rows, offsets: rows),  # has a loop on CPU
        patch.object(torch.Tensor, "tolist", looked),
    ):
        y = moe.experts(rows, offsets)
        assert looks == [(dist.get_world_size(), MESSAGE), *([] if is_shared else [(dist.get_world_size(), 2)])]
        y.sum().backward()
        assert len(looks) == (1 if is_shared else 2)


@pytest.mark.parametrize("is_shared", [True, False])
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_hosts_wait_once_where_products_are_shared_and_twice_where_experts_are_called(workers, is_shared):
    workers.run(check_looks_at_data, is_shared)


def check_equal_shapes(rank, num_experts, is_shared, strategy):
    """The numbers of layers that agree on counts, with no look at data, and as many bytes as there are slots."""
    ranks, looks, tolist = dist.get_world_size(), [], torch.Tensor.tolist
    torch.manual_seed(0)
    moe = MoE(DIM, num_experts, 2, gating_top_n=2, capacity_factor_train=1.25).double()
    moe.gate.policy_train = "threshold"
    other = deepcopy(moe)
    shard_experts(moe, strategy=strategy), shard_experts(other, strategy=strategy, equal_shapes=True)
    generator = torch.Generator().manual_seed(rank)
    x, cotangent = (torch.randn(2, TOKENS, DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.rand(2, TOKENS, generator=generator) < 0.9

    def looked(t):
        looks.append(tuple(t.shape))
        return tolist(t)

    def run(layer):
        inputs = [x.clone().requires_grad_(), *layer.parameters()]
        outputs, loss, *_ = layer(inputs[0], mask=mask)
        return outputs, *torch.autograd.grad((outputs * cotangent).sum() + loss, inputs, allow_unused=True)

    with patch("st_moe_pytorch.experts.may_share_products", lambda t: is_shared):
        expected = run(moe)
        assert not moe.gate.route(x, mask=mask).kept.all()
        # the operators on CPU look at offsets, as the kernel does not
        with patch.object(grouped, "_blocks", wraps=grouped._blocks) as blocks:
            blocks.side_effect = lambda offsets: list(map(slice, [0, *tolist(offsets)], tolist(offsets)))
            with (
                recorded() as calls,
                patch.object(torch.Tensor, "tolist", looked),
                patch("st_moe_pytorch.checks.can_be_looked_at", lambda t: False),  # as on a device
            ):
                found = run(other)
    assert looks == []
    for actual, wanted in zip(found, expected, strict=True):
        assert_close(actual, wanted, may_vanish=True)
    assert all(t.any() for t in found[:2])
    slots = 2 * num_experts * other.gate.capacity(TOKENS)
    if strategy == "all_to_all" and num_experts % ranks == 0:
        assert calls == [("all_to_all", slots * (ranks - 1) // ranks * DIM * 8)] * 4
    assert not any(name.startswith("all_gather_object") for name, _ in calls)

    other.gate.capacity_factor_train = None
    with pytest.raises(ValueError, match=rf"equal_shapes needs experts with fewer slots .* got {TOKENS} slots for"):
        other(x)
    with pytest.raises(ValueError, match="x must be slots where ranks are promised equal shapes"):
        other.experts(x[0], torch.full((num_experts,), TOKENS, dtype=torch.int32))


@pytest.mark.parametrize(
    ("num_experts", "is_shared", "strategy"),
    [(4, True, "all_to_all"), (4, False, "all_to_all"), (5, True, "all_to_all"), (3, False, "all_gather")],
)
@pytest.mark.parametrize("workers", [1, 2, 3], indirect=True)
def test_nobody_waits_where_all_ranks_promise_equal_shapes(workers, num_experts, is_shared, strategy):
    workers.run(check_equal_shapes, num_experts, is_shared, strategy)


class Wide(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x.float()).double()


def check_frozen_elsewhere(rank):
    torch.manual_seed(0)
    moe = MoE(DIM, 4, 2, capacity_factor_train=1.0).requires_grad_(False)
    moe.experts.experts[0].requires_grad_(True)
    shard_experts(moe, equal_shapes=True)
    moe(torch.randn(2, TOKENS, DIM)).outputs.sum().backward()
    if rank == 0:
        assert all(parameter.grad.any() for parameter in moe.experts.experts[0].parameters())


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_experts_of_some_ranks_alone_may_be_trained_with_equal_shapes(workers):
    workers.run(check_frozen_elsewhere)


def check_several_dtypes(rank):
    torch.manual_seed(0)
    experts = [Wide(DIM, DIM) if i % 2 else torch.nn.Linear(DIM, DIM) for i in range(4)]
    moe = MoE(DIM, 4, experts=experts, capacity_factor_train=1.0)
    moe.gate.policy_train = "threshold"
    other, x = deepcopy(moe), torch.randn(2, TOKENS, DIM)
    shard_experts(moe), shard_experts(other, equal_shapes=True)
    found, expected = (each.experts(x.view(1, 4, -1, DIM)) for each in (other, moe))
    assert found.dtype == torch.float64
    assert torch.equal(found, expected)


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_results_of_several_dtypes_with_equal_shapes(workers):
    workers.run(check_several_dtypes)


def check_promises(rank):
    with pytest.raises(RuntimeError, match="the ranks differ, where they must agree, in equal_shapes: True on rank 0"):
        shard_experts(MoE(DIM, 4), equal_shapes=rank == 0)


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_ranks_promise_equal_shapes_together(workers):
    workers.run(check_promises)


def check_cut_experts(rank):
    """Three experts on two ranks: each computes one and half of the second, whose gradient it sends to the other."""
    torch.manual_seed(0)
    moe = shard_experts(MoE(DIM, 3, 1))
    with recorded() as calls:
        outputs, *_ = moe(torch.randn(1, TOKENS, DIM, requires_grad=True))
        outputs.square().sum().backward()
    calls = [call for call in calls if call[0] == "all_to_all"]
    assert len(calls) == 5
    assert calls[3][1] == sum(parameter.numel() for parameter in moe.experts.experts[1].parameters()) * 4


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_cut_experts_send_their_gradients_once(workers):
    workers.run(check_cut_experts)


def check_copies_that_agree(rank):
    """Three ranks hold a copy of the one expert: what they agree on is told in numbers."""
    moe = shard_experts(MoE(DIM, 1, 1, gating_top_n=1))
    with recorded() as calls:
        moe(torch.randn(1, TOKENS, DIM))
    assert [name for name, _ in calls] == ["all_gather", "all_to_all"] * 2


@pytest.mark.parametrize("workers", [3], indirect=True)
def test_copies_that_agree_are_not_listed(workers):
    workers.run(check_copies_that_agree)


def check_checkpointed_experts(rank):
    """Experts that run again in the backward get their tokens again, and stop before their results travel."""
    experts = shard_experts(MoE(DIM, 4, 1)).experts
    x = torch.randn(1, 4, 3, DIM, requires_grad=True)
    with recorded() as calls:
        y = checkpoint(experts, x, use_reentrant=False)
        assert [name for name, _ in calls] == ["all_gather", "all_to_all"] * 2
        calls.clear()
        y.square().sum().backward()
    assert [name for name, _ in calls] == ["all_to_all", "all_gather", "all_to_all", "all_to_all"]


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_checkpointed_experts_stop_before_their_results(workers):
    workers.run(check_checkpointed_experts)
