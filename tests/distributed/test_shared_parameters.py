"""Parameters that several ranks hold, for whatever reason: their gradients are sums over all holders, or there is one error everywhere."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from reference import DIM, relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import Expert, MoE
from st_moe_pytorch.distributed import clip_grad_norm_, data_parallel, full_state_dict, shard_experts


class Adapted(nn.Module):
    """An expert of its own, and an adapter."""

    def __init__(self, adapter):
        super().__init__()
        self.own = Expert(DIM, 1)
        self.adapter = adapter

    def forward(self, x):
        return self.own(x) + self.adapter(x)


class Checkpointed(nn.Module):
    """An expert that runs its first half, an `Expert`, again in the backward."""

    def __init__(self, use_reentrant):
        super().__init__()
        self.first, self.last, self.use_reentrant = Expert(DIM, 1), nn.Linear(DIM, DIM), use_reentrant

    def forward(self, x):
        return self.last(checkpoint(self.first, x, use_reentrant=self.use_reentrant))


def experts_with(kind, number):
    """Experts that have parameters in common."""
    if kind == "one adapter for all":
        adapter = nn.Linear(DIM, DIM)
        return [Adapted(adapter) for _ in range(number)]
    if kind == "one expert in two places":
        first, *others = (Expert(DIM, 1 + i % 2) for i in range(number))
        return [first, *others[:-1], first]
    if kind == "tied matrices":
        experts = [nn.Sequential(nn.Linear(DIM, DIM), nn.GELU(), nn.Linear(DIM, DIM)) for _ in range(number)]
        for i, expert in enumerate(experts):
            expert[2].weight = experts[i // 2 * 2][2].weight  # of pairs
        experts[0][0].weight = experts[-1][2].weight
        return experts
    assert kind == "checkpointed"
    return [Checkpointed(use_reentrant=False) for _ in range(number)]


def layer_with(kind, number):
    torch.manual_seed(number)
    return MoE(DIM, number, experts=experts_with(kind, number), balance_loss_coef=0.3).double()


def batch_of(rank):
    generator = torch.Generator().manual_seed(50 + rank)
    return torch.randn(2, 1 + rank % 2, 5 + rank, DIM, generator=generator, dtype=torch.float64)


def backward(layer, rank, scale=1.0):
    x, cotangent = batch_of(rank)
    torch.manual_seed(rank)
    outputs, auxiliary, *_ = layer(x)
    (((outputs * cotangent).sum() + auxiliary) * scale).backward()


def check_gradients(rank, kind, number, mesh_shape):
    ranks, single = dist.get_world_size(), layer_with(kind, number)
    sharded = copy.deepcopy(single)
    for other in range(ranks):
        backward(single, other, 1 / ranks)
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "ep"))
    ddp = data_parallel(shard_experts(sharded, mesh))
    backward(ddp, rank)
    wanted = dict(single.named_parameters(remove_duplicate=False))
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        assert wanted[name].grad.abs().max() > 1e-3, name
        assert relative_error(parameter.grad, wanted[name].grad) < 1e-12, name
    norm = nn.utils.get_total_norm([p.grad for p in single.parameters()])
    assert relative_error(clip_grad_norm_(sharded, 1e-3), norm) < 1e-12
    assert set(full_state_dict(sharded)) == set(single.state_dict())


KINDS = ["one adapter for all", "one expert in two places", "tied matrices", "checkpointed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("workers", "number"), [(2, 4), (3, 4), (2, 3)], indirect=["workers"])
def test_gradients_are_summed_over_all_holders(workers, kind, number):
    workers.run(check_gradients, kind, number, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [4], indirect=True)
def test_gradients_are_summed_over_holders_in_all_replicas(workers, kind):
    workers.run(check_gradients, kind, 3, (2, 2))


def error_of(rank, function, arguments):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        function(rank, *arguments)
    return f"{type(caught.value).__name__}: {caught.value}"


def reentrant(rank, number):
    layer = layer_with("checkpointed", number)
    for expert in layer.experts.experts:
        expert.use_reentrant = True
    layer = shard_experts(layer)
    layer(batch_of(rank)[0].requires_grad_())


def frozen_on_one(rank, mesh_shape):
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "ep"))
    layer = shard_experts(layer_with("checkpointed", 3), mesh)
    if rank == 1:
        layer.experts.experts[1].last.bias.requires_grad_(False)
    layer(batch_of(rank)[0])


def tied_to_the_outside(rank):
    layer = layer_with("one adapter for all", 2)
    model = nn.ModuleDict({"moe": layer, "dense": layer.experts.experts[1].adapter})
    shard_experts(model)


def other_numbers(rank):
    first, second = layer_with("checkpointed", 2), layer_with("checkpointed", 2)
    second.experts.experts[1] = first.experts.experts[0]
    shard_experts(nn.ModuleList([first, second]))


def inside_each_other(rank):
    shard_experts(MoE(DIM, 2, experts=[Expert(DIM), nn.Sequential(layer_with("checkpointed", 2))]))


def problem_on_one_rank(rank):
    shard_experts(nn.Linear(2, 2) if rank else layer_with("checkpointed", 2))


SAME = {
    "reentrant": (
        reentrant,
        (3,),
        "ValueError: experts: expert 1, which several ranks hold, must be checkpointed with use_reentrant=False",
    ),
    "frozen": (frozen_on_one, (None,), "experts: its parameter 1.last.bias is held by ranks 0, 1, and frozen or missing on rank 1: set"),
    "outside": (
        tied_to_the_outside,
        (),
        "ValueError: model must not have a parameter in experts and elsewhere, where it is averaged otherwise: "
        "moe.experts.experts.0.adapter.weight is moe.experts.experts.1.adapter.weight is dense.weight",
    ),
    "other numbers": (other_numbers, (), "under the same numbers, but 0.experts.experts.0.first.net.0.weight is 1.experts.experts.1.first"),
    "nested": (
        inside_each_other,
        (),
        "ValueError: model must not have experts inside experts, .* but experts.experts.1.0.experts is inside",
    ),
    "one rank": (problem_on_one_rank, (), "RuntimeError: shard_experts: .*problem: none on rank 0, model must contain experts, got Linear"),
}


@pytest.mark.parametrize(("function", "arguments", "message"), SAME.values(), ids=SAME)
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_what_cannot_be_right_is_refused_by_name_on_every_rank(workers, function, arguments, message):
    found = workers.run(error_of, function, arguments)
    assert len(set(found)) == 1, found
    assert re.search(message, found[0]), found[0]


@pytest.mark.parametrize("workers", [4], indirect=True)
def test_replicas_that_differ_in_what_is_frozen_are_told_on_every_rank(workers):
    found = workers.run(error_of, frozen_on_one, ((2, 2),))
    assert all("its parameter 1.last.bias is held by ranks 0, 1, and frozen or missing on rank" in message for message in found), found
