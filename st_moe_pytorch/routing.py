"""What the router decided, and how tokens travel by it.

Axes, here and in every file of the package:

    b  batch (groups, where tokens are regrouped)      e  experts
    n  tokens of a group (sequence)                    k  choices of a token (top-n)
    d  model width                                     c  slots of an expert in a group (capacity)
    t  rows: token copies sent to experts              r  ranks

A choice is numbered ``token * k + rank`` over all tokens. Both layouts say which choice sits where:
*rows* hold the kept choices only, sorted by expert; *slots* are buffers (b e c) of fixed size, partly empty.
"""

from typing import NamedTuple

import torch
from einops import einsum, rearrange, reduce
from torch import Tensor
from torch.nn import functional as F

from st_moe_pytorch.checks import check_positive


def expert_capacity(tokens: int, num_experts: int, factor: float | None, min_capacity: int = 4) -> int:
    """Slots of an expert for a group of that many tokens: ``max(min(tokens, int(tokens * factor / num_experts)), min_capacity)``.

    Without a factor nothing is dropped: every token of the group would fit. ``tokens`` counts padding, so that shapes stay static.
    """
    check_positive(capacity_factor=factor)
    if factor is None:
        return tokens
    return max(min(tokens, int(tokens * factor / num_experts)), min_capacity)


def assign_slots(indices: Tensor, asked: Tensor, num_experts: int, order: Tensor | None = None) -> Tensor:
    """Place of every choice (b n k) in its expert's queue: all first choices in token order, then all second ones, and so on.

    Only choices that are asked for queue up; the others get a meaningless number. ``order`` (b n) lists the tokens of a
    group in another order of service. A stable sort by expert puts each queue in line, so cost does not grow with the number of experts.
    """
    if order is not None:
        order = order.unsqueeze(-1).expand_as(indices)
        slots = assign_slots(indices.gather(1, order), asked.gather(1, order), num_experts)
        return torch.empty_like(slots).scatter(1, order, slots)
    queues = rearrange(indices.masked_fill(~asked, num_experts), "b n k -> b (k n)")
    queues, request = queues.sort(dim=-1, stable=True)
    place = torch.arange(queues.shape[-1], device=queues.device) - torch.searchsorted(queues, queues)
    slots = torch.empty_like(place).scatter(-1, request, place)
    return rearrange(slots, "b (k n) -> b n k", k=indices.shape[-1])


class DenseRouting(NamedTuple):
    """Routing as two dense tensors (b n e c), whose size is quadratic in n, and the losses: what a gate's ``forward`` returns."""

    dispatch_tensor: Tensor
    combine_tensor: Tensor
    balance_loss: Tensor
    router_z_loss: Tensor


class Rows(NamedTuple):
    """Token copies (t d) sorted by expert, how many each expert gets (e), and the choice (t) behind each, which combining needs."""

    rows: Tensor
    counts: Tensor
    choices: Tensor


class Routing(NamedTuple):
    """The routing of a batch: which experts each token chose, with what weight, and what became of every choice.

    Every choice is exactly one of ``kept``, ``dropped`` (its expert was full), ``not_asked`` (by policy) and ``masked`` (padding),
    each a bool tensor (b n k).
    """

    indices: Tensor
    """(b n k) int64: expert of each choice, best first."""
    slots: Tensor
    """(b n k) int64: place of a kept choice in its expert's buffer, -1 for the others."""
    gates: Tensor
    """(b n k) float32 or float64: weight of each choice, kept or not; they sum to 1 over k for k > 1."""
    kept: Tensor
    """(b n k) bool: the choice was asked for and got a slot."""
    asked: Tensor
    """(b n k) bool: a real token's choice that the policy lets through."""
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

    def dispatch_rows(self, x: Tensor) -> Rows:
        """Copy tokens x (b n d) into rows (t d) sorted by expert, one for each kept choice. The number of rows depends on the data."""
        choices = self.kept.flatten().nonzero().squeeze(-1)
        experts, order = self.indices.flatten()[choices].sort(stable=True)
        choices = choices[order]
        return Rows(self._take(x, choices), experts.bincount(minlength=self.num_experts), choices)

    def combine_rows(self, y: Tensor, choices: Tensor) -> Tensor:
        """Weighted sum of experts' rows y (t d) back into tokens (b n d), in the wider dtype of y and the gates."""
        b, n, k = self.indices.shape
        weighted = y * self.gates.flatten()[choices].unsqueeze(-1)
        return weighted.new_zeros(b * n, y.shape[-1]).index_add(0, choices // k, weighted).view(b, n, y.shape[-1])

    def dispatch(self, x: Tensor) -> Tensor:
        """Copy tokens x (b n d) into the experts' slots (b e c d). Empty slots are zero. All shapes are known without looking at data."""
        choices = self.indices.numel()
        holder = torch.full((self._num_slots() + 1,), choices, device=x.device)
        holder = holder.scatter(0, self._positions().flatten(), torch.arange(choices, device=x.device))[:-1]
        slots = self._take(x, holder, may_be_empty=True)
        return slots.view(self.groups[0], self.num_experts, self.capacity, x.shape[-1])

    def combine(self, y: Tensor) -> Tensor:
        """Weighted sum of experts' slots y (b e c d) back into tokens (b n d), in the wider dtype of y and the gates."""
        b, n, k = self.indices.shape
        y = F.pad(y.flatten(0, 2), (0, 0, 0, 1))
        chosen = y.index_select(0, self._positions().flatten()).view(b, n, k, y.shape[-1])
        gates = self.gates.masked_fill(~self.kept, 0.0)
        return reduce(chosen * gates.unsqueeze(-1), "b n k d -> b n d", "sum")

    def dense(self) -> tuple[Tensor, Tensor]:
        """Mesh-TensorFlow's dispatch and combine tensors (b n e c), b and n being the groups. They define the layer and cost n^2:

        ``einsum(x, dispatch, "b n d, b n e c -> b e c d")``, then ``einsum(y, combine, "b e c d, b n e c -> b n d")``.
        """
        per_choice = self.indices, self.slots, self.gates, self.kept
        indices, slots, gates, kept = (t.reshape(*self.groups, t.shape[-1]) for t in per_choice)
        experts = indices.unsqueeze(-1) == torch.arange(self.num_experts, device=indices.device)
        places = slots.unsqueeze(-1) == torch.arange(self.capacity, device=slots.device)
        places = (places & kept.unsqueeze(-1)).to(gates.dtype)
        dispatch = einsum(experts.to(gates.dtype), places, "b n k e, b n k c -> b n e c")
        combine = einsum(experts * gates.unsqueeze(-1), places, "b n k e, b n k c -> b n e c")
        if self.straight_through:
            dispatch = dispatch + (combine - combine.detach())
        return dispatch, combine

    def _take(self, x: Tensor, choices: Tensor, may_be_empty: bool = False) -> Tensor:
        """Rows (t d) of x (b n d) for choices (t), scaled by exactly 1 with their gate's gradient; zero for choice number b * n * k."""
        x, gates = rearrange(x, "b n d -> (b n) d"), self.gates.flatten()
        if may_be_empty:
            x, gates = F.pad(x, (0, 0, 0, 1)), F.pad(gates, (0, 1))
        rows = x.index_select(0, choices // self.indices.shape[-1])
        if self.straight_through and gates.requires_grad:
            gates = gates[choices]
            rows = rows * (1 + (gates - gates.detach())).to(rows.dtype).unsqueeze(-1)
        return rows

    def _num_slots(self) -> int:
        return self.groups[0] * self.num_experts * self.capacity

    def _positions(self) -> Tensor:
        """Number (b n k) of each kept choice's slot among all (b e c); one past the last for choices without a slot."""
        b, n, _ = self.indices.shape
        group = torch.arange(b * n, device=self.indices.device).view(b, n, 1) // max(self.groups[1], 1)
        positions = (group * self.num_experts + self.indices) * self.capacity + self.slots
        return positions.masked_fill(~self.kept, self._num_slots())
