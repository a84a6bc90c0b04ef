"""Sparse layers in models that someone else wrote: swap feed-forwards, and collect the auxiliary losses without editing the model.

sparsify(model, "transformer.h.*.mlp", lambda ffn: MoE.from_dense(ffn, dim=768, num_experts=8))

with collect_aux_losses() as aux:
    loss = model(**batch).loss
(loss + aux.total).backward()
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from st_moe_pytorch.compat import is_recomputing
from st_moe_pytorch.moe import MoE, SparseMoEBlock, given_only


class AuxLosses:
    """What `collect_aux_losses` collects: ``total``, the 0-d sum of the layers' total_aux_loss, each layer once for every call of it."""

    def __init__(self) -> None:
        # a leaf that requires grad if layers' losses do, so that compiled code sees the same kind of tensor in every layer
        self.total: Tensor = torch.zeros((), requires_grad=torch.is_grad_enabled())


_collecting: AuxLosses | None = None


@contextmanager
def collect_aux_losses() -> Iterator[AuxLosses]:
    """Collect the auxiliary losses of all swapped-in layers that run inside, in any model; add ``total`` to the loss.

    Scale it as the loss, for instance by 1 / micro-batches when gradients accumulate. Layers that run again in the backward, for
    activation checkpointing, are not counted again. In evaluation the total is 0. Of nested blocks, the innermost collects.
    """
    global _collecting
    before, _collecting = _collecting, AuxLosses()
    try:
        yield _collecting
    finally:
        _collecting = before


class SparseFeedForward(nn.Module):
    """A sparse layer in place of a feed-forward, from tensor to tensor. Its auxiliary loss goes to `collect_aux_losses`."""

    def __init__(self, moe: MoE | SparseMoEBlock) -> None:
        super().__init__()
        self.moe = moe

    def forward(self, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """Tokens x (... d) -> outputs of the layer. mask (...) is True for real tokens; without one, padding is routed as tokens are."""
        outputs, aux_loss, _, _ = self.moe(x, **given_only(mask=mask))
        losses = _collecting
        if losses is not None and self.training and not is_recomputing():
            if losses.total.requires_grad and not torch.is_grad_enabled():
                raise RuntimeError(
                    "the auxiliary loss of a sparse layer has no gradient, because the layer runs without gradients in a training step; "
                    "if this is activation checkpointing, choose the kind that keeps them: use_reentrant=False"
                )
            losses.total = losses.total + aux_loss
        return outputs


def sparsify(
    model: nn.Module, where: str | type[nn.Module] | tuple[type[nn.Module], ...], make: Callable[[nn.Module], MoE | SparseMoEBlock]
) -> nn.Module:
    """Put a sparse layer in place of each feed-forward of a model, and return the model, changed in place.

    where: which modules are swapped: a pattern of their names as of a shell, such as "encoder.layers.*.mlp", or their type(s).
        Of modules inside each other, the outermost is swapped.
    make: builds the layer for one of them, which it gets. The layer moves to its device, dtype and mode. A feed-forward
        that is shared gets one layer, as shared.

    Modules must map one tensor (... d) to one of the same shape. Raises ValueError, with the model unchanged, if nothing is found or if
    what is found is sparse already.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        is_match = fnmatchcase(name, where) if isinstance(where, str) else isinstance(module, where)
        if name and is_match and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    if not found:
        raise ValueError(f"where must match modules of the model, got {where!r}; there are {', '.join(filter(None, modules))}")
    experts = tuple(f"{name}." for name, module in modules.items() if isinstance(module, MoE))
    for name, module in found.items():
        if name.startswith(experts) or any(isinstance(inner, MoE) for inner in module.modules()):
            raise ValueError(
                f"where must match dense feed-forwards, got {where!r}, but {name} is sparse already, or part of a sparse layer"
            )
    layers = {id(module): _in_place_of(module, make(module)) for module in {id(module): module for module in found.values()}.values()}
    for name, module in found.items():
        model.set_submodule(name, layers[id(module)])
    return model


def _in_place_of(module: nn.Module, moe: MoE | SparseMoEBlock) -> SparseFeedForward:
    """The layer, as the module was: on its device, in its dtype and mode."""
    if not isinstance(moe, MoE | SparseMoEBlock):
        raise ValueError(f"make must return an MoE or a SparseMoEBlock, got {type(moe).__name__}")
    layer = SparseFeedForward(moe).train(module.training)
    like = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    return layer if like is None else layer.to(device=like.device, dtype=like.dtype)
