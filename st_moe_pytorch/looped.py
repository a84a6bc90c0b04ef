"""`grouped_linear` by a product for each expert, where there is no kernel for all of them.

Axes: e experts, t rows, i and o widths.

It looks at the offsets, once each way, which an accelerator has to be waited for.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("st_moe_pytorch::looped_linear", mutates_args=())
def looped_linear(
    rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[Tensor], offsets: Tensor
) -> Tensor:
    """`grouped_linear` by a product for each expert."""
    y = rows.new_empty(rows.shape[0], weights[0].shape[0])
    for j, block in _blocks(offsets):
        matrix, inputs = weights[j].to(y.dtype).t(), _scaled(rows[block], scales, j)
        if biases:
            torch.addmm(biases[j].to(y.dtype), inputs, matrix, out=y[block])
        else:
            torch.mm(inputs, matrix, out=y[block])
    y[_end(offsets) :] = 0
    return y


@torch.library.custom_op("st_moe_pytorch::looped_linear_backward", mutates_args=())
def looped_linear_backward(
    grad: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Tensor,
    of_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of rows (t i), weights (e o i), biases (e o), scales (e i); without ``of_parameters``, of rows only."""
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


@looped_linear.register_fake
def _empty_result(rows: Tensor, weights: Sequence[Tensor], *_: Any) -> Tensor:
    return rows.new_empty(rows.shape[0], weights[0].shape[0])


@looped_linear_backward.register_fake
def _empty_gradients(
    grad: Tensor,
    rows: Tensor,
    weights: Sequence[Tensor],
    scales: Sequence[Tensor],
    offsets: Tensor,
    of_parameters: bool,
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
    drows, *others = looped_linear_backward(grad.contiguous(), rows, weights, scales, offsets, ctx.of_parameters)
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
    """Gradients of ``<drows, u> + <dweights, v> + <dbiases, c> + <dscales, q>``, as sums of the same two operators."""
    grad, rows, offsets, *parameters = ctx.saved_tensors
    weights, scales = parameters[: ctx.num_experts], parameters[ctx.num_experts :]
    nothing = [weights[0].new_zeros(weights[0].shape[0])] * len(weights)

    def gradients(rows: Tensor, weights: Sequence[Tensor], scales: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return looped_linear_backward(grad, rows, weights, scales, offsets, True)

    dgrad = looped_linear(u, weights, nothing, scales, offsets)
    _, dweights, _, dscales = gradients(u, weights, scales)
    drows = torch.zeros_like(rows)
    if len(v):
        dgrad = dgrad + looped_linear(rows, v.unbind(), c.unbind(), scales, offsets)
        drows, _, _, more = gradients(rows, v.unbind(), scales)
        dscales = dscales + more
    if len(q):
        dgrad = dgrad + looped_linear(rows, weights, nothing, q.unbind(), offsets)
        more, more_weights, _, _ = gradients(rows, weights, q.unbind())
        drows, dweights = drows + more, dweights + more_weights
    dweights, dscales = (list(t.to(weights[0].dtype).unbind()) for t in (dweights, dscales))
    return dgrad, drows, dweights, dscales, None, None


looped_linear.register_autograd(_gradients, setup_context=_keep)
looped_linear_backward.register_autograd(_second_gradients, setup_context=_keep_for_second)


@register_flop_formula(torch.ops.st_moe_pytorch.looped_linear)
def _flops(rows: Sequence[int], weights: Sequence[Sequence[int]], *_: Any, **__: Any) -> int:
    """Of all rows, since how many belong to an expert is not known without a look at the data."""
    return 2 * rows[0] * weights[0][0] * weights[0][1]


@register_flop_formula(torch.ops.st_moe_pytorch.looped_linear_backward)
def _backward_flops(
    grad: Sequence[int],
    rows: Sequence[int],
    weights: Sequence[Sequence[int]],
    scales: Any,
    offsets: Any,
    of_parameters: bool,
    **_: Any,
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
