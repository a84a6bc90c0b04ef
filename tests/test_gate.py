"""The contract of a gate: whatever decides can be a router, and every seam of the layer takes it."""

import sys

import pytest
import torch
from oracles import assert_close
from torch import nn

import st_moe_pytorch
from st_moe_pytorch import Gate, MoE, Routing, SparseMoEBlock, TopNGating
from st_moe_pytorch.tools.plan import plan
from st_moe_pytorch.tools.watch import record_routing, routing_stats


class ByPosition(Gate):
    """Every token goes to the expert of its number, with the sigmoid of that logit; logits decide nothing else."""

    def __init__(self, dim, num_gates, *, shift=0):
        super().__init__(dim, num_gates)
        self.shift = shift

    def decide(self, logits, *, mask=None, draws=None):
        b, n, e = logits.shape
        indices = ((torch.arange(n) + self.shift) % e).view(1, n, 1).expand(b, n, 1)
        real = torch.ones(b, n, 1, dtype=torch.bool) if mask is None else mask.unsqueeze(-1)
        return Routing(
            indices=indices,
            slots=(torch.arange(n) // e).view(1, n, 1).expand(b, n, 1).masked_fill(~real, -1),
            gates=logits.gather(-1, indices).sigmoid(),
            kept=real,
            asked=real,
            mask=mask,
            logits=logits,
            balance_loss=logits.new_zeros(()),
            router_z_loss=logits.new_zeros(()),
            capacity=-(-n // e),
            num_experts=e,
            groups=(b, n),
            straight_through=False,
        )


class NoGate(nn.Module):
    """Not a `Gate`: a module that has ``route``, around one."""

    def __init__(self, gate):
        super().__init__()
        self.inner = gate

    def route(self, x, noise_gates=False, noise_mult=1.0, **given):
        return self.inner.route(x, noise_gates, noise_mult, **given)


@pytest.mark.parametrize("wrap", [lambda gate: gate, NoGate], ids=["gate", "module with route"])
def test_any_router_routes_is_recorded_and_planned(wrap):
    moe = MoE(6, 3, gate=wrap(ByPosition(6, 3))).double()
    x, mask = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True), torch.rand(2, 7) < 0.7
    with record_routing(nn.ModuleDict({"layer": moe})) as records:
        outputs = SparseMoEBlock(moe, add_ff_after=False).double()(x, mask=mask).outputs - x
    normed = nn.functional.normalize(x, dim=-1) * 6**0.5
    gates = (normed @ next(p for name, p in moe.named_parameters() if "to_gates" in name).T).sigmoid()
    for b, n in mask.nonzero().tolist():
        expert = n % 3
        assert_close(outputs[b, n], gates[b, n, expert] * moe.experts.experts[expert](normed[b, n]))
    assert not outputs[~mask].any()
    assert routing_stats(records)["layer"].kept.sum() == mask.sum()
    assert plan(moe, records["layer"], {"as it is": {}})["as it is"].experts_per_token == 1


def test_settings_of_any_gate_can_be_planned_and_those_of_a_route_alone_cannot():
    moe = MoE(6, 3, gate=ByPosition(6, 3))
    with record_routing(moe) as records:
        moe(torch.randn(2, 7, 6))
    one_expert = [routing._replace(logits=routing.logits[:, :1]) for routing in records[""]]
    plans = plan(moe, one_expert, {"as it is": {}, "shifted": {"shift": 1}})
    assert plans["shifted"].largest_load == plans["as it is"].largest_load == 1
    moe.gate = NoGate(moe.gate)
    with pytest.raises(
        ValueError, match=r"settings must be \{\} for a gate that cannot decide again, a NoGate, got {'shift': 1}"
    ):
        plan(moe, records[""], {"shifted": {"shift": 1}})


def test_a_gate_without_a_decision_says_what_it_lacks():
    with pytest.raises(NotImplementedError, match=r"Gate must define decide\(logits"):
        MoE(6, 3, gate=Gate(6, 3))(torch.randn(1, 4, 6))


@pytest.mark.parametrize(
    "settings", [{}, {"group_size": 6, "priority": "gate"}, {"top_n": 3, "second_place_loss": True}], ids=str
)
def test_decisions_on_logits_are_those_on_tokens(settings):
    gate = TopNGating(6, 4, **settings).double()
    x, mask, draws = (
        torch.randn(2, 9, 6, dtype=torch.float64),
        torch.rand(2, 9) < 0.8,
        torch.rand(2, 9, settings.get("top_n", 2)),
    )
    routed = gate.route(x, mask=mask, draws=draws)
    decided = gate.decide(routed.logits, mask=mask, draws=draws)
    for mine, theirs in zip(decided, routed, strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs
    torch.manual_seed(3)
    noised = gate.route(x, True, 0.5, mask=mask, draws=draws)
    torch.manual_seed(3)
    noise = -0.5 * torch.empty_like(routed.logits).exponential_().log()
    again = gate.decide(routed.logits, mask=mask, draws=draws, noised=routed.logits + noise)
    assert torch.equal(again.gates, noised.gates)
    assert again.balance_loss == noised.balance_loss
    assert again.router_z_loss == noised.router_z_loss == routed.router_z_loss


def test_the_dense_tensors_are_those_of_a_route_with_the_same_arguments():
    gate = TopNGating(6, 4, threshold_train=1.0, capacity_factor_train=None)
    x, features = torch.randn(2, 2, 9, 6)
    draws, mask = torch.rand(2, 9, 2), torch.rand(2, 9) < 0.8
    given = {"mask": mask, "route_by": features, "draws": draws}
    dense, routing = gate(x, **given), gate.route(x, **given)
    wanted = torch.zeros(2, 9, 4, 9)
    for b, n, k in routing.kept.nonzero().tolist():
        wanted[b, n, routing.indices[b, n, k], routing.slots[b, n, k]] = routing.gates[b, n, k]
    assert torch.equal(dense.combine_tensor, wanted)
    assert torch.equal(dense.dispatch_tensor, (wanted > 0).float())
    assert dense.balance_loss == routing.balance_loss


@pytest.mark.parametrize("shape", [(2, 9, 6), (9, 6), (2, 3, 3, 6)])
@pytest.mark.parametrize("kind", [MoE, SparseMoEBlock])
def test_draws_of_a_forward_reach_the_gate(kind, shape):
    moe = MoE(6, 4, threshold_train=1.0, capacity_factor_train=None)
    layer = moe if kind is MoE else SparseMoEBlock(moe, add_ff_before=True)
    x = torch.randn(shape)
    for draw, asked in ((0.0, 2), (1.0, 1)):
        with record_routing(layer) as records:
            layer(x, draws=torch.full((*shape[:-1], 2), draw))
        ((routing,),) = records.values()
        assert (routing.asked.sum(-1) == asked).all()
    with pytest.raises(ValueError, match="draws must have"):
        layer(x, draws=torch.zeros(*shape, 2))
    with pytest.raises(ValueError, match="draws must have shape"):
        layer(x, draws=torch.zeros(*shape[:-1], 3))


class OfOldSignature(MoE):
    """As code written against 0.1.8 subclasses the layer."""

    def forward(self, x, noise_gates=False, noise_mult=1.0):
        return super().forward(x, noise_gates=noise_gates, noise_mult=noise_mult)


def test_a_subclass_of_the_old_signature_works_inside_a_block():
    block = SparseMoEBlock(OfOldSignature(6, 4))
    assert block(torch.randn(2, 9, 6), True, 0.5).outputs.shape == (2, 9, 6)


def test_a_mask_in_the_place_of_noise_is_refused_by_name():
    moe, x = MoE(6, 4), torch.randn(2, 9, 6)
    for layer in (moe, SparseMoEBlock(moe), moe.gate.route):
        for mask in (torch.ones(2, 9, dtype=torch.bool), torch.ones(1, 1, dtype=torch.bool)):
            with pytest.raises(
                ValueError, match=r"noise_gates must be a bool, got a tensor of shape .* passed by name, mask="
            ):
                layer(x, mask)


def test_settings_that_a_given_gate_would_ignore_are_refused():
    gate = TopNGating(6, 4)
    with pytest.raises(
        ValueError, match="gating_top_n, capacity_factor_eval must be set on the gate where gate= is given"
    ):
        MoE(6, 4, gating_top_n=1, capacity_factor_eval=1, gate=gate)
    assert MoE(6, 4, gating_top_n=2, capacity_factor_eval=2, gate=gate).gate is gate


def test_upcycled_gates_are_built_with_their_settings_and_none_means_the_same():
    ffn = nn.Linear(6, 6)
    for moe in (MoE.from_dense(ffn, 6, 4), MoE.from_dense(ffn, 6, 4, gate=None)):
        assert (moe.gate.policy_train, moe.gate.policy_eval, moe.gate.capacity_factor_train) == ("all", "all", None)
        assert moe.gate.eps == 1e-20
        assert moe.gate.threshold_train[0] == torch.tensor(1e-20)
    assert MoE.from_dense(ffn, 6, 4, gating_top_n=3, threshold_train=[0.1, 0.3]).gate.threshold_train[
        1:
    ].tolist() == pytest.approx([0.1, 0.3])


def test_the_module_of_the_old_name_is_there_after_the_import():
    assert sys.modules["st_moe_pytorch.st_moe_pytorch"] is st_moe_pytorch.st_moe_pytorch
    assert st_moe_pytorch.st_moe_pytorch.Experts is st_moe_pytorch.Experts


def test_layers_tell_their_settings():
    moe = MoE(6, 4, gating_top_n=1, capacity_factor_train=None, balance_loss_coef=0.5)
    moe.gate.priority = "gate"
    text = str(SparseMoEBlock(moe))
    for part in (
        "top_n=1",
        "policy_train='random', policy_eval='threshold'",
        "threshold_train=[], threshold_eval=[]",
        "capacity_factor_train=None, capacity_factor_eval=2.0",
        "balance_loss_coef=0.5",
        "priority='gate'",
    ):
        assert part in text
