"""Sharded models in training: optimizers, clipping, checkpointing, meshes, FSDP2, copies and checks of their own."""

import copy
import io
import os

import pytest
import torch
import torch.distributed as dist
from reference import DIM, different_experts, largest_error, loss_of, relative_error, stack, train_one_process
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from st_moe_pytorch import Experts, MoE
from st_moe_pytorch.distributed import (
    check_expert_parallel,
    clip_grad_norm_,
    data_parallel,
    full_state_dict,
    shard_experts,
    sharded_parameters,
)
from st_moe_pytorch.distributed.collectives import all_to_all


def train(ddp, rank, steps=3, micro=1):
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-2)
    norms = []
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(micro):
            loss_of(ddp, rank, step * micro + part).backward()
        norms.append(clip_grad_norm_(ddp, 1.0))
        optimizer.step()
    return norms


def same_everywhere(t):
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, t)
    return all(torch.equal(everyone[0], theirs) for theirs in everyone)


def check_training(rank, num_experts, micro, reentrant):
    model = stack(num_experts, reentrant=reentrant)
    expected, expected_norms = train_one_process(model, dist.get_world_size(), micro=micro)
    ddp = data_parallel(shard_experts(copy.deepcopy(model)))
    norms = train(ddp, rank, micro=micro)
    for norm, theirs in zip(norms, expected_norms, strict=True):
        assert theirs > 1  # so that clipping changes something
        assert relative_error(norm, theirs) < 1e-12
        assert same_everywhere(norm)
    name, error = largest_error(ddp.module, expected, of=lambda p: p)
    assert error < 1e-12, (name, error)
    for block in ddp.module.blocks:
        parallel = block.moe.experts.parallel
        for number in range(num_experts):
            if len(parallel.placement.holders_of(number)) == dist.get_world_size():
                assert all(same_everywhere(p.detach()) for p in block.moe.experts.experts[number].parameters())
    return error


@pytest.mark.parametrize(
    ("workers", "num_experts", "micro", "reentrant"),
    [(2, 4, 1, None), (2, 3, 2, None), (3, 4, 2, None), (3, 2, 1, False), (2, 3, 1, True), (5, 3, 1, None)],
    indirect=["workers"],
)
def test_three_steps_of_clipped_adamw_equal_one_process(workers, num_experts, micro, reentrant):
    print(max(workers.run(check_training, num_experts, micro, reentrant)))


def check_mesh(rank, num_experts):
    model = stack(num_experts)
    expected, norms = train_one_process(model, 4)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    mine = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in mine.parameters():
            parameter += rank
    ddp = data_parallel(shard_experts(mine, mesh))
    assert len(list(ddp.module.blocks[0].moe.experts.experts.children())) == -(-num_experts // 2)
    for norm, theirs in zip(train(ddp, rank), norms, strict=True):
        assert relative_error(norm, theirs) < 1e-12
    name, error = largest_error(ddp.module, expected, of=lambda p: p)
    assert error < 1e-12, (name, error)

    alone = shard_experts(copy.deepcopy(model), mesh["ep"])
    with pytest.raises(ValueError, match="experts on 2 ranks, but process_group has 4"):
        data_parallel(alone)
    with pytest.raises(ValueError, match="experts on 4 ranks, but process_group has 2"):
        data_parallel(shard_experts(copy.deepcopy(model), mesh), mesh["dp"].get_group())


@pytest.mark.parametrize("num_experts", [3, 4])
@pytest.mark.parametrize("workers", [4], indirect=True)
def test_mesh_of_replicas_and_expert_ranks(workers, num_experts):
    workers.run(check_mesh, num_experts)


def check_replicas_alone(rank):
    """A mesh whose experts are spread over one rank: all of them are on each, and their gradients are averaged."""
    model = stack(2)
    expected, norms = train_one_process(model, 2, steps=1)
    mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("dp", "ep"))
    ddp = data_parallel(shard_experts(copy.deepcopy(model), mesh))
    assert len(list(ddp.module.blocks[0].moe.experts.experts.children())) == 2
    assert relative_error(*train(ddp, rank, steps=1), *norms) < 1e-12
    name, error = largest_error(ddp.module, expected, of=lambda p: p)
    assert error < 1e-12, (name, error)


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_mesh_of_replicas_alone(workers):
    workers.run(check_replicas_alone)


def check_fully_shard(rank):
    ranks, model = dist.get_world_size(), stack(3)
    expected = copy.deepcopy(model)
    (sum(loss_of(expected, r) for r in range(ranks)) / ranks).backward()
    norm = nn.utils.clip_grad_norm_(expected.parameters(), 1.0)
    shard_experts(model)
    fully_shard(model, mesh=init_device_mesh("cpu", (ranks,)), ignored_params=sharded_parameters(model))
    loss_of(model, rank).backward()
    assert relative_error(clip_grad_norm_(model, 1.0), norm) < 1e-12
    name, error = largest_error(
        model, expected, of=lambda p: p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
    )
    assert error < 1e-12, (name, error)
    assert any(hasattr(p, "full_tensor") for p in model.parameters())


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_fsdp2_beside_sharded_experts(workers):
    workers.run(check_fully_shard)


def moe_of(num_experts, **options):
    torch.manual_seed(num_experts)
    return MoE(DIM, num_experts, experts=Experts(different_experts(num_experts), **options)).double()


def check_copies(rank):
    """Copied, saved and used under another strategy of one's own, a sharded layer stays what it is."""
    generator = torch.Generator().manual_seed(rank)
    x, cotangent = torch.randn(2, 2, 4, DIM, generator=generator, dtype=torch.float64)
    sharded = shard_experts(moe_of(3))
    buffer = io.BytesIO()
    torch.save(sharded, buffer)
    buffer.seek(0)
    own = shard_experts(moe_of(3), strategy=by_the_way_of_rank_0)
    gradients = []
    for moe in (sharded, copy.deepcopy(sharded), torch.load(buffer, weights_only=False), own):
        torch.manual_seed(0)
        outputs, *_ = moe(x)
        (outputs * cotangent).sum().backward()
        gradients.append([outputs, *(p.grad for p in moe.parameters())])
    for others in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))
    slots = torch.randn(2, 3, rank, DIM, dtype=torch.float64)
    single = moe_of(3).experts
    assert relative_error(sharded.experts(slots), single(slots)) < 1e-12
    assert relative_error(single(slots, True), single(slots)) < 1e-12
    with pytest.raises(ValueError, match="is_distributed must not be False"):
        sharded.experts(slots, False)
    with pytest.raises(ValueError, match="sharded before"):
        shard_experts(sharded)
    with pytest.raises(ValueError, match="must contain experts"):
        shard_experts(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="strategy must be one of"):
        shard_experts(moe_of(3), strategy="carrier pigeon")


def by_the_way_of_rank_0(rows, traffic, channel):
    """A strategy that a user could write: two hops, the first of which moves nothing."""
    kept = [rows.shape[0] if rank == channel.rank else 0 for rank in range(channel.size)]
    rows = all_to_all(rows, kept, kept, channel)
    return all_to_all(rows, traffic[channel.rank], [sent[channel.rank] for sent in traffic], channel)


def check_gradients_needed_by_some(rank):
    """Where only some ranks need gradients of their tokens and the router is frozen, all take part in the backward."""
    moe = moe_of(3)
    moe.gate.requires_grad_(False)
    moe.experts.requires_grad_(False)
    sharded = shard_experts(copy.deepcopy(moe))
    generator = torch.Generator().manual_seed(rank)
    x, cotangent = torch.randn(2, 2, 4, DIM, generator=generator, dtype=torch.float64)
    x.requires_grad_(rank == 1)
    torch.manual_seed(0)
    outputs, *_ = sharded(x)
    (outputs * cotangent).sum().backward()
    torch.manual_seed(0)
    if rank == 1:
        (expected,) = torch.autograd.grad((moe(x)[0] * cotangent).sum(), x)
        assert relative_error(x.grad, expected) < 1e-12
    else:
        assert x.grad is None
    with torch.no_grad():
        assert not sharded(x)[0].requires_grad


def check_tokens_without_gradients(rank):
    """Where no tokens need gradients and a rank has none, experts get theirs from the others."""
    moe = moe_of(3)
    moe.gate.requires_grad_(False)
    sharded = shard_experts(copy.deepcopy(moe))
    x, cotangent = torch.randn(2, 2, 4, DIM, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for layer, tokens, scale in ((moe, 4, 1 / 2), (sharded, 0 if rank == 1 else 4, 1)):
        torch.manual_seed(0)
        ((layer(x[:, :tokens]).outputs * cotangent[:, :tokens]).sum() * scale).backward()
    name, error = largest_error(sharded.experts, moe.experts)
    assert error < 1e-12, (name, error)


def check_state_dicts(rank):
    """Ranks start equal though they were built differently; states go both ways, through meta construction too."""
    torch.manual_seed(rank)
    experts = different_experts(3)
    experts[1].requires_grad_(False)
    sharded = shard_experts(MoE(DIM, 3, experts=experts).double())
    full = full_state_dict(sharded)
    torch.manual_seed(0)
    built_by_first_rank = nn.ModuleList(different_experts(3)).double().state_dict()
    assert all(torch.equal(full[f"experts.experts.{name}"], value) for name, value in built_by_first_rank.items())
    single = MoE(DIM, 3, experts=different_experts(3)).double()
    assert set(full) == set(single.state_dict())
    single.load_state_dict(full, strict=True)
    x = torch.randn(1, 4, DIM, dtype=torch.float64)
    assert relative_error(sharded.eval()(x)[0], single.eval()(x)[0]) < 1e-12

    with torch.device("meta"):
        empty = MoE(DIM, 3, experts=different_experts(3)).double()
    shard_experts(empty).to_empty(device="cpu").load_state_dict(full, strict=True)
    assert all(torch.equal(value, full[name]) for name, value in empty.state_dict().items())
    assert len(list(empty.experts.experts.children())) == len(empty.experts.parallel.experts)
    with pytest.raises(RuntimeError, match="Missing key"):
        single.load_state_dict(sharded.state_dict(), strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        sharded.load_state_dict(full | {"experts.experts.3.net.0.gamma": torch.zeros(DIM)}, strict=True)


def check_the_check(rank):
    torch.manual_seed(rank)
    moe = MoE(DIM, 4, experts=different_experts(4))
    errors = check_expert_parallel(moe, torch.randn(rank, 3, DIM), strategy="all_gather")
    assert {
        "outputs",
        "gradient of x",
        "gradient of gate.to_gates.weight",
        "gradient of experts.experts.3.net.0.weight",
    } <= set(errors)
    assert max(errors.values()) < 1e-12, errors
    for (
        expert
    ) in moe.experts.experts:  # experts that mix their tokens depend on who else sends some, which has to be seen
        expert.register_forward_hook(lambda module, inputs, y: y - y.mean(dim=1, keepdim=True))
    assert check_expert_parallel(moe, torch.randn(2, 3, DIM))["outputs"] > 1e-3


CHECKS = [
    check_copies,
    check_gradients_needed_by_some,
    check_tokens_without_gradients,
    check_state_dicts,
    check_the_check,
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_sharded_layer(workers, check):
    workers.run(check)


def test_import_needs_no_process_group_and_no_distributed_package():
    code = (
        "import torch.distributed as d, torch; d.is_available = lambda: False; "
        "[delattr(d, n) for n in ('ProcessGroup', 'group', 'all_to_all_single', 'all_gather_single', "
        "'broadcast', 'all_reduce')]; "
        "import st_moe_pytorch as s, st_moe_pytorch.distributed as p; s.MoE(8, 4)(torch.randn(1, 4, 8)); "
        "e = s.Experts([torch.nn.Linear(2, 2)], True)\n"
        "for f in (lambda: e(torch.ones(1, 1, 1, 2)), lambda: p.shard_experts(e)):\n"
        "    try: f()\n"
        "    except RuntimeError as error: assert 'there is no process group: call "
        "torch.distributed.init_process_group' in str(error)\n"
        "    else: raise SystemExit(1)\n"
    )
    import subprocess
    import sys

    subprocess.run([sys.executable, "-c", code], check=True, env=dict(os.environ))


def check_groups(rank):
    """Two ranks of three, a group of their own, as everywhere in place of all."""
    group = dist.new_group([0, 1])
    if rank == 2:
        return
    x = torch.randn(2, 3 + rank, DIM, dtype=torch.float64)
    errors = check_expert_parallel(moe_of(3), x, process_group=group)
    assert max(errors.values()) < 1e-12, errors
    sharded = shard_experts(moe_of(3), process_group_or_mesh=group)
    assert data_parallel(sharded, process_group=group).process_group is group
    assert set(full_state_dict(sharded)) == set(moe_of(3).state_dict())
    whole, exchanging = moe_of(3), moe_of(3, is_distributed=True, process_group=group)
    found = []
    for moe in (whole, sharded, exchanging):
        torch.manual_seed(0)
        found.append(moe(x).outputs)
    assert relative_error(found[1], found[0]) < 1e-12
    assert relative_error(found[2], found[0]) < 1e-12


@pytest.mark.parametrize("workers", [3], indirect=True)
def test_groups_of_some_ranks(workers):
    workers.run(check_groups)


def check_planted_rows(rank, num_experts):
    """NaN in the rows that nobody may read, and in their gradients, reaches nothing on any rank."""
    generator = torch.Generator().manual_seed(rank)
    x, cotangent = torch.randn(2, 2, 5, DIM, generator=generator, dtype=torch.float64)
    x.requires_grad_()
    sharded = shard_experts(moe_of(num_experts))
    sharded.gate.policy_train, sharded.gate.capacity_factor_train = "none", None
    routing = sharded.gate.route(x)
    layout = routing.rows()
    dead = torch.arange(len(layout.choices)) >= layout.offsets[-1]
    assert dead.sum() > 1
    dead[-1] = False

    def run(plant):
        y = sharded.experts(plant(routing.dispatch(x, layout)), layout.offsets)
        assert not y[-1].any()
        outputs = routing.combine(plant(y), layout)
        inputs = [x, *sharded.experts.parameters()]
        return [outputs, *torch.autograd.grad((outputs * cotangent).sum(), inputs, retain_graph=True)]

    def planted(rows):
        rows = rows.masked_fill(dead.unsqueeze(-1), torch.nan)
        rows.register_hook(lambda grad: grad.masked_fill(dead.unsqueeze(-1), torch.nan))
        return rows

    for got, wanted in zip(run(planted), run(lambda rows: rows), strict=True):
        assert torch.equal(got, wanted)
        assert got.isfinite().all()


@pytest.mark.parametrize("num_experts", [3, 4])
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_rows_that_are_nobodys_reach_no_rank(workers, num_experts):
    workers.run(check_planted_rows, num_experts)
