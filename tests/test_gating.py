"""The gate against the loop specification, and the rules that the specification does not have."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles import assert_close, assignments, gradients
from specification import logsumexp, softmax
from specification import route as specified_route
from torch import nn

from st_moe_pytorch import TopNGating
from st_moe_pytorch.routing import expert_capacity
from st_moe_pytorch.topk import topk

POLICIES = ("all", "none", "threshold", "random")


def transparent_gate(num_experts: int, **kwargs) -> TopNGating:
    """A float64 gate whose logits are its input."""
    gate = TopNGating(num_experts, num_experts, **kwargs).double()
    gate.to_gates.weight.data.copy_(torch.eye(num_experts))
    return gate


@st.composite
def routing_problems(draw):
    """Random shapes and settings; thresholds are exact in float32, which the buffers start as."""
    b, n, e = draw(st.integers(1, 3)), draw(st.integers(1, 14)), draw(st.integers(1, 9))
    k = draw(st.integers(1, min(4, e)))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    settings = dict(
        top_n=k,
        threshold_train=[draw(st.integers(0, 16)) / 16 for _ in range(k - 1)],
        policy_train=draw(st.sampled_from(POLICIES)),
        capacity_factor_train=draw(st.sampled_from([0.25, 0.5, 1, 1.25, 2.0])),
        min_expert_capacity=draw(st.integers(1, 4)),
    )
    mask = torch.rand(b, n) < draw(st.sampled_from([0.2, 0.7])) if draw(st.booleans()) else None
    return torch.randn(b, n, e, dtype=torch.float64) * 2, torch.rand(b, n, k, dtype=torch.float64), mask, settings


@given(routing_problems())
def test_every_assignment_and_loss_is_the_specifications(problem):
    logits, draws, mask, settings = problem
    second = settings["top_n"] > 1 and mask is None
    gate = transparent_gate(logits.shape[-1], **settings, second_place_loss=second)
    routing = gate.route(logits, mask=mask, draws=draws)
    capacity = max(
        min(logits.shape[1], int(logits.shape[1] * settings["capacity_factor_train"] / logits.shape[-1])),
        settings["min_expert_capacity"],
    )
    empty = mask is not None and not mask.any()
    expected = specified_route(
        logits.numpy(),
        draws.movedim(-1, 0).numpy(),
        settings["top_n"],
        [0.0, *settings["threshold_train"]],
        settings["policy_train"],
        capacity,
        None if mask is None or empty else mask.double().numpy(),
        flavour="top_2" if second else "top_n",
        second_place_loss=second,
        balance_denominator="real",
    )
    assert routing.capacity == capacity
    if empty:
        assert not routing.kept.any()
        assert routing.balance_loss == routing.router_z_loss == 0
        return
    assert assignments(routing) == [
        [[(e, s) for e, s, _ in token] for token in group] for group in expected.assignments
    ]
    gates = [g for group in expected.assignments for token in group for _, _, g in token]
    assert_close(routing.gates[routing.kept], torch.tensor(gates, dtype=torch.float64))
    assert_close(routing.balance_loss, torch.tensor(expected.balance_loss, dtype=torch.float64))
    assert_close(routing.router_z_loss, torch.tensor(expected.z_loss, dtype=torch.float64))


@given(routing_problems())
def test_every_choice_has_one_outcome_and_every_slot_one_holder(problem):
    logits, draws, mask, settings = problem
    routing = transparent_gate(logits.shape[-1], **settings).route(logits, mask=mask, draws=draws)
    outcomes = torch.stack([routing.kept, routing.dropped, routing.not_asked, routing.masked])
    assert (outcomes.sum(0) == 1).all()
    if mask is not None:
        assert torch.equal(routing.masked, ~mask[..., None].expand_as(routing.kept))
    assert not routing.not_asked[..., 0].any()
    for group in range(logits.shape[0]):
        held = list(
            zip(
                routing.indices[group][routing.kept[group]].tolist(),
                routing.slots[group][routing.kept[group]].tolist(),
                strict=True,
            )
        )
        assert len(held) == len(set(held))
        assert all(0 <= slot < routing.capacity for _, slot in held)
        # an expert that dropped anything is full
        for expert in routing.indices[group][routing.dropped[group]].tolist():
            assert sum(e == expert for e, _ in held) == routing.capacity
    assert (routing.slots[~routing.kept] == -1).all()


@given(routing_problems())
def test_policies_nest(problem):
    logits, draws, mask, settings = problem
    gate = transparent_gate(logits.shape[-1], **settings)
    asked = {}
    for gate.policy_train in POLICIES:
        asked[gate.policy_train] = gate.route(logits, mask=mask, draws=draws).asked
    for fewer, more in (("none", "threshold"), ("threshold", "random"), ("random", "all")):
        assert (asked[fewer] <= asked[more]).all()


@given(routing_problems())
def test_gate_priority_serves_the_most_certain_tokens_first(problem):
    logits, draws, mask, settings = problem
    by_gate = transparent_gate(logits.shape[-1], **settings, priority="gate").route(logits, mask=mask, draws=draws)
    order = logits.softmax(-1).amax(-1).argsort(dim=1, descending=True, stable=True)

    def reordered(t):
        return torch.stack([row[ranks] for row, ranks in zip(t, order, strict=True)])

    by_position = transparent_gate(logits.shape[-1], **settings).route(
        reordered(logits), mask=None if mask is None else reordered(mask), draws=reordered(draws)
    )
    for field in ("indices", "slots", "kept"):
        assert torch.equal(reordered(getattr(by_gate, field)), getattr(by_position, field))


def test_equal_certainty_is_served_in_order_of_position():
    gate = transparent_gate(2, top_n=1, priority="gate", capacity_factor_train=0.5, min_expert_capacity=1)
    routing = gate.route(torch.tensor([[[1.0, 0], [2.0, 0], [2.0, 0], [1.0, 0]]], dtype=torch.float64))
    assert routing.kept.flatten().tolist() == [False, True, False, False]


def test_equal_certainty_of_many_tokens_is_served_in_order_of_position():
    """A sort that is not stable keeps the order of a few."""
    certainty = torch.randint(1, 4, (100,))
    logits = torch.stack((certainty, torch.zeros(100)), dim=-1)[None].double()
    slots = transparent_gate(2, top_n=1, priority="gate", capacity_factor_train=None).route(logits).slots
    assert slots.flatten().argsort().tolist() == sorted(range(100), key=lambda n: -certainty[n])


@pytest.mark.parametrize(
    ("b", "n", "group_size", "groups"),
    [(2, 12, 8, (3, 8)), (4, 6, 24, (1, 24)), (3, 5, 4, (3, 5)), (2, 3, 100, (1, 6))],
)
def test_group_size_regroups_tokens_over_sequences(b, n, group_size, groups):
    gate = transparent_gate(4, group_size=group_size, capacity_factor_train=0.5, min_expert_capacity=1)
    x, draws = torch.randn(b, n, 4, dtype=torch.float64), torch.rand(b, n, 2)
    mask = torch.rand(b, n) < 0.8
    routing = gate.route(x, draws=draws, mask=mask)
    assert routing.groups == groups
    gate.group_size = None
    expected = gate.route(x.reshape(*groups, 4), draws=draws.reshape(*groups, 2), mask=mask.reshape(groups))
    for field in ("indices", "slots", "gates", "kept", "logits"):
        actual = getattr(routing, field)
        assert actual.shape[:2] == (b, n)
        assert torch.equal(actual.reshape(getattr(expected, field).shape), getattr(expected, field))
    assert routing.balance_loss == expected.balance_loss
    for actual, wanted in zip(routing.dense(), expected.dense(), strict=True):
        assert torch.equal(actual, wanted)


def test_a_group_size_that_divides_badly_warns():
    gate = transparent_gate(4, group_size=8)
    with pytest.warns(UserWarning, match="groups have 1 tokens"):
        assert gate.route(torch.randn(1, 17, 4, dtype=torch.float64)).groups == (17, 1)
    # half the size asked for is no reason yet
    gate.group_size = 2
    assert gate.route(torch.randn(1, 17, 4, dtype=torch.float64)).groups == (17, 1)


@pytest.mark.parametrize(
    ("tokens", "experts", "factor", "least", "capacity"),
    [
        (64, 8, 1.25, 4, 10),
        (64, 8, 2, 4, 16),
        (3, 4, 1.25, 4, 4),
        (16, 4, 8.0, 4, 16),
        (16, 4, None, 4, 16),
        (2, 4, None, 4, 2),
        (16, 16, 1, 1, 1),
        (35, 6, 1.2, 1, 7),  # 6 if tokens were divided first
    ],
)
def test_capacity(tokens, experts, factor, least, capacity):
    assert expert_capacity(tokens, experts, factor, least) == capacity


def test_capacity_is_that_of_the_mode_and_of_the_length_at_hand():
    gate = transparent_gate(4, capacity_factor_train=1, capacity_factor_eval=3, min_expert_capacity=1)
    for n in (16, 8, 40):
        x = torch.randn(1, n, 4, dtype=torch.float64)
        assert [gate.train(training).route(x).capacity for training in (True, False)] == [n // 4, 3 * n // 4]


def test_random_policy_asks_in_proportion_to_the_gate():
    trials, threshold = 20_000, 0.5
    gate = transparent_gate(3, top_n=3, threshold_train=threshold, capacity_factor_train=None)
    logits = torch.tensor([1.0, 0.2, -1.0], dtype=torch.float64)
    routing = gate.route(logits.expand(1, trials, 3))
    gates = logits.softmax(-1)
    for rank, probability in ((1, gates[1] / threshold), (2, gates[2] / threshold)):
        spread = math.sqrt(trials * probability * (1 - probability))
        assert abs(routing.asked[0, :, rank].sum() - trials * probability) < 4.5 * spread
    assert routing.asked[..., 0].all()


def test_a_gate_equal_to_the_threshold_and_a_draw_equal_to_its_share_ask_for_nothing():
    gate, half = TopNGating(2, 2, policy_train="threshold", threshold_train=0.5), torch.tensor(0.5)
    less, more = (half.nextafter(torch.tensor(end)) for end in (0.0, 1.0))
    x = torch.zeros(1, 3, 2)
    assert (gate.route(x).gates == half).all()
    assert not gate.route(x).asked[..., 1].any()
    gate.threshold_train[1] = less
    assert gate.route(x).asked.all()
    gate.policy_train, gate.threshold_train[1] = "random", 1.0
    draws = torch.stack([less, half, more]).view(1, 3, 1).expand(1, 3, 2)
    assert gate.route(x, draws=draws).asked[0, :, 1].tolist() == [True, False, False]


def test_fresh_draws_fill_the_choices_in_memory_order():
    gate = transparent_gate(4, top_n=3)
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    torch.manual_seed(7)
    draws = torch.rand(2, 5, 3, dtype=torch.float64)
    torch.manual_seed(7)
    assert torch.equal(gate.route(x).asked, gate.route(x, draws=draws).asked)


def test_evaluation_is_deterministic_and_has_no_losses():
    gate = transparent_gate(4, threshold_eval=0.4).eval()
    x = torch.randn(2, 9, 4, dtype=torch.float64)
    first, second = gate.route(x), gate.route(x)
    assert torch.equal(first.kept, second.kept)
    assert torch.equal(first.asked[..., 1], first.gates[..., 1] > gate.threshold_eval[1])
    for loss in (first.balance_loss, first.router_z_loss):
        assert loss.shape == ()
        assert loss == 0


def test_settings_are_read_in_every_forward():
    gate = transparent_gate(4, policy_train="threshold")
    x = torch.randn(2, 16, 4, dtype=torch.float64)
    gate.threshold_train[1:] = 1.0
    assert not gate.route(x).asked[..., 1].any()
    gate.policy_train = "all"
    assert gate.route(x).asked.all()
    gate.capacity_factor_train = None
    assert gate.route(x).kept.all()


def test_noise_changes_the_routing_by_the_gumbel_distribution_and_not_the_z_loss():
    trials = 20_000
    gate = transparent_gate(3, top_n=1)
    logits = torch.tensor([0.5, 0.0, -1.0], dtype=torch.float64).expand(1, trials, 3)
    noised, clean = gate.route(logits, noise_gates=True), gate.route(logits)
    shares = noised.indices.flatten().bincount(minlength=3) / trials
    # the argmax of logits plus Gumbel noise is a draw from their softmax
    assert ((shares - logits[0, 0].softmax(-1)).abs() < 0.02).all()
    assert noised.router_z_loss == clean.router_z_loss
    assert torch.equal(noised.logits, clean.logits)
    assert noised.balance_loss != clean.balance_loss
    assert torch.equal(gate.route(logits, noise_gates=True, noise_mult=0.0).gates, clean.gates)
    assert torch.equal(gate.route(logits, noise_mult=3.0).gates, clean.gates)


def test_noised_logits_decide_and_are_balanced():
    clean, noised = torch.randn(2, 3, 9, 4, dtype=torch.float64)
    draws, mask = torch.rand(3, 9, 2, dtype=torch.float64), torch.rand(3, 9) < 0.8
    gate = transparent_gate(4, threshold_train=0.5)
    routing = gate.decide(clean, mask=mask, draws=draws, noised=noised)
    expected = specified_route(
        noised.numpy(),
        draws.movedim(-1, 0).numpy(),
        2,
        0.5,
        "random",
        routing.capacity,
        mask.double().numpy(),
        balance_denominator="real",
    )
    wanted = [[[(e, s) for e, s, _ in token] for token in group] for group in expected.assignments]
    assert assignments(routing) == wanted
    assert_close(routing.balance_loss, torch.tensor(expected.balance_loss, dtype=torch.float64))
    z = np.mean([logsumexp(row) ** 2 for row in clean[mask].numpy()])
    assert_close(routing.router_z_loss, torch.tensor(z, dtype=torch.float64))


def test_route_by_decides_instead_of_x():
    gate = transparent_gate(4, top_n=2, policy_train="all")
    x, features = torch.randn(2, 2, 6, 4, dtype=torch.float64)
    actual, expected = gate.route(x, route_by=features), gate.route(features)
    assert torch.equal(actual.logits, expected.logits)
    assert torch.equal(actual.slots, expected.slots)


def test_route_by_gets_its_gradient_and_its_padding_may_hold_anything():
    gate = transparent_gate(4, policy_train="all")
    x, features, cotangent = torch.randn(3, 2, 6, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [1, 0, 1, 1, 1, 1]]).bool().unsqueeze(-1)
    nn.init.normal_(gate.to_gates.weight)
    spoiled = features.masked_fill(~mask, torch.nan).requires_grad_()
    logits = gate.route(x, mask=mask.squeeze(-1), route_by=spoiled).logits
    of_features, of_weight = gradients(logits, cotangent, [spoiled, gate.to_gates.weight])
    assert_close(of_features, (cotangent @ gate.to_gates.weight) * mask)
    assert_close(of_weight, (cotangent * mask).flatten(0, 1).T @ (features * mask).flatten(0, 1))


def test_padding_may_hold_anything():
    gate = transparent_gate(4, second_place_loss=True)
    x, draws = torch.randn(2, 6, 4, dtype=torch.float64), torch.rand(2, 6, 2)
    mask = torch.tensor([[1, 1, 0, 1, 1, 0], [0, 0, 0, 0, 0, 0]]).bool()
    clean = gate.route(x, mask=mask, draws=draws)
    spoiled = gate.route(x.masked_fill(~mask[..., None], torch.nan), mask=mask, draws=draws)
    assert torch.equal(clean.slots, spoiled.slots)
    for loss in ("balance_loss", "router_z_loss"):
        assert getattr(clean, loss) == getattr(spoiled, loss)
    # the empty sequence is left out of the mean over groups
    assert_close(clean.balance_loss, gate.route(x[:1], mask=mask[:1], draws=draws[:1]).balance_loss)


def test_without_a_real_token_losses_are_zero_and_part_of_the_graph():
    gate = transparent_gate(4)
    x = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    routing = gate.route(x, mask=torch.zeros(2, 6, dtype=torch.bool))
    assert routing.balance_loss == routing.router_z_loss == 0
    (grad,) = torch.autograd.grad(routing.balance_loss + routing.router_z_loss, gate.to_gates.weight)
    assert (grad == 0).all()


def test_uniform_routing_has_balance_loss_one_and_collapse_has_e():
    gate = transparent_gate(4, top_n=1)
    spread = torch.eye(4, dtype=torch.float64).repeat(3, 1)[None] * 1e-9
    assert_close(gate.route(spread).balance_loss, torch.tensor(1.0, dtype=torch.float64), 1e-8)
    collapsed = torch.tensor([100.0, 0, 0, 0], dtype=torch.float64).expand(1, 12, 4)
    assert_close(gate.route(collapsed).balance_loss, torch.tensor(4.0, dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_routed_in_float32(dtype):
    gate = TopNGating(8, 4).to(dtype)
    x = torch.randn(2, 16, 8, dtype=dtype)
    routing = gate.route(x, draws=torch.rand(2, 16, 2))
    expected = x.float() @ gate.to_gates.weight.float().T
    assert routing.logits.dtype == routing.gates.dtype == routing.balance_loss.dtype == torch.float32
    assert_close(routing.logits, expected, 1e-6)


def test_a_router_of_another_make_may_work_in_half_precision():
    gate, linear = TopNGating(8, 4), nn.Linear(8, 4, bias=False).bfloat16()
    gate.to_gates = linear
    x = torch.randn(2, 16, 8, dtype=torch.bfloat16)
    routing = gate.route(x)
    assert routing.logits.dtype == routing.gates.dtype == routing.balance_loss.dtype == torch.float32
    assert torch.equal(routing.logits, linear(x).float())


def test_autocast_does_not_reach_the_router():
    gate = TopNGating(8, 4, policy_train="all")
    x = torch.randn(2, 16, 8)
    with torch.autocast("cpu", torch.bfloat16):
        inside = gate.route(x)
    outside = gate.route(x)
    assert inside.logits.dtype == torch.float32
    assert torch.equal(inside.logits, outside.logits)
    assert inside.balance_loss == outside.balance_loss


@pytest.mark.parametrize("fused", [True, False])
def test_differentiable_topk_gives_coordinate_descent_gates(fused):
    gate = transparent_gate(8, top_n=2, differentiable_topk=True, differentiable_topk_fused=fused, policy_train="all")
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    routing = gate.route(x)
    selected = gate.topk(x.softmax(-1), k=2).coor_descent_values
    assert_close(routing.gates, selected / (selected.sum(-1, keepdim=True) + gate.eps))
    # every expert's logit moves the gates, not only those of the chosen ones
    assert (gradients(routing.gates, torch.randn_like(routing.gates), [x])[0].abs() > 1e-12).all()


def selection(scores, k):
    """Coordinate descent of one list of scores: 20 steps with eps 0.1, for 9/8 of the winners or all experts."""
    a, b = 0.0, -scores
    for _ in range(20):
        a = 0.1 * (np.log(min(k * 9 / 8, len(scores))) - logsumexp((scores + b) / 0.1))
        b = -np.maximum(scores + a, 0)
    return np.exp((scores + a + b) / 0.1)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_coordinate_descent_of_scores_of_any_sign_and_for_all_experts(k, fused):
    scores = torch.tensor([[0.3, -1.0, 0.2], [-1.0, -2.0, -0.5]], dtype=torch.float64, requires_grad=True)
    best = topk(scores, k, None, None, differentiable=True, fused=fused)
    selected = np.stack([selection(row, k) for row in scores.detach().numpy()])
    assert_close(best.coor_descent_values, torch.from_numpy(selected).gather(-1, best.indices))
    # values carry the gradient of the selection, as if they were multiplied by it and divided again
    cotangent = torch.randn(2, k, dtype=torch.float64)
    through = gradients(best.coor_descent_values, cotangent * best.values.detach(), [scores])[0]
    own = torch.zeros(2, 3, dtype=torch.float64).scatter(-1, best.indices, cotangent)
    assert k > 1 or through.abs().max() > 1e-3
    assert_close(gradients(best.values, cotangent, [scores])[0], own + through)


def test_the_only_gate_of_a_differentiable_topk_is_the_selection():
    x = torch.randn(1, 6, 4, dtype=torch.float64)
    gates = transparent_gate(4, top_n=1, differentiable_topk=True).route(x).gates
    expected = [selection(softmax(row), 1).max() for row in x[0].numpy()]
    assert_close(gates.flatten(), torch.tensor(expected, dtype=torch.float64))


def test_a_token_never_chooses_an_expert_twice_even_where_most_are_impossible():
    gate = TopNGating(6, 4, top_n=3, balance_bias=True, policy_eval="all").eval()
    gate.bias.copy_(torch.tensor([-torch.inf, -torch.inf, 0, -torch.inf]))
    routing = gate.route(torch.randn(1, 5, 6))
    assert (routing.indices == torch.tensor([2, 0, 1])).all()
    assert_close(routing.gates.sum(-1), torch.ones(1, 5), 1e-6)


def test_a_token_that_is_certain_chooses_other_experts_after_its_first():
    routing = TopNGating(4, 4, top_n=3, policy_train="all").decide(torch.tensor([[[0.0, 200.0, 0.0, 0.0]]]))
    assert routing.gates.tolist() == [[[1, 0, 0]]]
    assert routing.indices.tolist() == [[[1, 0, 2]]]


def test_fused_coordinate_descent_keeps_fewer_iterates():
    kept = {}
    for fused in (True, False):
        gate = transparent_gate(8, differentiable_topk=True, differentiable_topk_fused=fused)
        x = torch.randn(4, 64, 8, dtype=torch.float64, requires_grad=True)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t):
            gate.topk(x.softmax(-1), k=2)
        kept[fused] = sum(saved)
    assert kept[True] < kept[False] / 5


@pytest.mark.parametrize("fused", [True, False])
def test_a_differentiable_topk_works_under_torch_func(fused):
    gate = TopNGating(6, 4, differentiable_topk=True, differentiable_topk_fused=fused, policy_train="all").double()
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    cotangent = torch.randn(2, 5, 2, dtype=torch.float64)

    def loss(weight):
        routing = torch.func.functional_call(gate, {"to_gates.weight": weight}, x)
        return (routing.combine_tensor.sum(-1) * torch.arange(4)).sum() + (cotangent.sum() * routing.balance_loss)

    weight = gate.to_gates.weight.detach().requires_grad_()
    (expected,) = torch.autograd.grad(loss(weight), weight)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(torch.func.grad(loss)(weight.detach()), expected, rtol=1e-10, atol=1e-12)
