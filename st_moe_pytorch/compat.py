"""Names of torch, and one of transformers, that are not public, each in one function. A test of each fails when it changes."""

from collections.abc import Callable, Sequence
from functools import partial
from inspect import signature
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C._functorch import TransformType, get_interpreter_stack
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree
from torch.utils.checkpoint import _StopRecomputationError


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_transformed() -> bool:
    """Whether a function of torch.func runs, under which tensors stand for many."""
    return torch._C._are_functorch_transforms_active()


def is_batched() -> bool:
    """Whether torch.func.vmap runs, under which the values of tensors cannot be read."""
    if torch.compiler.is_compiling():
        return False
    return any(level.key() == TransformType.Vmap for level in get_interpreter_stack() or ())


def is_fake(t: Tensor) -> bool:
    """Whether a tensor has no values though it is not on the meta device, as where shapes are tried out."""
    return isinstance(t, FakeTensor)


def may_be_derived(*tensors: Tensor | float) -> bool:
    """Whether a derivative of what is computed from these tensors may be asked for, of reverse or of forward mode, or many at a time."""
    if torch.compiler.is_compiling():  # that may be, and dynamo does not trace what follows
        return True
    if is_transformed() or torch.autograd.forward_ad._current_level >= 0:
        return True
    given = [t for t in tensors if isinstance(t, Tensor)]
    if torch.is_grad_enabled() and any(t.requires_grad for t in given):
        return True
    return any(map(torch._C._functorch.is_legacy_batchedtensor, given))  # pyright: ignore[reportAttributeAccessIssue]


def ends_recomputation(error: Exception) -> bool:
    """Whether this is how activation checkpointing stops a forward that it runs again, once it has what it needs."""
    return isinstance(error, _StopRecomputationError)


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether a node of a graph of gradients is a forward that reentrant activation checkpointing runs again, in a graph of its own."""
    return node.name() == "CheckpointFunctionBackward"


if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
else:
    ProcessGroup = DeviceMesh = Any  # absent from builds of torch without distributed

F = TypeVar("F", bound=type[Function])


def with_known_signature(function: F) -> F:
    """Class decorator for autograd functions: torch looks up the signature of forward in every call, as long as a small product takes."""
    function.forward.__signature__ = signature(function.forward)
    return function


def has_hooks(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward."""
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(map(len, hooks))


def name_exported_tuple(cls: type, name: str) -> None:
    """Let torch.export.save write results of this NamedTuple, under this name."""
    _pytree._register_namedtuple(cls, serialized_type_name=name)


def eager(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, run in eager mode where it is called by code that torch.compile traces; with fullgraph=True that is an error."""
    if not torch.compiler.is_compiling():
        return function
    torch._dynamo.graph_break(msg="tokens go to other ranks, in numbers that depend on data: compile without fullgraph=True")
    return torch.compiler.disable(function)


def group_named(name: str) -> ProcessGroup:
    """The process group of this name. Raises RuntimeError where there is none, as after it was destroyed."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # pyright: ignore


def initialize_with(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have a model of transformers, which initialises what a checkpoint lacks module by module, call reset_parameters of these kinds."""
    if hasattr(type(model), "_init_weights"):
        vars(model)["_init_weights"] = partial(_init_weights, model, kinds)  # a copy of the model gets one of its own


def _init_weights(model: nn.Module, kinds: tuple[type[nn.Module], ...], module: nn.Module) -> None:
    if isinstance(module, kinds):
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
    else:
        cls: Any = type(model)
        cls._init_weights(model, module)


def leave_out_of_ddp(model: nn.Module, names: Sequence[str]) -> None:
    """Have DistributedDataParallel pass over these parameters and buffers of a model, and over those that it was told of before."""
    names = sorted({*names, *getattr(model, "_ddp_params_and_buffers_to_ignore", ())})
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def is_managed_by_ddp(parameter: nn.Parameter | None) -> bool:
    """Whether the DistributedDataParallel whose forward is running averages this parameter."""
    active: Any = DistributedDataParallel._active_ddp_module
    return active is not None and any(managed is parameter for managed in active._module_parameters)
