"""What concerns a whole sharded model: norms, states, what DDP leaves alone, the proof for users."""

import copy
import math

import pytest
import torch
import torch.distributed as dist
from reference import DIM, different_experts, largest_error, relative_error
from torch import nn

from st_moe_pytorch import Expert, Experts, MoE
from st_moe_pytorch.distributed import (
    check_expert_parallel,
    clip_grad_norm_,
    data_parallel,
    full_state_dict,
    shard_experts,
)
from st_moe_pytorch.distributed.collectives import all_to_all
from st_moe_pytorch.distributed.compat import leave_out_of_ddp


def two_layers(common):
    """Two layers that have all experts in common."""
    torch.manual_seed(3)
    experts = Experts(different_experts(3))
    others = {
        "Experts": experts,
        "a list": Experts(experts.experts),
        "each of two lists": Experts(list(experts.experts)),
    }[common]
    return nn.ModuleList([MoE(DIM, 3, experts=experts), MoE(DIM, 3, experts=others)]).double()


def backward(model, rank):
    x, cotangent = torch.randn(2, 2, 4 + rank, DIM, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    torch.manual_seed(rank)
    for layer in model:
        x = layer(x).outputs + x
    return (x * cotangent).sum().backward()


def check_layers_with_the_same_experts(rank, common):
    single = two_layers(common)
    sharded = shard_experts(copy.deepcopy(single))
    ranks = dist.get_world_size()
    for other in range(ranks):
        backward(single, other)
    for parameter in single.parameters():
        parameter.grad /= ranks
    backward(sharded, rank)
    for layer in sharded:  # what DDP would do
        dist.all_reduce(layer.gate.to_gates.weight.grad)
        layer.gate.to_gates.weight.grad /= ranks
    wanted = dict(single.named_parameters(remove_duplicate=False))
    for name, parameter in sharded.named_parameters(remove_duplicate=False):
        assert relative_error(parameter.grad, wanted[name].grad) < 1e-12, name
    norm = nn.utils.get_total_norm([p.grad for p in single.parameters()])
    assert relative_error(clip_grad_norm_(sharded, 1e-3), norm) < 1e-12
    state = full_state_dict(sharded)
    assert set(state) == set(single.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in single.state_dict().items())


def check_norms_of_half_types(rank):
    """In float32: of many small numbers, a norm of bfloat16 numbers is off by percents."""
    model = shard_experts(nn.Sequential(nn.Linear(DIM, 5), MoE(DIM, 2))).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1.01)
    numbers = 5 * DIM + 5 + 2 * DIM + 2 * sum(p.numel() for p in Expert(DIM).parameters())
    expected = torch.full((numbers,), 1.01, dtype=torch.bfloat16).double().norm()
    assert relative_error(clip_grad_norm_(model, 1.0), expected) < 1e-6
    with pytest.raises(ValueError, match=r"model must be a module, not its parameters .* got generator"):
        clip_grad_norm_(model.parameters(), 1.0)
    for wrong in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="max_norm must be 0 or more"):
            clip_grad_norm_(model, wrong)
    assert torch.equal(clip_grad_norm_(model, float("inf")), clip_grad_norm_(model, float("inf")))


class Statistics(nn.Module):
    """An expert with a buffer that is another one on every rank."""

    def __init__(self, rank):
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)
        self.register_buffer("seen", torch.full((2,), float(rank)))

    def forward(self, x):
        return self.linear(x) + self.seen.sum()


def check_ddp_leaves_alone_what_it_was_told_to(rank):
    """The user's own exceptions, and the buffers of experts, which DDP would overwrite with those of rank 0."""
    torch.manual_seed(rank)
    model = nn.ModuleDict(
        {"dense": nn.Linear(DIM, DIM), "moe": MoE(DIM, 2, experts=[Statistics(rank), Statistics(rank)])}
    )
    model.forward = lambda x: model["moe"](model["dense"](x)).outputs
    leave_out_of_ddp(model, ["dense.bias"])
    own = model["dense"].bias.clone()
    ddp = data_parallel(shard_experts(model))
    assert torch.equal(model["dense"].bias, own)
    buffer = model["moe"].experts.experts[rank].seen
    assert not buffer.any()  # that of rank 0, as all its parameters
    buffer.fill_(rank + 1.0)
    ddp(torch.randn(1, 3, DIM)).sum().backward()
    assert (buffer == rank + 1.0).all()
    torch.manual_seed(0)
    assert torch.equal(model["dense"].weight, nn.Linear(DIM, DIM).weight)


class Scaled(Experts):
    """A model that is nothing but experts, and a parameter that is none of theirs."""

    def __init__(self, experts):
        super().__init__(experts)
        self.scale = nn.Parameter(torch.ones(DIM))

    def forward(self, x):
        return super().forward(x) * self.scale


def check_a_model_of_nothing_but_experts(rank):
    torch.manual_seed(0)
    single = Scaled(different_experts(3)).double()
    sharded = shard_experts(copy.deepcopy(single))
    state = full_state_dict(sharded)
    assert set(state) == set(single.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in single.state_dict().items())
    x, cotangent = torch.randn(2, 2, 3, 4, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ddp = data_parallel(sharded)
    (ddp(x) * cotangent * (rank + 1)).sum().backward()
    (single(x) * cotangent * 1.5).sum().backward()
    name, error = largest_error(sharded, single)
    assert error < 1e-12, (name, error)

    counting = shard_experts(Scaled([Statistics(rank), Statistics(rank)]))
    buffer = counting.experts[rank].seen
    ddp = data_parallel(counting)
    buffer.fill_(rank + 1.0)
    ddp(torch.randn(1, 2, 3, DIM))
    assert (buffer == rank + 1.0).all()


class Forgetful(nn.Module):
    """An expert that does not use one of its parameters."""

    def __init__(self):
        super().__init__()
        self.linear, self.unused = nn.Linear(DIM, DIM), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.linear(x)


def check_the_proof(rank):
    expert = Expert(DIM)
    errors = check_expert_parallel(MoE(DIM, 4, experts=[expert, expert, Expert(DIM), expert]), torch.randn(2, 3, DIM))
    assert max(errors.values()) < 1e-12, errors
    assert "gradient of experts.experts.3.net.0.weight" in errors


def check_the_proof_leaves_no_trace(rank):
    moe, x = MoE(DIM, 2), torch.randn(2, 3, DIM)
    state, before = torch.get_rng_state(), copy.deepcopy(moe.state_dict())
    check_expert_parallel(moe, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(
        torch.equal(value, before[name]) and value.dtype == torch.float32 for name, value in moe.state_dict().items()
    )
    assert all(p.grad is None for p in moe.parameters())
    assert moe.experts.parallel is None


def without_gradients(rows, traffic, channel):
    """A strategy that is wrong."""
    return all_to_all(rows.detach(), traffic[channel.rank], [sent[channel.rank] for sent in traffic], channel)


def check_the_proof_sees_what_is_wrong(rank):
    """Also where it is so on rank 0 only, and where gradients are missing."""
    moe, x = MoE(DIM, 2), torch.randn(2, 3, DIM)
    errors = check_expert_parallel(moe, x, strategy=without_gradients)
    assert errors["outputs"] < 1e-12
    assert all(error == math.inf for name, error in errors.items() if "experts" in name), errors

    def move(module, inputs, result):
        return result._replace(outputs=result.outputs + 1) if rank == 0 and module.experts.parallel else result

    moe.register_forward_hook(move)
    assert check_expert_parallel(moe, x)["outputs"] > 1e-3


def check_the_proof_says_where_there_is_no_gradient(rank):
    moe = MoE(DIM, 4, experts=[Forgetful() for _ in range(4)])
    # the layer itself, since DDP refuses what gets no gradient
    errors = check_expert_parallel(moe, torch.randn(2, 3, DIM))
    assert {name for name, error in errors.items() if error != error} == {
        f"gradient of experts.experts.{i}.unused" for i in range(4)
    }
    assert all(error < 1e-12 for error in errors.values() if error == error)


@pytest.mark.parametrize("common", ["Experts", "a list", "each of two lists"])
@pytest.mark.parametrize("workers", [2, 3], indirect=True)
def test_layers_with_the_same_experts(workers, common):
    workers.run(check_layers_with_the_same_experts, common)


@pytest.mark.parametrize(
    "check",
    [
        check_norms_of_half_types,
        check_ddp_leaves_alone_what_it_was_told_to,
        check_a_model_of_nothing_but_experts,
        check_the_proof,
        check_the_proof_leaves_no_trace,
        check_the_proof_sees_what_is_wrong,
        check_the_proof_says_where_there_is_no_gradient,
    ],
)
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_whole_model(workers, check):
    workers.run(check)
