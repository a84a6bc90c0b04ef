"""Upcycling: the sparse layer starts by computing what the dense one did, and experts can be averaged back."""

from functools import partial

import pytest
import torch
from torch import nn

from st_moe_pytorch import Expert, MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.tools.upcycle import as_expert, average_experts, dense_copies


def feed_forwards(dim):
    return {
        "expert": Expert(dim),
        "sequential": nn.Sequential(nn.Linear(dim, 24), nn.GELU(), nn.Dropout(0.0), nn.Linear(24, dim)),
        "narrowing": nn.Linear(dim, 3),
    }


@pytest.mark.parametrize("top_n", [2, 3, 4])
@pytest.mark.parametrize("kind", ["expert", "sequential", "narrowing"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_layer_starts_as_the_dense_one(kind, top_n, dtype, tolerance):
    ffn = feed_forwards(16)[kind].to(dtype)
    x = torch.randn(3, 20, 16, dtype=dtype)
    for straight_through in (True, False):
        moe = MoE.from_dense(ffn, 16, 8, gating_top_n=top_n, straight_through_dispatch_tensor=straight_through).to(
            dtype
        )
        for training in (True, False):
            torch.testing.assert_close(moe.train(training)(x).outputs, ffn(x), rtol=tolerance, atol=tolerance)


def test_gradients_of_the_copies_add_up_to_the_dense_ones():
    ffn = Expert(16).double()
    moe = MoE.from_dense(ffn, 16, 4).double()
    x, cotangent = torch.randn(2, 9, 16, dtype=torch.float64), torch.randn(2, 9, 16, dtype=torch.float64)
    inputs = [x.requires_grad_(), x.detach().clone().requires_grad_()]
    (moe(inputs[0]).outputs * cotangent).sum().backward()
    (ffn(inputs[1]) * cotangent).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-9, atol=1e-9)
    for name, parameter in ffn.named_parameters():
        assert parameter.grad.abs().max() > 1e-3
        summed = sum(expert.get_parameter(name).grad for expert in moe.experts.experts)
        torch.testing.assert_close(summed, parameter.grad, rtol=1e-9, atol=1e-9)


def test_block_starts_as_the_block_with_the_dense_layer():
    ffn = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16)).double()
    block = SparseMoEBlock(MoE.from_dense(ffn, 16, 4), add_ff_before=True).double()
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    y = block.ff_before(x) + x
    y = ffn(block.moe_prenorm(y)) + y
    torch.testing.assert_close(block(x).outputs, block.ff_after(y) + y, rtol=1e-12, atol=1e-12)


def test_arguments_and_a_gate_decide_instead_of_the_defaults():
    ffn = nn.Linear(8, 8)
    moe = MoE.from_dense(ffn, 8, 4, capacity_factor_train=1.5, balance_loss_coef=0.5)
    assert (moe.gate.capacity_factor_train, moe.gate.capacity_factor_eval, moe.balance_loss_coef) == (1.5, None, 0.5)
    gate = TopNGating(8, 4, policy_train="threshold")
    assert MoE.from_dense(ffn, 8, 4, gate=gate).gate is gate
    assert gate.policy_train == "threshold"


def test_noise_breaks_the_symmetry_by_as_much_as_it_says():
    ffn = nn.Linear(64, 64)
    before = [parameter.clone() for parameter in ffn.parameters()]
    copies = dense_copies(ffn, 3, noise=0.1)
    for copy in copies:
        difference = (copy.weight - ffn.weight).std() / ffn.weight.std()
        assert 0.08 < difference < 0.12
    assert not torch.equal(copies[0].weight, copies[1].weight)
    assert all(map(torch.equal, ffn.parameters(), before))
    with pytest.raises(ValueError, match="noise must be 0 or more, got -1"):
        dense_copies(ffn, 3, noise=-1)


def test_averaging_copies_gives_back_the_dense_layer_and_means_of_others():
    ffn = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    back = average_experts(dense_copies(ffn, 4))
    assert all(map(torch.equal, back.state_dict().values(), ffn.state_dict().values()))
    experts = [nn.Linear(4, 4) for _ in range(3)]
    mean = average_experts(nn.ModuleList(experts))
    torch.testing.assert_close(mean.weight, (experts[0].weight + experts[1].weight + experts[2].weight) / 3)
    assert mean not in experts


def test_averaging_refuses_nothing_and_what_differs():
    with pytest.raises(ValueError, match="at least one module"):
        average_experts([])
    with pytest.raises(ValueError, match="expert 1 has others than expert 0"):
        average_experts([nn.Linear(4, 4), nn.Linear(4, 5)])


def test_experts_of_a_layer_average_as_their_list_does_and_sharded_ones_say_where_the_others_are():
    moe = MoE(8, 3)
    mean, wanted = average_experts(moe.experts), average_experts(list(moe.experts.experts))
    assert all(torch.equal(value, wanted.state_dict()[name]) for name, value in mean.state_dict().items())
    moe.experts.experts.add_module("1", None)  # as on a rank that holds two of three
    for experts in (moe.experts, moe.experts.experts):
        with pytest.raises(
            ValueError, match=r"must all be on this rank to be averaged: load .*full_state_dict\(model\)"
        ):
            average_experts(experts)


def test_a_layer_from_dense_takes_all_settings_of_its_gate():
    settings = {"top_n": 3, "policy_train": "random", "eps": 1e-6, "capacity_factor_train": 1.5, "score": "sigmoid"}
    moe = MoE.from_dense(nn.Linear(8, 8), 8, 4, **settings)
    assert {name: getattr(moe.gate, name) for name in settings} == settings
    assert MoE.from_dense(nn.Linear(8, 8), 8, 4, gating_top_n=1).gate.top_n == 1
    assert MoE.from_dense(nn.Linear(8, 8), 8, 4).gate.policy_eval == "all"


def test_a_feed_forward_whose_copies_would_run_the_original_is_refused():
    ffn = nn.Sequential(nn.Linear(8, 8))
    original = ffn[0].forward
    ffn[0].forward = lambda x: 2 * original(x)
    with pytest.raises(ValueError, match=r"ffn must not have an assigned forward, .* got one on 0"):
        MoE.from_dense(ffn, 8, 4)
    ffn[0].forward = partial(type(ffn[0]).forward, ffn[0])  # as accelerate does, copied with its module
    moe = MoE.from_dense(ffn, 8, 4)
    moe(torch.randn(1, 3, 8)).outputs.sum().backward()
    assert moe.experts.experts[1][0].weight.grad is not None
    assert ffn[0].weight.grad is None


class Gated(nn.Module):
    """A gated feed-forward as models of transformers have it, of random weights."""

    def __init__(self, names, act=None, bias=False, dropout=None):
        super().__init__()
        *ups, down = names
        for name in ups:
            self.add_module(name, nn.Linear(6, 10 * 2 // len(ups), bias))
        self.add_module(down, nn.Linear(10, 6, bias))
        self.act, self.names = nn.SiLU() if act is None else act, names
        if dropout is not None:
            self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, x):
        *ups, down = (self.get_submodule(name) for name in self.names)
        gate, up = torch.cat([layer(x) for layer in ups], dim=-1).chunk(2, dim=-1)
        hidden = self.act(gate) * up
        return down(self.dropout(hidden) if hasattr(self, "dropout") else hidden)


LLAMA, PHI, T5 = ("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("wi_0", "wi_1", "wo")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("act", [nn.GELU(), nn.GELU("tanh"), nn.SiLU()], ids=str)
@pytest.mark.parametrize("names", [LLAMA, PHI, T5], ids=str)
def test_an_expert_computes_what_a_gated_feed_forward_does(names, act, bias):
    ffn = Gated(names, act, bias).double()
    before = {name: parameter.clone() for name, parameter in ffn.named_parameters()}
    expert, x = as_expert(ffn), torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(expert(x), ffn(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(MoE.from_dense(expert, 6, 4).double()(x).outputs, ffn(x), rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        for parameter in expert.parameters():
            parameter.zero_()
    torch.testing.assert_close(dict(ffn.named_parameters()), before, rtol=0, atol=0)


def test_an_expert_is_in_the_state_of_its_feed_forward():
    with torch.device("meta"):
        assert {p.device.type for p in as_expert(Gated(LLAMA)).parameters()} == {"meta"}
    ffn = Gated(LLAMA)
    ffn.down_proj.requires_grad_(False)
    assert [p.requires_grad for p in as_expert(ffn).parameters()] == [True, False]
    ffn = Gated(T5, dropout=0.3).requires_grad_(False).bfloat16()
    ffn.wo.float()  # as transformers has it in T5 in half types
    for training in (True, False):
        expert = as_expert(ffn.train(training))
        assert (expert.training, expert.net.dropout.p, expert.net.dropout.training) == (training, 0.3, training)
        assert {(p.dtype, p.requires_grad) for p in expert.parameters()} == {(torch.bfloat16, False)}
    assert "dropout" not in dict(as_expert(Gated(LLAMA)).net.named_children())
    assert {p.device.type for p in as_expert(Gated(LLAMA).to("meta")).parameters()} == {"meta"}


def hooked(ffn):
    ffn.down_proj.register_forward_hook(lambda *_: None)
    return ffn


def broken(ffn):
    nn.init.constant_(ffn.up_proj.weight, torch.nan)
    return ffn


class Louder(Gated):
    def forward(self, x):
        return super().forward(x) * 1.1


class Swapped(Gated):
    def forward(self, x):
        return self.down_proj(self.act(self.up_proj(x)) * self.gate_proj(x))


def partly(ffn):
    ffn.up_proj.bias = None
    return ffn


def adapted(ffn):
    ffn.down_proj = nn.Sequential(ffn.down_proj)
    return ffn


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.Linear(6, 6),
            "ffn must have nn.Linears gate_proj, up_proj, down_proj or .* gelu_tanh, silu, without hooks, got L",
        ),
        (
            lambda: Gated(LLAMA, nn.ReLU()),
            "ffn must have nn.Linears .* and one of gelu, gelu_tanh, silu, .*, got Gated",
        ),
        (lambda: adapted(Gated(LLAMA)), "ffn must have nn.Linears .*, got Gated"),
        (lambda: hooked(Gated(LLAMA)), "without hooks, got Gated"),
        (lambda: Louder(LLAMA).bfloat16(), "got other outputs from Louder"),
        (lambda: broken(Gated(LLAMA)), "got other outputs from Gated"),
        (lambda: partly(Gated(LLAMA, bias=True)), "with biases on all layers or on none, got other outputs from Gated"),
        (
            lambda: Swapped(LLAMA),
            r"ffn must compute down\(activation\(gate\) \* up\), .*, got other outputs from Swapped",
        ),
        (lambda: Swapped(LLAMA).bfloat16(), "got other outputs from Swapped"),
    ],
)
def test_feed_forwards_that_no_expert_can_be_are_refused(make, message):
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        as_expert(make())
