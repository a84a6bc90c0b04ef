"""Routing replay: layers choose the experts that a record says, with gates by the logits that they have now.

In reinforcement learning, a policy is trained on tokens that an earlier state of it, or another engine, has routed.
Where training routes them otherwise, it optimises another model than the one that acted. Replay keeps both the same
(Ma et al. 2025, "Stabilizing MoE reinforcement learning by aligning training and inference routers").
"""

import math
import threading
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from inspect import Parameter, signature
from typing import Any

import torch
from torch import Tensor, nn

from st_moe_pytorch.checks import can_be_looked_at
from st_moe_pytorch.gate import LISTENERS, REPLAYS, Gate, is_dense
from st_moe_pytorch.routing import Choices, Routing
from st_moe_pytorch.tools.compat import is_recomputing
from st_moe_pytorch.tools.watch import decider_of, gates_of


def choices_of(records: Mapping[str, Iterable[Routing]]) -> dict[str, list[dict[str, Any]]]:
    """The decisions of a record, without what they came from: the fields of `Choices` as a dict, by layer and call.

    It holds tensors and numbers only: torch.save writes it, and torch.load reads it with weights_only=True. A choice
    takes 4 bytes for up to 256 experts and 32,768 slots, 3 for up to 128 slots.
    """
    return {name: [routing.choices()._asdict() for routing in routings] for name, routings in records.items()}


class Replay:
    """What a replay has layers choose, and how often their routers would have chosen otherwise."""

    def __init__(self, model: nn.Module, records: Mapping[str, Sequence[Routing | Mapping[str, Any]]]) -> None:
        self.gates = gates_of(model)
        if self.gates.keys() != records.keys():
            there, got = (", ".join(map(_told, names)) or "none" for names in (self.gates, records))
            wanted = f"the sparse layers {there} of {type(model).__name__}"
            raise ValueError(f"records must be of {wanted}, got those of {got}")
        self.records = {name: [_as_choices(record) for record in of_layer] for name, of_layer in records.items()}
        self.deciders: dict[nn.Module, tuple[str, Gate]] = {}
        for name, (layer, gate) in self.gates.items():
            self.deciders[decider_of(layer, gate)] = name, _replayable(name, gate, self.records[name])
        self.thread = threading.get_ident()
        self.calls: dict[str, list[_Call]] = {name: [] for name in records}
        self.counts: dict[str, list[Tensor]] = {name: [] for name in records}

    @property
    def differing(self) -> float:
        """Share of the choices of real tokens that the routers would not make now, at any rank and without noise.

        0 if there were none.
        """
        return _share(count for counts in self.counts.values() for count in counts)

    @property
    def differing_by_layer(self) -> dict[str, float]:
        """The same share for each layer."""
        return {name: _share(counts) for name, counts in self.counts.items()}

    def take(self, decider: nn.Module, x: Tensor, mask: Tensor | None) -> Choices | None:
        """The choices that a layer or gate is to make for tokens x (b n d); None if this replay is not about them."""
        again = is_recomputing()
        if decider not in self.deciders or not (again or threading.get_ident() == self.thread):
            return None
        name, gate = self.deciders[decider]
        calls = self.calls[name]
        if again:
            return self._again(name, x)
        if len(calls) == len(self.records[name]):
            got = f"{_told(name)} is called again after the {len(calls)} of its records"
            raise ValueError(f"records must hold every call, but {got}")
        choices, which = self.records[name][len(calls)], f"record {len(calls)} of {_told(name)}"
        (b, n), k = x.shape[:2], choices.indices.shape[-1]
        choices.check_fit((b, n, getattr(gate, "top_n", k)), gate.num_gates, gate.groups(b, n), which)
        tensors = {key: t.to(x.device) for key, t in choices._asdict().items() if isinstance(t, Tensor)}
        choices = choices._replace(**tensors)
        padding = [torch.zeros_like(choices.asked[..., 0]) if m is None else ~m for m in (mask, choices.mask)]
        if can_be_looked_at(padding[0]) and not torch.equal(*padding):
            raise ValueError(f"mask must be that of {which}, got another one")
        calls.append(_Call(x, choices))
        return choices

    def listen(self, decider: nn.Module, routing: Routing) -> None:
        """Count the choices that the router would have made otherwise."""
        for module, (name, gate) in self.deciders.items():
            if module is decider and not is_recomputing():
                wanted = self.calls[name][-1].choices
                if can_be_looked_at(routing.indices) and not torch.equal(routing.indices, wanted.indices.long()):
                    wanted = "must hand its choices= on to that of Gate: it has decided by itself"
                    raise RuntimeError(f"the route of {_told(name)} {wanted}")
                with torch.no_grad():
                    draws = torch.zeros_like(routing.gates)
                    free = gate.decide(routing.logits.detach(), mask=routing.mask, draws=draws)
                chosen, now = _chosen(routing, gate), _chosen(free, gate)
                self.counts[name].append(torch.stack(((chosen & ~now).sum(), chosen.sum())))

    def _again(self, name: str, x: Tensor) -> Choices:
        """The choices of the call that runs again in the backward, known by its input; of equal ones, the last."""
        alike = [call for call in reversed(self.calls[name]) if call.shape == x.shape]
        calls = [(call.distance(x), call.times_again, call) for call in alike]
        distance, _, call = min(calls, key=lambda known: known[:2], default=(math.inf, 0, None))
        if call is None or distance > 0.1:
            why = "on tokens that it has not seen in this replay: run both in it"
            raise RuntimeError(f"{_told(name)} runs again in the backward {why}")
        call.times_again += 1
        return call.choices


def _chosen(routing: Routing, gate: Gate) -> Tensor:
    """(b n e) bool: the experts that a real token has, at any rank or, where experts choose, because they picked it."""
    has = ~routing.masked if hasattr(gate, "top_n") else routing.asked
    return torch.zeros_like(routing.logits, dtype=torch.bool).scatter(-1, routing.indices, has)


class _Call:
    """A call of a layer, known again by a few numbers of each token."""

    def __init__(self, x: Tensor, choices: Choices) -> None:
        self.choices = choices
        self.shape = x.shape
        self.features = x.detach()[..., :4].to(torch.float32, copy=True)
        self.times_again = 0

    def distance(self, x: Tensor) -> float:
        """How far the tokens are from those of the call, relative to these: 0 for the same ones."""
        apart = (x.detach()[..., :4] - self.features).nan_to_num().abs().sum()
        return float(apart / self.features.nan_to_num().abs().sum().clamp(min=1e-30))


@contextmanager
def replay_routing(model: nn.Module, records: Mapping[str, Sequence[Routing | Mapping[str, Any]]]) -> Iterator[Replay]:
    """Have a model's sparse layers choose what was recorded, call by call, with gates and losses by the present logits.

        with record_routing(model) as records:
            model(x)
        with replay_routing(model, records) as replay:
            loss_of(model(x)).backward()
        replay.differing

    Gradients reach router, tokens and experts through the gates, as if the router had chosen the same. Where nothing
    has changed since, outputs and gradients are those of a free run, and so are random numbers that are drawn later.

    records: of `record_routing` or, for other processes, of `choices_of`, under the same layers' names and in the order
        of their calls; of sharded layers, those of this rank's tokens.

    Run the backward in the block too: layers that run again in it, by activation checkpointing of either kind, take the
    same record again, which is found by their input. Other threads route freely, but for backward passes. Compiled
    models are compiled once more, with a break in the graph before each layer.

    Raises ValueError for records of other layers and for gates that cannot be replayed; in a call, for one without a
    record and for a record of another shape, number of experts or choices, grouping or (looked at on CPUs only) mask;
    RuntimeError for a route that does not hand the choices on, and for a layer that runs again and never ran in the
    block. Warns of records that no call took.
    """
    replay = Replay(model, records)
    listen, take = replay.listen, replay.take
    LISTENERS.of_decisions += (listen,)
    REPLAYS.append(take)
    try:
        yield replay
    finally:
        REPLAYS.remove(take)
        LISTENERS.of_decisions = tuple(other for other in LISTENERS.of_decisions if other is not listen)
    for name, calls in replay.calls.items():
        if len(calls) < len(replay.records[name]):
            records_of = f"{len(replay.records[name])} records of {_told(name)}"
            warnings.warn(f"of {records_of}, {len(calls)} were replayed", stacklevel=3)


def _as_choices(record: Routing | Mapping[str, Any]) -> Choices:
    return record.choices() if isinstance(record, Routing) else Choices(**record)


def _replayable(name: str, gate: nn.Module, records: Sequence[Choices]) -> Gate:
    """The gate, if it takes what it is to choose."""
    if not isinstance(gate, Gate) or "choices" not in signature(gate.decide).parameters:
        wanted = "must be a Gate whose decide takes choices= to be replayed"
        raise ValueError(f"the gate of {_told(name)} {wanted}, got a {type(gate).__name__}")
    route = signature(gate.route).parameters
    if "choices" not in route and all(parameter.kind != Parameter.VAR_KEYWORD for parameter in route.values()):
        got = f"one that takes {', '.join(route)}"
        raise ValueError(f"the route of {_told(name)} must take choices= to be replayed, got {got}")
    if is_dense(gate) and not records:
        why = "its gate decides by dense tensors of its own"
        raise ValueError(f"records must hold the calls of {_told(name)}, got none: {why}")
    return gate


def _share(counts: Iterable[Tensor]) -> float:
    differing, choices = sum((count.cpu() for count in counts), torch.zeros(2, dtype=torch.int64)).tolist()
    return differing / max(choices, 1)


def _told(name: str) -> str:
    return name or "the layer"
