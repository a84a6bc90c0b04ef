"""What `TopNGating` does beyond the paper, against loops: service by token, sigmoid scores, raw gates, bias, jitter."""

import math
from contextlib import nullcontext
from itertools import product

import pytest
import torch
from oracles import assert_close, gradients, layer_by_token
from torch import nn

from st_moe_pytorch import Expert, Experts, MoE, TopNGating
from st_moe_pytorch.experts import run_shared
from st_moe_pytorch.tools.audit import audit_dependence
from st_moe_pytorch.tools.swap import collect_aux_losses, sparsify, swapped


def route_by_loops(logits, draws, mask, *, top_n, policy, threshold, capacity, priority, score, normalize, bias):
    """Experts, gates and slots (-1 for none) of every choice by logits (b n e), and the balance loss, by group."""
    b, n, e = logits.shape
    experts, gates, slots = [], [], [[[-1] * top_n for _ in range(n)] for _ in range(b)]
    losses = []
    for g in range(b):
        scores = [row.softmax(0) if score == "softmax" else 1 / (1 + (-row).exp()) for row in logits[g]]
        chosen, weights = [], []
        for t in range(n):
            order = sorted(range(e), key=lambda i: (-(scores[t][i] + bias[i]).item(), i))[:top_n]
            raw = [scores[t][i] for i in order]
            total = sum(raw) + 1e-9 if top_n > 1 and normalize else 1.0
            chosen.append(order)
            weights.append([weight / total for weight in raw])
        real = [mask is None or bool(mask[g, t]) for t in range(n)]

        def asks(t, r, g=g, weights=weights, real=real):
            gate = weights[t][r].item()
            by_policy = {
                "all": True,
                "none": False,
                "threshold": gate > threshold,
                "random": draws[g, t, r].item() < gate / threshold,
            }
            return real[t] and (r == 0 or by_policy[policy])

        if priority == "token":
            line = [(t, r) for t in range(n) for r in range(top_n)]
        else:
            tokens = range(n)
            if priority == "gate":
                tokens = sorted(tokens, key=lambda t: -scores[t][chosen[t][0]].item())
            line = [(t, r) for r in range(top_n) for t in tokens]
        used = [0] * e
        for t, r in line:
            if asks(t, r):
                if used[chosen[t][r]] < capacity:
                    slots[g][t][r] = used[chosen[t][r]]
                used[chosen[t][r]] += 1
        experts.append(chosen)
        gates.append(torch.stack([torch.stack(weight) for weight in weights]))
        if any(real):
            count = sum(real)
            share = [sum(chosen[t][0] == i for t in range(n) if real[t]) / count for i in range(e)]
            mean = [sum(scores[t][i] / scores[t].sum() for t in range(n) if real[t]) / count for i in range(e)]
            losses.append(e * sum(f * p for f, p in zip(share, mean, strict=True)))
    return experts, torch.stack(gates), slots, sum(losses) / max(len(losses), 1)


SETTINGS = list(product(("position", "token", "gate"), ("softmax", "sigmoid"), (True, False), (False, True)))


@pytest.mark.parametrize(("priority", "score", "normalize", "biased"), SETTINGS)
@pytest.mark.parametrize("top_n", [1, 2, 4])
def test_routing_is_that_of_the_loops(priority, score, normalize, biased, top_n):
    generator = torch.Generator().manual_seed(SETTINGS.index((priority, score, normalize, biased)) + 100 * top_n)
    policy = ("all", "threshold", "random")[(top_n + biased) % 3]
    gate = TopNGating(
        4,
        5,
        top_n=top_n,
        policy_train=policy,
        threshold_train=0.25,
        capacity_factor_train=0.4 * top_n,
        min_expert_capacity=1,
        priority=priority,
        score=score,
        normalize_gates=normalize,
        balance_bias=biased,
    ).double()
    if biased:
        gate.bias.copy_(torch.randn(5, generator=generator) * 0.3)
    logits = torch.randn(3, 9, 5, generator=generator, dtype=torch.float64).requires_grad_()
    draws = torch.rand(3, 9, top_n, generator=generator, dtype=torch.float64)
    mask = torch.rand(3, 9, generator=generator) < 0.8
    routing = gate.decide(logits, mask=mask, draws=draws)
    bias = gate.bias.tolist() if biased else [0.0] * 5
    settings = {"top_n": top_n, "policy": policy, "threshold": 0.25, "capacity": routing.capacity, "priority": priority}
    experts, gates, slots, balance = route_by_loops(
        logits, draws, mask, **settings, score=score, normalize=normalize, bias=bias
    )
    assert routing.capacity == max(int(9 * 0.4 * top_n / 5), 1)
    assert routing.indices.tolist() == experts
    assert routing.slots.tolist() == slots
    assert (routing.kept == (torch.tensor(slots) >= 0)).all()
    assert routing.dropped.any()
    cotangent = torch.randn(gates.shape, generator=generator, dtype=torch.float64)
    assert_close(routing.gates, gates, 1e-12)
    assert_close(routing.balance_loss, balance, 1e-12)
    got, wanted = (
        torch.autograd.grad((g * cotangent).sum() + loss, logits)[0]
        for g, loss in ((routing.gates, routing.balance_loss), (gates, balance))
    )
    assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize("top_n", [1, 2, 3, 4])
@pytest.mark.parametrize("group_size", [None, 6])
def test_served_by_token_no_output_depends_on_later_tokens(top_n, group_size):
    """In training, with a tight capacity. The paper's order depends on them from two choices on."""
    torch.manual_seed(top_n)
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    found = {}
    for priority in ("token", "position"):
        torch.manual_seed(0)
        settings = {"capacity_factor_train": 0.5 * top_n, "min_expert_capacity": 1, "group_size": group_size}
        moe = MoE(6, 4, gate=TopNGating(6, 4, top_n=top_n, priority=priority, **settings)).double()
        draws = torch.rand(2, 12, top_n, dtype=torch.float64)
        routing = moe.gate.route(x, draws=draws)
        assert routing.dropped.any()
        outputs = moe(x, draws=draws).outputs
        moved = torch.zeros(2, 12, dtype=torch.bool)
        for token in range(1, 12):
            later = torch.arange(12) >= token
            for other in (torch.randn_like(x), x.flip(1)):
                changed = moe(torch.where(later[:, None], other, x), draws=draws).outputs
                moved |= ((changed - outputs).abs().amax(-1) > 1e-12) & ~later
        audited = audit_dependence(moe, x).on_later_tokens
        found[priority] = moved, audited
    assert not found["token"][0].any()
    assert not found["token"][1].any()
    assert (top_n == 1) or (found["position"][0].any() and found["position"][1].any())


def test_jitter_multiplies_what_the_router_sees_in_training():
    gate = TopNGating(6, 4, jitter=0.25, policy_train="all").double()
    with torch.no_grad():
        gate.to_gates.weight.zero_()[0, 0] = 1.0
    x = torch.ones(50, 40, 6, dtype=torch.float64)
    logits = gate.route(x).logits[..., 0]
    assert logits.min() >= 0.75
    assert logits.max() <= 1.25
    assert abs(logits.mean() - 1) < 0.02
    assert abs(logits.var() - 0.5**2 / 12) < 0.002
    assert (gate.eval().route(x).logits[..., 0] == 1).all()
    gate.train().jitter = math.nan
    with pytest.raises(ValueError, match="jitter must lie in"):
        gate.route(x)


def test_a_bias_is_a_buffer_of_its_own_that_nothing_in_a_forward_changes():
    gate = TopNGating(6, 4, balance_bias=True)
    assert "bias" in gate.state_dict()
    assert "bias" not in TopNGating(6, 4).state_dict()
    assert gate.balance_bias
    assert gate.bias.dtype == torch.float32
    gate.bias.fill_(0.5)
    gate.route(torch.randn(2, 9, 6)).balance_loss.backward()
    assert (gate.bias == 0.5).all()
    gate.reset_parameters()
    assert not gate.bias.any()
    with pytest.raises(ValueError, match="differentiable_topk must be False with balance_bias"):
        TopNGating(6, 4, balance_bias=True, differentiable_topk=True)
    with pytest.raises(ValueError, match="score must be one of 'softmax', 'sigmoid', got 'relu'"):
        TopNGating(6, 4, score="relu")


def variant(shared=True, bias=False, **experts):
    """A layer of all that is new: three choices with sigmoid scores as gates, experts without bias, a shared one."""
    torch.manual_seed(0)
    gate = TopNGating(
        6,
        5,
        top_n=3,
        score="sigmoid",
        normalize_gates=False,
        balance_bias=True,
        priority="token",
        policy_train="threshold",
    )
    gate.capacity_factor_train = 1.5
    experts = experts or {"experts": [Expert(6, 2, bias=bias, prenorm=True) for _ in range(5)]}
    moe = MoE(6, 5, gate=gate, shared_expert=Expert(6, 1, bias=False) if shared else None, **experts).double()
    gate.bias.copy_(torch.randn(5) * 0.2)
    return moe


def by_token(moe, x, mask=None):
    """Outputs of the layer, one token at a time."""
    routing = moe.gate.route(x, mask=mask)
    real = torch.ones_like(x[..., :1]) if mask is None else mask.unsqueeze(-1)
    x = x * real
    outputs = layer_by_token(x, routing, moe.experts.experts, routing.straight_through)
    if moe.shared_expert is not None:
        outputs = outputs + torch.stack([moe.shared_expert(token) for token in x.flatten(0, 1)]).view_as(x) * real
    return outputs


PATHS = ["eager", "compiled", "slots", "dense"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True])
def test_layers_of_all_that_is_new_equal_the_tokens_one_by_one(path, masked):
    moe = variant()
    x, cotangent = torch.randn(2, 2, 9, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    x.requires_grad_()
    mask = torch.arange(9) < torch.tensor([[9], [5]]) if masked else None
    inputs = [x, *moe.parameters()]
    expected = by_token(moe, x, mask)
    wanted = gradients(expected, cotangent, inputs)
    call = moe
    if path == "compiled":
        torch._dynamo.reset()
        call = torch.compile(moe, backend="aot_eager", fullgraph=True)
    if path == "slots":
        experts = moe.experts
        moe.experts = Foreign(experts.experts)
    if path == "dense":
        moe.gate.register_forward_hook(lambda gate, args, output: None)
    with pytest.warns(UserWarning, match="quadratic") if path == "dense" else nullcontext():
        outputs = call(x, mask=mask).outputs
    assert_close(outputs, expected, 1e-12)
    for got, want in zip(gradients(outputs, cotangent, inputs), wanted, strict=True):
        assert_close(got, want, 1e-10)


class Foreign(nn.Module):
    """Another module in the place of `Experts`, on slots."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return torch.stack([expert(part) for expert, part in zip(self.experts, x.unbind(1), strict=True)], dim=1)


def test_nothing_is_rounded_before_a_shared_expert_is_added():
    moe = MoE(6, 4, gate=TopNGating(6, 4, policy_train="all", capacity_factor_train=None), shared_expert=nn.Identity())
    moe.bfloat16()
    x = torch.randn(2, 9, 6).bfloat16()
    routing = moe.gate.route(x)
    layout = routing.rows()
    alone = routing.combine(moe.experts(routing.dispatch(x, layout), layout.offsets), layout)
    assert alone.dtype == torch.float32
    expected = (alone + x).bfloat16()
    assert torch.equal(moe(x).outputs, expected)
    assert not torch.equal(alone.bfloat16() + x, expected)


def test_padding_of_a_shared_expert_may_hold_anything():
    moe, mask = variant(), torch.arange(9) < torch.tensor([[9], [5]])
    moe.shared_expert = Expert(6, 2).double()  # whose biases give something for nothing
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    found = []
    for padding in (0.0, torch.nan):
        moe.zero_grad()
        outputs = moe(x.masked_fill(~mask.unsqueeze(-1), padding), mask=mask).outputs
        outputs.square().sum().backward()
        assert not outputs[~mask].any()
        found.append([outputs, *(p.grad for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_shared_expert_of_another_width_is_refused():
    moe = MoE(6, 2, shared_expert=nn.Linear(6, 1))
    with pytest.raises(
        ValueError, match=r"shared_expert must return the shape of the experts' results, \(1, 3, 6\), got \(1, 3, 1\)"
    ):
        moe(torch.randn(1, 3, 6))


def test_upcycled_and_swapped_layers_keep_their_shared_expert():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))).double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    dense = model(x)
    sparsify(model, "1", lambda ffn: MoE.from_dense(ffn, 6, 4, shared_expert=Expert(6, bias=False), score="softmax"))
    layer = swapped(model)["1"]
    with collect_aux_losses():
        outputs = model(x)
    assert_close(outputs, dense + layer.shared_expert(model[0](x)), 1e-12)


def test_experts_without_bias_share_products():
    """In compiled code and on accelerators: one product for all experts, whose second derivatives are right too."""
    experts = Experts([Expert(6, 2, bias=False, prenorm=True) for _ in range(3)]).double()
    assert not any("bias" in name and "mult_bias" not in name for name, _ in experts.named_parameters())
    rows, cotangent = (torch.randn(8, 6, dtype=torch.float64) for _ in range(2))
    offsets = torch.tensor([3, 3, 7], dtype=torch.int32)
    inputs = [rows.requires_grad_(), *experts.parameters()]
    expected, outputs = experts(rows, offsets), run_shared(experts.experts, rows, offsets)
    assert_close(outputs[:7], expected[:7], 1e-12)
    cotangent[7:] = 0
    for got, wanted in zip(gradients(outputs, cotangent, inputs), gradients(expected, cotangent, inputs), strict=True):
        assert_close(got, wanted, 1e-10, may_vanish=True)
    assert torch.autograd.gradgradcheck(lambda rows: run_shared(experts.experts, rows, offsets)[:7], rows)


@pytest.mark.parametrize("num_experts", [64, 256])
def test_eight_of_many_small_experts(num_experts):
    torch.manual_seed(num_experts)
    gate = TopNGating(4, num_experts, top_n=8, policy_train="all", capacity_factor_train=None, score="sigmoid")
    moe = MoE(4, num_experts, gate=gate, experts=[Expert(4, 0.5, bias=False) for _ in range(num_experts)]).double()
    x, cotangent = torch.randn(2, 2, 10, 4, dtype=torch.float64)
    x.requires_grad_()
    inputs = [x, *moe.parameters()]
    expected, outputs = by_token(moe, x), moe(x).outputs
    assert_close(outputs, expected, 1e-12)
    for got, wanted in zip(gradients(outputs, cotangent, inputs), gradients(expected, cotangent, inputs), strict=True):
        assert_close(got, wanted, 1e-10, may_vanish=True)
    assert sum(int(routing) for routing in moe.gate.route(x).kept.sum((0, 1))) == 160
