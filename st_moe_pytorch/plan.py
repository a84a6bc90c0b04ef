"""What other settings would do, from recorded logits and without training; and what a layer's outputs depend on."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from st_moe_pytorch.checks import typechecked
from st_moe_pytorch.experts import Experts
from st_moe_pytorch.gating import TopNGating
from st_moe_pytorch.moe import MoE
from st_moe_pytorch.routing import Routing
from st_moe_pytorch.watch import RoutingStats


def reroute(gate: TopNGating, routing: Routing, *, training: bool = True, draws: Tensor | None = None, **changes: Any) -> Routing:
    """Route recorded logits and mask again, as the gate would if these of its arguments were others.

    training: by the settings for training, with losses, or those for evaluation. draws: as in `TopNGating.route`.
    """
    experts = routing.num_experts
    other: Any = TopNGating(experts, experts, **settings_of(gate, changes.get("top_n", gate.top_n)) | changes).train(training)
    other.to_gates = nn.Identity()
    return other.to(routing.logits.device).route(routing.logits, mask=routing.mask, draws=draws)


def settings_of(gate: TopNGating, top_n: int) -> dict[str, Any]:
    """The arguments that a gate has now, for so many choices: the last threshold is that of further ones."""
    settings: dict[str, Any] = {name: getattr(gate, name) for name in signature(TopNGating).parameters if name not in ("dim", "num_gates")}
    for name in ("threshold_train", "threshold_eval"):
        _, *later = settings.pop(name).tolist()
        if later:
            settings[name] = [later[min(choice, len(later) - 1)] for choice in range(top_n - 1)]
    return settings | {"top_n": top_n}


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
    """The same where all slots are computed, empty or not, as on accelerators and by compiled code."""
    bytes_per_token: float
    """Sent to other ranks and back, forward and backward, if experts are spread evenly and independently of the tokens."""


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

    settings: changes to the arguments of the layer's `TopNGating`, such as {"as it is": {}, "one choice": {"top_n": 1}}.
    """
    routings = list(routings)
    held = sum(expert is not None for expert in moe.experts.experts) if isinstance(moe.experts, Experts) else moe.num_experts
    flops = 2 * sum(parameter.numel() for parameter in moe.experts.parameters() if parameter.ndim > 1) / held
    plans = {}
    for name, changes in settings.items():
        routed = [reroute(moe.gate, routing, training=training, **changes) for routing in routings]
        stats = RoutingStats.of(routed)
        tokens, scalars = max(int(stats.tokens), 1), stats.scalars()
        rows = int(stats.kept.sum()) / tokens
        slots = sum(routing.groups[0] * routing.num_experts * routing.capacity for routing in routed) / tokens
        plans[name] = Plan(
            experts_per_token=rows,
            dropped=scalars["dropped"],
            not_asked=scalars["not_asked"],
            tokens_without_expert=scalars["tokens_without_expert"],
            largest_load=scalars["largest_load"],
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


class Dependence(NamedTuple):
    """Which outputs (b n) moved when something that they should perhaps not depend on was changed."""

    on_later_tokens: Tensor
    on_other_rows: Tensor
    on_padding: Tensor

    def __str__(self) -> str:
        words = {"later tokens": self.on_later_tokens, "other rows of the batch": self.on_other_rows, "padding": self.on_padding}
        lines = []
        for what, moved in words.items():
            places = [tuple(place) for place in moved.nonzero().tolist()]
            named = ", ".join(map(str, places[:5])) + (", ..." if len(places) > 5 else "")
            lines.append(
                f"{what}: {f'{len(places)} outputs depend on them: (row, token) {named}' if places else 'no output depends on them'}"
            )
        return "\n".join(lines)


@torch.no_grad()
def audit_dependence(layer: nn.Module, x: Tensor, mask: Tensor | None = None, seed: int = 0, tolerance: float = 1e-9) -> Dependence:
    """Find the outputs of a layer that depend on later tokens, on other rows of the batch or on padding, by changing those.

    layer: a module (b n d) -> outputs (b n d'), alone or first of a tuple, such as `MoE` or a `SparseMoEBlock`, as its mode is. A copy of
        it runs in float64, with the same random numbers each time, about 2 (n + b) times.
    x (b n d), mask (b n) True for real tokens. tolerance: change that counts as none, relative to the largest output.

    Changed tokens become others of the batch, then random ones. What moves, depends; what does not move might still, on other inputs.
    """
    layer, x = deepcopy(layer).double(), x.double()
    if x.ndim != 3:
        raise ValueError(f"x must have shape (batch, tokens, width), got {tuple(x.shape)}")
    b, n, _ = x.shape
    real = torch.ones(b, n, dtype=torch.bool, device=x.device) if mask is None else mask
    given = {} if mask is None else {"mask": mask}

    def run(inputs: Tensor) -> Tensor:
        with torch.random.fork_rng([x.device] if x.is_cuda else []):
            torch.manual_seed(seed)
            outputs = layer(inputs, **given)
        return outputs[0] if isinstance(outputs, tuple) else outputs

    usual = run(x)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device) * x.std()
    others = x.flatten(0, 1)[torch.randperm(b * n, generator=generator)].view_as(x), noise

    def moved_by(changed: Tensor) -> Tensor:
        """Which outputs (b n) move when the tokens of ``changed`` (b n) become others."""
        moved = torch.zeros_like(real)
        for other in others:
            difference = (run(torch.where(changed.unsqueeze(-1), other, x)) - usual).abs().amax(dim=-1)
            moved |= ~(difference <= tolerance * usual.abs().max())
        return moved & ~changed & real

    position = torch.arange(n, device=x.device)
    row = torch.arange(b, device=x.device)
    later, rows = torch.zeros_like(real), torch.zeros_like(real)
    for token in range(1, n):
        later |= moved_by((position >= token).expand(b, n))
    for number in range(b):
        rows |= moved_by((row != number).unsqueeze(-1).expand(b, n))
    return Dependence(later, rows, moved_by(~real))
