"""Between dense and sparse: experts copied from a trained feed-forward (Komatsuzaki et al. 2022) or averaged to one."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from st_moe_pytorch.compat import has_hooks
from st_moe_pytorch.experts import Experts
from st_moe_pytorch.layers import ACTIVATIONS, Expert, dense_copies

__all__ = ["as_expert", "average_experts", "dense_copies"]

# names of what makes the gate and what is gated, in one layer or two, and of the last layer
GATED = (("gate_proj", "up_proj", "down_proj"), ("gate_up_proj", "down_proj"), ("wi_0", "wi_1", "wo"))


def as_expert(ffn: nn.Module) -> Expert:
    """An `Expert` with the weights of a gated feed-forward of transformers, which computes the same.

    `Expert`s share their products on accelerators and in compiled code, and can be exported as Mixtral's. Copies of
    ``ffn`` itself are called one by one, and run on slots in compiled code.

    ffn: a module of three linear layers named as those of Llama, Mistral, Qwen and Gemma (gate_proj, up_proj,
        down_proj) or T5 1.1 (wi_0, wi_1, wo), or of two as those of Phi-3 and GLM-4 (gate_up_proj, down_proj), with an
        activation that `GEGLU` has. It stays as it is.

    Raises ValueError for other modules, and if its outputs are not those of the expert.
    """
    own: dict[str, Any] = dict(ffn.named_children())
    names = next((names for names in GATED if all(type(own.get(name)) is nn.Linear for name in names)), ())
    others = [part for name, part in own.items() if name not in names and not list(part.parameters())]
    activation = next(filter(None, map(activation_of, others)), None)
    if not names or activation is None or any(map(has_hooks, ffn.modules())):
        layers = " or ".join(", ".join(names) for names in GATED)
        wanted = f"nn.Linears {layers} and one of {', '.join(ACTIVATIONS)}, without hooks"
        raise ValueError(f"ffn must have {wanted}, got {type(ffn).__name__}: {ffn}")
    *ups, down = (own[name] for name in names)
    biases = all(layer.bias is not None for layer in (*ups, down))
    p = next((part.p for part in others if isinstance(part, nn.Dropout)), 0.0)
    expert: Any = plain_expert(down.out_features, down.in_features, dropout=p, bias=biases, activation=activation)
    expert.to(ups[0].weight).train(ffn.training)
    expert.net[0].requires_grad_(ups[0].weight.requires_grad)
    expert.net[-1].requires_grad_(down.weight.requires_grad)
    with torch.no_grad():
        for name in ("weight", "bias")[: 1 + biases]:
            gate, up = torch.cat([getattr(layer, name) for layer in ups]).chunk(2)
            getattr(expert.net[0], name).copy_(torch.cat((up, gate)))
            getattr(expert.net[-1], name).copy_(getattr(down, name))
        wide, device = torch.promote_types(down.weight.dtype, torch.float32), down.weight.device
        x = torch.arange(4 * down.out_features, device="cpu").sin().view(4, -1).to(device, wide)
        found, wanted = (deepcopy(module).to(wide).eval()(x) for module in (expert, ffn))
    if not x.is_meta and not (found - wanted).norm() <= 1e-4 * wanted.norm():
        wanted = "down(activation(gate) * up), with biases on all layers or on none"
        raise ValueError(f"ffn must compute {wanted}, got other outputs from {ffn}")
    return expert


def plain_expert(dim: int, hidden: int, **arguments: Any) -> Expert:
    """An `Expert` of so many hidden units, without a multiplicative bias."""
    # half a unit more, so that rounding down gives as many
    return Expert(dim, (hidden + 0.5) * 1.5 / dim, mult_bias=False, **arguments)


def activation_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """Which of `ACTIVATIONS` a function is, if any, by its values."""
    probe = torch.linspace(-4, 4, 33, dtype=torch.float64, device="cpu")
    alike = (name for name, (own, *_) in ACTIVATIONS.items() if torch.allclose(function(probe), own(probe), rtol=1e-6))
    return next(alike, None)


def average_experts(experts: Sequence[nn.Module] | nn.ModuleList | Experts) -> nn.Module:
    """One dense feed-forward from experts of one shape, their mean.

    It is a copy of the first, whose parameters and floating-point buffers are the means.

    experts: of a layer, ``moe.experts``, or a list of them. Raises ValueError for sharded ones, of which a rank has
        only some.
    """
    if isinstance(experts, Experts):
        experts = experts.experts
    if isinstance(experts, nn.ModuleList) and len(list(experts.children())) < len(experts):
        how = "load st_moe_pytorch.distributed.full_state_dict(model) into an unsharded model and average its experts"
        raise ValueError(f"experts must all be on this rank to be averaged: {how}")
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
