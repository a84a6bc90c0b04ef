"""Names of torch that are not public, each in one function. A test of each fails when it changes."""

from collections.abc import Callable, Sequence
from functools import cache, wraps
from inspect import signature
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.utils import _pytree
from torch.utils._triton import has_triton
from torch.utils.checkpoint import _StopRecomputationError


def is_transformed() -> bool:
    """Whether a function of torch.func runs, under which tensors stand for many."""
    return torch._C._are_functorch_transforms_active()


def is_lifted() -> bool:
    """Whether tensors stand for more than their values: under functions of torch.func and in forward mode."""
    return is_transformed() or is_forward_mode()


def is_forward_mode() -> bool:
    """Whether derivatives of forward mode may be on, also those of torch.func; in eager mode only."""
    return not torch.compiler.is_compiling() and torch.autograd.forward_ad._current_level >= 0


def is_batched() -> bool:
    """Whether torch.func.vmap runs, under which the values of tensors cannot be read."""
    if torch.compiler.is_compiling():
        return False
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


def is_fake(t: Tensor) -> bool:
    """Whether a tensor has no values though it is not on the meta device, as where shapes are tried out."""
    return isinstance(t, FakeTensor)


def may_be_derived(*tensors: Tensor | float | None) -> bool:
    """Whether results of these tensors may be differentiated, in reverse or forward mode, or many at a time."""
    if torch.compiler.is_compiling():  # that may be, and dynamo does not trace what follows
        return True
    if is_lifted():
        return True
    given = [t for t in tensors if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return True
    return any(map(torch._C._functorch.is_legacy_batchedtensor, given))  # pyright: ignore[reportAttributeAccessIssue]


WORTH_FUSING = 2**20  # numbers; of fewer, a kernel takes less time than finding the compiled code


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: the function, as few kernels where its first tensor is a large one on a GPU.

    That takes a GPU for which torch.compile has Triton. For functions of tensors that are called without a graph, as in
    `torch.autograd.Function`; elsewhere they run as they are written.
    """

    @wraps(function)
    def run(*inputs: Any) -> Any:
        if torch.compiler.is_compiling() or not is_fused(inputs[0]):
            return function(*inputs)
        return _compiled(function)(*(_with_fixed_widths(t) if isinstance(t, Tensor) else t for t in inputs))

    return run


def is_fused(t: Tensor) -> bool:
    """Whether a function of this tensor, and others, takes few kernels if it is `fused`, or in compiled code."""
    if torch.compiler.is_compiling():
        return t.device.type != "cpu"
    is_large = t.is_cuda and t.numel() >= WORTH_FUSING and not torch.is_grad_enabled()
    return is_large and not is_fake(t) and not may_be_derived(t) and has_triton()


def _with_fixed_widths(t: Tensor) -> Tensor:
    """To compile for its widths, but for any number of rows: divisions by what varies may double a kernel's time."""
    t = t.detach()
    for dim in range(1, t.ndim):
        torch._dynamo.mark_static(t, dim)
    return t


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


def ends_recomputation(error: Exception) -> bool:
    """Whether this is how activation checkpointing stops a forward that it runs again, once it has what it needs."""
    return isinstance(error, _StopRecomputationError)


F = TypeVar("F", bound=type[Function])


def with_known_signature(function: F) -> F:
    """Class decorator for autograd functions that stores the signature of their forward.

    Otherwise, torch works it out in every call, which takes as long as a small product.
    """
    function.forward.__signature__ = signature(function.forward)
    return function


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    if module._forward_hooks or module._forward_pre_hooks:
        return True
    return bool(module._backward_hooks or module._backward_pre_hooks)


def is_watched() -> bool:
    """Whether hooks of all modules or modes of operators are on, as of tracers, or what `is_lifted` tells."""
    is_on = nn.modules.module._has_any_global_hook() or torch._C._len_torch_dispatch_stack() > 0
    return bool(is_on) or is_lifted()


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of float32 by oneDNN, where the public function takes MKL. Not differentiable."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def copy_each(stack: Tensor, tensors: Sequence[Tensor]) -> None:
    """Write tensors into a stack of them, maybe of another dtype, in few kernels: torch.stack casts one by one."""
    if stack.dtype == tensors[0].dtype:
        torch.stack(list(tensors), out=stack)
    else:
        torch._foreach_copy_(stack.unbind(), list(tensors))  # pyright: ignore[reportPrivateImportUsage]


def apply_to_tensors(module: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool) -> None:
    """What every module does when it is moved or cast."""
    nn.Module._apply(module, function, recurse)


def contents(module: nn.Module) -> tuple[dict[str, nn.Module], dict[str, nn.Parameter | None]]:
    """A module's own modules and parameters by name, without the public methods' search for repeated ones."""
    return module._modules, module._parameters  # pyright: ignore[reportReturnType]


def fixed(number: float | None) -> float | None:
    """The number, which compiled code is made for: of one that has changed, torch.compile would make a variable.

    What members of sets are is always known to it.
    """
    (member,) = {number}
    return member


def name_exported_tuple(cls: type, name: str) -> None:
    """Let torch.export.save write results of this NamedTuple, under this name."""
    _pytree._register_namedtuple(cls, serialized_type_name=name)


def eager(
    function: Callable[..., Any], because: str = "tokens go to other ranks, in numbers that depend on data"
) -> Callable[..., Any]:
    """The function, run in eager mode where torch.compile traces its caller; with fullgraph=True that is an error."""
    if not torch.compiler.is_compiling():
        return function
    torch._dynamo.graph_break(msg=f"{because}: compile without fullgraph=True")
    return torch.compiler.disable(function)
