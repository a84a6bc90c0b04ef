"""Checks of what users pass in.

Every error names the argument, its value and the fix; nothing is changed before it is raised.
"""

import math
from collections.abc import Callable
from typing import Any, Literal, SupportsFloat, SupportsIndex, TypeVar, get_origin

import torch
from beartype import BeartypeConf, FrozenDict, beartype
from torch import Tensor, nn

from st_moe_pytorch.compat import is_fake, is_transformed

F = TypeVar("F", bound=Callable[..., Any])


def typechecked(function: F) -> F:
    """Runtime type check for constructors. Forward methods stay unwrapped, so that they compile to one graph."""

    # numpy's numbers are as good, and so are 0-d tensors; check_one_of tells which strings may be
    others: dict[Any, Any] = {int: SupportsIndex, float: SupportsFloat}
    others |= {hint: str for hint in function.__annotations__.values() if get_origin(hint) is Literal}
    return beartype(conf=BeartypeConf(violation_param_type=TypeError, hint_overrides=FrozenDict(others)))(function)


def check_positive(**sizes: int | float | None) -> None:
    """Raise ValueError unless every named size is None or a finite number above zero."""
    for name, size in sizes.items():
        if size is not None and not 0 < size < math.inf:
            raise ValueError(f"{name} must be a positive number, got {size}")


def check_counts(**counts: int | None) -> None:
    """Raise ValueError unless every named count is None or a positive whole number."""
    check_positive(**counts)
    for name, count in counts.items():
        if count is not None and not hasattr(count, "__index__"):
            raise ValueError(f"{name} must be a whole number, got {count}")


def check_finite(**numbers: float) -> None:
    """Raise ValueError unless every named number is finite.

    Tensors are taken at their word, since a look at them may wait for a device.
    """
    for name, number in numbers.items():
        if not isinstance(number, Tensor) and not -math.inf < number < math.inf:
            raise ValueError(f"{name} must be a finite number, got {number}")


def is_blind(t: Tensor) -> bool:
    """Whether nothing may depend on a tensor's values: in compiled, exported or traced code, or where it has none."""
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    return is_traced or t.is_meta or is_fake(t)


def can_be_looked_at(t: Tensor) -> bool:
    """Whether values of a tensor can be read, and at no cost: a device would have to be waited for."""
    return t.device.type == "cpu" and not is_blind(t) and not is_transformed() and type(t) in (Tensor, nn.Parameter)


def check_one_of(choices: tuple[str, ...], **names: str) -> None:
    """Raise ValueError unless every named value is one of the choices."""
    for name, value in names.items():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def check_noise(noise_gates: bool, noise_mult: float = 1.0) -> None:
    """Raise ValueError for a tensor, which is a mask in the wrong place, and for a strength that is no number."""
    check_finite(noise_mult=noise_mult)
    if isinstance(noise_gates, Tensor):
        got = f"a tensor of shape {tuple(noise_gates.shape)}"
        raise ValueError(f"noise_gates must be a bool, got {got}: a mask is passed by name, mask=...")


def check_tokens(
    x: Tensor, dim: int, mask: Tensor | None = None, route_by: Tensor | None = None, draws: Tensor | None = None
) -> None:
    """Raise ValueError unless x (..., d) are floating-point tokens of width dim, and what comes with them fits.

    mask (...) is boolean, route_by (..., d) of x's shape, draws (..., k) with as many axes; the gate knows the shape
    that it needs of them.
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
        expected = f"x's shape {tuple(x.shape)} but for the last axis, the choices"
        raise ValueError(f"draws must have {expected}, got {tuple(draws.shape)}")
    for name, given in (("mask", mask), ("route_by", route_by), ("draws", draws)):
        if given is not None and given.device != x.device:
            raise ValueError(f"{name} must be on x's device, {x.device}, got {given.device}")


def check_draws(draws: Tensor, *shapes: tuple[int, ...]) -> None:
    """Raise ValueError unless draws are floating-point numbers in [0, 1], in one of the shapes."""
    if draws.shape not in shapes:
        raise ValueError(f"draws must have shape {shapes[0]}, a number for every choice, got {tuple(draws.shape)}")
    if not draws.is_floating_point():
        raise ValueError(f"draws must be floating-point numbers in [0, 1], got {draws.dtype}")
    if can_be_looked_at(draws) and not ((draws >= 0) & (draws <= 1)).all():
        raise ValueError(f"draws must lie in [0, 1], got numbers from {draws.min().item()} to {draws.max().item()}")


def check_thresholds(thresholds: Tensor, top_n: int, name: str) -> None:
    """Raise ValueError unless there is a threshold in [0, 1] for each choice, as far as they can be looked at."""
    if thresholds.shape != (top_n,):
        wanted = f"a number for each of top_n={top_n} choices"
        raise ValueError(f"{name} must hold {wanted}, got shape {tuple(thresholds.shape)}")
    if can_be_looked_at(thresholds) and not all(0 <= t <= 1 for t in thresholds.tolist()):
        advice = "where a loader left it without values, reset_parameters() sets those that the gate was built with"
        raise ValueError(f"{name} must lie in [0, 1], got {thresholds.tolist()}; {advice}")


def refuse_old_pickle(module: nn.Module, state: dict[str, Any], needed: str) -> None:
    """Raise RuntimeError for a whole module pickled by an older version, whose state lacks an attribute needed here."""
    if needed not in state:
        raise RuntimeError(
            f"this {type(module).__name__} was pickled by another version of st-moe-pytorch, such as 0.1.8, and "
            f"lacks {needed!r}: save its state_dict() there and load that here, which has the same names and shapes"
        )


def is_overridden(module: nn.Module, cls: type[nn.Module]) -> bool:
    """Whether the module computes something else than cls does: another class or an assigned ``forward``."""
    return "forward" in vars(module) or type(module).forward is not cls.forward
