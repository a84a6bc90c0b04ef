"""Linear layers whose hidden units stand in rows of aligned length on CPU.

A matrix product takes up to a third longer where the rows of its result do not begin on cache lines, as those of
`Expert` do not unless its number of hidden units happens to be a multiple of 16.
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
WORTH_ALIGNING = 2**17  # numbers of the input; of fewer, products take as long either way


def may_align(x: Tensor) -> bool:
    """Whether plain linear layers of x (..., i) may be computed by `aligned_linear` instead of called, and gain."""
    # first of all, since compilers would guard on the number of tokens
    if not can_be_looked_at(x) or torch.is_autocast_enabled("cpu") or is_watched():
        return False
    return x.dtype in (torch.float32, torch.float64) and x.layout == torch.strided and x.numel() >= WORTH_ALIGNING


def aligned_linear(x: Tensor, linear: nn.Linear, to_hidden: bool) -> Tensor:
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
    y = empty_rows(a, *shape) if is_aligned else a.new_empty(shape)
    rows, out = a.reshape(-1, a.shape[-1]), y.view(-1, shape[-1])
    _ = torch.mm(rows, b, out=out) if bias is None else torch.addmm(bias, rows, b, out=out)
    return y
