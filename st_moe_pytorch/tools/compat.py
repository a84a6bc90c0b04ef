"""Names of torch and others that are not public, each in one function. A test of each fails when it changes."""

from functools import partial
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree
from torch.utils.checkpoint import CheckpointFunction


def is_recomputing() -> bool:
    """Whether this forward runs inside a backward pass, as activation checkpointing does."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def is_in_reentrant_checkpoint() -> bool:
    """Whether torch's activation checkpointing runs this forward without gradients, to run it again in the backward."""
    return any(frame.f_code is CheckpointFunction.forward.__code__ for frame, _ in walk_stack(None))


def initialize_with(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> None:
    """Have a model of transformers call reset_parameters of these kinds of modules.

    It initialises what a checkpoint lacks module by module.
    """
    if hasattr(type(model), "_init_weights"):
        vars(model)["_init_weights"] = partial(_init_weights, model, kinds)  # a copy of the model gets one of its own


def _init_weights(model: nn.Module, kinds: tuple[type[nn.Module], ...], module: nn.Module) -> None:
    if isinstance(module, kinds):
        module.reset_parameters()  # pyright: ignore[reportCallIssue]
    else:
        cls: Any = type(model)
        cls._init_weights(model, module)


def tensors_in(values: Any) -> list[Tensor]:
    """Tensors in lists, tuples, dictionaries and what libraries register with torch, as transformers its outputs."""
    return [value for value in _pytree.tree_leaves(values) if isinstance(value, Tensor)]
