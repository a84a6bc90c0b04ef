"""Weights of sparse layers as the Mixtral of transformers has them, and back. Axes: d width, e experts, h hidden units.

Names and shapes are those of the modules of transformers 5 (tested with 5.24), whose ``save_pretrained`` writes the
files that other programs read.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from st_moe_pytorch.checks import is_overridden
from st_moe_pytorch.compat import has_hooks
from st_moe_pytorch.experts import Experts, are_alike
from st_moe_pytorch.gate import RouterLinear, is_dense
from st_moe_pytorch.gating import TopNGating
from st_moe_pytorch.layers import ACTIVATIONS, RMSNorm
from st_moe_pytorch.moe import MoE, SparseMoEBlock
from st_moe_pytorch.tools.swap import SparseFeedForward
from st_moe_pytorch.tools.upcycle import activation_of, plain_expert


def export_mixtral(model: nn.Module) -> dict[str, Tensor]:
    """The state_dict of a model or layer, in which each `MoE` is a ``MixtralSparseMoeBlock`` that computes the same.

    ``gate.weight`` (e d), ``experts.gate_up_proj`` (e 2h d) and ``experts.down_proj`` (e d h), times mult_bias, stand
    under the name of the layer, or of the feed-forward that it replaces. Other tensors stay as they are. The config
    needs hidden_act="gelu", or the other activation of the experts ("gelu_pytorch_tanh" for "gelu_tanh", "silu"),
    intermediate_size=h, num_local_experts=e and num_experts_per_tok=top_n. Where h numbers are no multiple of 16 bytes,
    models need experts_implementation="eager" too, whenever they are built or loaded, as transformers' usual product
    refuses them.

    What a layer does in evaluation must be what Mixtral does: every choice is asked for and none dropped, gates are
    normalised softmax scores, experts are plain `Expert`s without norm and biases. Raises ValueError that lists what is
    otherwise.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, Any] = {name: module for name, module in modules.items() if isinstance(module, MoE)}
    if not layers:
        raise ValueError(f"model must contain MoE layers, got a {type(model).__name__} without any")
    state = model.state_dict()
    for name, layer in layers.items():
        outer = modules[name.rpartition(".")[0]] if name else None
        problems = list(_problems_with(layer))
        if isinstance(outer, SparseMoEBlock):
            problems.append("it must not be in a SparseMoEBlock, whose norm and feed-forwards Mixtral does not have")
        if problems:
            raise ValueError(f"{name or 'the layer'} cannot be one of Mixtral's: {'; '.join(problems)}")
        prefix = f"{name}.".removeprefix(".")
        place = prefix.removesuffix("moe.") if isinstance(outer, SparseFeedForward) else prefix
        state = {key: value for key, value in state.items() if not key.startswith(prefix)}
        state |= {f"{place}{key}": value for key, value in _weights_of(layer).items()}
    activations = {layer.experts.experts[0].net[1].activation for layer in layers.values()}
    if len(activations) > 1:
        raise ValueError(f"model must have one activation in all layers, got {', '.join(sorted(activations))}")
    return state


def _problems_with(layer: MoE) -> Iterator[str]:
    """What Mixtral does not know of a layer."""
    gate, experts = layer.gate, layer.experts
    if type(gate) is not TopNGating or is_dense(gate) or {"route", "decide", "scores", "topk"} & vars(gate).keys():
        yield f"its gate must be a plain TopNGating, got a {type(gate).__name__} with changes or of another make"
    elif type(gate.to_gates) is not RouterLinear or has_hooks(gate.to_gates) or "forward" in vars(gate.to_gates):
        yield f"gate.to_gates must be as TopNGating makes it, got a {type(gate.to_gates).__name__} with changes"
    else:
        needed = {"policy_eval": "all", "capacity_factor_eval": None, "score": "softmax", "normalize_gates": True}
        needed |= {"balance_bias": False, "differentiable_topk": False}
        changed = {name: getattr(gate, name) for name, value in needed.items() if getattr(gate, name) != value}
        yield from (f"gate.{name} must be {needed[name]!r}, got {value!r}" for name, value in changed.items())
        if gate.eps > 1e-6:
            yield f"gate.eps must be 1e-6 or less, since Mixtral divides gates by their sum alone, got {gate.eps}"
        if gate.top_n == 1:
            yield "gate.top_n must be 2 or more, since the gate of a single choice is always 1 in Mixtral, got 1"
    if layer.shared_expert is not None:
        yield "it must have no shared_expert"
    if not isinstance(experts, Experts) or is_overridden(experts, Experts):
        yield f"its experts must be in an Experts, got a {type(experts).__name__}"
    elif experts.parallel is not None:
        yield "its experts must not be sharded: load distributed.full_state_dict(model) into a whole model"
    elif not are_alike(experts.experts):
        yield "its experts must be Experts of one shape and activation, without hooks and adapters"
    else:
        if any(isinstance(part, RMSNorm) for part in experts.experts[0].modules()):
            yield "its experts must have prenorm=False"
        if biases := [name for name, _ in layer.named_parameters() if name.endswith(".bias")]:
            yield f"its experts must have bias=False, got {', '.join(biases)}"


def _weights_of(layer: MoE) -> dict[str, Tensor]:
    nets: list[Any] = [expert.net for expert in layer.experts.experts]
    return {
        "gate.weight": layer.gate.to_gates.weight.detach(),
        "experts.gate_up_proj": torch.stack([_other_half_first(net[0].weight.detach()) for net in nets]),
        "experts.down_proj": torch.stack([(net[-1].weight * net[1].mult_bias).detach() for net in nets]),
    }


def _other_half_first(matrix: Tensor) -> Tensor:
    """Of the first matrix: `GEGLU` has its gate in the second half, Mixtral in the first."""
    return torch.cat(matrix.chunk(2)[::-1])


@torch.no_grad()
def import_mixtral(block: nn.Module) -> MoE:
    """A layer with the weights of a ``MixtralSparseMoeBlock`` that computes the same, with the same gradients.

    In training, Mixtral puts router_jitter_noise on what experts see, too; the layer has none. In half types its router
    computes in float32, where Mixtral's does in the type of the model.

    Raises ValueError for an activation that `GEGLU` does not have, and for one expert per token, whose gate is 1 in
    Mixtral.
    """
    mixtral: Any = block
    try:
        router, gate_up, down = mixtral.gate.weight, mixtral.experts.gate_up_proj, mixtral.experts.down_proj
        function, top_n = mixtral.experts.act_fn, mixtral.top_k
    except AttributeError as error:
        got = type(block).__name__
        raise ValueError(f"block must be a MixtralSparseMoeBlock of transformers 5, got a {got}: {error}") from error
    if (activation := activation_of(function)) is None:
        known = ", ".join(ACTIVATIONS)
        raise ValueError(f"block must have an activation that Experts have, {known}, got {type(function).__name__}")
    if top_n < 2:
        raise ValueError(f"block must have num_experts_per_tok of 2 or more, got {top_n}")
    e, dim, hidden = down.shape
    settings: dict[str, Any] = {"policy_train": "all", "policy_eval": "all", "eps": 1e-20, "top_n": top_n}
    settings |= {"straight_through_dispatch_tensor": False}
    gate = TopNGating(dim, e, capacity_factor_train=None, capacity_factor_eval=None, **settings)
    experts = [plain_expert(dim, hidden, bias=False, activation=activation) for _ in range(e)]
    layer = MoE(dim, e, experts=experts, gate=gate).to(down).train(block.training)
    layer.gate.to_gates.weight.copy_(router)
    for number, expert in enumerate(experts):
        net: Any = expert.net
        net[0].weight.copy_(_other_half_first(gate_up[number]))
        net[2].weight.copy_(down[number])
    return layer
