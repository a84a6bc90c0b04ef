"""Recorded routing, and figures from it, against counts in plain Python."""

import math
import pickle
import threading
import warnings
from collections import OrderedDict
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.gate import LISTENERS
from st_moe_pytorch.tools.watch import RoutingStats, record_routing, routing_stats, warn_of_collapse, write_scalars


class Model(nn.Module):
    def __init__(self, checkpointed=False, **arguments):
        super().__init__()
        self.first = MoE(8, 4, **arguments)
        self.blocks = nn.ModuleList([SparseMoEBlock(MoE(8, 5, **arguments))])
        self.checkpointed = checkpointed

    def forward(self, x, mask=None):
        y, aux_loss, _, _ = self.first(x, mask=mask)
        if self.checkpointed:
            y, more, _, _ = checkpoint(self.blocks[0], x + y, mask=mask, use_reentrant=False)
        else:
            y, more, _, _ = self.blocks[0](x + y, mask=mask)
        return y, aux_loss + more


MASK = torch.arange(12) < torch.tensor([[12], [7], [0]])


def recorded(mask=None, calls=1, **arguments):
    torch.manual_seed(0)
    model = Model(**arguments)
    with record_routing(model) as records:
        for _ in range(calls):
            model(torch.randn(3, 12, 8), mask)
    return records


def test_layers_are_recorded_by_name_and_nothing_changes():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 12, 8)
    state = torch.get_rng_state()
    expected, aux_loss = model(x)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    torch.set_rng_state(state)
    with warnings.catch_warnings(), record_routing(model) as records:
        warnings.simplefilter("error")  # of a dense path
        outputs, aux = model(x)
        model.eval()(x)
    assert torch.equal(outputs, expected)
    assert torch.equal(aux, aux_loss)
    assert {name: len(routings) for name, routings in records.items()} == {"first": 2, "blocks.0.moe": 2}
    assert not records["first"][0].gates.requires_grad
    assert [float(routing.balance_loss) == 0 for routing in records["first"]] == [False, True]
    model.train()
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before


def test_a_single_layer_has_an_empty_name_and_assigned_routes_stay():
    moe = MoE(8, 4)
    calls = []
    route = moe.gate.route

    def mine(*args, **kwargs):
        calls.append(1)
        return route(*args, **kwargs)

    moe.gate.route = mine
    with record_routing(moe) as records:
        moe(torch.randn(1, 6, 8))
    assert (list(records), len(records[""]), len(calls)) == ([""], 1, 1)
    assert moe.gate.route is mine


def test_copies_made_while_recording_route_by_their_own_weights():
    model = Model()
    with record_routing(model) as records:
        copies = deepcopy(model), pickle.loads(pickle.dumps(model))
    x = torch.randn(3, 12, 8)
    for copied in copies:
        other = Model()
        copied.load_state_dict(other.state_dict())
        torch.manual_seed(0)
        expected = other(x)[0]
        torch.manual_seed(0)
        assert torch.equal(copied(x)[0], expected)
    assert not any(records.values())


def test_copies_made_while_recording_are_not_recorded():
    model = Model()
    with record_routing(model) as records:
        copied = deepcopy(model)
        copied(torch.randn(3, 12, 8))
        model(torch.randn(3, 12, 8))
    copied(torch.randn(3, 12, 8))
    assert {name: len(routings) for name, routings in records.items()} == {"first": 1, "blocks.0.moe": 1}


def test_threads_and_models_record_their_own_calls():
    torch.manual_seed(0)
    shared, own = Model().eval(), [Model().eval() for _ in range(4)]
    errors = []

    def work(place):
        try:
            for _ in range(10):
                x = torch.randn(place + 1, 12, 8)
                with record_routing(shared) as records, record_routing(own[place]) as mine:
                    shared(x)
                    own[place](x)
                for name, routings in (*records.items(), *mine.items()):
                    assert [routing.indices.shape[0] for routing in routings] == [place + 1], name
                assert not torch.equal(records["first"][0].logits, mine["first"][0].logits)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(place,)) for place in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors, errors
    assert LISTENERS.of_decisions == ()


def test_blocks_end_by_themselves_in_any_order_and_with_errors():
    moe, x = MoE(8, 4).eval(), torch.randn(1, 5, 8)
    first, second = record_routing(moe), record_routing(moe)
    early, late = first.__enter__(), second.__enter__()
    moe(x)
    first.__exit__(None, None, None)
    moe(x)
    second.__exit__(None, None, None)
    assert (len(early[""]), len(late[""])) == (1, 2)
    with record_routing(moe) as outer:
        with pytest.raises(KeyError), record_routing(moe) as inner:
            raise KeyError
        moe(x)
    assert (len(outer[""]), len(inner[""])) == (1, 0)
    assert LISTENERS.of_decisions == ()


def test_a_gate_tells_of_decisions_with_noise_too():
    gate = TopNGating(8, 4)
    with record_routing(gate) as records:
        gate.route(torch.randn(1, 5, 8), noise_gates=True)
    assert len(records[""]) == 1


def test_records_of_layers_that_share_a_gate_and_of_gates_in_layers_of_another_make():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = TopNGating(8, 4)

        def forward(self, x):
            return self.router.route(x).combine(torch.zeros(3, 4, self.router.route(x).capacity, 8))

    gate = TopNGating(8, 4)
    model = nn.ModuleDict({"a": MoE(8, 4, gate=gate), "b": MoE(8, 4, gate=gate), "own": Own()})
    with record_routing(model) as records:
        model["a"](torch.randn(3, 12, 8))
        for _ in range(3):
            model["b"](torch.randn(3, 12, 8))
        model["own"](torch.randn(3, 12, 8))
    assert {name: len(routings) for name, routings in records.items()} == {"a": 1, "b": 3, "own.router": 2}


def test_figures_compare_by_their_counts():
    first, again, other = (RoutingStats.of(recorded(calls=calls)["first"]) for calls in (1, 1, 2))
    assert first == again != other
    assert first != "a word"
    for name, counts in vars(first).items():
        assert replace(first, **{name: counts + 1}) != first


def test_sums_over_ranks_are_of_the_group_and_leave_counts_alone(monkeypatch):
    """With a stand-in for the exchange, as if two ranks had counted the same."""
    groups, group = [], object()

    def all_reduce(tensor, op=dist.ReduceOp.SUM, group=None):
        groups.append(group)
        tensor.mul_(2 if op == dist.ReduceOp.SUM else 1)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    stats, again = (RoutingStats.of(recorded()["first"]) for _ in range(2))
    assert stats.over_ranks(group) == again + again
    assert stats == again
    assert all(given is group for given in groups)


def test_a_model_without_sparse_layers_and_statistics_of_nothing_warn():
    with (
        pytest.warns(UserWarning, match="nothing is recorded of Linear, which has no sparse layers"),
        record_routing(nn.Linear(2, 2)) as records,
    ):
        pass
    assert records == {}
    with pytest.warns(UserWarning, match="stats must hold figures of a layer to tell of a collapse, got none"):
        assert warn_of_collapse({}) == []


def test_layers_that_run_again_in_the_backward_are_recorded_once():
    model = Model(checkpointed=True)
    with record_routing(model) as records:
        outputs, aux_loss = model(torch.randn(3, 12, 8))
        (outputs.sum() + aux_loss).backward()
    assert {name: len(routings) for name, routings in records.items()} == {"first": 1, "blocks.0.moe": 1}


@pytest.mark.compile
def test_compiled_layers_are_recorded_too():
    torch._dynamo.reset()
    moe, x = MoE(8, 4).eval(), torch.randn(2, 12, 8)
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    expected = compiled(x).outputs
    with record_routing(moe) as records:
        assert torch.equal(compiled(x).outputs, expected)
        compiled(x.flip(0))
    assert torch.equal(records[""][0].indices, moe.gate.route(x).indices)
    assert torch.equal(records[""][1].indices, moe.gate.route(x.flip(0)).indices)
    compiled(x)
    assert len(records[""]) == 2


def counted_by_hand(routings):
    """Tokens, choices asked for and kept by expert, dropped and unasked by position, unrouted tokens, sum of z^2."""
    experts = routings[0].num_experts
    count = {"tokens": 0, "asked": [0] * experts, "kept": [0] * experts, "alone": 0, "z": 0.0}
    count |= {name: [0] * 12 for name in ("choices", "dropped", "not_asked")}
    for r in routings:
        b, n, k = r.indices.shape
        for row in range(b):
            for token in range(n):
                if r.mask is not None and not r.mask[row, token]:
                    continue
                count["tokens"] += 1
                count["z"] += math.log(sum(math.exp(value) for value in r.logits[row, token].double().tolist())) ** 2
                count["alone"] += not any(r.kept[row, token].tolist())
                for rank in range(k):
                    expert = int(r.indices[row, token, rank])
                    asked, kept = bool(r.asked[row, token, rank]), bool(r.kept[row, token, rank])
                    count["choices"][token] += 1
                    count["asked"][expert] += asked
                    count["kept"][expert] += kept
                    count["dropped"][token] += asked and not kept
                    count["not_asked"][token] += not asked
    return count


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_figures_are_those_counted_by_hand(mask):
    records = recorded(mask, calls=3, capacity_factor_train=0.5, gating_top_n=3)
    for name, stats in routing_stats(records).items():
        count = counted_by_hand(records[name])
        assert stats.tokens == count["tokens"]
        assert stats.asked.tolist() == count["asked"]
        assert stats.kept.tolist() == count["kept"]
        assert stats.without_expert == count["alone"]
        assert 0 < sum(count["dropped"]) < sum(count["choices"])
        assert sum(count["not_asked"]) > 0
        scalars = stats.scalars()
        load = [asked / sum(count["asked"]) for asked in count["asked"]]
        expected = {
            "largest_load": max(load),
            "smallest_load": min(load),
            "load_entropy": -sum(p * math.log(p) for p in load if p) / math.log(len(load)),
            "unused_experts": sum(p == 0 for p in load) / len(load),
            "dropped": sum(count["dropped"]) / sum(count["choices"]),
            "not_asked": sum(count["not_asked"]) / sum(count["choices"]),
            "tokens_without_expert": count["alone"] / count["tokens"],
            "router_z": count["z"] / count["tokens"],
        }
        assert scalars == pytest.approx(expected, rel=1e-12)
        by_position = [
            dropped / max(choices, 1) for dropped, choices in zip(count["dropped"], count["choices"], strict=True)
        ]
        assert stats.dropped_by_position().tolist() == pytest.approx(by_position)
        by_position = [
            missing / max(choices, 1) for missing, choices in zip(count["not_asked"], count["choices"], strict=True)
        ]
        assert stats.not_asked_by_position().tolist() == pytest.approx(by_position)


def test_router_z_is_the_loss_of_the_layer():
    records = recorded(MASK)
    stats = routing_stats(records)
    for name, routings in records.items():
        assert stats[name].scalars()["router_z"] == pytest.approx(float(routings[0].router_z_loss), rel=1e-6)


def test_sums_over_calls_of_different_length_are_those_of_all_calls():
    torch.manual_seed(0)
    moe = MoE(8, 4)
    with record_routing(moe) as records:
        for n in (5, 12, 1):
            moe(torch.randn(2, n, 8))
    stats = RoutingStats.of(records[""])
    assert stats.choices_at.tolist() == [12] + [8] * 4 + [4] * 7
    parts = [RoutingStats.of(routing) for routing in records[""]]
    assert all(map(torch.equal, vars(parts[2] + parts[0] + parts[1]).values(), vars(stats).values()))


def test_nothing_to_count_is_zero_and_nothing_recorded_an_error():
    scalars = RoutingStats.of(recorded(torch.zeros(3, 12, dtype=torch.bool))["first"]).scalars()
    assert scalars.pop("unused_experts") == 1
    assert set(scalars.values()) == {0.0}
    with pytest.raises(ValueError, match="got none: did the layer run inside record_routing"):
        RoutingStats.of([])
    assert routing_stats({"unused": []}) == {}


def test_scalars_are_written_under_the_layers_names():
    written = []

    class Writer:
        def add_scalar(self, tag, value, step):
            written.append((tag, value, step))

    stats = routing_stats(recorded())
    write_scalars(Writer(), stats, step=7)
    assert len(written) == 16
    assert ("routing/blocks.0.moe/dropped", stats["blocks.0.moe"].scalars()["dropped"], 7) in written


def test_collapsed_routers_are_warned_of():
    torch.manual_seed(0)
    model = Model()
    with torch.no_grad():
        model.first.gate.to_gates.weight[1:].zero_()
        model.first.gate.to_gates.weight[0] = 5.0
    with record_routing(model) as records:
        for _ in range(4):
            model(torch.rand(3, 12, 8))
    model.first.gate.policy_train = "none"
    with record_routing(model) as records:
        for _ in range(4):
            model(torch.rand(3, 12, 8))
    with pytest.warns(
        UserWarning, match="router of first has collapsed: expert 0 gets 100% .* and 3 of 4 .* Raise balance_loss_coef"
    ) as caught:
        assert warn_of_collapse(routing_stats(records)) == ["first"]
    assert len(caught) == 1
    few = {"first": [records["first"][0]._replace(mask=MASK & False)]}
    assert warn_of_collapse(routing_stats(few)) == []


def stats_of(tokens, asked):
    """Counts of so many tokens with one choice each, of which each expert was asked for so often."""
    zeros, total = torch.zeros(tokens, dtype=torch.int64), torch.tensor(tokens)
    ones = torch.ones(tokens, dtype=torch.int64)
    counts = torch.tensor(asked)
    return RoutingStats(
        total, counts, counts, 2 * ones, zeros, ones, torch.tensor(0), torch.tensor(0.0, dtype=torch.float64)
    )


def test_what_is_told_of_a_collapse():
    """A tenth of an equal share is not idle only if nobody asked, and ten tokens for each expert are enough to tell."""
    with pytest.warns(UserWarning, match="expert 1 gets 98% of the choices, and 3 of 4 experts get less than a tenth"):
        assert warn_of_collapse({"layer": stats_of(100, [1, 98, 0, 1])}) == ["layer"]
    with pytest.warns(UserWarning, match="the router of the layer has collapsed"):
        assert warn_of_collapse({"": stats_of(40, [40, 0, 0, 0])}) == [""]
    assert warn_of_collapse({"layer": stats_of(39, [39, 0, 0, 0])}) == []


def test_a_single_expert_has_not_collapsed():
    stats = stats_of(100, [100])
    assert stats.scalars()["load_entropy"] == 1
    assert warn_of_collapse({"layer": stats}) == []


def test_scalars_of_a_single_layer_have_no_empty_name():
    tags = []

    class Writer:
        def add_scalar(self, tag, value, step):
            tags.append(tag)

    write_scalars(Writer(), {"": stats_of(4, [4])}, step=0)
    assert "routing/dropped" in tags


def test_the_bar_for_collapse_and_the_names_of_scalars_are_the_callers():
    with record_routing(model := Model()) as records:
        for _ in range(4):
            model(torch.randn(4, 20, 8))
    stats, tags = routing_stats(records), []
    assert warn_of_collapse(stats, least_entropy=0.0) == []
    with pytest.warns(UserWarning, match="has collapsed"):
        assert warn_of_collapse(stats, least_entropy=1.1) == list(stats)

    class Writer:
        def add_scalar(self, tag, value, step):
            tags.append(tag)

    write_scalars(Writer(), stats, step=7, prefix="router")
    assert "router/first/dropped" in tags


def test_layers_go_by_their_own_names():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.my_gate, self.gate = TopNGating(8, 4), TopNGating(8, 4)
            self.delegate = MoE(8, 4)

    model = Odd()
    with record_routing(model) as records:
        model.my_gate.route(torch.randn(1, 5, 8))
    assert list(records) == ["my_gate", "", "delegate"]
    assert [len(routings) for routings in records.values()] == [1, 0, 0]


def test_gates_that_decide_by_tensors_of_their_own_are_told_of():
    class Overridden(TopNGating):
        def forward(self, x, noise_gates=False, noise_mult=1.0):
            return everything

    moe = MoE(8, 4, gate=Overridden(8, 4))
    x = torch.randn(1, 5, 8)
    everything = TopNGating(8, 4)(x)
    model = nn.Sequential(OrderedDict(layer=moe, other=MoE(8, 4)))

    def run():
        with record_routing(model) as records:
            moe(x)
            model.other(x)
        return records

    with (
        pytest.warns(UserWarning, match="nothing was recorded of layer: the gate decides"),
        pytest.warns(UserWarning, match="quadratic"),
    ):
        records = run()
    assert {name: len(routings) for name, routings in records.items()} == {"layer": 0, "other": 1}

    hooked = MoE(8, 4)
    hooked.gate.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match="quadratic"), record_routing(hooked) as records:
        hooked(x)
    assert len(records[""]) == 1
