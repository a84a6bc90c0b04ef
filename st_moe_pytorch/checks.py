"""Checks of what users pass in. Every error names the argument, its value and the fix; nothing is changed before it is raised."""

import math
from typing import SupportsFloat, SupportsIndex

import torch
from beartype import BeartypeConf, FrozenDict, beartype
from torch import Tensor, nn

NUMBERS = FrozenDict({int: SupportsIndex, float: SupportsFloat})  # numpy's are as good, and so are 0-d tensors
typechecked = beartype(conf=BeartypeConf(violation_param_type=TypeError, hint_overrides=NUMBERS))
"""Runtime type check for constructors. Forward methods stay unwrapped, so that they compile to one graph."""


def check_positive(**sizes: int | float | None) -> None:
    """Raise ValueError unless every named size is None or a finite number above zero."""
    for name, size in sizes.items():
        if size is not None and not 0 < size < math.inf:
            raise ValueError(f"{name} must be a positive number, got {size}")


def check_one_of(choices: tuple[str, ...], **names: str) -> None:
    """Raise ValueError unless every named value is one of the choices."""
    for name, value in names.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_noise(noise_gates: bool) -> None:
    """Raise ValueError for a tensor, which is a mask in the wrong place."""
    if isinstance(noise_gates, Tensor):
        shape = tuple(noise_gates.shape)
        raise ValueError(f"noise_gates must be a bool, got a tensor of shape {shape}: a mask is passed by name, mask=...")


def check_tokens(x: Tensor, dim: int, mask: Tensor | None = None, route_by: Tensor | None = None, draws: Tensor | None = None) -> None:
    """Raise ValueError unless x (..., d) are floating-point tokens of width dim, and what comes with them fits.

    mask (...) is boolean, route_by (..., d) of x's shape, draws (..., k) with as many axes; the gate knows the shape that it needs of them.
    """
    if not x.is_floating_point():
        raise ValueError(f"x must be a real floating-point tensor, got {x.dtype}: convert it, e.g. x.float()")
    if x.ndim < 2 or x.shape[-1] != dim:
        raise ValueError(f"x must have shape (batch, tokens, {dim}) or (tokens, {dim}), got {tuple(x.shape)}")
    if mask is not None and (mask.shape != x.shape[:-1] or mask.dtype != torch.bool):
        expected = f"a bool tensor of shape {tuple(x.shape[:-1])}, True for real tokens"
        raise ValueError(f"mask must be {expected}, got {mask.dtype} of shape {tuple(mask.shape)}")
    if route_by is not None and (route_by.shape != x.shape or not route_by.is_floating_point()):
        expected = f"a floating-point tensor of x's shape {tuple(x.shape)}"
        raise ValueError(f"route_by must be {expected}, got {route_by.dtype} of shape {tuple(route_by.shape)}")
    if draws is not None and draws.ndim != x.ndim:
        raise ValueError(f"draws must have x's shape {tuple(x.shape)} but for the last axis, the choices, got {tuple(draws.shape)}")


def is_overridden(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the module computes something else than cls does: another class or an assigned ``forward``."""
    return "forward" in vars(module) or type(module).forward is not cls.forward
