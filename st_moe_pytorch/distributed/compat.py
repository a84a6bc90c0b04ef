"""Names of torch that are not public and concern several ranks, each in one function.

A test of each fails when it changes.
"""

import re
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
else:
    ProcessGroup = DeviceMesh = Any  # absent from builds of torch without distributed


def without_wrappers(name: str) -> str:
    """A name of a parameter or module without those of modules that checkpoint or compile another one.

    These are in the names of modules, and in those of parameters and states or not, as each wrapper likes.
    """
    return re.sub(r"\b_(checkpoint_wrapped_module|orig_mod|fsdp_wrapped_module)\.", "", name)


def is_reentrant_checkpoint(node: Any) -> bool:
    """Whether an autograd node is a forward that reentrant activation checkpointing runs again, in its own graph."""
    return node.name() == "CheckpointFunctionBackward"


def group_named(name: str) -> ProcessGroup:
    """The process group of this name. Raises RuntimeError where there is none, as after it was destroyed."""
    return torch.distributed.distributed_c10d._resolve_process_group(name)  # pyright: ignore


def timeout_of(group: Any) -> timedelta | None:
    """How long a collective of the group waits, which a new group does not take over; None if its backend hides it."""
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, RuntimeError):
        return None


def leave_out_of_ddp(model: nn.Module, names: Sequence[str]) -> None:
    """Have DistributedDataParallel ignore these parameters and buffers of a model, and those it was told of before."""
    names = sorted({*names, *getattr(model, "_ddp_params_and_buffers_to_ignore", ())})
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def is_managed_by_ddp(parameter: nn.Parameter | None) -> bool:
    """Whether the DistributedDataParallel whose forward is running averages this parameter."""
    active: Any = DistributedDataParallel._active_ddp_module
    return active is not None and any(managed is parameter for managed in active._module_parameters)


def ranks_of_fsdp(parameters: Iterable[nn.Parameter]) -> set[int]:
    """The ranks that `fully_shard` spreads any of these parameters over, also while a forward has them whole."""
    from torch.distributed._composable_state import _module_state_mapping

    # every forward asks, so nobody's parameters are walked through where FSDP2 has none
    mine = set(parameters) if _module_state_mapping else set()
    meshes = {getattr(parameter, "device_mesh", None) for parameter in mine}
    for state in list(_module_state_mapping.values()):
        for group in getattr(state(), "_fsdp_param_groups", ()):
            if group.is_unsharded and any(held._unsharded_param in mine for held in group.fsdp_params):
                meshes.add(group.mesh_info.mesh)
    return {rank for mesh in meshes if mesh is not None for rank in mesh.mesh.flatten().tolist()}
