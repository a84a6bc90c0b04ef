"""What goes wrong ends in an error that says what, where and on which ranks: no hang, abort or swapped tokens."""

import copy
import os
import re
import warnings

import pytest
import torch
import torch.distributed as dist
from harness import Workers
from reference import DIM, loss_of, stack
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from st_moe_pytorch import Experts, MoE, RMSNorm, TopNGating
from st_moe_pytorch.distributed import shard_experts

ODD = 1  # the rank that differs


def moe_of(rank, num_experts=4, dtype=torch.float32, dim=DIM, mult=1, **options):
    return MoE(dim, num_experts, mult, **options).to(dtype)


def differ_when_sharded(rank, options):
    shard_experts(moe_of(rank, **(options if rank == ODD else {})))


def differ_in_strategy(rank):
    shard_experts(moe_of(rank), strategy="all_gather" if rank == ODD else "all_to_all")


def differ_unsharded(rank, options, strategy):
    experts = moe_of(rank, **(options if rank == ODD else {})).experts
    experts.is_distributed = True
    if rank == ODD:
        experts.strategy = strategy
    experts(torch.zeros(2, experts.num_experts, 3, options.get("dim", DIM) if rank == ODD else DIM))


def differ_in_parts(rank):
    shard_experts(nn.ModuleDict({"moe": moe_of(rank)} | ({"head": nn.Linear(2, 3)} if rank == ODD else {})))


def differ_in_sharding(rank):
    sharded, whole = shard_experts(moe_of(rank).experts), moe_of(rank).experts
    (whole if rank == ODD else sharded)(torch.zeros(2, 4, 3, DIM), is_distributed=True)


def other_tokens(rank, width, dtype, grad):
    layer = shard_experts(nn.ModuleDict({"moe": moe_of(rank)}))["moe"].experts
    with torch.set_grad_enabled(grad or rank != ODD):
        layer(torch.zeros(2, 4, 3, width if rank == ODD else DIM, dtype=dtype if rank == ODD else torch.float32))


def skip_a_layer(rank):
    layers = shard_experts(nn.ModuleDict({"first": moe_of(rank), "second": moe_of(rank)}))
    x = torch.randn(1, 3, DIM)
    for name in ("second",) if rank == ODD else ("first", "second"):
        x = layers[name](x)[0]


SAME_ERROR = {
    "experts": (
        differ_when_sharded,
        ({"num_experts": 5},),
        r"shard_experts: .*gate.to_gates.weight: float32 \(4, 6\) on rank 0 2, .*\(5, 6\) on rank 1",
    ),
    "shapes": (
        differ_when_sharded,
        ({"mult": 2},),
        r"shard_experts: .*float32 \(8, 6\) on rank 0 2, float32 \(16, 6\) on rank 1",
    ),
    "dtypes": (
        differ_when_sharded,
        ({"dtype": torch.float64},),
        r"float32 \(4, 6\) on rank 0 2, float64 \(4, 6\) on rank 1",
    ),
    "top_n": (
        differ_when_sharded,
        ({"gating_top_n": 3},),
        r"gate.threshold_train: float32 \(2,\) on rank 0 2, float32 \(3,\) on rank 1",
    ),
    "strategy": (differ_in_strategy, (), "strategy: all_to_all on rank 0 2, all_gather on rank 1"),
    "parts": (differ_in_parts, (), r"shard_experts: .*head.weight: absent on rank 0 2, float32 \(3, 2\) on rank 1"),
    "sharding": (differ_in_sharding, (), "Experts: .*; experts: sharded on rank 0 2, not sharded on rank 1"),
    "unsharded experts": (
        differ_unsharded,
        ({"num_experts": 300}, "all_to_all"),
        "number of experts: 4 on rank 0 2, 300 on rank 1",
    ),
    "unsharded strategy": (
        differ_unsharded,
        ({}, "all_gather"),
        "strategy: all_to_all on rank 0 2, all_gather on rank 1",
    ),
    "width": (other_tokens, (8, torch.float32, True), "moe.experts: .*width of tokens: 6 on rank 0 2, 8 on rank 1"),
    "dtype": (
        other_tokens,
        (DIM, torch.bfloat16, True),
        "moe.experts: .*dtype of tokens: torch.float32 on rank 0 2, torch.bfloat16 on rank 1",
    ),
    "gradients": (
        other_tokens,
        (DIM, torch.float32, False),
        "moe.experts: .*gradients: recorded on rank 0 2, off on rank 1",
    ),
    "layer": (skip_a_layer, (), "layer: first.experts on rank 0 2, second.experts on rank 1"),
}


def message_of(rank, function, arguments):
    with pytest.raises(RuntimeError) as caught:
        function(rank, *arguments)
    return str(caught.value)


@pytest.mark.parametrize(("function", "arguments", "pattern"), SAME_ERROR.values(), ids=SAME_ERROR)
@pytest.mark.parametrize("workers", [3], indirect=True)
def test_all_ranks_raise_the_same_error_with_the_values_of_each(workers, function, arguments, pattern):
    messages = workers.run(message_of, function, arguments)
    assert len(set(messages)) == 1
    assert re.search(pattern, messages[0])


def left_in_ddp(rank, trainable):
    model = shard_experts(nn.Sequential(moe_of(rank, 3)))
    model[0].experts.requires_grad_(trainable)
    ddp = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match=r"0.experts: its sharded experts are inside DistributedDataParallel"):
        ddp(torch.zeros(1, 2, DIM))


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("workers", [3], indirect=True)
def test_sharded_experts_inside_ddp_are_refused(workers, trainable):
    workers.run(left_in_ddp, trainable)


class Die(torch.autograd.Function):
    """Ends the process in the pass asked for."""

    @staticmethod
    def forward(ctx, x, in_forward):
        if in_forward:
            os._exit(7)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        os._exit(7)


def die(rank, in_forward):
    model = shard_experts(stack(3))
    if rank == ODD:
        mine = model.blocks[1].moe.experts
        mine.experts[mine.parallel.experts[0]].register_forward_hook(lambda module, inputs, y: Die.apply(y, in_forward))
    loss_of(model, rank).backward()


def skip_a_backward(rank):
    model = shard_experts(stack(3))
    for step in range(2):
        loss = loss_of(model, rank, step)
        if rank != ODD or step:
            loss.backward()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("function", "arguments", "layer", "odd"),
    [
        (die, (True,), "blocks.1.moe.experts", "exit code 7"),
        (die, (False,), "blocks.1.moe.experts", "exit code 7"),
        (skip_a_backward, (), "blocks.[01].moe.experts", "RuntimeError"),
    ],
    ids=["killed in forward", "killed in backward", "backward left out"],
)
def test_a_lost_rank_ends_in_the_groups_timeout_with_the_layers_name(function, arguments, layer, odd):
    outcomes = Workers(3, timeout=5).outcomes(function, *arguments)
    for rank, (_, error) in enumerate(outcomes):
        if rank == ODD:
            assert odd in error
        else:
            assert re.search(rf"RuntimeError: {layer}: all_\w+ of rank {rank} of 3 failed", error), error


def test_no_process_group():
    experts = Experts([nn.Linear(2, 2)], is_distributed=True)
    for run in (lambda: shard_experts(copy.deepcopy(experts)), lambda: experts(torch.ones(1, 1, 1, 2))):
        with pytest.raises(RuntimeError, match=r"there is no process group: call torch.distributed.init_process_group"):
            run()


def results_in_two_dtypes(rank, strategy):
    """Under bfloat16 autocast, one expert is plain and one ends in a norm, so that ranks have results of two dtypes."""
    torch.manual_seed(0)
    experts = [nn.Linear(DIM, DIM), nn.Sequential(nn.Linear(DIM, DIM), RMSNorm(DIM))]
    gate = TopNGating(DIM, 2, top_n=1, capacity_factor_train=None)
    moe = MoE(DIM, 2, gate=gate, experts=experts)
    sharded = shard_experts(copy.deepcopy(moe), strategy=strategy)
    x = torch.randn(2, 7, DIM, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    found = []
    for layer in (sharded, moe):
        with torch.autocast("cpu", torch.bfloat16):
            outputs = layer(x).outputs
        found.append((outputs, torch.autograd.grad(outputs.square().sum(), x)[0]))
    for got, wanted in zip(*found, strict=True):
        assert got.isfinite().all()
        assert (got - wanted).abs().max() <= 1e-2 * wanted.abs().max()


@pytest.mark.parametrize("strategy", ["all_to_all", "all_gather"])
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_results_of_experts_that_differ_in_dtype_travel_in_the_widest(workers, strategy):
    workers.run(results_in_two_dtypes, strategy)


class Narrow(nn.Module):
    def __init__(self, dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, x):
        return x.to(self.dtype)


def results_in_two_half_types(rank):
    """Neither of which holds all numbers of the other: 1e6 is infinite in float16, and 1.001 is 1 in bfloat16."""
    x = torch.tensor([[[[1e6]], [[1.001]]]])
    single = Experts([Narrow(torch.bfloat16), Narrow(torch.float16)])
    y = shard_experts(copy.deepcopy(single))(x)
    assert y.dtype == torch.float32
    assert y.flatten().tolist() == [x[0, 0].bfloat16().item(), x[0, 1].half().item()]


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_results_of_two_half_types_travel_in_float32(workers):
    workers.run(results_in_two_half_types)


def results_of_two_widths(rank):
    torch.manual_seed(0)
    moe = MoE(DIM, 4, experts=[nn.Linear(DIM, 3 + number // 2) for number in range(4)])
    shard_experts(moe)(torch.randn(1, 5, DIM))


def results_of_no_number(rank):
    shard_experts(MoE(DIM, 2, experts=[nn.Identity(), Narrow(torch.complex64)]))(torch.randn(1, 5, DIM))


def results_of_no_number_anywhere(rank):
    shard_experts(MoE(DIM, 2, experts=[Narrow(torch.complex64), Narrow(torch.complex64)]))(torch.randn(1, 5, DIM))


@pytest.mark.parametrize(
    ("function", "pattern"),
    [
        (
            results_of_two_widths,
            "experts: the ranks differ, where they must agree, in width of the experts' results: 3 on rank 0, 4 "
            "on rank 1",
        ),
        (results_of_no_number_anywhere, "float16], got complex64"),
        (results_of_no_number, "in dtype of the experts' results: float32 on rank 0, complex64 on rank 1"),
    ],
)
@pytest.mark.parametrize("workers", [2], indirect=True)
def test_results_that_cannot_agree_end_in_one_error(workers, function, pattern):
    messages = workers.run(message_of, function, ())
    assert len(set(messages)) == 1
    assert pattern in messages[0]


def compiled_around_the_exchange(rank):
    torch.manual_seed(0)
    moe = shard_experts(MoE(DIM, 3, gate=TopNGating(DIM, 3, policy_train="all")))
    x = torch.randn(2, 5, DIM, generator=torch.Generator().manual_seed(rank), requires_grad=True)
    expected = moe(x).outputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # dynamo's own, where it breaks a graph
        actual = torch.compile(moe, backend="aot_eager")(x).outputs
        inputs = [x, *moe.parameters()]
        pairs = zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (actual, expected)), strict=True)
        assert torch.equal(actual, expected)
        assert all(torch.equal(got, wanted) for got, wanted in pairs)
        torch._dynamo.reset()
        with pytest.raises(
            Exception, match="tokens go to other ranks, in numbers that depend on data: compile without fullgraph=True"
        ):
            torch.compile(moe, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_sharded_layers_compile_around_the_exchange(workers):
    workers.run(compiled_around_the_exchange)


def shown(rank):
    assert f"experts {rank * 2} to {rank * 2 + 1} of 4, on rank {rank} of 2" in str(shard_experts(moe_of(rank)))


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_sharded_experts_say_which_they_are(workers):
    workers.run(shown)


def without_a_strategy(rank):
    with pytest.raises(ValueError, match="strategy must be one of 'all_to_all', 'all_gather', got 3"):
        shard_experts(moe_of(rank), strategy=3)


@pytest.mark.parametrize("workers", [2], indirect=True)
def test_what_is_no_strategy_is_refused_before_anything_is_done(workers):
    workers.run(without_a_strategy)


def second_derivative(rank):
    layer = shard_experts(nn.ModuleDict({"moe": moe_of(rank, 3)}))["moe"]
    x = torch.randn(1, 4, DIM, requires_grad=True)
    (gradient,) = torch.autograd.grad(layer(x).outputs.square().sum(), x, create_graph=True)
    gradient.square().sum().backward()


def loaded_on_one_rank(rank):
    with torch.device("meta" if rank == ODD else "cpu"):
        model = nn.ModuleList([moe_of(rank), moe_of(rank)])
    shard_experts(model)


def models_in_another_order(rank):
    """Two models whose layers have the same names, shapes and tokens."""
    models = [shard_experts(nn.ModuleDict({"moe": moe_of(rank)})) for _ in range(2)]
    for model in reversed(models) if rank == ODD else models:
        model["moe"](torch.randn(1, 3, DIM))


ALSO_SAME_ERROR = {
    "second derivative": (
        second_derivative,
        "moe.experts: second derivatives through experts on several ranks are not supported",
    ),
    "meta": (
        loaded_on_one_rank,
        r"shard_experts: .* weights \(to be loaded before sharding on all ranks, or afterwards on all\): "
        "loaded on rank 0 2, on the meta device on rank 1",
    ),
    "models": (
        models_in_another_order,
        r"moe.experts: the ranks differ, where they must agree, in model: \w+ on rank 0 2, \w+ on rank 1",
    ),
}


@pytest.mark.parametrize(("function", "pattern"), ALSO_SAME_ERROR.values(), ids=ALSO_SAME_ERROR)
@pytest.mark.parametrize("workers", [3], indirect=True)
def test_all_ranks_raise_the_same_error(workers, function, pattern):
    messages = workers.run(message_of, function, ())
    assert len(set(messages)) == 1
    assert re.search(pattern, messages[0]), messages[0]


class Refuse(nn.Module):
    def forward(self, x):
        raise KeyError("no such thing")


def an_expert_that_fails(rank):
    layer = shard_experts(nn.ModuleDict({"moe": MoE(DIM, 3, experts=[nn.Identity(), Refuse(), nn.Identity()])}))["moe"]
    with pytest.raises(KeyError if rank == ODD else RuntimeError) as caught:
        layer(torch.randn(1, 9, DIM))
    return str(caught.value)


@pytest.mark.parametrize("workers", [3], indirect=True)
def test_an_experts_error_is_told_to_all_ranks(workers):
    first, failed, last = workers.run(an_expert_that_fails)
    assert first == last == "moe.experts: experts failed on rank 1: KeyError: 'no such thing'"
    assert failed == "'no such thing'"


def groups_made_again(rank):
    """Of the same size and default, a group made again serves; else the error says what to do."""
    own = shard_experts(nn.ModuleDict({"moe": moe_of(rank)}), dist.new_group([0, 1]))["moe"]
    layer = shard_experts(nn.ModuleDict({"moe": moe_of(rank)}))["moe"]
    x = torch.randn(1, 3, DIM, generator=torch.Generator().manual_seed(rank))
    layer.eval()
    before = layer(x).outputs
    store = dist.distributed_c10d._get_default_store()
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.PrefixStore("again", store), rank=rank, world_size=2)
    assert torch.equal(layer(x).outputs, before)
    with pytest.raises(
        RuntimeError, match=r"moe.experts: its process group '\d+' is gone, .*: build the model anew and shard it over"
    ):
        own(x)
    dist.destroy_process_group()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(
        RuntimeError, match=r"moe.experts: its experts were sharded over 2 ranks, but its process group has 1: build"
    ):
        layer(x)


def test_groups_that_were_destroyed_and_made_again():
    workers = Workers(2)
    workers.run(groups_made_again)
    workers.kill()
