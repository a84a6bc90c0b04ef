"""What the router decided, and how tokens travel by it.

Axes, here and in every file of the package:

    b  batch (groups, where tokens are regrouped)      e  experts
    n  tokens of a group (sequence)                    k  choices of a token (top-n; all e where experts choose)
    d  model width                                     c  slots of an expert in a group (capacity)
    t  rows: token copies sent to experts              r  ranks

Where the copies of tokens stand on their way through the experts is in layouts.py.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from einops import einsum, rearrange
from torch import Tensor

from st_moe_pytorch.checks import check_positive
from st_moe_pytorch.compat import fixed
from st_moe_pytorch.layouts import Layout, as_int, gather, rows_layout, slots_layout, weighted_sum


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """Context in which autocast is off on x's device."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()


def expert_capacity(tokens: int, num_experts: int, factor: float | None, min_capacity: int = 4) -> int:
    """Slots of an expert in a group: ``max(min(tokens, int(tokens * factor / num_experts)), min_capacity)``.

    Without a factor nothing is dropped: every token of the group would fit. ``tokens`` counts padding, so that shapes
    stay static.
    """
    check_positive(capacity_factor=factor)
    tokens, factor = as_int(tokens), fixed(factor)
    if factor is None:
        return tokens
    share = torch.sym_int(tokens * factor / num_experts)
    return torch.sym_max(torch.sym_min(tokens, share), min_capacity)  # pyright: ignore[reportReturnType]


def assign_slots(
    indices: Tensor, asked: Tensor, num_experts: int, order: Tensor | None = None, by_token: bool = False
) -> Tensor:
    """Place of each choice (b n k) in its expert's queue: all first choices in token order, then all second, and so on.

    Only choices that are asked for queue up; the others get a meaningless number. ``order`` (b n) lists the tokens of a
    group in another order of service. With ``by_token``, all choices of a token come before those of the next one.
    A stable sort by expert puts each queue in line, so cost does not grow with the number of experts.
    """
    if order is not None:
        order = order.unsqueeze(-1).expand_as(indices)
        slots = assign_slots(indices.gather(1, order), asked.gather(1, order), num_experts)
        return torch.empty_like(slots).scatter(1, order, slots)
    line = "(n k)" if by_token else "(k n)"
    queues = rearrange(indices.masked_fill(~asked, num_experts), f"b n k -> b {line}")
    queues, request = queues.sort(dim=-1, stable=True)
    place = torch.arange(queues.shape[-1], device=queues.device) - torch.searchsorted(queues, queues)
    slots = torch.empty_like(place).scatter(-1, request, place)
    return rearrange(slots, f"b {line} -> b n k", k=indices.shape[-1])


class DenseRouting(NamedTuple):
    """Routing as two dense tensors (b n e c), of size quadratic in n, and losses: what a gate's ``forward`` returns."""

    dispatch_tensor: Tensor
    combine_tensor: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


class Choices(NamedTuple):
    """What a routing decided, without the weights it gave: enough to route the same way again, in few bytes."""

    indices: Tensor
    """(b n k) uint8 or a wider integer type: expert of each choice."""
    slots: Tensor
    """(b n k) int8 or wider: place of a kept choice in its expert's buffer, -1 for the others."""
    asked: Tensor
    """(b n k) bool: a real token's choice that the policy let through."""
    mask: Tensor | None
    """(b n) bool: real tokens, or None if all were."""
    capacity: int
    num_experts: int
    groups: tuple[int, int]

    def check_fit(
        self, shape: tuple[int, int, int], num_experts: int, groups: tuple[int, int], name: str = "choices"
    ) -> None:
        """Raise ValueError unless these are choices of that shape (b n k), number of experts and groups of tokens."""
        if (shape, num_experts, groups) != (tuple(self.indices.shape), self.num_experts, tuple(self.groups)):
            wanted = f"shape (b n k) = {shape} among {num_experts} experts in groups {groups}"
            got = f"{tuple(self.indices.shape)} among {self.num_experts} in {tuple(self.groups)}"
            raise ValueError(f"{name} must have {wanted}, got {got}")

    def fitted(self, shape: tuple[int, int, int], num_experts: int, groups: tuple[int, int]) -> "Choices":
        """These choices by groups and in int64, as a gate needs them. Raises as `check_fit`."""
        self.check_fit(shape, num_experts, groups)
        indices, slots, asked = (t.view(*groups, shape[-1]) for t in (self.indices, self.slots, self.asked))
        return self._replace(indices=indices.long(), slots=slots.long(), asked=asked)


class Routing(NamedTuple):
    """The routing of a batch: which experts each token chose, with what weight, and what became of every choice.

    Every choice is exactly one of ``kept``, ``dropped`` (its expert was full), ``not_asked`` (by policy, or not
    picked by its expert) and ``masked`` (padding), each a bool tensor (b n k).
    """

    indices: Tensor
    """(b n k) int64: expert of each choice, best first."""
    slots: Tensor
    """(b n k) int64: place of a kept choice in its expert's buffer, -1 for the others."""
    gates: Tensor
    """(b n k) float32 or float64: weight of each choice, kept or not; `TopNGating` has them sum to 1 for k > 1."""
    kept: Tensor
    """(b n k) bool: the choice was asked for and got a slot."""
    asked: Tensor
    """(b n k) bool: a real token's choice that the policy lets through, or that its expert picked."""
    mask: Tensor | None
    """(b n) bool: real tokens, or None if all are."""
    logits: Tensor
    """(b n e): what the router said, before any noise."""
    balance_loss: Tensor
    """0-d, 0 in evaluation."""
    router_z_loss: Tensor
    """0-d, 0 in evaluation."""
    capacity: int
    """Slots of an expert in each group."""
    num_experts: int
    groups: tuple[int, int]
    """Number and size of the groups that the tokens form: (b, n) unless the gate regroups them."""
    straight_through: bool
    """Whether dispatched rows carry a gradient to their gate."""

    @property
    def dropped(self) -> Tensor:
        return self.asked & ~self.kept

    @property
    def masked(self) -> Tensor:
        return torch.zeros_like(self.kept) if self.mask is None else ~self.mask.unsqueeze(-1).expand_as(self.kept)

    @property
    def not_asked(self) -> Tensor:
        return ~self.asked & ~self.masked

    def choices(self) -> Choices:
        """The decision alone, in the smallest integer types that hold it."""
        indices = _narrow(self.indices, 0, self.num_experts - 1)
        slots = _narrow(self.slots.masked_fill(~self.kept, -1), -1, self.capacity - 1)
        return Choices(indices, slots, self.asked, self.mask, self.capacity, self.num_experts, self.groups)

    def rows(self) -> Layout:
        """The kept choices as rows sorted by expert."""
        experts = self.indices.masked_fill(~self._is_sent(), self.num_experts)
        return rows_layout(experts.flatten(0, 1), self.num_experts, self._num_slots())

    def buffers(self, filled: bool = False) -> Layout:
        """The kept choices in slots (b e c); empty ones are zero or, if filled, hold copies of some kept token."""
        b, n, _ = self.indices.shape
        group = torch.arange(b * n, device=self.indices.device).view(b, n, 1) // max(self.groups[1], 1)
        positions = (group * self.num_experts + self.indices) * self.capacity + self.slots
        positions = positions.masked_fill(~self._is_sent(), self._num_slots())
        return slots_layout(positions.flatten(0, 1), (self.groups[0], self.num_experts, self.capacity), filled)

    def dispatch(self, x: Tensor, layout: Layout | None = None) -> Tensor:
        """Copy tokens x (b n d) to where their choices stand: rows (t d) of a layout or, without one, slots (b e c d).

        Slots without a choice are zero, and so is the last row; other rows without one hold anything. With
        ``straight_through``, gates get the gradient that they would if they scaled the copies.
        """
        if layout is None:
            layout = self.buffers()
            return layout.split(self.dispatch(x, layout))
        return gather(x.flatten(0, 1), layout, self.gates.flatten(0, 1) if self.straight_through else None)

    def combine(self, y: Tensor, layout: Layout | None = None, dtype: torch.dtype | None = None) -> Tensor:
        """Sum experts' results y, weighted by the gates, into tokens (b n d').

        y: rows (t d') of a layout, the last of them zero, or, without one, slots (b e c d').
        dtype: of the sums, which are taken in the wider dtype of y and the gates; that one by default.
        """
        if layout is None:
            layout = self.buffers()
            y = layout.join(y)
        gates = self.gates.masked_fill(~self._is_sent(), 0.0).flatten(0, 1)
        return weighted_sum(y, gates, layout, dtype).view(*self.indices.shape[:2], y.shape[-1])

    def dense(self) -> tuple[Tensor, Tensor]:
        """Mesh-TensorFlow's dispatch and combine tensors (b n e c), b and n being the groups.

        They define the layer and cost n^2:

        ``einsum(x, dispatch, "b n d, b n e c -> b e c d")``, then ``einsum(y, combine, "b e c d, b n e c -> b n d")``.
        """
        per_choice = self.indices, self.slots, self.gates, self.kept
        indices, slots, gates, kept = (t.reshape(*self.groups, t.shape[-1]) for t in per_choice)
        experts = indices.unsqueeze(-1) == torch.arange(self.num_experts, device=indices.device)
        places = slots.unsqueeze(-1) == torch.arange(self.capacity, device=slots.device)
        places = (places & kept.unsqueeze(-1)).to(gates.dtype)
        with without_autocast(gates):
            dispatch = einsum(experts.to(gates.dtype), places, "b n k e, b n k c -> b n e c")
            combine = einsum(experts * gates.unsqueeze(-1), places, "b n k e, b n k c -> b n e c")
        if self.straight_through:
            dispatch = dispatch + (combine - combine.detach())
        return dispatch, combine

    def _num_slots(self) -> int:
        return self.groups[0] * self.num_experts * self.capacity

    def _is_sent(self) -> Tensor:
        """(b n k) bool: what is kept and has a slot, also where someone changed the one and not the other."""
        return self.kept & (self.slots >= 0)


def _narrow(t: Tensor, least: int, most: int) -> Tensor:
    """Integers from least to most in the smallest type that holds them."""
    types = map(torch.iinfo, (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64))
    return t.to(next(getattr(torch, each.dtype) for each in types if each.min <= least and most <= each.max))
