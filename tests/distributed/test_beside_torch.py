"""Sharded models inside what torch wraps around models: DDP's buckets, checkpointing modules, FSDP."""

import copy
import warnings
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from reference import DIM, different_experts, largest_error, relative_error
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

from st_moe_pytorch import Experts, MoE
from st_moe_pytorch.distributed import (
    clip_grad_norm_,
    data_parallel,
    full_state_dict,
    shard_experts,
    sharded_parameters,
)
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


class Adapted(nn.Module):
    """An expert with a part that all of them have in common."""

    def __init__(self, common):
        super().__init__()
        self.own, self.common = nn.Linear(DIM, DIM), common

    def forward(self, x):
        return self.own(x).tanh() + self.common(x)


def adapted():
    """Three experts, so that two ranks cut one."""
    torch.manual_seed(0)
    common = nn.Linear(DIM, DIM)
    moe = MoE(DIM, 3, experts=[Adapted(common) for _ in range(3)])
    return nn.Sequential(nn.Linear(DIM, DIM), moe).double()


def wrap(model, what):
    """The model with modules around a part of it that checkpoint or compile it."""
    experts = model[1].experts.experts
    if what == "model":
        return checkpoint_wrapper(model)
    if what == "block":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, MoE))
    for number, expert in enumerate(experts):
        if expert is not None and what == "experts":
            experts[number] = checkpoint_wrapper(expert)
        if expert is not None and what == "parts of experts":
            expert.own, expert.common = checkpoint_wrapper(expert.own), checkpoint_wrapper(expert.common)
        if expert is not None and what == "compiled":
            experts[number] = torch.compile(expert, backend="eager")
    return model


def adapted_loss(model, rank):
    torch.manual_seed(rank)
    x, cotangent = torch.randn(2, 2, 4 + rank, DIM, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's, of tensors in place of parameters, and FSDP2's, of views
        return (model(x).outputs * cotangent).sum()


def check_wrapped(rank, what, when):
    expected = adapted()
    (sum(adapted_loss(expected, other) for other in range(2)) / 2).backward()
    model = wrap(adapted(), what) if when == "before" else adapted()
    model = shard_experts(model)
    model = wrap(model, what) if when == "after" else model
    ddp = data_parallel(model)
    adapted_loss(ddp, rank).backward()
    norm = nn.utils.get_total_norm([parameter.grad for parameter in expected.parameters()])
    assert relative_error(clip_grad_norm_(model, float("inf")), norm.double()) < 1e-12
    wanted = dict(expected.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        plain = name.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")
        assert relative_error(parameter.grad, wanted[plain].grad) < 1e-12, name
    state = {name.replace("_orig_mod.", ""): value for name, value in full_state_dict(model).items()}
    assert set(state) == set(expected.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("what", ["model", "block", "experts", "parts of experts", "compiled"])
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_modules_that_checkpoint_and_compile_change_nothing(workers, what, when):
    workers.run(check_wrapped, what, when)


def sequence(num_experts, experts=None):
    torch.manual_seed(0)
    moe = MoE(DIM, num_experts, experts=experts or different_experts(num_experts))
    return nn.Sequential(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM), moe).double()


def expected_of(num_experts, ranks):
    expected = sequence(num_experts)
    (sum(adapted_loss(expected, rank) for rank in range(ranks)) / ranks).backward()
    return expected


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def check_mixed(rank, what):
    model = shard_experts(sequence(4, experts=[nn.Linear(DIM, DIM) for _ in range(4)]))
    mine = [expert for expert in model[2].experts.experts if expert is not None]
    for part in {"model": [model], "layer": [model[2]], "experts": [model[2].experts], "each expert": mine}[what]:
        fully_shard(part)
    messages = []
    for _ in range(2):
        with pytest.raises(RuntimeError) as caught:
            adapted_loss(model, rank)
        messages.append(str(caught.value))
    return messages


@pytest.mark.parametrize("what", ["model", "layer", "experts", "each expert"])
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_fully_shard_of_different_experts_is_refused(workers, what):
    first, second = workers.run(check_mixed, what)
    assert first == second
    assert first[0].startswith("2.experts: fully_shard has mixed the experts of ranks [0, 1]: ")
    assert "ignored_params=sharded_parameters(model)" in first[0]


def check_fsdp_over_replicas(rank, num_experts):
    expected = expected_of(num_experts, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = shard_experts(sequence(num_experts), mesh["ep"])
    fully_shard(model[2].experts, mesh=mesh["dp"])
    fully_shard(model, mesh=init_device_mesh("cpu", (4,)), ignored_params=sharded_parameters(model))
    adapted_loss(model, rank).backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), 1e-2)
    assert relative_error(clip_grad_norm_(model, 1e-2), norm.double()) < 1e-12
    name, error = largest_error(model, expected, of=lambda p: whole(p.grad))
    assert error < 1e-12, (name, error)
    state = {name: whole(value) for name, value in full_state_dict(model).items()}
    assert set(state) == set(expected.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in expected.state_dict().items())


@pytest.mark.parametrize("num_experts", [3, 4])
@pytest.mark.parametrize("workers", [4], indirect=True)
def test_fully_shard_of_replicas_of_experts(workers, num_experts):
    workers.run(check_fsdp_over_replicas, num_experts)


def check_norms_beside_fsdp(rank):
    """A layer whole on all ranks, one in pieces on all of them, and one in pieces on some."""
    expected = expected_of(3, 4)
    model = shard_experts(sequence(3))
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    fully_shard(model[0], mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model[1], mesh=mesh["ep"])
    adapted_loss(model, rank).backward()
    for parameter in model[1].parameters():
        dist.all_reduce(parameter.grad.to_local(), group=mesh["dp"].get_group())
        parameter.grad /= 2
    gate = model[2].gate.to_gates.weight.grad
    dist.all_reduce(gate)
    gate /= 4
    norm = nn.utils.clip_grad_norm_(expected.parameters(), 1e-2)
    assert relative_error(clip_grad_norm_(model, 1e-2), norm.double()) < 1e-12
    name, error = largest_error(model, expected, of=lambda p: whole(p.grad))
    assert error < 1e-12, (name, error)


@pytest.mark.parametrize("workers", [4], indirect=True)
def test_norms_where_fsdp2_has_a_part(workers):
    workers.run(check_norms_beside_fsdp)


def check_norms_of_fsdp1(rank):
    model = shard_experts(sequence(2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fsdp = FullyShardedDataParallel(model, ignored_states=list(sharded_parameters(model)), device_id="cpu")
    for outer in (fsdp, nn.Sequential(fsdp)):
        with pytest.raises(ValueError, match=r"model must be in fully_shard \(FSDP2\), not FullyShardedDataParallel"):
            clip_grad_norm_(outer, 1.0)


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_norms_of_fsdp1_are_refused(workers):
    workers.run(check_norms_of_fsdp1)


def check_no_group(rank):
    group, mesh = dist.new_group([0]), init_device_mesh("cpu", (2,))
    wanted = "process_group must be one that this rank is in, like mesh.get_group"
    calls = [lambda: data_parallel(sequence(2), mesh)]
    if rank == 1:
        calls.append(lambda: shard_experts(sequence(2), group))
        calls.append(lambda: data_parallel(sequence(2), group))
        calls.append(lambda: Experts([nn.Identity()], process_group=group))
    for call in calls:
        with pytest.raises(ValueError, match=wanted):
            call()


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_what_is_no_group_of_this_rank(workers):
    workers.run(check_no_group)
