"""Linear layers in the forms that take least time on CPU.

Of many rows, oneDNN multiplies float32 faster than MKL on processors of AMD, and half types everywhere. For each number
of rows that it meets, it makes a kernel, in a millisecond, and keeps the last 1,024: rows of zeros are added, so that
few numbers occur.

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
from st_moe_pytorch.compat import is_watched, may_be_derived, onednn_linear, with_known_signature

MANY = 2**15  # numbers of the input; of fewer, in more than few rows, nothing is gained
FEW, FEWEST = 64, 3  # rows
WORTH_PARTS = 2**15  # numbers of a matrix; of fewer, what parts cost in calls is more than they save
WIDE, WIDE_TO_TRAIN = 128, 512  # layers whose matrices are likely as large; in training, gradients cost calls too
IS_AMD = "AMD" in str(torch.cpu.get_capabilities().get("cpu_name"))  # MKL is made for Intel's processors
DTYPES, HALF = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)


def is_worthwhile(x: Tensor) -> bool:
    """Whether plain linear layers of x (..., i) may be computed by `cpu_linear` instead of called, and gain."""
    # first of all, since compilers would guard on the number of tokens
    if not can_be_looked_at(x) or is_watched() or x.layout != torch.strided:
        return False
    if x.numel() > FEW * x.shape[-1]:
        return x.numel() >= MANY and is_for_onednn(x)
    is_wide = x.shape[-1] >= (WIDE_TO_TRAIN if torch.is_grad_enabled() else WIDE)
    return is_wide and x.numel() > 0 and _dtype_of_products(x) in DTYPES


def is_for_onednn(x: Tensor) -> bool:
    """Whether oneDNN should compute linear layers of x (..., i), or does so anyway."""
    dtype, has_many_rows = _dtype_of_products(x), x.numel() > FEW * x.shape[-1]
    is_fast = dtype in HALF or (dtype == torch.float32 and IS_AMD)
    is_on = torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)
    return is_fast and has_many_rows and x.device.type == "cpu" and is_on


def with_spare_rows(rows: Tensor) -> Tensor:
    """Rows (t i) and, for oneDNN, zeros behind them up to one of 16 numbers between a power of two and the next.

    How many depends on their number and dtype, not on their width: gradients get as many as what they belong to.
    """
    spare = -len(rows) % max(16, 2 ** (len(rows).bit_length() - 5)) if is_for_onednn(rows) else 0
    return torch.cat((rows, rows.new_zeros(spare, rows.shape[1]))) if spare else rows


def cpu_linear(x: Tensor, linear: nn.Linear) -> Tensor:
    """``linear(x)`` of x (..., i)."""
    if _dtype_of_products(x) in HALF:
        return linear(x)
    inputs = x, linear.weight, linear.bias
    return (_Linear.apply if may_be_derived(*inputs) else _Linear.forward)(*inputs)


@with_known_signature
class _Linear(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _product(x, weight.t(), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        (x, weight, _), (of_x, of_weight, _) = inputs, ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        dx = _product(grad, weight) if of_x else None
        dweight = _product(rows.t(), x.reshape(-1, x.shape[-1])) if of_weight else None
        return dx, dweight, rows.sum(0) if of_bias else None


def _product(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """``a @ b + bias`` of a (..., i) and b (i o)."""
    if may_be_derived(a, b, bias):
        return F.linear(a, b.t(), bias)
    if _is_onednn_to_multiply(a, b, bias):
        return onednn_linear(a, b.t(), bias)
    y = a.new_empty(*a.shape[:-1], b.shape[1])
    write_product(y.view(-1, b.shape[1]), a.reshape(-1, a.shape[-1]), b, bias)
    return y


def write_product(out: Tensor, rows: Tensor, matrix: Tensor, bias: Tensor | None = None) -> None:
    """Write ``rows @ matrix + bias`` of rows (t i), matrix (i o) and bias (o) into out (t o), without spare rows."""
    if len(rows) > len(out) or _is_onednn_to_multiply(rows, matrix, bias):
        _ = out.copy_(_product(rows, matrix, bias)[: len(out)])
        return
    if (parts := _num_parts(rows, matrix)) == 1:
        _ = torch.mm(rows, matrix, out=out) if bias is None else torch.addmm(bias, rows, matrix, out=out)
        return
    blocks, out = (t.unflatten(1, (parts, -1)).transpose(0, 1) for t in (matrix, out))
    if len(rows) <= FEWEST and matrix.stride(0) == 1:
        of_parts = torch.bmm(blocks.mT, rows.t().expand(parts, -1, -1)).mT
    else:
        of_parts = torch.bmm(rows.expand(parts, -1, -1), blocks)
    _ = out.copy_(of_parts) if bias is None else torch.add(of_parts, bias.view(parts, 1, -1), out=out)


def _dtype_of_products(x: Tensor) -> torch.dtype:
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype


def _is_onednn_to_multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> bool:
    """Instead of MKL, which it does fast only where memory is in this order."""
    if not is_for_onednn(a) or {t.dtype for t in (a, b, bias) if t is not None} != {torch.float32}:
        return False
    is_outer = a.ndim == 2 and a.t().is_contiguous() and len(b) > FEW and len(a) < b.shape[1]
    is_in_order = (a.is_contiguous() or is_outer) and (b.is_contiguous() or b.t().is_contiguous())
    return is_in_order and a.shape[-1] == len(b)  # others are told of by MKL


def _num_parts(rows: Tensor, matrix: Tensor) -> int:
    """In how many parts of equal size the columns of a matrix are multiplied."""
    is_slow = rows.device.type == "cpu" and rows.dtype in DTYPES and torch.backends.mkl.is_available()
    if not is_slow or not 0 < len(rows) <= FEW or matrix.numel() < WORTH_PARTS:
        return 1
    most = max(torch.get_num_threads(), 2 if len(rows) <= FEWEST else 1)
    return next((parts for parts in range(most, 1, -1) if matrix.shape[1] % parts == 0), 1)
