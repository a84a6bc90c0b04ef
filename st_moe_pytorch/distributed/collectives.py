"""Collectives that autograd can differentiate; each states its adjoint. Axes: r ranks, t rows, d width.

Built on the one collective that every backend has for uneven sizes: gloo gathers, reduces and scatters equal sizes
only, and its all-to-all exists for single tensors only.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from st_moe_pytorch.distributed.compat import ProcessGroup, group_named, is_reentrant_checkpoint, ranks_of_fsdp


class Channel(NamedTuple):
    """A process group and the layer that talks in it.

    The group goes by its name, since a module with a group cannot be copied or saved.
    """

    layer: str
    group_name: str | None = None

    @property
    def group(self) -> ProcessGroup:
        """The process group, the default one for no name. Raises RuntimeError where there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError(
                f"{self.layer} works over several ranks, but there is no process group: call "
                "torch.distributed.init_process_group first"
            )
        if self.group_name is None:
            return dist.group.WORLD  # pyright: ignore[reportReturnType] - there is one, where it is initialised
        try:
            return group_named(self.group_name)
        except RuntimeError as error:
            raise RuntimeError(
                f"{self.layer}: its process group {self.group_name!r} is gone, as after destroy_process_group: "
                "build the model anew and shard it over a group that exists"
            ) from error

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def call(self, collective: Callable[..., Any], *args: Any, **kwargs: Any) -> None:
        """Run a collective of torch.distributed in the group; its errors, such as a timeout, name layer and rank."""
        try:
            collective(*args, group=self.group, **kwargs)
        except RuntimeError as error:
            action = f"{collective.__name__} of rank {self.rank} of {self.size}"
            raise RuntimeError(
                f"{self.layer}: {action} failed, as it does where a rank died, is late or left out a pass: {error}"
            ) from error


def group_name(process_group: ProcessGroup | None) -> str | None:
    """None for all ranks. Raises ValueError for a mesh, or for a group that this rank is not in."""
    if process_group is not None and not hasattr(process_group, "group_name"):
        raise ValueError(f"process_group must be one that this rank is in, like mesh.get_group(), got {process_group}")
    return None if process_group is None else process_group.group_name


def integers(values: Iterable[int], device: torch.device) -> Tensor:
    """Numbers of the host in int64 on a device, for which the host does not wait."""
    numbers = torch.tensor(list(values), dtype=torch.int64, pin_memory=device.type == "cuda")
    return numbers.to(device, non_blocking=True)


def all_to_all(x: Tensor, sent: Sequence[int], received: Sequence[int], channel: Channel) -> Tensor:
    """Send ``sent[rank]`` consecutive rows of x (t ...) to each rank -> the rows received from each, by rank.

    Linear in the rows of all ranks; its adjoint sends the gradients of rows back where they came from: itself, splits
    swapped.
    """
    return _AllToAll.apply(x, list(sent), list(received), channel)


class _AllToAll(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], channel: Channel) -> Tensor:
        ctx.sent, ctx.received, ctx.channel = sent, received, channel
        return _exchange(x, sent, received, channel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all(grads[0], ctx.received, ctx.sent, ctx.channel), None, None, None


def all_gather(x: Tensor, sizes: Sequence[int], channel: Channel) -> Tensor:
    """Every rank's rows x (t ...), by rank, on every rank; ``sizes[rank]`` rows each.

    Its adjoint sums over ranks what each has of the gradient for a rank's rows: a reduce-scatter.
    """
    return _AllGather.apply(x, list(sizes), channel)


class _AllGather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sizes: list[int], channel: Channel) -> Tensor:
        ctx.sizes, ctx.channel = sizes, channel
        return _exchange(torch.cat([x] * channel.size), [x.shape[0]] * channel.size, sizes, channel)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        rows, ranks = ctx.sizes[ctx.channel.rank], ctx.channel.size
        parts = all_to_all(grads[0], ctx.sizes, [rows] * ranks, ctx.channel)
        return parts.view(ranks, rows, *parts.shape[1:]).sum(dim=0), None, None


def used_for_nothing(y: Tensor, *modules: nn.Module) -> Tensor:
    """y itself, and a gradient of zero for each parameter of the modules."""
    return _UsedForNothing.apply(y, *(p for module in modules for p in module.parameters() if p.requires_grad))


class _UsedForNothing(Function):
    @staticmethod
    def forward(y: Tensor, *parameters: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return grads[0], *map(torch.zeros_like, ctx.saved_tensors)


def scale_gradient(x: Tensor, factor: float, layer: str) -> Tensor:
    """x itself; its adjoint multiplies the gradient by factor.

    A second derivative raises RuntimeError with the layer's name.
    """
    return _ScaleGradient.apply(x, factor, layer)


class _ScaleGradient(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float, layer: str) -> Tensor:
        ctx.factor, ctx.layer = factor, layer
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _FirstDerivative.apply(grads[0] * ctx.factor, ctx.layer), None, None


class _FirstDerivative(Function):
    """A gradient that may not be differentiated again.

    Parameters' gradients are sums over ranks, which no rank's own loss is made of.
    """

    @staticmethod
    def forward(ctx: Any, grad: Tensor, layer: str) -> Tensor:
        ctx.layer = layer
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        raise RuntimeError(
            f"{ctx.layer}: second derivatives through experts on several "
            "ranks are not supported; run it on one rank for them"
        )


def join_replicas(
    rows: Tensor,
    parameters: Sequence[Tensor],
    holders: Sequence[Sequence[int]],
    channel: Channel,
    data_parallel: Channel | None,
) -> tuple[Tensor, ...]:
    """Rows and parameters themselves, each parameter being a copy of what the ranks ``holders[i]`` of the channel hold.

    Its adjoint lets the gradient of the rows pass and sums that of a parameter over the ranks of ``data_parallel``,
    then over its holders in rank order, so that all copies get the same bits. Rows come along because a rank's last
    gradient of an expert must be known before the sums, and these come before the rows' gradients travel on: the same
    order of collectives on all ranks.
    """
    return _JoinReplicas.apply(list(holders), channel, data_parallel, rows, *parameters)


class _JoinReplicas(Function):
    @staticmethod
    def forward(
        ctx: Any, holders: list[Sequence[int]], channel: Channel, data_parallel: Channel | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.holders, ctx.channel, ctx.data_parallel = holders, channel, data_parallel
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows, *parameters = grads
        if ctx.data_parallel is not None:
            parameters = [grad.clone(memory_format=torch.contiguous_format) for grad in parameters]
            for grad in parameters:
                ctx.data_parallel.call(dist.all_reduce, grad)
        return None, None, None, rows, *_sum_over_holders(parameters, ctx.holders, ctx.channel, rows.device)


def _sum_over_holders(
    grads: list[Tensor], holders: list[Sequence[int]], channel: Channel, device: torch.device
) -> list[Tensor]:
    """Each gradient summed over its holders in rank order.

    Every rank of the channel has to call, with gradients or without.
    """
    shared = [
        [i for i, ranks in enumerate(holders) if rank in ranks and len(ranks) > 1] for rank in range(channel.size)
    ]
    # as bytes, because the gradients that two ranks share may have another dtype than those that each has with a third
    wire = [grad.contiguous().flatten().view(torch.uint8) for grad in grads]
    parts = [wire[i] for indices in shared for i in indices]
    splits = [sum(wire[i].numel() for i in indices) for indices in shared]
    received = _exchange(torch.cat([torch.empty(0, dtype=torch.uint8, device=device), *parts]), splits, splits, channel)
    sums: dict[int, Tensor] = {}
    order = [i for indices in shared for i in indices]
    for i, part in zip(order, received.split([part.numel() for part in parts]), strict=True):
        # cloned, since a view as another dtype has to start at a multiple of its size
        grad = part.clone().view(grads[i].dtype).view(grads[i].shape)
        sums[i] = sums[i] + grad if i in sums else grad
    return [sums.get(i, grad) for i, grad in enumerate(grads)]


def _exchange(x: Tensor, sent: list[int], received: list[int], channel: Channel) -> Tensor:
    output = x.new_empty(sum(received), *x.shape[1:])
    channel.call(dist.all_to_all_single, output, x.contiguous(), received, sent)
    return output


def refuse_fsdp(experts: nn.Module, channel: Channel) -> None:
    """Raise RuntimeError where `fully_shard` takes the different experts of several ranks for pieces of the same."""
    ranks = ranks_of_fsdp(experts.parameters()) & set(dist.get_process_group_ranks(channel.group))
    if len(ranks) > 1:
        fix = "fully_shard(..., ignored_params=sharded_parameters(model)) leaves them out"
        raise RuntimeError(f"{channel.layer}: fully_shard has mixed the experts of ranks {sorted(ranks)}: {fix}")


def refuse_reentrant(name: str, y: Tensor, *inputs: Tensor) -> None:
    """Raise ValueError if an expert of several ranks, inputs -> y, is checkpointed by the kind that loses gradients."""
    nodes: list[Any] = [y.grad_fn]
    seen = {None, *(t.grad_fn for t in inputs)}
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        if is_reentrant_checkpoint(node):
            raise ValueError(
                f"{name}, which several ranks hold, must be checkpointed with use_reentrant=False: the "
                "other kind computes its gradients apart, where those of the other ranks cannot be added"
            )
        seen.add(node)
        nodes += [node for node, _ in node.next_functions]
