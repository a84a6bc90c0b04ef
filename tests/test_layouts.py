"""The two maps between tokens and rows: all kinds of derivatives, the same bits in every run, no use of dead rows."""

import pytest
import torch
from oracles import assert_close, gradients
from torch.func import functional_call, jacfwd, jacrev

from st_moe_pytorch import Expert, MoE, TopNGating, layers, layouts


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
        return torch.func.grad(lambda x, gates: (function(x, gates) * cotangent).sum().square(), argnums=(0, 1))(
            x, gates
        )

    for mine, theirs in zip(
        *(jacrev(lambda x, g, f=f: first_order(f, x, g), (0, 1))(x, gates) for f in (dispatched, scaled)), strict=True
    ):
        for got, wanted in zip(mine, theirs, strict=True):
            assert_close(got, wanted)

    assert_close(*(jacrev(jacfwd(f, 0), 1)(x, gates) for f in (dispatched, scaled)))


def combined_by_indexing(y, gates, table):
    """Rows summed into tokens (N d) by nothing but plain indexing."""
    return (y[table.places] * gates.flatten(0, 1).unsqueeze(-1)).sum(1)


def rows_for(table, width=3, dtype=torch.float64):
    """Results of experts, that of nobody zero."""
    y = torch.randn(len(table.choices), width, dtype=dtype)
    y[-1] = 0
    return y


@pytest.mark.parametrize("layout", ["rows", "buffers"])
def test_second_derivatives_of_a_sum_whose_cotangent_needs_none(layout):
    routing, _ = routing_of(3)
    table = getattr(routing, layout)()
    y, gates = rows_for(table).requires_grad_(), routing.gates.detach().requires_grad_()
    cotangent, of_y, of_gates = torch.randn(14, 3, dtype=torch.float64), rows_for(table), torch.randn_like(gates)

    def second(total):
        dy, dgates = torch.autograd.grad((total * cotangent).sum(), (y, gates), create_graph=True)
        dy, dgates = torch.autograd.grad((dy * of_y).sum() + (dgates * of_gates).sum(), (y, gates))
        return dy[:-1], dgates

    combined = routing._replace(gates=gates).combine(y, table).view(14, 3)
    for got, wanted in zip(second(combined), second(combined_by_indexing(y, gates, table)), strict=True):
        assert_close(got, wanted)


@pytest.mark.parametrize("in_dims", [(0, 0), (1, None), (None, 1), (2, 2)])
def test_many_sums_at_a_time_are_the_sums_one_by_one(in_dims):
    routing, _ = routing_of(3)
    table = routing.rows()
    ys, all_gates = (torch.stack([rows_for(table) for _ in range(4)]), torch.rand(4, 2, 7, 3, dtype=torch.float64))
    batches = [t[0] if dim is None else t.movedim(0, dim) for t, dim in zip((ys, all_gates), in_dims, strict=True)]
    combined = torch.func.vmap(lambda y, gates: routing._replace(gates=gates).combine(y, table), in_dims)(*batches)
    for i, one in enumerate(combined):
        y, gates = (t[0 if dim is None else i] for t, dim in zip((ys, all_gates), in_dims, strict=True))
        assert_close(one.flatten(0, 1), combined_by_indexing(y, gates, table))


@pytest.mark.parametrize("layout", ["rows", "buffers"])
@pytest.mark.parametrize(
    ("dtype", "of_gates"),
    [(torch.bfloat16, torch.float32), (torch.float64, torch.float32), (torch.float32, torch.float64)],
)
def test_results_are_weighted_in_the_wider_dtype_of_theirs_and_the_gates(dtype, of_gates, layout):
    routing, _ = routing_of(3)
    table = getattr(routing, layout)()
    y, gates = rows_for(table, dtype=dtype).requires_grad_(), routing.gates.detach().to(of_gates).requires_grad_()
    combined = routing._replace(gates=gates).combine(y, table).flatten(0, 1)
    assert combined.dtype == torch.promote_types(dtype, of_gates)
    rounded = routing._replace(gates=gates).combine(y, table, torch.bfloat16).flatten(0, 1)
    assert torch.equal(rounded, combined.bfloat16())
    coarse = torch.randn(14, 3, dtype=torch.bfloat16)
    for mine, theirs in zip(
        gradients(rounded, coarse, [y, gates]), gradients(combined, coarse.to(combined.dtype), [y, gates]), strict=True
    ):
        assert torch.equal(mine, theirs)
    wide_y, wide_gates = y.detach().double(), gates.detach().double().requires_grad_()
    expected, cotangent = combined_by_indexing(wide_y, wide_gates, table), torch.randn(14, 3)
    rtol = 1e-12 if combined.dtype == torch.float64 else 1e-6
    assert_close(combined.double(), expected, rtol)
    (gradient,) = gradients(combined, cotangent, [gates])
    (wanted,) = gradients(expected, cotangent.double(), [wide_gates])
    assert_close(gradient.double(), wanted, 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_forward_mode_keeps_the_dtype_of_rows(dtype):
    routing, x = routing_of(2)
    table, tangent = routing.rows(), torch.randn_like(routing.gates).float()
    x, gates = x.to(dtype), routing.gates.detach().float()
    rows, drows = torch.func.jvp(lambda gates: routing._replace(gates=gates).dispatch(x, table), (gates,), (tangent,))
    assert rows.dtype == drows.dtype == dtype
    sent = table.choices[: table.offsets[-1]]
    expected = x.flatten(0, 1).double()[sent // 2] * tangent.flatten().double()[sent, None]
    assert_close(drows[: len(sent)].double(), expected, 1e-2 if dtype == torch.bfloat16 else 1e-6)


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


@pytest.mark.parametrize("kept", [1, 5])
def test_empty_slots_hold_no_padding_whatever_slot_and_token_they_are(kept):
    # the first expert has no token, and the first and the last token are padding
    logits = torch.randn(1, kept + 2, 5).index_fill(-1, torch.tensor(0), -99)
    mask = torch.tensor([[False] + [True] * kept + [False]])
    routing = TopNGating(4, 5, top_n=1).decide(logits, mask=mask)
    x = torch.rand(1, kept + 2, 4).masked_fill(~mask.unsqueeze(-1), torch.nan)
    filled, plain = (routing.dispatch(x, routing.buffers(filled))[:-1] for filled in (True, False))
    assert set(map(tuple, filled.tolist())) == set(map(tuple, x[mask].tolist()))
    assert plain.any(-1).sum() == kept
    assert plain.isfinite().all()


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
            results.append(
                [outputs, *torch.autograd.grad((outputs * x.detach().cos()).sum() + total, [x, *moe.parameters()])]
            )
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_the_whole_layer_has_derivatives_of_forward_mode_and_of_second_order():
    gate = TopNGating(4, 3, policy_train="all", capacity_factor_train=1.0, straight_through_dispatch_tensor=False)
    moe = MoE(4, 3, gate=gate, experts=[Expert(4, 1, prenorm=True) for _ in range(3)]).double()
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    names = [
        "gate.to_gates.weight",
        *(f"experts.experts.0.net.{name}" for name in ("0.gamma", "1.weight", "2.mult_bias", "3.bias")),
    ]
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


def test_second_derivatives_by_both_modes_in_all_orders_agree():
    moe = MoE(4, 3, gate=TopNGating(4, 3, policy_train="all")).double()
    x, cotangent = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    expected = jacrev(jacrev(lambda x: (moe(x).outputs * cotangent).sum()))(x)
    assert expected.norm() > 0.01
    for outer, inner in ((jacfwd, jacrev), (jacrev, jacfwd), (jacfwd, jacfwd)):
        assert_close(outer(inner(lambda x: (moe(x).outputs * cotangent).sum()))(x), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_sums_off_the_cpu_are_those_of_the_cpu(dtype):
    """Where memory is what takes time, results are summed by other operations, which run on the CPU too."""
    experts = torch.randint(0, 5, (12, 3))  # the number 4 stands for a choice that is not sent
    layout = layouts.rows_layout(experts, 4, 40)
    y, gates = (
        torch.randn(len(layout.tokens), 6, dtype=dtype),
        torch.rand(12, 3, dtype=torch.promote_types(dtype, torch.float32)),
    )
    y[layout.offsets[-1] :] = 0
    gates.masked_fill_(experts == 4, 0)
    y, gates = y.requires_grad_(), gates.requires_grad_()
    expected = layouts.weighted_sum(y, gates, layout)
    rtol = 1e-12 if dtype == torch.float64 else 1e-6
    assert_close(layouts._sum_each(y, gates, layout.places, expected.dtype), expected, rtol)
    cotangent = torch.randn_like(expected)
    dy, dgates = layouts._gradients_of_sum(
        cotangent, y.detach(), layouts._at_choices(gates.detach(), layout.choices), layout.tokens
    )
    wanted_dy, wanted_dgates = gradients(expected, cotangent, [y, gates])
    assert_close(dy.double(), wanted_dy.double(), max(rtol, 1e-2 if dtype == torch.bfloat16 else 0))
    is_sent = experts < 4
    assert_close(dgates[layout.places][is_sent], wanted_dgates[is_sent], rtol)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients_of_copies_off_the_cpu_are_those_of_the_cpu(dtype):
    routing, x = routing_of(3)
    table = routing.rows()
    x = x.to(dtype).flatten(0, 1).requires_grad_()
    gates = routing.gates.detach().flatten(0, 1).to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    rows = layouts.gather(x, table, gates)
    cotangent = torch.randn_like(rows)
    expected = gradients(rows, cotangent, [x, gates])
    is_sent = (table.places < len(rows) - 1).to(dtype)
    assert not is_sent.all()
    found = layouts._gradients_of_gather(cotangent, rows.detach(), is_sent, table.places)
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    for actual, wanted, sent in zip(found, expected, (slice(None), is_sent > 0), strict=True):
        assert_close(actual[sent].double(), wanted[sent].double(), {torch.bfloat16: 2e-2}.get(dtype, 1e-6))
    assert not found[1][is_sent == 0].any()


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("k", [1, 3, layouts.MOST_UNROLLED + 1])
def test_layers_computed_in_few_kernels_are_those_of_the_cpu(k, straight_through, monkeypatch):
    """The functions that a GPU would compute compiled, here as they are written."""
    gate = TopNGating(6, 20, top_n=k, policy_train="all", straight_through_dispatch_tensor=straight_through)
    moe = MoE(6, 20, gate=gate, experts=[Expert(6, 3, mult_bias=False) for _ in range(20)]).double()
    x = torch.randn(2, 30, 6, dtype=torch.float64, requires_grad=True)
    cotangent, mask = torch.randn_like(x), torch.rand(2, 30) < 0.8
    monkeypatch.setattr(layers, "SMALL", 0)

    def run():
        outputs, loss, *_ = moe(x, mask=mask)
        return outputs, *gradients((outputs * cotangent).sum() + loss, torch.tensor(1.0), [x, *moe.parameters()])

    expected, called = run(), []
    for module, name in ((layouts, "_gradients_of_gather"), (layouts, "_sum_each"), (layers, "_write_gradients")):
        monkeypatch.setattr(module, "is_fused", lambda t: True)
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: called.append(name) or real(*a))
    for actual, wanted in zip(run(), expected, strict=True):
        assert_close(actual, wanted, may_vanish=True)  # gradients of experts that no token chose
    assert all(t.any() for t in expected[:3])
    few = k <= layouts.MOST_UNROLLED
    assert ("_sum_each" in called, "_gradients_of_gather" in called) == (few, few and straight_through)
    assert "_write_gradients" in called


@pytest.mark.parametrize("straight_through", [True, False])
def test_tokens_may_be_changed_in_place_behind_the_layer(straight_through):
    """As by a residual that is added in place, where the router looks at a copy, as it does of half types."""
    gate = TopNGating(4, 3, straight_through_dispatch_tensor=straight_through)
    moe = MoE(4, 3, gate=gate).bfloat16()
    tokens = torch.randn(1, 6, 4).bfloat16().requires_grad_()

    def gradient(added):
        torch.manual_seed(0)
        x = tokens * 1
        added(x, moe(x).outputs).float().square().sum().backward()
        found, tokens.grad = tokens.grad, None
        return found

    assert torch.equal(gradient(torch.Tensor.add_), gradient(torch.Tensor.add))
