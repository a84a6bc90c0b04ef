"""What ST-MoE does to a model before it trains: initial values, which parameters are tuned, dropout in experts."""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, get_args

from torch import nn

from st_moe_pytorch.checks import check_one_of, check_positive
from st_moe_pytorch.experts import Experts
from st_moe_pytorch.layers import Expert
from st_moe_pytorch.moe import MoE
from st_moe_pytorch.tools.find import TORCH_LAYERS, TORCH_PARTS

Subset = Literal["all", "non_moe", "moe", "attention", "feed_forward"]


def parameter_subset(model: nn.Module, subset: Subset) -> list[nn.Parameter]:
    """Make these parameters trainable, and no others, and return them for an optimizer (ST-MoE, section 4.2).

    subset:
        "all": every parameter.
        "moe": routers and experts of `MoE` layers.
        "non_moe": all others, shared experts among them.
        "attention": in modules whose class has a name that ends in Attention, such as nn.MultiheadAttention.
        "feed_forward": in dense ones: `Expert`s outside of ``moe.experts``, as a `SparseMoEBlock` has them; those of
            PyTorch's transformer layers; modules whose class has a name that ends in MLP, FeedForward or ActDense.

    Frozen parameters lose their gradient, so that an optimizer that has a state for them leaves them alone. Of a
    parameter that is used in several places, any use counts, but one in a router or expert before all. Call this before
    DistributedDataParallel is built, on all ranks alike, before or after `shard_experts`.

    Raises ValueError, with the model unchanged, if nothing in it is of the subset.
    """
    check_one_of(get_args(Subset), subset=subset)
    layers = [module for module in model.modules() if isinstance(module, MoE)]
    sparse = _parameters_of(part for layer in layers for part in (layer.gate, layer.experts))
    if subset in ("all", "non_moe"):
        chosen = _parameters_of([model])
    elif subset == "moe":
        chosen = sparse
    else:
        attentions = (module for module in model.modules() if _is_named(module, r"Attention\d*"))
        found = attentions if subset == "attention" else _feed_forwards(model)
        chosen = _parameters_of(part for part in found if not any(isinstance(inner, MoE) for inner in part.modules()))
    if subset not in ("all", "moe"):
        chosen = chosen - sparse
    trained = [p for p in model.parameters() if p in chosen and p.is_floating_point()]
    if not trained or (subset == "non_moe" and not layers):
        raise ValueError(f"subset={subset!r} must find modules by their class, found none in a {type(model).__name__}")
    for parameter in set(model.parameters()).difference(trained):
        parameter.requires_grad_(False).grad = None
    for parameter in trained:
        parameter.requires_grad_()
    return trained


def _parameters_of(modules: Iterable[nn.Module]) -> set[nn.Parameter]:
    return {parameter for module in modules for parameter in module.parameters()}


def _feed_forwards(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        if isinstance(module, TORCH_LAYERS):
            yield from (part for part in (getattr(module, name) for name in TORCH_PARTS) if isinstance(part, nn.Module))
        elif isinstance(module, Expert) or _is_named(module, "MLP|FeedForward|ActDense"):
            yield module


def _is_named(module: nn.Module, ending: str) -> bool:
    return any(re.search(f"({ending})$", kind.__name__) for kind in type(module).__mro__)


def set_expert_dropout(model: nn.Module, p: float) -> None:
    """From now on, drop hidden units of experts with probability p (expert dropout, ST-MoE, section 4.1).

    The experts of all `MoE` layers are meant, and no dense feed-forward. An `Expert` gets the Dropout that it could
    have been built with, or loses it for p = 0; its state_dict stays as it is. In experts of another make, the Dropouts
    that they have are set.

    Raises ValueError, with the model unchanged, if it has no experts, or some of another make without a Dropout.
    """
    if not 0 <= p < 1:
        raise ValueError(f"p must lie in [0, 1), got {p}")
    layers = [module.experts for module in model.modules() if isinstance(module, MoE)]
    # those that are on this rank
    experts = [e for layer in layers for e in (layer.experts.children() if isinstance(layer, Experts) else [layer])]
    if not experts:
        raise ValueError(f"model must contain MoE layers, got a {type(model).__name__} without any")
    for expert in experts:
        if not isinstance(expert, Expert) and not _dropouts_of(expert):
            raise ValueError(f"experts must be of class Expert or have a Dropout, got a {type(expert).__name__}")
    for expert in experts:
        if isinstance(expert, Expert):
            _set_dropout(expert.net, p)
        else:
            for dropout in _dropouts_of(expert):
                dropout.p = p


def _dropouts_of(expert: nn.Module) -> list[nn.Dropout]:
    return [part for part in expert.modules() if isinstance(part, nn.Dropout)]


def _set_dropout(net: nn.Sequential, p: float) -> None:
    """Before the last layer, under the name that `Expert` gives it."""
    *others, (name, last) = net.named_children()
    if "dropout" in dict(others):
        del net.dropout
    if p:
        delattr(net, name)
        net.add_module("dropout", nn.Dropout(p).train(net.training))
        net.add_module(name, last)


def switch_init(module: nn.Module, scale: float = 0.1) -> None:
    """Initial values of Switch and ST-MoE, to be applied to a whole model: ``model.apply(switch_init)``.

    Weights of `nn.Linear`, routers among them, are drawn from a normal distribution of mean 0 and variance
    scale / fan_in, anew where they are beyond two standard deviations (Fedus et al. 2021, section 2.4; ST-MoE,
    section 6.2). Biases are 0. Other modules stay as they are.

    Raises ValueError for sharded experts, whose copies on several ranks would differ.
    """
    check_positive(scale=scale)
    if isinstance(module, Experts) and module.parallel is not None:
        raise ValueError("model must get its initial values before shard_experts, which spreads those of rank 0")
    if isinstance(module, nn.Linear):
        std = (scale / module.in_features) ** 0.5
        nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
