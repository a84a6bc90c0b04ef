"""Parameters that several ranks hold, for any reason: gradients summed over all holders, or one error everywhere."""

import copy
import re

import pytest
import torch
import torch.distributed as dist
from reference import DIM, relative_error
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import Expert, Experts, MoE
from st_moe_pytorch.distributed import clip_grad_norm_, data_parallel, full_state_dict, shard_experts
from st_moe_pytorch.distributed.placement import Placement
from st_moe_pytorch.distributed.sharding import ties_of


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


class Turned(nn.Module):
    """An expert with a matrix under two names, and gradients of unusual layout.

    The gradient of another matrix is transposed, and that of a vector is one number, expanded.
    """

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(DIM, DIM, bias=False), nn.Linear(DIM, DIM, bias=False)
        self.last.weight = self.first.weight
        self.turned, self.shift = nn.Parameter(torch.randn(DIM, DIM)), nn.Parameter(torch.randn(DIM))

    def forward(self, x):
        return self.last(self.first(x).tanh() @ self.turned.t()) + self.shift.sum() * x


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
    if kind == "turned":
        return [Turned() for _ in range(number)]
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


KINDS = ["one adapter for all", "one expert in two places", "tied matrices", "turned", "checkpointed"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("workers", "number"), [(2, 4), (3, 4), (3, 3), (2, 3)], indirect=["workers"])
def test_gradients_are_summed_over_all_holders(workers, kind, number):
    workers.run(check_gradients, kind, number, None)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("workers", [4], indirect=True)
def test_gradients_are_summed_over_holders_in_all_replicas(workers, kind):
    workers.run(check_gradients, kind, 3, (2, 2))


def test_ties_of_more_than_ten_experts():
    experts = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(12)])
    experts[11].weight = experts[5].weight
    assert ties_of(experts, Placement(12, 2)) == dict.fromkeys(("5.weight", "11.weight"), ("5.weight", (0, 1)))


def check_what_is_trained_later(rank):
    """Experts that were frozen in a first step, and one that is so from then on."""
    single = layer_with("checkpointed", 3)
    sharded = shard_experts(copy.deepcopy(single))
    for step in range(2):
        for layer in (single, sharded):
            for number, expert in enumerate(layer.experts.experts):
                if expert is not None:
                    expert.requires_grad_((number == 1) == bool(step))
            layer.zero_grad()
        for other in range(2):
            backward(single, other, 1 / 2)
        backward(sharded, rank)
        wanted = dict(single.named_parameters())
        for name, parameter in sharded.experts.named_parameters():
            theirs = wanted[f"experts.{name}"].grad
            assert (parameter.grad is None) == (theirs is None), name
            assert theirs is None or relative_error(parameter.grad, theirs) < 1e-12, name


def check_reentrant_elsewhere(rank):
    """What comes before the experts, and experts that one rank holds, may be checkpointed by the reentrant kind."""
    torch.manual_seed(0)
    experts = [Checkpointed(use_reentrant=number != 1) for number in range(3)]
    single = nn.ModuleList([Expert(DIM), MoE(DIM, 3, experts=experts)]).double()
    sharded = shard_experts(copy.deepcopy(single))
    found = []
    for model, ranks in ((sharded, [rank]), (single, range(2))):
        for other in ranks:
            x, cotangent = batch_of(other)
            torch.manual_seed(other)
            tokens = checkpoint(model[0], x.requires_grad_(), use_reentrant=True)
            (model[1](tokens).outputs * cotangent).sum().backward()
            if other == rank:
                found.append(x.grad)
    assert relative_error(*found) < 1e-12
    wanted = dict(single.named_parameters())
    for name, parameter in sharded[1].experts.named_parameters(prefix="1.experts"):
        assert relative_error(parameter.grad, wanted[name].grad / 2) < 1e-12, name


@pytest.mark.parametrize("check", [check_what_is_trained_later, check_reentrant_elsewhere])
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_gradients_are_those_of_one_process(workers, check):
    workers.run(check)


def error_of(rank, function, arguments):
    with pytest.raises((RuntimeError, ValueError)) as caught:
        function(rank, *arguments)
    return f"{type(caught.value).__name__}: {caught.value}"


def reentrant(rank, number, which):
    layer = layer_with("checkpointed", number)
    for i in which:
        layer.experts.experts[i].use_reentrant = True
    layer = shard_experts(layer)
    layer(batch_of(rank)[0].requires_grad_())


def frozen(rank, number, starts, mesh_shape=None):
    """starts: what the names of the parameters that a rank has frozen start with."""
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape, mesh_dim_names=("dp", "ep"))
    layer = shard_experts(layer_with("checkpointed", number), mesh)
    for name, parameter in layer.experts.experts.named_parameters():
        parameter.requires_grad_(not (rank in starts and name.startswith(starts[rank])))
    layer(batch_of(rank)[0])


def tied_to_the_outside(rank):
    layer = layer_with("one adapter for all", 2)
    model = nn.ModuleDict({"moe": layer, "dense": layer.experts.experts[1].adapter})
    shard_experts(model)


def tied_to_a_neighbour_of_the_list(rank):
    layer = layer_with("checkpointed", 2).experts
    layer.experts_too = layer.experts[1].last
    shard_experts(layer)


def of_other_length(rank):
    first, second = layer_with("checkpointed", 2), layer_with("checkpointed", 4)
    second.experts.experts[0] = first.experts.experts[0]
    shard_experts(nn.ModuleList([first, second]))


def other_numbers(rank):
    first, second = layer_with("checkpointed", 2), layer_with("checkpointed", 2)
    second.experts.experts[1] = first.experts.experts[0]
    shard_experts(nn.ModuleList([first, second]))


def inside_each_other(rank):
    shard_experts(MoE(DIM, 2, experts=[Expert(DIM), nn.Sequential(layer_with("checkpointed", 2))]))


def inside_the_model(rank):
    shard_experts(Experts([Expert(DIM), nn.Sequential(layer_with("checkpointed", 2))]))


def problem_on_one_rank(rank):
    shard_experts(nn.Linear(2, 2) if rank else layer_with("checkpointed", 2))


SAME = {
    "reentrant": (
        reentrant,
        (3, range(3)),
        "ValueError: experts: expert 1, which several ranks hold, must be checkpointed with use_reentrant=False",
    ),
    "frozen": (
        frozen,
        (3, {1: "1.last.bias"}),
        "experts: its parameter 1.last.bias is held by ranks 0, 1, and frozen or missing on rank 1: set",
    ),
    "frozen on the first": (
        frozen,
        (3, {0: "1.last.bias"}),
        "its parameter 1.last.bias is held by ranks 0, 1, and frozen or missing on rank 0",
    ),
    "as many frozen": (
        frozen,
        (3, {0: "1.last.bias", 1: "1.last.weight"}),
        "its parameter 1.last.weight is held by .* missing on rank 1",
    ),
    "outside": (
        tied_to_the_outside,
        (),
        "ValueError: model must not have a parameter in experts and elsewhere, where it is averaged otherwise: "
        "moe.experts.experts.0.adapter.weight is moe.experts.experts.1.adapter.weight is dense.weight",
    ),
    "neighbour": (
        tied_to_a_neighbour_of_the_list,
        (),
        "and elsewhere, .*: experts.1.last.weight is experts_too.weight",
    ),
    "other length": (
        of_other_length,
        (),
        "under the same numbers, but 0.experts.experts.0.first.net.0.weight is 1.experts.experts.0.first",
    ),
    "other numbers": (
        other_numbers,
        (),
        "under the same numbers, but 0.experts.experts.0.first.net.0.weight is 1.experts.experts.1.first",
    ),
    "nested": (
        inside_each_other,
        (),
        "ValueError: model must not have experts inside experts, .* but experts.experts.1.0.experts is inside",
    ),
    "inside the model": (
        inside_the_model,
        (),
        "ValueError: .*experts inside experts, .* but experts.1.0.experts is inside the model",
    ),
    "one rank": (
        problem_on_one_rank,
        (),
        "RuntimeError: shard_experts: .*problem: none on rank 0, model must contain experts, got Linear",
    ),
}


@pytest.mark.parametrize(("function", "arguments", "message"), SAME.values(), ids=SAME)
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_what_cannot_be_right_is_refused_by_name_on_every_rank(workers, function, arguments, message):
    found = workers.run(error_of, function, arguments)
    assert len(set(found)) == 1, found
    assert re.search(message, found[0]), found[0]


@pytest.mark.parametrize("workers", [3], indirect=True)
def test_ranks_that_hold_no_copy_are_told_too(workers):
    found = workers.run(error_of, frozen, (4, {1: "1.last.bias"}))
    assert len(set(found)) == 1, found
    *holders, bystander = workers.run(error_of, reentrant, (4, [1]))
    assert all("ValueError: experts: expert 1, which several ranks hold, must be" in message for message in holders), (
        holders
    )
    assert re.search(
        "RuntimeError: experts: experts failed on rank 0: ValueError: .*; rank 1: ValueError: ", bystander
    ), bystander


# one parameter, and all that a rank has
@pytest.mark.parametrize(("start", "name"), [("1.last.bias", "1.last.bias"), ("", r"1\.first\.\S+")])
@pytest.mark.parametrize("workers", [4], indirect=True)
def test_replicas_that_differ_in_what_is_frozen_are_told_on_every_rank(workers, start, name):
    found = workers.run(error_of, frozen, (3, {1: start}, (2, 2)))
    assert all(
        re.search(f"its parameter {name} is held by ranks 0, 1, and frozen or missing on rank", m) for m in found
    ), found
