"""Plans from recorded logits against layers with those settings, and audits of layers known to be causal or not."""

import pytest
import torch
from torch import nn

from st_moe_pytorch import MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.tools.audit import audit_dependence
from st_moe_pytorch.tools.plan import plan, plan_table, reroute
from st_moe_pytorch.tools.watch import record_routing

SETTINGS = {
    "as it is": {},
    "one choice": {"top_n": 1},
    "three choices": {"top_n": 3, "policy_train": "all"},
    "tight": {"capacity_factor_train": 0.5, "policy_train": "threshold", "threshold_train": 0.4},
    "dropless": {"capacity_factor_train": None, "policy_train": "none"},
    "groups": {"group_size": 8, "priority": "gate", "policy_train": "threshold"},
}


OTHER_GATE = {
    "threshold_train": [0.3, 0.6],
    "capacity_factor_train": 0.8,
    "policy_train": "threshold",
    "min_expert_capacity": 1,
}
OTHER_THRESHOLDS = {1: [], 2: [0.3], 3: [0.3, 0.6], 4: [0.3, 0.6, 0.6]}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", SETTINGS)
def test_rerouted_logits_are_what_a_gate_with_the_settings_decides(name, masked):
    torch.manual_seed(0)
    gate = TopNGating(8, 4, **SETTINGS[name])
    x, mask = torch.randn(3, 16, 8), torch.rand(3, 16) < 0.7 if masked else None
    check_rerouted(TopNGating(8, 4), gate, x, mask, SETTINGS[name])


@pytest.mark.parametrize(
    "changes", [{}, {"top_n": 1}, {"top_n": 2}, {"top_n": 4}, {"capacity_factor_train": 2.0}], ids=str
)
def test_what_is_not_changed_stays_as_the_gate_has_it(changes):
    torch.manual_seed(0)
    thresholds = OTHER_THRESHOLDS[changes.get("top_n", 3)]
    expected = TopNGating(8, 4, **({"top_n": 3} | OTHER_GATE | {"threshold_train": thresholds} | changes))
    gate = TopNGating(8, 4, top_n=3, **OTHER_GATE | {"policy_train": "random"})
    gate.policy_train = "threshold"  # settings may be assigned
    check_rerouted(gate, expected, 2 * torch.randn(3, 16, 8), None, changes)


@pytest.mark.parametrize("training", [True, False])
def test_a_single_threshold_of_either_mode_stays(training):
    name = "threshold_train" if training else "threshold_eval"
    torch.manual_seed(0)
    gate = TopNGating(8, 4, policy_train="threshold", **{name: 0.4}).train(training)
    check_rerouted(gate, gate, torch.randn(3, 16, 8), None, {})


def check_rerouted(gate, expected, x, mask, changes):
    gate.to_gates = expected.to_gates
    recorded = gate.route(x, mask=mask)
    draws = torch.rand(3, 16, expected.top_n)
    got = reroute(gate, recorded, training=expected.training, draws=draws, **changes)
    for mine, theirs in zip(got, expected.route(x, mask=mask, draws=draws), strict=True):
        assert torch.equal(mine, theirs) if isinstance(mine, torch.Tensor) else mine == theirs


def test_plans_count_what_the_layer_would_do():
    torch.manual_seed(0)
    moe = MoE(8, 4)
    x, mask = torch.randn(3, 16, 8), torch.rand(3, 16) < 0.7
    with record_routing(moe) as records:
        moe(x, mask=mask)
        moe(x.flip(1), mask=mask.flip(1))
    settings = {name: setting for name, setting in SETTINGS.items() if name in ("one choice", "tight", "dropless")}
    plans = plan(moe, records[""], settings, ranks=4, bytes_per_number=2)
    hidden = int(8 * 4 * 2 / 3)
    for name, setting in settings.items():
        gate = TopNGating(8, 4, **setting)
        gate.to_gates = moe.gate.to_gates
        routed = [gate.route(x, mask=mask), gate.route(x.flip(1), mask=mask.flip(1))]
        tokens = 2 * int(mask.sum())
        rows = sum(int(routing.kept.sum()) for routing in routed) / tokens
        chosen = plans[name]
        assert chosen.experts_per_token == pytest.approx(rows)
        assert chosen.dropped == pytest.approx(sum(int(r.dropped.sum()) for r in routed) / tokens / gate.top_n)
        assert chosen.balance_loss == pytest.approx(sum(r.balance_loss.item() for r in routed) / 2)
        assert chosen.router_z_loss == pytest.approx(sum(r.router_z_loss.item() for r in routed) / 2)
        assert chosen.flops_per_token == pytest.approx(rows * 2 * 3 * 8 * hidden)
        assert chosen.padded_flops_per_token == pytest.approx(
            2 * 3 * 4 * routed[0].capacity / tokens * 2 * 3 * 8 * hidden
        )
        assert chosen.bytes_per_token == pytest.approx(rows * 4 * 8 * 2 * 3 / 4)
    assert plans["dropless"].dropped == 0 < plans["tight"].dropped
    table = plan_table(plans).splitlines()
    assert len(table) == 5
    assert table[0].startswith("| setting | experts per token | dropped |")
    assert table[2].startswith("| one choice | ")


def test_plans_count_the_slots_of_groups_and_the_experts_of_this_rank():
    moe = MoE(8, 4)
    with record_routing(moe) as records:
        moe(torch.randn(3, 16, 8))
    whole = plan(moe, records[""], {"groups": {"group_size": 8}})["groups"]
    capacity = max(4, int(8 * 1.25 / 4))
    flops = 2 * 3 * 8 * int(8 * 4 * 2 / 3)
    assert whole.padded_flops_per_token == pytest.approx(6 * 4 * capacity / 48 * flops)
    moe.experts.experts.add_module("1", None)  # as on a rank that holds three of four
    assert plan(moe, records[""], {"groups": {"group_size": 8}})["groups"] == whole


def layer(**arguments):
    torch.manual_seed(0)
    gate = TopNGating(8, 4, **({"policy_eval": "all", "min_expert_capacity": 1} | arguments))
    return MoE(8, 4, gate=gate).eval()


X = torch.randn(3, 12, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("arguments", "later", "rows"),
    [
        ({"capacity_factor_eval": None}, False, False),
        ({"capacity_factor_eval": 0.5, "top_n": 1}, False, False),
        ({"capacity_factor_eval": 0.5}, True, False),  # a second choice loses its slot to a later first choice
        ({"capacity_factor_eval": 0.5, "top_n": 1, "priority": "gate"}, True, False),
        ({"capacity_factor_eval": 0.5, "top_n": 1, "group_size": 36}, False, True),
        ({"capacity_factor_eval": 0.5, "top_n": 1, "group_size": 36, "priority": "gate"}, True, True),
    ],
    ids=["dropless", "capacity, one choice", "capacity, two choices", "gate priority", "groups across rows", "both"],
)
def test_audit_finds_what_outputs_depend_on(arguments, later, rows):
    found = audit_dependence(layer(**arguments), X)
    if arguments.get("group_size") and arguments.get("priority") is None:
        # rows follow each other in a group: later tokens of earlier rows come before, so only the first row is causal
        assert not found.on_later_tokens[0].any()
        assert not found.on_other_rows[0].any()
    else:
        assert bool(found.on_later_tokens.any()) is later
    assert bool(found.on_other_rows.any()) is rows
    assert not found.on_padding.any()


def test_audit_of_padding_and_of_a_block_in_training():
    mask = torch.arange(12) < torch.tensor([[12], [5], [0]])
    torch.manual_seed(0)
    found = audit_dependence(SparseMoEBlock(MoE(8, 4)), X, mask)
    assert not found.on_padding.any()
    assert "padding: no output depends on them" in str(found)

    class Leaky(nn.Module):
        def forward(self, x, mask):
            return x + x.mean(dim=1, keepdim=True)

    found = audit_dependence(Leaky(), X, mask)
    assert torch.equal(found.on_padding, mask & ~mask.all(dim=1, keepdim=True))
    assert torch.equal(found.on_later_tokens, mask & (torch.arange(12) < 11))
    assert not found.on_other_rows.any()
    assert "padding: 5 outputs depend on them: (row, token) (1, 0), (1, 1), (1, 2), (1, 3), (1, 4)" in str(found)


class Told(nn.Module):
    """A layer that is a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, mask=None):
        return self.function(x)


def test_audit_finds_a_dependence_on_a_single_token_or_row():
    last = torch.arange(12) == 11
    found = audit_dependence(
        Told(lambda x: x + x.roll(-1, dims=1)), X
    )  # the next token, and for the last one the first
    assert torch.equal(found.on_later_tokens, ~last.expand(3, 12))
    found = audit_dependence(Told(lambda x: x + x.roll(-1, dims=0)), X)  # the next row, and for the last one the first
    assert found.on_other_rows.all()


def test_audit_changes_tokens_into_others_of_the_batch_and_into_new_ones():
    known = X.double()

    def is_of_the_batch(x):  # (b n), of each token
        return (x.unsqueeze(-2) == known.flatten(0, 1)).all(dim=-1).any(dim=-1)

    def by_strangers(x):
        return x + (~is_of_the_batch(x)).sum()

    def by_others(x):  # whose sum tells which of the batch stand in other places
        return x + torch.where(is_of_the_batch(x).all(), x.sum(), known.sum())

    for function in (by_strangers, by_others):
        assert audit_dependence(Told(function), X).on_later_tokens[:, :-1].all()


def test_audit_measures_by_the_outputs_of_real_tokens_and_sees_what_becomes_nan():
    mask = torch.arange(12) < torch.tensor([[12], [5], [0]])
    padded = torch.where(mask.unsqueeze(-1), X, 1e20)
    found = audit_dependence(Told(lambda x: x + x[:1, 11:]), padded, mask)
    assert found.on_later_tokens[0, :-1].all()
    usual = X.double().sum()
    found = audit_dependence(Told(lambda x: torch.where(x.sum() == usual, x, torch.nan)), X)
    assert found.on_other_rows.all()


def test_the_seed_decides_about_the_random_numbers_of_an_audit():
    def by_chance(x):
        return x + x.sum(dim=1, keepdim=True) * (torch.rand(()) < 0.5)

    def audit(seed, usual):
        torch.manual_seed(usual)
        return bool(audit_dependence(Told(by_chance), X, seed=seed).on_later_tokens.any())

    found = [{audit(seed, usual) for usual in range(3)} for seed in range(3)]
    assert all(len(answers) == 1 for answers in found)
    assert {True, False} == set().union(*found)


def test_audit_of_flat_tokens_is_refused():
    with pytest.raises(ValueError, match="x must have shape \\(batch, tokens, width\\), got \\(12, 8\\)"):
        audit_dependence(layer(), X[0])


def test_audit_leaves_layer_and_random_numbers_alone():
    moe, state = layer(), torch.get_rng_state()
    before = {name: value.clone() for name, value in moe.state_dict().items()}
    audit_dependence(moe, X)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in moe.state_dict().items())
    assert moe.gate.to_gates.weight.dtype == torch.float32


def test_plans_of_training_and_evaluation_are_by_their_own_settings():
    moe = MoE(8, 4, capacity_factor_train=0.5, capacity_factor_eval=None)
    with record_routing(moe) as records:
        moe(torch.randn(3, 16, 8))
    plans = [plan(moe, records[""], {"as it is": {}}, training=training)["as it is"] for training in (True, False)]
    assert plans[0].dropped > 0 == plans[1].dropped
    assert plans[0].balance_loss > 0 == plans[1].balance_loss
    routing = reroute(moe.gate, records[""][0], training=False)
    assert routing.capacity == 16
    assert routing.balance_loss == 0


def test_audit_counts_no_change_below_its_tolerance():
    moe = layer(capacity_factor_eval=0.5)
    assert audit_dependence(moe, X, tolerance=1e-9).on_later_tokens.any()
    assert not audit_dependence(moe, X, tolerance=10.0).on_later_tokens.any()


def test_audit_of_what_is_not_a_number_or_not_there_is_refused():
    with pytest.raises(ValueError, match="must be finite, since what becomes NaN depends on everything"):
        audit_dependence(layer(), X.masked_fill(X.max() == X, torch.nan))
    for empty, mask in ((X[:0], None), (X[:, :0], None), (X, torch.zeros(3, 12, dtype=torch.bool))):
        with pytest.raises(ValueError, match="x must have real tokens to tell what their outputs depend on"):
            audit_dependence(layer(), empty, mask)
    mask = torch.arange(12) < torch.tensor([[12], [5], [0]])
    padded = X.masked_fill(~mask.unsqueeze(-1), torch.nan)  # padding may hold anything
    assert not audit_dependence(layer(), padded, mask).on_padding.any()


def test_plans_leave_the_global_random_numbers_alone_and_compare_by_the_same_ones():
    torch.manual_seed(0)
    moe = MoE(8, 4, gating_top_n=3)
    with record_routing(moe) as records:
        moe(X)
    state = torch.get_rng_state()
    plans = plan(moe, records[""], {"a": {}, "b": {}})
    assert torch.equal(torch.get_rng_state(), state)
    assert plans["a"] == plans["b"]
    torch.rand(7)
    assert plan(moe, records[""], {"a": {}})["a"] == plans["a"]


@pytest.mark.parametrize(("training", "unread"), [(True, "capacity_factor_eval"), (False, "capacity_factor_train")])
def test_settings_that_are_not_read_are_refused(training, unread):
    moe = MoE(8, 4)
    with record_routing(moe) as records:
        moe(X)
    with pytest.raises(ValueError, match=rf"settings\['tight'\] must be read in this mode, but {unread} is not"):
        plan(moe, records[""], {"tight": {unread: 1.0}}, training=training)


def test_plans_choose_by_the_bias_of_the_gate():
    torch.manual_seed(0)
    moe = MoE(8, 4, gate=TopNGating(8, 4, balance_bias=True, policy_train="all"))
    moe.gate.bias.copy_(torch.tensor([0.0, 3.0, 0.0, 2.0]))
    with record_routing(moe) as records:
        moe(X)
    (routing,) = records[""]
    assert (routing.indices == torch.tensor([1, 3])).all()
    assert torch.equal(reroute(moe.gate, routing).indices, routing.indices)
    assert not torch.equal(reroute(moe.gate, routing, balance_bias=False).indices, routing.indices)
