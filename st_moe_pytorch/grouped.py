"""The one product for all experts: rows sorted by expert, each times its expert's own matrix. Axes: e experts, t rows, i and o widths.

``grouped_linear`` is an operator of torch, so that code around it compiles and exports to one graph for every dtype, whose size does not
grow with the experts. It takes lists of the experts' own parameters: they stay where they are, in their modules.

On CUDA, bfloat16 goes through one kernel (`torch.nn.functional.grouped_mm`) that needs no look at the offsets on GPUs that have it, and one
copy of the matrices. Every other dtype on an accelerator takes a product for each expert and waits for the offsets, once each way.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

MOST_GROUPS = 1023  # of CUDA's kernel
ALIGNMENT = 8  # numbers of two bytes in the 16 that its strides must be multiples of


@torch.library.custom_op("st_moe_pytorch::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[Tensor], offsets: Tensor) -> Tensor:
    """``(rows * scales[j]) @ weights[j].T + biases[j]`` for the rows of each expert j: (t i) -> (t o), in the dtype of rows.

    weights: e times (o i); biases: e times (o), or none; scales: e times (i), or none. They are cast to the dtype of rows.
    offsets (e) int32: where the rows of each expert end. Of the rows behind the last one, the very last gives zero, the others anything.

    Twice differentiable, in rows and parameters. Experts without rows get gradients of zero.
    """
    if _has_kernel(rows, offsets):
        return _kernel_forward(rows, weights, biases, scales, offsets)
    y = rows.new_empty(rows.shape[0], weights[0].shape[0])
    for j, block in _blocks(offsets):
        matrix, inputs = weights[j].to(y.dtype).t(), _scaled(rows[block], scales, j)
        torch.addmm(biases[j].to(y.dtype), inputs, matrix, out=y[block]) if biases else torch.mm(inputs, matrix, out=y[block])
    y[_end(offsets) :] = 0
    return y


@torch.library.custom_op("st_moe_pytorch::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad: Tensor, rows: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], offsets: Tensor, of_parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows (t i), weights (e o i), biases (e o) and scales (e i); without ``of_parameters``, of rows only."""
    if _has_kernel(rows, offsets):
        return _kernel_backward(grad, rows, weights, scales, offsets, of_parameters)
    drows, dweights, dbiases, dscales = _empty_gradients(grad, rows, weights, scales, offsets, of_parameters)
    for j, block in _blocks(offsets):
        torch.mm(grad[block], weights[j].to(rows.dtype), out=drows[block])
        if of_parameters:
            torch.mm(grad[block].t(), _scaled(rows[block], scales, j), out=dweights[j])
            torch.sum(grad[block], 0, out=dbiases[j])
        if scales:
            if of_parameters:
                torch.sum(drows[block] * rows[block], 0, out=dscales[j])
            drows[block] *= scales[j].to(rows.dtype)
    drows[_end(offsets) :] = 0
    return drows, dweights, dbiases, dscales


@grouped_linear.register_fake
def _empty_result(rows: Tensor, weights: Sequence[Tensor], *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weights[0].shape[0])


@grouped_linear_backward.register_fake
def _empty_gradients(
    grad: Tensor, rows: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], offsets: Tensor, of_parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    e, (out, into) = len(weights) if of_parameters else 0, weights[0].shape
    return (
        torch.empty_like(rows, memory_format=torch.contiguous_format),
        grad.new_empty(e, out, into),
        grad.new_empty(e, out),
        grad.new_empty(e if scales else 0, into),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, biases, scales, offsets = inputs
    ctx.num_experts, ctx.num_biases = len(weights), len(biases)
    ctx.of_parameters = any(t.requires_grad for t in (*weights, *biases, *scales))
    ctx.save_for_backward(rows, offsets, *weights, *scales)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, offsets, *parameters = ctx.saved_tensors
    e = ctx.num_experts
    weights, scales = parameters[:e], parameters[e:]
    drows, *others = grouped_linear_backward(grad.contiguous(), rows, weights, scales, offsets, ctx.of_parameters)
    if not ctx.of_parameters:
        return drows, [None] * e, [None] * ctx.num_biases, [None] * len(scales), None
    # views of one buffer each, which become the parameters' gradients without a copy
    dweights, dbiases, dscales = (list(t.to(weights[0].dtype).unbind()) for t in others)
    return drows, dweights, dbiases[: ctx.num_biases], dscales, None


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, rows, weights, scales, offsets, _ = inputs
    ctx.num_experts = len(weights)
    ctx.save_for_backward(grad, rows, offsets, *weights, *scales)


def _second_gradients(ctx: Any, u: Tensor, v: Tensor, c: Tensor, q: Tensor) -> tuple[Any, ...]:
    """Gradients of ``<drows, u> + <dweights, v> + <dbiases, c> + <dscales, q>``: sums of products of the same two kinds."""
    grad, rows, offsets, *parameters = ctx.saved_tensors
    weights, scales = parameters[: ctx.num_experts], parameters[ctx.num_experts :]
    nothing = [weights[0].new_zeros(weights[0].shape[0])] * len(weights)

    def gradients(rows: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return grouped_linear_backward(grad, rows, weights, scales, offsets, True)

    dgrad = grouped_linear(u, weights, nothing, scales, offsets)
    _, dweights, _, dscales = gradients(u, weights, scales)
    drows = torch.zeros_like(rows)
    if len(v):
        dgrad = dgrad + grouped_linear(rows, v.unbind(), c.unbind(), scales, offsets)
        drows, _, _, more = gradients(rows, v.unbind(), scales)
        dscales = dscales + more
    if len(q):
        dgrad = dgrad + grouped_linear(rows, weights, nothing, q.unbind(), offsets)
        more, more_weights, _, _ = gradients(rows, weights, q.unbind())
        drows, dweights = drows + more, dweights + more_weights
    dweights, dscales = (list(t.to(weights[0].dtype).unbind()) for t in (dweights, dscales))
    return dgrad, drows, dweights, dscales, None, None


grouped_linear.register_autograd(_gradients, setup_context=_keep)
grouped_linear_backward.register_autograd(_second_gradients, setup_context=_keep_for_second)


@register_flop_formula(torch.ops.st_moe_pytorch.grouped_linear)
def _flops(rows: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """Of all rows, since how many belong to an expert is not known without a look at the data."""
    return 2 * rows[0] * weights[0][0] * weights[0][1]


@register_flop_formula(torch.ops.st_moe_pytorch.grouped_linear_backward)
def _backward_flops(
    grad: Sequence[int], rows: Sequence[int], weights: Sequence[Sequence[int]], scales: Any, offsets: Any, of_parameters: bool, **_: Any
) -> int:
    return _flops(rows, weights) * (2 if of_parameters else 1)


def _blocks(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Every expert and the slice of its rows."""
    ends = offsets.tolist()
    return enumerate(map(slice, [0, *ends], ends))


def _end(offsets: Tensor) -> int:
    return int(offsets[-1])


def _scaled(rows: Tensor, scales: Sequence[Tensor], j: int) -> Tensor:
    return rows * scales[j].to(rows.dtype) if scales else rows


def _has_kernel(rows: Tensor, offsets: Tensor) -> bool:
    return rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and len(offsets) <= MOST_GROUPS


def _kernel_forward(rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[Tensor], offsets: Tensor) -> Tensor:
    matrices = _stacked(weights, rows.dtype)
    if scales:
        matrices *= _stacked(scales, rows.dtype).unsqueeze(1)
    y = F.grouped_mm(_aligned(rows), matrices.transpose(1, 2), offs=offsets)
    owners = torch.searchsorted(offsets, torch.arange(len(rows), dtype=offsets.dtype, device=offsets.device), right=True)
    if biases:
        y += _stacked(biases, rows.dtype).index_select(0, owners.clamp(max=len(biases) - 1))
    return _nobodys_row_zero(y[:, : len(weights[0])].contiguous(), offsets)


def _kernel_backward(
    grad: Tensor, rows: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor], offsets: Tensor, of_parameters: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (out, into), wide, matrices = weights[0].shape, _aligned(grad), _stacked(weights, rows.dtype)
    factors = _stacked(scales, rows.dtype).unsqueeze(1) if scales else None
    scaled = matrices if factors is None else matrices * factors
    drows = _nobodys_row_zero(F.grouped_mm(wide, scaled, offs=offsets)[:, :into].contiguous(), offsets)
    if not of_parameters:
        _, *none = _empty_gradients(grad, rows, weights, scales, offsets, of_parameters)
        return drows, *none
    empty = offsets.diff(prepend=offsets.new_zeros(1)).view(-1, 1, 1) == 0  # not written on some GPUs
    products = F.grouped_mm(wide.t(), _aligned(rows), offs=offsets).masked_fill_(empty, 0.0)
    sums = F.grouped_mm(wide.t(), wide.new_ones(len(wide), ALIGNMENT), offs=offsets).masked_fill_(empty, 0.0)  # no atomics
    dscales = (products * matrices).sum(dim=1)[: len(scales), :into].contiguous()
    dweights = products if factors is None else products * factors
    return drows, dweights[:, :out, :into].contiguous(), sums[:, :out, 0].contiguous(), dscales


def _stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(e ...), copied and cast in one pass into a buffer whose other axes are padded with zeros to aligned sizes."""
    sizes = tensors[0].shape
    buffer = tensors[0].new_zeros(len(tensors), *(size + -size % ALIGNMENT for size in sizes), dtype=dtype)
    torch.stack(list(tensors), out=buffer[(slice(None), *map(slice, sizes))])
    return buffer


def _aligned(rows: Tensor) -> Tensor:
    return F.pad(rows, (0, -rows.shape[1] % ALIGNMENT)).contiguous()


def _nobodys_row_zero(rows: Tensor, offsets: Tensor) -> Tensor:
    """Rows (t d), changed in place: the last one zero where it belongs to no expert."""
    rows[-1:].masked_fill_(offsets[-1] < len(rows), 0.0)
    return rows
