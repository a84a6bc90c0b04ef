"""What routers do: records of their decisions, figures from them, and a warning when one collapses."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from st_moe_pytorch.distributed.compat import ProcessGroup
from st_moe_pytorch.gate import LISTENERS, Gate, is_dense
from st_moe_pytorch.moe import MoE
from st_moe_pytorch.routing import Routing
from st_moe_pytorch.tools.compat import is_recomputing


@contextmanager
def record_routing(model: nn.Module) -> Iterator[dict[str, list[Routing]]]:
    """Record the routing of every sparse layer of a model, by name: a `Routing`, without gradients, for each call.

        with record_routing(model) as routings:
            model(x)
        routings["blocks.0.moe"][0].dropped

    Nothing else changes: layers tell what they do, and are not touched. Those are recorded that run in the thread that
    opened the block, and not again where they run again in the backward. A gate outside of `MoE` is recorded under the
    name of what holds it. Compiled models are compiled once more. Warns of layers of which nothing can be recorded,
    since their gates decide by dense tensors of their own, and of a model without sparse layers.
    """
    gates = gates_of(model)
    if not gates:
        warnings.warn(f"nothing is recorded of {type(model).__name__}, which has no sparse layers", stacklevel=3)
    records: dict[str, list[Routing]] = {name: [] for name in gates}
    deciders = {decider_of(*deciding): records[name] for name, deciding in gates.items()}

    def listen(decider: nn.Module, routing: Routing) -> None:
        for module, record in deciders.items():
            if module is decider and not is_recomputing():
                detached = {name: t.detach() for name, t in routing._asdict().items() if isinstance(t, Tensor)}
                record.append(routing._replace(**detached))

    LISTENERS.of_decisions += (listen,)
    try:
        yield records
    finally:
        LISTENERS.of_decisions = tuple(other for other in LISTENERS.of_decisions if other is not listen)
    if silent := [name or "the layer" for name, (_, gate) in gates.items() if is_dense(gate) and not records[name]]:
        why = "the gate decides by dense tensors of its own"
        warnings.warn(f"nothing was recorded of {', '.join(silent)}: {why}", stacklevel=3)


def gates_of(model: nn.Module) -> dict[str, tuple[MoE | None, nn.Module]]:
    """A model's sparse layers and their gates, and the gates of layers of another make, by the names of the layers."""
    gates: dict[str, tuple[MoE | None, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, MoE):
            gates[name] = module, module.gate
        elif isinstance(module, Gate) and all(module is not gate for _, gate in gates.values()):
            gates[name[:-4].removesuffix(".") if name.split(".")[-1] == "gate" else name] = None, module
    return gates


def decider_of(layer: MoE | None, gate: nn.Module) -> nn.Module:
    """Who tells what a gate of `gates_of` decides: its layer, if it has one that goes by the gate's route."""
    return gate if layer is None or is_dense(gate) else layer


@dataclass(frozen=True, eq=False)
class RoutingStats:
    """Counts of one layer's routing. They add up exactly, over calls, steps and ranks; padding is in none of them."""

    tokens: Tensor
    """0-d: real tokens."""
    asked: Tensor
    """(e): choices asked for, of each expert."""
    kept: Tensor
    """(e): choices that reached it."""
    choices_at: Tensor
    """(n): choices of real tokens at each position of a sequence,"""
    dropped_at: Tensor
    """(n): those of them whose expert was full,"""
    not_asked_at: Tensor
    """(n): and those that the policy did not ask for."""
    without_expert: Tensor
    """0-d: real tokens that reached no expert."""
    squared_z: Tensor
    """0-d float64: sum of logsumexp(logits)^2 over real tokens, whose mean is the router z-loss."""

    @classmethod
    def of(cls, routings: Routing | Iterable[Routing]) -> "RoutingStats":
        """Count one routing, or several of one layer."""
        if not isinstance(routings, Routing):
            counted = [cls.of(routing) for routing in routings]
            if not counted:
                why = "did the layer run inside record_routing?"
                raise ValueError(f"routings must hold at least one routing, got none: {why}")
            return sum(counted[1:], counted[0])
        r = routings
        real = torch.ones_like(r.kept[..., 0]) if r.mask is None else r.mask
        z = r.logits.double().logsumexp(dim=-1).square()
        return cls(
            tokens=real.sum(),
            asked=r.indices[r.asked].bincount(minlength=r.num_experts),
            kept=r.indices[r.kept].bincount(minlength=r.num_experts),
            choices_at=real.sum(dim=0) * r.indices.shape[-1],
            dropped_at=r.dropped.sum(dim=(0, 2)),
            not_asked_at=r.not_asked.sum(dim=(0, 2)),
            without_expert=(real & ~r.kept.any(dim=-1)).sum(),
            squared_z=torch.where(real, z, 0.0).sum(),
        )

    def __add__(self, other: "RoutingStats") -> "RoutingStats":
        """Both together. Sequences may differ in length."""

        def add(mine: Tensor, theirs: Tensor) -> Tensor:
            longest = max(mine.numel(), theirs.numel())
            return _padded(mine, longest) + _padded(theirs, longest)

        return RoutingStats(*(add(getattr(self, field.name), getattr(other, field.name)) for field in fields(self)))

    def __eq__(self, other: object) -> bool:
        """Whether all counts are the same."""
        if not isinstance(other, RoutingStats):
            return NotImplemented
        return all(torch.equal(getattr(self, field.name), getattr(other, field.name)) for field in fields(self))

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    def over_ranks(self, group: ProcessGroup | None = None) -> "RoutingStats":
        """The sum over all ranks of a process group, on each of them.

        Every rank has to call it, for the same layers in the same order.
        """
        length = self.choices_at.new_tensor(self.choices_at.numel())
        dist.all_reduce(length, dist.ReduceOp.MAX, group)
        summed = []
        for field in fields(self):
            value: Tensor = getattr(self, field.name)
            value = _padded(value, int(length)) if field.name.endswith("_at") else value.clone()
            dist.all_reduce(value, group=group)
            summed.append(value)
        return RoutingStats(*summed)

    def scalars(self) -> dict[str, float]:
        """A few figures, shares of 1 but for the last; 0 where there was nothing to count.

        largest_load, smallest_load: share of the choices asked for that the busiest and the least busy expert got.
        load_entropy: entropy of these shares, over that of equal ones.
        unused_experts: share of the experts that nobody asked for.
        dropped, not_asked: share of all choices that found their expert full, and that the policy did not ask for.
        tokens_without_expert: share of the tokens that no expert saw.
        router_z: mean of logsumexp(logits)^2, without bound: what the z-loss keeps small.
        """
        load, choices = self.load().double(), self.choices_at.sum()
        entropy = -torch.special.xlogy(load, load).sum() / math.log(len(load)) if len(load) > 1 else load.sum()
        values = {
            "largest_load": load.max(),
            "smallest_load": load.min(),
            "load_entropy": entropy,
            "unused_experts": (self.asked == 0).double().mean(),
            "dropped": _share(self.dropped_at.sum(), choices),
            "not_asked": _share(self.not_asked_at.sum(), choices),
            "tokens_without_expert": _share(self.without_expert, self.tokens),
            "router_z": _share(self.squared_z, self.tokens),
        }
        return {name: float(value) for name, value in values.items()}

    def load(self) -> Tensor:
        """(e): share of the choices asked for that each expert got."""
        return _share(self.asked, self.asked.sum())

    def dropped_by_position(self) -> Tensor:
        """(n): share of the choices at each position that found their expert full."""
        return _share(self.dropped_at, self.choices_at)

    def not_asked_by_position(self) -> Tensor:
        """(n): share of the choices at each position that the policy did not ask for."""
        return _share(self.not_asked_at, self.choices_at)


def _share(part: Tensor, whole: Tensor) -> Tensor:
    return part.double() / whole.clamp(min=1)


def _padded(counts: Tensor, length: int) -> Tensor:
    return F.pad(counts, (0, length - counts.numel())) if counts.ndim else counts.clone()


def routing_stats(records: Mapping[str, Iterable[Routing]]) -> dict[str, RoutingStats]:
    """Counts of every layer that `record_routing` saw running."""
    return {name: RoutingStats.of(routings) for name, routings in records.items() if routings}


def write_scalars(writer: Any, stats: Mapping[str, RoutingStats], step: int, prefix: str = "routing") -> None:
    """Write every layer's scalars with ``writer.add_scalar(tag, value, step)``, as of TensorBoard's SummaryWriter."""
    for layer, counted in stats.items():
        for name, value in counted.scalars().items():
            writer.add_scalar("/".join(filter(None, (prefix, layer, name))), value, step)


def warn_of_collapse(stats: Mapping[str, RoutingStats], least_entropy: float = 0.5) -> list[str]:
    """Warn of layers whose load has less entropy than ``least_entropy`` times that of equal load; return their names.

    Layers that got fewer than ten tokens for each expert are passed over: their load says little.
    """
    if not stats:
        warnings.warn("stats must hold figures of a layer to tell of a collapse, got none", stacklevel=2)
    collapsed = []
    for layer, counted in stats.items():
        load, experts = counted.load(), len(counted.asked)
        if counted.tokens >= 10 * experts and counted.scalars()["load_entropy"] < least_entropy:
            collapsed.append(layer)
            first = f"expert {int(load.argmax())} gets {float(load.max()):.0%} of the choices"
            last = f"{int((load < 0.1 / experts).sum())} of {experts} experts get less than a tenth of an equal share"
            what = f"the router of {layer or 'the layer'} has collapsed: {first}, and {last}"
            how = "Raise balance_loss_coef, lower learning rates, keep router_z_loss_coef on, or set noise_gates=True"
            warnings.warn(f"{what}. {how}", stacklevel=2)
    return collapsed
