"""Where the copies of tokens stand that go to experts, and the two maps that follow it.

Axes as in routing.py; N = b * n tokens. One table of indices serves both layouts. *Rows* are sorted by expert; *slots*
are buffers (b e c), partly empty. Either way the number t of places is known without a look at data, and the last place
belongs to nobody: what stands there is zero, from dispatch to combine, and choices that are not sent point to it. Rows
between the end of the last expert's and the last one hold nothing that anyone may read.

Each map's adjoint is the other one, by gathering and never by adding into shared memory: results are the same bits in
every run.
"""

# pyright: reportIncompatibleMethodOverride=false

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from st_moe_pytorch.compat import fused, is_forward_mode, is_fused, may_be_derived, with_known_signature


class Layout(NamedTuple):
    """Which choice stands in which of t places. Choices are numbered ``token * k + rank`` over all tokens."""

    choices: Tensor
    """(t) int64: the choice in each place, N * k where there is none."""
    places: Tensor
    """(N k) int64: the place of each choice; the last one, nobody's, of those that are not sent."""
    offsets: Tensor | None
    """(e) int32: where the rows of each expert end; None for slots."""
    tokens: Tensor
    """(t) int64: the token whose copy each place holds, whether a choice stands there or not."""
    buffers: tuple[int, int, int] | None = None
    """(b, e, c), the shape of slots; None for rows."""
    empty: Tensor | None = None
    """(t) bool: places that hold zeros instead of a copy; None if that is just the last one."""

    def split(self, rows: Tensor) -> Tensor:
        """Slots (t d) as buffers (b e c d)."""
        assert self.buffers is not None
        return rows[:-1].view(*self.buffers, rows.shape[-1])

    def join(self, y: Tensor) -> Tensor:
        """Buffers (b e c d) as slots (t d)."""
        return F.pad(y.flatten(0, 2), (0, 0, 0, 1))


def rows_layout(experts: Tensor, num_experts: int, most: int) -> Layout:
    """Places sorted by expert, for choices of experts (N k), the number e standing for one that is not sent.

    ``most``: how many can be sent at most. One stable sort: the rows of an expert are in the order of their tokens.
    """
    choices, k = experts.numel(), experts.shape[-1]
    length: int = torch.sym_min(as_int(choices), as_int(most)) + 1  # pyright: ignore[reportAssignmentType]
    queue, order = experts.flatten().sort(stable=True)
    nobody = order.new_full((1,), choices)
    order = torch.cat((order.masked_fill(queue == num_experts, choices), nobody))[:length]
    ends = torch.searchsorted(queue, torch.arange(num_experts, device=queue.device), right=True, out_int32=True)
    return Layout(order, _inverse(order, choices, length - 1).view(-1, k), ends, _tokens(order, experts))


def slots_layout(positions: Tensor, buffers: tuple[int, int, int], filled: bool = False) -> Layout:
    """Places (b e c) in a row, for choices with their position (N k) in it, b * e * c for one that is not sent.

    filled: empty slots get copies of a token that is sent, if any is, and not zeros, which some experts cannot work
        with.
    """
    (groups, experts, capacity), choices = buffers, positions.numel()
    nobody = positions.new_full((1,), choices)
    holders = torch.cat((_inverse(positions.flatten(), groups * experts * capacity, choices), nobody))
    tokens, empty = _tokens(holders, positions), holders == choices
    if filled:
        return Layout(holders, positions, None, torch.where(empty, tokens.amin(), tokens), buffers, empty & empty.all())
    return Layout(holders, positions, None, tokens, buffers, empty)


def _tokens(choices: Tensor, table: Tensor) -> Tensor:
    """The token of each of the choices (t) that a table (N k) has; the last token for what is none."""
    return (choices // table.shape[1]).clamp(max=max(table.shape[0] - 1, 0))


def as_int(size: int) -> int:
    """A size of a tensor, which is a tensor itself in torch.jit.trace, as a number."""
    return int(size) if isinstance(size, Tensor) else size


def _inverse(numbers: Tensor, size: int, missing: int) -> Tensor:
    """(size): where in ``numbers`` each number below size stands, or ``missing``; ``size`` itself stands for none."""
    places = torch.arange(numbers.shape[0], device=numbers.device)
    return numbers.new_full((size + 1,), missing).scatter(0, numbers, places)[:-1]


def gather(x: Tensor, layout: Layout, gates: Tensor | None = None) -> Tensor:
    """Tokens x (N d) -> rows (t d), the last one zero.

    With the gates (N k) of their choices, rows have the derivatives that they would if each were scaled by
    ``1 + (g - stop_gradient(g))``. Adjoint: each token sums the gradients of its rows, in order of choices.
    """
    rows = _gather(x, gates, layout.tokens, layout.choices, layout.places)
    return rows if layout.empty is None else rows.masked_fill(layout.empty.unsqueeze(-1), 0.0)


def weighted_sum(y: Tensor, gates: Tensor, layout: Layout, dtype: torch.dtype | None = None) -> Tensor:
    """Rows y (t d') and gates (N k) -> tokens (N d'): sums of their choices' rows times gates.

    They are summed in the wider dtype of both, and given in that one or another.
    """
    return _sum_choices(y, gates, layout.tokens, layout.choices, layout.places, dtype)


@with_known_signature
class _Gather(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gates: Tensor | None, tokens: Tensor, choices: Tensor, places: Tensor) -> Tensor:
        if x.shape[0] == 0:
            return x.new_zeros(tokens.shape[0], x.shape[1])
        rows = x.index_select(0, tokens)
        rows[-1:].zero_()
        return rows

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, gates, *table = inputs
        ctx.save_for_backward(None if gates is None else output, gates, *table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:
        rows, gates, *table = ctx.saved_tensors
        _, choices, places = table
        is_sent = (places < grad.shape[0] - 1).to(grad.dtype)
        if gates is None or not ctx.needs_input_grad[1]:
            return _sum_choices(grad, is_sent, *table), None, None, None, None
        if not _is_last(grad, rows, gates):
            scale = 1 + (gates - gates.detach())
            rows, is_sent = rows / _at_choices(scale, choices, 1.0).to(rows.dtype), is_sent * scale
        elif is_fused(grad) and places.shape[1] <= MOST_UNROLLED:
            return *_gradients_of_gather(grad, rows, is_sent, places), None, None, None
        dgates = _at_places(torch.linalg.vecdot(grad, rows).to(gates.dtype), places)
        return _sum_choices(grad, is_sent, *table).to(grad.dtype), dgates, None, None, None


MOST_UNROLLED = 16  # choices of a token


@fused
def _sum_each(y: Tensor, gates: Tensor, places: Tensor, dtype: torch.dtype) -> Tensor:
    """Sums (N d), choice by choice in float32 or more: where memory takes the time, one kernel that reads rows once."""
    wide = torch.promote_types(torch.promote_types(y.dtype, gates.dtype), torch.float32)
    total = torch.zeros(places.shape[0], y.shape[1], dtype=wide, device=y.device)
    for j in range(places.shape[1]):
        total = total + y.index_select(0, places[:, j]).to(wide) * gates[:, j : j + 1].to(wide)
    return total.to(dtype)


@fused
def _gradients_of_gather(grad: Tensor, rows: Tensor, is_sent: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of tokens (N d) and of gates (N k), in one kernel that reads those of rows once."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    total, dgates = torch.zeros(places.shape[0], grad.shape[1], dtype=wide, device=grad.device), []
    for j in range(places.shape[1]):
        drows = grad.index_select(0, places[:, j]).to(wide) * is_sent[:, j : j + 1]
        total = total + drows
        dgates.append((drows * rows.index_select(0, places[:, j])).sum(dim=-1))
    return total.to(grad.dtype), torch.stack(dgates, dim=-1)


@fused
def _gradients_of_sum(grad: Tensor, y: Tensor, gates: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of y (t d) and of the gates (t 1) of its rows; the last row's is zero, as its gate is."""
    rows = grad.index_select(0, tokens).to(torch.promote_types(y.dtype, gates.dtype))
    return (rows * gates).to(y.dtype), (rows * y).sum(dim=-1).to(gates.dtype)


@with_known_signature
class _SumChoices(Function):
    @staticmethod
    def forward(
        y: Tensor, gates: Tensor, tokens: Tensor, choices: Tensor, places: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        wide = torch.promote_types(y.dtype, gates.dtype)
        if is_fused(y) and places.shape[1] <= MOST_UNROLLED:
            return _sum_each(y, gates, places, dtype or wide)
        total = F.embedding_bag(places, y.to(wide).contiguous(), mode="sum", per_sample_weights=gates.to(wide))
        return total if dtype is None else total.to(dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        *tensors, ctx.dtype = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None]:
        y, gates, tokens, choices, places = ctx.saved_tensors
        if y.device.type != "cpu" and grad.shape[0] > 0 and _is_last(grad, y, gates):
            dy, dgates = _gradients_of_sum(grad, y, _at_choices(gates, choices), tokens)
            return dy, _at_places(dgates, places) if ctx.needs_input_grad[1] else None, None, None, None, None
        rows = _gather(grad.to(torch.promote_types(y.dtype, gates.dtype)), None, tokens, choices, places)
        dgates = None
        if ctx.needs_input_grad[1]:
            dgates = _at_places(torch.linalg.vecdot(rows, y.to(rows.dtype)), places).to(gates.dtype)
        times = torch.mul if may_be_derived(grad, y, gates) else Tensor.mul_
        return times(rows, _at_choices(gates, choices)).to(y.dtype), dgates, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        """One by one, for torch.func: the sum itself knows of no batches."""
        each = ([t] * info.batch_size if dim is None else t.unbind(dim) for t, dim in zip(inputs, in_dims, strict=True))
        return torch.stack([_sum_choices(*one) for one in zip(*each, strict=True)]), 0


def _gather(x: Tensor, gates: Tensor | None, *table: Tensor) -> Tensor:
    if not is_forward_mode():
        return _apply(_Gather, x, gates, *table)
    rows = _Gather.forward(x, gates, *table)
    return rows if gates is None else rows * _at_choices(1 + (gates - gates.detach()), table[1], 1.0).to(rows.dtype)


def _sum_choices(
    y: Tensor, gates: Tensor, tokens: Tensor, choices: Tensor, places: Tensor, dtype: torch.dtype | None = None
) -> Tensor:
    if is_forward_mode():
        return _sum_each(y, gates, places, dtype or torch.promote_types(y.dtype, gates.dtype))
    return _apply(_SumChoices, y, gates, tokens, choices, places, dtype)


def _is_last(*tensors: Tensor) -> bool:
    """Whether nobody will differentiate what a backward computes of these tensors."""
    return torch.compiler.is_compiling() or not may_be_derived(*tensors)


def _apply(function: type[Function], *inputs: Any) -> Tensor:
    return function.apply(*inputs) if may_be_derived(*inputs) else function.forward(*inputs)


def _at_places(of_rows: Tensor, places: Tensor) -> Tensor:
    """Numbers (t) of rows -> (N k) of their choices."""
    return of_rows.index_select(0, places.flatten()).view(places.shape)


def _at_choices(of_choices: Tensor, choices: Tensor, nobody: float = 0.0) -> Tensor:
    """Numbers (N k) of choices -> (t 1) of the rows they stand in, or nobody's number where none does."""
    return F.pad(of_choices.flatten(), (0, 1), value=nobody).index_select(0, choices).unsqueeze(-1)
