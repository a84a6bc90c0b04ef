"""The two maps between tokens and rows: derivatives of every kind, the same bits in every run, and nothing that reaches dead rows."""

import pytest
import torch
from oracles import assert_close, gradients
from torch.func import functional_call, jacfwd, jacrev

from st_moe_pytorch import Expert, MoE, TopNGating


def routing_of(k, capacity_factor=0.6, straight_through=True, n=7):
    gate = TopNGating(
        4,
        5,
        top_n=k,
        capacity_factor_train=capacity_factor,
        min_expert_capacity=1,
        policy_train="threshold",
        straight_through_dispatch_tensor=straight_through,
    ).double()
    x = torch.randn(2, n, 4, dtype=torch.float64)
    return gate.route(x, mask=torch.rand(2, n) < 0.8), x


@pytest.mark.parametrize("layout", ["rows", "buffers"])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_derivatives_of_both_kinds_and_of_second_order(k, layout):
    routing, x = routing_of(k, straight_through=False)
    table = getattr(routing, layout)()
    gates = routing.gates.detach().requires_grad_()

    def dispatched(x):
        rows = routing.dispatch(x, table)
        return rows if table.offsets is None else torch.cat((rows[: table.offsets[-1]], rows[-1:]))

    def combined(y, gates):
        return routing._replace(gates=gates).combine(y, table)

    x = x.requires_grad_()
    y = torch.randn(len(table.choices), 3, dtype=torch.float64, requires_grad=True)
    for function, inputs in ((dispatched, (x,)), (combined, (y, gates))):
        assert torch.autograd.gradcheck(function, inputs, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(function, inputs)


@pytest.mark.parametrize("layout", ["rows", "buffers"])
def test_straight_through_is_the_derivative_of_scaling_by_one(layout):
    routing, x = routing_of(3)
    table = getattr(routing, layout)()
    gates, is_sent = routing.gates.detach(), table.choices < routing.indices.numel()

    def scaled(x, gates):
        """By the definition, with a gate that is not the one it is divided by."""
        rows = routing._replace(straight_through=False).dispatch(x, table)
        factor = 1 + gates - routing.gates.detach()
        return (rows * torch.cat((factor.flatten(), factor.new_zeros(1)))[table.choices].unsqueeze(-1))[is_sent]

    def dispatched(x, gates):
        return routing._replace(gates=gates).dispatch(x, table)[is_sent]

    for jacobian in (jacrev, jacfwd):
        for which in (0, 1):
            assert_close(jacobian(dispatched, which)(x, gates), jacobian(scaled, which)(x, gates))
    cotangent = torch.randn(int(is_sent.sum()), 4, dtype=torch.float64)

    def first_order(function, x, gates):
        return torch.func.grad(lambda x, gates: (function(x, gates) * cotangent).sum().square(), argnums=(0, 1))(x, gates)

    for mine, theirs in zip(*(jacrev(lambda x, g, f=f: first_order(f, x, g), (0, 1))(x, gates) for f in (dispatched, scaled)), strict=True):
        for got, wanted in zip(mine, theirs, strict=True):
            assert_close(got, wanted)


def test_each_map_is_the_others_adjoint():
    routing, x = routing_of(2, straight_through=False)
    ones = routing._replace(gates=torch.ones_like(routing.gates))
    for table in (routing.rows(), routing.buffers()):
        rows, y = routing.dispatch(x, layout=table), torch.randn(len(table.choices), 4, dtype=torch.float64)
        y[table.choices == routing.indices.numel()] = 0
        assert_close((rows * y).sum(), (x * ones.combine(y, layout=table)).sum())


def test_filled_slots_hold_copies_of_kept_tokens_and_change_no_gradient():
    routing, x = routing_of(2, capacity_factor=2.0, straight_through=False)
    plain, filled = routing.buffers(), routing.buffers(filled=True)
    empty = plain.choices == routing.indices.numel()
    empty[-1] = False
    assert empty.any()
    x = x.masked_fill(~routing.mask.unsqueeze(-1), torch.nan).requires_grad_()
    rows = routing.dispatch(x, filled)
    assert rows.isfinite().all()
    assert not rows[-1].any()
    assert (rows[empty] == rows[empty][0]).all()
    assert torch.equal(rows[~empty], routing.dispatch(x, plain)[~empty])
    cotangent = torch.randn_like(rows)
    got, wanted = (gradients(routing.dispatch(x, table), cotangent, [x])[0] for table in (filled, plain))
    assert torch.equal(got, wanted)


def test_slots_are_zero_where_no_token_is_sent_to_fill_them_with():
    gate = TopNGating(4, 5)
    x, mask = torch.full((2, 7, 4), torch.nan), torch.zeros(2, 7, dtype=torch.bool)
    routing = gate.route(x, mask=mask)
    assert not routing.dispatch(x, routing.buffers(filled=True)).any()


def test_a_choice_that_was_made_kept_without_a_slot_is_sent_in_no_layout():
    routing, _ = routing_of(3)
    assert routing.dropped.any()
    changed = routing._replace(kept=routing.asked)
    for table, theirs in ((changed.rows(), routing.rows()), (changed.buffers(), routing.buffers())):
        for mine, wanted in zip(table[:3], theirs[:3], strict=True):
            assert mine is wanted is None or torch.equal(mine, wanted)
    assert torch.equal(changed.dense()[0], routing.dense()[0])


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_deterministic_mode_passes_and_gives_the_same_bits_twice(k):
    moe = MoE(8, 5, gating_top_n=k)
    x = torch.randn(2, 33, 8, requires_grad=True)
    torch.use_deterministic_algorithms(True)
    try:
        results = []
        for _ in range(2):
            torch.manual_seed(1)
            outputs, total, *_ = moe(x)
            results.append([outputs, *torch.autograd.grad((outputs * x.detach().cos()).sum() + total, [x, *moe.parameters()])])
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_the_whole_layer_has_derivatives_of_forward_mode_and_of_second_order():
    gate = TopNGating(4, 3, policy_train="all", capacity_factor_train=1.0, straight_through_dispatch_tensor=False)
    moe = MoE(4, 3, gate=gate, experts=[Expert(4, 1, prenorm=True) for _ in range(3)]).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    names = ["gate.to_gates.weight", *(f"experts.experts.0.net.{name}" for name in ("0.gamma", "1.weight", "2.mult_bias", "3.bias"))]
    parameters = [dict(moe.named_parameters())[name].detach().requires_grad_() for name in names]

    def layer(x, *parameters):
        return functional_call(moe, dict(zip(names, parameters, strict=True)), x).outputs

    assert torch.autograd.gradcheck(layer, (x, *parameters), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(layer, (x, *parameters))


def test_forward_and_reverse_mode_agree_with_straight_through():
    moe = MoE(4, 3, gate=TopNGating(4, 3, policy_train="all")).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64)
    forward, reverse = (jacobian(lambda x: moe(x).outputs)(x) for jacobian in (jacfwd, jacrev))
    assert_close(forward, reverse)
