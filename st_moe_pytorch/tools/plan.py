"""What other settings would do, from recorded logits and without training."""

from collections.abc import Iterable, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.random import fork_rng

from st_moe_pytorch.checks import typechecked
from st_moe_pytorch.experts import Experts
from st_moe_pytorch.gate import Gate
from st_moe_pytorch.moe import MoE
from st_moe_pytorch.routing import Routing
from st_moe_pytorch.tools.watch import RoutingStats


def reroute(
    gate: nn.Module, routing: Routing, *, training: bool = True, draws: Tensor | None = None, **changes: Any
) -> Routing:
    """Route recorded logits and mask again, as the gate would if these of its arguments were others.

    gate: any `Gate` that keeps its arguments under their names. One that has only a ``route`` cannot decide again: its
        record stands.
    training: by the settings for training, with losses, or those for evaluation. draws: as in `Gate.decide`.
    """
    if not isinstance(gate, Gate):
        if changes:
            wanted = f"{{}} for a gate that cannot decide again, a {type(gate).__name__}"
            raise ValueError(f"settings must be {wanted}, got {changes}")
        return routing
    experts = routing.num_experts
    other = type(gate)(experts, experts, **settings_of(gate, changes.get("top_n", getattr(gate, "top_n", 1))) | changes)
    if getattr(other, "bias", None) is not None and getattr(gate, "bias", None) is not None:
        other.bias = gate.bias
    return other.train(training).to(routing.logits.device).decide(routing.logits, mask=routing.mask, draws=draws)


def settings_of(gate: Gate, top_n: int) -> dict[str, Any]:
    """The arguments that a gate has now, for so many choices: the last threshold is that of further ones."""
    names = [name for name in signature(type(gate)).parameters if name not in ("dim", "num_gates")]
    settings: dict[str, Any] = {name: getattr(gate, name) for name in names if hasattr(gate, name)}
    for name in ("threshold_train", "threshold_eval"):
        if name in settings:
            _, *later = settings.pop(name).tolist()
            if later:
                settings[name] = [later[min(choice, len(later) - 1)] for choice in range(top_n - 1)]
    return settings | ({"top_n": top_n} if "top_n" in names else {})


class Plan(NamedTuple):
    """What a setting would do, on average over the tokens of a record."""

    experts_per_token: float
    dropped: float
    """Share of all choices whose expert was full."""
    not_asked: float
    """Share of all choices that the policy did not ask for."""
    tokens_without_expert: float
    largest_load: float
    """Share of the choices asked for that the busiest expert gets."""
    balance_loss: float
    router_z_loss: float
    flops_per_token: float
    """Of the experts' matrix products, forward; twice that again backward."""
    padded_flops_per_token: float
    """The same where all slots are computed, empty or not, as by ``experts`` of another make."""
    bytes_per_token: float
    """Sent to other ranks and back, forward and backward, if experts are spread evenly and independently of tokens."""


@typechecked
def plan(
    moe: MoE,
    routings: Iterable[Routing],
    settings: Mapping[str, Mapping[str, Any]],
    *,
    ranks: int = 1,
    bytes_per_number: int = 4,
    training: bool = True,
) -> dict[str, Plan]:
    """What each of several settings, named, would do to recorded calls of a layer.

    settings: changes to the arguments of the layer's gate, such as {"as it is": {}, "one choice": {"top_n": 1}}.
    training: route by the settings for training or by those for evaluation; changes to the others are refused.
    Random policies draw the same numbers for every setting, and leave the global random numbers alone.
    """
    unread = "_eval" if training else "_train"
    for name, changes in settings.items():
        if vain := [change for change in changes if change.endswith(unread)]:
            mode = f"{'training' if training else 'evaluation'}: call plan(..., training={not training}) for it"
            raise ValueError(f"settings[{name!r}] must be read in this mode, but {', '.join(vain)} is not in {mode}")
    routings = list(routings)
    here = moe.experts.experts if isinstance(moe.experts, Experts) else range(moe.num_experts)
    held = sum(expert is not None for expert in here)
    flops = 2 * sum(parameter.numel() for parameter in moe.experts.parameters() if parameter.ndim > 1) / held
    plans = {}
    for name, changes in settings.items():
        with fork_rng([routing.logits.device for routing in routings if routing.logits.is_cuda]):
            torch.manual_seed(0)
            routed = [reroute(moe.gate, routing, training=training, **changes) for routing in routings]
        stats = RoutingStats.of(routed)
        tokens, scalars = max(int(stats.tokens), 1), stats.scalars()
        rows = int(stats.kept.sum()) / tokens
        slots = sum(routing.groups[0] * routing.num_experts * routing.capacity for routing in routed) / tokens
        plans[name] = Plan(
            experts_per_token=rows,
            **{name: scalars[name] for name in Plan._fields if name in scalars},
            balance_loss=sum(float(routing.balance_loss) for routing in routed) / len(routed),
            router_z_loss=sum(float(routing.router_z_loss) for routing in routed) / len(routed),
            flops_per_token=flops * rows,
            padded_flops_per_token=flops * slots,
            bytes_per_token=4 * rows * moe.dim * bytes_per_number * (ranks - 1) / ranks,
        )
    return plans


def plan_table(plans: Mapping[str, Plan]) -> str:
    """The plans as a table in Markdown."""
    header = ["setting", *(name.replace("_", " ") for name in Plan._fields)]
    rows = [[name, *(f"{value:.4g}" for value in values)] for name, values in plans.items()]
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
