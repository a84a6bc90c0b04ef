"""The one product for all experts: rows sorted by expert, each times its expert's own matrix.

Axes: e experts, t rows, i and o widths.

Two operators of torch, one for each direction, take lists of the experts' own parameters: they stay where they are, in
their modules, and code around the operators compiles and exports to one graph for every dtype, whose size does not grow
with the experts.

On CUDA, bfloat16 goes through one kernel (`torch.nn.functional.grouped_mm`), which needs no look at the offsets on GPUs
that have it. It reads all matrices from one tensor: a copy of them, unless they stand side by side in memory. All else
takes a product for each expert and looks at the offsets, once each way, which an accelerator has to be waited for.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from st_moe_pytorch.compat import copy_each, fused
from st_moe_pytorch.grouped.cpu import with_spare_rows, write_product
from st_moe_pytorch.grouped.side_by_side import ALIGNMENT, side_by_side

Tensors = Sequence[Tensor]
MOST_GROUPS = 1023  # of CUDA's kernel


def has_kernel(t: Tensor, num_experts: int) -> bool:
    """Whether one kernel multiplies such tensors of that many experts."""
    return t.device.type == "cuda" and t.dtype == torch.bfloat16 and num_experts <= MOST_GROUPS


@torch.library.custom_op("st_moe_pytorch::grouped_linear", mutates_args=())
def grouped_linear(rows: Tensor, weights: Tensors, biases: Tensors, scales: Tensors, offsets: Tensor) -> Tensor:
    """``(rows * scales[j]) @ weights[j].T + biases[j]`` for the rows of each expert j: (t i) -> (t o), in rows' dtype.

    weights: e times (o i); biases: e times (o), or none; scales: e times (i), or none. One tensor of e may stand for e
        of them, as `together` gives it. They are cast to the dtype of rows.
    offsets (e) int32: where the rows of each expert end. Of the rows behind the last one, the very last gives zero, the
    others anything.

    Twice differentiable, in rows and parameters. Experts without rows get gradients of zero.
    """
    if has_kernel(rows, len(offsets)):
        matrices, _ = _scaled_stack(weights, scales, rows.dtype, len(offsets))
        y = F.grouped_mm(_aligned(rows), matrices.transpose(1, 2), offs=offsets)
        y = y[:, : weights[0].shape[-2]].contiguous()
        if biases:
            y = _add_bias(y, _stack(biases, y.dtype, len(offsets))[:, : y.shape[1]], offsets)
        return _without_last(y, offsets)
    weights, biases, scales = (_each(tensors, len(offsets)) for tensors in (weights, biases, scales))
    y, blocks = _empty_result(rows, weights, biases, scales, offsets), _blocks(offsets)
    for j, block in enumerate(blocks):
        matrix, bias = weights[j].to(y.dtype).t(), biases[j].to(y.dtype) if biases else None
        write_product(y[block], _scaled(with_spare_rows(rows[block]), scales, j), matrix, bias)
    y[blocks[-1].stop :] = 0
    return y


@torch.library.custom_op("st_moe_pytorch::grouped_linear_backward", mutates_args=())
def grouped_linear_backward(
    grad: Tensor, rows: Tensor, weights: Tensors, scales: Tensors, offsets: Tensor, asked: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows (t i), weights (e o i), biases (e o), scales (e i).

    asked: whether for those of weights and scales, and of biases, which are empty otherwise.
    """
    of_parameters, of_biases = asked
    if has_kernel(rows, len(offsets)):
        (out, into), (grad, rows) = weights[0].shape[-2:], map(_aligned, (grad, rows))
        matrices, unscaled = _scaled_stack(weights, scales, rows.dtype, len(offsets))
        drows = _without_last(F.grouped_mm(grad, matrices, offs=offsets)[:, :into].contiguous(), offsets)
        dweights, dbiases, dscales = rows.new_empty(0, out, into), rows.new_empty(0, out), rows.new_empty(0, into)
        if of_parameters:
            dweights = _outer(grad, rows, offsets)
            if scales:
                dweights, dscales = _gradients_of_scaled(dweights, unscaled, _stack(scales, rows.dtype, len(offsets)))
            dweights, dscales = dweights[:, :out, :into].contiguous(), dscales[:, :into].contiguous()
        if of_biases:
            dbiases = _outer(grad, rows.new_ones(len(rows), ALIGNMENT), offsets)[:, :out, 0].contiguous()
        return drows, dweights, dbiases, dscales
    weights, scales = (_each(tensors, len(offsets)) for tensors in (weights, scales))
    found = _empty_gradients(grad, rows, weights, scales, offsets, asked)
    (drows, dweights, dbiases, dscales), blocks = found, _blocks(offsets)
    for j, block in enumerate(blocks):
        of_block = with_spare_rows(grad[block])
        write_product(drows[block], of_block, weights[j].to(rows.dtype))
        if of_parameters:
            write_product(dweights[j], of_block.t(), _scaled(with_spare_rows(rows[block]), scales, j))
        if of_biases:
            torch.sum(grad[block], 0, out=dbiases[j])
        if scales:
            if of_parameters:
                torch.sum(drows[block] * rows[block], 0, out=dscales[j])
            drows[block] *= scales[j].to(rows.dtype)
    drows[blocks[-1].stop :] = 0
    return found


@grouped_linear.register_fake
def _empty_result(rows: Tensor, weights: Tensors, biases: Any, scales: Any, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights[0].shape[-2])


@grouped_linear_backward.register_fake
def _empty_gradients(
    grad: Tensor, rows: Tensor, weights: Tensors, scales: Tensors, offsets: Tensor, asked: Sequence[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    e, (out, into), (of_parameters, of_biases) = len(offsets), weights[0].shape[-2:], asked
    return (
        rows.new_empty(rows.shape[0], into),
        grad.new_empty(e if of_parameters else 0, out, into),
        grad.new_empty(e if of_biases else 0, out),
        grad.new_empty(e if of_parameters and scales else 0, into),
    )


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rows, weights, biases, scales, offsets = inputs
    ctx.lengths = len(weights), len(biases), len(scales)
    ctx.asked = [any(t.requires_grad for t in tensors) for tensors in ((*weights, *scales), biases)]
    ctx.save_for_backward(rows, offsets, *weights, *scales)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, offsets, *parameters = ctx.saved_tensors
    weights, scales = parameters[: ctx.lengths[0]], parameters[ctx.lengths[0] :]
    drows, *others = grouped_linear_backward(grad.contiguous(), rows, weights, scales, offsets, ctx.asked)
    return drows, *map(_as_given, (t.to(weights[0].dtype) for t in others), ctx.lengths), None


def _as_given(t: Tensor, length: int) -> list[Any]:
    """Gradients (e ...) for a list of that length: one tensor, or views of it; none of those not asked for."""
    if len(t) == 0:
        return [None] * length
    return [t] if length < len(t) else list(t.unbind())


def _keep_for_second(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    grad, rows, weights, scales, offsets, *_ = inputs
    ctx.lengths = len(weights), len(scales)
    ctx.save_for_backward(grad, rows, offsets, *weights, *scales)


def _second_gradients(ctx: Any, u: Tensor, v: Tensor, c: Tensor, q: Tensor) -> tuple[Any, ...]:
    """Gradients of ``<drows, u> + <dweights, v> + <dbiases, c> + <dscales, q>``, as sums of the same two operators."""
    grad, rows, offsets, *parameters = ctx.saved_tensors
    weights, scales = parameters[: ctx.lengths[0]], parameters[ctx.lengths[0] :]

    dgrad = grouped_linear(u, weights, [], scales, offsets)
    _, dweights, _, dscales = grouped_linear_backward(grad, u, weights, scales, offsets, [True, False])
    drows = torch.zeros_like(rows)
    if len(v) or len(c):
        matrices = v.unbind() if len(v) else list(map(torch.zeros_like, weights))
        dgrad = dgrad + grouped_linear(rows, matrices, c.unbind(), scales, offsets)
        drows, _, _, more = grouped_linear_backward(grad, rows, matrices, scales, offsets, [True, False])
        dscales = dscales + more
    if len(q):
        dgrad = dgrad + grouped_linear(rows, weights, [], q.unbind(), offsets)
        more, more_weights, _, _ = grouped_linear_backward(grad, rows, weights, q.unbind(), offsets, [True, False])
        drows, dweights = drows + more, dweights + more_weights
    return dgrad, drows, *map(_as_given, (t.to(weights[0].dtype) for t in (dweights, dscales)), ctx.lengths), None, None


grouped_linear.register_autograd(_gradients, setup_context=_keep)
grouped_linear_backward.register_autograd(_second_gradients, setup_context=_keep_for_second)


@register_flop_formula(torch.ops.st_moe_pytorch.grouped_linear)
def _flops(rows: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """Of all rows, since how many belong to an expert is not known without a look at the data."""
    return 2 * rows[0] * weights[0][-2] * weights[0][-1]


@register_flop_formula(torch.ops.st_moe_pytorch.grouped_linear_backward)
def _flops_of_gradients(grad: Any, rows: Any, weights: Any, scales: Any, offsets: Any, asked: Any, **_: Any) -> int:
    return _flops(rows, weights) * (2 if asked[0] else 1)


def _blocks(offsets: Tensor) -> list[slice]:
    """Every expert's rows, by one look at the offsets."""
    ends = offsets.tolist()
    return list(map(slice, [0, *ends], ends))


def _scaled(rows: Tensor, scales: Tensors, j: int) -> Tensor:
    return rows * scales[j].to(rows.dtype) if scales else rows


def _outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """``left.T @ right`` of the rows of each expert: (t o), (t i) -> (e o i), zero for those without rows."""
    products = F.grouped_mm(left.t(), right, offs=offsets)
    # Hopper's kernel writes these zeros, Blackwell's does not
    if not left.is_cuda or torch.cuda.get_device_capability(left.device)[0] != 9:
        is_empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
        products.masked_fill_(is_empty.view(-1, 1, 1), 0.0)
    return products


def _without_last(y: Tensor, offsets: Tensor) -> Tensor:
    """y with zeros in the last row, if it is nobody's."""
    y[-1:].masked_fill_(offsets[-1] < len(y), 0.0)
    return y


@fused
def _add_bias(y: Tensor, biases: Tensor, offsets: Tensor) -> Tensor:
    owners = torch.searchsorted(offsets, torch.arange(len(y), dtype=offsets.dtype, device=y.device), right=True)
    return y + F.pad(biases, (0, 0, 0, 1)).index_select(0, owners)


@fused
def _times(matrices: Tensor, scales: Tensor) -> Tensor:
    return matrices * scales.unsqueeze(1)


@fused
def _gradients_of_scaled(grad: Tensor, matrices: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    return grad * scales.unsqueeze(1), (grad * matrices).sum(1)


def _scaled_stack(weights: Tensors, scales: Tensors, dtype: torch.dtype, num_experts: int) -> tuple[Tensor, Tensor]:
    """The matrices (e o i) of aligned sizes, times the scales of their columns, and without them."""
    matrices = _stack(weights, dtype, num_experts)
    return _times(matrices, _stack(scales, dtype, num_experts)) if scales else matrices, matrices


def _stack(tensors: Tensors, dtype: torch.dtype, num_experts: int) -> Tensor:
    """(e ...) of aligned sizes, padded with zeros: as they stand, or copied and cast in one pass."""
    stack = tensors[0] if len(tensors) < num_experts else side_by_side(tensors)
    shape = tensors[0].shape if stack is None else stack.shape[1:]
    aligned = num_experts, *(size + -size % ALIGNMENT for size in shape)
    if stack is not None and (stack.dtype, stack.shape) == (dtype, aligned):
        return stack
    stack = tensors[0].new_empty(aligned, dtype=dtype)
    if aligned[1:] != shape:
        stack.zero_()
    copy_each(stack[(slice(None), *map(slice, shape))], _each(tensors, num_experts))
    return stack


def _each(tensors: Tensors, num_experts: int) -> Tensors:
    """Those of each expert, where one tensor may stand for all."""
    return tensors[0].unbind() if 0 < len(tensors) < num_experts else tensors


def _aligned(rows: Tensor) -> Tensor:
    rest = -rows.shape[1] % ALIGNMENT
    return (F.pad(rows, (0, rest)) if rest else rows).contiguous()
