"""Linear layers in the forms that take least time on CPU.

Of many rows, a matrix product takes up to a third longer where the rows of its result do not begin on cache lines, as
those of `Expert` do not unless its number of hidden units happens to be a multiple of 16: they are aligned.

Of few rows, as in decoding, MKL leaves threads idle: the product is that of a batch, a part of the matrix's columns for
each thread. Of the fewest, it is that of the matrix and columns instead of rows and the matrix.
"""

# pyright: reportIncompatibleMethodOverride=false

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from st_moe_pytorch.checks import can_be_looked_at
from st_moe_pytorch.compat import is_watched, may_be_derived, with_known_signature

CACHE_LINE = 64  # bytes
MANY = 2**17  # numbers of the input; of fewer, products take as long aligned or not
FEW, FEWEST = 64, 3  # rows
WORTH_PARTS = 2**15  # numbers of a matrix; of fewer, what parts cost in calls is more than they save
WIDE, WIDE_TO_TRAIN = 128, 512  # layers whose matrices are likely as large; in training, gradients cost calls too
DTYPES = torch.float32, torch.float64


def is_worthwhile(x: Tensor) -> bool:
    """Whether plain linear layers of x (..., i) may be computed by `cpu_linear` instead of called, and gain."""
    # first of all, since compilers would guard on the number of tokens
    if not can_be_looked_at(x) or torch.is_autocast_enabled("cpu") or is_watched():
        return False
    is_plain = x.dtype in DTYPES and x.layout == torch.strided
    is_wide = x.shape[-1] >= (WIDE_TO_TRAIN if torch.is_grad_enabled() else WIDE)
    return is_plain and (x.numel() >= MANY or (is_wide and 0 < x.numel() <= FEW * x.shape[-1]))


def cpu_linear(x: Tensor, linear: nn.Linear, to_hidden: bool) -> Tensor:
    """``linear(x)`` of x (..., i). Aligned are the results (..., o) if ``to_hidden``, or else the gradients of x."""
    inputs = x, linear.weight, linear.bias
    return (_Linear.apply if may_be_derived(*inputs) else _Linear.forward)(*inputs, to_hidden)


def empty_rows(t: Tensor, *shape: int) -> Tensor:
    """An empty tensor of t's dtype and device, whose rows, along the last axis, begin on cache lines."""
    padded = shape[-1] + -shape[-1] % (CACHE_LINE // t.element_size())
    # no view of a wider tensor, since results of functions that are views cannot be changed in place
    return t.new_empty_strided(shape, torch.empty(*shape[:-1], padded, device="meta").stride())


@with_known_signature
class _Linear(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, to_hidden: bool) -> Tensor:
        return _product(x, weight.t(), bias, to_hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        (x, weight, _, ctx.to_hidden), (of_x, of_weight, *_) = inputs, ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), (of_x, of_weight, of_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        dx = _product(grad, weight, None, not ctx.to_hidden) if of_x else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None
        return dx, dweight, rows.sum(0) if of_bias else None, None


def _product(a: Tensor, b: Tensor, bias: Tensor | None, is_aligned: bool) -> Tensor:
    """``a @ b + bias`` of a (..., i) and b (i o)."""
    if may_be_derived(a, b, bias):
        return F.linear(a, b.t(), bias)
    shape = *a.shape[:-1], b.shape[1]
    y = empty_rows(a, *shape) if is_aligned and a.numel() >= MANY else a.new_empty(shape)
    write_product(y.view(-1, shape[-1]), a.reshape(-1, a.shape[-1]), b, bias)
    return y


def write_product(out: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> None:
    """Write ``rows @ matrix + bias`` of rows (t i), matrix (i o) and bias (o) into out (t o)."""
    if (parts := _num_parts(rows, matrix)) == 1:
        _ = torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)
        return
    blocks, out = (t.unflatten(1, (parts, -1)).transpose(0, 1) for t in (matrix, out))
    if len(rows) <= FEWEST and matrix.stride(0) == 1:
        of_parts = torch.bmm(blocks.mT, rows.t().expand(parts, -1, -1)).mT
    else:
        of_parts = torch.bmm(rows.expand(parts, -1, -1), blocks)
    _ = out.copy_(of_parts) if bias is None else torch.add(of_parts, bias.view(parts, 1, -1), out=out)


def _num_parts(rows: Tensor, matrix: Tensor) -> int:
    """In how many parts of equal size the columns of a matrix are multiplied."""
    is_slow = rows.device.type == "cpu" and rows.dtype in DTYPES and torch.backends.mkl.is_available()
    if not is_slow or not 0 < len(rows) <= FEW or matrix.numel() < WORTH_PARTS:
        return 1
    most = max(torch.get_num_threads(), 2 if len(rows) <= FEWEST else 1)
    return next((parts for parts in range(most, 1, -1) if matrix.shape[1] % parts == 0), 1)
