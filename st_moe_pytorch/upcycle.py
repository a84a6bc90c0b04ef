"""Between dense and sparse: copies of a trained feed-forward as experts (Komatsuzaki et al. 2022), and experts averaged into one."""

from collections.abc import Sequence
from copy import deepcopy

import torch
from torch import nn

from st_moe_pytorch.checks import check_positive


def dense_copies(ffn: nn.Module, num_experts: int, noise: float = 0.0) -> list[nn.Module]:
    """Experts that start as copies of a feed-forward, which stays as it is.

    noise: standard deviation of the noise that is added to every parameter of every copy, as a multiple of the parameter's own.
    """
    check_positive(num_experts=num_experts)
    if noise < 0:
        raise ValueError(f"noise must not be negative, got {noise}")
    copies = [deepcopy(ffn) for _ in range(num_experts)]
    if noise:
        with torch.no_grad():
            for parameter in (parameter for copy in copies for parameter in copy.parameters()):
                spread = parameter.std(correction=0)
                parameter.add_(torch.randn_like(parameter) * spread * noise)
    return copies


def average_experts(experts: Sequence[nn.Module] | nn.ModuleList) -> nn.Module:
    """One dense feed-forward from experts of one shape: a copy of the first, whose parameters and floating-point buffers are the means."""
    states = [expert.state_dict() for expert in experts]
    if not states:
        raise ValueError("experts must hold at least one module to average, got none")
    shapes = [{name: value.shape for name, value in state.items()} for state in states]
    if any(shape != shapes[0] for shape in shapes):
        different = next(number for number, shape in enumerate(shapes) if shape != shapes[0])
        raise ValueError(f"experts must have equal parameters to be averaged: expert {different} has others than expert 0")
    dense = deepcopy(experts[0])
    means = {
        name: torch.stack([state[name] for state in states]).mean(dim=0) if value.is_floating_point() else value
        for name, value in states[0].items()
    }
    dense.load_state_dict(means)
    return dense
