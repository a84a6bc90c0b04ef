"""The layer and the block: layouts against the per-token definition, seams, shapes."""

import copy
import warnings
from contextlib import nullcontext

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_close, gradients, layer_by_token
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from st_moe_pytorch import Expert, Experts, MoE, SparseMoEBlock, TopNGating


def build(
    k=2, e=5, dim=6, capacity_factor=0.6, *, straight_through=True, experts=None, policy="all", **gate_kwargs
) -> MoE:
    """A float64 layer with distinct experts, in training mode with a deterministic policy."""
    gate = TopNGating(
        dim,
        e,
        top_n=k,
        capacity_factor_train=capacity_factor,
        min_expert_capacity=1,
        policy_train=policy,
        straight_through_dispatch_tensor=straight_through,
        **gate_kwargs,
    )
    moe = MoE(dim, e, expert_hidden_mult=1, gate=gate, experts=experts).double()
    for parameter in moe.experts.parameters():
        nn.init.normal_(parameter, std=0.5)
    return moe


def through_rows(moe: MoE, routing, x):
    """The layer step by step, with NaN planted in the rows that nobody may read, in values and in gradients."""
    layout = routing.rows()
    dead = torch.arange(len(layout.choices)) >= layout.offsets[-1]
    dead[-1] = False
    rows = planted(routing.dispatch(x, layout), dead)
    assert not rows[-1].any()
    y = moe.experts(rows, layout.offsets)
    assert not y[-1].any()
    return routing.combine(planted(y, dead), layout)


def planted(rows, dead):
    rows = rows.masked_fill(dead.unsqueeze(-1), torch.nan)
    if rows.requires_grad:
        rows.register_hook(lambda grad: grad.masked_fill(dead.unsqueeze(-1), torch.nan))
    return rows


def with_layout(moe: MoE, layout: str):
    """The layer's outputs by one layout, as a function of x and mask."""

    def outputs(x, mask=None):
        routing = moe.gate.route(x, mask=mask)
        if layout == "slots":
            return routing.combine(moe.experts(routing.dispatch(x)))
        if layout == "rows":
            return through_rows(moe, routing, x)
        if layout == "dense":
            dispatch, combine = routing.dense()
            slots = moe.experts(torch.einsum("bnd,bnec->becd", x, dispatch))
            return torch.einsum("becd,bnec->bnd", slots, combine)
        assert layout == "definition"
        return layer_by_token(x, routing, list(moe.experts.experts), moe.gate.straight_through_dispatch_tensor)

    return outputs


@pytest.mark.parametrize("straight_through", [True, False])
@pytest.mark.parametrize("capacity_factor", [0.6, 4.0, None])
@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_all_layouts_equal_the_definition(k, capacity_factor, straight_through):
    moe = build(k, capacity_factor=capacity_factor, straight_through=straight_through)
    x = torch.randn(2, 11, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 11) < 0.8
    inputs = [x, *moe.parameters()]
    cotangent = torch.randn_like(x)
    expected = with_layout(moe, "definition")(x, mask)
    expected_gradients = gradients(expected, cotangent, inputs)
    for actual in [with_layout(moe, layout)(x, mask) for layout in ("rows", "slots", "dense")] + [
        moe(x, mask=mask).outputs
    ]:
        assert_close(actual, expected)
        for gradient, wanted in zip(gradients(actual, cotangent, inputs), expected_gradients, strict=True):
            assert_close(gradient, wanted, may_vanish=capacity_factor == 0.6)


@pytest.mark.parametrize("differentiable_topk", [True, False])
def test_layouts_agree_where_tokens_are_regrouped_by_priority(differentiable_topk):
    moe = build(2, group_size=6, priority="gate", differentiable_topk=differentiable_topk)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    inputs, cotangent = [x, moe.gate.to_gates.weight], torch.randn_like(x)
    routing = moe.gate.route(x)
    assert routing.groups == (3, 6)
    expected = with_layout(moe, "definition")(x)
    for layout in ("rows", "slots"):
        actual = with_layout(moe, layout)(x)
        assert_close(actual, expected)
        for gradient, wanted in zip(
            gradients(actual, cotangent, inputs), gradients(expected, cotangent, inputs), strict=True
        ):
            assert_close(gradient, wanted)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4), st.sampled_from([0.5, 1.0, None]))
def test_identity_experts_give_x_times_the_kept_gates(seed, k, capacity_factor):
    torch.manual_seed(seed)
    moe = build(k, capacity_factor=capacity_factor, experts=[nn.Identity() for _ in range(5)])
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    routing = moe.gate.route(x)
    expected = x * (routing.gates * routing.kept).sum(-1, keepdim=True)
    for layout in ("rows", "slots"):
        assert_close(with_layout(moe, layout)(x), expected)


def test_a_permutation_of_experts_permutes_the_routing_and_keeps_the_outputs():
    moe = build(3, capacity_factor=0.7)
    order = torch.tensor([3, 0, 4, 1, 2])
    permuted = copy.deepcopy(moe)
    permuted.gate.to_gates.weight.data = moe.gate.to_gates.weight.data[order]
    permuted.experts.experts = nn.ModuleList(permuted.experts.experts[i] for i in order)
    x = torch.randn(2, 12, 6, dtype=torch.float64)
    assert torch.equal(order[permuted.gate.route(x).indices], moe.gate.route(x).indices)
    for actual, expected in zip(permuted(x), moe(x), strict=True):
        assert_close(actual, expected)


def test_padding_changes_nothing_at_equal_capacity():
    """Each sequence alone and unpadded, against both padded in one batch: outputs, losses and every gradient."""
    lengths, padded_length = (5, 9), 12
    moe = build(2, capacity_factor=0.01, policy="random")
    moe.gate.min_expert_capacity = 2
    x = torch.full((2, padded_length, 6), torch.nan, dtype=torch.float64)
    sequences = [torch.randn(1, length, 6, dtype=torch.float64) for length in lengths]
    draws = torch.rand(2, padded_length, 2)
    mask = torch.arange(padded_length) < torch.tensor(lengths)[:, None]
    for row, sequence in zip(x, sequences, strict=True):
        row[: sequence.shape[1]] = sequence[0]
    x.requires_grad_()
    own_route = moe.gate.route

    def run(tokens, mask, draws):
        moe.gate.route = lambda *args, **kwargs: own_route(*args, **kwargs, draws=draws)
        return moe(tokens, mask=mask)

    padded = run(x, mask, draws)
    assert (padded.outputs[~mask] == 0).all()
    alone = [
        run(sequence.requires_grad_(), None, draws[i : i + 1, : lengths[i]]) for i, sequence in enumerate(sequences)
    ]
    for i, result in enumerate(alone):
        assert_close(padded.outputs[i, : lengths[i]], result.outputs[0])
    assert_close(padded.balance_loss, sum(result.balance_loss for result in alone) / 2)
    z = sum(result.router_z_loss * length for result, length in zip(alone, lengths, strict=True)) / sum(lengths)
    assert_close(padded.router_z_loss, z)

    cotangent = torch.randn_like(padded.outputs)
    parameters = list(moe.parameters())
    actual = gradients(padded.outputs, cotangent, [x, *parameters])
    expected = [
        gradients(result.outputs, cotangent[i : i + 1, : lengths[i]], [sequences[i], *parameters])
        for i, result in enumerate(alone)
    ]
    for i, length in enumerate(lengths):
        assert_close(actual[0][i, :length], expected[i][0][0])
        assert (actual[0][i, length:] == 0).all()
    for gradient, *parts in zip(actual[1:], expected[0][1:], expected[1][1:], strict=True):
        assert_close(gradient, parts[0] + parts[1], may_vanish=True)
    (actual_loss,) = gradients(padded.balance_loss, torch.tensor(1.0), [moe.gate.to_gates.weight])
    expected_loss = [
        gradients(result.balance_loss, torch.tensor(0.5), [moe.gate.to_gates.weight])[0] for result in alone
    ]
    assert_close(actual_loss, sum(expected_loss))


@pytest.mark.parametrize("layout", ["rows", "slots"])
def test_a_nan_token_or_expert_reaches_only_the_tokens_that_use_it(layout):
    moe = build(2, capacity_factor=1.0)
    x = torch.randn(2, 10, 6, dtype=torch.float64)
    clean = with_layout(moe, layout)(x)
    x[0, 3] = torch.nan
    spoiled = with_layout(moe, layout)(x)
    assert spoiled[0, 3].isnan().all()
    # the other sequence shares no capacity with the spoiled one
    assert torch.equal(spoiled[1], clean[1])
    assert spoiled[0, torch.arange(10) != 3].isfinite().all()

    x = torch.randn(2, 10, 6, dtype=torch.float64)
    nn.init.constant_(moe.experts.experts[2].net[0].bias, torch.nan)
    routing = moe.gate.route(x)
    users = ((routing.indices == 2) & routing.kept).any(-1)
    assert users.any()
    assert torch.equal(with_layout(moe, layout)(x).isnan().any(-1), users)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "shape", [(2, 7, 6), (7, 6), (2, 3, 4, 6), (1, 1, 6), (0, 5, 6), (3, 0, 6), (0, 6), (2, 0, 3, 6)]
)
@pytest.mark.parametrize("kind", [MoE, SparseMoEBlock])
def test_shapes(kind, shape, training):
    layer = build(capacity_factor=1.25)
    layer = (SparseMoEBlock(layer) if kind is SparseMoEBlock else layer).double().train(training)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape[:-1]) < 0.7
    result = layer(x, mask=mask, route_by=torch.randn(shape, dtype=torch.float64))
    assert result.outputs.shape == shape
    assert result.outputs.dtype == x.dtype
    assert all(loss.shape == () for loss in result[1:])
    (result.outputs.sum() + result.total_aux_loss).backward()
    assert x.grad.shape == shape
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_middle_axes_are_tokens_of_one_group():
    moe = build()
    x = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    mask = torch.rand(2, 3, 4) < 0.8
    flat = moe(x.view(2, 12, 6), mask=mask.view(2, 12))
    assert torch.equal(moe(x, mask=mask).outputs.view(2, 12, 6), flat.outputs)
    assert torch.equal(moe(x[0, 0]).outputs, moe(x[0, :1]).outputs[0])


def test_total_is_the_weighted_sum_and_evaluation_has_none():
    moe = MoE(8, num_experts=4, balance_loss_coef=0.3, router_z_loss_coef=0.05)
    _, total, balance, z = moe(torch.randn(2, 9, 8))
    assert balance > 0.9
    assert z > 0
    assert_close(total, 0.3 * balance + 0.05 * z, 1e-6)
    losses = moe.eval()(torch.randn(2, 9, 8))[1:]
    assert all(loss.shape == () and loss == 0 for loss in losses)


def test_losses_may_be_added_in_place():
    moe = build()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    outputs, total, balance, z = moe(x)
    expected = gradients(outputs.sum() + total, torch.tensor(1.0), list(moe.parameters()))
    outputs, total, balance, z = moe(x)
    loss = outputs.sum()
    loss += total
    total += 1.0
    balance += 1.0
    z += 1.0
    for actual, wanted in zip(gradients(loss, torch.tensor(1.0), list(moe.parameters())), expected, strict=True):
        assert torch.equal(actual, wanted)


def test_noise_and_route_by_reach_the_gate():
    moe, seen = build(), []
    own_route = moe.gate.route
    moe.gate.route = lambda *args, **kwargs: seen.append((args[1:], kwargs)) or own_route(*args, **kwargs)
    x, mask = torch.randn(2, 4, 6, dtype=torch.float64), torch.rand(2, 4) < 0.5
    SparseMoEBlock(moe).double()(x, True, 0.5, mask=mask, route_by=x * 2)
    ((noise_gates, noise_mult),) = [args for args, _ in seen]
    assert noise_gates is True
    assert noise_mult == 0.5
    assert torch.equal(seen[0][1]["mask"], mask)
    assert torch.equal(seen[0][1]["route_by"], x * 2)


class Doubling(nn.Module):
    """Experts of another make: (b e c d) -> (b e c 2d)."""

    def forward(self, x):
        assert x.ndim == 4
        return torch.cat((x, x), dim=-1) * torch.arange(1.0, 1 + x.shape[1], dtype=x.dtype).view(-1, 1, 1)


def test_foreign_experts_get_slots():
    moe = build(2, capacity_factor=1.0)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    routing = moe.gate.route(x)
    moe.experts = Doubling()
    weights = (routing.gates * routing.kept * (routing.indices + 1)).sum(-1, keepdim=True)
    assert_close(moe(x).outputs, torch.cat((x, x), -1) * weights)


def test_heterogeneous_experts_may_change_the_width():
    experts = [nn.Linear(6, 3), nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), nn.Linear(6, 3, bias=False)]
    moe = build(2, 3, experts=experts)
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    routing = moe.gate.route(x)
    expected = torch.zeros(2, 9, 3, dtype=torch.float64)
    for b, n, k in routing.kept.nonzero().tolist():
        expected[b, n] += routing.gates[b, n, k] * experts[routing.indices[b, n, k]](x[b, n])
    assert_close(moe(x).outputs, expected)
    assert moe(torch.randn(4, 0, 6, dtype=torch.float64)).outputs.shape == (4, 0, 3)


def quadratic():
    return pytest.warns(UserWarning, match="quadratic")


def test_an_overridden_or_hooked_gate_decides_by_its_dense_tensors():
    moe = build(2, capacity_factor=1.0)
    x = torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 9) < 0.8
    expected, cotangent = moe(x, mask=mask), torch.randn_like(x)
    handle = moe.gate.register_forward_hook(lambda gate, args, output: None)
    with quadratic():
        hooked = moe(x, mask=mask)
    for actual, wanted in zip(hooked, expected, strict=True):
        assert_close(actual, wanted)
    inputs = [x, *moe.parameters()]
    for actual, wanted in zip(
        gradients(hooked[0], cotangent, inputs), gradients(expected[0], cotangent, inputs), strict=True
    ):
        assert_close(actual, wanted)
    handle.remove()

    everything = moe.gate(x, mask=mask)

    def only_the_best(x, noise_gates=False, noise_mult=1.0):
        dispatch, combine, *losses = everything
        return dispatch * 0 + 1e-3, combine * 2, losses[0].view(1), losses[1] * 3

    moe.gate.forward = only_the_best
    with quadratic():
        outputs, _, balance, z = moe(x)
    slots = moe.experts(torch.einsum("bnd,bnec->becd", x, everything.dispatch_tensor * 0 + 1e-3))
    assert_close(outputs, torch.einsum("becd,bnec->bnd", slots, everything.combine_tensor * 2))
    assert balance.shape == ()
    assert_close(z, everything.router_z_loss * 3)


def test_padding_of_a_hooked_gate_may_hold_anything():
    moe, x = build(2, capacity_factor=1.0), torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(9) < torch.tensor([[6], [9]])
    expected = with_layout(moe, "definition")(x, mask)
    spoiled = x.detach().masked_fill(~mask.unsqueeze(-1), torch.nan).requires_grad_()
    moe.gate.register_forward_hook(lambda gate, args, output: None)
    with quadratic():
        outputs = moe(spoiled, mask=mask).outputs
    assert_close(outputs, expected)
    cotangent, parameters = torch.randn_like(x), list(moe.parameters())
    found = gradients(outputs, cotangent, [spoiled, *parameters])
    for gradient, wanted in zip(found, gradients(expected, cotangent, [x, *parameters]), strict=True):
        assert_close(gradient, wanted)


class Halved(nn.Module):
    """An expert whose results are of half precision."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return (x * (1 + self.number / 7)).bfloat16()


class HalvedSlots(nn.Module):
    def forward(self, x):
        return torch.stack([Halved(i)(part) for i, part in enumerate(x.unbind(1))], dim=1)


@pytest.mark.parametrize("path", ["rows", "slots", "dense"])
def test_results_of_half_precision_are_weighted_by_gates_of_float32(path):
    gate = TopNGating(6, 3, policy_train="all", capacity_factor_train=None)
    moe = MoE(6, 3, gate=gate, experts=[Halved(i) for i in range(3)])
    x = torch.randn(2, 9, 6)
    routing, expected = moe.gate.route(x), torch.zeros(2, 9, 6, dtype=torch.float64)
    for b, n, k in routing.kept.nonzero().tolist():
        expected[b, n] += routing.gates[b, n, k].double() * Halved(int(routing.indices[b, n, k]))(x[b, n]).double()
    if path == "slots":
        moe.experts = HalvedSlots()
    if path == "dense":
        moe.gate.register_forward_hook(lambda gate, args, output: None)
    with torch.autocast("cpu", torch.bfloat16), quadratic() if path == "dense" else nullcontext():
        outputs = moe(x).outputs
    assert outputs.dtype == torch.float32
    assert_close(outputs.double(), expected, 1e-6)


def test_the_quadratic_warning_is_given_once():
    moe = build()
    moe.gate.register_forward_hook(lambda gate, args, output: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            moe(torch.randn(1, 5, 6, dtype=torch.float64))
    assert len(caught) == 1


def test_a_subclassed_gate_may_override_route():
    class FirstExpertOnly(TopNGating):
        def route(self, *args, **kwargs):
            routing = super().route(*args, **kwargs)
            return routing._replace(kept=routing.kept & (routing.indices == 0))

    moe = build(2, 3, experts=[nn.Identity() for _ in range(3)])
    moe.gate = FirstExpertOnly(6, 3, policy_train="all", capacity_factor_train=None).double()
    x = torch.randn(1, 8, 6, dtype=torch.float64)
    routing = moe.gate.route(x)
    assert_close(moe(x).outputs, x * (routing.gates * (routing.indices == 0)).sum(-1, keepdim=True))


def test_experts_are_kept_by_identity():
    modules = [nn.Linear(6, 6) for _ in range(5)]
    assert all(a is b for a, b in zip(MoE(6, 5, experts=modules).experts.experts, modules, strict=True))
    module_list, built = nn.ModuleList(modules), Experts(modules)
    assert MoE(6, 5, experts=module_list).experts.experts is module_list
    assert MoE(6, 5, experts=built).experts is built
    gate = TopNGating(6, 5)
    assert MoE(6, 5, gate=gate).gate is gate


def test_gating_arguments_reach_the_gate():
    moe = MoE(
        6,
        5,
        4,
        0.1,
        0.3,
        1,
        3,
        3,
        straight_through_dispatch_tensor=False,
        differentiable_topk=True,
        differentiable_topk_fused=False,
    )
    gate = moe.gate
    assert gate.threshold_train.tolist() == pytest.approx([1e-9, 0.1, 0.1])
    assert gate.threshold_eval.tolist() == pytest.approx([1e-9, 0.3, 0.3])
    assert (gate.capacity_factor_train, gate.capacity_factor_eval, gate.top_n, gate.num_gates) == (1, 3, 3, 5)
    assert (gate.straight_through_dispatch_tensor, gate.differentiable_topk, gate.differentiable_topk_fused) == (
        False,
        True,
        False,
    )


def test_block_is_three_residual_steps():
    moe = build()
    block = SparseMoEBlock(moe, add_ff_before=True, add_ff_after=True).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    before = block.ff_before(x) + x
    after = moe(block.moe_prenorm(before)).outputs + before
    expected = block.ff_after(after) + after
    assert_close(block(x).outputs, expected)
    bare = SparseMoEBlock(moe, add_ff_after=False).double()
    assert bare.ff_before is None
    assert bare.ff_after is None
    assert isinstance(block.ff_after, Expert)
    assert_close(bare(x).outputs, moe(bare.moe_prenorm(x)).outputs + x)


def test_gradients_of_each_sample_and_ensembles_by_torch_func():
    """Under vmap nothing can be read from tensors, and the experts run on slots."""
    layers = [build(2, 3), build(2, 3)]
    x, cotangent = torch.randn(2, 4, 7, 6, dtype=torch.float64)

    def loss(parameters, x, cotangent):
        outputs = functional_call(layers[0], parameters, (x.unsqueeze(0),)).outputs
        return (outputs[0] * cotangent).sum()

    parameters = {name: p.detach() for name, p in layers[0].named_parameters()}
    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameters, x, cotangent)
    for place in range(4):
        layers[0].zero_grad()
        loss(dict(layers[0].named_parameters()), x[place], cotangent[place]).backward()
        for name, parameter in layers[0].named_parameters():
            assert_close(found[name][place], parameter.grad, 1e-10)
    states = [dict(layer.named_parameters()) | dict(layer.named_buffers()) for layer in layers]
    stacked = {name: torch.stack([state[name].detach() for state in states]) for name in states[0]}
    outputs = torch.func.vmap(lambda state: functional_call(layers[0], state, (x,)).outputs)(stacked)
    assert_close(outputs, torch.stack([layer(x).outputs for layer in layers]), 1e-10)


def test_shapes_can_be_tried_out_without_values():
    with FakeTensorMode():
        moe = MoE(16, 4)
        outputs, loss, *_ = moe(torch.randn(2, 5, 16))
        (outputs.sum() + loss).backward()
    assert outputs.shape == (2, 5, 16)
    assert moe.gate.to_gates.weight.grad.shape == (4, 16)
