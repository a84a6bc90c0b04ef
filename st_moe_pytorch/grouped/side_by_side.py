"""Parameters of experts side by side in memory: one tensor to a kernel that reads them all, and to the graph.

Each stays a parameter of its own module. Axes: e experts, t rows.
"""

# pyright: reportIncompatibleMethodOverride=false

from collections.abc import Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.autograd import Function

from st_moe_pytorch.checks import is_blind
from st_moe_pytorch.compat import is_lifted, may_be_derived, with_known_signature

ALIGNMENT = 8  # numbers of two bytes in the 16 that strides of CUDA's kernel must be multiples of

STACKS: WeakValueDictionary[int, Tensor] = WeakValueDictionary()
"""Tensors of parameters that stand side by side, by address. Each lives as long as the memory of any of them."""


def together(rows: Tensor, *lists: Sequence[Tensor]) -> tuple[Tensor, *tuple[Sequence[Tensor], ...]]:
    """Rows and lists of the experts' parameters, in place of each list its one tensor if all stand side by side.

    What is one tensor to the graph costs the host as much time as one expert.
    """
    given = [tensors for tensors in lists if tensors]
    if is_blind(rows) or is_lifted() or len(given[0]) < 2:
        return rows, *lists
    stacks = [stack for stack in map(side_by_side, given) if stack is not None]
    if len(stacks) < len(given):
        return rows, *lists
    if may_be_derived(rows, *(parameters := [t for tensors in given for t in tensors])):
        rows, *joined = _Together.apply(rows, stacks, *parameters)
        trained = [any(t.requires_grad for t in tensors) for tensors in given]  # no gradients for frozen ones
        stacks = [mine if has_grad else own for mine, own, has_grad in zip(joined, stacks, trained, strict=True)]
    each = iter(stacks)
    return rows, *([next(each)] if tensors else [] for tensors in lists)


@with_known_signature
class _Together(Function):
    """Tensors as functions of the parameters that stand in them; rows, as they are, see that these do not change."""

    @staticmethod
    def forward(rows: Tensor, stacks: Sequence[Tensor], *parameters: Tensor) -> tuple[Tensor, ...]:
        return rows.view_as(rows), *(stack.detach() for stack in stacks)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*inputs[2:])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, *dstacks: Tensor | None) -> tuple[Tensor | None, ...]:
        e = len(ctx.saved_tensors) // len(dstacks)  # a look at them tells whether they have changed
        return drows, None, *(t for dstack in dstacks for t in ([None] * e if dstack is None else dstack.unbind()))


def side_by_side(tensors: Sequence[Tensor]) -> Tensor | None:
    """All of the tensors as one (e ...), without a copy, if `put_side_by_side` has put these, and no others, there."""
    stack = STACKS.get(tensors[0].data_ptr())
    if stack is None or stack.dtype != tensors[0].dtype or stack.shape != (len(tensors), *tensors[0].shape):
        return None
    places = range(stack.data_ptr(), stack.data_ptr() + stack.nbytes, tensors[0].nbytes)
    is_there = all(t.is_contiguous() and t.data_ptr() == at for t, at in zip(tensors, places, strict=True))
    return stack if is_there else None


@torch.inference_mode(False)
@torch.no_grad()
def put_side_by_side(parameters: Sequence[nn.Parameter]) -> None:
    """Move parameters of one shape, dtype and device into one tensor, if the kernel can read it.

    Each gets a storage of its own there, since those that share one would pass for tied parameters.
    """
    is_aligned = all(size % ALIGNMENT == 0 for size in parameters[0].shape)
    if is_aligned and len(set(parameters)) == len(parameters) and side_by_side(parameters) is None:
        stack = torch.stack(list(parameters))
        STACKS[stack.data_ptr()] = stack
        for parameter, place in zip(parameters, stack.unbind(), strict=True):
            parameter.data = torch.from_dlpack(place)
