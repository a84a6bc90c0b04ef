"""Names that code written against st-moe-pytorch 0.1.8 imports from here. New code imports ``st_moe_pytorch``."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module as Module
from torch.nn import ModuleList as ModuleList

from st_moe_pytorch.distributed import AllGather as AllGather
from st_moe_pytorch.experts import Experts as Experts
from st_moe_pytorch.gating import TopNGating as TopNGating
from st_moe_pytorch.layers import GEGLU as GEGLU
from st_moe_pytorch.layers import Expert as Expert
from st_moe_pytorch.layers import RMSNorm as RMSNorm
from st_moe_pytorch.moe import MixtureOfExpertsReturn as MixtureOfExpertsReturn
from st_moe_pytorch.moe import MoE as MoE
from st_moe_pytorch.moe import SparseMoEBlock as SparseMoEBlock


def exists(val: Any) -> bool:
    return val is not None


def default(val: Any, default: Any) -> Any:
    """val, or in place of None the default, called if it can be."""
    if val is not None:
        return val
    return default() if callable(default) else default


def cumsum_exclusive(t: Tensor, dim: int = -3) -> Tensor:
    """Sum of the entries before each one along ``dim``."""
    size = t.shape[dim]
    first = torch.zeros_like(t.narrow(dim, 0, min(size, 1)))
    return torch.cat((first, t.narrow(dim, 0, max(size - 1, 0))), dim).cumsum(dim)
