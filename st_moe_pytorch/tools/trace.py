"""Which experts take which tokens (ST-MoE, section 7): counts by kind of token, and tables of them."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

import torch
from torch import Tensor

from st_moe_pytorch.routing import Routing


class Share(NamedTuple):
    """How many of an expert's tokens are of one kind."""

    kind: int
    """The number of the kind, such as an id of a vocabulary."""
    tokens: int
    """Tokens of the kind that reached the expert."""
    of_kind: float
    """Those, over all choices of tokens of the kind that reached any expert."""


@dataclass(frozen=True, eq=False)
class Trace:
    """How often each expert of a layer got tokens of each kind. Traces of one layer add up, as over steps."""

    counts: Tensor
    """(v e) int64: choices that reached expert e, of tokens of kind v."""

    @classmethod
    def of(cls, kinds: Iterable[Tensor], routings: Iterable[Routing], num_kinds: int) -> "Trace":
        """Count the calls of one layer, as `record_routing` has them.

        kinds: for each call the kinds (b n) of its tokens, int64 numbers below num_kinds: ids of a vocabulary, or
            classes. Tokens with negative numbers are passed over, and so is padding.
        """
        kinds, routings = list(kinds), list(routings)
        if len(kinds) != len(routings):
            raise ValueError(f"kinds must hold a tensor for each of {len(routings)} calls, got {len(kinds)}")
        total = torch.zeros((), dtype=torch.int64)
        for number, (kind, routing) in enumerate(zip(kinds, routings, strict=True)):
            if kind.shape != routing.kept.shape[:2] or kind.dtype != torch.int64:
                wanted = f"an int64 tensor of shape {tuple(routing.kept.shape[:2])}, a number for each token"
                got = f"{kind.dtype} of shape {tuple(kind.shape)}"
                raise ValueError(f"kinds of call {number} must be {wanted}, got {got}")
            kind = kind.to(routing.indices.device)
            if kind.numel() and kind.max() >= num_kinds:
                raise ValueError(f"kinds must be below num_kinds={num_kinds}, got {int(kind.max())} in call {number}")
            is_counted = routing.kept & (kind >= 0).unsqueeze(-1)
            pairs = (kind.unsqueeze(-1) * routing.num_experts + routing.indices)[is_counted]
            counts = pairs.bincount(minlength=num_kinds * routing.num_experts)
            total = total.to(counts.device) + counts.view(num_kinds, routing.num_experts)
        if not total.ndim:
            raise ValueError("routings must hold at least one routing, got none: did the layer run in record_routing?")
        return cls(total)

    def __add__(self, other: "Trace") -> "Trace":
        return Trace(self.counts + other.counts)

    def top(self, most: int = 8) -> list[list[Share]]:
        """For each expert, the kinds of which it got most above its share of all tokens, that first."""
        of_kind = self.counts.sum(1, keepdim=True)
        above = self.counts * self.counts.sum() - of_kind * self.counts.sum(0)
        found = []
        for expert, order in enumerate(above.argsort(dim=0, descending=True, stable=True)[:most].unbind(1)):
            kinds = [kind for kind in order.tolist() if above[kind, expert] > 0]
            counts = [int(self.counts[kind, expert]) for kind in kinds]
            found.append([Share(k, c, c / int(of_kind[k])) for k, c in zip(kinds, counts, strict=True)])
        return found

    def load(self) -> Tensor:
        """(e) float64: share of all choices that reached an expert which each expert got."""
        return self.counts.sum(0).double() / self.counts.sum().clamp(min=1)

    def entropy(self) -> Tensor:
        """(v) float64: entropy in nats of each kind's choices over the experts, from 0 to log(e) (table 14).

        NaN for kinds of which no token reached an expert.
        """
        return torch.special.entr(self.counts.double() / self.counts.sum(1, keepdim=True)).sum(1)


def trace(
    kinds: Tensor | Sequence[Tensor], records: Mapping[str, Sequence[Routing]], num_kinds: int
) -> dict[str, Trace]:
    """Count what every layer did, as `record_routing` saw it: arguments as of `Trace.of`, or kinds of the only call."""
    calls = [kinds] if isinstance(kinds, Tensor) else kinds
    return {layer: Trace.of(calls, routings, num_kinds) for layer, routings in records.items() if routings}


def expert_table(traces: Mapping[str, Trace], names: Sequence[str], most: int = 8) -> str:
    """Markdown: for every layer and expert, its share of all choices, and the kinds that `Trace.top` finds (table 13).

    names: of the kinds, by number. In brackets stands which share of a kind's choices went to the expert.
    """
    _check_names(traces, names)
    lines = ["| layer | expert | share | gets most, above its share |", "|---|---|---|---|"]
    for layer, traced in traces.items():
        for expert, (load, shares) in enumerate(zip(traced.load(), traced.top(most), strict=True)):
            told = ", ".join(f"{_code(names[share.kind])} ({share.of_kind:.0%})" for share in shares)
            lines.append(f"| {_cell(layer or 'layer')} | {expert} | {float(load):.1%} | {told} |")
    return "\n".join(lines)


def entropy_table(traces: Mapping[str, Trace], names: Sequence[str]) -> str:
    """Markdown: entropy of every kind in every layer, in nats, beside that of tokens that go to any expert alike."""
    _check_names(traces, names)
    lines = [f"| layer | {' | '.join(map(_cell, names))} | uniform |", "|---" * (len(names) + 2) + "|"]
    for layer, traced in traces.items():
        cells = [f"{value:.2f}" for value in (*traced.entropy().tolist(), math.log(traced.counts.shape[1]))]
        lines.append(f"| {_cell(layer or 'layer')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _check_names(traces: Mapping[str, Trace], names: Sequence[str]) -> None:
    if others := [len(traced.counts) for traced in traces.values() if len(traced.counts) != len(names)]:
        raise ValueError(f"names must be those of {others[0]} kinds, got {len(names)}")


def visible(name: str) -> str:
    """A token as something that can be seen: spaces as ␣, line breaks and the like as in Python."""
    return "".join("␣" if c == " " else c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def _code(name: str) -> str:
    """A token as code in a cell of a table."""
    runs = [len(run) for run in re.findall("`+", name)]
    quotes, space = "`" * (1 + max(runs, default=0)), " " if runs or not name else ""
    return f"{quotes}{space}{visible(name)}{space}{quotes}".replace("|", "\\|")


def _cell(name: str) -> str:
    """A name in a cell of a table, of which it is one."""
    return escape(name).replace("|", "\\|").replace("\n", " ")
