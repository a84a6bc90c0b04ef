"""Which modules of a model are its feed-forwards, by name or type, and whether a sparse layer can replace them."""

import re
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from inspect import Parameter, signature
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.func import functional_call

from st_moe_pytorch.compat import has_hooks
from st_moe_pytorch.moe import MoE

Where: TypeAlias = str | type[nn.Module] | tuple[str, ...] | tuple[type[nn.Module], ...]
TORCH_LAYERS = nn.TransformerEncoderLayer | nn.TransformerDecoderLayer
TORCH_PARTS = ("linear1", "activation", "dropout", "linear2")
PARTS = ". If the model runs its parts one after another, name all, the activation too: where=(first, ..., last)"


class FeedForward(NamedTuple):
    """A feed-forward of a model: one module or, where the model runs its parts itself, several in a row."""

    names: tuple[str, ...]
    module: nn.Module
    """What it computes, as one module."""

    def __str__(self) -> str:
        return ", ".join(self.names)


def feed_forwards(model: nn.Module, where: Where) -> list[FeedForward]:
    """The feed-forwards that `where` means, as of `sparsify`.

    Raises ValueError for a malformed `where`, or one that means something that is no dense feed-forward.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    kinds = {isinstance(part, type) for part in where} if isinstance(where, tuple) else {isinstance(where, type)}
    if not isinstance(where, str | type | tuple) or len(kinds) != 1:
        raise ValueError(f"where must be a pattern, a type, or a tuple of either, got {where!r}")
    parts = [part for part in where if isinstance(part, str)] if isinstance(where, tuple) else []
    if parts:
        columns = [_outermost(name for name in modules if _matches(name, part)) for part in parts]
        if len({len(names) for names in columns}) > 1:
            counts = ", ".join(f"{len(names)} by {part!r}" for names, part in zip(columns, parts, strict=True))
            wanted = "equally many first, second and further parts of feed-forwards"
            raise ValueError(f"where must name {wanted}, found {counts}")
        found = [_in_a_row(names, [modules[name] for name in names]) for names in zip(*columns, strict=True)]
    else:
        names = _outermost(name for name in modules if _is_meant(name, modules[name], where))
        found = [_whole(name, modules[name]) for name in names]
    for feed_forward in found:
        _refuse_parts_of_torchs_layers(feed_forward, modules)
        _refuse_sparse(feed_forward, modules, where)
        if parts:
            _refuse_linear(feed_forward)
    return found


def _matches(name: str, pattern: str) -> bool:
    """Whether a dotted name fits a pattern: `*` is one name between dots or part of one, `**` any number of names."""

    def follow(names: Sequence[str], parts: Sequence[str]) -> bool:
        if not parts:
            return not names
        if parts[0] == "**":
            return any(follow(names[start:], parts[1:]) for start in range(len(names) + 1))
        return bool(names) and fnmatchcase(names[0], parts[0]) and follow(names[1:], parts[1:])

    return bool(name) and follow(name.split("."), pattern.split("."))


def _is_meant(name: str, module: nn.Module, where: Where) -> bool:
    if isinstance(where, str):
        return _matches(name, where)
    kinds = where if isinstance(where, tuple) else (where,)
    return any(isinstance(kind, type) and isinstance(module, kind) for kind in kinds)


def _outermost(names: Iterable[str]) -> list[str]:
    """Those that are not inside another one of them, which comes before them."""
    found: list[str] = []
    for name in names:
        if name and not name.startswith(tuple(f"{outer}." for outer in found)):
            found.append(name)
    return found


class _Applied(nn.Module):
    """A function as a module."""

    def __init__(self, function: object) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)  # pyright: ignore[reportCallIssue]


def _whole(name: str, module: nn.Module) -> FeedForward:
    """A module, or what torch's own transformer layers have in place of one."""
    if not isinstance(module, TORCH_LAYERS):
        return FeedForward((name,), module)
    parts = [getattr(module, part) for part in TORCH_PARTS]
    modules = [part if isinstance(part, nn.Module) else _Applied(part) for part in parts]
    return _in_a_row([f"{name}.{part}" for part in TORCH_PARTS], modules)


def _in_a_row(names: Iterable[str], modules: Sequence[nn.Module]) -> FeedForward:
    row = nn.Sequential(*modules)
    row.training = modules[0].training
    return FeedForward(tuple(names), row)


def _refuse_parts_of_torchs_layers(feed_forward: FeedForward, modules: dict[str, nn.Module]) -> None:
    for name in feed_forward.names:
        parent, _, part = name.rpartition(".")
        layer = modules.get(parent)
        if isinstance(layer, TORCH_LAYERS) and len(feed_forward.names) < len(TORCH_PARTS):
            wanted = f"a whole nn.{type(layer).__name__}, {parent!r} or its type, to swap its feed-forward"
            why = "in evaluation, torch computes with the weights of its parts and does not call them"
            raise ValueError(f"where must match {wanted}, got its {part}: {why}")


def _refuse_sparse(feed_forward: FeedForward, modules: dict[str, nn.Module], where: Where) -> None:
    """Layers of this library that are there already, and what looks like a mixture of experts of another make."""
    experts = tuple(f"{name}." for name, module in modules.items() if isinstance(module, MoE))
    why = None
    kinds = [(name.split(".")[-1], type(module).__name__) for name, module in feed_forward.module.named_modules()]
    is_part = any(name.startswith(experts) for name in feed_forward.names)
    if is_part or any(isinstance(module, MoE) for module in feed_forward.module.modules()):
        why = "is sparse already, or part of a sparse layer"
    elif any(name == "experts" or re.search("(?i)moe|experts", kind) for name, kind in kinds):
        why = f"looks like a mixture of experts of the model's own, a {type(feed_forward.module).__name__}"
    if why is not None:
        raise ValueError(f"where must match dense feed-forwards, got {where!r}, but {feed_forward} {why}")


def _refuse_linear(feed_forward: FeedForward) -> None:
    """Parts without the activation between them, which would act on the results of the sparse layer instead."""
    if len(feed_forward.names) > 1 and all(map(_is_linear, feed_forward.module.children())):
        how = "name it between them, as in ('**.fc1', '**.activation_fn', '**.fc2')"
        how += "; if it is no module, swap the module that holds them all"
        raise ValueError(f"where must name the activation too, got linear layers only, {feed_forward}: {how}")


def _is_linear(module: nn.Module) -> bool:
    """Whether a module is known to be linear, as layers with hooks or with a forward of their own are not."""
    is_plain = not has_hooks(module) and "forward" not in vars(module)
    is_known = isinstance(module, nn.Dropout | nn.Identity) or type(module).__name__ == "Conv1D"  # of transformers
    is_known = is_known or type(module).forward is nn.Linear.forward
    return is_plain and (is_known or (type(module) is nn.Sequential and all(map(_is_linear, module))))


def refuse_misfit(feed_forward: FeedForward, dim: int) -> None:
    """Raise ValueError if a feed-forward is seen, without a run on data, not to map (b n dim) -> (b n dim)."""
    module = feed_forward.module
    kinds = Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD
    given = [each for each in signature(module.forward).parameters.values() if each.kind in kinds]
    needed = [each.name for each in given if each.default is Parameter.empty]
    if len(needed) > 1:
        raise ValueError(f"where must match modules of one input, but {feed_forward} takes {', '.join(needed)}{PARTS}")
    if any(has_hooks(part) for part in module.modules()):
        return  # which may do anything with a tensor that has no data
    tensors = {name: t.to("meta") for name, t in (*module.named_parameters(), *module.named_buffers())}
    dtype = next((t.dtype for t in tensors.values() if t.is_floating_point()), torch.get_default_dtype())
    try:
        with torch.no_grad():
            y = functional_call(module, tensors, torch.empty(1, 2, dim, dtype=dtype, device="meta"))
    except Exception:
        return  # it may not work without data; if it is of another width, the layer tells in its first forward
    if not isinstance(y, Tensor):
        got = f"{feed_forward} returns a {type(y).__name__}"
        raise ValueError(f"where must match modules that return one tensor, but {got}")
    if y.shape != (1, 2, dim):
        got = f"{feed_forward} maps a width of {dim} to {y.shape[-1]}"
        raise ValueError(f"where must match whole feed-forwards, but {got}{PARTS}")


def nearest(model: nn.Module, where: Where, most: int = 8) -> str:
    """Names of modules, with `*` for numbers, that are most like a pattern."""
    names = dict.fromkeys(re.sub(r"(^|(?<=\.))\d+(?=\.|$)", "*", name) for name, _ in model.named_modules() if name)
    words = where if isinstance(where, tuple) else (where,)
    wanted = " ".join(getattr(word, "__name__", str(word)) for word in words)
    close = get_close_matches(wanted, names, most, cutoff=0.0)
    return ", ".join(close) + (f" and {len(names) - len(close)} others" if len(names) > len(close) else "")
