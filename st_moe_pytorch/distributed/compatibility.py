"""The helpers of st-moe-pytorch 0.1.8 under their names, with correct adjoints. Nothing in the package needs them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from st_moe_pytorch.distributed.collectives import Channel, all_gather

CHANNEL = Channel("all_gather_variable_dim")


def gather_sizes(t: Tensor, *, dim: int) -> Tensor:
    """Size of t along dim on each rank, (r) int64."""
    sizes = torch.empty(CHANNEL.size, dtype=torch.int64, device=t.device)
    CHANNEL.call(dist.all_gather_single, sizes, torch.tensor([t.shape[dim]], device=t.device))
    return sizes


def all_gather_variable_dim(t: Tensor, dim: int = 0, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The tensors t of all ranks, joined along dim, and their sizes (r) along it, which need not be equal.

    The gradient of t is the sum over ranks of the gradients of its part. t has to need a gradient on all ranks or on
    none.
    """
    sizes = gather_sizes(t, dim=dim) if sizes is None else sizes
    return all_gather(t.movedim(dim, 0), sizes.tolist(), CHANNEL).movedim(0, dim), sizes


class AllGather(nn.Module):
    """`all_gather_variable_dim` as a module."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return all_gather_variable_dim(x, self.dim, sizes)


def pad_dim_to(t: Tensor, length: int, dim: int = 0) -> Tensor:
    """t with zeros behind it up to length along dim."""
    shape = list(t.shape)
    shape[dim] = length - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim=dim)


def has_only_one_value(t: Tensor) -> Tensor:
    """Whether all entries of t (r) are equal, a 0-d bool."""
    return (t == t[0]).all()


def split_by_rank(x: Tensor | Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """This rank's part of x, one tensor per rank or a tensor (r ...), and all parts' sizes (r) along the first axis."""
    return x[CHANNEL.rank], torch.tensor([part.shape[0] for part in x], device=x[0].device)
