"""Replayed routing against free runs of the same weights, against recorded choices, and against finite differences."""

import io
import threading
import warnings
from copy import deepcopy

import pytest
import torch
from oracles import assert_close
from test_gate import ByPosition, NoGate
from torch import nn
from torch.utils.checkpoint import checkpoint

from st_moe_pytorch import ExpertChoiceGating, MoE, SparseMoEBlock, TopNGating
from st_moe_pytorch.gate import LISTENERS, REPLAYS
from st_moe_pytorch.tools.replay import choices_of, replay_routing
from st_moe_pytorch.tools.watch import gates_of, record_routing

MASK = torch.arange(12) < torch.tensor([[12], [7], [0]])


class Model(nn.Module):
    """Two sparse layers, of which the second is in a block, with dropout between them."""

    def __init__(self, use_reentrant=None, **settings):
        super().__init__()
        self.use_reentrant = use_reentrant
        settings = {"threshold_train": 0.8, "capacity_factor_train": 0.8, "min_expert_capacity": 1} | settings
        self.first = MoE(8, 4, gate=TopNGating(8, 4, **settings))
        self.dropout = nn.Dropout(0.2)
        self.block = SparseMoEBlock(MoE(8, 5, gate=TopNGating(8, 5, **settings)))

    def forward(self, x, mask=None, noise_gates=False):
        def layers(x):
            y, aux_loss, _, _ = self.first(x, noise_gates, mask=mask)
            y, more, _, _ = self.block(self.dropout(x + y), noise_gates, mask=mask)
            return y, aux_loss + more

        return layers(x) if self.use_reentrant is None else checkpoint(layers, x, use_reentrant=self.use_reentrant)


def run_all(model, *batches):
    return [model(x)[0] for x in batches]


def results(model, x, cotangent, **given):
    """Outputs, auxiliary loss and all gradients of a forward with seed 5."""
    torch.manual_seed(5)
    model.zero_grad()
    x = x.clone().requires_grad_()
    outputs, aux_loss = model(x, **given)
    ((outputs * cotangent).sum() + aux_loss).backward()
    return [outputs.detach(), aux_loss.detach(), x.grad, *(parameter.grad for parameter in model.parameters())]


def moved(model, by=0.5):
    """Its routers somewhere else."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "to_gates" in name:
                parameter.add_(by * torch.randn_like(parameter))
    return model


VARIANTS = [
    {},
    {"top_n": 1},
    {"top_n": 3, "second_place_loss": True},
    {"group_size": 6},
    {"group_size": 18, "priority": "token"},
    {"priority": "gate"},
    {"priority": "token"},
    {"score": "sigmoid", "balance_bias": True},
    {"normalize_gates": False},
    {"differentiable_topk": True},
    {"jitter": 0.1},
    {"straight_through_dispatch_tensor": False, "capacity_factor_train": None},
]


@pytest.mark.parametrize("noise_gates", [False, True])
@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
@pytest.mark.parametrize("settings", VARIANTS, ids=str)
def test_where_nothing_has_moved_a_replay_is_a_free_run_bit_for_bit(settings, mask, noise_gates):
    torch.manual_seed(0)
    model, x, cotangent = Model(**settings), torch.randn(3, 12, 8), torch.randn(3, 12, 8)
    for moe in (model.first, model.block.moe):
        if moe.gate.bias is not None:
            moe.gate.bias.normal_(std=0.1)
    with record_routing(model) as records:
        free = results(model, x, cotangent, mask=mask, noise_gates=noise_gates)
    with replay_routing(model, choices_of(records)) as replay, record_routing(model) as again:
        replayed = results(model, x, cotangent, mask=mask, noise_gates=noise_gates)
    assert all(map(torch.equal, replayed, free))
    assert sum(bool(gradient.any()) for gradient in free[2:]) > 0.8 * len(free[2:])  # some expert may have no tokens
    for name, (routing,) in records.items():
        for field, expected in routing._asdict().items():
            got = getattr(again[name][0], field)
            assert torch.equal(got, expected) if isinstance(got, torch.Tensor) else got == expected, field
        assert routing.dropped.any() or settings.get("capacity_factor_train", 0) is None
    if not noise_gates:
        assert replay.differing == 0


def test_what_was_recorded_is_chosen_where_weights_have_moved():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(3, 12, 8)
    with record_routing(model) as records:
        model(x)
    moved(model)
    with replay_routing(model, records), record_routing(model) as again:
        model(x)
    with record_routing(model) as free:
        model(x)
    for name, (routing,) in again.items():
        recorded = records[name][0]
        for field in ("indices", "slots", "kept", "asked", "capacity"):
            assert torch.equal(torch.as_tensor(getattr(routing, field)), torch.as_tensor(getattr(recorded, field))), (
                field
            )
        assert not torch.equal(routing.indices, free[name][0].indices)
        probabilities = routing.logits.double().softmax(dim=-1).gather(-1, recorded.indices)
        assert_close(routing.gates.double(), probabilities / probabilities.sum(dim=-1, keepdim=True), 1e-6)
        share = torch.stack(
            [(recorded.indices[..., 0] == expert).double().mean(dim=1) for expert in range(routing.num_experts)], dim=-1
        )
        balance = routing.num_experts * (share * routing.logits.double().softmax(dim=-1).mean(dim=1)).sum(dim=-1).mean()
        assert_close(routing.balance_loss.double(), balance, 1e-6)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_gates_are_those_of_the_noised_logits_of_the_recorded_experts(score):
    torch.manual_seed(0)
    gate, x = TopNGating(6, 4, score=score).double(), torch.randn(2, 9, 6, dtype=torch.float64)
    choices = gate.route(torch.randn_like(x)).choices()
    torch.manual_seed(1)
    routing = gate.route(x, True, 0.5, choices=choices)
    torch.manual_seed(1)
    noised = routing.logits - 0.5 * torch.empty_like(routing.logits).exponential_().log()
    scores = (noised.softmax(dim=-1) if score == "softmax" else noised.sigmoid()).gather(-1, choices.indices.long())
    assert_close(routing.gates, scores / scores.sum(dim=-1, keepdim=True), 1e-7)
    assert torch.equal(gate.decide(routing.logits, noised=noised, choices=choices).gates, routing.gates)


@pytest.mark.parametrize(
    "settings", [{}, {"top_n": 1}, {"score": "sigmoid"}, {"normalize_gates": False, "group_size": 4}], ids=str
)
def test_gradients_are_those_of_finite_differences(settings):
    torch.manual_seed(0)
    gate = TopNGating(
        3,
        4,
        **{"capacity_factor_train": 0.7, "min_expert_capacity": 1} | settings,
        straight_through_dispatch_tensor=False,
    )
    moe = MoE(3, 4, expert_hidden_mult=1, gate=gate).double()
    x = torch.randn(2, 6, 3, dtype=torch.float64, requires_grad=True)
    with record_routing(moe) as records:
        moe(torch.randn_like(x))
    names, parameters = zip(*moe.named_parameters(), strict=True)

    def run(x, *values):
        with replay_routing(moe, records):
            return torch.func.functional_call(moe, dict(zip(names, values, strict=True)), (x,))[:2]

    assert torch.autograd.gradcheck(run, (x, *(parameter.detach().requires_grad_() for parameter in parameters)))


@pytest.mark.parametrize("mask", [None, MASK], ids=["full", "masked"])
def test_differing_choices_are_those_counted_by_hand(mask):
    torch.manual_seed(0)
    model = Model(top_n=3, jitter=0.0)
    batches = torch.randn(2, 3, 12, 8)
    with record_routing(model) as records:
        for x in batches:
            model(x, mask)
    moved(model)
    with replay_routing(model, records) as replay, record_routing(model) as again:
        for x in batches:
            model(x, mask)
    differing = {}
    for name, routings in again.items():
        count = differing[name] = [0, 0]
        for recorded, routing in zip(records[name], routings, strict=True):
            for b, n in (torch.ones(3, 12) if mask is None else mask).nonzero().tolist():
                live = sorted(range(routing.num_experts), key=lambda expert: -float(routing.logits[b, n, expert]))[:3]
                count[0] += sum(expert not in live for expert in recorded.indices[b, n].tolist())
                count[1] += 3
    assert replay.differing_by_layer == {name: other / all_ for name, (other, all_) in differing.items()}
    assert replay.differing == sum(other for other, _ in differing.values()) / sum(
        all_ for _, all_ in differing.values()
    )
    assert 0 < replay.differing < 1


@pytest.mark.parametrize(
    ("experts", "indices", "slots"),
    [(4, torch.uint8, torch.int8), (256, torch.uint8, torch.int8), (257, torch.int16, torch.int16)],
)
def test_choices_are_saved_and_loaded_in_few_bytes(experts, indices, slots):
    torch.manual_seed(0)
    n = 128 if slots == torch.int8 else 129
    moe, x = MoE(8, experts, expert_hidden_mult=0.5, capacity_factor_train=None), torch.randn(2, n, 8)
    mask = torch.rand(2, n) < 0.8
    with record_routing(nn.ModuleDict({"layer": moe})) as records:
        moe(x, mask=mask)
    file = io.BytesIO()
    torch.save(choices_of(records), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    (choices,) = loaded["layer"]
    assert (choices["indices"].dtype, choices["slots"].dtype, choices["asked"].dtype) == (indices, slots, torch.bool)
    (routing,) = records["layer"]
    assert torch.equal(choices["indices"].long(), routing.indices)
    assert torch.equal(choices["slots"].long(), routing.slots)
    assert torch.equal(choices["asked"], routing.asked)
    assert torch.equal(choices["mask"], mask)
    torch.manual_seed(1)
    expected = moe(x, mask=mask).outputs
    with replay_routing(moe, {"": loaded["layer"]}) as replay:
        moe(x, mask=mask)
    with record_routing(moe) as records:
        torch.manual_seed(1)
        assert torch.equal(moe(x, mask=mask).outputs, expected)
    assert replay.differing == 0


@pytest.mark.parametrize("in_another_thread", [False, True])
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 2, 0]], ids=str)
def test_layers_that_run_again_in_the_backward_take_the_same_record_again(use_reentrant, order, in_another_thread):
    """Three micro-batches, backwards after all forwards, in any order, as in pipelines, or on threads as on GPUs."""
    torch.manual_seed(0)
    plain = Model()
    again = Model(use_reentrant)
    batches, cotangent = torch.randn(3, 3, 12, 8), torch.randn(3, 12, 8)
    with record_routing(plain) as records:
        for x in batches:
            plain(x)
    again.load_state_dict(moved(plain).state_dict())

    def gradients(model):
        torch.manual_seed(5)
        xs = [x.clone().requires_grad_() for x in batches]
        with replay_routing(model, records) as replay:
            losses = [(outputs * cotangent).sum() + aux_loss for outputs, aux_loss in map(model, xs)]

            def work():
                for place in order:
                    losses[place].backward()

            thread = threading.Thread(target=work)
            if in_another_thread:
                thread.start()
                thread.join()
            else:
                work()
        assert 0 < replay.differing < 1
        return [x.grad for x in xs] + [parameter.grad for parameter in model.parameters()]

    for got, expected in zip(gradients(again), gradients(plain), strict=True):
        assert_close(got, expected, 1e-5)


def test_a_layer_that_runs_twice_in_a_part_that_runs_again_is_told_apart():
    torch.manual_seed(0)
    moe, x = MoE(8, 4), torch.randn(2, 12, 8, requires_grad=True)
    twice = lambda x: moe(x + moe(x).outputs).outputs  # noqa: E731
    with record_routing(moe) as records:
        twice(torch.randn_like(x))
    gradients = []
    for run in (twice, lambda x: checkpoint(twice, x, use_reentrant=False)):
        with replay_routing(moe, records):
            gradients.append(torch.autograd.grad(run(x).square().sum(), [x, *moe.parameters()]))
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected, 1e-6)


def test_equal_inputs_take_their_records_again_from_the_last_on():
    torch.manual_seed(0)
    moe = MoE(8, 4)
    x = torch.randn(1, 12, 8).requires_grad_()
    with record_routing(moe) as records:
        for _ in range(2):
            moe(torch.randn_like(x))
    gradients = []
    for run in (lambda x: moe(x).outputs, lambda x: checkpoint(lambda x: moe(x).outputs, x, use_reentrant=False)):
        with replay_routing(moe, records):
            loss = sum(weight * run(x).square().sum() for weight in (1, 3))
            gradients.append(torch.autograd.grad(loss, [x, *moe.parameters()]))
    for got, expected in zip(*gradients, strict=True):
        assert_close(got, expected, 1e-5)


@pytest.mark.parametrize("others", [0, 1])
def test_a_backward_without_its_forward_is_refused(others):
    torch.manual_seed(0)
    moe, x = MoE(8, 4), torch.randn(1, 5, 8, requires_grad=True)
    with record_routing(moe) as records:
        moe(x)
    loss = checkpoint(lambda x: moe(x).outputs, x, use_reentrant=False).sum()
    match = "the layer runs again in the backward on tokens that it has not seen in this replay: run both in it"
    with pytest.raises(RuntimeError, match=match), replay_routing(moe, records):
        run_all(lambda x: moe(x), *torch.randn(others, 1, 5, 8)), loss.backward()


@pytest.mark.compile
@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # by dynamo, of what a graph begins with
def test_compiled_models_replay_with_a_break_in_the_graph():
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, batches = Model().eval(), torch.randn(3, 3, 12, 8)
    with record_routing(model) as records:
        for x in batches:
            model(x)
    moved(model)
    compiled = torch.compile(model, backend="aot_eager")
    runs = []
    for run in (model, compiled):
        with replay_routing(model, records) as replay:
            runs.append([run(x)[0] for x in batches])
        assert 0 < replay.differing < 1
        runs[-1].append(torch.tensor(replay.differing))
    for got, expected in zip(*runs, strict=True):
        assert_close(got, expected, 1e-6)
    torch._dynamo.reset()
    with (
        pytest.raises(
            torch._dynamo.exc.Unsupported, match="recorded choices are replayed: compile without fullgraph=True"
        ),
        replay_routing(model, records),
    ):
        torch.compile(model, backend="aot_eager", fullgraph=True)(batches[0])
    torch._dynamo.reset()
    torch.compile(model, backend="aot_eager", fullgraph=True)(batches[0])


def test_layers_that_share_a_gate_and_gates_in_layers_of_another_make():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = TopNGating(8, 4)

        def forward(self, x):
            routing = self.router.route(x)
            return routing.combine(routing.dispatch(x))

    torch.manual_seed(0)
    gate, xs = TopNGating(8, 4), torch.randn(2, 1, 12, 8)
    model = nn.ModuleDict({"a": MoE(8, 4, gate=gate), "b": MoE(8, 4, gate=gate), "own": Own()}).eval()

    def run():
        return [
            outputs for x in xs for outputs in (model["a"](x).outputs, model["b"](x.flip(1)).outputs, model["own"](x))
        ]

    with record_routing(model) as records:
        run()
    moved(model)
    with replay_routing(model, records) as replay, record_routing(model) as again:
        run()
    assert 0 < replay.differing < 1
    for name, routings in again.items():
        for routing, recorded in zip(routings, records[name], strict=True):
            assert torch.equal(routing.indices, recorded.indices)


def test_gates_that_are_called_and_routes_that_are_assigned_replay_too():
    torch.manual_seed(0)
    hooked, assigned = MoE(8, 4).eval(), MoE(8, 4).eval()
    hooked.gate.register_forward_hook(lambda *_: None)
    route = assigned.gate.route
    assigned.gate.route = lambda *args, **kwargs: route(*args, **kwargs)
    model, x = nn.Sequential(), torch.randn(1, 12, 8)
    model.hooked, model.assigned = hooked, assigned
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of dense tensors
        with record_routing(model) as records:
            expected = [hooked(x).outputs, assigned(x).outputs]
        weights = deepcopy(model.state_dict())
        moved(model)
        with replay_routing(model, records), record_routing(model) as again:
            for moe in model:
                moe(x)
        model.load_state_dict(weights)
        with replay_routing(model, records):
            assert all(map(torch.equal, (hooked(x).outputs, assigned(x).outputs), expected))
    for name in ("hooked", "assigned"):
        assert torch.equal(again[name][0].indices, records[name][0].indices)


def test_other_models_and_threads_route_freely_and_replays_end_by_themselves():
    torch.manual_seed(0)
    model, other, x = Model().eval(), Model().eval(), torch.randn(3, 12, 8)
    with record_routing(model) as records:
        model(x)
    expected, free = model(x)[0], other(x)[0]
    moved(model)
    alone = model(x)[0]
    found = []
    with replay_routing(model, records):
        thread = threading.Thread(target=lambda: found.append(model(x)[0]))
        thread.start()
        thread.join()
        assert torch.equal(other(x)[0], free)
        assert torch.equal(deepcopy(model)(x)[0], alone)
        replayed = model(x)[0]
    assert torch.equal(found[0], alone)
    assert torch.equal(model(x)[0], alone)
    assert not torch.equal(replayed, alone)
    assert not torch.equal(replayed, expected)
    with pytest.raises(KeyError), replay_routing(model, records):
        raise KeyError
    assert (LISTENERS.of_decisions, REPLAYS) == ((), [])


def recorded(*shape, **settings):
    moe = MoE(8, settings.pop("experts", 4), gate=TopNGating(8, settings.pop("num_gates", 4), **settings))
    with record_routing(moe) as records:
        moe(torch.randn(*shape, 8))
    return records


@pytest.mark.parametrize(
    ("records", "message"),
    [
        (
            lambda: recorded(3, 11),
            r"record 0 of the layer must have shape \(b n k\) = \(3, 12, 2\) .* got \(3, 11, 2\)",
        ),
        (lambda: recorded(4, 9), r"record 0 of the layer must have shape \(b n k\) = \(3, 12, 2\) .* got \(4, 9, 2\)"),
        (lambda: recorded(3, 12, top_n=1), r"= \(3, 12, 2\) .* got \(3, 12, 1\)"),
        (lambda: recorded(3, 12, experts=5, num_gates=5), "among 4 experts in groups .* among 5 in"),
        (lambda: recorded(3, 12, group_size=6), r"in groups \(3, 12\), got .* in \(6, 6\)"),
        (lambda: {"": []}, "records must hold every call, but the layer is called again after the 0 of its records"),
    ],
    ids=["tokens", "batch", "top_n", "experts", "groups", "none"],
)
def test_records_of_another_kind_are_refused(records, message):
    moe = MoE(8, 4)
    with pytest.raises(ValueError, match=message), replay_routing(moe, records()):
        moe(torch.randn(3, 12, 8))


def test_choices_of_another_kind_are_refused_by_a_gate_too():
    (routing,) = recorded(3, 12)[""]
    with pytest.raises(ValueError, match=r"choices must have shape \(b n k\) = \(3, 12, 1\) .* got \(3, 12, 2\)"):
        TopNGating(8, 4, top_n=1).route(torch.randn(3, 12, 8), choices=routing.choices())


@pytest.mark.parametrize(("then", "now"), [(None, MASK), (MASK, None), (MASK, MASK.flip(0))])
def test_another_mask_is_refused(then, now):
    model, x = Model(), torch.randn(3, 12, 8)
    with record_routing(model) as records:
        model(x, then)
    with (
        pytest.raises(ValueError, match="mask must be that of record 0 of first, got another one"),
        replay_routing(model, records),
    ):
        model(x, now)


def test_a_full_mask_is_none():
    model, x = Model().eval(), torch.randn(3, 12, 8)
    with record_routing(model) as records:
        model(x, torch.ones(3, 12, dtype=torch.bool))
    with replay_routing(model, records) as replay:
        model(x)
    assert replay.differing == 0


def test_a_call_without_a_record_is_refused_and_records_without_a_call_are_told_of():
    model, x = Model(), torch.randn(3, 12, 8)
    with record_routing(model) as records:
        for _ in range(2):
            model(x)
    match = "records must hold every call, but first is called again after the 2 of its records"
    with pytest.raises(ValueError, match=match), replay_routing(model, records):
        run_all(model, x, x, x)
    other = {
        "first": records["first"],
        "block.moe": [records["block.moe"][0], recorded(3, 11, num_gates=5, experts=5)[""][0]],
    }
    with pytest.raises(ValueError, match=r"record 1 of block\.moe must have shape"), replay_routing(model, other):
        run_all(model, x, x)
    with (
        pytest.warns(UserWarning, match=r"of 2 records of block\.moe, 1 were replayed"),
        replay_routing(model, records),
    ):
        run_all(lambda x: (model.first(x), model(x)), x)


def test_records_of_other_layers_are_refused():
    model = Model()
    for records, got in (
        ({"first": []}, "first"),
        ({}, "none"),
        ({"first": [], "block.moe": [], "third": []}, "first, block.moe, third"),
    ):
        with (
            pytest.raises(ValueError, match=f"sparse layers first, block.moe of Model, got those of {got}"),
            replay_routing(model, records),
        ):
            pass
    with (
        pytest.raises(ValueError, match="of the sparse layers none of Linear, got those of first"),
        replay_routing(nn.Linear(2, 2), {"first": []}),
    ):
        pass


class Overridden(TopNGating):
    def forward(self, x, noise_gates=False, noise_mult=1.0):
        raise AssertionError


class OfOldRoute(TopNGating):
    def route(self, x, noise_gates=False, noise_mult=1.0, *, mask=None):
        return super().route(x, noise_gates, noise_mult, mask=mask)


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            ByPosition(8, 4),
            "the gate of layer must be a Gate whose decide takes choices= to be replayed, got a ByPosition",
        ),
        (
            NoGate(TopNGating(8, 4)),
            "the gate of layer must be a Gate whose decide takes choices= to be replayed, got a NoGate",
        ),
        (
            OfOldRoute(8, 4),
            "the route of layer must take choices= to be replayed, got one that takes x, noise_gates, noise_mult, mask",
        ),
        (
            Overridden(8, 4),
            "records must hold the calls of layer, got none: its gate decides by dense tensors of its own",
        ),
    ],
    ids=["decide", "no gate", "route", "forward"],
)
def test_gates_that_cannot_be_replayed_are_refused(gate, message):
    model = nn.ModuleDict({"layer": MoE(8, 4, gate=gate)})
    with pytest.raises(ValueError, match=message), replay_routing(model, {name: [] for name in gates_of(model)}):
        pass


def test_a_route_that_does_not_hand_choices_on_is_told_of():
    moe, x = MoE(8, 4).eval(), torch.randn(3, 12, 8)
    with record_routing(moe) as records:
        moe(x)
    route = moe.gate.route
    moe.gate.route = lambda x, *args, **_: route(-x)
    with (
        pytest.raises(
            RuntimeError,
            match=r"the route of the layer must hand its choices= on to that of Gate: it has decided by itself",
        ),
        replay_routing(moe, records),
    ):
        moe(x)


def test_what_experts_chose_is_replayed_too():
    moe = MoE(8, 4, gate=ExpertChoiceGating(8, 4)).double()
    x, cotangent = torch.randn(3, 12, 8, dtype=torch.float64), torch.randn(3, 12, 8, dtype=torch.float64)

    def run():
        moe.zero_grad()
        outputs, aux_loss, *_ = moe(x, mask=MASK)
        ((outputs * cotangent).sum() + aux_loss).backward()
        return [outputs.detach(), *(parameter.grad for parameter in moe.parameters())]

    with record_routing(moe) as records:
        free = run()
    choices = choices_of(records)
    with replay_routing(moe, choices):
        assert all(map(torch.equal, free, run()))
    moved(moe, by=2.0)
    with record_routing(moe) as live, replay_routing(moe, choices) as replay:
        assert not torch.equal(run()[0], free[0])
    routing, recorded = next(iter(live.values()))[0], next(iter(records.values()))[0]
    assert torch.equal(routing.kept, recorded.kept)
    assert torch.equal(routing.indices, recorded.indices)
    assert 0 < replay.differing < 1
