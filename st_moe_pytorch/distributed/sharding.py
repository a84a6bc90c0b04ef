"""Expert parallelism for whole models: which parameters live where, and what has to know it. Axes: e experts, r ranks.

Let R ranks run the same model, each on tokens of its own with a loss L_r. Then all gradients are those of the mean of
L_r over ranks, as if one process had run each rank's tokens through the whole model: under `data_parallel`, and with
experts sharded or not. Every rank has to run every forward and every backward, on no tokens if it has none.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar
from uuid import uuid4
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from st_moe_pytorch.distributed.agreement import gather_objects, require_agreement
from st_moe_pytorch.distributed.collectives import Channel, group_name
from st_moe_pytorch.distributed.compat import DeviceMesh, ProcessGroup, leave_out_of_ddp, timeout_of, without_wrappers
from st_moe_pytorch.distributed.exchange import ExpertParallel
from st_moe_pytorch.distributed.placement import Placement
from st_moe_pytorch.distributed.shardable import Shardable
from st_moe_pytorch.distributed.strategies import Strategy, check_strategy, strategy_name

M = TypeVar("M", bound=nn.Module)

# one of the same ranks for each default group that experts talk in
DDP_GROUPS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def shard_experts(
    model: M,
    process_group_or_mesh: ProcessGroup | DeviceMesh | None = None,
    strategy: str | Strategy = "all_to_all",
    *,
    equal_shapes: bool = False,
) -> M:
    """Keep on each rank, in place, only the experts that it owns, under their global names.

    All of them start as they are on rank 0.

    process_group_or_mesh: the ranks to spread experts over, this one among them; None is all of them. In a DeviceMesh
        of two dimensions, the experts are spread over the second one and replicated over the first, and gradients are
        averaged over both.
    strategy: how rows travel, "all_to_all", "all_gather" or a `Strategy` of your own.
    equal_shapes: a promise that in each forward, all ranks have tokens of one shape and dtype, record gradients or do
        not, and get results of one dtype from their experts. Nothing is agreed on then, so that no host waits for its
        device: all slots of all experts travel, the empty ones too. A layer with as many slots as tokens, such as one
        that drops nothing, raises ValueError; where the promise is broken, ranks wait for each other until the timeout
        of their process group, or fail in its collectives.

    Works on the meta device too, where nothing is copied: load a checkpoint afterwards, so that the copies of a cut
    expert are equal. A parameter that several experts have in common gets its gradient from all of them, whatever their
    ranks.

    Nothing is changed before all ranks have agreed. Raises on all of them ValueError for a model without experts, with
    sharded ones, with experts inside experts, or with a parameter that is in experts and elsewhere; RuntimeError
    without a process group, and if the models differ.
    """
    check_strategy(strategy)
    groups = group_names(process_group_or_mesh)
    agreed = Channel("shard_experts", groups[0])
    layers = dict(_shardable(model))
    problem = _problem_with(model, layers)
    tensors = {} if problem else {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    loaded = " and ".join(sorted({"on the meta device" if t.is_meta else "loaded" for t in tensors.values()}))
    entries = {"layer": agreed.layer, "problem": problem or "none", "strategy": strategy_name(strategy)}
    entries["equal_shapes"] = str(equal_shapes)
    entries["weights (to be loaded before sharding on all ranks, or afterwards on all)"] = loaded
    entries |= {name: f"{str(t.dtype).removeprefix('torch.')} {tuple(t.shape)}" for name, t in tensors.items()}
    require_agreement(entries, agreed)
    if problem is not None:
        raise ValueError(problem)
    number = gather_objects(uuid4().hex, agreed)[0]
    parallels = {}
    for name, layer in layers.items():
        channel, *data_parallel = (Channel(name or type(layer).__name__, group) for group in groups)
        placement = Placement(layer.num_experts, channel.size)
        ties = ties_of(layer.experts, placement)
        parallels[name] = ExpertParallel(
            channel, placement, strategy, True, *data_parallel, ties=ties, model=number, equal_shapes=equal_shapes
        )
    for name, layer in layers.items():
        parallel = parallels[name]
        copy_from_first_rank(layer.experts, *filter(None, (parallel.data_parallel, parallel.channel)))
    for name, layer in layers.items():
        layer.shard(parallels[name])
    return model


def _shardable(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, Shardable]]:
    for name, module in model.named_modules(remove_duplicate=remove_duplicate):
        if isinstance(module, Shardable):
            yield name, module


def _problem_with(model: nn.Module, layers: Mapping[str, Shardable]) -> str | None:
    """Why a model cannot be sharded, if it cannot."""
    if not layers:
        return f"model must contain experts, got {type(model).__name__} without any"
    if done := [name for name, layer in layers.items() if layer.parallel is not None]:
        return f"model must have its experts unsharded, but {', '.join(done) or 'it'} was sharded before"
    inside = {name: f"{name}.experts.".removeprefix(".") for name in layers}
    for inner in layers:
        if outer := [name or "the model" for name, prefix in inside.items() if inner.startswith(prefix)]:
            why = "whose ranks would wait for each other"
            return f"model must not have experts inside experts, {why}, but {inner} is inside {outer[0]}"
    # the experts that have each parameter, by layer, with the number of experts there, on which their ranks depend
    holders: dict[nn.Parameter, dict[str, tuple[int, set[int]]]] = {}
    for name, layer in layers.items():
        for number, expert in enumerate(layer.experts):
            for parameter in expert.parameters():
                holders.setdefault(parameter, {}).setdefault(name, (layer.num_experts, set()))[1].add(number)
    prefixes = tuple(_prefix(name) for name, _ in _shardable(model, remove_duplicate=False))
    for parameter, names in _names_by_parameter(model).items():
        if parameter not in holders:
            continue
        if not all(name.startswith(prefixes) for name in names):
            why = "where it is averaged otherwise"
            return f"model must not have a parameter in experts and elsewhere, {why}: {' is '.join(names)}"
        first, *others = holders[parameter].values()
        if any(other != first for other in others):
            wanted = "the same ones under the same numbers"
            return f"layers that have experts in common must have {wanted}, but {' is '.join(names)}"
    return None


def _prefix(layer: str) -> str:
    """How the names of all parameters of a layer's experts start."""
    return without_wrappers(f"{layer}.experts.".removeprefix("."))


def _names_by_parameter(module: nn.Module) -> dict[nn.Parameter, list[str]]:
    names: dict[nn.Parameter, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(without_wrappers(name))
    return names


def ties_of(experts: nn.ModuleList, placement: Placement) -> dict[str, tuple[str, tuple[int, ...]]]:
    """For every name of a parameter that experts of several ranks share: the first of these names, and the ranks."""
    found = {}
    for same in _names_by_parameter(experts).values():
        numbers = {int(name.split(".")[0]) for name in same}
        ranks = sorted({rank for number in numbers for rank in placement.holders_of(number)})
        if len(numbers) > 1 and len(ranks) > 1:
            found |= dict.fromkeys(same, (same[0], tuple(ranks)))
    return found


def sharded_layers(model: nn.Module) -> dict[str, tuple[nn.ModuleList, ExpertParallel]]:
    """The experts that are sharded, and how, by the names of their layer, of which it may have several."""
    layers = _shardable(model, remove_duplicate=False)
    return {name: (layer.experts, layer.parallel) for name, layer in layers if layer.parallel is not None}


def sharded_parameters(model: nn.Module) -> set[nn.Parameter]:
    """The parameters of sharded experts, which nothing else may shard or average.

    With FSDP: ``fully_shard(model, ignored_params=...)``.
    """
    return {parameter for experts, _ in sharded_layers(model).values() for parameter in experts.parameters()}


def data_parallel(
    model: nn.Module, process_group: ProcessGroup | None = None, **options: Any
) -> DistributedDataParallel:
    """The model in DistributedDataParallel, which averages the gradients of all but sharded experts over the ranks.

    process_group: all ranks that have tokens, so with a mesh not one of its dimensions. By default a group of all ranks
        that experts do not talk in: ranks that use different parts of a model average their gradients at different
        moments, between other exchanges of experts. So give another group than to `shard_experts`.
    options: as of DistributedDataParallel.

    Raises ValueError if gradients of experts come from another number of ranks, and where process_group is a mesh or
    lacks this rank.
    """
    group_name(process_group)
    ranks = dist.get_world_size(process_group)
    ignored = []
    for name, (experts, parallel) in (layers := sharded_layers(model)).items():
        if parallel.num_ranks != ranks:
            raise ValueError(
                f"{name} has its experts on {parallel.num_ranks} ranks, but process_group has {ranks}: "
                "to replicate experts, give shard_experts a mesh of shape (replicas, ranks of experts)"
            )
        tensors = (*experts.named_parameters(remove_duplicate=False), *experts.named_buffers(remove_duplicate=False))
        ignored += [f"{name}.experts.{key}".removeprefix(".") for key, _ in tensors]
    # DDP asks for both, and a module around the model may change the latter
    sharded = sharded_parameters(model)
    ignored += [name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter in sharded]
    leave_out_of_ddp(model, ignored)
    channels = (channel for _, parallel in layers.values() for channel in (parallel.channel, parallel.data_parallel))
    if process_group is None and any(channel and channel.group is dist.group.WORLD for channel in channels):
        world: Any = dist.group.WORLD
        if world not in DDP_GROUPS:
            DDP_GROUPS[world] = dist.new_group(timeout=timeout_of(world))
        process_group = DDP_GROUPS[world]
    return DistributedDataParallel(model, process_group=process_group, **options)


@torch.no_grad()
def clip_grad_norm_(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm, over the whole model, is at most max_norm.

    Returns the norm before, 0-d float64, the same on every rank. Each parameter counts once, however many ranks and
    layers hold it, whole or in pieces of FSDP2.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, not its parameters as in torch.nn.utils, got {type(model).__name__}")
    if not max_norm >= 0:
        raise ValueError(f"max_norm must be 0 or more, got {max_norm}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise ValueError("model must be in fully_shard (FSDP2), not FullyShardedDataParallel, whose pieces are flat")
    sharded = sharded_parameters(model)
    dense = [parameter for parameter in model.parameters() if parameter not in sharded]
    square = _square_norm(dense)
    by_channel: dict[Channel, dict[nn.Parameter, None]] = {}
    for experts, parallel in sharded_layers(model).values():
        channel = parallel.channel._replace(layer="clip_grad_norm_")
        counted = by_channel.setdefault(channel, {})
        for number in parallel.experts:
            for name, parameter in experts[number].named_parameters():
                _, holders = parallel.holding(number, name)
                if holders[0] == channel.rank:
                    counted[parameter] = None
    for channel, parameters in by_channel.items():
        # on the device of the experts, also where this rank counts none of them
        of_experts = _square_norm(parameters).to(next(iter(sharded)).device)
        channel.call(dist.all_reduce, of_experts)
        square = square.to(of_experts.device) + of_experts
    norm = square.sqrt()
    for parameters in (*_by_mesh(dense), *_by_mesh(sharded)):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def _by_mesh(parameters: Iterable[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Those with gradients, apart by the mesh that FSDP has put them on, since torch computes on one at a time."""
    found: dict[Any, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            found.setdefault(getattr(parameter.grad, "device_mesh", None), []).append(parameter)
    return list(found.values())


def _square_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Sum of the squares of all gradients, 0-d float64, of whole ones where FSDP holds pieces of them."""
    square = torch.zeros((), dtype=torch.float64)
    for part in _by_mesh(parameters):
        gradients: list[Any] = [parameter.grad for parameter in part]
        # a half type's own norm in float32 stands for it
        wide = [g if g.dtype.itemsize > 2 else torch.linalg.vector_norm(g, dtype=torch.float32) for g in gradients]
        norm = _whole(nn.utils.get_total_norm(wide)).double()
        square = square.to(norm.device) + norm.square()
    return square


def _whole(t: Any) -> Any:
    """A tensor, or what FSDP holds pieces of, whole."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


@torch.no_grad()
def full_state_dict(model: nn.Module) -> dict[str, Any]:
    """The state_dict of the unsharded model, on every rank, which needs the memory for it.

    A sharded model loads it too, strictly. What FSDP2 holds is a DTensor in it, but for experts of other ranks.

    Every rank has to call it. For models that fit no rank, ``torch.distributed.checkpoint`` saves each rank's part.
    """
    state = model.state_dict()
    for name, (_, parallel) in sharded_layers(model).items():
        mine = {key: _whole(t) for key, t in state.items() if without_wrappers(key).startswith(_prefix(name))}
        for theirs in gather_objects(mine, parallel.channel):
            state.update({key: t for key, t in theirs.items() if key not in state})
    return state


def group_names(where: ProcessGroup | DeviceMesh | None) -> list[str | None]:
    """Names of the group that experts are spread over and, for a 2-D mesh, of the one they are replicated over."""
    ranks: Any = where
    if not hasattr(ranks, "mesh_dim_names"):
        return [group_name(ranks)]
    if ranks.ndim > 2:
        raise ValueError(f"process_group_or_mesh must have 1 or 2 dimensions, (replicas, ranks), got {where}")
    return [ranks.get_group(dimension).group_name for dimension in reversed(range(ranks.ndim))]


@torch.no_grad()
def copy_from_first_rank(module: nn.Module, *channels: Channel) -> None:
    for tensor in [*module.parameters(), *module.buffers()]:
        for channel in channels:
            if not tensor.is_meta:
                channel.call(dist.broadcast, tensor, group_src=0)
