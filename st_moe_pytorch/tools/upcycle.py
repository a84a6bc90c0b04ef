"""Between dense and sparse: experts copied from a trained feed-forward (Komatsuzaki et al. 2022) or averaged to one."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from st_moe_pytorch.experts import Experts
from st_moe_pytorch.layers import dense_copies

__all__ = ["average_experts", "dense_copies"]


def average_experts(experts: Sequence[nn.Module] | nn.ModuleList | Experts) -> nn.Module:
    """One dense feed-forward from experts of one shape, their mean.

    It is a copy of the first, whose parameters and floating-point buffers are the means.

    experts: of a layer, ``moe.experts``, or a list of them. Raises ValueError for sharded ones, of which a rank has
        only some.
    """
    if isinstance(experts, Experts):
        experts = experts.experts
    if isinstance(experts, nn.ModuleList) and len(list(experts.children())) < len(experts):
        raise ValueError(
            "experts must all be on this rank to be averaged: load "
            "st_moe_pytorch.distributed.full_state_dict(model) into an unsharded model and average its experts"
        )
    states = [expert.state_dict() for expert in experts]
    if not states:
        raise ValueError("experts must hold at least one module to average, got none")
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        different = next(number for number, shape in enumerate(shapes) if shape != shapes[0])
        why = f"expert {different} has others than expert 0"
        raise ValueError(f"experts must have equal parameters to be averaged: {why}")
    dense = deepcopy(experts[0])
    means = {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }
    dense.load_state_dict(means)
    return dense
