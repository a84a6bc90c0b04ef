"""How large a model is, how much of it a token uses, and how many operations that takes."""

from collections import Counter
from math import comb
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from st_moe_pytorch.experts import Experts
from st_moe_pytorch.moe import MoE
from st_moe_pytorch.tools.compat import tensors_in


class Parameters(NamedTuple):
    """Numbers of parameters."""

    total: int
    active: int
    """Those that a token uses."""


def count_parameters(model: nn.Module) -> Parameters:
    """How many parameters a model has, and how many a token uses: all but those of experts that it does not choose.

    A token chooses ``gate.top_n`` experts of each `MoE`, any set of so many being as likely as another; active is the
    mean over these sets, rounded. What experts or layers have in common counts once. Experts of another make than
    `Experts` are taken to be alike.

    Raises ValueError for a gate without ``top_n``, and for sharded experts, of which this rank has only some.
    """
    unused: dict[nn.Parameter, float] = {}  # share of the tokens that do without a parameter
    for layer in (module for module in model.modules() if isinstance(module, MoE)):
        k, e = getattr(layer.gate, "top_n", None), layer.num_experts
        if k is None:
            raise ValueError(f"gates must have top_n, choices of a token, got a {type(layer.gate).__name__} without")
        if getattr(layer.experts, "parallel", None) is not None:
            raise ValueError("model must be counted before shard_experts: this rank has only some of its experts")
        experts = layer.experts.experts if isinstance(layer.experts, Experts) else [layer.experts]
        holders = Counter(parameter for expert in experts for parameter in expert.parameters())
        for parameter, held in holders.items():
            unused[parameter] = unused.get(parameter, 1.0) * comb(e - held, k) / comb(e, k)
    modules = model.named_modules(remove_duplicate=False)
    inside = tuple(f"{name}.experts.".removeprefix(".") for name, module in modules if isinstance(module, MoE))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not name.startswith(inside):
            unused[parameter] = 0.0
    sizes = {parameter: parameter.numel() for parameter in model.parameters()}
    active = sum(size * (1 - unused[parameter]) for parameter, size in sizes.items())
    return Parameters(sum(sizes.values()), round(active))


class Flops(NamedTuple):
    """Floating-point operations of matrix products and attention, two for a multiplication and its addition."""

    forward: float
    backward: float
    """For the gradients of all parameters, and of the inputs, that require one."""


def flops_per_token(model: nn.Module, *inputs: Any, **named: Any) -> Flops:
    """What a model or layer takes for a token of these inputs, as torch's `FlopCounterMode` counts it in one run.

    The first input says how many tokens there are: ids (b, n) are as many as they are, features (b, n, d) b * n.
    Gradients of parameters are left alone. With model and inputs on the meta device nothing is computed, so that any
    size will do; choices that capacity or policy might not let pass are counted then, up to the number of slots.

    What each module and operator takes, `FlopCounterMode` itself tells.
    """
    first = next(iter((*inputs, *named.values())))
    tokens = first.shape[:-1].numel() if first.is_floating_point() else first.numel()
    with torch.enable_grad():
        with FlopCounterMode(display=False) as forward:
            outputs = [t for t in tensors_in(model(*inputs, **named)) if t.requires_grad]
        leaves = [t for t in (*model.parameters(), *tensors_in((inputs, named))) if t.requires_grad]
        with FlopCounterMode(display=False) as backward:
            if outputs:
                torch.autograd.grad(outputs, leaves, [torch.ones_like(t) for t in outputs], allow_unused=True)
    return Flops(forward.get_total_flops() / tokens, backward.get_total_flops() / tokens)
