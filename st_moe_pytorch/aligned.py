"""Linear layers whose hidden units stand in rows of aligned length on CPU.

A matrix product takes up to a third longer where the rows of its result do not begin on cache lines, as those of
`Expert` do not unless its number of hidden units happens to be a multiple of 16.
"""

# pyright: reportIncompatibleMethodOverride=false

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from st_moe_pytorch.checks import can_be_looked_at
from st_moe_pytorch.compat import is_derived_forward, may_be_derived, watches_modules, with_known_signature

CACHE_LINE = 64  # bytes
WORTH_ALIGNING = 2**17  # numbers of the input; of fewer, products take as long either way


def may_align(x: Tensor) -> bool:
    """Whether plain linear layers of x (..., i) may be computed by `aligned_linear` instead of called, and gain."""
    is_large = x.numel() >= WORTH_ALIGNING and x.dtype in (torch.float32, torch.float64)
    is_plain = is_large and can_be_looked_at(x) and not torch.is_autocast_enabled("cpu")
    return is_plain and not is_derived_forward() and not watches_modules()


def aligned_linear(x: Tensor, linear: nn.Linear, to_hidden: bool) -> Tensor:
    """``linear(x)`` of x (..., i), with the hidden units or their gradients in aligned rows.

    Aligned are the results (..., o) if those are the hidden units, or else the gradients of x.
    """
    compute = _Linear.apply if may_be_derived(x, *linear.parameters()) else _Linear.forward
    return compute(x, linear.weight, linear.bias, to_hidden)


@with_known_signature
class _Linear(Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, to_hidden: bool) -> Tensor:
        return _product(x, weight.t(), bias, to_hidden)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.to_hidden = inputs[3]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        (x, weight), (of_x, of_weight, of_bias, _) = ctx.saved_tensors, ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1])
        dx = _product(grad, weight, None, not ctx.to_hidden) if of_x else None
        dweight = rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None
        return dx, dweight, rows.sum(0) if of_bias else None, None


def _product(a: Tensor, b: Tensor, bias: Tensor | None, is_aligned: bool) -> Tensor:
    """``a @ b + bias`` of a (..., i) and b (i o)."""
    rows, width, y = a.reshape(-1, a.shape[-1]), b.shape[1], None
    if is_aligned and not may_be_derived(a, b):
        y = a.new_empty(len(rows), width + -width % (CACHE_LINE // a.element_size()))[:, :width]
    y = torch.mm(rows, b, out=y) if bias is None else torch.addmm(bias, rows, b, out=y)
    return y.view(*a.shape[:-1], width)
