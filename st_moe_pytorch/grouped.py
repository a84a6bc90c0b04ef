"""The one product for all experts: rows sorted by expert, each times its expert's own matrix.

Axes: e experts, t rows, i and o widths.

``grouped_linear`` takes lists of the experts' own parameters: they stay where they are, in their modules. It is made of
operators of torch, so that code around it compiles and exports to one graph for every dtype, whose size does not grow
with the experts.

On CUDA, bfloat16 goes through one kernel (`torch.nn.functional.grouped_mm`) that needs no look at the offsets on GPUs
that have it, and one copy of the matrices, which is kept for the backward pass. Every other dtype on an accelerator
takes a product for each expert and waits for the offsets, once each way.
"""

# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from st_moe_pytorch.compat import copy_each, fused
from st_moe_pytorch.looped import looped_linear

MOST_GROUPS = 1023  # of CUDA's kernel
ALIGNMENT = 8  # numbers of two bytes in the 16 that its strides must be multiples of


def grouped_linear(
    rows: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], scales: Sequence[Tensor], offsets: Tensor
) -> Tensor:
    """``(rows * scales[j]) @ weights[j].T + biases[j]`` for the rows of each expert j: (t i) -> (t o), in rows' dtype.

    weights: e times (o i); biases: e times (o), or none; scales: e times (i), or none. They are cast to the dtype of
        rows.
    offsets (e) int32: where the rows of each expert end. Of the rows behind the last one, the very last gives zero, the
    others anything.

    Twice differentiable, in rows and parameters. Experts without rows get gradients of zero.
    """
    if not _has_kernel(rows, offsets):
        return looped_linear(rows, weights, biases, scales, offsets)
    matrices = stacked(weights, rows.dtype)
    if scales:
        matrices = matrices * stacked(scales, rows.dtype).unsqueeze(1)
    y, width = grouped_product(_aligned(rows), matrices, offsets), len(weights[0])
    y = y if y.shape[1] == width else y[:, :width]
    return _AddBias.apply(y, stacked(biases, rows.dtype)[:, :width], offsets) if biases else y


def _has_kernel(rows: Tensor, offsets: Tensor) -> bool:
    return rows.device.type == "cuda" and rows.dtype == torch.bfloat16 and len(offsets) <= MOST_GROUPS


@torch.library.custom_op("st_moe_pytorch::stacked", mutates_args=())
def stacked(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """(e ...), copied and cast in one pass, the other axes padded with zeros to aligned sizes."""
    buffer = _empty_stack(tensors, dtype)
    if buffer.shape[1:] != tensors[0].shape:
        buffer.zero_()
    copy_each(buffer[(slice(None), *map(slice, tensors[0].shape))], tensors)
    return buffer


@stacked.register_fake
def _empty_stack(tensors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    return tensors[0].new_empty(len(tensors), *(size + -size % ALIGNMENT for size in tensors[0].shape), dtype=dtype)


def _keep_shape(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.shape, ctx.dtype = inputs[0][0].shape, inputs[0][0].dtype


def _unstacked(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    """Views of one buffer, which become the parameters' gradients without a copy where sizes are aligned."""
    return list(grad[(slice(None), *map(slice, ctx.shape))].to(ctx.dtype).contiguous().unbind()), None


stacked.register_autograd(_unstacked, setup_context=_keep_shape)


@torch.library.custom_op("st_moe_pytorch::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    """``rows @ matrices[j].T`` for the rows of each expert j: (t i), (e o i) -> (t o), all sizes aligned.

    The last row gives zero if it is nobody's.
    """
    y = F.grouped_mm(rows, matrices.transpose(1, 2), offs=offsets)
    y[-1:].masked_fill_(offsets[-1] < len(y), 0.0)
    return y


@grouped_product.register_fake
def _empty_product(rows: Tensor, matrices: Tensor, offsets: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], matrices.shape[1])


@torch.library.custom_op("st_moe_pytorch::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """``left.T @ right`` of the rows of each expert: (t o), (t i) -> (e o i), zero for those without rows."""
    return _with_zeros(F.grouped_mm(left.t(), right, offs=offsets), offsets)


@fused
def _with_zeros(products: Tensor, offsets: Tensor) -> Tensor:
    """Of experts without rows, which the kernel of some GPUs leaves unwritten."""
    is_empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
    return products.masked_fill_(is_empty.view(-1, 1, 1), 0.0)


@grouped_outer.register_fake
def _empty_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    return left.new_empty(len(offsets), left.shape[1], right.shape[1])


def _keep_all(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _product_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    rows, matrices, offsets = ctx.saved_tensors
    grad = grad.contiguous()
    dmatrices = grouped_outer(grad, rows, offsets) if ctx.needs_input_grad[1] else None
    return grouped_product(grad, matrices.transpose(1, 2), offsets), dmatrices, None


def _outer_gradients(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    left, right, offsets = ctx.saved_tensors
    return grouped_product(right, grad, offsets), grouped_product(left, grad.transpose(1, 2), offsets), None


grouped_product.register_autograd(_product_gradients, setup_context=_keep_all)
grouped_outer.register_autograd(_outer_gradients, setup_context=_keep_all)


@register_flop_formula([torch.ops.st_moe_pytorch.grouped_product, torch.ops.st_moe_pytorch.grouped_outer])
def _flops_of_products(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


class _AddBias(Function):
    """Rows y (t o), each plus its expert's own bias (e o); nobody's rows as they are."""

    @staticmethod
    def forward(y: Tensor, biases: Tensor, offsets: Tensor) -> Tensor:
        return _add_bias(y, biases, offsets)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(inputs[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ones = grad.new_ones(len(grad), ALIGNMENT)
        return grad, grouped_outer(_aligned(grad), ones, *ctx.saved_tensors)[:, : grad.shape[1], 0], None


@fused
def _add_bias(y: Tensor, biases: Tensor, offsets: Tensor) -> Tensor:
    owners = torch.searchsorted(offsets, torch.arange(len(y), dtype=offsets.dtype, device=y.device), right=True)
    return y + F.pad(biases, (0, 0, 0, 1)).index_select(0, owners)


def _aligned(rows: Tensor) -> Tensor:
    rest = -rows.shape[1] % ALIGNMENT
    return (F.pad(rows, (0, rest)) if rest else rows).contiguous()
