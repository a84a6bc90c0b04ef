"""The layer as an nn.Module: copies, checkpoints, meta construction, low precision, DDP, and the names of 0.1.8."""

import copy
import inspect
import io
import operator
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch
from oracles import assert_close, gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import GEGLU, Expert, Experts, MoE, SparseMoEBlock, TopNGating


def same(actual, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_state_dict_is_that_of_0_1_8():
    expert = {
        "net.0.weight": (170, 32),
        "net.0.bias": (170,),
        "net.1.mult_bias": (85,),
        "net.2.weight": (32, 85),
        "net.2.bias": (32,),
    }
    layer = {"gate.threshold_train": (2,), "gate.threshold_eval": (2,), "gate.to_gates.weight": (4, 32)}
    layer |= {f"experts.experts.{i}.{key}": shape for i in range(4) for key, shape in expert.items()}
    moe = MoE(dim=32, num_experts=4)
    assert {key: tuple(value.shape) for key, value in moe.state_dict().items()} == layer
    assert moe.gate.threshold_train.tolist() == pytest.approx([1e-9, 0.2])

    feed_forward = {
        "0.gamma": (32,),
        "1.weight": (170, 32),
        "1.bias": (170,),
        "2.mult_bias": (85,),
        "3.weight": (32, 85),
        "3.bias": (32,),
    }
    block = {f"moe.{key}": shape for key, shape in layer.items()} | {"moe_prenorm.gamma": (32,)}
    block |= {f"{name}.net.{key}": shape for name in ("ff_before", "ff_after") for key, shape in feed_forward.items()}
    built = SparseMoEBlock(moe, add_ff_before=True)
    assert {key: tuple(value.shape) for key, value in built.state_dict().items()} == block
    buffers = {name: tuple(buffer.shape) for name, buffer in built.named_buffers() if name not in built.state_dict()}
    assert buffers == {"moe.gate.zero": (1,), "moe.experts.dummy": (1,)}


def test_attributes_that_clients_read():
    moe = MoE(16, num_experts=4)
    assert (moe.dim, moe.num_experts, moe.gate.eps, moe.gate.top_n, moe.gate.num_gates) == (16, 4, 1e-9, 2, 4)
    assert (moe.gate.differentiable_topk, moe.gate.straight_through_dispatch_tensor) == (False, True)
    assert (moe.experts.num_experts, len(moe.experts.experts)) == (4, 4)
    assert not moe.experts.is_distributed
    assert isinstance(moe.gate.to_gates, nn.Linear)
    best = moe.gate.topk(torch.tensor([0.1, 0.4, 0.4, 0.1]), k=2)
    assert best.indices.tolist() == [1, 2]
    assert best.values.tolist() == pytest.approx([0.4, 0.4])
    assert best.coor_descent_values is None


def test_topk_may_be_assigned_and_experts_may_come_as_a_sequential():
    chain = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    moe, x = MoE(8, 4, experts=chain, capacity_factor_eval=None).eval(), torch.randn(2, 5, 8)
    assert all(map(operator.is_, moe.experts.experts, chain))
    usual = moe.gate.route(x).indices
    best = moe.gate.topk
    moe.gate.topk = lambda values, k: best(-values, k)
    assert (moe.gate.route(x).indices != usual).all()
    assert moe(x).outputs.shape == x.shape


@pytest.mark.parametrize(("several", "one"), [(list, float), (tuple, float), (torch.tensor,) * 2, (np.array,) * 2])
def test_thresholds_are_numbers_or_sequences_of_any_kind(several, one):
    gate = TopNGating(8, 4, top_n=3, threshold_train=several([0.25, 0.5]), threshold_eval=one(0.125))
    assert gate.threshold_train.tolist()[1:] == [0.25, 0.5]
    assert gate.threshold_eval.tolist()[1:] == [0.125, 0.125]


def test_names_and_signatures_of_0_1_8():
    from st_moe_pytorch import st_moe_pytorch as old

    for name in (
        "GEGLU",
        "AllGather",
        "Expert",
        "Experts",
        "MoE",
        "ModuleList",
        "RMSNorm",
        "SparseMoEBlock",
        "TopNGating",
    ):
        assert isinstance(getattr(old, name), type)
    assert old.MoE is MoE
    assert old.exists(0)
    assert not old.exists(None)
    assert (old.default(None, 3), old.default(None, lambda: 4), old.default(5, 3)) == (3, 4, 5)
    ones = torch.ones(2, 3, 4, 5)
    assert old.cumsum_exclusive(ones)[0, :, 0, 0].tolist() == [0, 1, 2]
    assert old.cumsum_exclusive(ones, dim=-1)[0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    names = list(inspect.signature(MoE).parameters)
    assert names[:8] == [
        "dim",
        "num_experts",
        "expert_hidden_mult",
        "threshold_train",
        "threshold_eval",
        "capacity_factor_train",
        "capacity_factor_eval",
        "gating_top_n",
    ]
    assert names[8:13] == [
        "balance_loss_coef",
        "router_z_loss_coef",
        "experts",
        "straight_through_dispatch_tensor",
        "differentiable_topk",
    ]


def test_import_needs_no_process_group_and_no_test_package():
    code = "import sys, st_moe_pytorch; assert not {'numpy.testing', 'matplotlib', 'hypothesis'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def build(**kwargs) -> SparseMoEBlock:
    gate = TopNGating(8, 4, **{"policy_train": "threshold", **kwargs})
    return SparseMoEBlock(MoE(8, 4, gate=gate), add_ff_before=True)


def test_deepcopy_and_save():
    block, x = build(), torch.randn(2, 9, 8)
    assert same(copy.deepcopy(block)(x), block(x))
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    assert same(torch.load(file, weights_only=False)(x), block(x))
    other = build()
    other.load_state_dict(block.state_dict())
    assert same(other(x), block(x))


def test_meta_construction():
    block, x = build(), torch.randn(2, 9, 8)
    with torch.device("meta"):
        empty = build()
    empty.load_state_dict(block.state_dict(), assign=True)
    assert same(empty(x), block(x))
    assert build().to("meta")(x.to("meta")).outputs.shape == x.shape


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_repeats_the_same_random_routing(reentrant):
    block = build(policy_train="random", threshold_train=1).double()
    x = torch.randn(2, 9, 8, dtype=torch.float64, requires_grad=True)
    inputs, cotangent = [x, *block.parameters()], torch.randn_like(x)

    def gradients_of(run):
        torch.manual_seed(3)
        outputs, total, *_ = run(x)
        for tensor in inputs:
            tensor.grad = None
        ((outputs * cotangent).sum() + total).backward()
        return [tensor.grad for tensor in inputs]

    seen = []
    own_route = block.moe.gate.route
    block.moe.gate.route = lambda *args, **kwargs: seen.append(own_route(*args, **kwargs)) or seen[-1]
    expected = gradients_of(block)
    actual = gradients_of(lambda x: checkpoint(block, x, use_reentrant=reentrant))
    first, recomputed = seen[-2:]
    assert torch.equal(first.asked, recomputed.asked)
    assert not first.asked.all()
    for gradient, wanted in zip(actual, expected, strict=True):
        assert_close(gradient, wanted)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_routes_in_float32_and_keeps_the_dtype_of_x(training):
    block = build().train(training)
    seen = []
    own_route = block.moe.gate.route
    block.moe.gate.route = lambda *args, **kwargs: seen.append(own_route(*args, **kwargs)) or seen[-1]
    x = torch.randn(2, 9, 8, requires_grad=True)
    expected = block(x)
    with torch.autocast("cpu", torch.bfloat16):
        moe_outputs = block.moe(x).outputs
        actual = block(x)
    assert moe_outputs.dtype == actual.outputs.dtype == torch.float32
    assert seen[-1].logits.dtype == actual.balance_loss.dtype == torch.float32
    assert_close(actual.outputs, expected.outputs, 0.05)
    actual.outputs.sum().backward()
    assert x.grad.dtype == torch.float32


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_pure_half_precision(dtype, training):
    block = build().train(training)
    x = torch.randn(2, 9, 8)
    expected = block(x)
    low = copy.deepcopy(block).to(dtype)
    actual = low(x.to(dtype))
    assert actual.outputs.dtype == dtype
    assert actual.total_aux_loss.dtype == torch.float32
    assert_close(actual.outputs.float(), expected.outputs, 0.05)
    (actual.outputs.float().sum() + actual.total_aux_loss).backward()
    assert low.moe.gate.to_gates.weight.grad.dtype == dtype


class LowRank(nn.Module):
    """A wrapper around a Linear as LoRA makes them: its own dtype decides."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.down, self.up = nn.Linear(linear.in_features, 2, bias=False), nn.Linear(2, linear.out_features, bias=False)

    def forward(self, x):
        return self.linear(x) + self.up(self.down(x.to(self.down.weight.dtype)))


def test_wrapped_linears_are_called():
    moe, x = MoE(8, 4), torch.randn(2, 9, 8)
    before = moe.eval()(x).outputs
    moe.gate.to_gates = LowRank(moe.gate.to_gates)
    for expert in moe.experts.experts:
        expert.net[0] = LowRank(expert.net[0])
    assert not torch.equal(moe(x).outputs, before)
    moe.train()(x).outputs.sum().backward()
    assert all(p.grad is not None for p in moe.parameters())


def test_initialisers_by_type_and_rank_reach_every_weight():
    moe, seen = MoE(8, 4), []
    moe.apply(lambda module: seen.append(module) if isinstance(module, nn.Linear) else None)
    assert len(seen) == 1 + 2 * 4
    for parameter in moe.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)


def test_forward_hooks_of_experts_see_their_tokens():
    moe, tokens = MoE(8, 4, capacity_factor_train=None), []
    for expert in moe.experts.experts:
        expert.register_forward_hook(lambda module, args, output: tokens.append(args[0].shape))
    moe(torch.randn(2, 9, 8))
    assert all(shape[0] == 1 and shape[2] == 8 for shape in tokens)
    assert 18 <= sum(shape[1] for shape in tokens) <= 36


def test_a_shared_expert_gets_the_sum_of_its_gradients():
    shared = Expert(8).double()
    moe = MoE(
        8, 3, gate=TopNGating(8, 3, policy_train="all", capacity_factor_train=None), experts=[shared] * 3
    ).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    # all experts being one and all gates summing to one, the layer is that expert
    expected = shared(x)
    actual, cotangent = moe(x).outputs, torch.randn_like(x)
    # eps is in the denominator of the gates
    assert_close(actual, expected, 1e-8)
    parameters = list(shared.parameters())
    for gradient, wanted in zip(
        gradients(actual, cotangent, parameters), gradients(expected, cotangent, parameters), strict=True
    ):
        assert_close(gradient, wanted, 1e-8)


def test_plain_ddp_trains_experts_without_tokens(tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/init", rank=0, world_size=1)
    try:
        block = build(top_n=1, capacity_factor_train=0.25, min_expert_capacity=1).double()
        x = torch.randn(1, 2, 8, dtype=torch.float64)
        alone = copy.deepcopy(block)
        ddp = nn.parallel.DistributedDataParallel(block)
        for model in (ddp, alone):
            outputs, total, *_ = model(x)
            (outputs.square().sum() + total).backward()
        for (name, parameter), wanted in zip(block.named_parameters(), alone.parameters(), strict=True):
            assert parameter.grad is not None, name
            assert torch.equal(parameter.grad, wanted.grad), name
        unused = [e for e in block.moe.experts.experts if all((p.grad == 0).all() for p in e.parameters())]
        assert 2 <= len(unused) <= 3
    finally:
        dist.destroy_process_group()


def test_built_experts_keep_their_own_settings():
    built = Experts([Expert(8) for _ in range(2)], is_distributed=False, allow_var_seq_len=True)
    assert (MoE(8, 2, experts=built).experts.is_distributed, built.allow_var_seq_len) == (False, True)


@pytest.mark.parametrize(
    ("build", "lost"),
    [(GEGLU, "dim"), (lambda dim: TopNGating(dim, 2), "policy_train"), (lambda dim: MoE(dim, 2).experts, "parallel")],
)
def test_whole_modules_of_older_versions_say_to_load_their_state_dicts(build, lost):
    module = build(8)
    assert pickle.loads(pickle.dumps(module)).state_dict().keys() == module.state_dict().keys()
    del vars(module)[lost]
    with pytest.raises(
        RuntimeError,
        match=f"was pickled by another version .* lacks '{lost}': save its state_dict\\(\\) there and load",
    ):
        pickle.loads(pickle.dumps(module))
