"""`ExpertChoiceGating` against Mesh-TensorFlow's numbers and against loops, through every way that a layer runs."""

import copy
import warnings
from functools import partial
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import ReluExpert, assert_close, golden, golden_names, gradients, layer_by_token
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from st_moe_pytorch import Expert, ExpertChoiceGating, Gate, MoE, SparseMoEBlock
from st_moe_pytorch.losses import token_balance_loss
from st_moe_pytorch.tools.audit import audit_dependence
from st_moe_pytorch.tools.pictures import plot_drops, plot_gates, plot_load, plot_plans, text_page
from st_moe_pytorch.tools.plan import plan
from st_moe_pytorch.tools.swap import collect_aux_losses, sparsify
from st_moe_pytorch.tools.watch import record_routing, routing_stats

GATING = golden_names("gating", experts_choose=True)
LAYERS = golden_names("layer", experts_choose=True)


def golden_gate(case) -> ExpertChoiceGating:
    c = case.config
    factors = {"capacity_factor_train": c.capacity_factor, "capacity_factor_eval": c.capacity_factor}
    size = c.group_size if c.kind == "layer" else None
    gate = ExpertChoiceGating(c.d, c.e, **factors, min_expert_capacity=c.min_capacity, group_size=size)
    gate.to_gates.weight.data.copy_(case.w)
    return gate.train(c.train)


@pytest.mark.parametrize("name", GATING)
def test_golden_assignments_gates_and_gradients(name):
    case, c = golden(name), golden(name).config
    gate, x, real = golden_gate(case), case.x.clone().requires_grad_(), case.importance == 1
    routing = gate.route(x, mask=real)
    dispatch, combine = routing.dense()
    assert routing.capacity == c.capacity
    assert torch.equal(dispatch[real], case.dispatch[real].to(dispatch.dtype))
    assert_close(combine, case.combine, 1e-6)
    # Mesh-TensorFlow fills slots with padding, of gate 0, where it runs out of real tokens; here they stay empty
    assert not dispatch[~real].any()
    assert not case.combine[~real].any()

    leaves = {"x": x, "w": gate.to_gates.weight}
    outputs = {"combine": (combine, case.probe_n[:, :, None, None] * case.probe_ec)}
    if c.train:
        assert_close(routing.balance_loss, case.balance_loss, 5e-6)
        assert_close(routing.router_z_loss, case.z_loss, 5e-6)
        outputs["balance_loss"] = routing.balance_loss, torch.tensor(1.0)
        outputs["total_loss"] = routing.balance_loss + c.z_coef * routing.router_z_loss, torch.tensor(1.0)
    else:
        assert routing.balance_loss.item() == routing.router_z_loss.item() == 0.0
    for output, (value, cotangent) in outputs.items():
        for leaf, actual in zip(leaves, gradients(value, cotangent, list(leaves.values())), strict=True):
            assert_close(actual, getattr(case, f"{output}_grad_{leaf}"), 2e-6)


def as_it_is(moe):
    return moe


def compiled(moe):
    return torch.compile(moe, backend="aot_eager", fullgraph=True)


class Slots(nn.Module):
    """Experts of another make, which get slots (b e c d)."""

    def __init__(self, experts):
        super().__init__()
        self.experts = experts

    def forward(self, x):
        return torch.stack([expert(part) for expert, part in zip(self.experts, x.unbind(dim=1), strict=True)], dim=1)


def on_slots(moe):
    moe.experts = Slots(moe.experts.experts)
    return moe


def by_dense_tensors(moe):
    moe.gate.forward = partial(Gate.forward, moe.gate)
    return moe


WAYS = [as_it_is, compiled, on_slots, by_dense_tensors]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*goes through its dense tensors")
        yield


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", LAYERS)
def test_golden_layer(name, way):
    case, c = golden(name), golden(name).config
    wi, wo = case.wi.clone(), case.wo.clone()
    experts = nn.ModuleList([ReluExpert(*pair) for pair in zip(wi, wo, strict=True)])
    coefs = {"balance_loss_coef": c.loss_coef, "router_z_loss_coef": c.loss_coef * c.z_coef}
    moe = MoE(c.d, c.e, gate=golden_gate(case), experts=experts, **coefs)
    x = case.x.clone().requires_grad_()
    outputs, total, _, _ = way(moe)(x, mask=case.importance == 1)
    assert_close(outputs, case.y, 2e-5)
    assert_close(total, case.loss, 5e-6)
    leaves = [x, moe.gate.to_gates.weight, *(e.wi for e in experts), *(e.wo for e in experts)]
    grad_x, grad_w, *grad_experts = gradients(outputs, case.probe, leaves)
    wanted = case.y_grad_x, case.y_grad_w, case.y_grad_wi, case.y_grad_wo
    found = grad_x, grad_w, torch.stack(grad_experts[: c.e]), torch.stack(grad_experts[c.e :])
    for actual, expected in zip(found, wanted, strict=True):
        assert_close(actual, expected, 2e-6)
    for actual, expected in zip(
        gradients(total, torch.tensor(1.0), leaves[:2]), (case.loss_grad_x, case.loss_grad_w), strict=True
    ):
        assert_close(actual, expected, 2e-6)


def picks_by_loops(logits, capacity, mask):
    """logits (b n e), grouped: for every token {expert: (slot, gate)}, gates as 0-d tensors, and the balance loss."""
    b, n, e = logits.shape
    picks, losses = [[{} for _ in range(n)] for _ in range(b)], [0 * logits.sum()]
    for g in range(b):
        real = [t for t in range(n) if mask is None or mask[g, t]]
        wish = dict.fromkeys(real, 0.0)
        for i in range(e):
            total = sum(logits[g, t, i].exp() for t in real)
            for slot, t in enumerate(sorted(real, key=lambda t, g=g, i=i: (-logits[g, t, i].item(), t))[:capacity]):
                picks[g][t][i] = slot, logits[g, t, i].exp() / total
            for t in real:
                wish[t] = wish[t] + logits[g, t, i].exp() / total / e
        for t in real:
            picks[g][t] = {i: (slot, gate / len(picks[g][t])) for i, (slot, gate) in picks[g][t].items()}
        if real:
            losses.append(len(real) * sum(p * p for p in wish.values()))
    return picks, sum(losses) / max(len(losses) - 1, 1)


def logits_with_ties(seed, b, n, e):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(b, n, e, generator=generator, dtype=torch.float64)
    return logits.mul(2).round().div(2) if seed % 2 else logits, torch.rand(b, n, generator=generator) < 0.7


GRID = st.integers(0, 9999), st.integers(1, 3), st.integers(1, 9), st.integers(1, 6)


@given(*GRID, st.sampled_from([0.5, 1.25, 4.0, None]), st.booleans(), st.booleans())
def test_picks_are_those_of_the_loops(seed, b, n, e, factor, masked, regrouped):
    logits, mask = logits_with_ties(seed, b, n, e)
    mask = mask if masked else None
    logits.requires_grad_()
    gate = ExpertChoiceGating(
        2, e, capacity_factor_train=factor, min_expert_capacity=2, group_size=b * n if regrouped else None
    )
    routing = gate.decide(logits, mask=mask)
    groups = (1, b * n) if regrouped else (b, n)
    assert routing.groups == groups
    capacity = groups[1] if factor is None else max(min(groups[1], int(groups[1] * factor / e)), 2)
    assert routing.capacity == capacity
    picks, balance = picks_by_loops(logits.view(*groups, e), capacity, None if mask is None else mask.view(groups))
    picks = [token for group in picks for token in group]

    gates = []
    for token, wanted in enumerate(picks):
        experts, slots, kept = (
            t.view(b * n, e)[token].tolist() for t in (routing.indices, routing.slots, routing.kept)
        )
        assert sorted(experts) == list(range(e))
        assert kept == [True] * len(wanted) + [False] * (e - len(wanted))
        assert {i: slot for i, slot, k in zip(experts, slots, kept, strict=True) if k} == {
            i: s for i, (s, _) in wanted.items()
        }
        assert slots[len(wanted) :] == [-1] * (e - len(wanted))
        # best first, ties to the lowest expert
        assert (
            experts[: len(wanted)] == sorted(wanted, key=lambda i, wanted=wanted: (-wanted[i][1].item(), i)) or seed % 2
        )
        gates.append([wanted[i][1] if i in wanted else 0 * logits.sum() for i in experts])
    gates = torch.stack([torch.stack(token) for token in gates]).view(b, n, e)
    assert_close(routing.gates * routing.kept, gates, 1e-12, may_vanish=True)
    assert_close(routing.balance_loss, balance, 1e-12, may_vanish=True)
    cotangent = torch.randn(b, n, e, dtype=torch.float64)
    one = torch.ones((), dtype=torch.float64)
    (actual,), (expected,) = (
        gradients(routing.gates * routing.kept, cotangent, [logits]),
        gradients(gates, cotangent, [logits]),
    )
    assert_close(actual, expected, 1e-9, may_vanish=True)
    (actual,) = gradients(routing.balance_loss, one, [logits])
    (expected,) = gradients(balance, one, [logits])
    assert_close(actual, expected, 1e-9, may_vanish=True)


@given(*GRID, st.booleans())
def test_every_choice_is_kept_masked_or_not_asked_and_experts_are_equally_loaded(seed, b, n, e, masked):
    logits, mask = logits_with_ties(seed, b, n, e)
    routing = ExpertChoiceGating(2, e, min_expert_capacity=1).decide(logits, mask=mask if masked else None)
    assert not routing.dropped.any()
    assert (routing.kept.int() + routing.masked.int() + routing.not_asked.int() == 1).all()
    real = mask.sum(dim=1) if masked else torch.full((b,), n)
    load = torch.zeros(b, e).scatter_add(1, routing.indices.flatten(1), routing.kept.flatten(1).float())
    assert torch.equal(load, real.clamp(max=routing.capacity).float().unsqueeze(1).expand(b, e))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_ties_go_to_the_first_tokens_and_the_lowest_experts(dtype):
    gate = ExpertChoiceGating(4, 3, capacity_factor_train=1.5, min_expert_capacity=1).to(dtype)
    routing = gate.route(torch.zeros(2, 40, 4, dtype=dtype))
    assert routing.capacity == 20
    wanted = torch.where(torch.arange(40) < 20, torch.arange(40), -1)
    assert torch.equal(routing.slots, wanted.view(1, 40, 1).expand(2, 40, 3))
    assert torch.equal(routing.indices, torch.arange(3).expand(2, 40, 3))
    assert routing.gates.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(routing.gates[:, :20].double(), torch.full((2, 20, 3), 1 / 40 / 3, dtype=torch.float64), 1e-6)


def test_tokens_are_told_apart_where_probabilities_underflow():
    logits = torch.tensor([0.0, -300.0, -200.0, -400.0]).view(1, 4, 1)
    mask = torch.tensor([[True, True, True, False]])
    gate = ExpertChoiceGating(2, 1, capacity_factor_train=0.5, min_expert_capacity=1)
    assert gate.decide(logits).slots.flatten().tolist() == [0, -1, 1, -1]
    # padding, of the same probability, stands behind
    gate.capacity_factor_train = None
    assert gate.decide(logits.flip(1), mask=mask.flip(1)).slots.flatten().tolist() == [-1, 1, 2, 0]


def build(e=5, dim=6, *, straight_through=False, **settings):
    """A float64 layer with distinct experts, in training mode."""
    settings = {"capacity_factor_train": 1.25, "min_expert_capacity": 1} | settings
    gate = ExpertChoiceGating(dim, e, straight_through_dispatch_tensor=straight_through, **settings)
    moe = MoE(dim, e, expert_hidden_mult=1, gate=gate).double()
    for parameter in moe.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe


def by_shared_products(moe):
    def call(*args, **kwargs):
        with patch("st_moe_pytorch.experts.may_share_products", lambda t: True):
            return moe(*args, **kwargs)

    return call


SETTINGS = [
    {},
    {"capacity_factor_train": 4.0},
    {"capacity_factor_train": None},
    {"group_size": 11},
    {"straight_through": True},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("way", [*WAYS, by_shared_products])
def test_all_ways_equal_the_definition(way, settings):
    moe, mask = build(**settings), torch.rand(2, 11) < 0.8
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    cotangent, inputs = torch.randn_like(x), [x, *moe.parameters()]
    routing = moe.gate.route(x, mask=mask)
    expected = layer_by_token(x, routing, list(moe.experts.experts), moe.gate.straight_through_dispatch_tensor)
    wanted = gradients(expected, cotangent, inputs)
    outputs, _, balance, z = way(moe)(x, mask=mask)
    assert_close(outputs, expected)
    assert_close(balance, routing.balance_loss)
    assert_close(z, routing.router_z_loss)
    for actual, gradient in zip(gradients(outputs, cotangent, inputs), wanted, strict=True):
        assert_close(actual, gradient, 1e-11)


def test_straight_through_is_off_unless_asked_for():
    x, probe = torch.randn(2, 2, 11, 6, dtype=torch.float64, requires_grad=True)
    for gate, is_on in ((ExpertChoiceGating(6, 5).double(), False), (build(straight_through=True).gate, True)):
        routing = gate.route(x)
        (gradient,) = gradients(routing.dispatch(x), routing.dispatch(probe), [routing.gates])
        assert gradient.any() == is_on


def test_derivatives_are_those_of_finite_differences():
    moe, x = build(3), torch.randn(1, 6, 6, dtype=torch.float64, requires_grad=True)

    def scalar(x):
        outputs, total, *_ = moe(x)
        return outputs.square().sum() + total

    assert torch.autograd.gradcheck(scalar, x)
    assert torch.autograd.gradgradcheck(scalar, x)


def test_exported_for_any_length():
    moe, x = build(4).eval(), torch.randn(2, 9, 6, dtype=torch.float64)
    exported = torch.export.export(moe, (x,), dynamic_shapes={"x": {1: torch.export.Dim.DYNAMIC}}).module()
    for length in (9, 4, 30):
        x = torch.randn(2, length, 6, dtype=torch.float64)
        assert_close(exported(x).outputs, moe(x).outputs)


@pytest.mark.parametrize("way", WAYS)
def test_padding_is_never_picked_nor_looked_at(way):
    moe = build(capacity_factor_train=4.0)
    mask = torch.arange(11) < torch.tensor([[7], [0], [3]])
    x = torch.randn(3, 11, 6, dtype=torch.float64).masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    routing = moe.gate.route(x, mask=mask)
    assert not (routing.kept & ~mask.unsqueeze(-1)).any()
    outputs, total, *_ = way(moe)(x, mask=mask)
    assert not outputs[~mask].any()
    for gradient in torch.autograd.grad((outputs * torch.randn_like(x)).sum() + total, [x, *moe.parameters()]):
        assert gradient.isfinite().all()
        assert gradient.any()


def test_a_padded_batch_equals_the_unpadded_one_at_equal_capacity():
    moe = build(capacity_factor_train=0.01, min_expert_capacity=3)
    x, cotangent = torch.randn(2, 2, 9, 6, dtype=torch.float64)
    x.requires_grad_()
    places = torch.tensor([0, 2, 3, 4, 7, 8, 10, 11, 13])
    padded = torch.randn(2, 14, 6, dtype=torch.float64).index_copy(1, places, x)
    mask = torch.zeros(2, 14, dtype=torch.bool).index_fill(1, places, True)
    inputs = [x, *moe.parameters()]
    found = []
    for tokens, given_mask, at in ((x, None, slice(None)), (padded, mask, places)):
        outputs, total, balance, z = moe(tokens, mask=given_mask)
        routing = moe.gate.route(tokens, mask=given_mask)
        grads = torch.autograd.grad((outputs[:, at] * cotangent).sum() + total, inputs)
        found.append((routing.slots[:, at], routing.indices[:, at], outputs[:, at], balance, z, *grads))
    (slots, indices, *expected), (padded_slots, padded_indices, *actual) = found
    assert torch.equal(slots, padded_slots)
    assert torch.equal(indices, padded_indices)
    for mine, theirs in zip(actual, expected, strict=True):
        assert_close(mine, theirs, 1e-12)


def test_without_a_real_token_losses_are_zero_and_part_of_the_graph():
    moe, x = build(), torch.randn(2, 5, 6, dtype=torch.float64)
    outputs, total, balance, z = moe(x, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert not outputs.any()
    assert total == balance == z == 0
    assert not torch.autograd.grad(total, moe.gate.to_gates.weight)[0].any()
    # a group without one is left out of the mean
    probs, mask = torch.randn(2, 5, 3).softmax(dim=1), torch.tensor([[True], [False]]).expand(2, 5)
    assert token_balance_loss(probs, mask) == token_balance_loss(probs[:1], mask[:1])
    assert_close(token_balance_loss(torch.full((1, 5, 3), 0.2), mask[:1]), torch.tensor(1.0), 1e-6)
    assert_close(token_balance_loss(torch.eye(5)[:1, :, None].expand(1, 5, 3), mask[:1]), torch.tensor(5.0), 1e-6)


@pytest.mark.parametrize("shape", [(0, 7), (2, 0), (3, 1), (1, 2)], ids=str)
def test_batches_without_tokens_and_with_few(shape):
    moe = build(capacity_factor_train=1.0, min_expert_capacity=4)
    x = torch.randn(*shape, 6, dtype=torch.float64, requires_grad=True)
    outputs, total, *_ = moe(x)
    assert outputs.shape == x.shape
    assert total.ndim == 0
    assert all(g.isfinite().all() for g in torch.autograd.grad(outputs.sum() + total, [x, *moe.parameters()]))
    if x.numel():  # every expert picks every token, of which there are fewer than slots
        routing = moe.gate.route(x)
        assert routing.kept.all()
        assert_close(outputs, layer_by_token(x, routing, list(moe.experts.experts), False))


def test_shapes_of_tokens():
    moe, x = build(), torch.randn(12, 6, dtype=torch.float64)
    block = SparseMoEBlock(moe).double()
    assert_close(moe(x).outputs, moe(x[None]).outputs[0])
    assert_close(moe(x.view(1, 3, 4, 6)).outputs, moe(x[None]).outputs.view(1, 3, 4, 6))
    assert_close(block(x).outputs, block(x[None]).outputs[0])


def test_noise_route_by_and_jitter_decide_and_draws_do_not():
    gate, (x, features) = build().gate, torch.randn(2, 2, 11, 6, dtype=torch.float64)
    usual = gate.route(x)
    assert torch.equal(gate.route(x, draws=torch.rand(2, 11, 1)).slots, usual.slots)
    assert torch.equal(gate.route(x, route_by=features).gates, gate.route(features).gates)
    torch.manual_seed(3)
    noised = gate.route(x, True, 0.5)
    torch.manual_seed(3)
    other = usual.logits - 0.5 * torch.empty_like(usual.logits).exponential_().log()
    assert torch.equal(noised.gates, gate.decide(other).gates)
    assert noised.balance_loss == gate.decide(other).balance_loss
    assert noised.router_z_loss == usual.router_z_loss
    gate.jitter = 0.3
    assert not torch.equal(gate.route(x).gates, usual.gates)


def test_settings_are_read_in_every_forward_and_checked():
    gate, x = ExpertChoiceGating(6, 4), torch.randn(1, 32, 6)
    assert [gate.route(x).capacity, gate.eval().route(x).capacity] == [10, 16]
    gate.capacity_factor_eval, gate.min_expert_capacity = 0.5, 6
    assert gate.route(x).capacity == 6
    gate.capacity_factor_train = -1
    with pytest.raises(ValueError, match="capacity_factor_train must be a positive number, got -1"):
        gate.route(x)
    for settings in ({"capacity_factor_eval": 0}, {"group_size": 0}, {"min_expert_capacity": 0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            ExpertChoiceGating(6, 4, **settings)
    text = str(ExpertChoiceGating(6, 4, group_size=8))
    assert (
        "ExpertChoiceGating(\n  dim=6, num_gates=4, capacity_factor_train=1.25, capacity_factor_eval=2.0, min_expert"
        in text
    )
    assert "group_size=8" in text


def test_its_state_is_the_projection_alone():
    gate = ExpertChoiceGating(6, 4)
    assert list(gate.state_dict()) == ["to_gates.weight"]
    x = torch.randn(2, 9, 6)
    assert torch.equal(copy.deepcopy(gate).route(x).gates, gate.route(x).gates)


def test_audit_finds_that_it_is_not_causal():
    x = torch.randn(3, 12, 6)
    found = audit_dependence(build().eval(), x)
    assert found.on_later_tokens[:, :-1].any()
    assert not found.on_other_rows.any()
    assert "later tokens: " in str(found)
    assert "later tokens: no output" not in str(found)
    assert audit_dependence(build(group_size=36), x).on_other_rows.any()
    mask = torch.arange(12) < torch.tensor([[12], [5], [9]])
    assert not audit_dependence(build(), x, mask).on_padding.any()


@pytest.fixture
def recorded():
    moe = build(4)
    x, mask = torch.randn(2, 16, 6, dtype=torch.float64), torch.arange(16) < torch.tensor([[16], [11]])
    with record_routing(nn.ModuleDict({"layer": moe})) as records:
        moe(x, mask=mask)
    return moe, x, mask, records


def test_records_and_stats(recorded):
    moe, x, mask, records = recorded
    routing, stats = moe.gate.route(x, mask=mask), routing_stats(records)["layer"]
    assert torch.equal(records["layer"][0].slots, routing.slots)
    assert stats.tokens == 27
    assert stats.asked.tolist() == stats.kept.tolist() == [10] * 4
    assert not stats.dropped_at.any()
    assert stats.not_asked_at.sum() == 27 * 4 - 40
    assert stats.without_expert == (mask & ~routing.kept.any(dim=-1)).sum() > 0
    scalars = stats.scalars()
    assert scalars["load_entropy"] == pytest.approx(1.0)
    assert scalars["not_asked"] == pytest.approx(1 - 40 / (27 * 4))


def test_plans(recorded):
    moe, x, mask, records = recorded
    settings = {"as it is": {}, "twice": {"capacity_factor_train": 2.5}, "groups": {"group_size": 8}}
    plans = plan(moe, records["layer"], settings)
    for name, setting in settings.items():
        gate = ExpertChoiceGating(6, 4, **({"min_expert_capacity": 1} | setting)).double()
        gate.to_gates = moe.gate.to_gates
        routing = gate.route(x, mask=mask)
        assert plans[name].experts_per_token == pytest.approx(int(routing.kept.sum()) / 27)
        assert plans[name].balance_loss == pytest.approx(routing.balance_loss.item())
        assert plans[name].dropped == 0
    assert plans["twice"].experts_per_token > plans["as it is"].experts_per_token


def test_pictures(recorded, tmp_path):
    moe, _, _, records = recorded
    stats = routing_stats(records)
    plot_load({0: stats, 1: stats}, tmp_path / "load.png")
    plot_drops(stats, tmp_path / "drops.png")
    plot_gates(records, tmp_path / "gates.png")
    plot_plans(plan(moe, records["layer"], {"as it is": {}}), tmp_path / "plans.png")
    assert all((tmp_path / f"{name}.png").stat().st_size > 1000 for name in ("load", "drops", "gates", "plans"))
    page = text_page([f"t{number}" for number in range(16)], records)
    routing = records["layer"][0]
    assert page.count('class="none" title') == (~routing.kept[0].any(dim=-1)).sum() > 0
    assert page.count(", kept") == routing.kept[0].sum()
    assert page.count(", not asked") == routing.not_asked[0].sum()
    # a token's colour is that of the expert that gives it most weight, of those that picked it
    assert torch.equal(routing.kept[..., 0], routing.kept.any(dim=-1))
    kept = routing.gates.masked_fill(~routing.kept, 0)
    assert torch.equal(kept[..., 0], kept.amax(dim=-1))


def test_upcycled_and_swapped_in():
    ffn = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6))
    gate = ExpertChoiceGating(6, 4, capacity_factor_train=None)
    moe, x = MoE.from_dense(ffn, 6, 4, gate=gate), torch.randn(2, 9, 6)
    # with copies of one feed-forward, what is left of it are the gates
    assert_close(moe(x).outputs, ffn(x) * gate.route(x).gates.sum(dim=-1, keepdim=True), 1e-5)
    model = sparsify(
        nn.ModuleDict({"ffn": ffn}), "ffn", lambda ffn: MoE.from_dense(ffn, 6, 4, gate=ExpertChoiceGating(6, 4))
    )
    with collect_aux_losses() as aux:
        model["ffn"](x).sum().backward()
    assert aux.total > 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_one_graph_serves_all_data_and_one_more_all_lengths():
    counter = CompileCounterWithBackend("aot_eager")
    moe = build(4)
    run = torch.compile(moe, backend=counter, fullgraph=True)
    for length, graphs in ((20, 1), (20, 1), (33, 2), (47, 2)):
        x = torch.randn(2, length, 6, dtype=torch.float64, requires_grad=True)
        inputs, cotangent, found = [x, *moe.parameters()], torch.randn_like(x), []
        for call in (run, moe):
            outputs, total, *_ = call(x)
            found.append([outputs, *torch.autograd.grad((outputs * cotangent).sum() + total, inputs)])
        for actual, expected in zip(*found, strict=True):
            assert_close(actual, expected, 1e-11)
        assert counter.frame_count == graphs


def test_experts_that_differ_compile_on_slots():
    moe = MoE(6, 2, gate=ExpertChoiceGating(6, 2), experts=[nn.Linear(6, 6), Expert(6, 1)]).double()
    x, mask = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True), torch.rand(2, 9) < 0.8
    inputs, cotangent = [x, *moe.parameters()], torch.randn_like(x)
    expected, actual = moe(x, mask=mask).outputs, compiled(moe)(x, mask=mask).outputs
    assert_close(actual, expected)
    for mine, theirs in zip(gradients(actual, cotangent, inputs), gradients(expected, cotangent, inputs), strict=True):
        assert_close(mine, theirs)
